"""The two state machines of a live migration against each other: the order of steps, and every way to fail."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.migration import SECRET, STATE, Pair, make_programs
from support.model_vm import PACKETS, LogBroken
from vmbus.errors import EnvironmentProblem, UsageError, VmbusError, WaitTimeout
from vmbus.operations import capture, migrate, stream
from vmbus.operations.migration import asking, ownership, verdicts
from vmbus.operations.migration.address import TcpAddress, UnixAddress, parse_address, stream_channel
from vmbus.operations.migration.asking import ASK_TIMEOUT
from vmbus.operations.migration.channel import MAX_FRAME, connect
from vmbus.operations.migration.destination import GO_TIMEOUT, Destination
from vmbus.operations.migration.link import SILENCE, Link
from vmbus.operations.migration.listener import Listener, listen
from vmbus.operations.migration.messages import Fate, Go, Hello, Running, Wanted
from vmbus.operations.migration.ownership import DESTINATION, SOURCE, DestinationStage, Ownership, SourceStage
from vmbus.operations.migration.verdicts import Verdicts
from vmbus.operations.stream import REFUSED_CAPABILITIES, StreamSettings
from vmbus.qemu.qmp import MigrationFailed
from vmbus.vm.errors import MigrateFailed, MigrationInDoubt
from vmbus.vm.moments import Hook, Moment

SOURCE_MOMENTS = [
    Moment.BEFORE_STREAM,
    Moment.RAM_COPY,
    Moment.PRE_SWITCHOVER,
    Moment.SAVING,
    Moment.WRITING,
    Moment.STOPPED,
    Moment.LOADING,
    Moment.BEFORE_GO,
]
DESTINATION_MOMENTS = [
    Moment.BEFORE_STREAM,
    Moment.RAM_COPY,
    Moment.WRITING,
    Moment.LOADING,
    Moment.PCI_REPLAY,
    Moment.PACKET_RESTORE,
    Moment.BEFORE_CONT,
]
SOURCE_STEPS = [
    "log-start", "migrate", "wait pre-switchover", "pause", "save", "flush", "migrate-continue", "wait completed",
]  # fmt: skip
DESTINATION_STEPS = ["start", "replay_ahead", "loaded", "load_states", "replay", "rebuild", "release", "run"]


def on_purpose() -> EnvironmentProblem:
    return EnvironmentProblem("on purpose")


@contextlib.asynccontextmanager
async def pair(folder: Path, **options: Any) -> AsyncIterator[Pair]:
    listener = await listen(UnixAddress(str(folder / "m.sock")), SECRET)
    both = Pair(folder, listener, **options)
    try:
        yield both
    finally:
        listener.close()
        assert not both.world.both, "the VM ran on both sides at once"
        assert not (both.leaving.folder / "migration.state").exists()


def at(moment: Moment, error: BaseException) -> Hook:
    async def hook(now: Moment) -> None:
        if now is moment:
            raise error

    return hook


def runs_on(both: Pair) -> None:
    """The source runs as if nothing had been, and nothing is left at the destination."""
    assert both.world.running == {"source"} and not both.leaving.ended
    assert both.leaving.device == "running" and not both.leaving.logging
    assert both.leaving.migration in ("none", "cancelled", "completed")
    assert both.source.stage is SourceStage.KEPT
    assert both.arriving.discarded or not both.arriving.steps
    assert both.world.lock == "source", "it has its outside resources back"


async def test_a_vm_moves(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        found = await both.migrate()
        assert found.problem is None and found.arrived, found
        assert both.world.running == {"destination"} and both.leaving.ended
        assert both.world.lock == "destination"
        assert (both.source.stage, both.destination.stage) == (SourceStage.MOVED, DestinationStage.RUNNING)
        assert both.arriving.state == STATE
        assert both.prepared is not None and both.prepared.machine == msgspec.structs.replace(
            both.leaving.machine, pci_config=both.leaving.config.hex()
        ), "the machine there is made as this one was"
        assert both.boot_files == [
            tmp_path / "destination" / "vmlinuz-here",
            tmp_path / "destination" / "initramfs-here",
        ]
        report = found.report
        assert (report.packets, report.channels, report.attempts, report.asked) == (PACKETS, 2, 1, False)
        assert (report.state_bytes, report.flushed_pages, report.ram_bytes) == (len(STATE), 6, 5 << 20)
        assert abs(sum(report.spans.values()) - report.downtime) < 0.02
        assert report.downtime_qemu + report.downtime_device == pytest.approx(report.downtime)
        # The source has said that it ended, so nobody listens any more, before long.
        await asyncio.wait_for(both.destination.stay(), 5)
        with pytest.raises(ConnectionRefusedError):
            await connect(both.listener.address, SECRET)


async def test_the_order_of_steps(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        await both.migrate()
        steps = [step for step in both.leaving.steps if not step.startswith(("query", "migrate-set"))]
        assert (steps, both.arriving.steps) == (SOURCE_STEPS, DESTINATION_STEPS)


async def test_boot_files_that_differ_are_sent(tmp_path: Path) -> None:
    there = make_programs(tmp_path / "destination", initramfs=b"another")
    async with pair(tmp_path, programs=there) as both:
        found = await both.migrate()
        assert found.arrived
        kernel, initramfs = both.boot_files
        assert kernel == there.kernel
        assert initramfs == both.arriving.folder / "initramfs.cpio"
        same = initramfs.read_bytes() == both.leaving.programs.initramfs.read_bytes()
        assert same and initramfs.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("moment", SOURCE_MOMENTS, ids=lambda moment: moment.name)
@pytest.mark.parametrize("how", ["error", "cancel", "defect", "cut"])
async def test_a_failure_at_the_source_before_the_decision(tmp_path: Path, moment: Moment, how: str) -> None:
    async def strike(now: Moment) -> None:
        if now is not moment:
            return
        if how == "cut":
            links[0].close()
            await asyncio.sleep(30)  # what is going on is interrupted
        raise {"error": on_purpose(), "cancel": asyncio.CancelledError(), "defect": ZeroDivisionError()}[how]

    links: list[Any] = []
    async with pair(tmp_path, source_at=strike) as both:
        accept = both.destination._on_channel

        async def remember(channel: Any) -> None:
            links.append(channel)
            await accept(channel)

        both.destination._on_channel = remember  # type: ignore[method-assign]
        found = await both.migrate()
        assert not found.arrived and isinstance(found.refusal, MigrateFailed)
        if how in ("error", "cut"):
            assert isinstance(found.problem, MigrateFailed) and found.problem.source_alive
            assert "on purpose" in str(found.problem) or how == "cut"
        else:
            assert isinstance(found.problem, asyncio.CancelledError if how == "cancel" else ZeroDivisionError)
        runs_on(both)
        assert both.destination.stage is DestinationStage.DISCARDED


@pytest.mark.parametrize("moment", DESTINATION_MOMENTS, ids=lambda moment: moment.name)
@pytest.mark.parametrize("how", ["error", "cancel", "defect"])
async def test_a_failure_at_the_destination(tmp_path: Path, moment: Moment, how: str) -> None:
    error = {"error": on_purpose(), "cancel": asyncio.CancelledError(), "defect": ZeroDivisionError()}[how]
    async with pair(tmp_path, destination_at=at(moment, error)) as both:
        found = await both.migrate()
        assert not found.arrived
        assert isinstance(found.refusal, ZeroDivisionError if how == "defect" else MigrateFailed)
        assert isinstance(found.problem, MigrateFailed) and found.problem.source_alive
        if how == "error":
            assert "on purpose" in str(found.problem) and "on purpose" in str(found.refusal)
        assert ("after the decision" in str(found.problem)) == (moment is Moment.BEFORE_CONT)
        runs_on(both)


@pytest.mark.parametrize("step", SOURCE_STEPS + DESTINATION_STEPS)
async def test_a_step_that_fails(tmp_path: Path, step: str) -> None:
    async with pair(tmp_path) as both:
        side: Any = both.leaving if step in SOURCE_STEPS else both.arriving
        side.fail[step] = [on_purpose()]
        found = await both.migrate()
        assert "on purpose" in str(found.problem) and not found.arrived
        runs_on(both)


@pytest.mark.parametrize("breaks", [1, 2])
async def test_a_broken_dirty_log_starts_a_new_server_and_qemu_there(tmp_path: Path, breaks: int) -> None:
    async with pair(tmp_path) as both:
        both.leaving.fail["flush"] = [LogBroken("unmapped") for _ in range(breaks)]
        found = await both.migrate()
        assert found.arrived and found.report.attempts == breaks + 1
        assert both.arriving.starts == breaks + 1 and both.arriving.steps.count("start_over") == breaks
        assert both.leaving.steps.count("migrate_cancel") == breaks


async def test_a_log_that_breaks_every_time_ends_the_migration(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        both.leaving.fail["flush"] = [LogBroken("unmapped") for _ in range(3)]
        found = await both.migrate()
        assert "unmapped (attempt 3 of 3: " in str(found.problem) and "; the VM runs on" in str(found.problem)
        runs_on(both)


async def test_a_source_that_cannot_be_set_running_again_is_said_to_be_lost(tmp_path: Path) -> None:
    async def die(now: Moment) -> None:
        if now is Moment.WRITING:
            both.leaving.dead = True
            raise on_purpose()

    async with pair(tmp_path, source_at=die) as both:
        found = await both.migrate()
        assert not found.problem.source_alive and "the VM is lost" in str(found.problem)
        assert both.source.stage is SourceStage.LOST


# --- what both sides must agree on, and what is done ahead ------------------------------------------------------------


@pytest.mark.parametrize("there", [False, True])
async def test_both_sides_leave_the_device_to_the_same_program(tmp_path: Path, there: bool) -> None:
    async with pair(tmp_path) as both:
        both.leaving.driven, both.arriving.qemu_drives = not there, there
        found = await both.migrate()
        assert "the device's state would be lost between them" in str(found.problem)
        assert "VMBUS_LIBVFIO_USER" in str(found.problem) and found.problem.source_alive
        assert both.leaving.steps == []  # nobody has touched the VM
        runs_on(both)


async def test_a_pci_function_that_changed_on_the_way_is_written_again(tmp_path: Path) -> None:
    """What was put back ahead is only as good as the comparison with what was saved."""

    later = bytes.fromhex("4256564d") + bytes(252)

    async def change(now: Moment) -> None:
        if now is Moment.RAM_COPY:
            both.leaving.config = later

    async with pair(tmp_path, source_at=change) as both:
        found = await both.migrate()
        assert found.arrived and both.arriving.config == later
        assert both.destination.restored is not None and both.destination.restored.pci_writes == 14


async def test_the_state_goes_over_while_pages_are_flushed_and_is_accepted_before_qemu_goes_on(tmp_path: Path) -> None:
    flushed = asyncio.Event()
    accepted = asyncio.Event()
    async with pair(tmp_path) as both:
        call, execute, load = both.leaving.call, both.leaving.execute, both.arriving.load_states

        async def calls(command: str, *arguments: Any, **options: Any) -> Any:
            result = await call(command, *arguments, **options)
            if command == "flush":
                flushed.set()
            return result

        async def executes(command: str, *arguments: Any, **options: Any) -> Any:
            assert command != "migrate-continue" or accepted.is_set()
            return await execute(command, *arguments, **options)

        async def loads(*arguments: Any) -> Any:
            await asyncio.wait_for(flushed.wait(), 10)
            await asyncio.sleep(0.1)
            accepted.set()
            return await load(*arguments)

        both.leaving.call = calls  # type: ignore[method-assign]
        both.leaving.execute = executes  # type: ignore[method-assign]
        both.arriving.load_states = loads  # type: ignore[method-assign]
        found = await both.migrate()
        assert found.arrived
        assert found.report.spans["transfer"] > 0.1 > found.report.spans["flush"]


@pytest.mark.parametrize("moment", [Moment.BEFORE_GO, Moment.LOADING])
async def test_the_device_does_nothing_at_the_destination_before_go(tmp_path: Path, moment: Moment) -> None:
    """Else a provider would have done there what it does at the source once more."""

    async with pair(tmp_path, source_at=at(moment, on_purpose())) as both:
        await both.migrate()
        runs_on(both)
        assert not both.arriving.working


# --- around the decision ----------------------------------------------------------------------------------------------


class Interceptor:
    """Lets a test lose messages of the destination, from a certain kind on. `running_for`: what it says in its Fate."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, kinds: tuple[type, ...], *, running_for: float | None = None
    ) -> None:
        send = Link.send

        async def lossy(link: Link, message: Any) -> None:
            if isinstance(message, kinds):
                link.channel.abort()  # the cut comes with the message
            if isinstance(message, Fate) and running_for is not None:
                message = msgspec.structs.replace(message, running_for=running_for)
            await send(link, message)

        monkeypatch.setattr(Link, "send", lossy)


