"""The channel of a live migration over real sockets, with somebody in the middle who changes, repeats and cuts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from support import pace
from support.strangers import flood
from vmbus.errors import EnvironmentProblem, UsageError, WaitTimeout
from vmbus.operations.migration import channel as channels
from vmbus.operations.migration import link as links
from vmbus.operations.migration.address import Address, TcpAddress, UnixAddress, parse_address
from vmbus.operations.migration.channel import (
    MAX_FRAME,
    PROOF_BYTES,
    Channel,
    LinkLost,
    NotAuthentic,
    connect,
    read_secret,
)
from vmbus.operations.migration.link import Link, PeerFailed, Silence
from vmbus.operations.migration.listener import MAX_STRANGERS, Listener, listen
from vmbus.operations.migration.messages import Again, Go, Ping, Running, Sent, encode

SECRET = bytes(range(32))
OTHER = bytes(reversed(range(32)))
HELLO = 42
CUT = b"cut here"
"""Instead of a frame: the connection ends."""


class Ends:
    """Both ends of a channel. `close` ends everything that belongs to it."""

    def __init__(self, client: Channel, server: Channel) -> None:
        self.client = client
        self.server = server


@contextlib.asynccontextmanager
async def listening(address: Address, secret: bytes = SECRET) -> AsyncIterator[tuple[Listener, asyncio.Queue[Channel]]]:
    arrived: asyncio.Queue[Channel] = asyncio.Queue()
    listener = await listen(address, secret)
    listener.serve(arrived.put)
    try:
        yield listener, arrived
    finally:
        listener.close()
        while not arrived.empty():
            arrived.get_nowait().close()


@contextlib.asynccontextmanager
async def ends(address: Address, through: Middle | None = None) -> AsyncIterator[Ends]:
    async with listening(address) as (listener, arrived):
        if through is not None:
            await through.start(listener.address)
        client = await connect(through.address if through is not None else listener.address, SECRET)
        server = await asyncio.wait_for(arrived.get(), pace.seconds(10))
        try:
            yield Ends(client, server)
        finally:
            client.abort()
            server.abort()
            if through is not None:
                await through.stop()


class Middle:
    """Somebody on the wire: lets the opening pass, then does as it likes with the frames from the client.

    `edit` is given each frame with its number and returns what goes on instead.
    """

    def __init__(self, edit: Callable[[int, bytes], list[bytes]]) -> None:
        self._edit = edit
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.address = TcpAddress("127.0.0.1", 0)
        self.recorded = b""
        self.cut = asyncio.Event()

    async def start(self, target: Address) -> None:
        assert isinstance(target, TcpAddress)
        self._target = target
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = TcpAddress("127.0.0.1", self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(self._target.host, self._target.port)
        self._writers += [writer, up_writer]
        for work in (self._up(reader, up_writer), self._down(up_reader, writer)):
            self._tasks.append(asyncio.create_task(work))

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for size in (HELLO, PROOF_BYTES):
            data = await reader.readexactly(size)
            self.recorded += data
            writer.write(data)
        number = 0
        while True:
            head = await reader.readexactly(4)
            frame = head + await reader.readexactly(struct.unpack(">I", head)[0] + PROOF_BYTES)
            self.recorded += frame
            for piece in self._edit(number, frame):
                if piece is CUT:
                    writer.close()
                    return
                writer.write(piece)
            number += 1

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self.cut.is_set():
                await asyncio.sleep(3600)
            writer.write(data)


def address(kind: str, folder: Path) -> Address:
    return UnixAddress(str(folder / "c.sock")) if kind == "unix" else TcpAddress("127.0.0.1", 0)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_frames_arrive_whole_and_in_order(tmp_path: Path, kind: str) -> None:
    frames = [b"", b"x", bytes(1000), bytes(range(256)) * (MAX_FRAME // 256)]

    async def send_all(sender: Channel, frames: list[bytes]) -> None:
        for frame in frames:
            await sender.send(frame)

    async with ends(address(kind, tmp_path)) as both:
        host = "127.0.0.1" if kind == "tcp" else None
        assert both.client.remote_host == both.server.local_host == host
        for sender, receiver in ((both.client, both.server), (both.server, both.client)):
            sending = asyncio.create_task(send_all(sender, frames))
            for frame in frames:
                same = await receiver.receive() == frame
                assert same, len(frame)
            await sending
        if kind == "unix":
            assert (tmp_path / "c.sock").stat().st_mode & 0o777 == 0o600


async def test_the_end_of_a_connection() -> None:
    async with ends(TcpAddress("127.0.0.1", 0)) as both:
        await both.client.send(b"last words")
        both.client.close()
        assert await both.server.receive() == b"last words"
        with pytest.raises(LinkLost, match=r"closed the connection$"):
            await both.server.receive()
        with pytest.raises(LinkLost):
            for _ in range(100):  # the first writes go into a socket that nobody reads
                await both.server.send(bytes(65536))


def flip(index: int) -> Callable[[int, bytes], list[bytes]]:
    def edit(number: int, frame: bytes) -> list[bytes]:
        changed = bytearray(frame)
        changed[index] ^= 1
        return [bytes(changed)] if number == 1 else [frame]

    return edit


def repeat(number: int, frame: bytes) -> list[bytes]:
    return [frame, frame] if number == 1 else [frame]


def leave_out(number: int, frame: bytes) -> list[bytes]:
    return [] if number == 1 else [frame]


def swap() -> Callable[[int, bytes], list[bytes]]:
    kept: list[bytes] = []

    def edit(number: int, frame: bytes) -> list[bytes]:
        if number == 1:
            kept.append(frame)
            return []
        return [frame, *kept] if number == 2 else [frame]

    return edit


def add(number: int, frame: bytes) -> list[bytes]:
    return [frame, struct.pack(">I", 5) + b"hello" + bytes(PROOF_BYTES)] if number == 1 else [frame]


# The length's low byte: the frame is taken for one byte longer or shorter, and the next one's first byte goes with it.
DAMAGE = {
    "length": flip(3),
    "first byte": flip(4),
    "last byte": flip(-PROOF_BYTES - 1),
    "mark": flip(-1),
    "repeated": repeat,
    "left out": leave_out,
    "swapped": swap(),
    "added": add,
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_frame_that_is_not_as_it_was_sent_ends_the_connection(damage: str) -> None:
    async with ends(TcpAddress("127.0.0.1", 0), Middle(DAMAGE[damage])) as both:
        frames = [b"frame %d" % number for number in range(4)]
        for frame in frames:
            await both.client.send(frame)
        taken = []
        with pytest.raises(NotAuthentic, match=r"not authentic: it was changed, repeated or moved"):
            while True:
                taken.append(await both.server.receive())
        assert taken == frames[: len(taken)] and len(taken) in (1, 2)
        with pytest.raises(LinkLost, match="has ended"):  # whatever may wait behind it
            await both.server.receive()


async def test_a_frame_of_one_direction_is_none_of_the_other() -> None:
    async with ends(TcpAddress("127.0.0.1", 0)) as both:
        both.client._send_key = both.client._receive_key  # as if the server's own frames came back to it
        await both.client.send(b"mirror")
        with pytest.raises(NotAuthentic):
            await both.server.receive()


@pytest.mark.parametrize("kept", [1, 4, 10, -1])
async def test_a_frame_that_is_cut_short(kept: int) -> None:
    def cut(number: int, frame: bytes) -> list[bytes]:
        return [frame] if number == 0 else [frame[:kept], CUT]

    async with ends(TcpAddress("127.0.0.1", 0), Middle(cut)) as both:
        await both.client.send(b"whole frame")
        await both.client.send(b"another")
        assert await both.server.receive() == b"whole frame"
        with pytest.raises(LinkLost, match="closed the connection in the middle of a frame"):
            await both.server.receive()


async def test_a_frame_too_large_is_not_read() -> None:
    def grow(number: int, frame: bytes) -> list[bytes]:
        return [struct.pack(">I", MAX_FRAME + 1)]

    async with ends(TcpAddress("127.0.0.1", 0), Middle(grow)) as both:
        await both.client.send(b"x")
        with pytest.raises(NotAuthentic, match=f"a frame of {MAX_FRAME + 1} bytes"):
            await both.server.receive()
        with pytest.raises(UsageError, match="too large"):
            await both.client.send(bytes(MAX_FRAME + 1))


async def test_a_recorded_connection_cannot_be_played_again() -> None:
    middle = Middle(lambda number, frame: [frame])
    async with listening(TcpAddress("127.0.0.1", 0)) as (listener, arrived):
        await middle.start(listener.address)
        client = await connect(middle.address, SECRET)
        server = await arrived.get()
        await client.send(b"Go")
        assert await server.receive() == b"Go"
        client.abort()
        server.abort()
        assert isinstance(listener.address, TcpAddress)
        reader, writer = await asyncio.open_connection(listener.address.host, listener.address.port)
        writer.write(middle.recorded)
        answer = await reader.read(-1)  # its own random bytes are others this time; then it hangs up
        assert len(answer) == HELLO + PROOF_BYTES
        writer.close()
        assert arrived.empty() and listener.refused == 1
        assert "does not know our secret" in listener.last_refusal
        await middle.stop()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_another_secret_is_noticed_by_both(tmp_path: Path, kind: str) -> None:
    async with listening(address(kind, tmp_path)) as (listener, arrived):
        with pytest.raises(NotAuthentic, match="does not know our secret: both sides need the same secret file"):
            await connect(listener.address, OTHER)
        client = await connect(listener.address, SECRET)  # it goes on serving those who know it
        await asyncio.wait_for(arrived.get(), pace.seconds(10))
        assert listener.refused == 1
        client.abort()


async def test_a_client_that_does_not_check_the_server_still_has_to_prove_itself() -> None:
    async with listening(TcpAddress("127.0.0.1", 0)) as (listener, arrived):
        assert isinstance(listener.address, TcpAddress)
        reader, writer = await asyncio.open_connection(listener.address.host, listener.address.port)
        writer.write(channels._HELLO.pack(channels.MAGIC, channels.VERSION, bytes(32)))
        theirs = await reader.readexactly(HELLO + PROOF_BYTES)
        writer.write(theirs[-PROOF_BYTES:])  # the server's own proof, sent back
        assert await reader.read(-1) == b""
        assert arrived.empty() and listener.refused == 1
        writer.close()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: somebody.example\r\n\r\n" + bytes(10), "is not a migration's other side"),
        (channels._HELLO.pack(channels.MAGIC, 9, bytes(32)), "speaks version 9 of the migration protocol"),
        (b"VMBUS", "hung up before it had proved itself"),
        (b"", "hung up before it had proved itself"),
    ],
)
async def test_strangers(said: bytes, reason: str) -> None:
    async with listening(TcpAddress("127.0.0.1", 0)) as (listener, arrived):
        assert isinstance(listener.address, TcpAddress)
        reader, writer = await asyncio.open_connection(listener.address.host, listener.address.port)
        writer.write(said)
        writer.write_eof()
        assert await reader.read(-1) == b""
        writer.close()
        assert arrived.empty() and listener.refused == 1 and reason in listener.last_refusal


@pytest.mark.parametrize("strangers", [8, 80])
async def test_fault_m4_fault_h11_silent_strangers_do_not_keep_the_source_out(strangers: int) -> None:
    async with listening(TcpAddress("127.0.0.1", 0)) as (listener, _):
        assert isinstance(listener.address, TcpAddress)
        place = listener.address.host, listener.address.port
        async with flood(place, strangers):
            for _ in range(12):
                (await connect(listener.address, SECRET)).abort()
            assert len(listener._strangers) <= MAX_STRANGERS


async def test_fault_m4_sabotage_with_the_oldest_kept_the_source_would_be_the_one_to_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: Listener) -> None:
        raise LinkLost("there are too many")

    monkeypatch.setattr(Listener, "_turn_one_away", refuse)

    async with listening(TcpAddress("127.0.0.1", 0)) as (listener, _):
        assert isinstance(listener.address, TcpAddress)
        place = listener.address.host, listener.address.port
        silent = [await asyncio.open_connection(*place) for _ in range(MAX_STRANGERS)]
        with pytest.raises(LinkLost, match="hung up"):
            await connect(listener.address, SECRET)
        for _, writer in silent:
            writer.close()


async def test_a_stranger_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "HANDSHAKE_TIMEOUT", 0.2)

    async with listening(TcpAddress("127.0.0.1", 0)) as (listener, _):
        assert isinstance(listener.address, TcpAddress)
        reader, writer = await asyncio.open_connection(listener.address.host, listener.address.port)
        assert await asyncio.wait_for(reader.read(-1), pace.seconds(5)) == b""
        writer.close()
        assert listener.refused == 1 and "did not prove itself in time" in listener.last_refusal


async def test_fault_m4_the_address_that_has_most_connections_loses_one() -> None:
    """A flood from one host does not push out the slow connection of another."""

    listener = await listen(TcpAddress("127.0.0.1", 0), SECRET)
    tasks = [asyncio.create_task(asyncio.sleep(60)) for _ in range(4)]
    for task, name in zip(tasks, ("quiet", "flood", "flood", "other"), strict=True):
        listener._strangers[task] = name
    listener._turn_one_away()
    await asyncio.sleep(0)
    assert [task.cancelled() or bool(task.cancelling()) for task in tasks] == [False, True, False, False]
    for task in tasks:
        task.cancel()
    listener.close()


async def test_fault_m4_a_peer_that_says_ping_and_reads_nothing_is_gone_in_time() -> None:
    async with ends(TcpAddress("127.0.0.1", 0)) as both:

        async def ping_only() -> None:
            while True:
                await both.server.send(encode(Ping()))
                await asyncio.sleep(0.1)

        both.client._writer.transport.set_write_buffer_limits(high=1 << 16)  # type: ignore[attr-defined]
        pings = asyncio.create_task(ping_only())
        async with Link(both.client, silence=1.0) as link:
            with pytest.raises(LinkLost, match=r"has taken nothing for 1 s"):
                async with link.watch():
                    while True:
                        await link.send(Again(reason="x" * 60_000))
            assert link.failure.done()
        pings.cancel()
        await asyncio.gather(pings, return_exceptions=True)


@pytest.mark.parametrize(("chosen", "seconds"), [(None, 0.6), (0.3, 0.3)])
async def test_how_long_the_other_side_may_be_silent_follows_the_machine(
    monkeypatch: pytest.MonkeyPatch, chosen: float | None, seconds: float
) -> None:
    monkeypatch.setenv("VMBUS_PATIENCE", "3")
    monkeypatch.setattr("vmbus.operations.migration.link.SILENCE", 0.2)

    async with ends(TcpAddress("127.0.0.1", 0)) as both, Link(both.client, silence=chosen) as link:
        error = await asyncio.wait_for(link.failure, 10)
        assert isinstance(error, Silence) and f"for {seconds:g} s" in str(error)


async def test_a_server_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConnectionRefusedError):
        await connect(UnixAddress(str(tmp_path / "absent")), SECRET)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            await connect(TcpAddress("127.0.0.1", held.getsockname()[1]), SECRET)
        held.listen()
        with pytest.raises(WaitTimeout, match="to answer"):
            await connect(TcpAddress("127.0.0.1", held.getsockname()[1]), SECRET, 0.1)
        with pytest.raises(EnvironmentProblem, match="cannot listen on"):
            await listen(TcpAddress("127.0.0.1", held.getsockname()[1]), SECRET)
    with pytest.raises(EnvironmentProblem, match="cannot reach"):
        await connect(TcpAddress("no-such-host.invalid", 1), SECRET)


async def test_those_who_come_before_somebody_serves_wait(tmp_path: Path) -> None:
    listener = await listen(UnixAddress(str(tmp_path / "c.sock")), SECRET)
    client = await connect(listener.address, SECRET)
    arrived: asyncio.Queue[Channel] = asyncio.Queue()
    listener.serve(arrived.put)
    server = await asyncio.wait_for(arrived.get(), pace.seconds(10))
    listener.close()  # those who are in stay in
    await client.send(b"still there")
    assert await server.receive() == b"still there"
    client.abort()
    server.abort()


# --- secrets ----------------------------------------------------------------------------------------------------------


async def test_secrets(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.touch(mode=0o600)
    for data in (SECRET, SECRET.hex().encode(), SECRET.hex().encode() + b"\n"):
        file.write_bytes(data)
        assert read_secret(file) == SECRET
    for data in (b"", bytes(31), bytes(33), b"zz" * 32, bytes(5000)):
        file.write_bytes(data)
        with pytest.raises(UsageError, match="must have 32 bytes or 64 hexadecimal digits"):
            read_secret(file)
    file.chmod(0o640)
    with pytest.raises(UsageError, match="is open to others"):
        read_secret(file)
    with pytest.raises(UsageError, match="not a plain file"):
        read_secret(tmp_path)
    with pytest.raises(EnvironmentProblem, match="cannot read the secret"):
        read_secret(tmp_path / "absent")

    with pytest.raises(UsageError, match="a secret has 32 bytes"):
        await listen(parse_address("tcp:127.0.0.1:0"), b"short")


# --- links ------------------------------------------------------------------------------------------------------------


async def test_a_link_that_is_cut_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is closed: the bytes just stay away. Both sides send signs of life until then."""
    monkeypatch.setattr(links, "PING_INTERVAL", 0.02)

    middle = Middle(lambda number, frame: [] if middle.cut.is_set() else [frame])
    async with ends(TcpAddress("127.0.0.1", 0), middle) as both, contextlib.AsyncExitStack() as stack:
        sides = [await stack.enter_async_context(Link(one, silence=0.5)) for one in (both.client, both.server)]
        done, _ = await asyncio.wait({side.failure for side in sides}, timeout=1.5)
        assert not done  # silence, but for the signs of life
        middle.cut.set()
        for side in sides:
            with pytest.raises(LinkLost, match=r"nothing came from the .* for 0.5 s"):
                await side.expect(Go, timeout=10, what="Go")


