"""Host-only transactions: guest side in this process, device server in its own, joined by libvfio-user's real socket
and by rings in shared memory. No virtual machine.

A transaction is an echo of 64 bytes inline: request packet, checksum, transform, completion packet, each way over a
ring. The baseline is what Python can do at all between two processes with messages of that size: an echo over a
SOCK_SEQPACKET socket with 64 messages in flight (for round trips: one).

Servers run all the time, over the native core and over its pure twin, and take their turns; of each kind one with the
echo provider, and one whose provider gives requests back as they came (`answering`). That one costs what KMCL, rings
and transport cost, and does what the socket's echo does; the difference between the two is the echo provider's own
Python: unpacking, two checksums, a transform, packing.

The server has one thread, so its share of one core is what limits it. `server` figures are transactions per second of
its CPU time; `wall` figures also wait for the guest's side, which is Python on another core. The last row has both
sides in one process, under one interpreter lock: all work of both ends on one core.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vmbus.errors import VmbusError
from vmbus.native import SETTING
from vmbus.testkit.loopback.function import LoopbackFunction
from vmbus.testkit.loopback.harness import LoopbackServer
from vmbus.transport.library import find_and_load
from vmbus_bench import answering
from vmbus_bench.figures import Part, Row, Sample, Target, ratio
from vmbus_bench.processes import ServerProcess, cpu_seconds, describe_own, spawn
from vmbus_guest.testdrivers.context import Context
from vmbus_guest.testdrivers.raw_echo import RawEchoWorkload
from vmbus_guest.testdrivers.workload import run_workload

SIZE = 64
RING_PAGES = 32
WINDOW = 256
"""That of the comparisons."""
TARGET = 200_000.0
TIMES_PURE = 3.0
"""How many times less CPU time an echo is to take than over the pure twin."""
TIMES_SOCKET = 3.0
"""How many times as many are to be done in a second of CPU time as with the socket's echo."""
_ITS_OWN = (
    "what the echo provider does itself (two checksums, a transform, struct) is Python over both cores, and now more "
    "than half of an echo; see the row without it"
)
_SHARED = (
    "doorbells, turns and the provider's callback are Python over both cores, and weigh the more the fewer packets a "
    "doorbell brings"
)
_TIMEOUT = 30.0

_ECHO_CHILD = """
import socket, sys
peer = socket.socket(fileno=int(sys.argv[1]))
while data := peer.recv(4096):
    peer.send(data)
"""


