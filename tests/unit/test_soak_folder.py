"""The folder of a soak campaign: what it refuses, what survives, and what is kept."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from support.soak import read
from support.soak_records import episode, operation
from vmbus.errors import UsageError
from vmbus.soak import keep
from vmbus.soak.folder import Campaign, CampaignFolder, read_campaign
from vmbus.soak.records import Environment, EventRecord, OperationRecord, State


def campaign(seed: int = 1, **settings: Any) -> Campaign:
    return Campaign(seed=seed, started="2026-01-01", settings={"seed": seed, **settings}, environment=Environment())


def test_a_new_folder_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "a" / "campaign"
    folder = CampaignFolder.open(path, campaign())
    folder.write(operation())
    folder.write(EventRecord(episode=-1, at=0.0, text="x"))
    folder.write(episode(0))
    folder.save_state()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for one in path.iterdir():
        assert stat.S_IMODE(one.stat().st_mode) == (0o700 if one.is_dir() else 0o600), one
    folder.close()
    assert {one.name for one in path.iterdir()} == {
        *("campaign.json", "state.json", "operations.jsonl", "events.jsonl", "episodes.jsonl"),
        *("episodes", "failures", "lock"),
    }
    assert read(path, OperationRecord) == [operation()]


def test_the_same_campaign_goes_on(tmp_path: Path) -> None:
    folder = CampaignFolder.open(tmp_path, campaign(weights={"clone": 1}))
    assert not folder.resumed
    for record in (episode(0), episode(1, "interrupted"), episode(2, "failed"), episode(3, "interrupted"), episode(3)):
        folder.write(record)
    folder.state = State(ran=12.0)
    folder.save_state()
    folder.close()
    again = CampaignFolder.open(tmp_path, campaign(weights={"clone": 1}))
    assert again.resumed and again.state.ran == 12.0
    assert {number: one.verdict for number, one in again.finished().items()} == {0: "passed", 2: "failed", 3: "passed"}
    again.close()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (campaign(2), "seed is 1 there and 2 here"),
        (campaign(1, weights={"clone": 2}), 'weights is {"clone":1} there and {"clone":2} here'),
        (campaign(1, weights={"clone": 1}, operations=5), "operations is null there and 5 here"),
    ],
)
def test_another_campaign_is_refused(tmp_path: Path, other: Campaign, message: str) -> None:
    CampaignFolder.open(tmp_path, campaign(weights={"clone": 1})).close()
    with pytest.raises(UsageError) as caught:
        CampaignFolder.open(tmp_path, other)
    assert message in str(caught.value)
    CampaignFolder.open(tmp_path, campaign(weights={"clone": 1})).close()  # nothing was changed, and nothing is held


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 2, "new": "fields"}', "holds a campaign of format 2, this version reads and writes 1"),
        ('{"format": 1', "campaign.json is damaged"),
        ('{"format": 1, "seed": "x"}', "campaign.json is damaged"),
        ("", "campaign.json is damaged"),
    ],
)
def test_another_version_and_a_damaged_one_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "campaign.json").write_text(content)
    (tmp_path / "operations.jsonl").write_text("precious")
    before = {one.name for one in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=message):
        CampaignFolder.open(tmp_path, campaign())
    with pytest.raises(UsageError, match=message):
        read_campaign(tmp_path)
    assert (tmp_path / "operations.jsonl").read_text() == "precious"
    assert {one.name for one in tmp_path.iterdir()} - before <= {"lock"}


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpeg").touch()
    with pytest.raises(UsageError, match="holds other things than a campaign"):
        CampaignFolder.open(tmp_path, campaign())
    assert [one.name for one in tmp_path.iterdir()] == ["holiday.jpeg"]
    with pytest.raises(UsageError, match="is no folder of a campaign"):
        read_campaign(tmp_path)


def test_two_processes_cannot_write_in_one_folder(tmp_path: Path) -> None:
    folder = CampaignFolder.open(tmp_path, campaign())
    with pytest.raises(UsageError, match="another process runs the campaign"):
        CampaignFolder.open(tmp_path, campaign())
    folder.close()


@pytest.mark.parametrize("torn", [b"x", b'{"episode":0,"number":1,"ki', b"z" * 200_000])
def test_a_torn_line_is_taken_back_and_said(tmp_path: Path, torn: bytes) -> None:
    folder = CampaignFolder.open(tmp_path, campaign())
    folder.write(operation())
    folder.close()
    with (tmp_path / "operations.jsonl").open("ab") as file:
        file.write(torn)
    folder = CampaignFolder.open(tmp_path, campaign())
    assert folder.problems == [f"operations.jsonl ended in the middle of a record ({len(torn)} bytes), which is gone"]
    folder.write(operation(0, 1))
    folder.close()
    assert read(tmp_path, OperationRecord) == [operation(), operation(0, 1)]


def test_a_line_that_is_no_record_hides_no_other(tmp_path: Path) -> None:
    folder = CampaignFolder.open(tmp_path, campaign())
    folder.write(episode(0))
    with (tmp_path / "episodes.jsonl").open("ab") as file:
        file.write(b"rubbish\n")
    folder.write(episode(1))
    assert set(folder.finished()) == {0, 1}
    (problem,) = folder.problems
    assert problem.startswith("episodes.jsonl: 1 of 3 lines could not be read; line 2 is no record")
    folder.close()


# --- what is kept -----------------------------------------------------------------------------------------------------


def fill(folder: Path, **sizes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        (folder / name.replace("_", ".")).write_bytes(os.urandom(size))


def test_a_failure_is_bounded_biggest_files_first(tmp_path: Path) -> None:
    fill(tmp_path / "snapshot", ram=3 << 20, device=1000)
    fill(tmp_path, qemu_log=5000, audit=1 << 20)
    (tmp_path / "socket").symlink_to("/nowhere")
    said = keep.bound_one(tmp_path, 2 << 20)
    assert said == [f"snapshot/ram ({3 << 20} bytes)"]
    assert {one.name for one in tmp_path.rglob("*") if one.is_file()} == {"device", "qemu.log", "audit", keep.NOTE}
    assert (tmp_path / keep.NOTE).read_text() == f"dropped to save room: snapshot/ram ({3 << 20} bytes)\n"
    assert keep.bound_one(tmp_path, 2 << 20) == []
    assert not (tmp_path / "socket").is_symlink()


def test_long_text_loses_its_middle(tmp_path: Path) -> None:
    text = b"".join(b"%07d\n" % number for number in range(2 << 20))
    (tmp_path / "console.log").write_bytes(text)
    said = keep.bound_one(tmp_path, 64 << 20)
    kept = (tmp_path / "console.log").read_bytes()
    assert said == [f"the middle of console.log ({len(text) - keep.TEXT_LIMIT} bytes)"]
    assert len(kept) == keep.TEXT_LIMIT
    head, mark, tail = kept.partition(f"\n... {len(text) - keep.TEXT_LIMIT} bytes left out ...\n".encode())
    assert mark and text.startswith(head) and text.endswith(tail)


def test_all_failures_together_are_bounded_oldest_first_and_the_newest_stays(tmp_path: Path) -> None:
    for age, name in enumerate(("00004", "00001", "00007")):
        fill(tmp_path / name, ram=3 << 20, log=10_000)
        os.utime(tmp_path / name, (age, age))
    assert keep.bound_all(tmp_path, 16 << 20) == []
    assert keep.bound_all(tmp_path, 7 << 20) == [f"00004/ram ({3 << 20} bytes)"]
    assert (tmp_path / "00004" / "log").exists()
    for age, name in enumerate(("00004", "00001", "00007")):
        os.utime(tmp_path / name, (age, age))
    said = keep.bound_all(tmp_path, 1000)
    assert said == [f"00001/ram ({3 << 20} bytes)", "00004, as a whole", "00001, as a whole"]
    assert [one.name for one in tmp_path.iterdir()] == ["00007"]
    assert (tmp_path / "00007" / "ram").exists()


def test_failures_of_the_same_episode_are_kept_beside_each_other(tmp_path: Path) -> None:
    folder = CampaignFolder.open(tmp_path, campaign())
    assert [folder.keep(folder.working(3)) for _ in range(3)] == [
        f"failures/{name}" for name in ("00003", "00003-2", "00003-3")
    ]
    (folder.working(4) / "left").touch()
    assert list(folder.working(4).iterdir()) == []
    folder.close()
