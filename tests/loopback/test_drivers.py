"""Test drivers that use the lab, and `storm`: they pass, survive restores wherever they happen, notice sabotage."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmbus.errors import UsageError
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.outgoing import Outgoing
from vmbus.kmcl.packet import Packet
from vmbus.observe.audit.checker import check_paths
from vmbus.providers.burst import BurstProvider
from vmbus.providers.lab.pipe import PipeEnd
from vmbus.providers.lab.station import _HANDLERS as HANDLERS
from vmbus.providers.lab.station import Line, Station
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.testkit.loopback.restoring import RestoringFunction, Servers
from vmbus.transport.library import Library
from vmbus.wire.lab import REPLY, Op, Status
from vmbus_guest.testdrivers import CATALOGUE, drivers
from vmbus_guest.testdrivers.context import Context

DEVICE = describe("echo", "burst", "lab")
COUNTS = ("lost", "duplicated", "reordered", "corrupted")

CASES: dict[str, dict[str, Any]] = {
    "many": {"channels": 12, "count": 20},
    "churn": {"count": 12},
    "gpadl": {"count": 20, "keep": 0.5},
    "hotplug": {"count": 9},
    "ring-full": {"count": 800, "pause_every": 100, "pause_seconds": 0.005},
    "tiny-rings": {"count": 500},
    "maximum": {"count": 9},
    "pipe": {"count": 200, "window": 8},
    "sync": {"count": 80, "nested_every": 4},
    "storm": {"count": 300},
    "idle": {"seconds": 0.3, "interval": 0.05},
}


def run(servers: Servers, name: str, **parameters: Any) -> tuple[dict[str, Any], RestoringFunction]:
    functions: list[RestoringFunction] = []

    def open_function() -> RestoringFunction:
        functions.append(servers.function())
        return functions[0]

    result = drivers()[name].load()(Context({"stall_seconds": 20.0, **parameters}, open_function))
    return result, functions[0]


def check(name: str, result: dict[str, Any]) -> None:
    assert result["verdict"] == "passed", str(result)
    assert result["completed"] > 0
    assert [result[count] for count in COUNTS] == [0, 0, 0, 0]
    if name == "ring-full":
        assert result["queued"] > 100 and result["pauses"] >= 1 and result["pushed"] > 0
    elif name == "storm":
        assert result["interrupts"] > 0 and result["doorbells"] > 0
    elif name == "sync":
        assert result["nested"] > 5
    elif name == "maximum":
        assert result["largest"] == 0xFFFF * 8 - 24 - 24
    elif name == "hotplug":
        assert result["rescinded"] == 9 and result["cancelled"] > 0
    elif name == "churn":
        assert result["opened"] == 12 and result["cancelled"] > 0


@pytest.mark.parametrize("name", CASES)
def test_a_driver_passes_and_survives_restores_wherever_they_happen(name: str, libvfio_user: Library) -> None:
    with Servers(DEVICE, libvfio_user) as servers:
        result, function = run(servers, name, **CASES[name])
    check(name, result)
    chooser = random.Random(name)
    moments = [chooser.randrange(4, max(12, function.turns * 3 // 4)) for _ in range(8)]
    with Servers(DEVICE, libvfio_user, moments) as servers:
        result, _ = run(servers, name, **CASES[name])
        assert servers.restores >= 4, "the run was over before"
    check(name, result)


def test_all_at_once_survive_restores_with_clean_books(libvfio_user: Library, tmp_path: Path) -> None:
    """In `mixed`, over one connection, with audit records of both ends."""
    device = describe("echo", "burst", "lab", lab={"stations": 12})
    workloads = [{"driver": name, **CASES[name]} for name in CASES] + [{"driver": "echo", "count": 300}]
    with Servers(device, libvfio_user, [60, 100, 150, 220, 300, 400], audit=tmp_path / "audit") as servers:
        context = Context({"workloads": workloads}, servers.function)
        context.keep_record(str(tmp_path / "audit"), "mixed-1")
        result = CATALOGUE["mixed"].load()(context)
        context.end_record()
        assert servers.restores == 6 and servers.packets > 0
    for part in result["workloads"]:
        check(part["name"], part)
    assert result["verdict"] == "passed"
    report = check_paths([tmp_path / "audit"])
    assert report.verdict == "clean", report


@pytest.mark.parametrize("name", sorted({*CASES, "echo", "burst", "bulk", "remap"}))
def test_a_driver_without_an_end_is_stopped_and_passes(name: str, libvfio_user: Library) -> None:
    endless = {"seconds": 0.0, "interval": 0.01} if name == "idle" else {"count": 0}
    with Servers(DEVICE, libvfio_user) as servers:
        function = servers.function()
        context = Context({**endless, "stall_seconds": 20.0}, lambda: function)
        wait = function.wait_interrupt

        def until_enough(timeout: float) -> bool:
            context.stop_requested = function.turns > 60
            return wait(timeout)

        function.wait_interrupt = until_enough  # type: ignore[method-assign]
        result = drivers()[name].load()(context)
    assert result["verdict"] == "passed", str(result)
    assert [result[count] for count in COUNTS] == [0, 0, 0, 0]


def test_more_than_the_lab_has_is_said(libvfio_user: Library) -> None:
    with LoopbackServer(describe("lab", lab={"stations": 1}), libvfio_user) as server:
        workloads = [{"driver": "sync"}, {"driver": "idle"}]
        with pytest.raises(UsageError, match=r"all 1 channels of type .* in use .* another provider of that kind"):
            CATALOGUE["mixed"].load()(Context({"workloads": workloads}, server.function))
        found = CATALOGUE["hotplug"].load()(Context({}, server.function))
        assert found["verdict"] == "failed" and "another provider" in found["trouble"][0]
        alone = CATALOGUE["hotplug"].load()(Context({"stations": 0, "count": 3}, server.function))
        assert alone["verdict"] == "passed"


@pytest.mark.parametrize("needless", [0, 5])
def test_a_storm_signals_as_often_as_it_was_asked_to(needless: int, libvfio_user: Library) -> None:
    with LoopbackServer(DEVICE, libvfio_user) as server:
        parameters = {"count": 200, "needless": needless, "doorbells": needless}
        result = CATALOGUE["storm"].load()(Context(parameters, server.function))
        (burst,) = [one for one in server.server.device.channels if one.name == "burst"]
        signals = burst.counters["signals"]
    assert result["verdict"] == "passed"
    assert (signals >= 200 * needless) and (needless or signals <= 201 + 10)
    assert (result["doorbells"] > 0) is bool(needless)


def test_the_host_plugs_and_unplugs_stations(libvfio_user: Library) -> None:
    with LoopbackServer(DEVICE, libvfio_user) as server:
        plug = {"name": "lab", "arguments": {"station": 7}}
        assert server.command("provider", **plug | {"command": "unplug"}) == {"station": 7, "plugged": False}
        assert server.command("status")["providers"]["lab"]["stations"][7]["plugged"] is False
        assert server.command("provider", **plug | {"command": "plug"}) == {"station": 7, "plugged": True}
        with pytest.raises(UsageError, match="no station 8; there are 8"):
            server.command("provider", name="lab", command="plug", arguments={"station": 8})
        with pytest.raises(UsageError, match="there are plug and unplug"):
            server.command("provider", name="lab", command="dance")


# Sabotage: each of these breaks one promise.

Sabotage = Callable[[pytest.MonkeyPatch], None]


def wrong_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One answer in 20 has a wrong byte, in the ring and in memory."""
    real = Line.answer

    def answer(self: Line, body: bytes, views: Any) -> Generator[int, None, bytes]:
        reply = yield from real(self, body, views)
        if self.tally.started % 20 != 7:
            return reply
        if views is not None:
            views[-1][-1] ^= 1
            return reply
        return reply[:-1] + bytes([reply[-1] ^ 1])

    monkeypatch.setattr(Line, "answer", answer)