async def test_a_lost_go_leaves_the_vm_at_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair(tmp_path) as both:
        Interceptor(monkeypatch, (Go,))
        found = await both.migrate()
        assert not found.arrived
        assert "after the decision" in str(found.problem) and found.problem.source_alive
        runs_on(both)


@pytest.mark.parametrize("clock", ["right", "mad"])
async def test_a_lost_running_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: str) -> None:
    """The VM runs there while it is asked about: that is no downtime, whatever a destination may say of its clock."""

    silence = 1.0  # before it can be asked

    async def later(*arguments: Any) -> Any:
        await asyncio.sleep(silence)
        return await connect(*arguments)

    async def cut(now: Moment) -> None:
        if now is Moment.AFTER_GO:
            monkeypatch.setattr(asking, "connect", later)

    async with pair(tmp_path, source_at=cut) as both:
        Interceptor(monkeypatch, (Running,), running_for=1e9 if clock == "mad" else None)
        found = await both.migrate()
        assert found.arrived and found.report.asked
        assert both.world.running == {"destination"} and both.leaving.ended
        report = found.report
        assert report.phases["go"] > silence
        assert 0 < report.downtime < silence and min(report.spans.values()) >= 0
        assert abs(sum(report.spans.values()) - report.downtime) < 0.02


