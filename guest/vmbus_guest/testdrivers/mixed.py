"""Test driver `mixed`: several workloads side by side over one connection, since a function has one driver process.

Parameter: `workloads`, a list of objects, each with `driver` ("echo", "raw-echo", "burst", "bulk", "remap", or a
service such as "integration") and that one's parameters. Services end with the last test driver. The result has their
results, in the same order, and one verdict.
"""

from __future__ import annotations

from typing import Any

from vmbus.errors import UsageError
from vmbus_guest.services import CATALOGUE
from vmbus_guest.testdrivers.bulk import BulkWorkload
from vmbus_guest.testdrivers.burst import BurstWorkload
from vmbus_guest.testdrivers.context import Context, Parameters
from vmbus_guest.testdrivers.echo import EchoWorkload
from vmbus_guest.testdrivers.raw_echo import RawEchoWorkload
from vmbus_guest.testdrivers.remap import RemapWorkload
from vmbus_guest.testdrivers.workload import Workload, run_workloads

KINDS: dict[str, type[Workload]] = {
    kind.name: kind for kind in (EchoWorkload, RawEchoWorkload, BurstWorkload, BulkWorkload, RemapWorkload)
}


def run(context: Context) -> dict[str, Any]:
    """Run them all; done when the last one is."""
    workloads: list[Workload] = []
    for values in context.parameters.objects("workloads"):
        parameters = Parameters(values)
        name = parameters.get("driver", "")
        kind = KINDS[name] if name in KINDS else CATALOGUE[name].load() if name in CATALOGUE else None
        if kind is None:
            raise UsageError(f"no workload '{name}'; there are {', '.join(sorted({**KINDS, **CATALOGUE}))}")
        workloads.append(kind(parameters))
        parameters.check()
    context.parameters.check()
    results = run_workloads(context, workloads)
    passed = all(result["verdict"] == "passed" for result in results)
    return {
        "workloads": [{"name": workload.name, **result} for workload, result in zip(workloads, results, strict=True)],
        "verdict": "passed" if passed else "failed",
    }
