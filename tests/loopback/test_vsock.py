"""Sockets over a real device server: both directions, their ends, slow ends, refusals, saves, and hostile guests."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from support import pace
from support.vsock import RING_PAGES, SECONDS, GuestSocket, GuestSockets, accept, call, listen, take
from vmbus.bus.connects import CONNECTION_REFUSED, MOST_CONNECTS
from vmbus.device.saved import count_packets
from vmbus.errors import StateError, UsageError, WaitTimeout
from vmbus.kmcl.server import SERVER_FLAG_FORCE_NEW_CHANNEL
from vmbus.observe.audit.checker import check_paths
from vmbus.observe.audit.files import recorder_in
from vmbus.observe.inspection.document import Source
from vmbus.observe.inspection.saved import inspect_state
from vmbus.operations.migration.arrival import packets_found
from vmbus.providers.vsock import VsockProvider
from vmbus.providers.vsock.connection import CHUNK, HIGH, Connection
from vmbus.providers.vsock.provider import _FLAGS, MOST_CONNECTIONS
from vmbus.snapshot.manifest import Packets
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.transport.library import Library
from vmbus.wire import hvsock
from vmbus.wire import messages as m
from vmbus_guest.driver import VmbusDriver

PORT = 5000


class Bench:
    """A server with sockets and an echo, and a guest."""

    def __init__(self, library: Library, audit: Path | None = None) -> None:
        self.library = library
        self.audit = audit
        self.server = LoopbackServer(describe("vsock", "echo"), library, audit=audit)
        self.function = self.server.function()
        self.recorder = None if audit is None else recorder_in(audit, "guest", "loopback")
        self.driver = VmbusDriver(self.function, recorder=self.recorder)
        self.sockets = GuestSockets(self.driver)
        self.ends: list[socket.socket] = []

    @property
    def path(self) -> Path:
        return self.server.directory / "vsock.sock"

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.server.command("status")["providers"]["vsock"]
        return found

    def listen(self, port: int = PORT) -> socket.socket:
        self.ends.append(listen(self.path, port))
        return self.ends[-1]

    def call(self, port: int | bytes = PORT) -> socket.socket:
        self.ends.append(call(self.path, port))
        return self.ends[-1]

    def accept(self, listener: socket.socket) -> socket.socket:
        taken: list[socket.socket] = []

        def there() -> bool:
            end = accept(listener)
            if end is not None:
                taken.append(end)
            return bool(taken)

        self.sockets.run_until(there, "a connection at the host")
        self.ends += taken
        return taken[0]

    def from_guest(self) -> tuple[GuestSocket, socket.socket]:
        """A connection of the guest's to a listener that is gone by then."""
        listener = self.listen()
        guest = self.sockets.connect(PORT)
        host = self.accept(listener)
        listener.close()
        Path(f"{self.path}_{PORT}").unlink()
        return guest, host

    def from_host(self) -> tuple[GuestSocket, socket.socket]:
        before = len(self.sockets.accepted)
        self.sockets.listening.setdefault(PORT, lambda one: None)
        host = self.call()
        self.sockets.run_until(lambda: len(self.sockets.accepted) > before, "a connection in the guest")
        guest = self.sockets.accepted[-1]
        said = bytearray()
        self.sockets.run_until(lambda: take(host, said) and said.endswith(b"\n"), "the answer to CONNECT")
        assert said == b"OK %d\n" % guest.peer
        return guest, host

    def both(self, which: str) -> tuple[GuestSocket, socket.socket]:
        return self.from_guest() if which == "guest" else self.from_host()

    def restore(self) -> int:
        """Into another server; how many packets were in flight that nobody saves."""
        state = self.server.save()
        config = state.config
        self.server.stop()
        self.server = LoopbackServer(describe("vsock", "echo"), self.library, restore=state, audit=self.audit)
        self.function.reconnect(self.server.socket_path, config)
        found = self.server.command("restore-finish")
        counts = count_packets(state)
        assert packets_found([found]) == Packets(queued=counts.queued, sent=counts.sent), (
            "a live migration compares them"
        )
        return sum(found["unsaved"].values())

    def nothing_is_left(self, offers: int = 1, seconds: float = SECONDS) -> None:
        """No connection, offer, GPADL, descriptor or timer of one."""

        def there() -> dict[str, Any]:
            device = self.server.server.device
            services = self.server.server.session.hosts["vsock"]
            return {
                "offers": len(device.bus.offers) - offers,
                "channels": len(device.channels) - 1,
                "gpadls": len(device.bus.gpadls.complete),
                "connects": len(device.bus.connects),
                "watched": len(services.watches.descriptors) - 1,
                "of the provider": len(services.channels),
                **{
                    name: self.server.server.session.providers[0].status()[name]
                    for name in ("connections", "connecting", "ending", "unreleased", "kept")
                },
            }

        self.sockets.run_until(
            lambda: not any(self.server.on_loop(there).values()),
            f"that nothing is left: {self.server.on_loop(there)}",
            seconds,
        )

    def close(self) -> None:
        for end in self.ends:
            end.close()
        self.driver.close(graceful=False)
        self.server.stop()


