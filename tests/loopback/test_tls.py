"""Migration by TLS over real sockets: who gets in, what somebody in the middle gets, and who cannot keep others out.

The migrations here are of model VMs, whose QEMU sends its stream through the real tunnel.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support import certificates, pace
from support.migration import SECRET, ArrivingVm, LeavingVm, Pair, World
from support.model_vm import LogBroken, ModelVm
from support.pace import eventually
from support.strangers import flood
from support.wire import Wire
from vmbus.errors import VmbusError
from vmbus.operations.migration import channel as channels
from vmbus.operations.migration import listener as listeners
from vmbus.operations.migration import tunnel
from vmbus.operations.migration.accept import Accept
from vmbus.operations.migration.address import TcpAddress, UnixAddress
from vmbus.operations.migration.asking import Asking
from vmbus.operations.migration.certificates import make_host
from vmbus.operations.migration.channel import NO_SECRET, Channel, LinkLost, NotAuthentic, connect, connect_stream
from vmbus.operations.migration.listener import MAX_STRANGERS, Listener, listen
from vmbus.operations.migration.ownership import SourceStage
from vmbus.operations.migration.tls import Tls, for_destination, for_source
from vmbus.operations.migration.tunnel import Door
from vmbus.qemu.qmp import MigrationFailed
from vmbus.vm.moments import Moment

HERE = TcpAddress("127.0.0.1", 0)
MARKER = b"what the guest has in its memory"
MEMORY = MARKER * 80_000  # more than waits anywhere on its way


@pytest.fixture(scope="session", autouse=True)
def pki(tmp_path_factory: pytest.TempPathFactory) -> None:
    certificates.folder = tmp_path_factory.mktemp("pki")


@contextlib.asynccontextmanager
async def listening(tls: Tls, secret: bytes = NO_SECRET) -> AsyncIterator[tuple[Listener, asyncio.Queue[Channel]]]:
    arrived: asyncio.Queue[Channel] = asyncio.Queue()
    listener = await listen(HERE, secret, tls)
    listener.serve(arrived.put)
    try:
        yield listener, arrived
    finally:
        listener.close()
        listener.close_door()
        while not arrived.empty():
            arrived.get_nowait().abort()


# --- model VMs with streams -------------------------------------------------------------------------------------------


class Leaving(LeavingVm):
    """Its QEMU sends memory over one connection, or over some more."""

    connections = 1
    cut_off = False

    @property
    def tunnel_socket(self) -> Path:
        assert self.folder is not None
        return self.folder / "tunnel.sock"

    async def perform(self, command: str, given: dict[str, Any]) -> Any:
        if command == "migrate":
            address = given["channels"][0]["addr"]
            assert address["type"] == "unix"
            self.sending = [asyncio.create_task(self._send(address["path"])) for _ in range(self.connections)]
        # That the destination has it all is not for the source to say here.
        return await (ModelVm.perform if command == "migrate-continue" else LeavingVm.perform)(self, command, given)

    async def _send(self, path: str) -> None:
        _, writer = await asyncio.open_unix_connection(path)
        try:
            writer.write(MEMORY)
            await writer.drain()
        except OSError:
            self.cut_off = True
        writer.close()


class Arriving(ArrivingVm):
    """Its QEMU takes what comes."""

    def __init__(self, world: World, folder: Path) -> None:
        super().__init__(world, folder)
        self.memory = bytearray()
        self.came = 0
        self.servers: list[asyncio.Server] = []

    async def start(self, phases: Any, multifd: int) -> int | str:
        path = str(await super().start(phases, multifd))
        Path(path).unlink(missing_ok=True)  # noqa: ASYNC240 - a test's file
        self.servers.append(await asyncio.start_unix_server(self._take, path))
        return path

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.came += 1
        while data := await reader.read(1 << 16):
            self.memory += data
        writer.close()
        if len(self.memory) >= len(MEMORY):
            self.world.stream.set()

    async def discard(self) -> None:
        await super().discard()
        self.close()

    def close(self) -> None:
        for server in self.servers:
            server.close()


@contextlib.asynccontextmanager
async def pair(
    folder: Path,
    source: Tls,
    destination: Tls,
    *,
    secret: bytes = NO_SECRET,
    address: TcpAddress | None = None,
    listener: Listener | None = None,
    **options: Any,
) -> AsyncIterator[Pair]:
    folder.mkdir(exist_ok=True)  # noqa: ASYNC240 - a test's folder
    listener = listener or await listen(HERE, secret, destination)
    both = Pair(
        folder, listener, address=address, secret=secret, tls=source, leaving=Leaving, arriving=Arriving, **options
    )
    try:
        yield both
    finally:
        listener.close()
        assert isinstance(both.arriving, Arriving)
        both.arriving.close()
        assert not both.world.both, "the VM ran on both sides at once"
        assert not both.leaving.tunnel_socket.exists()  # type: ignore[attr-defined]


def runs_on(both: Pair) -> None:
    assert both.world.running == {"source"} and not both.leaving.ended
    assert both.source.stage is SourceStage.KEPT
    assert both.arriving.discarded or not both.arriving.steps


async def test_a_vm_moves_by_tls_through_one_port_and_the_wire_shows_nothing(tmp_path: Path) -> None:
    wire = Wire(MARKER)
    listener = await listen(HERE, NO_SECRET, certificates.destination())
    assert isinstance(listener.address, TcpAddress)
    async with (
        wire.on(listener.address.port) as outside,
        pair(
            tmp_path, certificates.source(name="b"), certificates.destination(), listener=listener, address=outside
        ) as both,
    ):
        found = await both.migrate()
        assert found.arrived and found.report is not None, (found.problem, found.refusal)
        assert both.world.running == {"destination"}
        assert isinstance(both.arriving, Arriving) and bytes(both.arriving.memory) == MEMORY
    assert wire.connections == 2 and wire.bytes > len(MEMORY) and wire.seen == 0


async def test_a_pass_that_is_given_up_has_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[bytes] = []
    monkeypatch.setattr(
        "vmbus.operations.migration.stream.connect_stream",
        lambda address, key, *more: keys.append(key) or connect_stream(address, key, *more),
    )
    async with pair(tmp_path, certificates.source(), certificates.destination()) as both:
        both.leaving.fail["flush"] = [LogBroken("the guest took it back")]
        found = await both.migrate()
        assert found.arrived and both.arriving.starts == 2, (found.problem, found.refusal)
    assert len(set(keys)) == 2


# --- who gets in ------------------------------------------------------------------------------------------------------


async def test_both_sides_know_each_other_by_name() -> None:
    async with listening(certificates.destination()) as (listener, arrived):
        client = await connect(listener.address, NO_SECRET, 10, certificates.source())
        server = await asyncio.wait_for(arrived.get(), pace.seconds(10))
        assert client.peer is not None and server.peer is not None
        assert client.peer.names == {"b", "127.0.0.1"} and server.peer.names == {"a", "127.0.0.1"}
        await client.send(bytes(1 << 20))
        assert await server.receive() == bytes(1 << 20)
        client.close()
        with pytest.raises(LinkLost, match="closed the connection"):
            await server.receive()


async def test_a_unix_address_says_whose_certificate_it_is(tmp_path: Path) -> None:
    listener = await listen(UnixAddress(str(tmp_path / "m.sock")), NO_SECRET, certificates.destination())
    with pytest.raises(VmbusError, match="--tls-name"):
        await connect(listener.address, NO_SECRET, 10, certificates.source())
    (await connect(listener.address, NO_SECRET, 10, certificates.source(name="b"))).abort()
    listener.close()


def without_certificate() -> Tls:
    tls = certificates.source()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certificates.authority("ours") / "ca-cert.pem")
    return Tls(context, tls.fingerprint, False)


def trusting(tls: Tls) -> Tls:
    """One that takes every destination, so that it is the destination that has to refuse."""
    tls.context.check_hostname = False
    tls.context.verify_mode = ssl.CERT_NONE
    tls.context.load_verify_locations(certificates.authority("ours") / "ca-cert.pem")
    return tls


@pytest.mark.parametrize("stranger", ["no certificate", "another CA", "expired"])
async def test_a_source_without_a_good_certificate_does_not_get_in(stranger: str, tmp_path: Path) -> None:
    tls = {
        "no certificate": without_certificate,
        "another CA": lambda: trusting(certificates.source(of="theirs")),
        "expired": lambda: for_source(certificates.expired(tmp_path, "client")),
    }[stranger]()
    async with listening(certificates.destination(), SECRET) as (listener, arrived):
        with pytest.raises(LinkLost):  # although it has the secret
            await connect(listener.address, SECRET, 10, tls)
        await eventually(lambda: bool(listener.refused), "a refusal", 10)
        assert arrived.empty() and "shows no certificate that counts here" in listener.last_refusal
        (await connect(listener.address, SECRET, 10, certificates.source())).abort()


@pytest.mark.parametrize("imposter", ["another CA", "another host", "expired"])
async def test_a_destination_without_a_good_certificate_learns_nothing(imposter: str, tmp_path: Path) -> None:
    destination, name = certificates.destination(), None
    if imposter == "another CA":
        destination = certificates.destination(of="theirs")
    elif imposter == "another host":
        name = "c"
    else:
        destination = for_destination(certificates.expired(tmp_path, "server"))
    async with pair(tmp_path / "vms", certificates.source(name=name), destination) as both:
        receiving = asyncio.create_task(both.destination.run(30))
        with pytest.raises(VmbusError, match="shows a certificate that does not count"):
            await both.source.run()
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        runs_on(both)
        assert both.arriving.steps == []


async def test_a_certificate_that_was_revoked_does_not_get_in(tmp_path: Path) -> None:
    tls = for_destination(certificates.revoking(tmp_path, "a", "client"))
    async with listening(tls) as (listener, _):
        with pytest.raises(LinkLost):
            await connect(listener.address, NO_SECRET, 10, certificates.source("a"))
        await eventually(lambda: bool(listener.refused), "a refusal", 10)
        assert "certificate revoked" in listener.last_refusal
        (await connect(listener.address, NO_SECRET, 10, certificates.source("b"))).abort()


async def test_with_a_secret_both_are_needed() -> None:
    async with listening(certificates.destination(), SECRET) as (listener, arrived):
        for secret, tls in ((NO_SECRET, certificates.source()), (SECRET, None)):
            with pytest.raises(LinkLost):
                await connect(listener.address, secret, 10, tls)
        assert arrived.empty()
        (await connect(listener.address, SECRET, 10, certificates.source())).abort()


async def test_sides_that_disagree_about_tls_say_so() -> None:
    plain = await listen(HERE, SECRET)
    with pytest.raises(LinkLost, match="does it use --tls"):
        await connect(plain.address, SECRET, 10, certificates.source())
    plain.close()


async def test_a_peer_that_is_not_named_is_told_so(tmp_path: Path) -> None:
    async with pair(tmp_path, certificates.source("a"), certificates.destination(peers=("c", "D"))) as both:
        receiving = asyncio.create_task(both.destination.run(30))
        with pytest.raises(VmbusError, match=r"127.0.0.1, a may not send a VM here, only c, d \(--peer\)"):
            await both.source.run()
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        runs_on(both)
    async with pair(tmp_path, certificates.source("a"), certificates.destination(peers=("A",))) as both:
        assert (await both.migrate()).arrived


async def test_what_is_not_accepted_is_refused_before_anything_starts(tmp_path: Path) -> None:
    async with pair(
        tmp_path, certificates.source(), certificates.destination(), accept=Accept(["debian", "disk:*"])
    ) as both:
        found = await both.migrate()
        assert "VM 'demo', which is not accepted here" in str(found.problem)
        runs_on(both)
        assert both.arriving.steps == [] and both.boot_files == []


async def test_another_host_that_asks_about_a_migration_does_not_call_it_off(tmp_path: Path) -> None:
    answers: list[str] = []

    async def ask(moment: Moment) -> None:
        if moment is Moment.RAM_COPY:
            for host in ("b", "a"):
                asking = Asking(
                    both.source.migration, both.listener.address, NO_SECRET, certificates.source(host), silence=None,
                    timeout=5,
                )  # fmt: skip
                asking.destination = both.source._asking.destination
                with contextlib.suppress(VmbusError):
                    answers.append((await asking.once()).fate)
                answers.append("lives" if not both.arriving.discarded else "called off")

    async with pair(tmp_path, certificates.source("a"), certificates.destination(), source_at=ask) as both:
        assert not (await both.migrate()).arrived
        assert both.arriving.discarded, "its own source's question does"
    assert answers == ["undecided", "lives"]


# --- somebody in the middle -------------------------------------------------------------------------------------------


async def swapped(folder: Path, host: str = "b") -> tuple[SimpleNamespace, Pair, Pair]:
    """A migration whose stream somebody leads to another destination of the same CA, host and secret, where a migration
    of the same source's waits for its stream, too."""
    first = await listen(HERE, SECRET, certificates.destination())
    other = await listen(HERE, SECRET, certificates.destination(host))
    assert isinstance(first.address, TcpAddress) and isinstance(other.address, TcpAddress)
    wire = Wire(MARKER, [first.address.port, other.address.port])
    waiting = asyncio.Event()

    async def hold(moment: Any) -> None:
        if moment.name == "RAM_COPY":
            waiting.set()
            await asyncio.Event().wait()

    async with (
        wire.on(0) as outside,
        pair(
            folder / "one", certificates.source(name="b"), certificates.destination(), secret=SECRET, listener=first,
            address=outside,
        ) as one,
        pair(
            folder / "two", certificates.source(name=host), certificates.destination(), secret=SECRET, listener=other,
            source_at=None, destination_at=hold,
        ) as two,
    ):  # fmt: skip
        two.leaving.connections = 0  # type: ignore[attr-defined]
        going = asyncio.create_task(two.migrate())
        await waiting.wait()
        leaving = asyncio.create_task(one.migrate())
        try:
            assert isinstance(two.arriving, Arriving)
            memory = two.arriving.memory
            await eventually(lambda: leaving.done() or len(memory) == len(MEMORY), "its end, or another one's", 20)
        finally:
            leaving.cancel()
            found = await leaving
            going.cancel()
            await asyncio.gather(going, return_exceptions=True)
            two.listener.close_door()
    return found, one, two