async def test_a_destination_that_does_not_say_how_long_the_vm_has_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then what is measured is what is known here: the figure never becomes too small."""

    async with pair(tmp_path) as both:
        Interceptor(monkeypatch, (Running,), running_for=0.0)
        found = await both.migrate()
        assert found.report.asked and found.report.downtime > found.report.phases["go"]


@pytest.mark.parametrize("how", ["defect", "dead"])
async def test_whatever_fails_at_the_source_after_the_decision_changes_nothing(tmp_path: Path, how: str) -> None:
    async def strike(now: Moment) -> None:
        if now is Moment.AFTER_GO:
            if how == "defect":
                raise ZeroDivisionError
            both.leaving.dead = True

    async with pair(tmp_path, source_at=strike) as both:
        found = await both.migrate()
        assert found.problem is None and found.arrived
        assert found.report.asked == (how == "defect")
        assert both.world.running == {"destination"} and both.leaving.ended


async def test_go_that_does_not_come_in_time(tmp_path: Path) -> None:
    async def dawdle(now: Moment) -> None:
        if now is Moment.BEFORE_GO:
            await asyncio.sleep(30)

    async with pair(tmp_path, source_at=dawdle, go_timeout=0.1) as both:
        found = await both.migrate()
        assert "in vain for the source: Go" in str(found.refusal)
        runs_on(both)


async def _doubt(both: Pair, tmp_path: Path) -> MigrationInDoubt:
    """A destination that can neither be heard nor asked after Go."""
    found = await both.migrate()
    assert isinstance(found.problem, MigrationInDoubt), found
    assert "source" not in both.world.running and not both.leaving.ended
    assert both.source.stage is SourceStage.IN_DOUBT
    return found.problem


@pytest.mark.parametrize("decision", ["run", "end"])
async def test_a_destination_that_cannot_be_asked_leaves_the_vm_in_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decision: str
) -> None:

    async def unreachable(*_: Any) -> Any:
        raise EnvironmentProblem("no route to host")

    async def deaf(now: Moment) -> None:
        if now is Moment.AFTER_GO:
            monkeypatch.setattr(asking, "connect", unreachable)

    async with pair(tmp_path, source_at=deaf, ask_timeout=0.2) as both:
        Interceptor(monkeypatch, (Running,))
        problem = await _doubt(both, tmp_path)
        assert "no route to host" in str(problem) and "--resolve" in str(problem)
        if decision == "end":
            await both.source.resolve(run=False)
            assert both.leaving.ended and both.world.running == {"destination"}
        else:
            await both.arriving.discard()  # whoever decides so has made sure
            await both.source.resolve(run=True)
            runs_on(both)
        with pytest.raises(UsageError, match="nothing is to be decided"):
            await both.source.resolve(run=decision == "end")


async def _killed(both: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner of the destination is killed between Go and the vCPUs; the source is in doubt."""
    links: list[Link] = []

    async def die(now: Moment) -> None:
        if now is Moment.BEFORE_CONT:
            # As SIGKILL does: no word, the sockets are closed, nothing of it goes on.
            both.listener.close()
            links[0].channel.abort()
            asyncio.get_running_loop().call_later(0.1, both.world.give_up, "destination")
            assert both.destination._record is not None
            both.destination._record.close()
            await asyncio.sleep(3600)

    serve = both.destination._serve

    async def remember(link: Link) -> None:
        links.append(link)
        await serve(link)

    monkeypatch.setattr(both.destination, "_serve", remember)
    both.destination._at = die
    receiving = asyncio.create_task(both.destination.run(30))
    with pytest.raises(MigrationInDoubt, match=r"nobody listens at unix:.*--resolve ask"):
        await both.source.run()
    assert "source" not in both.world.running and both.source.stage is SourceStage.IN_DOUBT
    receiving.cancel()