@pytest.fixture
def bench(libvfio_user: Library) -> Iterator[Bench]:
    bench = Bench(libvfio_user)
    yield bench
    bench.close()


def both_ways(bench: Bench, guest: GuestSocket, host: socket.socket, size: int) -> None:
    """Random bytes each way at once, both ends, and the sums are right."""
    up, down = random.Random(1).randbytes(size), random.Random(2).randbytes(size + 1)
    guest.send(up)
    guest.end()
    got, sent, alive = bytearray(), 0, True

    def step() -> bool:
        nonlocal sent, alive
        try:
            while sent < len(down):
                sent += host.send(down[sent : sent + 50_000])
                if sent == len(down):
                    host.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        alive = alive and take(host, got)
        return not alive and guest.fins == 1

    bench.sockets.run_until(step, "all bytes, and both ends")
    assert hashlib.sha256(got).digest() == hashlib.sha256(up).digest()
    assert hashlib.sha256(guest.got).digest() == hashlib.sha256(down).digest()
    assert guest.largest <= CHUNK
    bench.sockets.run_until(lambda: guest.closed, "the RESCIND after both ends")
    host.close()


def test_the_socket_is_its_owners_alone_and_goes_away(bench: Bench) -> None:
    assert bench.status["socket"] == str(bench.path)
    assert bench.path.stat().st_mode & 0o777 == 0o600
    path = bench.path
    bench.server.command("rescind", name="vsock")
    assert not path.exists()
    endpoint = bench.sockets.request(PORT)
    bench.sockets.run_until(lambda: bench.sockets.refused(endpoint, PORT), "the refusal, since nobody serves it")


@pytest.mark.parametrize("which", ["guest", "host"])
def test_half_a_connection_goes_on(bench: Bench, which: str) -> None:
    guest, host = bench.both(which)
    got = bytearray()
    guest.send(b"question")
    guest.end()
    bench.sockets.run_until(lambda: not take(host, got), "the end of the guest's bytes")
    assert got == b"question" and not guest.closed
    host.sendall(b"answer" * 1000)
    bench.sockets.run_until(lambda: len(guest.got) == 6000, "the answer")
    assert not guest.fins and not guest.closed
    host.close()
    bench.sockets.run_until(lambda: guest.closed, "the RESCIND")
    assert guest.fins == 1

    guest, host = bench.both(which)
    host.sendall(b"bye")
    host.shutdown(socket.SHUT_WR)
    bench.sockets.run_until(lambda: guest.fins, "the host's FIN")
    got.clear()
    guest.send(b"more" * 5000)
    bench.sockets.run_until(lambda: take(host, got) and len(got) == 20000, "the guest's bytes after it")
    assert not guest.closed
    guest.end()
    bench.sockets.run_until(lambda: guest.closed, "the RESCIND")
    bench.nothing_is_left()


def test_what_follows_the_line_at_once_is_the_connections(bench: Bench) -> None:
    bench.sockets.listening[PORT] = lambda one: None
    for line in (b"CONNECT 5000\nGET /", b"CONNECT 5000\r\nGET /"):
        bench.call(line)
        bench.sockets.run_until(lambda: bench.sockets.accepted and bench.sockets.accepted[-1].got == b"GET /", "it")
        bench.sockets.accepted.clear()