async def test_the_other_sides_failure_interrupts_what_is_going_on() -> None:
    async with ends(TcpAddress("127.0.0.1", 0)) as both, Link(both.client) as one, Link(both.server) as other:
        cleaned = []

        async def work() -> None:
            async with one.watch():
                try:
                    await other.tell_failure("the disk is full")
                    await asyncio.sleep(30)
                finally:
                    await asyncio.sleep(0.01)  # the way back is not interrupted
                    cleaned.append(True)

        with pytest.raises(PeerFailed, match="gives up: the disk is full"):
            await work()
        assert cleaned == [True]
        current = asyncio.current_task()
        assert current is not None and current.cancelling() == 0
        with pytest.raises(PeerFailed):
            async with one.watch():
                raise AssertionError("entered with a link that has failed")


async def test_a_cancellation_from_outside_is_not_taken_for_the_links() -> None:
    async with ends(TcpAddress("127.0.0.1", 0)) as both, Link(both.client) as one, Link(both.server):

        async def work() -> None:
            async with one.watch():
                await asyncio.sleep(30)

        task = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_messages_that_do_not_belong() -> None:
    async def body(send: Callable[[Link], Awaitable[None]], message: str) -> None:
        async with ends(TcpAddress("127.0.0.1", 0)) as both, Link(both.client) as one, Link(both.server) as other:
            await send(other)
            with pytest.raises(LinkLost, match=message):
                await one.expect(Running, timeout=5, what="Running")

    await body(lambda link: link.send(Sent()), "sent Sent where Running belongs")
    await body(lambda link: link.channel.send(b"\xff"), "sent something that is no message|not understood")
    await body(lambda link: link.channel.send(b"\x81\xa4type\xa5Mummy"), "not understood")
    await body(lambda link: link.channel.send(b"\x82\xa4type\xa2Go\xa1x\x01"), "not understood")
    await body(lambda link: link.channel.send(b""), "no message")