@contextlib.asynccontextmanager
async def another_destination(both: Pair, verdicts: Verdicts) -> AsyncIterator[Destination]:
    """A destination at the same address that knows the same secret."""
    listener = await listen(both.listener.address, SECRET)
    there = Destination(listener, both.leaving.programs, lambda _: Path(), lambda *_: both.arriving, verdicts=verdicts)
    receiving = asyncio.create_task(there.run(30))
    try:
        yield there
    finally:
        receiving.cancel()
        await asyncio.wait({receiving})
        listener.close()


async def test_fault_m1_silence_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens any more: that says nothing. A destination there that has what is on disk can tell."""

    async with pair(tmp_path, ask_timeout=0.4) as both:
        await _killed(both, monkeypatch)
        with pytest.raises(MigrationInDoubt, match="nobody listens"):
            await both.source.resolve(run=None)
        async with another_destination(both, both.verdicts):
            await both.source.resolve(run=None)
        assert both.world.running == {"source"} and both.source.stage is SourceStage.KEPT
        assert both.world.lock == "source"


async def test_fault_m1_another_destination_with_the_same_secret_cannot_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    async with pair(tmp_path, ask_timeout=0.4) as both:
        await _killed(both, monkeypatch)
        async with another_destination(both, Verdicts(strangers)):
            with pytest.raises(MigrationInDoubt, match="is another destination, which knows nothing"):
                await both.source.resolve(run=None)
        assert "source" not in both.world.running and both.source.stage is SourceStage.IN_DOUBT
        # Nor can one that answers about this migration and is not whom the source began with.
        record = Verdicts(strangers).begin(both.source.migration)
        record.note("gone")
        record.close()
        async with another_destination(both, Verdicts(strangers)):
            with pytest.raises(MigrationInDoubt, match="is another destination"):
                await both.source.resolve(run=None)


async def test_fault_m1_a_vm_that_ran_and_ended_there_never_runs_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link is cut after Go, the VM there runs and ends, its listener goes: what the source has is of the past."""

    async def nobody(*_: Any) -> Any:
        raise ConnectionRefusedError

    async def deaf(now: Moment) -> None:
        if now is Moment.AFTER_GO:
            monkeypatch.setattr(asking, "connect", nobody)

    async with pair(tmp_path, source_at=deaf, ask_timeout=0.4) as both:
        Interceptor(monkeypatch, (Running,))
        await _doubt(both, tmp_path)
        staying = asyncio.create_task(both.destination.stay())
        await asyncio.sleep(0)
        staying.cancel()  # the VM has ended there, and with it who answered
        await asyncio.wait({staying})
        await both.arriving.discard()
        monkeypatch.setattr(asking, "connect", connect)
        async with another_destination(both, both.verdicts):
            await both.source.resolve(run=None)
        assert both.leaving.ended and both.world.running == set()
        assert both.source.stage is SourceStage.MOVED