@pytest.mark.parametrize("which", ["guest", "host"])
def test_a_slow_host(bench: Bench, which: str) -> None:
    """It reads nothing: a bounded number of bytes is kept, the guest's ring fills, and the other way goes on."""
    guest, host = bench.both(which)
    host.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    data = os.urandom(2_000_000)
    guest.send(data)
    bench.sockets.run_until(lambda: bench.status["kept"] > HIGH, "the bytes that are kept")
    host.sendall(b"the other way")
    bench.sockets.run_until(lambda: guest.got == b"the other way", "the other way")
    before = bench.status
    assert before["kept"] <= HIGH + hvsock.MAX_DATA and guest.channel.packets_queued > 100
    turns = bench.server.on_loop(lambda: bench.server.server.session.hosts["vsock"].channels[0].counters)
    for _ in range(20):  # rounds of the server's loop: what may not happen has its turns
        bench.driver.function.barrier()
    assert bench.server.on_loop(lambda: bench.server.server.session.hosts["vsock"].channels[0].counters) == turns
    for _ in range(5):  # pauses let little in
        bench.server.command("pause")
        bench.server.command("resume")
        bench.driver.step(0.05)
    assert bench.status["kept"] <= HIGH + 7 * hvsock.MAX_DATA
    got = bytearray()
    bench.sockets.run_until(lambda: take(host, got) and len(got) == len(data), "the rest")
    assert got == data and bench.status["kept"] == 0


@pytest.mark.parametrize("which", ["guest", "host"])
def test_a_slow_guest(bench: Bench, which: str) -> None:
    """It reads nothing: its ring fills, and no more is read from the host's program."""
    guest, host = bench.both(which)
    guest.reading = False
    data = os.urandom(2_000_000)
    sent = 0

    def blocked() -> bool:
        nonlocal sent
        try:
            while True:
                sent += host.send(data[sent : sent + 10_000])
        except BlockingIOError:
            return bench.status["to_guest"] > RING_PAGES * 4096 - 2 * CHUNK
        return False

    bench.sockets.run_until(blocked, "that the program waits")
    assert sent < 1_000_000
    guest.send(b"the other way")
    got = bytearray()
    bench.sockets.run_until(lambda: take(host, got) and got == b"the other way", "the other way")
    assert bench.status["to_guest"] <= RING_PAGES * 4096 + 2 * CHUNK
    guest.read_on()

    def rest() -> bool:
        nonlocal sent
        try:
            while sent < len(data):
                sent += host.send(data[sent : sent + 10_000])
        except BlockingIOError:
            pass
        return len(guest.got) == len(data)

    bench.sockets.run_until(rest, "the rest")
    assert guest.got == data


def test_a_host_that_goes_away_still_has_its_last_word(bench: Bench) -> None:
    guest, host = bench.from_guest()
    host.sendall(b"last words" * 3000)
    guest.send(b"x" * 50_000)
    host.close()
    bench.sockets.run_until(lambda: guest.closed, "the RESCIND")
    assert guest.got == b"last words" * 3000
    bench.nothing_is_left()


def test_a_host_that_goes_away_and_a_guest_that_says_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmbus.providers.vsock.connection.LINGER_SECONDS", 0.2)
    guest, host = bench.from_host()
    host.close()
    bench.sockets.run_until(lambda: guest.closed, "the RESCIND")
    assert guest.fins == 1 and bench.status["lingered"] == 1
    bench.nothing_is_left()


def test_a_guest_that_closes_its_channel_by_itself(bench: Bench) -> None:
    for which in ("guest", "host"):
        guest, host = bench.both(which)
        got = bytearray()
        guest.send(b"hello")
        bench.sockets.run_until(lambda host=host, got=got: take(host, got) and got == b"hello", "the bytes")
        bench.driver.close_channel(guest.channel)
        bench.sockets.run_until(lambda host=host, got=got: not take(host, got), "the end")
    bench.nothing_is_left()


# ---- saves -----------------------------------------------------------------------------------------------------------


def test_a_restored_guest_finds_its_connections_closed(bench: Bench) -> None:
    pairs = [bench.from_guest(), bench.from_host()]
    unread = bench.from_guest()
    unread[0].reading = False
    unread[1].sendall(bytes(200_000))  # more than the ring takes
    bench.sockets.run_until(lambda: len(unread[0].got), "some bytes")
    for guest, host in pairs:
        host.sendall(b"before")
        bench.sockets.run_until(lambda guest=guest: guest.got == b"before", "some bytes")
    waiting = bench.call(4711)  # offered, and not opened
    half = bench.call(b"CONNE")
    bench.sockets.run_until(lambda: bench.status["connecting"] == 2, "those that connect")
    assert bench.restore() > 0, "what the guest had not read"
    for guest, host in [*pairs, unread]:
        bench.sockets.run_until(lambda guest=guest: guest.closed, "the RESCIND")
        bench.sockets.run_until(lambda host=host: not take(host, bytearray()), "the end at the host")
    for end in (waiting, half):
        bench.sockets.run_until(lambda end=end: not take(end, bytearray()), "the end of one that connects")
    assert not bench.driver.bus.rescinded
    bench.nothing_is_left()
    for which in ("guest", "host"):  # new ones work
        both_ways(bench, *bench.both(which), 100_000)
    bench.restore()  # with nothing open
    both_ways(bench, *bench.from_host(), 1000)