def no_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second request on there is no answer."""
    real = Line._echo

    def echo(self: Line, completion: Completion, body: bytes) -> Iterator[int]:
        return real(self, completion, body) if not self.tally.started else iter(())

    monkeypatch.setattr(Line, "_echo", echo)


def memory_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in a GPADL is read, and not written."""
    real = Line.answer

    def answer(self: Line, body: bytes, views: Any) -> Generator[int, None, bytes]:
        return real(self, body, None if views is None else [memoryview(bytearray(b"".join(views)))])

    monkeypatch.setattr(Line, "answer", answer)


def one_push_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    real = HANDLERS[Op.PUSH]
    monkeypatch.setitem(HANDLERS, Op.PUSH, lambda line, argument, body: real(line, argument - 1, body))


def pushes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of pushed packets start again."""
    real = HANDLERS[Op.PUSH]

    def push(line: Line, argument: int, body: bytes) -> Any:
        line.pushed = 0
        return real(line, argument, body)

    monkeypatch.setitem(HANDLERS, Op.PUSH, push)


def answers_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's books do not have the guest's answers."""
    monkeypatch.setattr(Line, "_push_completed", lambda self, packet, status, reply: packet.free())


def stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lab says that it has withdrawn a channel, and has not."""
    monkeypatch.setitem(HANDLERS, Op.WITHDRAW, lambda line, argument, body: REPLY.pack(Status.OK, argument))


def goes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other sub-channel is withdrawn as well."""
    real = HANDLERS[Op.WITHDRAW]

    def withdraw(line: Line, argument: int, body: bytes) -> bytes:
        line._station.line(3 - argument).withdraw()
        return real(line, argument, body)

    monkeypatch.setitem(HANDLERS, Op.WITHDRAW, withdraw)


def does_not_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Station.plug
    monkeypatch.setattr(Station, "plug", lambda self, plugged: None if plugged else real(self, plugged))


