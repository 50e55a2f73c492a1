"""The order of a save's steps and, above all, the way back from a failure at each of them.

QEMU and the device server are replaced by a model (`support.model_vm`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from support.model_vm import BAR0, CONFIG, LogBroken, ModelVm
from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.errors import Code, EnvironmentProblem, code_of
from vmbus.operations import stream
from vmbus.operations.capture import Capture
from vmbus.operations.stream import REFUSED_CAPABILITIES, StreamSettings
from vmbus.operations.target import Captured, FileTarget
from vmbus.qemu.pci_function import MAGIC
from vmbus.qemu.qmp import MigrationFailed
from vmbus.vm.description import VmDescription
from vmbus.vm.errors import SaveFailed
from vmbus.vm.moments import Hook, Moment, Sabotage
from vmbus.vm.timing import Phases

ECHO = ProviderDescription("echo", "echo", "00000000-0000-4000-8000-000000000001")
VM = VmDescription("demo", DeviceDescription("vmbus0", [ECHO]))


class Model(ModelVm):
    """Its barrier is looked at."""

    def __init__(self, *, running: bool = True, bar0: int | None = BAR0) -> None:
        super().__init__(VM)
        self.vcpus = running
        self.bar0 = bar0
        self.magic = MAGIC
        self.capabilities |= {"xbzrle": True}

    async def human(self, line: str, *, timeout: float = 1.0) -> str:
        self.step("barrier")
        assert line == f"xp /1xw {self.bar0:#x}"
        assert not self.vcpus
        return f"{self.bar0:016x}: {self.magic:#x}"


def files(folder: Path) -> FileTarget:
    return FileTarget(folder)


def capture(model: Model, folder: Path, *, live: bool, sabotage: Sabotage | None = None) -> Capture:
    return Capture(model, files(folder), Phases(), live=live, sabotage=sabotage or Sabotage())


async def take(model: Model, folder: Path, *, live: bool, sabotage: Sabotage | None = None) -> Captured:
    async with capture(model, folder, live=live, sabotage=sabotage).taken() as captured:
        return captured


STOPPED = [
    "query-migrate-capabilities",
    "query-migrate-parameters",
    "migrate-set-capabilities",
    "migrate-set-parameters",
    "stop",
    "barrier",
    "pause",
    "save",
    "migrate",
    "wait completed",
]
LIVE = [
    "query-migrate-capabilities",
    "query-migrate-parameters",
    "migrate-set-capabilities",
    "migrate-set-parameters",
    "log-start",
    "migrate",
    "wait pre-switchover",
    "barrier",
    "pause",
    "save",
    "flush",
    "migrate-continue",
    "wait completed",
]


@pytest.mark.parametrize(("live", "order"), [(False, STOPPED), (True, LIVE)])
def test_the_order_of_steps(tmp_path: Path, live: bool, order: list[str]) -> None:
    model = Model()
    found = asyncio.run(take(model, tmp_path, live=live))
    assert model.steps == order
    assert not model.vcpus and model.device == "paused"  # held at the saved point
    assert found.packets == {"queued": 3, "sent": 4}
    assert (found.incoming_held, found.configs, found.was_running) == (5, [CONFIG], True)
    assert found.flushed_pages == (6 if live else 0)
    assert (tmp_path / "ram.qemu").exists() and (tmp_path / "device.state").exists()


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("what", [*REFUSED_CAPABILITIES, "mode"])
def test_settings_that_break_the_guarantees_are_refused(tmp_path: Path, what: str, live: bool) -> None:
    model = Model()
    if what == "mode":
        model.mode = "cpr-transfer"
    else:
        model.capabilities[what] = True
    with pytest.raises(SaveFailed, match=rf"{'cpr-transfer' if what == 'mode' else what}'.*; the VM runs on"):
        asyncio.run(take(model, tmp_path, live=live))
    assert model.steps[-1].startswith("query-migrate") and model.vcpus


def test_every_moment_is_told_in_order(tmp_path: Path) -> None:
    for live, expected in (
        (True, [Moment.BEFORE_STREAM, Moment.RAM_COPY, Moment.PRE_SWITCHOVER, Moment.SAVING, Moment.WRITING]),
        (False, [Moment.BEFORE_STREAM, Moment.SAVING, Moment.WRITING, Moment.RAM_COPY]),
    ):
        told: list[Moment] = []

        async def at(moment: Moment, told: list[Moment] = told) -> None:
            told.append(moment)

        model = Model()

        async def body(live: bool = live, at: Hook = at, model: Model = model) -> None:
            async with Capture(model, files(tmp_path), Phases(), live=live, at=at).taken():
                pass

        asyncio.run(body())
        assert told == [*expected, Moment.STOPPED]
        files(tmp_path).discard()


@pytest.mark.parametrize(("live", "step"), [(False, step) for step in STOPPED] + [(True, step) for step in LIVE])
def test_a_failure_at_any_step_leaves_the_vm_running(tmp_path: Path, live: bool, step: str) -> None:
    model = Model()
    model.fail[step] = [EnvironmentProblem("on purpose")]
    with pytest.raises(SaveFailed, match="on purpose; the VM runs on") as caught:
        asyncio.run(take(model, tmp_path, live=live))
    assert caught.value.source_alive
    assert model.vcpus and model.device == "running" and not model.logging
    assert model.migration in ("none", "cancelled", "completed")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", [0, 1])
def test_a_full_disk_is_called_one_whatever_qemu_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    model = Model()
    model.fail["migrate"] = [EnvironmentProblem("ram_save_setup failed: Input/output error")]
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 10, left, left, 1, 1, 1, 0, 255)))
    with pytest.raises(SaveFailed) as caught:
        asyncio.run(take(model, tmp_path, live=True))
    full = f" (No space left on device in {tmp_path})"
    assert str(caught.value) == (
        f"save failed: ram_save_setup failed: Input/output error{'' if left else full}; the VM runs on"
    )
    assert code_of(caught.value) == ("" if left else Code.DISK_FULL)


@pytest.mark.parametrize("live", [False, True])
def test_a_paused_vm_stays_paused(tmp_path: Path, live: bool) -> None:
    model = Model(running=False)
    model.fail["save"] = [EnvironmentProblem("on purpose")]
    with pytest.raises(SaveFailed, match="stays paused"):
        asyncio.run(take(model, tmp_path, live=live))
    assert not model.vcpus and model.device == "running"
    assert "cont" not in model.steps


def test_cont_is_tried_even_if_the_server_does_not_resume(tmp_path: Path) -> None:
    model = Model()
    model.fail = {"save": [EnvironmentProblem("first")], "resume": [EnvironmentProblem("second"), LogBroken("third")]}
    with pytest.raises(SaveFailed, match=r"first; the VM is lost.*second"):
        asyncio.run(take(model, tmp_path, live=True))
    assert model.steps[-1] == "cont"


async def test_the_vcpus_stand_until_an_interrupted_flush_is_over(tmp_path: Path) -> None:
    """Whoever asked for it may be gone: the server flushes on, and answers nothing else before it has done."""

    class Flushing(Model):
        def __init__(self) -> None:
            super().__init__()
            self.flushes, self.flushed = asyncio.Event(), asyncio.Event()

        async def call(self, command: str, timeout: float = 1.0, **arguments: Any) -> dict[str, Any]:
            if self.flushes.is_set():
                await self.flushed.wait()
            if command == "flush":
                self.flushes.set()
                await self.flushed.wait()
            return await super().call(command, timeout, **arguments)

    model = Flushing()
    saving = asyncio.create_task(take(model, tmp_path, live=True))
    await model.flushes.wait()
    saving.cancel()
    for _ in range(20):
        await asyncio.sleep(0)
        assert not model.vcpus and "migrate_cancel" not in model.steps
    model.flushed.set()
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert model.vcpus and model.device == "running"


def test_a_broken_dirty_log_starts_the_live_save_again(tmp_path: Path) -> None:
    model = Model()
    model.fail["flush"] = [LogBroken("unmapped"), LogBroken("unmapped")]
    found = asyncio.run(take(model, tmp_path, live=True))
    assert found.attempts == 3
    assert model.steps.count("migrate_cancel") == 2
    assert model.steps.count("log-start") == 3


def test_a_device_that_does_not_answer_its_bar_is_noticed(tmp_path: Path) -> None:
    model = Model()
    model.magic = 0xFFFFFFFF
    with pytest.raises(SaveFailed, match="does not answer at its BAR0 0xfebf1000"):
        asyncio.run(take(model, tmp_path, live=False))
    assert model.vcpus
    assert "pause" not in model.steps


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("now", [0xFEBF2000, None])
def test_a_bar_that_moved_before_the_vcpus_stopped_is_looked_for(
    tmp_path: Path, live: bool, now: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    places = [0xFEBF1000, now]
    asked: list[int] = []

    async def human(line: str, *, timeout: float = 1.0) -> str:
        asked.append(int(line.split()[-1], 16))
        return f"{asked[-1]:016x}: {MAGIC if asked[-1] == now else 0xFFFFFFFF:#x}"

    call = model.call

    async def calls(command: str, timeout: float = 1.0, **arguments: Any) -> dict[str, Any]:
        if command == "pci":
            return {"config": CONFIG.hex(), "bar0": places.pop(0)}
        return await call(command, **arguments)

    monkeypatch.setattr(model, "human", human)
    monkeypatch.setattr(model, "call", calls)
    asyncio.run(take(model, tmp_path, live=live))
    assert asked == ([0xFEBF1000] if now is None else [0xFEBF1000, now]) and places == []


class Slow(Model):
    """A guest that writes faster than QEMU can send, until it may stop it for `enough` milliseconds."""

    def __init__(self, enough: int, *, first_pass: int = 0) -> None:
        super().__init__()
        self.enough = enough
        self.looks = -first_pass
        self.limits: list[int] = []
        self.caught_up = asyncio.Event()

    async def perform(self, command: str, given: dict[str, Any]) -> Any:
        if command == "query-migrate":
            self.looks += 1
            return {"ram": {"dirty-sync-count": 1 if self.looks <= 0 else 2}}
        if command == "migrate-set-parameters" and "downtime-limit" in given:
            self.limits.append(given["downtime-limit"])
            if self.limits[-1] >= self.enough:
                self.caught_up.set()
        return await super().perform(command, given)

    async def wait_migration(self, wanted: Collection[str], timeout: float, what: str) -> str:
        if "pre-switchover" in wanted:
            try:
                await asyncio.wait_for(self.caught_up.wait(), 1)
            except TimeoutError:
                raise MigrationFailed(what) from None
        return await super().wait_migration(wanted, timeout, what)


@pytest.mark.parametrize(
    ("enough", "given", "limits"),
    [
        (20, None, [20]),
        (80, None, [20, 40, 80]),
        (1000, None, [20, 40, 80, 160, 300]),
        (30, 30, [30]),
        (80, 30, [30]),
    ],
)
def test_qemu_plans_for_little_downtime_and_for_more_where_that_does_not_suffice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enough: int, given: int | None, limits: list[int]
) -> None:
    monkeypatch.setattr(stream, "DOWNTIME_PATIENCE", 0.01)
    model = Slow(enough, first_pass=3)

    async def body() -> None:
        one = Capture(model, files(tmp_path), Phases(), live=True, stream=StreamSettings(downtime_limit=given))
        async with one.taken():
            assert len(limits) == 1 or model.looks == len(limits) - 1  # those of the first pass changed nothing

    if enough > limits[-1]:
        with pytest.raises(SaveFailed, match="to catch up with it; the VM runs on"):
            asyncio.run(body())
    else:
        asyncio.run(body())
    assert model.limits == limits


def test_an_unmapped_bar_needs_no_barrier(tmp_path: Path) -> None:
    model = Model(bar0=None)
    asyncio.run(take(model, tmp_path, live=False))
    assert "barrier" not in model.steps


def test_the_flush_can_be_left_out_on_purpose(tmp_path: Path) -> None:
    model = Model()
    asyncio.run(take(model, tmp_path, live=True, sabotage=Sabotage(skip_flush=True)))
    assert "flush" not in model.steps


def test_other_errors_than_ours_are_not_hidden(tmp_path: Path) -> None:
    model = Model()

    async def body() -> None:
        async with capture(model, tmp_path, live=False).taken():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(body())
    assert model.vcpus and model.device == "running"