async def test_a_message_that_does_not_come() -> None:
    async with ends(TcpAddress("127.0.0.1", 0)) as both, Link(both.client) as one, Link(both.server):
        with pytest.raises(WaitTimeout, match=r"in vain for the destination tcp:.*: the vCPUs to run"):
            await one.expect(Running, timeout=0.05, what="the vCPUs to run")


async def test_somebody_who_floods_is_not_read_further() -> None:
    async with ends(TcpAddress("127.0.0.1", 0)) as both, Link(both.client) as one:
        for _ in range(200):
            await both.server.send(encode(Sent()))
        await one.expect(Sent, timeout=5, what="one")
        assert len(one._waiting) <= 16
        for _ in range(199):
            await one.expect(Sent, timeout=5, what="the rest")


async def test_what_was_said_before_the_end_is_still_heard() -> None:
    async with ends(TcpAddress("127.0.0.1", 0)) as both, Link(both.client) as one:
        await both.server.send(encode(Running(seconds={"cont": 0.5})))
        both.server.close()
        await asyncio.wait({one.failure}, timeout=pace.seconds(5))
        assert (await one.expect(Running, timeout=5, what="Running")).seconds == {"cont": 0.5}
        with pytest.raises(LinkLost):
            await one.expect(Running, timeout=5, what="more")