@pytest.fixture
def qemu_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU that is cut off fails its migration."""

    async def wait_migration(self: Leaving, wanted: Any, timeout: float, what: str) -> str:
        if self.sending:
            await asyncio.wait(self.sending)
        if self.cut_off:
            self.migration = "failed"
            raise MigrationFailed(f"{what}: broken pipe")
        return await LeavingVm.wait_migration(self, wanted, timeout, what)

    monkeypatch.setattr(Leaving, "wait_migration", wait_migration)


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("b", "does not know this migration: somebody is between us"),
        ("a", "somebody is between them|Hostname mism"),
    ],
)
async def test_a_stream_that_is_led_to_another_destination_of_the_same_ca_and_secret_gets_nowhere(
    tmp_path: Path, qemu_notices: None, host: str, reason: str
) -> None:
    found, one, two = await swapped(tmp_path, host)
    assert re.search(reason, str(found.problem)), found.problem
    runs_on(one)
    assert isinstance(two.arriving, Arriving) and two.arriving.came == 0 and not two.arriving.memory


async def test_sabotage_streams_without_a_key_of_their_own_would_be_swapped(
    tmp_path: Path, qemu_notices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel.secrets, "token_bytes", bytes)
    _, _, two = await swapped(tmp_path)
    assert isinstance(two.arriving, Arriving) and bytes(two.arriving.memory) == MEMORY


class Relay:
    """Somebody in the middle with certificates of the CA, for the same names: TLS ends with him, and begins anew."""

    def __init__(self, place: Path) -> None:
        self._server_side, self._client_side = for_destination(place), for_source(place)
        self.heard = bytearray()

    async def start(self, to: TcpAddress) -> TcpAddress:
        self._to = to
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._server_side.context)
        return TcpAddress("127.0.0.1", self._server.sockets[0].getsockname()[1])

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        context = self._client_side.context
        there = await asyncio.open_connection(self._to.host, self._to.port, ssl=context, server_hostname=self._to.host)

        async def one_way(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(1 << 16):
                    self.heard += data
                    sink.write(data)
            sink.close()

        await asyncio.gather(one_way(reader, there[1]), one_way(there[0], writer))

    def stop(self) -> None:
        self._server.close()


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "sabotage: not bound"])
async def test_a_secret_is_of_no_use_to_somebody_in_the_middle_with_certificates_of_the_ca(
    bound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pki = certificates.authority("ours")
    place = pki / "m" if (pki / "m").exists() else make_host(pki, "m", ["127.0.0.1", "a", "b"])
    if not bound:
        monkeypatch.setattr(Tls, "binding", lambda *_: b"")
    relay = Relay(place)
    async with listening(certificates.destination(), SECRET) as (listener, arrived):
        assert isinstance(listener.address, TcpAddress)
        address = await relay.start(listener.address)
        if bound:
            with pytest.raises(NotAuthentic, match="does not know our secret"):
                await connect(address, SECRET, 10, certificates.source())
            assert arrived.empty()
        else:
            client = await connect(address, SECRET, 10, certificates.source())
            server = await asyncio.wait_for(arrived.get(), pace.seconds(10))
            await client.send(MARKER)
            assert await server.receive() == MARKER and MARKER in relay.heard
            client.abort()
            server.abort()
        relay.stop()


async def test_a_recorded_handshake_cannot_be_played_again() -> None:
    async with listening(certificates.destination()) as (listener, arrived):
        assert isinstance(listener.address, TcpAddress)
        wire = Wire(MARKER)
        wire.record = True
        async with wire.on(listener.address.port) as outside:
            client = await connect(outside, NO_SECRET, 10, certificates.source(name="b"))
            await client.send(b"once")
            server = await asyncio.wait_for(arrived.get(), pace.seconds(10))
            assert await server.receive() == b"once"
            client.abort()
            server.abort()
        _, writer = await asyncio.open_connection(listener.address.host, listener.address.port)
        writer.write(wire.recorded[0])
        await eventually(lambda: bool(listener.refused), "a refusal", 10)
        assert arrived.empty() and len(wire.recorded[0]) > 500
        writer.close()


async def test_the_key_of_a_stream_is_good_for_its_pass_and_its_peer_and_its_connections(tmp_path: Path) -> None:
    path = tmp_path / "qemu.sock"
    came: list[asyncio.StreamWriter] = []
    qemu = await asyncio.start_unix_server(lambda _, writer: came.append(writer), str(path))
    async with listening(certificates.destination()) as (listener, arrived):
        ours, others = certificates.source("a"), certificates.source("b")
        client = await connect(listener.address, NO_SECRET, 10, ours)
        server = await asyncio.wait_for(arrived.get(), pace.seconds(10))
        assert client.peer is not None
        door = listener.door = Door(path, server.peer, 2)

        async def refused(key: bytes, tls: Tls, reason: str) -> None:
            before = listener.refused
            with contextlib.suppress(LinkLost):
                reader, writer = await connect_stream(listener.address, key, tls, client.peer)  # type: ignore[arg-type]
                with contextlib.suppress(OSError):
                    assert await asyncio.wait_for(reader.read(1), pace.seconds(10)) == b""
                writer.close()
            await eventually(lambda: listener.refused > before, "a refusal", 10)
            assert reason in listener.last_refusal, listener.last_refusal

        await refused(bytes(32), ours, "hung up before it had proved itself")
        await refused(door.key, others, "brings memory of a VM that 127.0.0.1, a sends")
        streams = [await connect_stream(listener.address, door.key, ours, client.peer) for _ in range(2)]
        await refused(door.key, ours, "over more than 2 connections")
        await eventually(lambda: len(came) == 2, "both connections", 10)
        listener.close_door()
        await refused(door.key, ours, "brings memory, and no migration waits for it here")
        for reader, writer in streams:
            with contextlib.suppress(OSError):
                assert await asyncio.wait_for(reader.read(1), pace.seconds(10)) == b""
            writer.close()
        client.abort()
        server.abort()
    qemu.close()
    for writer in came:
        writer.close()


async def test_the_bandwidth_holds_over_all_connections_until_the_guest_stands(tmp_path: Path) -> None:
    took = 0

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal took
        while data := await reader.read(1 << 16):
            took += len(data)
        writer.close()

    async def send() -> None:
        _, writer = await asyncio.open_unix_connection(str(tmp_path / "in"))
        writer.write(bytes(4 << 20))
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()

    qemu = await asyncio.start_unix_server(take, str(tmp_path / "out"))
    async with listening(certificates.destination()) as (listener, arrived):
        ours = certificates.source()
        client = await connect(listener.address, NO_SECRET, 10, ours)
        server = await asyncio.wait_for(arrived.get(), pace.seconds(10))
        door = listener.door = Door(tmp_path / "out", server.peer, 3)
        assert client.peer is not None
        dial = functools.partial(connect_stream, listener.address, door.key, ours, client.peer)
        way = tunnel.Tunnel(tmp_path / "in", dial, 3, bandwidth=64 << 10)
        await way.open()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        sending = [asyncio.create_task(send()) for _ in range(3)]
        await eventually(lambda: took > 0, "the first bytes", 10)
        while loop.time() - begun < 1:
            await asyncio.sleep(0.05)
            assert took <= (loop.time() - begun) * (64 << 10) + 9 * tunnel.PIECE  # what came before it was connected
        way.rate.lift()
        await eventually(lambda: took == 12 << 20, "the rest, at once", 10)
        await asyncio.gather(*sending)
        way.close()
        client.abort()
        server.abort()
    qemu.close()


async def test_what_was_sent_before_the_end_arrives_however_late_it_is_read() -> None:
    ours, theirs = [socket.socketpair(socket.AF_UNIX) for _ in range(2)]
    theirs[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    left, right = [await asyncio.open_connection(sock=one) for one in (ours[1], theirs[1])]
    carrying = asyncio.create_task(tunnel._both_ways(left, right, tunnel.Rate(None)))
    _, sender = await asyncio.open_connection(sock=ours[0])
    sent = MARKER * 1500  # more than the system keeps of it
    sender.write(sent)
    sender.close()
    await sender.wait_closed()
    await eventually(lambda: left[1].transport.is_closing() or right[1].transport.is_closing(), "its end", 10)
    reader, writer = await asyncio.open_connection(sock=theirs[0])
    assert await asyncio.wait_for(reader.read(-1), pace.seconds(10)) == sent
    await asyncio.wait_for(carrying, pace.seconds(10))
    writer.close()


# --- strangers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("say", [b"", b"\x16\x03\x01\x02\x00"], ids=["silent", "half a handshake"])
async def test_a_flood_of_strangers_keeps_neither_source_nor_stream_out(say: bytes, tmp_path: Path) -> None:
    listener = await listen(HERE, NO_SECRET, certificates.destination())
    assert isinstance(listener.address, TcpAddress)
    place = listener.address.host, listener.address.port
    async with (
        flood(place, MAX_STRANGERS + 16, say),
        pair(tmp_path, certificates.source(), certificates.destination(), listener=listener) as both,
    ):
        found = await both.migrate()
        assert found.arrived, (found.problem, found.refusal)
        assert len(listener._strangers) <= MAX_STRANGERS


@pytest.mark.parametrize("how", ["silent", "drop by drop", "silent after its certificate"])
async def test_a_handshake_has_its_time(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = pace.seconds(0.5)
    monkeypatch.setattr(channels, "HANDSHAKE_TIMEOUT", bound)
    async with listening(certificates.destination()) as (listener, _):
        assert isinstance(listener.address, TcpAddress)
        place = listener.address.host, listener.address.port
        options: dict[str, Any] = {}
        if how == "silent after its certificate":
            options = {"ssl": certificates.source().context, "server_hostname": "127.0.0.1"}
        _, writer = await asyncio.open_connection(*place, **options)
        begun = asyncio.get_running_loop().time()
        while not listener.refused:
            if how == "drop by drop":
                with contextlib.suppress(OSError):
                    writer.write(b"\x16\x03\x01\x02\x00"[:1])
            await asyncio.sleep(0.02)
        assert asyncio.get_running_loop().time() - begun < bound + pace.seconds(5)
        assert "did not prove itself in time" in listener.last_refusal or how == "drop by drop"
        assert not listener._strangers
        await eventually(lambda: not listener._tasks, "nothing to be left of it", 5)
        writer.close()


async def test_without_descriptors_it_waits_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "_REST", 0.05)
    async with listening(certificates.destination()) as (listener, _):
        one = listener._sockets[0]

        class Full:
            def __init__(self) -> None:
                self.left = 3

            def accept(self) -> Any:
                self.left -= 1
                raise OSError(24, "too many open files")

            def fileno(self) -> int:
                return one.fileno()

        full = Full()
        listener._sockets.append(full)  # type: ignore[arg-type]
        listener._knock(full)  # type: ignore[arg-type]
        listener._sockets.remove(full)  # type: ignore[arg-type]
        asyncio.get_running_loop().call_later(0.05, listener._look_at, one)
        (await connect(listener.address, NO_SECRET, 10, certificates.source())).abort()


async def test_a_key_that_is_not_the_owners_alone_is_refused(tmp_path: Path) -> None:
    for file in (certificates.authority("ours") / "a").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / file.name).chmod(0o644)
    with pytest.raises(VmbusError, match="chmod 600"):
        for_source(tmp_path)
    (tmp_path / "client-key.pem").chmod(0o600)
    for_source(tmp_path)
    (tmp_path / "client-key.pem").write_bytes((tmp_path / "server-key.pem").read_bytes())
    with pytest.raises(VmbusError, match="cannot be used"):
        for_source(tmp_path)
    (tmp_path / "client-cert.pem").write_text("nothing")
    with pytest.raises(VmbusError, match="cannot be used"):
        for_source(tmp_path)
    (tmp_path / "ca-cert.pem").unlink()
    with pytest.raises(VmbusError, match="cannot read the certificates"):
        for_source(tmp_path)


async def test_nobody_needs_a_secret_that_is_none() -> None:
    with pytest.raises(VmbusError, match="or certificates"):
        await listen(HERE, NO_SECRET)
    with pytest.raises(VmbusError, match="or certificates"):
        await connect(HERE, NO_SECRET)
    assert NotAuthentic("x").status
