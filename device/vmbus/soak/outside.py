"""The card's other end: a network namespace of the episode's own, and a program in it that exchanges TCP streams with
the guest. It stays where it is, whatever is done to the VM.

The namespace's name says who made it; what a killed worker has left is removed by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import vmbus
import vmbus_guest
from vmbus.errors import EnvironmentProblem
from vmbus.providers.network.interface import NAMESPACES, in_namespace
from vmbus.qemu.process import Child

HOST, GUEST, PREFIX_LENGTH = "192.0.2.1", "192.0.2.2", 24
_PREFIX = "vmbus-soak-"
_TUN = Path("/dev/net/tun")
_PROGRAM = """
import ctypes, os, runpy, sys
libc = ctypes.CDLL(None, use_errno=True)
descriptor = os.open(sys.argv[1], os.O_RDONLY)
if libc.setns(descriptor, 0x40000000):
    sys.exit(os.strerror(ctypes.get_errno()))
os.close(descriptor)
del sys.argv[1]
runpy.run_module("vmbus_guest.testdrivers", run_name="__main__", alter_sys=True)
"""
"""Joins the namespace argv[1], and runs a test driver of the guest's with the other arguments."""


def why_not() -> str:
    """Why there can be no card here; "" if there can."""
    if os.geteuid():
        return "that needs root's rights"
    if not os.access(_TUN, os.R_OK | os.W_OK):
        return f"that needs {_TUN}"
    return ""


class Outside:
    """Use `make`. `name`: what the card's option `namespace` takes."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self._log = log
        self._program: Child | None = None

    @classmethod
    async def make(cls, log: Path) -> Outside:
        """`log`: a file for the program's words. Raises EnvironmentProblem."""
        name = f"{_PREFIX}{os.getpid()}-{_started(os.getpid())}-{os.urandom(2).hex()}"
        await asyncio.to_thread(_make, name)
        return cls(name, log)

    async def begin(self, streams: int, stall_seconds: float) -> None:
        """Connect to the guest, which serves. Raises EnvironmentProblem."""
        parameters = {"mode": "connect", "host": GUEST, "streams": streams, "stall_seconds": stall_seconds}
        roots = [str(Path(package.__file__ or "").parents[1]) for package in (vmbus, vmbus_guest)]
        self._program = await Child.spawn(
            "the card's other end",
            [
                *(sys.executable, "-c", _PROGRAM, str(NAMESPACES / self.name), "transfer"),
                *("--parameters", json.dumps(parameters)),
            ],
            self._log,
            environment={"PYTHONPATH": os.pathsep.join(roots)},
        )

    @property
    def running(self) -> bool:
        """Whether the program is there."""
        return self._program is not None and self._program.running

    async def finish(self, seconds: float) -> dict[str, Any]:
        """No more bytes from this end: its result, once the guest has ended, too. Raises EnvironmentProblem."""
        assert self._program is not None
        if self._program.running:
            self._program.process.terminate()
            await asyncio.wait({self._program.exited}, timeout=seconds)
        text = await asyncio.to_thread(self._log.read_text, errors="replace")
        for line in reversed(text.splitlines()):
            if line.startswith('{"event":"result"'):
                return dict(json.loads(line)["result"])
        raise EnvironmentProblem(f"the card's other end came to no result: {text[-500:]!r}")

    async def remove(self) -> None:
        """All of it."""
        if self._program is not None:
            await self._program.stop()
        await asyncio.to_thread(_remove, self.name)


def _started(pid: int) -> str:
    """When a process was started, in the kernel's ticks; "" if there is none."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(") ", 1)[1].split()[19]
    except OSError:
        return ""


def _make(name: str) -> None:
    from pyroute2 import IPRoute, netns  # type: ignore[import-untyped]

    for path in NAMESPACES.glob(f"{_PREFIX}*"):
        pid, started, *_ = path.name[len(_PREFIX) :].split("-")
        if pid.isdigit() and _started(int(pid)) != started:
            _remove(path.name)

    def switch_on() -> None:
        with IPRoute() as link:
            link.link("set", index=1, state="up")

    try:
        netns.create(name)
        in_namespace(name, switch_on)
    except OSError as error:
        _remove(name)
        raise EnvironmentProblem(f"cannot make a network namespace: {error.strerror}") from error
    except EnvironmentProblem:
        _remove(name)
        raise


def _remove(name: str) -> None:
    from pyroute2 import netns

    with contextlib.suppress(OSError):
        netns.remove(name)
    with contextlib.suppress(OSError):
        (NAMESPACES / name).unlink()
