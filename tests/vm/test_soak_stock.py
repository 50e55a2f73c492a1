"""Episodes of a soak over Linux's own drivers: a disk, sockets, a card and heartbeats, and a disk that forgets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.pace import seconds
from vmbus.cli.new_provider import create
from vmbus.soak.episode import run_episode, scratch_base
from vmbus.soak.outside import why_not
from vmbus.soak.plan import EpisodePlan
from vmbus.soak.records import EpisodeRecord, EventRecord, OperationRecord
from vmbus.soak.schedule import plan_episode
from vmbus.soak.settings import DISK_LOSES_A_BLOCK, settings_from
from vmbus.soak.sink import NoSink
from vmbus.vm.command_line import Programs
from vmbus.vm.description import with_options

pytestmark = [
    *(pytest.mark.vm, pytest.mark.long, pytest.mark.timeout(330)),
    pytest.mark.usefixtures("own_temporary_files"),
]

Run = Callable[..., Any]
Note = Callable[[str], None]


class Recording(NoSink):
    def __init__(self) -> None:
        self.operations: list[OperationRecord] = []
        self.events: list[str] = []

    def operation(self, record: OperationRecord) -> None:
        self.operations.append(record)

    def event(self, record: EventRecord) -> None:
        self.events.append(record.text)


def planned(*operations: tuple[str, dict[str, Any]], **values: Any) -> EpisodePlan:
    script = [{"kind": kind, "parameters": parameters} for kind, parameters in operations]
    bounds = {"operation_seconds": seconds(120.0), "finish_seconds": seconds(60.0)}
    return plan_episode(settings_from({"linux": 1.0, "pace": 240, "script": script, **bounds, **values}, "test"), 1, 0)


def carried_out(
    run: Run, programs: Programs, plan: EpisodePlan, folder: Path, cpus: int = 2
) -> tuple[EpisodeRecord, Recording]:
    plan = msgspec.structs.replace(plan, vm=msgspec.structs.replace(plan.vm, cpus=cpus))
    folder.mkdir(mode=0o700)
    sink = Recording()
    record: EpisodeRecord = run(run_episode(plan, folder, sink, programs=programs), timeout=300.0)
    print(sink.events, record.failure)
    print([(one.kind, one.at, one.seconds, one.downtime) for one in sink.operations])
    assert not list(scratch_base().iterdir())
    return record, sink


SAVE, LIVE = ("save_restore", {}), ("save_restore_live", {})
CHECKPOINT, REVERT = ("checkpoint", {"tag": "then"}), ("revert", {"tag": "then"})
MIGRATE = ("migrate", {"transport": "tcp", "multifd": 0})
CLONE = ("clone", {"live": True})
KILL = ("kill", {"victim": "server", "snapshot": "last"})


@pytest.mark.parametrize(
    ("cpus", "operations"),
    [
        (1, (SAVE, MIGRATE, CHECKPOINT, REVERT, KILL)),
        (4, (CHECKPOINT, REVERT, MIGRATE, LIVE, CLONE)),
    ],
    ids=["1 CPU", "4 CPUs"],
)
def test_linux_guest_with_disk_card_and_sockets_under_load(
    run: Run, programs: Programs, tmp_path: Path, note: Note, cpus: int, operations: Any
) -> None:
    """One machine, all of Linux's drivers at work, and all that is done to it. The disk's writer reads again what it
    wrote, and has the file system checked; every frame over the card and the sockets is checked at both ends, and those
    of the card never end but where the VM goes back in time; the guest's kernel has nothing to complain of; and the
    auditor finds each packet completed once. Beside them, what `new-provider` makes, over UIO, and a command."""
    create("door_bell", tmp_path)
    bell = {"provider": "door_bell:DoorBell", "driver_file": str(tmp_path / "door_bell_driver.py"), "linux": True}
    bell |= {"parameters": {"count": 0}, "verdict": {"completed": "served"}}
    own = [{"name": "bell", **bell}, {"name": "sum", "command": ["/bin/md5sum", "/init"]}]
    plan = planned(*operations, workload=own, path=[str(tmp_path)])
    card = next(one for one in plan.workloads if one.driver == "card")
    vm = with_options(plan.vm, {card.provider: {"queues": 4}})
    record, sink = carried_out(run, programs, msgspec.structs.replace(plan, vm=vm), tmp_path / "episode", cpus)
    assert record.verdict == "passed", record.failure
    assert [one.outcome for one in sink.operations] == ["done"] * len(operations)
    stock = ["heartbeat", "disk", "vsock"] + ["card"] * (not why_not())
    assert [one.driver for one in record.workloads] == [*stock, "bell", "sum"]
    assert all(one.verdict == "passed" and one.transactions > 0 for one in record.workloads)
    left_out = [text for text in sink.events if text.startswith("the workload card is left out: ")]
    assert len(left_out) == bool(why_not())
    assert record.audit == "clean"
    done = ", ".join(f"{one.transactions} {one.driver}" for one in record.workloads)
    note(f"Linux's drivers together, {cpus} CPUs, {len(operations)} operations: {done} in {record.seconds:.0f} s")


def test_soak_sabotage_a_disk_that_forgets_a_write_is_noticed(run: Run, programs: Programs, tmp_path: Path) -> None:
    plan = planned(SAVE, *[("pause", {})] * 3, sabotage=DISK_LOSES_A_BLOCK)
    record, _ = carried_out(run, programs, plan, tmp_path / "sabotage")
    assert record.verdict == "failed"
    assert "workload disk" in record.failure, record.failure
    assert (tmp_path / "sabotage" / "guest.json").exists()
