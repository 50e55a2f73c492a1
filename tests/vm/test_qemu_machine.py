"""Real VMs that are saved, reverted, and hurt: whatever fails, either the VM runs on or nothing is left of it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vmbus
from support import pace
from support.boot import boot
from support.pace import until
from support.processes import command_lines
from vmbus.errors import StateError, VmbusError
from vmbus.operations.machine import VirtualMachine
from vmbus.provision import provision
from vmbus.vm.command_line import Programs, programs_from
from vmbus.vm.description import load_description
from vmbus.vm.moments import Sabotage
from vmbus.vm.process import ProcessDied
from vmbus.vm.run_directory import running_vms

pytestmark = [pytest.mark.vm, pytest.mark.long]

CHECKOUT = Path(__file__).parents[2]
DEMO = load_description(CHECKOUT / "qemu_configs" / "demo.toml")
WORKLOADS = [
    {"driver": "echo", "count": 8_000, "window": 128, "external": 0.2},
    {"driver": "burst", "count": 15_000, "window": 2000, "hold": 100},
]
SOON = 20.0
"""Seconds within which a death must have been noticed and everything torn down."""


@pytest.fixture(scope="module")
def programs() -> Programs:
    return programs_from(provision())


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    base = tmp_path_factory.mktemp("r")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    yield
    assert running_vms() == []
    assert list((base / "vmbus").iterdir()) == []
    assert not [line for line in command_lines().values() if str(base) in line]  # its sockets are on each of ours


async def until_flooded(vm: VirtualMachine, job: int) -> None:
    """Waits until packets are in flight in both states."""
    async with asyncio.timeout(pace.seconds(60)):
        while True:
            packets = (await vm.control.call("status"))["packets"]
            if packets["queued"] > 100 and packets["sent"] > 100:
                return
            report = await vm.call_agent("poll", job=job)
            assert report["state"] == "running", report
            await asyncio.sleep(0.02)


async def finish(vm: VirtualMachine, job: int) -> None:
    """Lets the workloads run to their end and checks both sides' books."""
    async with asyncio.timeout(pace.seconds(120)):
        while (report := await vm.call_agent("wait", job=job, timeout=90.0))["state"] == "running":
            pass
    assert report["state"] == "finished", report
    assert report["result"]["verdict"] == "passed", report
    status = await vm.control.call("status")
    for provider in status["providers"].values():
        assert {key: provider["tally"][key] for key in ("lost", "duplicated", "reordered", "corrupted")} == {
            "lost": 0,
            "duplicated": 0,
            "reordered": 0,
            "corrupted": 0,
        }


JOB = 1
"""The workload's job number in the snapshot."""