class _SocketEcho:
    """The baseline: a child process that echoes messages. A context manager."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._child = spawn(
                [sys.executable, "-I", "-S", "-c", _ECHO_CHILD, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._socket.settimeout(_TIMEOUT)

    def measure(self, count: int, window: int) -> tuple[float, float]:
        """(echoes per second, seconds of the child's CPU time per echo).

        A window of more than the socket's queue holds would block both ends for good: keep it at 64 or less.
        """
        peer, data = self._socket, bytes(SIZE)
        for _ in range(100):
            peer.send(data)
            peer.recv(4096)
        before = cpu_seconds(self._child.pid)
        start = time.perf_counter()
        for _ in range(window):
            peer.send(data)
        for _ in range(count - window):
            peer.recv(4096)
            peer.send(data)
        for _ in range(window):
            peer.recv(4096)
        seconds = time.perf_counter() - start
        return count / seconds, (cpu_seconds(self._child.pid) - before) / count

    def __enter__(self) -> _SocketEcho:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        try:
            self._child.wait(10.0)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait(10.0)


def raw_echo(open_function: Callable[[], LoopbackFunction], count: int, window: int) -> dict[str, Any]:
    """So many transactions of a guest whose function `open_function` opens: what the driver reports of them."""
    parameters = {
        "count": count,
        "window": window,
        "size": SIZE,
        "warm_up": 0,
        "ring_pages_in": RING_PAGES,
        "ring_pages_out": RING_PAGES,
    }
    result = run_workload(Context(parameters, open_function), RawEchoWorkload)
    if result["verdict"] != "passed":
        raise VmbusError(f"the echo transactions of the benchmark went wrong: {result}")
    return result


def _cost(server: ServerProcess, count: int, window: int) -> float:
    """Seconds of the server's CPU time for each transaction."""
    before = cpu_seconds(server.pid)
    raw_echo(lambda: LoopbackFunction(server.socket_path), count, window)
    return (cpu_seconds(server.pid) - before) / count


def measure(library: Path, *, quick: bool, step: Callable[[str], None]) -> Part:
    """Run this part. `step` is told what is being done."""
    repeats = 3 if quick else 7
    count = 40_000 if quick else 200_000
    windows = [256] if quick else [64, 256, 1024]
    part = Part(
        name="host",
        title="host-only transactions over the rings",
        parameters={"size": SIZE, "count": count, "windows": windows, "repeats": repeats, "ring_pages": RING_PAGES},
        baseline="echo of 64 bytes over a SOCK_SEQPACKET socket between two Python processes",
        rows=[],
        targets=[],
    )
    description = describe_own("echo", "echo")
    kinds = {"echo": description, "answering": describe_own(answering.KIND, "echo")}
    compared: dict[tuple[str, str], list[float]] = {(core, kind): [] for core in ("native", "pure") for kind in kinds}
    rates: dict[int, list[float]] = {window: [] for window in windows}
    costs: dict[int, list[float]] = {window: [] for window in windows}
    guest_costs: dict[int, list[float]] = {window: [] for window in windows}
    base_rates: list[float] = []
    base_costs: list[float] = []
    trips: list[float] = []
    base_trips: list[float] = []
    both: list[float] = []
    with ExitStack() as stack:
        baseline = stack.enter_context(_SocketEcho())
        servers = {
            (core, kind): stack.enter_context(ServerProcess(kinds[kind], library, settings={SETTING: core}))
            for core, kind in compared
        }
        server = servers["native", "echo"]

        def connect() -> LoopbackFunction:
            return LoopbackFunction(server.socket_path)

        for one in servers.values():
            _cost(one, min(count, 20_000), windows[0])
        for repeat in range(repeats):
            step(f"host-only, round {repeat + 1} of {repeats}")
            rate, cost = baseline.measure(count // 2, 64)
            base_rates.append(rate)
            base_costs.append(cost)
            for window in windows:
                before, own = cpu_seconds(server.pid), time.process_time()
                rates[window].append(raw_echo(connect, count, window)["per_second"])
                # Connecting, opening and closing the channel are in here too, and small against the count.
                costs[window].append((cpu_seconds(server.pid) - before) / count)
                guest_costs[window].append((time.process_time() - own) / count)
            for key, one in servers.items():
                compared[key].append(_cost(one, count // 2, WINDOW))
            base_trips.append(1 / baseline.measure(5000, 1)[0])
            trips.append(raw_echo(connect, 5000, 1)["round_trip"]["median"])
    with LoopbackServer(description, find_and_load(library)) as together:
        for repeat in range(repeats):
            step(f"both sides in one process, round {repeat + 1} of {repeats}")
            both.append(raw_echo(together.function, count // 4, windows[-1])["per_second"])

    per_second = Sample.of(base_rates, "/s")
    per_cpu = Sample.of([1 / cost for cost in base_costs], "/s")
    best = max(windows, key=lambda window: Sample.of([1 / cost for cost in costs[window]], "/s").median)
    for window in windows:
        mine = [1 / cost for cost in costs[window]]
        part.rows.append(
            Row(
                f"per second of the server's core, window {window}",
                Sample.of(mine, "/s"),
                per_cpu,
                ratio(mine, [1 / cost for cost in base_costs]),
                f"{1e6 / Sample.of(mine, '/s').median:.2f} us of its CPU time a transaction",
            )
        )
    for window in windows:
        guest_cost = Sample.of(guest_costs[window], "s").median
        part.rows.append(
            Row(
                f"per second of both on two cores, window {window}",
                Sample.of(rates[window], "/s"),
                per_second,
                ratio(rates[window], base_rates),
                f"the guest's side takes {1e6 * guest_cost:.2f} us of CPU",
            )
        )
    part.rows.append(
        Row(
            f"both in one process, window {windows[-1]}",
            Sample.of(both, "/s"),
            per_second,
            ratio(both, base_rates),
            "one interpreter lock: all on one core",
        )
    )
    part.rows.append(
        Row(
            "round trip, window 1",
            Sample.of([1e6 * trip for trip in trips], "us"),
            Sample.of([1e6 * trip for trip in base_trips], "us"),
            ratio(trips, base_trips),
            "doorbell over the socket, interrupt by eventfd",
        )
    )
    compare(part, compared, base_costs)
    fastest = Sample.of([1 / cost for cost in costs[best]], "/s")
    name = f"host-only transactions on one core (server, window {best})"
    part.targets.append(Target.judge(name, fastest, "at least", TARGET))
    part.parameters["server_threads"] = 1
    part.parameters["processors"] = len(os.sched_getaffinity(0))
    return part


def compare(part: Part, costs: dict[tuple[str, str], list[float]], base: list[float]) -> None:
    """Rows and targets: the native core against the pure one and the socket's echo; seconds of CPU time, in pairs."""
    for kind, title, why in (
        ("echo", "CPU time of an echo", _ITS_OWN),
        ("answering", "CPU time of an echo whose provider does nothing", _SHARED),
    ):
        native, pure = costs["native", kind], costs["pure", kind]
        less, times = ratio(pure, native), ratio(base, native)
        for name, other, found in (("the pure twin", pure, less), ("the socket's echo", base, times)):
            part.rows.append(
                Row(
                    f"{title}, against {name}",
                    Sample.of([1e6 * cost for cost in native], "us"),
                    Sample.of([1e6 * cost for cost in other], "us"),
                    found,
                    f"the ratio says how many times less; window {WINDOW}",
                )
            )
        part.targets.append(Target.judge(f"{title}: less than over the pure twin", less, "at least", TIMES_PURE, why))
        part.targets.append(Target.judge(f"{title}: less than the socket's echo", times, "at least", TIMES_SOCKET, why))
    own = [
        1e6 * (echo - nothing)
        for echo, nothing in zip(costs["native", "echo"], costs["native", "answering"], strict=True)
    ]
    part.rows.append(Row("of which is the echo provider's own", Sample.of(own, "us"), note="the same over both cores"))
