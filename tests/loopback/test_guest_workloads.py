"""The test drivers against a real device server: they pass when all is well, and notice every kind of trouble."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vmbus import providers
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet
from vmbus.providers.burst import BurstProvider
from vmbus.providers.echo import EchoProvider
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.transport.library import Library
from vmbus.wire import workload
from vmbus_guest.testdrivers import CATALOGUE
from vmbus_guest.testdrivers.context import Context

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(libvfio_user: Library) -> Iterator[Run]:
    """Run a test driver in this process against a fresh server."""
    servers: list[LoopbackServer] = []

    def start(name: str, **parameters: Any) -> dict[str, Any]:
        server = LoopbackServer(describe("echo", "burst"), libvfio_user)
        servers.append(server)
        return CATALOGUE[name].load()(Context(parameters, server.function))

    yield start
    for server in servers:
        server.stop()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("echo", {"count": 500, "window": 1}),
        ("echo", {"count": 3000, "window": 200, "size": 3000, "minimum_size": 1, "external": 0.5, "seed": 7}),
        ("echo", {"count": 500, "window": 64, "size": 5000, "external": 1.0}),
        ("echo", {"count": 400, "window": 300, "size": 2000, "ring_pages_in": 1, "ring_pages_out": 1}),
        ("echo", {"count": 3, "window": 100}),
        ("echo", {"count": 20, "window": 4, "pace": 0.001}),
        ("burst", {"count": 3000, "window": 100, "size": 200}),
        ("burst", {"count": 2000, "window": 500, "size": 200, "hold": 40, "ring_pages_in": 1}),
        ("burst", {"count": 50, "window": 10, "hold": 100, "hold_seconds": 0.01}),
        ("bulk", {"count": 300}),
    ],
)
def test_a_driver_passes(run: Run, name: str, parameters: dict[str, Any]) -> None:
    result = run(name, **parameters)
    assert result["verdict"] == "passed", result
    assert result["received" if name == "burst" else "sent"] == result["completed"] == parameters["count"]
    assert name != "bulk" or result["bytes_per_second"] > 0


@pytest.mark.parametrize(
    "parameters",
    [
        {"count": 200, "window": 16, "pace": 0.001},
        {"count": 7, "window": 100, "size": 5000, "pace": 0.001},
        {"count": 101, "window": 10, "size": 60000, "pace": 0.001},
    ],
)
def test_remap_passes_and_unmaps(run: Run, parameters: dict[str, Any]) -> None:
    result = run("remap", **parameters)
    assert result["verdict"] == "passed", result
    assert result["completed"] == parameters["count"]
    assert result["rounds"] == -(-parameters["count"] // min(parameters["window"], parameters["count"]))
    assert result["unmapped"] >= result["rounds"], "each round's memory was unmapped"


def test_raw_echo_counts_and_times(run: Run) -> None:
    result = run("raw-echo", count=500, window=1, warm_up=10)
    assert (result["verdict"], result["completed"]) == ("passed", 500)
    assert 0 < result["round_trip"]["median"] <= result["round_trip"]["maximum"]
    assert run("raw-echo", count=5000)["per_second"] > 0


def test_a_run_without_end_is_stopped_and_passes(libvfio_user: Library) -> None:
    progress = io.StringIO()
    with LoopbackServer(describe("echo", "burst"), libvfio_user) as server:
        workloads = [{"driver": "echo", "count": 0, "external": 0.2}, {"driver": "burst", "count": 0, "hold": 9}]
        context = Context({"workloads": workloads}, server.function, progress)
        timer = threading.Timer(0.6, lambda: setattr(context, "stop_requested", True))
        timer.start()
        result = CATALOGUE["mixed"].load()(context)
        timer.join()
        assert result["verdict"] == "passed", result
        assert result["workloads"][0]["sent"] > 0
        burst = result["workloads"][1]
        assert burst["completed"] == burst["host"]["completed"] == burst["host"]["started"] > 0, "nothing is cut off"
        again = Context({"count": 100}, server.function)
        assert CATALOGUE["burst"].load()(again)["verdict"] == "passed", "the next driver finds the device as new"
    lines = [json.loads(line) for line in progress.getvalue().splitlines()]
    assert [part["name"] for part in lines[-1]["workloads"]] == ["echo", "burst"]


# Sabotage: each of these providers breaks one promise.


class EchoWithWrongBytes(EchoProvider):
    """One answer in 100 is that of another request."""

    def _answer(self, completion: Completion, payload: bytes) -> None:
        sequence = workload.ECHO_REQUEST.unpack_from(payload)[0]
        if sequence % 100 != 50:
            super()._answer(completion, payload)
            return
        data = payload[workload.ECHO_REQUEST.size :]
        answer = workload.transform(data, sequence + 1)
        completion.complete(workload.ECHO_REPLY.pack(sequence, len(data), 0, workload.STATUS_OK, 0) + answer)


class EchoThatLeavesMemoryAlone(EchoProvider):
    """Says that it has transformed external data, and has not."""

    def _answer(self, completion: Completion, payload: bytes) -> None:
        sequence, length, crc = workload.ECHO_REQUEST.unpack_from(payload)
        completion.complete(workload.ECHO_REPLY.pack(sequence, length, crc, workload.STATUS_OK, 0))


class EchoThatForgets(EchoProvider):
    """One request in 100 is never answered."""

    def _answer(self, completion: Completion, payload: bytes) -> None:
        if workload.ECHO_REQUEST.unpack_from(payload)[0] % 100 != 50:
            super()._answer(completion, payload)


class EchoOutOfOrder(EchoProvider):
    """One request in 100 is overtaken by the next."""

    late: tuple[Completion, bytes] | None = None

    def _answer(self, completion: Completion, payload: bytes) -> None:
        if workload.ECHO_REQUEST.unpack_from(payload)[0] % 100 == 50:
            self.late = (completion, payload)
            return
        super()._answer(completion, payload)
        if self.late is not None:
            late, self.late = self.late, None
            super()._answer(*late)


@pytest.mark.parametrize(
    ("provider", "parameters", "wrong"),
    [
        (EchoWithWrongBytes, {}, "corrupted"),
        (EchoThatLeavesMemoryAlone, {"external": 1.0}, "corrupted"),
        (EchoThatForgets, {"stall_seconds": 0.2}, "lost"),
        (EchoOutOfOrder, {}, "reordered"),
    ],
)
def test_echo_notices(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    provider: type[EchoProvider],
    parameters: dict[str, Any],
    wrong: str,
) -> None:
    monkeypatch.setitem(providers.PROVIDERS, "echo", provider)
    result = run("echo", count=500, window=16, **parameters)
    assert result["verdict"] == "failed"
    assert result[wrong] >= 5 or (wrong == "lost" and result["trouble"])
    for other in {"lost", "duplicated", "reordered", "corrupted"} - {wrong}:
        assert result[other] == 0


class BurstWithDamage(BurstProvider):
    """Every packet has a wrong checksum."""

    def _issue(self, packet: Packet) -> None:
        real = workload.burst_data
        try:
            workload.burst_data = lambda sequence, data: real(sequence, data)[:-1] + b"\0"
            super()._issue(packet)
        finally:
            workload.burst_data = real


class BurstThatSkips(BurstProvider):
    """Packet 50 never leaves, and the host claims that it did."""

    def _issue(self, packet: Packet) -> None:
        if self._issued == 50:
            self._issued += 1
            self.tally.started += 1
            self.tally.completed += 1
            self._answers.next += 1
        super()._issue(packet)


class BurstTwice(BurstProvider):
    """Packet 50 leaves twice."""

    def _issue(self, packet: Packet) -> None:
        super()._issue(packet)
        if self._issued == 51:
            self._issued -= 1
            super()._issue(self.channel.allocate_packet())


class BurstThatDislikesAnswers(BurstProvider):
    """The host expects other digests than the guest computes."""

    def _completed(self, packet: Packet, status: int, reply: bytes) -> None:
        super()._completed(packet, status, reply[::-1])


class BurstThatRefuses(BurstProvider):
    """The run does not start."""

    def _process(self, channel: Channel, completion: Completion, payload: bytes) -> None:
        completion.complete(workload.STATUS_MALFORMED.to_bytes(4, "little"))


@pytest.mark.parametrize(
    ("provider", "wrong"),
    [
        (BurstWithDamage, "corrupted"),
        (BurstThatSkips, "lost"),
        (BurstTwice, "duplicated"),
        (BurstThatDislikesAnswers, "host"),
        (BurstThatRefuses, "trouble"),
    ],
)
def test_burst_notices(run: Run, monkeypatch: pytest.MonkeyPatch, provider: type[BurstProvider], wrong: str) -> None:
    monkeypatch.setitem(providers.PROVIDERS, "burst", provider)
    result = run("burst", count=200, window=20, size=30, stall_seconds=2.0)
    assert result["verdict"] == "failed"
    if wrong == "host":
        assert result["host"]["wrong"] > 0
    else:
        assert result[wrong]


def test_a_server_that_dies_in_the_middle_is_noticed(libvfio_user: Library) -> None:
    with LoopbackServer(describe("echo"), libvfio_user) as server:
        context = Context({"count": 0, "stall_seconds": 0.2}, server.function)
        timer = threading.Timer(0.3, server.stop)
        timer.start()
        with pytest.raises(Exception) as caught:
            CATALOGUE["echo"].load()(context)
        assert str(caught.value)
        timer.join()
