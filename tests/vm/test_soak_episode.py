"""Episodes of a soak: every operation under load, a device of an author's own, and what happens when things die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from support import pace
from support.processes import children
from vmbus.cli.new_provider import create
from vmbus.soak.episode import run_episode, scratch_base
from vmbus.soak.job import WORKER
from vmbus.soak.plan import EpisodePlan, encode_plan
from vmbus.soak.records import EpisodeRecord, EventRecord, OperationRecord
from vmbus.soak.schedule import plan_episode
from vmbus.soak.settings import WEIGHTS, load_settings, settings_from
from vmbus.soak.sink import NoSink
from vmbus.vm.command_line import Programs

pytestmark = [pytest.mark.vm, pytest.mark.long, pytest.mark.usefixtures("own_temporary_files")]

Run = Callable[[Coroutine[Any, Any, Any]], Any]

EVERYTHING: list[dict[str, Any]] = [
    {"kind": "checkpoint"},
    {"kind": "hot_add"},
    {"kind": "migrate", "parameters": {"transport": "tcp", "multifd": 2}},
    {"kind": "save_restore_live"},
    {"kind": "rescind"},
    {"kind": "pause", "parameters": {"seconds": 0.2}},
    {"kind": "cancelled_migration", "parameters": {"moment": "WRITING"}},
    {"kind": "sabotaged_migration", "parameters": {"blow": "destination_server", "moment": "PACKET_RESTORE"}},
    {"kind": "sabotaged_migration", "parameters": {"blow": "link", "moment": "RAM_COPY"}},
    {"kind": "far_migration", "parameters": {"rate": 60.0, "latency": 0.001, "loss": 0.0, "cut": ""}},
    {"kind": "far_migration", "parameters": {"rate": 60.0, "latency": 0.001, "loss": 0.0, "cut": "WRITING"}},
    {"kind": "full_disk", "parameters": {"live": True}},
    {"kind": "kill", "parameters": {"victim": "qemu", "snapshot": "last"}},
    {"kind": "driver_kill"},
    {"kind": "clone"},
    {"kind": "revert"},
    {"kind": "save_restore"},
]
REFUSED = {"cancelled_migration", "sabotaged_migration", "full_disk"}


class Recording(NoSink):
    """Keeps the operations and events; `on_phase` is called at the beginning of each phase."""

    def __init__(self, on_phase: Callable[[str], None] = lambda _: None) -> None:
        self.operations: list[OperationRecord] = []
        self.events: list[str] = []
        self._on_phase = on_phase

    def operation(self, record: OperationRecord) -> None:
        self.operations.append(record)

    def event(self, record: EventRecord) -> None:
        self.events.append(record.text)

    def phase(self, text: str) -> None:
        print(text)
        self._on_phase(text)


def plan(**values: Any) -> EpisodePlan:
    optional = dict.fromkeys(("bulk", "remap", "many", "churn", "gpadl", "hotplug", "ring-full"), 0.0)
    optional |= dict.fromkeys(("tiny-rings", "maximum", "pipe", "sync", "storm", "idle"), 0.0)
    chosen = settings_from({"linux": 0.0, **values, "workloads": {**optional, **values.get("workloads", {})}}, "test")
    return plan_episode(chosen, chosen.seed, 0)


def scratch_left() -> list[str]:
    return [path.name for path in scratch_base().iterdir()]


def test_every_operation_under_load(run: Run, programs: Programs, tmp_path: Path) -> None:
    assert {step["kind"] for step in EVERYTHING} == set(WEIGHTS)
    sink = Recording()
    chosen = plan(script=EVERYTHING, pace=100, workloads={"pipe": 1.0})
    record: EpisodeRecord = run(run_episode(chosen, tmp_path, sink, programs=programs))
    for operation in sink.operations:
        print(operation.kind, operation.outcome, operation.seconds, operation.downtime, operation.packets)
    assert record.verdict == "passed" and not record.failure, record.failure
    assert record.operations == len(EVERYTHING) == len(sink.operations)
    assert record.audit == "clean", "the revert has undone the driver's death"
    assert [one.driver for one in record.workloads] == ["echo", "burst", "pipe"]
    # An ordinary user may have no hosts with a link between them that could be cut; then it is said.
    near = [event for event in sink.events if event.startswith("migrated without hosts")]
    assert not near or os.geteuid() != 0, near
    for operation in sink.operations:
        refused = operation.kind in REFUSED or (operation.parameters.get("cut") and not near)
        assert operation.outcome == ("refused" if refused else "done"), operation
        if operation.kind != "driver_kill":
            assert min(operation.packets["queued"], operation.packets["sent"]) >= chosen.packets, operation
    for workload in record.workloads:
        assert workload.verdict == "passed" and workload.transactions > 0
    assert any(sample.in_flight["queued"] for sample in record.samples)
    assert not scratch_left()


def test_fault_t9_an_authors_own_provider_and_driver_are_soaked_with_operations_of_his_own(
    run: Run, programs: Programs, tmp_path: Path
) -> None:
    """What `new-provider` makes, alone in its VM but for a program of the guest's, through live migrations and all that
    replaces processes. After the last of them the provider counts a request too many: the verdict says so."""
    create("door_bell", tmp_path)
    (tmp_path / "own_operations.py").write_text(CHEAT)
    with (tmp_path / "door_bell.py").open("a") as module:
        module.write(COMMAND)
    (tmp_path / "night.toml").write_text(OWN)
    chosen = plan_episode(load_settings(tmp_path / "night.toml"), 1, 0)
    folder = tmp_path / "episode"
    folder.mkdir(mode=0o700)
    sink = Recording()
    record: EpisodeRecord = run(run_episode(chosen, folder, sink, programs=programs))
    for operation in sink.operations:
        print(operation.kind, operation.outcome, operation.seconds, operation.downtime, operation.packets)
    assert [one.outcome for one in sink.operations] == ["done"] * 7, record.failure
    assert record.verdict == "failed" and record.audit == "clean"
    assert "'served' of its provider's status has risen by" in record.failure, record.failure
    assert "workload sum" not in record.failure
    assert {one.driver: one.verdict for one in record.workloads} == {"bell": "passed", "sum": "passed"}
    assert all(one.transactions > 0 for one in record.workloads) and record.workloads[0].transactions > 500
    assert not scratch_left()


COMMAND = """
    def command(self, name, arguments):
        self.served += 1
        return {}
