"""Clones: several VMs from one snapshot at the same time, each going its own way."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import vmbus
import vmbus_guest
from support import pace
from support.boot import boot
from vmbus.operations.machine import VirtualMachine
from vmbus.testkit.story import Figures, Story, audit, finish, until_in_flight
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.run_directory import running_vms

pytestmark = [pytest.mark.vm, pytest.mark.long]

Run = Callable[[Coroutine[Any, Any, Any]], Any]

STORY = Story(packets=128, echo_count=1_500, burst_count=2_000, stall_seconds=30.0)
CLONES = 4


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


async def run_out(vm: VirtualMachine, job: int) -> Figures:
    figures = Figures()
    report = await finish(vm, job)
    audit(figures, report, await vm.control.call("status"), STORY.expected())
    assert not figures.reasons, (vm.name, figures.reasons)
    return figures


async def own_way(vm: VirtualMachine, number: int, job: int, tmp_path: Path) -> int:
    """What no other clone does: a number of transactions, and a save, a checkpoint or a provider of its own."""
    figures = await run_out(vm, job)
    if number == 1:
        await vm.save(tmp_path / "of-a-clone", live=True, keep=True)
    elif number == 2:
        await vm.checkpoint("here")
    elif number == 3:
        instance = "00000000-0000-4000-8000-0000000000aa"
        await vm.control.call("offer", provider={"kind": "echo", "name": "own", "instance": instance})
    count = 200 * (number + 1)
    found = await vm.call_agent(
        "run", driver="echo", parameters={"count": count, "window": 32, "external": 0.5, "seed": number}, timeout=90.0
    )
    assert found["result"]["verdict"] == "passed" and found["result"]["completed"] == count, found
    if number == 2:
        await vm.revert("here")
    status = await vm.control.call("status")
    assert list(status["providers"]) == ["echo", "burst", *(["own"] if number == 3 else [])]
    # Its books are its own: what the others did is not in them.
    expected = STORY.expected()["echo"] + (0 if number == 2 else count)
    assert status["providers"]["echo"]["tally"]["completed"] == expected
    assert status["packets"] == {"queued": 0, "sent": 0}
    return figures.completed


def test_clone_four_vms_from_one_snapshot_at_the_same_time(
    run: Callable[..., Any], demo_description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    snapshot = tmp_path / "snapshot"

    async def body() -> None:
        async with await boot(demo_description, programs) as vm:
            job = int((await vm.call_agent("start", driver="mixed", parameters=STORY.workloads()))["job"])
            await until_in_flight(vm, job, STORY)
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
        finally:
            for vm in clones:
                await vm.kill()
        assert digests(snapshot) == before
        # The clone of a clone.
        async with await VirtualMachine.restore(tmp_path / "of-a-clone", programs) as vm:
            await vm.shutdown()

    run(body(), timeout=280.0)


async def test_clone_that_dies_leaves_the_others_alone(
    demo_description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    async with await boot(demo_description, programs) as vm:
        job = int((await vm.call_agent("start", driver="mixed", parameters=STORY.workloads()))["job"])
        await until_in_flight(vm, job, STORY)
        await vm.save(tmp_path / "snapshot", live=False)
    one, other = await asyncio.gather(*(VirtualMachine.restore(tmp_path / "snapshot", programs) for _ in range(2)))
    async with one, other:
        assert one.qemu is not None
        one.qemu.process.kill()
        await asyncio.wait({one.qemu.exited}, timeout=pace.seconds(20))
        await one.kill()
        await run_out(other, job)


def test_clone_checkpoint_and_revert_from_the_command_line(
    run: Run, demo_description: VmDescription, programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def save() -> int:
        async with await boot(demo_description, programs) as vm:
            job = int((await vm.call_agent("start", driver="mixed", parameters=STORY.workloads()))["job"])
            await until_in_flight(vm, job, STORY)
            await vm.save(tmp_path / "snapshot", live=True)
        return job

    runtime = tmp_path / "r"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    roots = [str(Path(vmbus.__file__).parents[1]), str(Path(vmbus_guest.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}

    def vm_command(*words: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "vmbus.cli", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=pace.seconds(90),
        )
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    job = run(save())
    owner = subprocess.Popen(
        [sys.executable, "-m", "vmbus.cli", "restore", "--count", "2", str(tmp_path / "snapshot")],
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + pace.seconds(60)
        sockets = [runtime / "vmbus" / name / "supervisor.sock" for name in ("demo", "demo-2")]
        while not all(path.exists() for path in sockets):
            assert owner.poll() is None, owner.communicate()
            assert time.monotonic() < deadline, "the clones did not come up"
            time.sleep(0.05)
        assert "several VMs are running (demo, demo-2)" in vm_command("checkpoint", "here", status=2)
        assert "packets in flight" in vm_command("checkpoint", "demo-2", "here")
        assert vm_command("checkpoint", "--list", "demo") == ""
        assert vm_command("checkpoint", "--list", "demo-2").startswith("here ")
        finished = json.loads(vm_command("agent", "--vm", "demo-2", "wait", str(job)))
        assert finished["result"]["verdict"] == "passed"
        assert "downtime" in vm_command("revert", "demo-2", "here")
        finished = json.loads(vm_command("agent", "--vm", "demo-2", "wait", str(job)))
        assert finished["result"]["verdict"] == "passed"
        assert "no checkpoint 'there'" in vm_command("revert", "demo-2", "there", status=2)
        vm_command("checkpoint", "--delete", "demo-2", "here")
        assert vm_command("checkpoint", "--list", "demo-2") == ""
        vm_command("save", "--vm", "demo-2", str(tmp_path / "saved"))
        assert owner.poll() is None, "one clone ended with its save, the other runs on"
        vm_command("save", "--vm", "demo", str(tmp_path / "other"))
        output, _ = owner.communicate(timeout=pace.seconds(60))
        assert owner.returncode == 0, output.decode()
    finally:
        owner.terminate()
        owner.communicate(timeout=pace.seconds(30))
