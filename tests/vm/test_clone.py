"""Clones: several VMs from one snapshot at the same time, each going its own way."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from support import pace
from support.boot import books, in_traffic
from support.commands import perform, said_by, spawn
from support.pace import until
from vmbus.errors import VmbusError
from vmbus.operations.machine import VirtualMachine
from vmbus.testkit.story import Figures, Story
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.run_directory import running_vms

pytestmark = [pytest.mark.vm, pytest.mark.long]

Run = Callable[[Coroutine[Any, Any, Any]], Any]

STORY = Story(packets=128, echo_count=1_500, burst_count=2_000, stall_seconds=30.0)
CLONES = 3


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


async def run_out(vm: VirtualMachine, job: int) -> Figures:
    figures = await books(vm, job, STORY.expected())
    assert not figures.reasons, (vm.name, figures.reasons)
    return figures


async def own_way(vm: VirtualMachine, number: int, job: int, tmp_path: Path) -> int:
    """What no other clone does: a number of transactions, and a save, a checkpoint or a provider of its own."""
    figures = await run_out(vm, job)
    if number == 0:
        await vm.save(tmp_path / "of-a-clone", live=True, keep=True)
    elif number == 1:
        await vm.checkpoint("here")
    else:
        instance = "00000000-0000-4000-8000-0000000000aa"
        await vm.control.call("offer", provider={"kind": "echo", "name": "own", "instance": instance})
    count = 200 * (number + 1)
    found = await vm.call_agent(
        "run", driver="echo", parameters={"count": count, "window": 128, "external": 0.5, "seed": number}, timeout=90.0
    )
    assert found["result"]["verdict"] == "passed" and found["result"]["completed"] == count, found
    if number == 1:
        await vm.revert("here")
    status = await vm.control.call("status")
    assert list(status["providers"]) == ["echo", "burst", *(["own"] if number == 2 else [])]
    # Its books are its own: what the others did is not in them.
    expected = STORY.expected()["echo"] + (0 if number == 1 else count)
    assert status["providers"]["echo"]["tally"]["completed"] == expected
    assert status["packets"] == {"queued": 0, "sent": 0}
    return figures.completed


def test_clone_three_vms_from_one_snapshot_at_the_same_time(
    run: Callable[..., Any], demo_description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    snapshot = tmp_path / "snapshot"

    async def body() -> None:
        vm, job = await in_traffic(demo_description, programs, STORY)
        async with vm:
            saved = await vm.save(snapshot, live=True)
        before = digests(snapshot)
        clones = await asyncio.gather(*(VirtualMachine.restore(snapshot, programs) for _ in range(CLONES)))
        try:
            assert sorted(running_vms()) == sorted(vm.name for vm in clones) and len(set(running_vms())) == CLONES
            assert len({child.pid for vm in clones for child in vm.children}) == 2 * CLONES
            for vm in clones:
                assert vm.restored is not None and vm.restored.packets == saved.packets
            done = await asyncio.gather(*(own_way(vm, number, job, tmp_path) for number, vm in enumerate(clones)))
            print(
                f"{CLONES} clones of a VM with {saved.packets} in flight: {done} transactions of that moment, each once"
            )
            assert len(set(done)) == 1
            # One that dies leaves the others alone.
            dead, *others = clones
            assert dead.qemu is not None
            dead.qemu.process.kill()
            with pytest.raises(VmbusError):
                await dead.wait_ended()
            for vm in others:
                found = await vm.call_agent("run", driver="echo", parameters={"count": 100}, timeout=90.0)
                assert found["result"]["verdict"] == "passed", found
        finally:
            for vm in clones:
                await vm.kill()
        assert digests(snapshot) == before
        # The clone of a clone.
        async with await VirtualMachine.restore(tmp_path / "of-a-clone", programs) as vm:
            await vm.shutdown()

    run(body(), timeout=280.0)


def test_clone_checkpoint_and_revert_from_the_command_line(
    run: Run, demo_description: VmDescription, programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def save() -> int:
        vm, job = await in_traffic(demo_description, programs, STORY)
        async with vm:
            await vm.save(tmp_path / "snapshot", live=True)
        return job

    runtime = tmp_path / "r"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))

    job = run(save())
    owner = spawn("restore", "--count", "2", str(tmp_path / "snapshot"))
    try:
        sockets = [runtime / "vmbus" / name / "supervisor.sock" for name in ("demo", "demo-2")]
        until(lambda: owner.poll() is not None or all(path.exists() for path in sockets), "the clones to come up", 60)
        assert owner.poll() is None, owner.communicate()
        assert "several VMs are running (demo, demo-2)" in perform("checkpoint", "here", status=2)
        assert "packets in flight" in perform("checkpoint", "demo-2", "here")
        assert perform("checkpoint", "--list", "demo") == ""
        assert perform("checkpoint", "--list", "demo-2").startswith("here ")
        finished = json.loads(perform("agent", "--vm", "demo-2", "wait", str(job)))
        assert finished["result"]["verdict"] == "passed"
        assert "downtime" in perform("revert", "demo-2", "here")
        finished = json.loads(perform("agent", "--vm", "demo-2", "wait", str(job)))
        assert finished["result"]["verdict"] == "passed"
        assert "no checkpoint 'there'" in perform("revert", "demo-2", "there", status=2)
        perform("checkpoint", "--delete", "demo-2", "here")
        assert perform("checkpoint", "--list", "demo-2") == ""
        perform("save", "--vm", "demo-2", str(tmp_path / "saved"))
        assert owner.poll() is None, "one clone ended with its save, the other runs on"
        perform("save", "--vm", "demo", str(tmp_path / "other"))
        said_by(owner)
    finally:
        owner.terminate()
        owner.communicate(timeout=pace.seconds(30))
