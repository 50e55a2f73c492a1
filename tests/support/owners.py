"""Detached owners of VMs: nobody's children, which no check after a test would find."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import pace
from vmbus.cli.running import status_of
from vmbus.vm.run_directory import running_vms


def until(condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + pace.seconds(seconds)
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def held_by_a_terminal(pid: int) -> list[str]:
    """By what a terminal's end would reach a process: its session, and files that it has open."""
    held = [] if os.getsid(pid) == pid else ["session"]
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed in this moment
            path = str(descriptor.readlink())
            held += [path] if path.startswith("/dev/pts/") else []
    return held


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    """A detached owner is nobody's child: what a failed test leaves is ended by its record."""
    yield
    for name in running_vms():
        if (pid := asyncio.run(status_of(name)).pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    until(lambda: not running_vms(), "owners to end")
