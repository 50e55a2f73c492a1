"""Real VMs that are saved, reverted, and hurt: whatever fails, either the VM runs on or nothing is left of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import pace
from support.boot import Taken
from support.commands import perform, said_by, spawn
from support.pace import until
from support.processes import command_lines
from vmbus.errors import StateError, VmbusError
from vmbus.operations.machine import VirtualMachine
from vmbus.qemu.probe import require_same
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.moments import Sabotage
from vmbus.vm.process import ProcessDied
from vmbus.vm.run_directory import running_vms

pytestmark = [pytest.mark.vm, pytest.mark.long]

SOON = 20.0
"""Seconds within which a death must have been noticed and everything torn down."""


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    base = tmp_path_factory.mktemp("r")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    yield
    assert running_vms() == []
    assert list((base / "vmbus").iterdir()) == []
    assert not [line for line in command_lines().values() if str(base) in line]  # its sockets are on each of ours


@pytest.mark.parametrize("live", [False, True])
async def test_a_guest_that_is_still_booting(
    demo_description: VmDescription, programs: Programs, tmp_path: Path, live: bool
) -> None:
    async with await VirtualMachine.launch(demo_description, programs) as vm:  # as booted: it is still booting
        report = await vm.save(tmp_path / "early", live=live)
        assert report.packets == {"queued": 0, "sent": 0}
    async with await VirtualMachine.restore(tmp_path / "early", programs) as vm:
        await vm.wait_ready()
        found = await vm.call_agent("run", driver="echo", parameters={"count": 200}, timeout=60.0)
        assert found["result"]["verdict"] == "passed"
        await vm.shutdown()


@pytest.mark.parametrize("victim", ["server", "qemu"])
async def test_the_death_of_either_process_is_the_end_of_both(programs: Programs, taken: Taken, victim: str) -> None:
    async with await VirtualMachine.restore(taken.directory, programs) as vm:
        os.kill(getattr(vm, victim).pid, signal.SIGKILL)
        async with asyncio.timeout(pace.seconds(SOON)):
            with pytest.raises(ProcessDied, match="was killed by SIGKILL"):
                await vm.wait_ended()
            with pytest.raises(VmbusError):
                await vm.call_agent("ping")
            await vm.kill()


async def test_a_state_that_the_server_refuses(programs: Programs, taken: Taken) -> None:
    with pytest.raises(ProcessDied, match="device server"):
        await VirtualMachine.restore(taken.directory, programs, sabotage=Sabotage(edit_state=lambda state: state[:-1]))


async def test_stock_qemu_leaves_the_device_to_us(programs: Programs, demo_description: VmDescription) -> None:
    """It does not ask the server, whichever library that has: so all our cures are in force."""
    async with await VirtualMachine.launch(demo_description, programs) as vm:  # as booted: only QEMU is asked
        status = await vm.control.call("status")
        assert status["connected"] and status["driven_by_client"] is False
        assert status["migration"] == {"state": "running", "complete": False}
        await require_same(vm.devices, in_stream=False, what="a snapshot")
        print(f"QEMU {programs.qemu_version}, {status['libvfio_user']}")


def wait_for_vm(owner: subprocess.Popen[str]) -> str:
    """The name of the VM that `owner` runs, once its supervisor answers."""
    deadline = time.monotonic() + pace.seconds(60)
    while time.monotonic() < deadline:
        assert owner.poll() is None, owner.communicate()
        names = running_vms()
        base = Path(os.environ["XDG_RUNTIME_DIR"]) / "vmbus"
        if names and (base / names[0] / "supervisor.sock").exists():
            return names[0]
        time.sleep(0.05)
    raise AssertionError("no VM came up")


def test_from_the_command_line(taken: Taken, tmp_path: Path) -> None:
    owner = spawn("restore", str(taken.directory))
    try:
        assert wait_for_vm(owner) == "demo"
        assert json.loads(perform("agent", "poll", str(taken.job)))["driver"] == "mixed"
        perform("save", "--live", "--keep", str(tmp_path / "a"))
        perform("save", "--live", "--keep", str(tmp_path / "a"), status=2)
        assert "exists already" in perform("save", str(tmp_path / "a"), status=2)
        perform("save", str(tmp_path / "b"))
        assert f"saved to {tmp_path / 'b'}" in said_by(owner)
    finally:
        owner.kill()
        owner.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_owner_that_dies_takes_everything_along(taken: Taken, number: signal.Signals) -> None:
    owner = spawn("restore", str(taken.directory), stdout=subprocess.DEVNULL)
    try:
        name = wait_for_vm(owner)
        run_directory = Path(os.environ["XDG_RUNTIME_DIR"]) / "vmbus" / name
        owner.send_signal(number)
        owner.wait(pace.seconds(SOON))
        until(lambda: str(run_directory) not in "\n".join(command_lines().values()), "all processes to end", SOON)
        # After SIGKILL nobody could clear the directory away; the next start does.
        assert run_directory.exists() == (number == signal.SIGKILL)
        assert running_vms() == []
        perform("restore", "/no/such/snapshot", status=StateError.status)
    finally:
        owner.kill()
        owner.wait()
        from vmbus.vm.run_directory import clean_stale, runtime_base

        clean_stale(runtime_base())
