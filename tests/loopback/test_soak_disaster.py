"""What a soak campaign survives: being killed, and full disks. Real processes, a real file system."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support import pace
from support.failure_bench import Disk
from support.pace import eventually
from support.processes import alive
from support.soak import Script, Sitting, campaign, episodes, events, read
from vmbus.soak.campaign import Limits
from vmbus.soak.folder import RESERVE, CampaignFolder, read_state
from vmbus.soak.records import EpisodeRecord, EventRecord, OperationRecord

OWNER = Path(__file__).parents[1] / "support" / "soak_owner.py"
GOOD: list[list[Any]] = [["operation"], ["operation"]]


def test_a_campaign_that_is_killed_leaves_no_process_and_is_gone_on_with(tmp_path: Path) -> None:
    folder, pid, go = tmp_path / "campaign", tmp_path / "pid", tmp_path / "go"
    script = [GOOD, [["operation"], ["pid", str(pid)], ["wait-for", str(go)], ["operation"]], GOOD]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    owner = subprocess.Popen([sys.executable, str(OWNER), str(folder), json.dumps(script)], env=environment)
    try:
        known = partial(read, folder, OperationRecord)
        asyncio.run(eventually(lambda: pid.exists() and len(known()) == 3, "the second episode"))
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait(pace.seconds(30))
    asyncio.run(eventually(lambda: not alive(int(pid.read_text())), "the end of the worker"))
    assert read_state(folder).state == "running"
    assert [(record.episode, record.number) for record in read(folder, OperationRecord)] == [(0, 0), (0, 1), (1, 0)]
    go.touch()
    again = Sitting(folder, Script(*script))
    assert asyncio.run(again()) == "passed"
    assert read_state(folder).state == "finished"
    assert [record.episode for record in read(folder, EpisodeRecord)] == [0, 1, 2]  # the first was not run again
    assert [(record.episode, record.number) for record in read(folder, OperationRecord)][3:] == [
        *((1, 0), (1, 1)),
        *((2, 0), (2, 1)),
    ]


# --- full disks -------------------------------------------------------------------------------------------------------


class Small(Disk):
    SIZE = 32 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        disk = Small(tmp_path / "disk")
    except PermissionError as error:
        pytest.skip(str(error))
    yield disk
    disk.remove()


def limits(wait_for_room: float) -> Limits:
    return Limits(beat=0.05, room=8 << 20, wait_for_room=wait_for_room, report_every=0.0)


def spoiling(tmp_path: Path, disk: Disk) -> list[list[Any]]:
    """An episode that fills the disk, the first time."""
    return [["operation"], ["fill", str(tmp_path / "filled"), str(disk.path)], ["operation"]]


def test_a_disk_that_gets_full_and_empty_again_costs_only_time(tmp_path: Path, disk: Disk) -> None:
    folder = disk.path / "campaign"

    async def body() -> str:
        sitting = Sitting(folder, Script(GOOD, spoiling(tmp_path, disk), GOOD), limits=limits(60), scratch=disk.path)
        running = asyncio.create_task(sitting())
        await eventually(lambda: "no episode begins" in sitting.text, "the wait for room")
        assert "MiB left, and 8 MiB are needed; waiting up to 60 s for room" in sitting.text
        assert not (folder / "reserve").exists()
        disk.empty()
        return await asyncio.wait_for(running, pace.seconds(30))

    assert asyncio.run(body()) == "passed"
    assert {number: record.verdict for number, record in episodes(folder).items()} == dict.fromkeys(range(3), "passed")
    assert [(record.episode, record.number) for record in read(folder, OperationRecord)] == [
        *((0, 0), (0, 1)),
        *((1, 0), (1, 0), (1, 1)),  # run again from its beginning
        *((2, 0), (2, 1)),
    ]
    assert "episode 1 is run again: the disk got full" in events(folder) and "there is room again" in events(folder)
    assert list((folder / "failures").iterdir()) == []


def test_a_disk_that_stays_full_interrupts_the_campaign(tmp_path: Path, disk: Disk) -> None:
    folder = disk.path / "campaign"
    row = Script(GOOD, spoiling(tmp_path, disk), GOOD)
    assert asyncio.run(Sitting(folder, row, limits=limits(0.3), scratch=disk.path)()) == "interrupted"
    assert "no room on the disk for 0.3 s" in read_state(folder).reason
    assert {number: record.verdict for number, record in episodes(folder).items()} == {0: "passed"}
    disk.empty()
    assert asyncio.run(Sitting(folder, row, limits=limits(0.3), scratch=disk.path)()) == "passed"
    assert set(episodes(folder)) == {0, 1, 2}


def test_without_the_look_at_the_disk_it_would_be_a_failure(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage of the above; and a failure that only talks of a full disk stays a failure."""
    monkeypatch.setattr("vmbus.soak.campaign.CampaignRun._short_of_room", lambda self: "")
    folder = tmp_path / "campaign"
    row = Script(GOOD, spoiling(tmp_path, disk), GOOD)
    assert asyncio.run(Sitting(folder, row, limits=limits(0.3), scratch=disk.path)()) == "failed"
    assert episodes(folder)[1].failure == "cannot write: No space left on device"


def test_records_that_find_no_room_wait_and_none_is_torn_or_lost(disk: Disk) -> None:
    folder = CampaignFolder.open(disk.path / "campaign", campaign())
    written = 0

    def write(count: int) -> None:
        nonlocal written
        for _ in range(count):
            text = f"{written} " + "x" * (written % 700)
            folder.write(EventRecord(episode=0, at=0.0, text=text))
            written += 1

    def on_disk() -> list[EventRecord]:
        data = (folder.path / "events.jsonl").read_bytes()
        assert not data or data.endswith(b"\n")
        return [msgspec.json.decode(line, type=EventRecord) for line in data.splitlines()]

    write(100)
    disk.fill()
    write(2000)
    assert folder.waiting == 0, "the reserve is for this"
    assert folder.problems == ["the disk is full: the reserve for records is given up"]
    disk.fill()
    write(3000)
    assert folder.waiting > 1000
    assert len(on_disk()) == written - folder.waiting
    assert folder.problems[1].endswith("No space left on device; records wait in memory until there is room")
    assert len(folder.problems) == 2  # said once, not with each record
    assert folder.missing() == [f"{folder.waiting} records, which found no room on the disk"]
    disk.empty()
    assert folder.flush() and folder.missing() == []
    assert [record.text.split()[0] for record in on_disk()] == [str(number) for number in range(written)]
    assert (folder.path / "reserve").stat().st_size == RESERVE  # for the next time
    folder.close()


def test_an_episode_whose_record_found_no_room_is_run_again(tmp_path: Path, disk: Disk) -> None:
    """The disk is full to the last byte, and stays so to the end of the sitting."""
    folder, marker, go = disk.path / "campaign", tmp_path / "marker", tmp_path / "go"
    row = Script([*GOOD, ["touch", str(marker)], ["wait-for", str(go)], ["operation", {"letters": 200_000}]])

    async def body() -> str:
        sitting = Sitting(folder, row, limits=Limits(beat=0.05, room=0))
        running = asyncio.create_task(sitting())
        await eventually(marker.exists, "the episode's marker")
        (folder / "reserve").unlink()
        disk.fill()
        go.touch()
        return await asyncio.wait_for(running, pace.seconds(30))

    assert asyncio.run(body()) == "interrupted"
    assert episodes(folder) == {}
    disk.empty()
    assert asyncio.run(Sitting(folder, row)()) == "passed"
    assert set(episodes(folder)) == {0}
