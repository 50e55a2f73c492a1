"""Workloads and operations of a user's own in a soak: what is taken, what is refused, what a plan has of them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from vmbus.cli import main
from vmbus.cli.new_provider import create
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.soak import entries, remote
from vmbus.soak.books import Session, disagreements
from vmbus.soak.draw import Draw, drawn
from vmbus.soak.entries import function_of
from vmbus.soak.job import Job
from vmbus.soak.operations import operation_of
from vmbus.soak.plan import EpisodePlan, WorkloadPlan, encode_plan, load_plan
from vmbus.soak.replay import replay_command
from vmbus.soak.schedule import check_own, linux_share, plan_episode
from vmbus.soak.settings import Settings, load_settings, read_values, settings_from

SCHEDULE = """
linux = 0
per_episode = 4
weights = { ring = 5, migrate = 1 }
[workloads]
"*" = 0
[[workload]]
name = "bell"
provider = "door_bell:DoorBell"
driver_file = "door_bell_driver.py"
[[operation]]
name = "ring"
call = "bell_operations:ring"
parameters = { times = { between = [1, 3] } }
[[operation]]
name = "look"
guest = ["/bin/true"]
[[operation]]
name = "ask"
provider = "bell"
command = "ask"
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    create("door_bell", tmp_path)
    (tmp_path / "bell_operations.py").write_text("async def ring(stage, parameters): ...\nvalue = 3\n")
    (tmp_path / "night.toml").write_text(SCHEDULE)
    with monkeypatch.context() as patch:
        patch.setattr("sys.path", list(entries.sys.path))
        patch.setattr("sys.modules", dict(entries.sys.modules))
        yield tmp_path


def test_fault_t9_a_schedule_names_a_provider_a_driver_and_operations_of_ones_own(mine: Path) -> None:
    settings = load_settings(mine / "night.toml")
    check_own(settings)
    plans = [plan_episode(settings, 5, index) for index in range(8)]
    assert all([one.driver for one in plan.workloads if one.own] == ["bell"] for plan in plans)
    assert {one.kind for plan in plans for one in plan.operations} >= {"ring", "look", "ask", "migrate"}
    assert {one.parameters["times"] for plan in plans for one in plan.operations if one.kind == "ring"} == {1, 2, 3}
    path = mine / "plan.json"
    for plan in plans:
        assert {one.name for one in plan.own} == {one.kind for one in plan.operations} & {"ring", "look", "ask"}
        assert not plan.packets, "no workload of ours sees to packets in flight"
        path.write_bytes(encode_plan(plan))
        assert load_plan(path) == plan
        assert all(operation_of(plan, one.kind) for one in plan.operations)


