"""The main job in QEMU: saved in mid-traffic, restored in fresh processes, exactly once. And the ways to break it.

One VM is booted and saved in mid-traffic, into a snapshot that several tests restore: a restore is cheap, a boot is
not. The books are kept by the guest's test drivers and by the providers, each for itself.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from support.boot import boot
from vmbus.device import saved
from vmbus.errors import VmbusError
from vmbus.kmcl.saved import ChannelChunk, decode_chunk, encode
from vmbus.operations.machine import VirtualMachine
from vmbus.testkit.story import Figures, Story, audit, finish, run_story, save_in_flight, until_in_flight
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.moments import Sabotage

pytestmark = [pytest.mark.vm, pytest.mark.long]


STORY = Story(packets=256, echo_count=8_000, burst_count=14_000, stall_seconds=8.0)


class Taken:
    """A snapshot of a VM in mid-traffic, and the guest's job that goes on in it."""

    def __init__(self, directory: Path, job: int, packets: dict[str, int]) -> None:
        self.directory = directory
        self.job = job
        self.packets = packets


async def boot_and_save(description: VmDescription, programs: Programs, directory: Path, *, live: bool) -> Taken:
    vm = await boot(description, programs)
    async with vm:
        await vm.wait_ready()
        job = int((await vm.call_agent("start", driver="mixed", parameters=STORY.workloads()))["job"])
        report = await save_in_flight(vm, job, msgspec.structs.replace(STORY, live=live), directory)
    return Taken(directory, job, report.packets)


@pytest.fixture(scope="session")
def taken(demo_description: VmDescription, programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Taken:
    import asyncio

    directory = tmp_path_factory.mktemp("taken") / "snapshot"
    return asyncio.run(boot_and_save(demo_description, programs, directory, live=True))


async def books(vm: VirtualMachine, job: int) -> Figures:
    """Let the workloads run to their end, and compare the books."""
    figures = Figures()
    report = await finish(vm, job)
    audit(figures, report, await vm.control.call("status"), STORY.expected())
    return figures


def clean(figures: Figures) -> None:
    print(
        f"{figures.transactions} transactions, {figures.completed} completed, {figures.lost} lost, "
        f"{figures.duplicated} duplicated, {figures.reordered} reordered, {figures.corrupted} corrupted"
    )
    assert not figures.reasons, figures.reasons
    assert figures.completed == figures.transactions > 20_000


@pytest.mark.parametrize("live", [False, True], ids=["stopped", "live"])
async def test_saved_and_restored_in_mid_traffic(
    demo_description: VmDescription, programs: Programs, tmp_path: Path, live: bool
) -> None:
    story = Story(packets=256, live=live, echo_count=8_000, burst_count=14_000)
    figures = await run_story(story, demo_description, programs, tmp_path / "snapshot", boot=boot)
    print(f"in flight {figures.in_flight}, restored {figures.restored_by_state}, seconds {figures.seconds}")
    assert figures.verdict == "pass", figures.reasons
    assert min(figures.in_flight.values()) > 0
    clean(figures)
    assert (figures.flushed_pages > 0) == live


async def test_a_restored_vm_can_be_saved_again_and_every_snapshot_restored_again(
    taken: Taken, programs: Programs, tmp_path: Path
) -> None:
    source = taken.directory
    for generation, live in enumerate((True, False)):
        async with await VirtualMachine.restore(source, programs) as vm:
            source = tmp_path / f"generation-{generation}"
            report = await save_in_flight(vm, taken.job, msgspec.structs.replace(STORY, live=live), source)
            assert min(report.packets.values()) > 0
    for snapshot in (source, taken.directory):
        async with await VirtualMachine.restore(snapshot, programs) as vm:
            clean(await books(vm, taken.job))


async def test_a_save_that_keeps_the_vm_loses_nothing(taken: Taken, programs: Programs, tmp_path: Path) -> None:
    async with await VirtualMachine.restore(taken.directory, programs) as vm:
        await until_in_flight(vm, taken.job, STORY)
        report = await vm.save(tmp_path / "checkpoint", live=True, keep=True)
        clean(await books(vm, taken.job))
    assert report.downtime is not None
    print(f"downtime of the checkpoint: {report.downtime:.3f} s")


# ---- sabotage --------------------------------------------------------------------------------------------------------


async def alarm(taken: Taken, programs: Programs, directory: Path, sabotage: Sabotage) -> str:
    """Restore with damage, and return how it was noticed; fail when everything seems fine."""
    try:
        vm = await VirtualMachine.restore(directory, programs, sabotage=sabotage)
    except VmbusError as error:
        noticed = f"refused: {error}"
    else:
        async with vm:
            noticed = "; ".join((await books(vm, taken.job)).reasons)
    print(f"the alarm: {noticed[:300]}")
    assert noticed, "the damage went unnoticed"
    return noticed


async def test_sabotage_without_the_pci_replay(taken: Taken, programs: Programs) -> None:
    await alarm(taken, programs, taken.directory, Sabotage(skip_pci_replay=True))


async def test_sabotage_without_the_dirty_flush(taken: Taken, programs: Programs, tmp_path: Path) -> None:
    vm = await VirtualMachine.restore(taken.directory, programs)
    async with vm:
        await until_in_flight(vm, taken.job, STORY)
        await vm.save(tmp_path / "unflushed", live=True, sabotage=Sabotage(skip_flush=True))
    await alarm(taken, programs, tmp_path / "unflushed", Sabotage())


def lose_one_packet(data: bytes) -> bytes:
    """The state without one of its packets, well-formed in every other respect."""
    state = saved.decode(data)
    records = []
    for record in state.channels:
        chunks = list(record.chunks)
        if len(chunks) > 10:
            del chunks[5]
            head = decode_chunk(chunks[0])
            assert isinstance(head, ChannelChunk)
            chunks[0] = encode(ChannelChunk(head.version, head.started, head.next_transaction, head.entries - 1))
        records.append(saved.ChannelRecord(record.instance, chunks))
    fields = {name: getattr(state, name) for name in state.__struct_fields__}
    return saved.encode(saved.DeviceState(**{**fields, "channels": records}))


async def test_sabotage_one_packet_lost_from_the_state(taken: Taken, programs: Programs) -> None:
    noticed = await alarm(taken, programs, taken.directory, Sabotage(edit_state=lose_one_packet))
    assert "completed" in noticed or "lost" in noticed


# ---- bad snapshots ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["flipped byte", "missing file", "version"])
async def test_a_bad_snapshot_is_refused_before_anything_starts(
    taken: Taken, programs: Programs, tmp_path: Path, what: str
) -> None:
    directory = tmp_path / "bad"
    shutil.copytree(taken.directory, directory)
    victim = max((path for path in directory.iterdir() if path.suffix != ".json"), key=lambda path: path.stat().st_size)
    if what == "flipped byte":
        with victim.open("r+b") as file:
            file.seek(victim.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        expected = victim.name
    elif what == "missing file":
        victim.unlink()
        expected = victim.name
    else:
        manifest = directory / "manifest.json"
        text = manifest.read_text()
        assert '"version": 1,' in text
        manifest.write_text(text.replace('"version": 1,', '"version": 99,'))
        expected = "version 99"

    with pytest.raises(VmbusError) as caught:
        await VirtualMachine.restore(directory, programs)
    print(f"refused: {caught.value}")
    assert expected in str(caught.value)
