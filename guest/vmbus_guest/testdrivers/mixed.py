"""Test driver `mixed`: several workloads side by side over one connection, since a function has one driver process.

Parameters:

    workloads  a list of objects, each with `driver` (a test driver that is a workload, or one of a user's) and that
               one's parameters

The result has their results, in the same order, and one verdict.
"""

from __future__ import annotations

from typing import Any

from vmbus.errors import UsageError
from vmbus_guest.testdrivers import drivers
from vmbus_guest.testdrivers.context import Context, Parameters
from vmbus_guest.testdrivers.workload import Workload, run_workloads


def workload_class(name: str) -> type[Workload]:
    """The class of a workload. Raises UsageError."""
    known = drivers()
    if name not in known:
        raise UsageError(f"no workload '{name}'; there are {', '.join(sorted(known))}")
    kind = known[name].workload()
    if kind is None:
        raise UsageError(f"test driver '{name}' runs alone: it is no workload")
    return kind


def run(context: Context) -> dict[str, Any]:
    """Run them all; done when the last one is."""
    workloads: list[Workload] = []
    names: list[str] = []
    for values in context.parameters.objects("workloads"):
        parameters = Parameters(values)
        name = parameters.get("driver", "")
        workloads.append(workload_class(name)(parameters))
        names.append(name)
        parameters.check()
    context.parameters.check()
    results = run_workloads(context, workloads)
    passed = all(result["verdict"] == "passed" for result in results)
    return {
        "workloads": [{"name": name, **result} for name, result in zip(names, results, strict=True)],
        "verdict": "passed" if passed else "failed",
    }
