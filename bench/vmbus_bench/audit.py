"""What audit records cost: the same echo transactions over the rings with and without them.

As in the part `host`: the guest's side in this process, the device server in its own. Two servers run all the time, one
of which records; rounds alternate between them, so that what else the machine does hits both. Figures are CPU time per
transaction (two packets: a request and its completion), of each side; ratios are with a record over without one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vmbus.errors import VmbusError
from vmbus.observe.audit.checker import check_paths
from vmbus.testkit.loopback.function import LoopbackFunction
from vmbus.testkit.loopback.harness import describe
from vmbus_bench.figures import Part, Row, Sample, Target, ratio
from vmbus_bench.processes import ServerProcess, cpu_seconds
from vmbus_guest.testdrivers.context import Context
from vmbus_guest.testdrivers.raw_echo import RawEchoWorkload
from vmbus_guest.testdrivers.workload import run_workload

WINDOW = 256
SIZE = 64
RING_PAGES = 32
_WHY = "a record costs what it always did, and a transaction over the native core a half"
MOST = 1.05
"""The ratio beyond which a record is not cheap enough to be left on."""


def _round(server: ServerProcess, count: int, audit: Path | None) -> tuple[float, float]:
    """Seconds of CPU time per transaction: of the server's process, and of ours."""
    parameters = {
        "count": count,
        "window": WINDOW,
        "size": SIZE,
        "warm_up": 0,
        "ring_pages_in": RING_PAGES,
        "ring_pages_out": RING_PAGES,
    }
    context = Context(parameters, lambda: LoopbackFunction(server.socket_path))
    if audit is not None:
        context.keep_record(str(audit), "bench-0")
    before, own = cpu_seconds(server.pid), time.process_time()
    result = run_workload(context, RawEchoWorkload)
    costs = (cpu_seconds(server.pid) - before) / count, (time.process_time() - own) / count
    context.end_record()
    if result["verdict"] != "passed":
        raise VmbusError(f"the echo transactions of the benchmark went wrong: {result}")
    return costs


def measure(library: Path, *, quick: bool, step: Callable[[str], None]) -> Part:
    """Run this part. `step` is told what is being done."""
    repeats = 10 if quick else 40
    count = 20_000
    description = describe("echo")
    plain: list[tuple[float, float]] = []
    recorded: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(prefix="vmbus-bench-audit-") as directory:
        audit = Path(directory) / "audit"
        with (
            ServerProcess(description, library) as without,
            ServerProcess(description, library, audit=audit) as recording,
        ):
            for server, where in ((without, None), (recording, audit)):
                _round(server, count // 5, where)
            for repeat in range(repeats):
                step(f"audit, round {repeat + 1} of {repeats}")
                if repeat % 2:
                    plain.append(_round(without, count, None))
                    recorded.append(_round(recording, count, audit))
                else:
                    recorded.append(_round(recording, count, audit))
                    plain.append(_round(without, count, None))
            recording.call("audit")
        transactions = repeats * count + count // 5
        size = sum(path.stat().st_size for path in audit.glob("host-*"))
        step("audit, the records are checked")
        start = time.perf_counter()
        report = check_paths([audit])
        checking = time.perf_counter() - start
        if not report.clean or report.transactions != transactions:
            raise VmbusError(f"the audit records of the benchmark are not clean:\n{report}")
    part = Part(
        name="audit",
        title="audit records",
        parameters={"size": SIZE, "count": count, "window": WINDOW, "repeats": repeats},
        baseline="the same transactions without a record",
        rows=[],
        targets=[],
    )
    for name, side in (("server", 0), ("guest's side", 1)):
        mine, theirs = [one[side] for one in recorded], [one[side] for one in plain]
        compared = ratio(mine, theirs)
        part.rows.append(
            Row(
                f"CPU time of a transaction, {name}",
                Sample.of([1e6 * cost for cost in mine], "us"),
                Sample.of([1e6 * cost for cost in theirs], "us"),
                compared,
            )
        )
        part.targets.append(Target.judge(f"cost of an audit record, {name}", compared, "at most", MOST, _WHY))
    part.rows.append(Row("record of the server, per transaction", Sample.of([size / transactions], "bytes")))
    part.rows.append(Row("transactions checked", Sample.of([transactions / checking], "/s"), note="both ends' records"))
    return part
