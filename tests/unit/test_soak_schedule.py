"""Schedules of a soak: the same settings are the same plan, every plan can be carried out, errors are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.soak.draw import Draw, seed_of
from vmbus.soak.machines import LOSSY_PROVIDER, MOST_OPTIONAL
from vmbus.soak.operations import OPERATIONS
from vmbus.soak.plan import EpisodePlan, encode_plan, load_plan
from vmbus.soak.schedule import episodes_planned, linux_share, plan_episode
from vmbus.soak.sequence import BLOWS, MOST_ADDED, MOST_CHECKPOINTS, STOCK_OPERATIONS, World
from vmbus.soak.settings import (
    DEFAULT_OPERATIONS,
    DISK_LOSES_A_BLOCK,
    LOSE_ONE_IN_A_THOUSAND,
    WEIGHTS,
    Settings,
    load_settings,
    settings_from,
)
from vmbus.soak.workloads import RECIPES, STOCK_RECIPES
from vmbus.vm.moments import Moment
from vmbus_guest.testdrivers import CATALOGUE
from vmbus_guest.testdrivers.context import Parameters

OPTIONAL = [name for name in RECIPES if not RECIPES[name].sends]

some_settings = st.builds(
    Settings,
    seed=st.integers(0, (1 << 63) - 1),
    operations=st.integers(1, 60),
    per_episode=st.integers(1, 25),
    weights=st.dictionaries(st.sampled_from([kind for kind in WEIGHTS if kind != "migrate"]), st.floats(0, 9)),
    workloads=st.dictionaries(st.sampled_from(OPTIONAL), st.sampled_from([0.0, 0.3, 1.0])),
    linux=st.sampled_from([0.0, 0.5, 1.0]),
    packets=st.integers(1, 512),
    pace=st.integers(1, 1000),
)


def row(chosen: Settings) -> list[EpisodePlan]:
    count = episodes_planned(chosen)
    assert count is not None
    return [plan_episode(chosen, chosen.seed, index) for index in range(count)]


@settings(deadline=None, max_examples=60)
@given(some_settings)
def test_every_plan_can_be_carried_out(chosen: Settings) -> None:
    plans = row(chosen)
    assert sum(len(plan.operations) for plan in plans) == chosen.operations
    for plan in plans:
        providers = {provider.name: provider for provider in plan.vm.device.providers}
        if plan.vm.guest.linux:
            assert chosen.linux
            allowed = STOCK_OPERATIONS
            for workload in plan.workloads:
                assert providers[workload.provider].kind == STOCK_RECIPES[workload.driver].provider
        else:
            assert chosen.linux < 1
            allowed = tuple(WEIGHTS)
        optional = [one for one in plan.workloads if chosen.share(one.driver) < 1]
        assert len(optional) <= MOST_OPTIONAL
        assert plan.vm.guest.linux or "burst" in [one.driver for one in plan.workloads]
        for workload in [] if plan.vm.guest.linux else plan.workloads:
            kind = providers[workload.provider].kind
            assert kind == RECIPES[workload.driver].provider
            assert kind == "lab" or workload.parameters["instance"] == providers[workload.provider].instance
        own = [one.provider for one in plan.workloads if one.provider != "lab"]
        assert len(own) == len(set(own)), "each has a provider for itself"
        world = World()
        for operation in plan.operations:
            assert operation.kind in allowed
            assert operation.kind in OPERATIONS and world.possible(operation.kind) and chosen.weight(operation.kind) > 0
            world.carry_out(operation.kind, operation.parameters)
            assert len(world.checkpoints) <= MOST_CHECKPOINTS and len(world.added) <= MOST_ADDED
            assert 1 <= operation.after <= max(1, chosen.pace)
            if operation.kind == "sabotaged_migration":
                assert Moment[str(operation.parameters["moment"])] in BLOWS[str(operation.parameters["blow"])]


@settings(deadline=None, max_examples=30)
@given(some_settings)
def test_an_episode_is_the_same_again_when_read_and_whatever_their_number(chosen: Settings) -> None:
    plan = plan_episode(chosen, chosen.seed, 0)
    assert msgspec.json.decode(encode_plan(plan), type=EpisodePlan) == plan == plan_episode(chosen, chosen.seed, 0)
    longer = msgspec.structs.replace(chosen, operations=(chosen.operations or 0) + chosen.per_episode)
    timed = msgspec.structs.replace(chosen, operations=None, seconds=10.0)
    whole = plan_episode(longer, chosen.seed, 0)
    assert whole == plan_episode(timed, chosen.seed, 0)
    assert plan.operations == whole.operations[: len(plan.operations)] and plan.workloads == whole.workloads


def test_plans_are_the_same_in_every_process() -> None:
    """As they were when this was written: a seed in somebody's notes goes on meaning the same."""
    plan = plan_episode(Settings(seed=7, weights={"migrate": 4.0}), 7, 3)
    code = (
        "from vmbus.soak.plan import *; from vmbus.soak.schedule import *; from vmbus.soak.settings import *;"
        "import sys;"
        "sys.stdout.buffer.write(encode_plan(plan_episode(Settings(seed=7), 7, 3)))"
    )
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "12345"}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True, timeout=60)
    assert other.stdout == encode_plan(plan)
    assert seed_of(7, 3) == 25400270749326
    draw = Draw(1)
    assert [draw.between(0, 99) for _ in range(5)] == [13, 84, 76, 25, 49]


