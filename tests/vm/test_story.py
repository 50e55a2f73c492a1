"""The main job in QEMU: saved in mid-traffic, restored in fresh processes, exactly once. And the ways to break it.

One VM is booted and saved in mid-traffic, into a snapshot that several tests restore: a restore is cheap, a boot is
not. The books are kept by the guest's test drivers and by the providers, each for itself. The whole story in one
command is the demo, which test_installed.py runs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from support.boot import Taken, books, clean
from vmbus.device import saved
from vmbus.errors import VmbusError
from vmbus.kmcl.saved import ChannelChunk, decode_chunk, encode
from vmbus.operations.machine import VirtualMachine
from vmbus.testkit.story import save_in_flight, until_in_flight
from vmbus.vm.command_line import Programs
from vmbus.vm.moments import Sabotage

pytestmark = [pytest.mark.vm, pytest.mark.long]

STORY = Taken.STORY
NEW = {"kind": "echo", "name": "added", "instance": "00000000-0000-4000-8000-0000000000aa"}


async def test_a_restored_vm_can_be_saved_again_and_every_snapshot_restored_again(
    taken: Taken, programs: Programs, tmp_path: Path
) -> None:
    """A provider that came between two saves is in the second generation's description, too."""
    source, manifest = taken.directory, (taken.directory / "manifest.json").read_bytes()
    for generation, live in enumerate((True, False)):
        async with await VirtualMachine.restore(source, programs) as vm:
            assert vm.restored is not None and min(vm.restored.packets.values()) > 0
            assert (vm.restored.channels, vm.restored.pci_writes) == (2, 7)
            if not generation:
                await vm.control.call("offer", provider=NEW)
            assert vm.description.device.providers[-1].name == ("added" if generation else "burst")
            source = tmp_path / f"generation-{generation}"
            report = await save_in_flight(vm, taken.job, msgspec.structs.replace(STORY, live=live), source)
            assert min(report.packets.values()) > 0 and (report.flushed_pages > 0) == live
    for snapshot in (source, taken.directory):
        async with await VirtualMachine.restore(snapshot, programs) as vm:
            clean(await books(vm, taken.job, STORY.expected()))
    assert (taken.directory / "manifest.json").read_bytes() == manifest


# ---- sabotage --------------------------------------------------------------------------------------------------------


async def alarm(taken: Taken, programs: Programs, directory: Path, sabotage: Sabotage) -> str:
    """Restore with damage, and return how it was noticed; fail when everything seems fine."""
    try:
        vm = await VirtualMachine.restore(directory, programs, sabotage=sabotage)
    except VmbusError as error:
        noticed = f"refused: {error}"
    else:
        async with vm:
            noticed = "; ".join((await books(vm, taken.job, STORY.expected())).reasons)
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


async def test_a_bad_snapshot_is_refused_before_anything_starts(
    taken: Taken, programs: Programs, tmp_path: Path
) -> None:
    """What else may be bad about one: tests/unit/test_snapshot_bundle.py."""
    directory = tmp_path / "bad"
    shutil.copytree(taken.directory, directory)
    victim = max((path for path in directory.iterdir() if path.suffix != ".json"), key=lambda path: path.stat().st_size)
    with victim.open("r+b") as file:
        file.seek(victim.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(VmbusError, match=victim.name) as caught:
        await VirtualMachine.restore(directory, programs)
    print(f"refused: {caught.value}")
