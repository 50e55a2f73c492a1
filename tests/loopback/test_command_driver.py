"""The test driver `command`: each run has to end with status 0, and in time."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from vmbus.errors import UsageError
from vmbus_guest.testdrivers import CATALOGUE
from vmbus_guest.testdrivers.context import Context


def run(*argv: str, **parameters: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    output = io.StringIO()
    context = Context({"argv": list(argv), "count": 3, **parameters}, None, output)  # type: ignore[arg-type]
    result = CATALOGUE["command"].load()(context)
    return result, [json.loads(line) for line in output.getvalue().splitlines()]


def test_runs_that_end_well_are_counted() -> None:
    result, reports = run("/bin/true")
    assert (result["verdict"], result["completed"], result["trouble"]) == ("passed", 3, [])
    assert reports[0]["completed"] <= 1, "it tells how far it is"


@pytest.mark.parametrize(
    ("script", "trouble"),
    [
        ("echo broken >&2; exit 3", "run 0: /bin/sh ended with 3: broken"),
        ("kill -9 $$", "run 0: /bin/sh ended with -9"),
        ("sleep 100 & sleep 100", "run 0: /bin/sh has not ended in 0.5 s"),
    ],
)
def test_a_run_that_does_not_is_a_failure(script: str, trouble: str) -> None:
    result, _ = run("/bin/sh", "-c", script, run_seconds=0.5)
    assert result["verdict"] == "failed" and trouble in result["trouble"][0]


def test_what_cannot_be_run_is_said() -> None:
    with pytest.raises(UsageError, match="cannot start '/bin/no-such-program': No such file"):
        run("/bin/no-such-program")
    with pytest.raises(UsageError, match="'argv' must be a list of texts"):
        run()