async def test_fault_m1_what_could_not_be_ended_is_not_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process there that does not end after SIGKILL may still run the VM, for all that anybody knows."""

    async def stuck() -> None:
        raise WaitTimeout("QEMU to end after SIGKILL", 30)

    async with pair(tmp_path, ask_timeout=0.5, destination_at=at(Moment.BEFORE_CONT, on_purpose())) as both:
        monkeypatch.setattr(both.arriving, "discard", stuck)
        found = await both.migrate()
        assert isinstance(found.problem, MigrationInDoubt), found
        assert "source" not in both.world.running


@pytest.mark.parametrize(
    ("stages", "alive", "boot", "fate"),
    [
        ([], False, "", "unknown"),
        (["arriving"], True, "", "undecided"),
        (["arriving"], False, "", "gone"),
        (["arriving"], False, "another", "undecided"),
        (["arriving", "starting"], False, "", "undecided"),
        (["arriving", "starting"], True, "", "undecided"),
        (["arriving", "starting", "running"], False, "another", "running"),
        (["arriving", "gone"], False, "another", "gone"),
        (["arriving", "starting", "gone"], True, "", "gone"),
    ],
)
def test_fault_m1_what_a_record_on_disk_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: list[Any], alive: bool, boot: str, fate: str
) -> None:
    found = Verdicts(tmp_path)
    migration = "a" * 32
    record = None
    if stages:
        record = found.begin(migration)
        for stage in stages[1:]:
            record.note(stage)
        if not alive:
            record.close()
    if boot:
        monkeypatch.setattr(verdicts, "boot_id", lambda: boot)
    answer = found.find(migration)
    assert answer.fate == fate
    assert answer.destination == (record.destination if record else None)


@pytest.mark.parametrize("cut", [1, 30])
def test_fault_m1_a_line_that_was_cut_off_makes_it_less_certain(tmp_path: Path, cut: int) -> None:
    found = Verdicts(tmp_path)
    record = found.begin("a" * 32)
    record.note("starting")
    record.note("running")
    record.close()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-cut])
    assert found.find("a" * 32).fate == "undecided"
    file.write_bytes(b"[" * 5000 + b"\n")
    assert found.find("a" * 32).fate == "unknown"


def test_fault_m1_old_records_go(tmp_path: Path) -> None:
    found = Verdicts(tmp_path)
    old, held = found.begin("a" * 32), found.begin("b" * 32)
    old.close()
    for file in tmp_path.iterdir():
        os.utime(file, (0, 0))
    found.begin("c" * 32).close()
    assert found.find("a" * 32).fate == "unknown" and found.find("b" * 32).fate == "undecided"
    held.close()


@pytest.mark.parametrize("decision", ["run", "end"])
async def test_fault_m2_a_decision_survives_its_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decision: str
) -> None:
    """Whoever asked for it is gone in the middle: it is carried out all the same, and may be made again."""

    async with pair(tmp_path, ask_timeout=0.2) as both:
        await _killed(both, monkeypatch)
        take_back, end = both.leaving.take_back, both.leaving.kill

        async def slowly(seconds: float) -> None:
            begun.set()
            await asyncio.sleep(0.1)
            await take_back(seconds)

        async def end_slowly() -> None:
            begun.set()
            await asyncio.sleep(0.1)
            await end()

        begun = asyncio.Event()
        both.leaving.take_back = slowly  # type: ignore[method-assign]
        both.leaving.kill = end_slowly  # type: ignore[method-assign]
        resolving = asyncio.create_task(both.source.resolve(run=decision == "run"))
        await begun.wait()
        resolving.cancel()
        await asyncio.wait({resolving})
        if decision == "run":
            assert both.world.running == {"source"} and both.source.stage is SourceStage.KEPT
        else:
            assert both.leaving.ended and both.source.stage is SourceStage.MOVED
        await both.source.resolve(run=decision == "run")  # once more is no error
        with pytest.raises(UsageError, match="nothing is to be decided"):
            await both.source.resolve(run=decision != "run")


@pytest.mark.parametrize("patience", [30.0, 0.0])
async def test_the_source_waits_for_outside_resources_of_a_destination_that_is_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    """Its death takes a moment; a source without patience is lost."""
    monkeypatch.setattr(capture, "TAKE_BACK_TIMEOUT", patience)

    async with pair(tmp_path, source_at=at(Moment.BEFORE_GO, on_purpose())) as both:
        discard = both.arriving.discard

        async def slowly() -> None:
            asyncio.get_running_loop().call_later(0.3, both.world.give_up, "destination")
            give_up, both.world.give_up = both.world.give_up, lambda _: None  # type: ignore[method-assign]
            await discard()
            both.world.give_up = give_up  # type: ignore[method-assign]

        both.arriving.discard = slowly  # type: ignore[method-assign]
        found = await both.migrate()
        assert isinstance(found.problem, MigrateFailed)
        assert found.problem.source_alive is (patience > 0), found.problem
        if patience:
            runs_on(both)
        else:
            assert "the lock is the destination's" in str(found.problem)


async def test_sabotage_a_destination_that_is_not_told_keeps_what_the_source_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: Any) -> None:
        pass

    monkeypatch.setattr(capture, "TAKE_BACK_TIMEOUT", 0.3)
    monkeypatch.setattr(Link, "call_off", nothing)

    async with pair(tmp_path, source_at=at(Moment.BEFORE_GO, on_purpose())) as both:
        found = await both.migrate()
        assert isinstance(found.problem, MigrateFailed) and not found.problem.source_alive


async def test_a_cancellation_after_the_decision_finds_out_first(tmp_path: Path) -> None:
    async def slowly(now: Moment) -> None:
        if now is Moment.BEFORE_CONT:
            migrating.cancel()
            await asyncio.sleep(0.05)

    async with pair(tmp_path, destination_at=slowly) as both:
        receiving = asyncio.create_task(both.destination.run(30))
        migrating = asyncio.create_task(both.source.run())
        await asyncio.wait({migrating, receiving})
        assert both.world.running == {"destination"} and both.leaving.ended
        assert receiving.exception() is None


# --- who may come -----------------------------------------------------------------------------------------------------


async def test_the_second_source_is_turned_away(tmp_path: Path) -> None:
    async def second(now: Moment) -> None:
        if now is Moment.RAM_COPY:
            async with Link(await connect(both.listener.address, SECRET)) as link:
                await link.send(Hello(migration="0" * 32, purpose="migrate"))
                with pytest.raises(VmbusError, match="serves another migration"):
                    await link.expect(Wanted, timeout=5, what="anything")

    async with pair(tmp_path, source_at=second) as both:
        assert (await both.migrate()).arrived


async def test_a_source_that_asks_while_it_is_not_decided_ends_it(tmp_path: Path) -> None:
    asking: list[asyncio.Task[str]] = []

    async def ask() -> str:
        async with Link(await connect(both.listener.address, SECRET)) as link:
            await link.send(Hello(migration=both.source.migration, purpose="ask"))
            fate = (await link.expect(Fate, timeout=5, what="the fate")).fate
            assert both.arriving.discarded
            return fate

    async def hold(now: Moment) -> None:
        if now is Moment.BEFORE_GO:
            asking.append(asyncio.create_task(ask()))
            await asyncio.sleep(30)

    async with pair(tmp_path, source_at=hold) as both:
        found = await both.migrate()
        assert not found.arrived
        assert "asks what became of it" in str(found.refusal)
        runs_on(both)
        assert await asking[0] == "gone"


async def test_nobody_comes(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        with contextlib.suppress(VmbusError):
            await connect(both.listener.address, bytes(32))
        with pytest.raises(WaitTimeout, match=r"a source to come to unix:.*turned away.*"):
            await both.destination.run(0.2)


async def test_no_destination_waits(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        both.listener.close()
        with pytest.raises(MigrateFailed, match=r"no destination waits at unix:.*the VM runs on") as caught:
            await both.source.run()
        assert caught.value.source_alive and both.leaving.steps == []


async def test_a_machine_that_does_not_fit(tmp_path: Path) -> None:
    there = dataclasses.replace(make_programs(tmp_path / "destination"), qemu_version="10.1.0")
    async with pair(tmp_path, programs=there) as both:
        found = await both.migrate()
        for problem in (found.problem, found.refusal):
            with pytest.raises(MigrateFailed, match=r"machine pc-q35-11\.1.*QEMU here is too old for .10\.1\.0."):
                raise problem
        assert both.arriving.steps == [] and both.world.running == {"source"}


@pytest.mark.parametrize("there", [{"accelerator": "kvm"}, {"qemu_version": "12.0.1"}], ids=["kvm", "later"])
async def test_fault_p6_fault_m15_a_vm_of_tcgs_and_of_an_earlier_machine_comes(
    tmp_path: Path, there: dict[str, Any]
) -> None:
    """To a host where KVM works, and to a later QEMU."""
    programs = dataclasses.replace(make_programs(tmp_path / "destination"), **there)
    async with pair(tmp_path, programs=programs) as both:
        assert (await both.migrate()).arrived and both.world.running == {"destination"}
        assert both.prepared is not None and both.prepared.machine.type == "pc-q35-11.1"


@pytest.mark.parametrize("how", ["refused", "dropped"])
async def test_fault_m11_a_port_that_is_not_let_through_is_named_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Only the migration's own port is forwarded: QEMU's stream reaches nobody."""
    monkeypatch.setattr(stream, "CONNECT_TIMEOUT", 0.3)

    listener = await listen(TcpAddress("127.0.0.1", 0), SECRET)
    both = Pair(tmp_path, listener)
    start, wait = both.arriving.start, both.leaving.wait_migration

    async def at_a_port(*arguments: Any) -> int:
        await start(*arguments)
        return 41234

    async def unreachable(wanted: Any, timeout: float, what: str) -> str:
        if "active" in wanted:
            assert timeout == 0.3
            raise (MigrationFailed(f"{what}: refused") if how == "refused" else WaitTimeout(what, timeout))
        return await wait(wanted, timeout, what)

    both.arriving.start = at_a_port  # type: ignore[method-assign]
    both.leaving.wait_migration = unreachable  # type: ignore[method-assign]
    found = await both.migrate()
    listener.close()
    assert re.search(r"connect to tcp:127.0.0.1:41234(.|\n)*--stream-port PORT", str(found.problem)), found.problem
    assert found.problem.source_alive
    runs_on(both)