def test_a_checkpoint_leaves_the_connections_of_the_vm_that_runs_on(bench: Bench, tmp_path: Path) -> None:
    """Also one in the middle of its bytes, with both ends slow."""
    pairs = [bench.from_guest(), bench.from_host()]
    for guest, host in pairs:
        guest.reading = False
        guest.send(bytes(range(256)) * 4000)
        host.setblocking(True)
        host.sendall(b"slow" * 30_000)
        host.setblocking(False)
    bench.driver.step(0.1)
    for number in range(4):
        bench.server.command("pause")
        bench.server.command("save", path=str(tmp_path / f"state-{number}"))
        newcomer = bench.call() if not number else None  # while the device stands still
        bench.server.command("resume")
        bench.driver.step(0.02)
        if newcomer is not None:
            bench.sockets.run_until(lambda: bench.sockets.seen == 3, "its offer")
    for guest, host in pairs:
        guest.read_on()
        got = bytearray()
        bench.sockets.run_until(
            lambda guest=guest, host=host, got=got: (
                take(host, got) and len(guest.got) == 120_000 and len(got) == 1_024_000
            ),
            "all bytes",
        )
        assert guest.got == b"slow" * 30_000 and got == bytes(range(256)) * 4000
        assert not guest.ended


def test_a_state_is_loaded_in_place(bench: Bench, tmp_path: Path) -> None:
    """A revert: the guest goes back to when the connection was there, and is told; the socket is there again."""
    old = bench.from_guest()
    bench.server.command("pause")
    answer = bench.server.command("save", path=str(tmp_path / "state"))
    bench.server.command("resume")
    bench.server.command("pause")
    bench.server.command("load", path=str(tmp_path / "state"), sha256=answer["sha256"])
    bench.server.command("restore-finish")
    bench.sockets.run_until(lambda: old[0].closed, "the RESCIND")
    bench.sockets.run_until(lambda: not take(old[1], bytearray()), "the end at the host")
    both_ways(bench, *bench.from_host(), 1000)
    bench.nothing_is_left()