@pytest.fixture(scope="module")
def snapshot(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VM saved live in mid-traffic, with packets in flight in both states."""
    directory = tmp_path_factory.mktemp("snapshots") / "flooded"

    async def body() -> None:
        async with await boot(DEMO, programs) as vm:
            await vm.wait_ready()
            started = await vm.call_agent("start", driver="mixed", parameters={"workloads": WORKLOADS})
            assert started["job"] == JOB
            for _ in range(8):  # what is in flight now need not be at the save, on a slow machine
                await until_flooded(vm, JOB)
                report = await vm.save(directory, live=True, keep=True)
                if min(report.packets.values()) > 0:
                    break
                shutil.rmtree(directory)
            assert min(report.packets.values()) > 0
            assert report.flushed_pages > 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("r")))
        asyncio.run(body())
    return directory


def digests(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "manifest.json").read_bytes())["manifest"]["files"]
    return found


async def test_a_snapshot_can_be_gone_back_to_again_and_again(programs: Programs, snapshot: Path) -> None:
    before = digests(snapshot)
    for _ in range(2):
        async with await VirtualMachine.restore(snapshot, programs, expected=DEMO) as vm:
            assert vm.restored is not None
            assert vm.restored.packets["queued"] > 0 and vm.restored.packets["sent"] > 0
            assert vm.restored.channels == 2
            assert vm.restored.pci_writes == 7
            await finish(vm, JOB)
    assert digests(snapshot) == before


@pytest.mark.parametrize("live", [False, True])
async def test_a_guest_that_is_still_booting(programs: Programs, tmp_path: Path, live: bool) -> None:
    async with await VirtualMachine.launch(DEMO, programs) as vm:  # as booted: it is still booting
        report = await vm.save(tmp_path / "early", live=live)
        assert report.packets == {"queued": 0, "sent": 0}
    async with await VirtualMachine.restore(tmp_path / "early", programs) as vm:
        await vm.wait_ready()
        found = await vm.call_agent("run", driver="echo", parameters={"count": 200}, timeout=60.0)
        assert found["result"]["verdict"] == "passed"
        await vm.shutdown()


@pytest.mark.parametrize("victim", ["server", "qemu"])
async def test_the_death_of_either_process_is_the_end_of_both(programs: Programs, snapshot: Path, victim: str) -> None:
    async with await VirtualMachine.restore(snapshot, programs) as vm:
        os.kill(getattr(vm, victim).pid, signal.SIGKILL)
        async with asyncio.timeout(pace.seconds(SOON)):
            with pytest.raises(ProcessDied, match="was killed by SIGKILL"):
                await vm.wait_ended()
            with pytest.raises(VmbusError):
                await vm.call_agent("ping")
            await vm.kill()


async def test_a_state_that_the_server_refuses(programs: Programs, snapshot: Path) -> None:
    with pytest.raises(ProcessDied, match="device server"):
        await VirtualMachine.restore(snapshot, programs, sabotage=Sabotage(edit_state=lambda state: state[:-1]))


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "vmbus.cli", *words]


def environment() -> dict[str, str]:
    roots = [str(Path(vmbus.__file__).parents[1]), str(CHECKOUT / "guest")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}


def wait_for_vm(owner: subprocess.Popen[bytes]) -> str:
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


def test_from_the_command_line(snapshot: Path, tmp_path: Path) -> None:
    owner = subprocess.Popen(
        command("restore", str(snapshot)),
        env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        assert wait_for_vm(owner) == "demo"
        report = subprocess.run(
            command("agent", "poll", str(JOB)),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=pace.seconds(60),
        )
        assert json.loads(report.stdout)["driver"] == "mixed", report.stderr
        for words, status in ((["--live", "--keep"], 0), (["--live", "--keep"], 2), ([], 2)):
            saved = subprocess.run(
                command("save", *words, str(tmp_path / "a")), env=environment(), capture_output=True, text=True,
                timeout=pace.seconds(120),
            )  # fmt: skip
            assert saved.returncode == status, saved.stderr
        assert "exists already" in saved.stderr
        saved = subprocess.run(
            command("save", str(tmp_path / "b")),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=pace.seconds(120),
        )
        assert saved.returncode == 0, saved.stderr
        output, _ = owner.communicate(timeout=pace.seconds(60))
        assert owner.returncode == 0
        assert f"saved to {tmp_path / 'b'}" in output.decode()
    finally:
        owner.kill()
        owner.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_owner_that_dies_takes_everything_along(snapshot: Path, number: signal.Signals) -> None:
    owner = subprocess.Popen(
        command("restore", str(snapshot)),
        env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        name = wait_for_vm(owner)
        run_directory = Path(os.environ["XDG_RUNTIME_DIR"]) / "vmbus" / name
        owner.send_signal(number)
        owner.wait(pace.seconds(SOON))
        until(lambda: str(run_directory) not in "\n".join(command_lines().values()), "all processes to end", SOON)
        # After SIGKILL nobody could clear the directory away; the next start does.
        assert run_directory.exists() == (number == signal.SIGKILL)
        assert running_vms() == []
        listed = subprocess.run(command("restore", "/no/such/snapshot"), env=environment(), capture_output=True)
        assert listed.returncode == StateError.status
    finally:
        owner.kill()
        owner.wait()
        from vmbus.vm.run_directory import clean_stale, runtime_base

        clean_stale(runtime_base())