async def test_fault_m12_the_bandwidth_is_what_was_asked_for(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        told: list[Any] = []
        execute = both.leaving.execute

        async def note(command: str, arguments: Any = None, **more: Any) -> Any:
            if command == "migrate-set-parameters":
                told.append(arguments["max-bandwidth"])
            return await execute(command, arguments, **more)

        both.leaving.execute = note  # type: ignore[method-assign]
        both.source._stream = StreamSettings(bandwidth=5 << 20)
        assert (await both.migrate()).arrived
        assert told == [5 << 20]


def test_fault_m12_a_narrow_way_has_the_time_that_it_takes() -> None:
    assert migrate._copy_timeout(256, None) == 60 + 128
    assert migrate._copy_timeout(256, 1 << 30) == 60 + 128
    assert migrate._copy_timeout(256, 1 << 20) == 60 + 3 * 256


# --- tables and addresses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "stages"), [(SOURCE, SourceStage), (DESTINATION, DestinationStage)])
def test_the_tables_are_whole(table: Any, stages: Any) -> None:
    assert list(table) == list(stages)
    reached = {stages.PREPARING} | {stage for row in table.values() for stage in row.next}
    assert reached == set(stages)
    for stage, row in table.items():
        assert row.begins and (row.on_failure or not row.next), stage


def test_only_a_stage_that_has_not_begun_the_decision_may_be_discarded_or_run_on_unasked() -> None:
    assert {stage for stage, row in DESTINATION.items() if row.fate == "gone"} == {
        stage for stage, row in DESTINATION.items() if row.owner == "source"
    }
    assert {stage for stage, row in SOURCE.items() if row.owner == "unknown"} == {
        SourceStage.DECIDED,
        SourceStage.IN_DOUBT,
    }


def test_a_stage_cannot_be_left_out() -> None:
    one = Ownership(SOURCE, SourceStage.PREPARING)
    with pytest.raises(UsageError, match="does not lead from 'preparing' to 'decided'"):
        one.move(SourceStage.DECIDED)
    assert one.stage is SourceStage.PREPARING and ownership.SOURCE is SOURCE


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp:10.0.0.2:4444", TcpAddress("10.0.0.2", 4444)),
        ("tcp:[fe80::1%veth0]:1", TcpAddress("fe80::1%veth0", 1)),
        ("tcp:host.example:0", TcpAddress("host.example", 0)),
        ("unix:/a/b,c", UnixAddress("/a/b,c")),
    ],
)
def test_addresses(text: str, address: Any) -> None:
    assert parse_address(text) == address and str(address) == text