def test_a_reset_of_the_guest(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of its connections is offered to the next driver."""
    monkeypatch.setattr("vmbus.providers.vsock.provider.GUEST_SECONDS", 1.5)
    pairs = [bench.from_guest(), bench.from_host()]
    asked = bench.sockets.request(PORT)
    bench.sockets.run_until(lambda: bench.sockets.find(asked), "an offer")
    bench.driver.close(graceful=False)
    for _, host in pairs:
        deadline = time.monotonic() + pace.seconds(10)
        while take(host, bytearray()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    bench.function = bench.server.function()
    bench.driver = VmbusDriver(bench.function)
    bench.sockets = GuestSockets(bench.driver)
    both_ways(bench, *bench.from_host(), 1000)
    bench.nothing_is_left()


def test_an_audit_an_inspection_and_a_capture_know_them(libvfio_user: Library, tmp_path: Path) -> None:
    bench = Bench(libvfio_user, tmp_path / "audit")
    try:
        bench.server.command("capture-start", path=str(tmp_path / "packets.pcapng"))
        both_ways(bench, *bench.from_host(), 50_000)
        guest, host = bench.from_guest()
        other, _ = bench.from_host()
        host.sendall(b"before the save")
        bench.sockets.run_until(lambda: guest.got, "some bytes")
        names = {one.name for one in bench.server.command("inspect")["channels"]}
        endpoint = guest.offer.interface_instance
        assert names == {
            "echo",
            f"vsock-from-{PORT}-{hvsock.peer_port(endpoint)}",
            f"vsock-to-{PORT}-{other.peer}",
        }
        bench.server.command("capture-stop")
        state = bench.server.save()
        found = inspect_state(state, Source(kind="state", name="state"))
        assert {one.name for one in found.channels if one.provider == "vsock"} == {
            f"vsock-{PORT}-{hvsock.peer_port(endpoint)}",
            f"vsock-{PORT}-{other.peer}",
        }
        bench.server.command("resume")
        bench.restore()
        bench.sockets.run_until(lambda: guest.closed and other.closed, "the RESCINDs")
        both_ways(bench, *bench.from_guest(), 50_000)
        bench.nothing_is_left()
        assert bench.recorder is not None
        bench.server.command("audit")
        bench.recorder.flush("fetched")
        bench.server.command("audit")
        report = check_paths([tmp_path / "audit"])
        assert report.clean, str(report)
        assert len(report.timeline) == 2 and report.packets > 30
    finally:
        bench.close()
    assert (tmp_path / "packets.pcapng").stat().st_size > 100_000


# ---- hostile guests --------------------------------------------------------------------------------------------------


def test_a_packet_that_is_none_costs_its_connection(bench: Bench) -> None:
    other = bench.from_host()
    guest, host = bench.from_guest()
    guest.send(b"good")
    guest.packet(hvsock.HEADER.pack(1, 9) + bytes(8))
    got = bytearray()
    bench.sockets.run_until(lambda: not take(host, got), "the end at the host")
    assert got == b"good"
    bench.sockets.run_until(lambda: guest.closed, "the RESCIND")
    assert bench.status["wrong"] == 1
    both_ways(bench, *other, 1000)
    bench.nothing_is_left()


def test_requests_of_wrong_lengths_and_for_nobody(bench: Bench) -> None:
    rejected = bench.server.on_loop(lambda: bench.server.server.device.bus.rejected)
    whole = m.encode(m.ConnectRequest(UUID(int=5), UUID(int=6)))
    for size in range(8, len(whole)):
        bench.driver.bus._post(4, whole[:size])
    assert bench.server.on_loop(lambda: bench.server.server.device.bus.rejected) == rejected + 32
    bench.driver.bus._post(4, whole + bytes(16))  # with the silo's id behind it
    key = (UUID(int=5), UUID(int=6))
    bench.sockets.run_until(lambda: bench.driver.bus.connect_results.get(key), "the refusal")
    assert bench.driver.bus.connect_results[key] == CONNECTION_REFUSED
    nil = bench.sockets.request(PORT, UUID(int=0))
    bench.sockets.run_until(lambda: bench.sockets.refused(nil, PORT), "the refusal of an endpoint that is none")
    both_ways(bench, *bench.from_guest(), 1000)


def test_a_flood_of_requests_that_are_never_opened(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmbus.providers.vsock.provider.GUEST_SECONDS", 1000.0)
    asked = [bench.sockets.request(PORT + number) for number in range(MOST_CONNECTS + 40)]
    bench.sockets.run_until(lambda: len(bench.driver.bus.connect_results) == 40, "40 refusals")
    assert bench.sockets.seen == MOST_CONNECTS
    assert bench.sockets.refused(asked[-1], PORT + MOST_CONNECTS + 39) == CONNECTION_REFUSED
    rejected = bench.server.on_loop(lambda: bench.server.server.device.bus.rejected)
    bench.sockets.request(PORT, asked[0])  # the same once more
    bench.driver.step(0.05)
    assert bench.server.on_loop(lambda: bench.server.server.device.bus.rejected) == rejected + 1
    provider = bench.server.server.providers[0]
    assert isinstance(provider, VsockProvider)
    bench.server.on_loop(lambda: [one.over() for one in list(provider._connections)])  # as if their time were up
    bench.nothing_is_left()
    both_ways(bench, *bench.from_guest(), 1000)


def test_an_endpoint_in_use(bench: Bench) -> None:
    guest, _ = bench.from_guest()
    endpoint = bench.sockets.request(PORT + 1, guest.offer.interface_instance)
    bench.sockets.run_until(lambda: bench.sockets.refused(endpoint, PORT + 1), "the refusal")
    assert not guest.closed


def test_more_connections_than_there_may_be(bench: Bench) -> None:
    """Programs of the host's wait in the queue, the guest is refused; when some end, the others have their turn."""
    bench.sockets.listening[PORT] = lambda one: None
    silent = [bench.call(b"") for _ in range(100)]
    while bench.status["connecting"] < 100:
        bench.driver.step(0.01)
    hosts = [bench.call() for _ in range(MOST_CONNECTIONS - 100)]
    bench.sockets.run_until(
        lambda: len(bench.sockets.accepted) == MOST_CONNECTIONS - 100, "as many connections as there may be", 60
    )
    one_more = bench.call()
    endpoint = bench.sockets.request(PORT)
    bench.sockets.run_until(lambda: bench.sockets.refused(endpoint, PORT), "the refusal")
    bound = bench.server.command("status")["bounds"]["vsock"]["connections"]
    assert (bound["now"], bound["most"]) == (MOST_CONNECTIONS, MOST_CONNECTIONS) and bound["reached"] >= 1
    silent[0].close()
    said = bytearray()
    bench.sockets.run_until(lambda: take(one_more, said) and said.startswith(b"OK"), "its turn")
    for end in (*hosts, *silent, one_more):
        end.close()
    for guest in bench.sockets.accepted:
        guest.until(lambda guest=guest: guest.fins, "the end")
        guest.end()
    bench.nothing_is_left()


def test_a_guest_that_releases_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmbus.providers.vsock.provider.MOST_UNRELEASED", 5)
    monkeypatch.setattr(bench.driver.bus, "release", lambda relid: None)
    for _ in range(5):
        guest = bench.sockets.connect(4711)
        bench.sockets.run_until(lambda guest=guest: guest.closed, "the RESCIND")
    endpoint = bench.sockets.request(4711)
    bench.sockets.run_until(lambda: bench.sockets.refused(endpoint, 4711), "the refusal")
    assert bench.status["unreleased"] == 5
    monkeypatch.undo()
    for relid in list(bench.driver.bus.rescinded):
        bench.driver.bus.release(relid)
    bench.sockets.run_until(lambda: not bench.status["unreleased"], "that all are released")
    both_ways(bench, *bench.from_guest(), 1000)


def test_two_providers_and_a_path_that_is_too_long(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "v.sock"
    provider = {"kind": "vsock", "name": "two", "instance": str(UUID(int=77)), "options": {"path": str(path)}}
    bench.server.command("offer", provider=provider)
    assert path.exists()
    other = {**provider, "name": "three", "instance": str(UUID(int=78))}
    with pytest.raises(UsageError, match="a socket's path may have"):
        bench.server.command("offer", provider={**other, "options": {"path": f"/tmp/{'x' * 100}"}})
    with pytest.raises(UsageError, match="not an absolute one"):
        bench.server.command("offer", provider={**other, "options": {"path": "v.sock"}})
    bench.server.command("pause")
    assert not path.exists() and bench.path.exists(), "another process may want it"
    bench.server.command("resume")
    assert path.exists()
    bench.server.command("rescind", name="two")
    assert not path.exists()


# ---- sabotage --------------------------------------------------------------------------------------------------------


def test_sabotage_without_the_rescind_something_is_left(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.server.server.session.hosts["vsock"], "remove_channel", lambda channel, gone=None: None)
    guest, host = bench.from_guest()
    guest.end()
    host.close()
    bench.sockets.run_until(lambda: guest.fins and not bench.status["connections"], "both ends")
    with pytest.raises(WaitTimeout, match="nothing is left"):
        bench.nothing_is_left(seconds=0.5)
    assert not guest.closed


def test_sabotage_a_second_fin_is_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    once = Connection._end_of_host
    monkeypatch.setattr(Connection, "_end_of_host", lambda self: (once(self), self._send(hvsock.FIN)))
    guest, host = bench.from_guest()
    host.close()
    with pytest.raises(WaitTimeout):
        bench.sockets.run_until(lambda: guest.closed and not bench.driver.failures, "the end", 0.5)
    assert "the host sent something behind its FIN" in bench.driver.failures[0]


def test_sabotage_channels_that_claim_to_survive(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("vmbus.providers.vsock.provider._FLAGS", _FLAGS & ~SERVER_FLAG_FORCE_NEW_CHANNEL)
    guest, _ = bench.from_guest()
    bench.server.command("pause")
    answer = bench.server.command("save", path=str(tmp_path / "state"))
    with pytest.raises(StateError, match="are not those of this device's providers"):
        bench.server.command("load", path=str(tmp_path / "state"), sha256=answer["sha256"])
    bench.server.command("resume")
    assert not guest.closed