def cancels_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest's channel that is closed forgets what was under way."""
    real = Outgoing.cancel_all

    def cancel(self: Outgoing) -> None:
        if self._channel.can_describe_memory:
            self._flow.sent.clear()
        real(self)

    monkeypatch.setattr(Outgoing, "cancel_all", cancel)


def a_message_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    real = PipeEnd._data
    calls: list[int] = []

    def data(self: PipeEnd, content: bytes) -> None:
        calls.append(1)
        if len(calls) != 50:
            real(self, content)

    monkeypatch.setattr(PipeEnd, "_data", data)


def a_byte_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """One packet of the stream comes back without its first byte."""
    real = PipeEnd._data
    calls: list[int] = []

    def data(self: PipeEnd, content: bytes) -> None:
        calls.append(1)
        real(self, content[1:] if len(calls) == 30 else content)

    monkeypatch.setattr(PipeEnd, "_data", data)


def a_packet_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    real = BurstProvider._issue

    def issue(self: BurstProvider, packet: Packet) -> None:
        if self._issued == 50:
            self._issued += 1
        real(self, packet)

    monkeypatch.setattr(BurstProvider, "_issue", issue)


SABOTAGE: list[tuple[str, Sabotage, str, dict[str, Any]]] = [
    ("many", wrong_answers, "corrupted", {"count": 30}),
    ("many", one_push_too_few, "trouble", {"stall_seconds": 0.5}),
    ("many", pushes_twice, "verdict", {}),
    ("many", answers_not_looked_at, "verdict", {}),
    ("churn", wrong_answers, "corrupted", {}),
    ("churn", cancels_nothing, "lost", {}),
    ("gpadl", memory_left_alone, "corrupted", {}),
    ("hotplug", stays, "trouble", {"stall_seconds": 0.5}),
    ("hotplug", does_not_come_again, "trouble", {"stall_seconds": 0.5}),
    ("hotplug", goes_by_itself, "trouble", {"stall_seconds": 2.0}),
    ("hotplug", cancels_nothing, "lost", {}),
    ("ring-full", one_push_too_few, "trouble", {"stall_seconds": 0.5}),
    ("ring-full", pushes_twice, "verdict", {}),
    ("tiny-rings", wrong_answers, "corrupted", {}),
    ("maximum", wrong_answers, "corrupted", {}),
    ("pipe", a_message_lost, "lost", {"mode": "message", "stall_seconds": 0.5}),
    ("pipe", a_byte_lost, "corrupted", {"mode": "byte", "stall_seconds": 0.5}),
    ("sync", wrong_answers, "corrupted", {}),
    ("sync", no_answers, "trouble", {"stall_seconds": 0.5}),
    ("storm", a_packet_skipped, "lost", {"stall_seconds": 0.5}),
    ("idle", wrong_answers, "corrupted", {"seconds": 1.0, "interval": 0.01}),
    ("idle", no_answers, "lost", {"stall_seconds": 0.5}),
]


@pytest.mark.parametrize(
    ("name", "sabotage", "noticed", "parameters"), SABOTAGE, ids=[f"{one[0]}-{one[1].__name__}" for one in SABOTAGE]
)
def test_a_driver_notices(
    name: str,
    sabotage: Sabotage,
    noticed: str,
    parameters: dict[str, Any],
    libvfio_user: Library,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sabotage(monkeypatch)
    with Servers(DEVICE, libvfio_user) as servers:
        result, _ = run(servers, name, **{**CASES[name], **parameters})
    assert result["verdict"] == "failed", result
    assert result[noticed], result


@pytest.mark.parametrize(
    ("name", "forgotten"),
    [("many", "pushed"), ("many", "next_sequence"), ("many", "next_answer"), ("hotplug", "plugged")],
)
def test_state_that_the_lab_forgets_over_a_restore_is_noticed(
    name: str, forgotten: str, libvfio_user: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    import msgspec

    if forgotten == "plugged":
        real_plug = Station.restore

        def restore_station(self: Station, state: Any) -> None:
            # Offered, though the guest had it withdrawn, and withdrawn, though the guest has it open.
            real_plug(self, msgspec.structs.replace(state, plugged=not state.plugged or not self.number))

        monkeypatch.setattr(Station, "restore", restore_station)
    else:
        real = Line.restore

        def restore(self: Line, state: Any) -> None:
            real(self, msgspec.structs.replace(state, **{forgotten: 0}))

        monkeypatch.setattr(Line, "restore", restore)
    moments = {"many": [55, 65, 75, 85], "hotplug": [30]}[name]
    with Servers(DEVICE, libvfio_user, tuple(moments)) as servers:
        try:
            more = {"many": {"count": 200}, "hotplug": {"stall_seconds": 1.0}}[name]
            result, _ = run(servers, name, **{**CASES[name], **more})
        except Exception as error:
            assert "state" in str(error) or "offer" in str(error), error
            return
        assert servers.restores == len(moments)
    assert result["verdict"] == "failed", result