@pytest.mark.parametrize(
    "text", ["", "tcp:", "tcp:host", "tcp:host:65536", "tcp:h:-1", "unix:", "udp:h:1", "unix:" + "x" * 200]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not an address|shorter"):
        parse_address(text)


def test_qemus_words_for_an_address() -> None:
    assert stream_channel(UnixAddress("/a,b"))[0]["addr"] == {"transport": "socket", "type": "unix", "path": "/a,b"}
    assert stream_channel(TcpAddress("::1", 5))[0]["addr"] == {
        "transport": "socket", "type": "inet", "host": "::1", "port": "5",
    }  # fmt: skip


async def test_a_listener_serves_once(tmp_path: Path) -> None:
    listener: Listener = await listen(UnixAddress(str(tmp_path / "m.sock")), SECRET)
    listener.serve(lambda channel: asyncio.sleep(0))
    with pytest.raises(UsageError, match="serves"):
        listener.serve(lambda channel: asyncio.sleep(0))
    listener.close()
    listener.close()
    assert not (tmp_path / "m.sock").exists()


def test_the_page_tells_what_the_tables_say() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "migration.md").read_text()
    for table, whose in ((SOURCE, "source"), (DESTINATION, "destination")):
        lines = page[page.index(f"| Stage of the {whose} |") :].splitlines()[2 : 2 + len(table)]
        told = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        real = [
            [stage.value, row.begins, row.owner, row.on_failure] + ([row.fate] if row.fate else [])
            for stage, row in table.items()
        ]
        assert told == real
    for name, why in REFUSED_CAPABILITIES.items():
        assert f"| capability `{name}` | {why} |" in page
    for number in (f"{MAX_FRAME >> 20} MiB", f"for {ASK_TIMEOUT:.0f} seconds", f"nothing for {SILENCE:.0f} seconds"):
        assert number in page, number
    assert f"within {GO_TIMEOUT:.0f}\n  seconds" in page