"""
CHEAT = """
from vmbus.soak.figures import Figures

async def cheat(stage, parameters):
    await stage.command("bell", "cheat")
    return Figures()
"""
OWN = """
linux = 0
pace = 200
workloads = { "*" = 0 }
script = [
    { kind = "migrate" }, { kind = "save_restore_live" }, { kind = "checkpoint" }, { kind = "migrate" },
    { kind = "revert" }, { kind = "look" }, { kind = "cheat" },
]
[[workload]]
name = "bell"
provider = "door_bell:DoorBell"
driver_file = "door_bell_driver.py"
parameters = { count = 0, window = { between = [8, 16] } }
verdict = { completed = "served" }
[[workload]]
name = "sum"
command = ["/bin/sh", "-c", "md5sum /init"]
linux = false
[[operation]]
name = "look"
guest = ["/bin/ls", "/run/vmbus-drivers"]
[[operation]]
name = "cheat"
call = "own_operations:cheat"
"""


def test_a_vm_that_dies_by_itself_is_a_failure_that_says_so(run: Run, programs: Programs, tmp_path: Path) -> None:
    def strike(text: str) -> None:
        if "operation 1" in text:
            for pid, command in children().items():
                if "-chardev" in command:
                    os.kill(pid, signal.SIGKILL)

    sink = Recording(strike)
    chosen = plan(script=[{"kind": "pause", "parameters": {"seconds": 0.1}}, {"kind": "migrate"}], pace=50)
    record: EpisodeRecord = run(run_episode(chosen, tmp_path, sink, programs=programs))
    print(record.failure)
    assert record.verdict == "failed" and record.operations == 1
    assert "operation 1, migrate" in record.failure and "was killed by SIGKILL" in record.failure
    assert (tmp_path / "logs" / "000" / "server.log").exists()
    assert not scratch_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_that_is_told_to_end_or_killed(number: signal.Signals, tmp_path: Path) -> None:
    chosen = plan(script=[{"kind": "pause", "parameters": {"seconds": 1.0}}] * 30, pace=50, audit=False)
    (tmp_path / "plan.json").write_bytes(encode_plan(chosen))
    worker = subprocess.Popen([*WORKER, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    lines: list[dict[str, Any]] = []
    try:
        assert worker.stdout is not None
        for line in worker.stdout:
            lines.append(json.loads(line))
            if lines[-1]["kind"] == "phase" and "operation 1" in lines[-1]["record"]:
                worker.send_signal(number)
        status = worker.wait(pace.seconds(60))
    finally:
        with contextlib.suppress(ProcessLookupError):
            worker.kill()
        worker.wait()
    kinds = {line["kind"] for line in lines}
    assert {"phase", "event", "sample", "operation"} <= kinds
    if number == signal.SIGTERM:
        assert status == 0 and lines[-1]["kind"] == "episode"
        record = lines[-1]["record"]
        assert record["verdict"] == "interrupted" and 1 <= record["operations"] < 30 and "failure" not in record
        assert not scratch_left()
    else:
        assert status == -signal.SIGKILL and "episode" not in kinds
        deadline = time.monotonic() + pace.seconds(20)
        while left := [
            command for command in children().values() if "vmbus.cli.serve" in command or "-chardev" in command
        ]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


def test_the_worker_says_what_is_wrong_with_its_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"format": 99}')
    done = subprocess.run([*WORKER, str(tmp_path)], capture_output=True, text=True, timeout=pace.seconds(60))
    assert done.returncode == 1 and not done.stdout and "a plan of format 99" in done.stderr
