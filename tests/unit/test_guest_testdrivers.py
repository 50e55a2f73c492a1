"""The frame around test drivers: catalogue, parameters, the runner's report and exit status."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from vmbus.errors import UsageError
from vmbus_guest.channel_driver import LONGEST_TURN, SteadyClock
from vmbus_guest.pci import PciFunction
from vmbus_guest.testdrivers import CATALOGUE
from vmbus_guest.testdrivers.context import Context, Parameters
from vmbus_guest.testdrivers.echo import EchoWorkload


def no_function() -> PciFunction:
    raise AssertionError("the function was opened before the parameters were checked")


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_every_driver_of_the_catalogue_loads_and_refuses_unknown_parameters(name: str) -> None:
    values: dict[str, Any] = {"typing_error": 1}
    if name == "mixed":
        values = {"workloads": [{"driver": "echo", "typing_error": 1}]}
    elif name == "command":
        values["argv"] = ["true"]
    with pytest.raises(UsageError, match="typing_error"):
        CATALOGUE[name].load()(Context(values, no_function))


def test_parameters_are_checked() -> None:
    parameters = Parameters({"count": 3, "share": 1, "name": "x", "on": True, "nan": float("nan")})
    assert parameters.get("count", 10) == 3
    assert parameters.get("share", 0.5) == 1.0
    assert parameters.get("missing", 7) == 7
    for name, default in (("name", 1), ("on", 1), ("count", "text"), ("count", True)):
        with pytest.raises(UsageError, match=f"parameter '{name}' must be of type"):
            parameters.get(name, default)
    with pytest.raises(UsageError, match="from 0 to 2"):
        parameters.get("count", 1, minimum=0, maximum=2)
    with pytest.raises(UsageError, match="at least 4"):
        parameters.get("count", 1, minimum=4)
    with pytest.raises(UsageError, match="nan"):
        parameters.get("nan", 0.0, minimum=0, maximum=1)
    with pytest.raises(UsageError, match="list of objects"):
        parameters.objects("count")
    parameters.check()
    with pytest.raises(UsageError, match="unknown parameter 'other'; known: count"):
        wrong = Parameters({"count": 1, "other": 2})
        wrong.get("count", 0)
        wrong.check()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"instance": "not one"}, "not a UUID"),
        ({"size": 10, "minimum_size": 11}, "larger than"),
        ({"window": 0}, "window"),
        ({"external": 1.5}, "external"),
        ({"size": 1 << 20}, "size"),
    ],
)
def test_echo_refuses_impossible_parameters(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EchoWorkload(Parameters(values))


def test_mixed_names_the_workloads_there_are() -> None:
    with pytest.raises(UsageError, match=r"no workload 'nothing'; there are .*bulk.*burst.*echo.*raw-echo.*remap"):
        CATALOGUE["mixed"].load()(Context({"workloads": [{"driver": "nothing"}]}, no_function))
    with pytest.raises(UsageError, match="test driver 'function' runs alone"):
        CATALOGUE["mixed"].load()(Context({"workloads": [{"driver": "function"}]}, no_function))


def test_progress_goes_out_as_json_lines_and_not_too_often() -> None:
    output = io.StringIO()
    context = Context({}, no_function, output)
    assert context.progress_due
    context.progress(sent=5)
    assert not context.progress_due
    assert json.loads(output.getvalue()) == {"event": "progress", "sent": 5}


def runner(*arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "vmbus_guest.testdrivers", *arguments],
        env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path.endswith(("device", "guest")))},
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_the_runner_says_how_it_is_used() -> None:
    status, lines, errors = runner()
    assert (status, lines) == (2, [])
    assert all(name in errors for name in CATALOGUE)
    assert runner("nothing")[0] == 2
    assert runner("echo", "--parameter", "{}")[0] == 2


@pytest.mark.parametrize(
    ("parameters", "kind", "message"),
    [
        ("{", "UsageError", "not JSON"),
        ("[]", "UsageError", "not a JSON object"),
        ('{"cuont": 1}', "UsageError", "unknown parameter 'cuont'"),
        # The standard library alone must do: site-packages are out of reach with -S.
        ('{"vendor": 1, "device": 2}', "EnvironmentProblem", "no PCI function 0001:0002"),
    ],
)
def test_the_runner_reports_errors(parameters: str, kind: str, message: str) -> None:
    status, lines, _ = runner("function", "--parameters", parameters)
    assert status == 1
    assert [line["event"] for line in lines] == ["error"]
    assert lines[0]["kind"] == kind
    assert message in lines[0]["message"]


def test_a_jump_of_the_clock_is_no_time_that_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = SteadyClock()
    now[0] += 1.0
    assert clock.elapsed() == 1.0
    now[0] += 1000.0
    assert clock.elapsed() == 1.0 + LONGEST_TURN
    now[0] += 0.5
    assert clock.elapsed() == 1.5 + LONGEST_TURN
    workload = EchoWorkload(Parameters({}))
    workload.moved_at = workload.started_at = 100.0
    workload.clock_jumped(50.0)
    assert (workload.moved_at, workload.started_at) == (150.0, 150.0)
