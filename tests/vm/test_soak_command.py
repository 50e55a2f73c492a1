"""The command `soak` with real VMs: a campaign is interrupted, gone on with, and reports."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.commands import COMMAND
from support.pace import eventually
from support.soak import events, read
from vmbus.soak.folder import read_state
from vmbus.soak.records import EpisodeRecord, OperationRecord
from vmbus.soak.settings import LOSE_ONE_IN_A_THOUSAND
from vmbus.vm.process import Child

pytestmark = [pytest.mark.vm, pytest.mark.long, pytest.mark.usefixtures("own_temporary_files")]

SETTINGS = [
    *("--seed", "11", "--operations", "2", "--set", "packets=32", "--set", "pace=50", "--set", "linux=0"),
    *("--set", "workloads.bulk=0", "--set", "workloads.remap=0"),
    *("--set", 'script=[{"kind":"save_restore_live"},{"kind":"pause"}]'),
    *("--max-downtime", "save_restore_live=5m", "--min-operations", "2"),
]
SABOTAGE = [
    *("--seed", "12", "--operations", "3", "--set", "packets=256", "--set", "pace=50", "--set", "audit=false"),
    *("--set", "workloads.bulk=0", "--set", "workloads.remap=0"),
    *("--set", 'script=[{"kind":"save_restore"},{"kind":"migrate"},{"kind":"save_restore_live"}]'),
    *("--set", f"sabotage={LOSE_ONE_IN_A_THOUSAND}"),
]


async def soak(folder: Path, log: Path, settings: Sequence[str] = SETTINGS) -> Child:
    return await Child.spawn("the campaign", [*COMMAND, "soak", *settings, "--report", str(folder)], log)


async def status(child: Child, timeout: float) -> int:
    await asyncio.wait({child.exited}, timeout=timeout)
    try:
        assert not child.running, "the campaign does not end"
    finally:
        await child.stop()
    return child.exited.result()


# as booted: the campaign boots its VMs itself
def test_a_campaign_is_interrupted_gone_on_with_and_reports(tmp_path: Path) -> None:
    folder, first, second = tmp_path / "night", tmp_path / "first.log", tmp_path / "second.log"
    operations = folder / "operations.jsonl"

    async def body() -> tuple[int, int]:
        child = await soak(folder, first)
        await eventually(lambda: operations.exists() and operations.stat().st_size > 0, "the first operation", 120)
        os.kill(child.pid, signal.SIGTERM)
        interrupted = await status(child, 90)
        return interrupted, await status(await soak(folder, second), 180)

    assert asyncio.run(body()) == (3, 0), first.read_text() + second.read_text()
    assert "interrupted by SIGTERM" in events(folder)
    assert "INTERRUPTED  seed 11" in first.read_text() and "PASSED  seed 11: 2 operations" in second.read_text()
    assert [record.verdict for record in read(folder, EpisodeRecord)] == ["interrupted", "passed"]
    assert [record.number for record in read(folder, OperationRecord)][-2:] == [0, 1]  # and those of the first sitting
    assert read_state(folder).state == "finished"
    report = json.loads((folder / "report.json").read_bytes())
    assert (report["verdict"], report["seed"], report["operations"]) == ("passed", 11, 2)
    assert [(one["kept"], one["value"] > 0) for one in report["budgets"]] == [(True, True)] * 2
    assert 'failures="0"' in (folder / "junit.xml").read_text()
    assert report["packets"] >= 32 and report["failures"] == [] and report["missing"] == []
    assert (folder / "report.html").read_text().lower().startswith("<!doctype html>")
    assert list((folder / "episodes").iterdir()) == list((folder / "failures").iterdir()) == []


# as booted: the campaign boots its VMs itself
def test_sabotage_is_found_and_the_printed_command_finds_it_again(tmp_path: Path) -> None:
    """A provider loses one packet in a thousand restored ones."""
    folder, again = tmp_path / "night", tmp_path / "again"
    first, second = tmp_path / "first.log", tmp_path / "second.log"

    async def body() -> None:
        assert await status(await soak(folder, first, SABOTAGE), 120) == 1, first.read_text()
        printed = next(line for line in first.read_text().splitlines() if "replay: " in line).partition("replay: ")[2]
        program, *words = shlex.split(printed)
        assert program == "scripts/soak" and words[-2] == "--report"
        assert await status(await soak(again, second, words[:-2]), 120) == 1, second.read_text()

    asyncio.run(body())
    found = []
    for one in (folder, again):
        report = json.loads((one / "report.json").read_bytes())
        (failure,) = report["failures"]
        print(failure["message"])
        assert report["verdict"] == "failed" and "1 lost" in failure["message"]
        kept = one / failure["kept"]
        assert all((kept / name).is_file() for name in ("plan.json", "inspect.json", "guest.json"))
        assert (kept / "snapshot" / "manifest.json").is_file()
        assert (kept / "logs" / "000" / "console.log").stat().st_size > 0
        operation = read(one, OperationRecord)[-1]
        found.append((operation.number, operation.kind, operation.outcome))
    assert found[0] == found[1] and found[0][2] == "failed"