def test_the_printed_command_says_them(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(mine / "night.toml")
    printed = replay_command(msgspec.to_builtins(settings), 3, mine / "night")
    monkeypatch.chdir("/")
    done = CliRunner().invoke(main, ["soak", *shlex.split(printed)[1:], "--plan"])
    assert done.exit_code == 0, done.output
    plan = plan_episode(settings, settings.seed, 3)
    assert json.loads(done.output) == json.loads(encode_plan(plan))


def test_a_command_runs_where_linux_has_its_own_drivers(mine: Path) -> None:
    settings = settings_from({"linux": 1, "workload": [{"name": "sum", "command": ["/bin/true"]}]}, "x")
    (one,) = [one for one in plan_episode(settings, 1, 0).workloads if one.own]
    assert (one.runs, one.parameters, one.alone, one.provider) == ("command", {"argv": ["/bin/true"]}, True, "")
    ours = settings_from({"linux": 0, "workload": [{"name": "sum", "command": ["/bin/true"], "linux": False}]}, "x")
    assert "sum" in [one.driver for one in plan_episode(ours, 1, 0).workloads]
    assert linux_share(settings) == 1.0
    debian = {"description": "debian", "workloads": {"*": 0}, "workload": [{"name": "sum", "command": ["/bin/true"]}]}
    assert [one.driver for one in plan_episode(settings_from(debian, "x"), 1, 0).workloads] == ["sum"]
    with pytest.raises(UsageError, match="no workload is left for episode 0, with Linux's own drivers"):
        plan_episode(settings_from({**debian, "workload": []}, "x"), 1, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workload": [{"name": "x"}]}, "has neither: give it one of"),
        ({"workload": [{"name": "x", "driver": "echo", "command": ["a"]}]}, "has driver and command"),
        ({"workload": [{"name": "x", "driver": "fly"}]}, "there is no test driver 'fly'; known: "),
        ({"workload": [{"name": "echo", "driver": "echo"}]}, "two of the name 'echo'"),
        ({"workload": [{"name": "x", "driver": "echo", "provider": "no kind"}]}, "field 'workload\\[0\\].provider'"),
        ({"workload": [{"name": "x", "driver": "echo", "verdict": {"a": "b"}}]}, "and no provider"),
        ({"operation": [{"name": "x"}]}, "give it one of 'call'"),
        ({"operation": [{"name": "x", "command": "ask"}]}, "give it one of 'call'"),
        ({"operation": [{"name": "pause", "guest": ["a"]}]}, "two of the name 'pause'"),
        ({"operation": [{"name": "x", "call": "x.py"}]}, "field 'operation\\[0\\].call'"),
        ({"workloads": {"burst": 0.5}}, "must have the share 1"),
    ],
)
def test_entries_with_errors_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings_from(values, "x")


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"driver_file": "nothing.py"}, EnvironmentProblem, "cannot read driver file .*nothing.py"),
        ({"provider": "no_such_module:X", "driver": "echo"}, UsageError, "there is no module 'no_such_module'"),
        ({"provider": "echo", "driver": "echo", "options": {"hold": -1}}, UsageError, "options of its provider: field"),
        ({"provider": "echo", "driver": "echo", "parameters": {"fly": 1}}, UsageError, "unknown parameter 'fly'"),
        ({"driver": "echo", "parameters": {"window": {"between": [9]}}}, UsageError, "allowed: a value, {between"),
    ],
)
def test_what_an_entry_names_is_looked_at_before_a_vm_is_booted(
    entry: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    values = entries.located({"workload": [{"name": "x", **entry}]}, tmp_path)
    with pytest.raises(error, match=message):
        check_own(settings_from(values, "x"))


def test_the_command_refuses_before_it_begins(mine: Path) -> None:
    (mine / "night.toml").write_text(SCHEDULE.replace("bell_operations:ring", "bell_operations:fly"))
    done = CliRunner().invoke(main, ["soak", "--schedule", str(mine / "night.toml"), "--report", str(mine / "night")])
    assert done.exit_code == 2 and "operation 'bell_operations:fly' cannot be had" in done.output, done.output
    assert not (mine / "night").exists()
    with pytest.raises(UsageError, match="is no function"):
        function_of("bell_operations:value", [str(mine)])


@pytest.mark.parametrize("gone", ["door_bell", "bell_operations"])
def test_a_dask_worker_without_a_module_of_ones_own_refuses(mine: Path, gone: str) -> None:
    settings = settings_from({**read_values(mine / "night.toml"), "per_episode": 12}, "x")
    plan = encode_plan(plan_episode(settings, 5, 0))
    (mine / f"{gone}.py").unlink()
    request = remote.Request(
        job=Job(episode=0, seed=5, plan=plan, command=()),
        keep_bytes=0, topic="", heartbeat="", code=remote.code_digest(),
    )  # fmt: skip
    with pytest.raises(EnvironmentProblem, match=f"'{gone}:.*' of the schedule is not on this machine: .*{mine}"):
        remote.run_request(msgspec.msgpack.encode(request))


def test_values_are_drawn() -> None:
    values = {
        "a": {"between": [1, 3]},
        "b": {"between": [0.5, 1]},
        "c": {"one_of": ["x", "y"]},
        "d": [1],
        "e": {"z": 1},
    }
    found = [drawn(values, Draw(seed)) for seed in range(50)]
    assert {one["a"] for one in found} == {1, 2, 3} and {one["c"] for one in found} == {"x", "y"}
    assert all(0.5 <= one["b"] <= 1 and one["d"] == [1] for one in found)


def test_a_verdict_compares_the_guests_counts_with_the_providers() -> None:
    one = WorkloadPlan(driver="x", provider="p", parameters={}, runs="y", verdict={"completed": "books.served"})
    session = Session({}, {}, marks={"x": {"books.served": 5}})
    status = {"providers": {"p": {"books": {"served": 12}}}}
    assert list(disagreements(session, one, {"completed": 7}, status)) == []
    (text,) = disagreements(session, one, {"completed": 8}, status)
    assert "'completed' of its driver's result is 8, and 'books.served' of its provider's status has risen by 7" in text
    (text,) = disagreements(session, one, {}, status)
    assert "has no count 'completed'" in text


def test_packages_offer_workloads_and_operations_which_run_where_settings_name_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offered = {
        (entries.WORKLOADS, "packed"): EntryPoint("packed", "support.soak_package:WORKLOAD", entries.WORKLOADS),
        (entries.WORKLOADS, "broken"): EntryPoint("broken", "support.soak_package:nothing", entries.WORKLOADS),
        (entries.OPERATIONS, "knock"): EntryPoint("knock", "support.soak_package:knock", entries.OPERATIONS),
    }
    monkeypatch.setattr(entries, "_offered", lambda group, name: offered.get((group, name)))
    assert plan_episode(Settings(linux=0), 1, 0).own == []
    named = {"linux": 0, "workloads": {"packed": 1.0}, "weights": {"knock": 1e6}}
    settings = settings_from(named, "x")
    check_own(settings)
    plan: EpisodePlan = plan_episode(settings, 1, 0)
    assert "packed" in [one.driver for one in plan.workloads]
    assert [one.call for one in plan.own] == ["support.soak_package:knock"]
    for values, message in (
        ({"workloads": {"broken": 1.0}}, "cannot be had"),
        ({"weights": {"fly": 1}}, "no operation"),
    ):
        with pytest.raises(UsageError, match=message):
            settings_from(values, "x")
