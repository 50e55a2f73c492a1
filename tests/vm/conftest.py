"""VMs for tests. Nothing that a test starts may outlive it: the check after every test looks for processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import boot
from support.processes import children
from vmbus.provision import provision
from vmbus.qemu.command_line import Programs, programs_from
from vmbus.qemu.description import VmDescription, load_description

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def nothing_outlives_the_test() -> Iterator[None]:
    before = set(children())
    yield
    left = {pid: command[:120] for pid, command in children().items() if pid not in before}
    assert not left, f"processes outlive the test: {left}"


@pytest.fixture(scope="session")
def programs() -> Programs:
    return programs_from(provision())


@pytest.fixture(scope="session")
def demo_description() -> VmDescription:
    return load_description(CHECKOUT / "qemu_configs" / "demo.toml")


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Run a coroutine with a bound that is far above what any of them needs."""

    def run(work: Coroutine[Any, Any, Any], timeout: float = 200.0) -> Any:
        async def bounded() -> Any:
            return await asyncio.wait_for(work, timeout)

        return asyncio.run(bounded())

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if boot.seconds:
        terminalreporter.line(
            f"{len(boot.seconds)} guests were saved and restored right after their boot, in {sum(boot.seconds):.1f} s"
        )
