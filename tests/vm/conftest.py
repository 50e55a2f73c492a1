"""VMs for tests. Nothing that a test starts may outlive it: the check after every test looks for processes, and for
directories of VMs.

Several of these tests may run at a time, each in a worker of its own. What belongs to a worker is told apart by descent
(processes) and by place (its own directories for temporary and for runtime files).
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import boot, streams
from support.pace import bounded
from support.processes import children
from vmbus.provision import provision
from vmbus.testkit.story import save_in_flight
from vmbus.util.directories import state_directory
from vmbus.vm.command_line import Programs, programs_from
from vmbus.vm.description import VmDescription, load_description
from vmbus.vm.run_directory import clean_stale, runtime_base

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session", autouse=True)
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where VMs have their directories that are given no other place; nobody else's are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("r")))
        patch.setenv("VMBUS_STATE", str(tmp_path_factory.mktemp("s")))
        yield runtime_base()


@pytest.fixture(scope="module")
def own_temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where campaigns have their large files; those of tests that run at the same time are elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("t"))
        patch.setenv("TMPDIR", folder)
        patch.setenv("VMBUS_STATE", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(autouse=True)
def nothing_outlives_the_test(runtime: Path) -> Iterator[None]:
    before = set(children())
    yield
    left = {pid: command[:120] for pid, command in children().items() if pid not in before}
    assert not left, f"processes outlive the test: {left}"
    clean_stale(runtime)  # of owners that the test has killed
    bases = [runtime, base] if (base := state_directory() / "run").is_dir() else [runtime]
    for base in bases:
        clean_stale(base)
        assert not list(base.iterdir()), f"directories of VMs outlive the test: {list(base.iterdir())}"


@pytest.fixture(scope="session")
def programs() -> Programs:
    return programs_from(provision())


@pytest.fixture(scope="session")
def demo_description() -> VmDescription:
    return load_description(CHECKOUT / "qemu_configs" / "demo.toml")


@pytest.fixture(scope="session")
def taken(demo_description: VmDescription, programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> boot.Taken:
    """Saved live, with packets in flight in every state, for all tests that restore it: a boot is not cheap."""
    directory = tmp_path_factory.mktemp("taken") / "snapshot"

    async def take() -> boot.Taken:
        vm, job = await boot.in_traffic(demo_description, programs, boot.Taken.STORY)
        async with vm:
            report = await save_in_flight(vm, job, boot.Taken.STORY, directory)
        assert min(report.packets.values()) > 0 and report.flushed_pages > 0
        return boot.Taken(directory, job)

    return asyncio.run(take())


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Run a coroutine with a bound that is far above what any of them needs, and follows the machine's speed."""

    def run(work: Coroutine[Any, Any, Any], timeout: float = 200.0) -> Any:
        async def in_time() -> Any:
            with bounded(timeout, "a story") as bound:
                return await asyncio.wait_for(work, bound)

        return asyncio.run(in_time())

    return run


@pytest.fixture(scope="session", autouse=True)
def boots(note: Callable[[str], None]) -> Iterator[None]:
    yield
    if boot.seconds:
        note(f"{len(boot.seconds)} guests were saved and restored right after their boot, in {sum(boot.seconds):.1f} s")
    for report in streams.reports:
        note(f"TCP in one of these tests: {report}")
