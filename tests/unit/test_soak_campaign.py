"""A soak campaign's own logic, with workers that do all kinds of things wrong: none of it ends the campaign."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import Any

import pytest

from support import pace
from support.pace import eventually
from support.soak import Script, Sitting, episodes, events, read
from vmbus.soak.campaign import Limits
from vmbus.soak.engine import LocalEngine, capacity
from vmbus.soak.folder import read_state
from vmbus.soak.job import Bounds
from vmbus.soak.records import EpisodeRecord, OperationRecord

GOOD: list[list[Any]] = [["phase", "boot"], ["operation"], ["sample"], ["operation"]]


def sit(path: Path, row: Script, **more: Any) -> tuple[str, Sitting]:
    sitting = Sitting(path, row, **more)
    return asyncio.run(sitting()), sitting


def test_a_campaign_that_passes(tmp_path: Path) -> None:
    verdict, sitting = sit(tmp_path, Script(GOOD, GOOD, GOOD))
    assert verdict == "passed"
    assert {number: record.verdict for number, record in episodes(tmp_path).items()} == dict.fromkeys(
        range(3), "passed"
    )
    assert [(record.episode, record.number) for record in read(tmp_path, OperationRecord)] == [
        (episode, number) for episode in range(3) for number in range(2)
    ]
    assert read_state(tmp_path).state == "finished" and read_state(tmp_path).ran > 0
    assert sitting.reports >= 3, "also of what there is so far"
    assert list((tmp_path / "episodes").iterdir()) == list((tmp_path / "failures").iterdir()) == []
    assert "episode 1, operation 1: save_restore done, 0.20 s, downtime 0.50 s, 7 packets in flight" in sitting.text


BAD: dict[str, tuple[list[list[Any]], str]] = {
    "dies": ([["operation"], ["log", "my last words"], ["die", "SIGKILL"]], "was killed by SIGKILL.*\n.*my last words"),
    "ends": ([["operation"], ["exit", 3]], "ended with status 3"),
    "ends well without a word": ([["operation"], ["exit", 0]], "ended with status 0"),
    "says no more": ([["operation"], ["phase", "save"], ["hang"]], r"hangs: it said nothing for [\d.]+ s \(in: save\)"),
    "is deaf, too": ([["operation"], ["deaf"], ["hang"]], r"hangs: it said nothing for [\d.]+ s"),
    "rubbish": ([["operation"], ["print", "Segmentation"]], "printed 1 lines that are no records.*'Segmentation'"),
    "binary rubbish": ([["operation"], ["print", "\x00\udcff\x1b"]], "printed 1 lines that are no records"),
    "rubbish in JSON": ([["operation"], ["print", '{"kind": "no", "record": 1}']], "printed 1 lines that"),
    "half a record": ([["operation"], ["print", '{"kind": "operation", "record": {}}']], "printed 1 lines"),
    "another's record": ([["operation"], ["operation", {"episode": 99}]], "printed 1 lines"),
    "a line without end": ([["operation"], ["print-long", 40 << 20]], "printed 1 lines.*'xxx"),
    "fails": ([["operation"], ["fail", "a packet was lost"]], "^a packet was lost$"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_worker_is_a_failed_episode_and_the_others_go_on(tmp_path: Path, what: str) -> None:
    steps, message = BAD[what]
    bounds = Bounds(silence=pace.seconds(1.0 if "hang" in message else 20.0), longest=pace.seconds(30.0), grace=0.5)
    verdict, sitting = sit(tmp_path, Script(GOOD, [*steps], GOOD, bounds=bounds))
    assert verdict == "failed"
    found = episodes(tmp_path)
    assert [found[number].verdict for number in range(3)] == ["passed", "failed", "passed"]
    assert re.search(message, found[1].failure, re.DOTALL), found[1].failure
    assert found[1].kept == "failures/00001"
    assert {"plan.json", "worker.log"} <= {one.name for one in (tmp_path / found[1].kept).iterdir()}
    # What it had said before is not lost.
    assert [record.number for record in read(tmp_path, OperationRecord) if record.episode == 1] == [0]
    assert "FAILED  episode 1" in sitting.text and "replay: scripts/soak --episode 1" in sitting.text


def test_a_worker_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    bounds = Bounds(silence=20, longest=0.5, grace=1)
    verdict, _ = sit(tmp_path, Script([["operation"], ["hang"]], bounds=bounds))
    record = episodes(tmp_path)[0]
    assert (verdict, record.verdict) == ("failed", "failed")
    assert "did not come to its end in 0.5 s" in record.failure


def test_a_worker_that_cannot_be_started(tmp_path: Path) -> None:
    verdict, _ = sit(tmp_path, Script(GOOD, command=("/no/such/program",)))
    assert verdict == "failed"
    assert "ended with status 127; its last words:\n    cannot start /no/such/program" in episodes(tmp_path)[0].failure


def test_too_many_failures_end_it(tmp_path: Path) -> None:
    verdict, _ = sit(tmp_path, Script([["fail", "x"]], endless=True), limits=Limits(failures=3, beat=0.05, room=0))
    assert verdict == "failed"
    assert len(episodes(tmp_path)) == 3
    assert "3 episodes have failed, so the campaign is ended" in events(tmp_path)


def test_what_is_kept_is_bounded_and_said(tmp_path: Path) -> None:
    steps: list[list[Any]] = [["file", "snapshot", 900_000], ["file", "log", 10_000], ["fail", "x"]]
    limits = Limits(keep_bytes=100_000, beat=0.05, room=0)
    sit(tmp_path, Script(*[steps] * 12), limits=limits)
    kept = sorted(one.name for one in (tmp_path / "failures").iterdir())
    assert "00011" in kept and "00000" in kept
    assert sum(one.stat().st_size for one in (tmp_path / "failures").rglob("*")) < 800_000 + 12 * 10_000
    assert "not kept, to save room: snapshot (900000 bytes)" in events(tmp_path)
    assert (tmp_path / "failures" / "00003" / "log").exists()


def test_episodes_run_side_by_side(tmp_path: Path) -> None:
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    row = Script([["touch", here], ["wait-for", there]], [["touch", there], ["wait-for", here]])
    verdict, _ = sit(tmp_path / "campaign", row, engine=LocalEngine(parallel=2))
    assert verdict == "passed"  # one after the other, each would wait for a minute and be called hanging


def test_it_ends_when_its_time_is_up(tmp_path: Path) -> None:
    limits = Limits(seconds=pace.seconds(1.0), beat=0.05, room=0)
    verdict, _ = sit(tmp_path, Script(GOOD, endless=True), limits=limits)
    assert verdict == "passed"
    done = len(episodes(tmp_path))
    assert done >= 2 and read_state(tmp_path).state == "finished"
    assert sit(tmp_path, Script(GOOD, endless=True), limits=limits)[0] == "passed"
    assert len(episodes(tmp_path)) == done  # the time counts over all sittings


def test_one_episode_alone(tmp_path: Path) -> None:
    verdict, _ = sit(tmp_path, Script(GOOD, [["fail", "x"]], GOOD), only=1)
    assert verdict == "failed"
    assert set(episodes(tmp_path)) == {1}


# --- interrupted, and gone on with ------------------------------------------------------------------------------------


async def interrupted(sitting: Sitting, marker: Path, force: bool = False) -> str:
    running = asyncio.create_task(sitting())
    await eventually(marker.exists, "the episode's marker")
    (sitting.run.abort if force else sitting.run.interrupt)()
    return await asyncio.wait_for(running, 20)


@pytest.mark.parametrize("force", [False, True])
def test_interrupted_and_gone_on_with(tmp_path: Path, force: bool) -> None:
    marker, go = tmp_path / "marker", tmp_path / "go"
    row = Script(GOOD, [["operation"], ["touch", str(marker)], ["wait-for", str(go)], ["operation"]], GOOD)
    folder = tmp_path / "campaign"
    assert asyncio.run(interrupted(Sitting(folder, row), marker, force)) == "interrupted"
    assert read_state(folder).state == "interrupted" and read_state(folder).reason == "interrupted"
    if not force:
        assert [record.verdict for record in read(folder, EpisodeRecord)] == ["passed", "interrupted"]
    assert len(read(folder, OperationRecord)) == 3  # also the one of the episode that was cut off
    assert list((folder / "failures").iterdir()) == []
    go.touch()
    verdict, sitting = sit(folder, row)
    assert verdict == "passed"
    assert {number: record.verdict for number, record in episodes(folder).items()} == dict.fromkeys(range(3), "passed")
    assert "with 1 finished episodes" in sitting.text
    assert len(read(folder, OperationRecord)) == 7


def test_a_deaf_worker_does_not_keep_an_interrupted_campaign(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    bounds = Bounds(silence=30, longest=60, grace=0.3)
    row = Script([["operation"], ["deaf"], ["touch", str(marker)], ["hang"]], bounds=bounds)
    assert asyncio.run(interrupted(Sitting(tmp_path / "campaign", row), marker)) == "interrupted"
    assert episodes(tmp_path / "campaign")[0].failure == "ended early on request"


def test_a_failure_before_the_interruption_counts(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    row = Script([["fail", "x"]], [["touch", str(marker)], ["hang"]])
    assert asyncio.run(interrupted(Sitting(tmp_path / "campaign", row), marker)) == "failed"


def test_how_many_at_once() -> None:
    assert capacity(processors=2, memory=64 << 30) == 1
    assert capacity(processors=16, memory=64 << 30) == 8
    assert capacity(processors=16, memory=4 << 30) == 2
    assert capacity(processors=1, memory=1) == 1
    assert 1 <= capacity() <= (os.cpu_count() or 1)