def test_the_seed_and_the_number_make_a_difference() -> None:
    plans = [encode_plan(plan_episode(Settings(seed=seed), seed, index)) for seed in (1, 2) for index in (0, 1)]
    assert len(set(plans)) == 4


def test_how_many_episodes() -> None:
    assert episodes_planned(Settings()) == -(-DEFAULT_OPERATIONS // Settings().per_episode)
    assert episodes_planned(Settings(operations=25, per_episode=10)) == 3
    assert episodes_planned(Settings(seconds=60.0)) is None
    assert len(plan_episode(Settings(operations=25, per_episode=10), 1, 2).operations) == 5
    with pytest.raises(UsageError, match="episode 3 is none of this campaign: it has 3"):
        plan_episode(Settings(operations=25, per_episode=10), 1, 3)


def test_recipes_fit_their_drivers() -> None:
    """Each driver takes the parameters, and knows no other."""
    for name, recipe in RECIPES.items():
        kind = CATALOGUE[name].workload()
        assert kind is not None, name
        for number in range(20):
            parameters = Parameters(recipe.parameters(Draw(number), 64))
            kind(parameters)
            parameters.check()


def test_the_sabotage_takes_the_burst_providers_place_only() -> None:
    plan = plan_episode(Settings(sabotage=LOSE_ONE_IN_A_THOUSAND), 1, 0)
    assert [one.kind for one in plan.vm.device.providers if one.kind == LOSSY_PROVIDER]
    honest = plan_episode(Settings(), 1, 0)
    assert plan.operations == honest.operations and plan.workloads == honest.workloads
    assert not [one.kind for one in honest.vm.device.providers if ":" in one.kind]


def test_which_driver_an_episode_has_leaves_the_other_episodes_as_they_were() -> None:
    """Old seeds mean what they meant, but for the episodes that now have Linux's own drivers."""
    with_linux, without = Settings(seed=7, seconds=1.0), Settings(seed=7, seconds=1.0, linux=0.0)
    both = [(plan_episode(with_linux, 7, index), plan_episode(without, 7, index)) for index in range(200)]
    stock = [plan for plan, _ in both if plan.vm.guest.linux]
    assert [index for index, (plan, _) in enumerate(both[:16]) if plan.vm.guest.linux] == [4, 5, 7, 11]
    assert 30 < len(stock) < 70
    assert {plan.vm.cpus for plan in stock} == {1, 2, 4}
    assert all([one.driver for one in plan.workloads] == list(STOCK_RECIPES) for plan in stock)
    assert all(plan == old for plan, old in both if not plan.vm.guest.linux)
    assert all(plan.audit for plan in stock)


def test_a_script_and_weights_decide_what_linux_can_do() -> None:
    def plan(**values: Any) -> EpisodePlan:
        return plan_episode(settings_from({"linux": 1.0, **values}, "x"), 1, 0)

    assert plan(script=[{"kind": "checkpoint"}, {"kind": "migrate"}]).vm.guest.linux
    weights = dict.fromkeys(WEIGHTS, 0.0)
    assert plan(weights=weights | {"kill": 1.0}).vm.guest.linux
    assert not plan(weights=weights | {"driver_kill": 1.0}).vm.guest.linux
    assert plan_episode(Settings(sabotage=DISK_LOSES_A_BLOCK, linux=0.0), 1, 0).vm.guest.linux
    assert not plan_episode(Settings(sabotage=LOSE_ONE_IN_A_THOUSAND, linux=1.0), 1, 0).vm.guest.linux
    ours = plan(description="linux", linux=0.0)
    assert ours.vm.guest.linux and ours.workloads[1].provider == "storage"
    assert linux_share(Settings()) == 0.25 and linux_share(Settings(description="linux")) == 1.0
    assert linux_share(settings_from({"script": [{"kind": "driver_kill"}]}, "x")) == 0.0
    with pytest.raises(UsageError, match="not all of the script's"):
        plan(description="linux", script=[{"kind": "driver_kill"}])
    with pytest.raises(UsageError, match="or 'linux' be 0"):
        plan(workloads=dict.fromkeys(STOCK_RECIPES, 0.0))


def test_a_description_of_ones_own_keeps_its_providers() -> None:
    plan = plan_episode(Settings(description="network"), 1, 0)
    assert "integration" in [one.kind for one in plan.vm.device.providers]
    with pytest.raises(EnvironmentProblem, match="no VM description 'nothing'"):
        plan_episode(Settings(description="nothing"), 1, 0)


def test_a_script_is_carried_out_as_it_is() -> None:
    script: list[dict[str, Any]] = [
        {"kind": "checkpoint", "parameters": {"tag": "here"}},
        {"kind": "hot_add", "parameters": {"name": "new"}},
        {"kind": "revert", "parameters": {"tag": "here"}},
        {"kind": "migrate", "parameters": {"transport": "tcp"}},
    ]
    plan = plan_episode(settings_from({"script": script}, "x"), 1, 5)
    assert [one.kind for one in plan.operations] == [step["kind"] for step in script]
    assert plan.operations[3].parameters["transport"] == "tcp" and "multifd" in plan.operations[3].parameters


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"kind": "revert"}, "operation 0 .revert.: there is no checkpoint"),
        ({"kind": "rescind", "parameters": {"name": "x"}}, "no provider 'x' was added"),
        ({"kind": "kill", "parameters": {"snapshot": "last"}}, "no snapshot yet"),
        ({"kind": "kill", "parameters": {"victim": "me"}}, "'victim' is 'me'; allowed: server, qemu"),
        ({"kind": "pause", "parameters": {"second": 1}}, "no parameter 'second'; known: seconds"),
        ({"kind": "pause", "parameters": {"seconds": "1"}}, "'seconds' is of type float"),
        ({"kind": "pause", "parameters": {"seconds": 1e9}}, "must be from 0 to 60"),
        ({"kind": "migrate", "parameters": {"multifd": 99}}, "from 0 to 16"),
        ({"kind": "sabotaged_migration", "parameters": {"blow": "link", "moment": "LOADING"}}, "allowed: RAM_COPY"),
        ({"kind": "cancelled_migration", "parameters": {"moment": "NEVER"}}, "'moment' is 'NEVER'"),
    ],
)
def test_a_script_that_cannot_be_carried_out_is_refused(step: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_episode(settings_from({"script": [step]}, "x"), 1, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("operations = 0", "schedule.toml: field 'operations'"),
        ("operations = 3\nseconds = 4", "both given"),
        ("weight = 3", "weight"),
        ("[weights]\nsave = 1", "no operation 'save'; known: save_restore, "),
        ("[workloads]\nnothing = 1", "no workload 'nothing'; known: .*burst"),
        ("[workloads]\nburst = 0.5", "must have the share 1"),
        ("[[script]]\nkind = 'jump'", "no operation 'jump'"),
        ("operations =", "not TOML"),
        ("sabotage = 'everything'", "sabotage"),
    ],
)
def test_a_schedule_file_with_errors(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "schedule.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_settings(path)


def test_a_schedule_file(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text("seed = 4\noperations = 9\n[weights]\nclone = 0\n[[script]]\nkind = 'pause'\n")
    found = load_settings(path)
    assert (found.seed, found.total, found.length, found.weight("clone")) == (4, 9, 1, 0)
    other = tmp_path / "s.json"
    other.write_bytes(msgspec.json.encode(found))
    assert load_settings(other) == found
    with pytest.raises(EnvironmentProblem, match="cannot read"):
        load_settings(tmp_path / "nothing.toml")
    other.write_text("[1]")
    with pytest.raises(UsageError, match=r"s\.json"):
        load_settings(other)
    other.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not JSON"):
        load_settings(other)


def test_all_weights_zero_are_refused() -> None:
    with pytest.raises(UsageError, match="no operation is left"):
        settings_from({"weights": dict.fromkeys(WEIGHTS, 0)}, "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("{}", "format None"),
        ('{"format": 99}', "format 99; this version has format 1"),
        ("[]", "format"),
    ],
)
def test_a_plan_with_errors(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_plan(path)
    good = json.loads(encode_plan(plan_episode(Settings(), 1, 0)))
    path.write_text(json.dumps({**good, "episode": "one"}))
    with pytest.raises(UsageError, match="field 'episode'"):
        load_plan(path)
    with pytest.raises(EnvironmentProblem, match="cannot read plan"):
        load_plan(tmp_path / "nothing")
