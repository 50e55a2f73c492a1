"""The failure matrix is complete, and the docs have it as it is."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.failure_matrix import (
    CELLS,
    GAPS,
    IN_QEMU,
    PHASES,
    PHASES_OF,
    TABLE,
    Failure,
    Operation,
    Outcome,
    markdown,
)
from support.fake_qemu import running
from support.pace import eventually
from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.operations import capture, save
from vmbus.operations.machine import VirtualMachine
from vmbus.qemu import instance
from vmbus.qemu.ends import Ends
from vmbus.snapshot.bundle import SnapshotWriter
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.errors import SaveFailed
from vmbus.vm.moments import Moment
from vmbus.vm.process import Child, ProcessDied
from vmbus.vm.run_directory import RunDirectory

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migration.md"


def test_the_failure_matrix_leaves_nothing_out_without_a_reason() -> None:
    assert len(TABLE) == len(Operation) * len(PHASES) * len(Failure)
    assert set(PHASES) == set(Moment) - {Moment.AFTER_GO}  # the source's view of the same moment as BEFORE_CONT
    assert {cell.key for cell in CELLS} | GAPS.keys() == TABLE.keys() and len(CELLS) + len(GAPS) == len(TABLE)
    assert all(reason for reason in GAPS.values())
    for operation, phases in PHASES_OF.items():
        for phase in phases:
            assert any(cell.key[:2] == (operation, phase) for cell in CELLS), (operation, phase)


def test_the_failure_matrix_says_why_nobody_runs_a_vm_and_what_the_error_says() -> None:
    for cell in CELLS:
        assert bool(cell.why) == (cell.outcome in (Outcome.NOBODY, Outcome.SNAPSHOT)), cell.name
        re.compile(cell.says)
        # Who is killed, or has hung up, says nothing; and who has moved has nothing to complain about.
        silent = cell.failure in (Failure.SOURCE_OWNER, Failure.DESTINATION_OWNER, Failure.ASKER)
        assert cell.says or silent or cell.outcome is Outcome.DESTINATION, cell.name


def test_the_failure_matrix_has_its_decisive_cells_in_qemu() -> None:
    assert {cell.key for cell in CELLS} >= IN_QEMU
    assert 12 <= len(IN_QEMU) <= 16
    assert {key[2] for key in IN_QEMU} >= {Failure.DESTINATION_QEMU, Failure.LINK_CUT, Failure.SOURCE_DISK}


def test_the_failure_matrix_in_the_docs_is_this_one() -> None:
    page = PAGE.read_text()
    same = page.endswith("\n" + markdown())
    assert same, "docs/migration.md is out of date: replace its tables by what python -m support.failure_matrix prints"
    for seconds in (capture.PROVIDERS_TIMEOUT, instance.CONTROL_TIMEOUT):
        assert seconds == 30.0
    assert capture.SAVE_TIMEOUT == 60.0
    assert "with 30 seconds and" in page and "after 60 seconds, waits for the server another 30 seconds" in page


def test_failure_matrix_sees_a_vm_that_runs_twice() -> None:
    """What the loopback cells find that out with."""
    dead = subprocess.Popen(["true"])
    log = f"{dead.pid} run\n{os.getpid()} run\n1 run\n1 stop\n"
    dead.wait()
    assert running(log) == {os.getpid()}  # the dead one cannot run, and the other has stopped
    assert running(log + f"{os.getpid()} stop\n") == set()


async def test_failure_matrix_owner_lets_a_migration_end_that_does_not_need_the_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The destination may have everything when the source's QEMU dies: then nobody else could run the VM."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    provider = ProviderDescription("echo", "echo", "00000000-0000-4000-8000-000000000001")
    description = VmDescription("demo", DeviceDescription("vmbus0", [provider]))
    programs = Programs(("qemu",), "11.1.3", "tcg", tmp_path, tmp_path)

    vm = VirtualMachine(description, programs, RunDirectory.create("demo"))
    try:
        vm.devices[0].server = await Child.spawn("server", ["sleep", "60"], tmp_path / "server")
        vm.qemu = await Child.spawn("qemu", ["sleep", "60"], tmp_path / "qemu")
        vm._ends = Ends(vm.monitor, vm.paths.console_log)
        vm.idle.clear()
        waiting = asyncio.create_task(vm.wait_ended())
        vm.qemu.process.kill()
        await vm.qemu.exited
        await asyncio.wait({waiting}, timeout=0.1)
        assert not waiting.done(), "the migration would be torn down now"
        vm.idle.set()
        with pytest.raises(ProcessDied, match="SIGKILL"):
            await asyncio.wait_for(waiting, 10)
    finally:
        await vm.kill()


WRITES = "import pathlib, sys, time\nfolder = pathlib.Path(sys.argv[1])\nnumber = 0\nwhile True:\n" + (
    "    number += 1\n    try: (folder / f'{number}.state').touch()\n    except OSError: time.sleep(0.001)\n"
)
"""What a device server may do yet whose save is given up: it goes on writing."""


async def test_failure_matrix_nobody_writes_into_a_snapshot_that_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that cost the VM removes its files when the processes have ended, and not under their hands."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    provider = ProviderDescription("echo", "echo", "00000000-0000-4000-8000-000000000001")
    description = VmDescription("demo", DeviceDescription("vmbus0", [provider]))
    programs = Programs(("qemu",), "11.1.3", "tcg", tmp_path, tmp_path)
    removed: list[bool] = []

    vm = VirtualMachine(description, programs, RunDirectory.create("demo"))

    async def fail(_: object, writer: SnapshotWriter, *__: object, **___: object) -> None:
        writing = [sys.executable, "-c", WRITES, str(writer.directory)]
        vm.devices[0].server = await Child.spawn("server", writing, tmp_path / "server")
        await eventually(lambda: any(writer.directory.glob("*.state")), "the server to write")
        raise SaveFailed("the VM is lost", source_alive=False)

    abort = SnapshotWriter.abort

    def looked_at(writer: SnapshotWriter) -> None:
        removed.append(vm.server is not None and not vm.server.running)
        abort(writer)

    monkeypatch.setattr(save, "_save", fail)
    monkeypatch.setattr(SnapshotWriter, "abort", looked_at)
    try:
        with pytest.raises(SaveFailed):
            await vm.save(tmp_path / "taken")
    finally:
        await vm.kill()
    assert removed == [True]
    assert not {path for path in os.listdir(tmp_path) if "taken" in path}  # noqa: PTH208 - names only
