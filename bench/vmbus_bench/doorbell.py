"""One doorbell, stage by stage: from the socket to the provider and back to the interrupt (docs/performance.md).

`TimedProvider` is echo with a clock in its server: as it starts it puts stamps around the functions that a doorbell
passes through, and its command `stages` tells what was seen. A round is what happens between two waits of the event
loop; those that go through the stages in their order count (for the last stage: only where no other doorbell came
before its end). The clock is that of the server's CPU time, since
the one by the wall has the time in it for which the guest's side, just woken, takes the processor away. To look at it
takes about as long in each stage, and in all what the stages take beyond the CPU time of a server without it: that is
taken off again, in equal parts.
"""

from __future__ import annotations

import asyncio
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from vmbus.bus.synic import Synic
from vmbus.device.device import Device
from vmbus.errors import VmbusError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.providers.echo import EchoProvider
from vmbus.testkit.loopback.function import LoopbackFunction
from vmbus.transport import context
from vmbus_bench.figures import Part, Row, Sample
from vmbus_bench.processes import ServerProcess, cpu_seconds, describe_own

KIND = f"{__name__}:TimedProvider"
STAGES = (
    ("awake", "look", "the event loop, from epoll to the transport"),
    ("look", "looked", "the message is seen on the socket, and taken off it"),
    ("looked", "register", "to the register"),
    ("register", "registered", "the register: SynIC, bus, channel found"),
    ("registered", "turn", "back, and on to the turn"),
    ("turn", "provider", "the turn begins: ring read, packet handed over"),
    ("provider", "provided", "the provider: checks, transforms, completes"),
    ("provided", "event", "space given back, the answer published"),
    ("event", "interrupt", "the event flag in guest memory"),
    ("interrupt", "interrupted", "libvfio-user writes the eventfd"),
    ("interrupted", "asleep", "the turn ends: ring unmasked, a last look"),
)
"""Each from one stamp to the next, in this order."""
_ORDER = [*(first for first, _, _ in STAGES), STAGES[-1][1]]
_SIZE = 64


class _Stamps:
    """What one round has passed so far, and how long the stages of good rounds took, in seconds."""

    def __init__(self) -> None:
        self.round: dict[str, float] = {}
        self.stages: list[list[float]] = [[] for _ in STAGES]
        self._over = False

    def stamp(self, name: str) -> None:
        """Up to the interrupt each comes once; what comes again after it belongs to the next doorbell."""
        if self._over:
            return
        if name not in self.round:
            self.round[name] = time.thread_time()
        else:
            self._over = True
            if "interrupted" not in self.round:
                self.round.clear()

    def _end(self) -> None:
        times = [self.round[name] for name in _ORDER if name in self.round]
        if "interrupted" in self.round and len(times) >= len(STAGES) and times == sorted(times):
            for stage, (before, after) in zip(self.stages, pairwise(times), strict=False):
                stage.append(after - before)

    def around(self, before: str | None, call: Callable[..., Any], after: str | None) -> Callable[..., Any]:
        @functools.wraps(call)
        def stamped(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                self.stamp(before)
            try:
                return call(*args, **kwargs)
            finally:
                if after is not None:
                    self.stamp(after)

        return stamped

    def select(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Around the event loop's wait, which ends a round and begins the next."""

        @functools.wraps(call)
        def stamped(timeout: float | None = None) -> Any:
            if not self._over:
                self.stamp("asleep")
            self._end()
            ready = call(timeout)
            self._over = False
            self.round = {"awake": time.thread_time()}
            return ready

        return stamped


class TimedProvider(EchoProvider):
    """See the module's text."""

    kind = KIND

    def start(self) -> None:
        self._stamps = stamps = _Stamps()
        selector: Any = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]
        selector.select = stamps.select(selector.select)
        for owner, name, before, after in (
            (context, "take_posted_writes", "look", "looked"),
            (Device, "bar_write", "register", "registered"),
            (Channel, "process", "turn", None),
            (Synic, "raise_event", "event", None),
            (context.Context, "trigger", "interrupt", "interrupted"),
        ):
            setattr(owner, name, stamps.around(before, getattr(owner, name), after))
        super().start()

    def _answer(self, completion: Completion, payload: bytes, waited: bool = False) -> None:
        self._stamps.stamp("provider")
        super()._answer(completion, payload, waited)
        self._stamps.stamp("provided")

    def command(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        seen = self._stamps.stages
        self._stamps.stages = [[] for _ in STAGES]
        return {"rounds": len(seen[-1]), "seconds": [statistics.median(one) if one else 0.0 for one in seen]}


def measure(library: Path, echo: Callable[..., dict[str, Any]], *, quick: bool, step: Callable[[str], None]) -> Part:
    """Run this part. `echo` runs transactions with a window; `step` is told what is being done."""
    repeats, count = (3, 3000) if quick else (7, 10_000)
    stages: list[list[float]] = []  # of each repeat
    trips: list[float] = []
    costs: list[float] = []
    rounds = 0
    with (
        ServerProcess(describe_own(KIND, "echo"), library) as timed,
        ServerProcess(describe_own("echo", "echo"), library) as plain,
    ):
        for repeat in range(repeats):
            step(f"one doorbell, round {repeat + 1} of {repeats}")
            echo(lambda: LoopbackFunction(timed.socket_path), count, 1)
            report = timed.call("provider", name="echo", command="stages")
            if not report["rounds"]:
                raise VmbusError("no doorbell passed all the stages that the benchmark knows")
            rounds += report["rounds"]
            stages.append(report["seconds"])
            before = cpu_seconds(plain.pid)
            trips.append(echo(lambda: LoopbackFunction(plain.socket_path), count, 1)["round_trip"]["median"])
            costs.append((cpu_seconds(plain.pid) - before) / count)
    clock = [max(0.0, sum(one) - cost) / len(STAGES) for one, cost in zip(stages, costs, strict=True)]
    rows = []
    for number, (_, _, name) in enumerate(STAGES):
        taken = [1e6 * (one[number] - share) for one, share in zip(stages, clock, strict=True)]
        rows.append(Row(f"{number + 1}. {name}", Sample.of(taken, "us")))
    rows += [
        Row("all of them: CPU time of the server", Sample.of([1e6 * one for one in costs], "us")),
        Row("what the clock took in each, not in these", Sample.of([1e6 * one for one in clock], "us")),
        Row(
            "the guest's round trip, by the wall",
            Sample.of([1e6 * one for one in trips], "us"),
            note="beyond the server: two processes are woken, and the guest's side is Python, too",
        ),
    ]
    return Part(
        name="doorbell",
        title="one doorbell, stage by stage",
        parameters={"size": _SIZE, "count": count, "repeats": repeats, "rounds": rounds},
        baseline="none: where each microsecond goes",
        rows=rows,
        targets=[],
    )
