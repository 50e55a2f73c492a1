"""Episodes of a soak over Linux's own drivers: a disk, sockets, a card and heartbeats, and a disk that forgets."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from vmbus.qemu.command_line import Programs
from vmbus.soak.episode import run_episode, scratch_base
from vmbus.soak.outside import why_not
from vmbus.soak.records import EpisodeRecord, EventRecord, OperationRecord
from vmbus.soak.schedule import plan_episode
from vmbus.soak.settings import DISK_LOSES_A_BLOCK, settings_from
from vmbus.soak.sink import NoSink

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("own_temporary_files")]

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Note = Callable[[str], None]


class Recording(NoSink):
    def __init__(self) -> None:
        self.operations: list[OperationRecord] = []
        self.events: list[str] = []

    def operation(self, record: OperationRecord) -> None:
        self.operations.append(record)

    def event(self, record: EventRecord) -> None:
        self.events.append(record.text)


def episode(run: Run, programs: Programs, folder: Path, *kinds: str, **values: Any) -> tuple[EpisodeRecord, Recording]:
    chosen = settings_from({"linux": 1.0, "pace": 240, "script": [{"kind": kind} for kind in kinds], **values}, "test")
    folder.mkdir(mode=0o700)
    sink = Recording()
    record: EpisodeRecord = run(run_episode(plan_episode(chosen, 1, 0), folder, sink, programs=programs))
    print(sink.events, record.failure)
    assert not list(scratch_base().iterdir())
    return record, sink


def test_soak_with_linux_drivers(run: Run, programs: Programs, tmp_path: Path, note: Note) -> None:
    told = []
    for name, kinds in (("forth", ("migrate", "save_restore_live")), ("back", ("checkpoint", "revert", "clone"))):
        record, sink = episode(run, programs, tmp_path / name, *kinds)
        assert record.verdict == "passed", record.failure
        assert [one.outcome for one in sink.operations] == ["done"] * len(kinds)
        wanted = ["heartbeat", "disk", "vsock"] + (["card"] if name == "forth" and not why_not() else [])
        assert [one.driver for one in record.workloads] == wanted
        assert all(one.verdict == "passed" and one.transactions > 0 for one in record.workloads)
        left_out = [text for text in sink.events if text.startswith("the workload card is left out: ")]
        assert len(left_out) == (name == "forth" and bool(why_not()))
        done = ", ".join(f"{one.transactions} {one.driver}" for one in record.workloads)
        told.append(f"{' and '.join(kinds)}: {done} in {record.seconds:.0f} s")
    note(f"soak over Linux's drivers: {'; '.join(told)}")


def test_soak_sabotage_a_disk_that_forgets_a_write_is_noticed(run: Run, programs: Programs, tmp_path: Path) -> None:
    record, _ = episode(
        run, programs, tmp_path / "sabotage", "save_restore", "pause", "pause", "pause", sabotage=DISK_LOSES_A_BLOCK
    )
    assert record.verdict == "failed"
    assert "workload disk" in record.failure, record.failure
    assert (tmp_path / "sabotage" / "guest.json").exists()
