"""Driver `services`: runs services until it is stopped.

Parameters:

    services  a list of names, or of objects with `service` (a name) and that service's parameters
"""

from __future__ import annotations

from typing import Any

from vmbus.errors import UsageError
from vmbus_guest.services import CATALOGUE
from vmbus_guest.testdrivers.context import Context, Parameters
from vmbus_guest.testdrivers.workload import Workload, run_workloads


def run(context: Context) -> dict[str, Any]:
    """Run them all, over one connection to the device."""
    workloads: list[Workload] = []
    for values in context.parameters.objects("services", "service"):
        parameters = Parameters(values)
        name = parameters.get("service", "")
        if name not in CATALOGUE:
            raise UsageError(f"no service '{name}'; there are {', '.join(sorted(CATALOGUE)) or 'none'}")
        workloads.append(CATALOGUE[name].load()(parameters))
        parameters.check()
    context.parameters.check()
    results = run_workloads(context, workloads)
    return {
        "services": [{"name": workload.name, **result} for workload, result in zip(workloads, results, strict=True)],
        "verdict": "passed" if all(result["verdict"] == "passed" for result in results) else "failed",
    }
