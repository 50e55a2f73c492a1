"""One connection of a socket: its states, and whatever its two ends do, in any order, with pauses in between."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vmbus.bus.local import LocalBus
from vmbus.errors import UsageError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.server import ServerChannel
from vmbus.providers.vsock.connection import CHUNK, COUNTERS, HIGH, LINGER_SECONDS, Connection
from vmbus.providers.vsock.states import GUEST_SENDS, HOST_SENDS, OPEN, TRANSITIONS, Event, State, next_state
from vmbus.providers.vsock.streams import parse_line
from vmbus.testkit.host import Clock, FakeHost
from vmbus.wire import hvsock

SERVICE, INSTANCE = hvsock.service_of(80), UUID(int=99)
RING_PAGES = 6


# ---- the table -------------------------------------------------------------------------------------------------------


def test_every_state_ends() -> None:
    assert {state for state, _ in TRANSITIONS} == set(State) - {State.ENDED}
    for state in set(State) - {State.ENDING, State.ENDED}:
        assert next_state(state, Event.OVER, "x") is State.ENDING
    with pytest.raises(UsageError, match="possible: rescinded"):
        next_state(State.ENDING, Event.OVER, "x")


def test_a_direction_ends_once_and_nothing_follows() -> None:
    """On every way through the table, there is at most one HOST_END, and the host sends nothing behind it."""

    def walk(state: State, ended: frozenset[Event]) -> int:
        assert (state in HOST_SENDS) <= (Event.HOST_END not in ended)
        assert (state in GUEST_SENDS) <= (Event.GUEST_FIN not in ended)
        if state in OPEN:
            assert (state in HOST_SENDS) is (Event.HOST_END not in ended)
            assert (state in GUEST_SENDS) is (Event.GUEST_FIN not in ended)
        ways = 0
        for (where, event), after in TRANSITIONS.items():
            if where is state:
                if event in (Event.HOST_END, Event.GUEST_FIN):
                    assert event not in ended
                    ways += walk(after, ended | {event})
                else:
                    ways += walk(after, ended)
        return ways or 1

    assert walk(State.OFFERED, frozenset()) == 6


@given(st.binary(max_size=40))
def test_any_line_is_a_port_or_none(line: bytes) -> None:
    port = parse_line(line)
    assert port is None or (0 <= port <= hvsock.MAX_PORT and line.startswith(b"CONNECT "))


@given(st.integers(0, hvsock.MAX_PORT))
def test_a_line(port: int) -> None:
    assert parse_line(b"CONNECT %d" % port) == parse_line(b"CONNECT %d\r" % port) == port


# ---- both ends -------------------------------------------------------------------------------------------------------


class Program:
    """The host's end: implements `vmbus.providers.vsock.streams.Stream`. Nothing of it is real.

    `inbox`: what it has sent and we have not read. `room`: bytes that it takes. `got`: what it has read.
    """

    fd = 77

    def __init__(self) -> None:
        self.inbox = bytearray()
        self.ended = self.gone = self.closed = False
        self.room = 1 << 30
        self.got = bytearray()
        self.heard_end = False
        self.reads = 0

    def read(self, size: int) -> bytes | None:
        assert not self.closed
        self.reads += 1
        if self.inbox:
            data = bytes(self.inbox[:size])
            del self.inbox[:size]
            return data
        return b"" if self.ended else None

    def write(self, pieces: Any) -> int | None:
        assert not self.closed and not self.heard_end and pieces
        if self.gone:
            return None
        count = 0
        for piece in pieces:
            part = piece[: self.room]
            self.got += part
            self.room -= len(part)
            count += len(part)
        return count

    def end_writing(self) -> None:
        assert not self.heard_end
        self.heard_end = True

    @property
    def hung_up(self) -> bool:
        return self.gone

    def close(self) -> None:
        self.closed = True


class QuietHost(FakeHost):
    """Its descriptors are ready when the program is."""

    def __init__(self, bus: LocalBus) -> None:
        super().__init__(Clock(), bus)
        self.readers: dict[int, Any] = {}
        self.writers: dict[int, Any] = {}

    def add_reader(self, fd: int, call: Any) -> None:
        self.readers[fd] = call

    def remove_reader(self, fd: int) -> bool:
        return self.readers.pop(fd, None) is not None

    def add_writer(self, fd: int, call: Any) -> None:
        self.writers[fd] = call

    def remove_writer(self, fd: int) -> bool:
        return self.writers.pop(fd, None) is not None


class Bench:
    """A connection between a program and a guest, over local rings."""

    def __init__(self, program: Program | None = None, ring_pages: int = RING_PAGES, quota: int = 1) -> None:
        self.bus = LocalBus()
        self.failures: list[str] = []
        self.bus.on_failed = lambda channel, reason: self.failures.append(reason)
        self.host = QuietHost(self.bus)
        self.program = program
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.over = self.ended = 0
        channel = ServerChannel(SERVICE, INSTANCE, name="socket")
        channel.set_flags(1)
        self.connection = Connection(
            self.host, channel, 80, self.counters, program, lambda one: program, self._over, self._ended
        )
        self.connection.offer(2.0)
        self.guest = ClientChannel(SERVICE, INSTANCE, ring_pages_in=ring_pages, ring_pages_out=ring_pages)
        self.guest.set_flags(1)
        self.guest.set_process_packet_callbacks(self._take)
        if quota:
            self.guest.set_transaction_quota(quota)
        self.got = bytearray()
        self.fins = 0
        self.reading = True
        self.held: list[Completion] = []

    def _over(self, _: Connection) -> None:
        self.over += 1

    def _ended(self, connection: Connection) -> None:
        self.ended += 1
        if self.guest.state is ChannelState.ACTIVE:
            # What is in the ring stays readable for a program in the guest, also behind a RESCIND.
            self.read_on()
            while self.guest.process():
                pass
        self.host.remove_channel(connection.channel)

    def _take(self, _: Channel, completion: Completion, payload: bytes) -> None:
        assert not self.fins, "a packet behind the FIN"
        data = hvsock.unpack(payload)
        self.got += data
        self.fins += not data
        if self.reading:
            completion.complete()
        else:
            self.held.append(completion)

    @property
    def open(self) -> bool:
        return self.guest.state in (ChannelState.OPENED, ChannelState.ACTIVE)

    def send(self, payload: bytes) -> None:
        self.guest.allocate_packet().send(payload, wait_for_completion=False, transaction=0)

    def ready(self) -> list[Any]:
        """Calls that an event loop would make now."""
        program, calls = self.program, []
        if program is not None:
            if program.inbox or program.ended:
                calls += self.host.readers.values()
            if program.room or program.gone:
                calls += self.host.writers.values()
        return calls

    def run(self) -> None:
        """Until all is quiet, which it has to become."""
        for _ in range(100_000):
            if self.host.busy:
                self.host.run_soon()
            elif self.bus.busy:
                self.bus.service()
            elif calls := self.ready():
                calls[0]()
            else:
                return
        raise AssertionError("it never becomes quiet: somebody polls")

    def advance(self, seconds: float) -> None:
        end = self.host.clock.now + seconds
        self.run()
        while (due := self.host.next_due()) is not None and due <= end:
            self.host.fire_next()
            self.run()
        self.host.clock.now = end

    def read_on(self) -> None:
        self.reading = True
        held, self.held = self.held, []
        for completion in held:
            completion.complete()


def opened(program: Program, **options: Any) -> Bench:
    bench = Bench(program, **options)
    bench.bus.open(bench.guest)
    bench.run()
    return bench


def test_nobody_opens_it() -> None:
    bench = Bench(Program())
    bench.advance(1.9)
    assert bench.bus.offers and bench.connection.state is State.OFFERED
    bench.advance(0.2)
    assert not bench.bus.offers and (bench.over, bench.ended) == (1, 1)
    assert bench.program is not None and bench.program.closed and not bench.connection.was_open
    assert bench.host.next_due() is None


def test_nobody_is_there_at_the_host() -> None:
    bench = Bench(None)
    bench.bus.open(bench.guest)
    bench.run()
    assert bench.fins == 1 and bench.open, "a RESCIND must not overtake the open"
    bench.send(hvsock.pack(b"is there anybody"))
    bench.advance(0.05)
    assert not bench.open and bench.ended == 1 and bench.counters["discarded"] == 16
    assert bench.connection.state is State.ENDED and bench.host.next_due() is None


def test_a_guest_that_does_not_show_that_it_is_ready_has_its_time() -> None:
    bench = Bench(None)
    bench.bus.open(bench.guest)
    bench.advance(0.5)
    assert bench.open
    bench.advance(1.0)
    assert not bench.open and bench.ended == 1


@pytest.mark.parametrize("pages", [1, 2, 6, 64])
def test_chunks_fit_into_the_guests_ring(pages: int) -> None:
    program = Program()
    bench = opened(program, ring_pages=pages)
    data = bytes(range(256)) * 3000
    bench.reading = False
    program.inbox += data
    bench.run()
    assert bench.connection._chunk == min(CHUNK, (pages * 4096 - 16) // 3 - 48)
    assert len(program.inbox) >= len(data) - pages * 4096 - 2 * CHUNK, "what the ring takes, and little more"
    reads = program.reads
    bench.advance(3)
    assert program.reads == reads and not bench.host.readers
    bench.read_on()
    bench.run()
    assert bench.got == data


def test_a_program_that_reads_nothing() -> None:
    program = Program()
    program.room = 1000
    bench = opened(program)
    for _ in range(100):
        bench.send(hvsock.pack(bytes(4088)))
    bench.run()
    assert HIGH < bench.connection.kept <= HIGH + 4088 and bench.guest.packets_queued > 0
    assert len(bench.connection.channel.outstanding) == 1
    program.inbox += b"the other way"
    bench.run()
    assert bench.got == b"the other way"
    for _ in range(3):  # a pause has the packet completed that is held, and so one more is let in
        bench.connection.channel.quiesce()
        assert bench.connection.channel.quiescent
        bench.connection.channel.unquiesce()
        bench.run()
    assert bench.connection.kept <= HIGH + 4 * 4088
    program.room = 1 << 30
    bench.run()
    assert bench.connection.kept == 0 and len(program.got) == 100 * 4088


def test_sabotage_without_a_held_packet_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmbus.providers.vsock.connection.HIGH", 1 << 40)
    monkeypatch.setattr("vmbus.providers.vsock.connection.MOST_KEPT", 1 << 40)
    program = Program()
    program.room = 1000
    bench = opened(program)
    for _ in range(100):
        bench.send(hvsock.pack(bytes(4088)))
    bench.run()
    assert bench.connection.kept > HIGH + 4088 and not bench.guest.packets_queued


def test_pauses_without_end_and_a_program_that_never_reads() -> None:
    program = Program()
    program.room = 0
    bench = opened(program)
    for _ in range(200):
        bench.send(hvsock.pack(bytes(16000)))
        bench.run()
        bench.connection.channel.quiesce()
        bench.connection.channel.unquiesce()
        bench.run()
        if bench.over:
            break
    bench.advance(1)
    assert not bench.open and bench.ended == 1 and bench.counters["discarded"] <= 1.1 * (1 << 20)


def test_bytes_behind_a_fin() -> None:
    program = Program()
    bench = opened(program)
    bench.send(hvsock.pack(b"all"))
    bench.send(hvsock.FIN)
    bench.send(hvsock.pack(b"more"))
    bench.advance(1)
    assert not bench.open and bench.counters["wrong"] == 1 and program.got == b"all" and program.closed
    assert bench.failures == ["packet 0: a packet behind the end of the guest's bytes"] and not bench.bus.offers


def test_the_guest_has_ended_and_does_not_read() -> None:
    program = Program()
    bench = opened(program)
    bench.reading = False
    bench.send(hvsock.FIN)
    program.inbox += bytes(1_000_000)
    bench.advance(LINGER_SECONDS - 0.5)
    assert bench.open and program.heard_end
    bench.read_on()  # progress
    bench.run()
    bench.reading = False
    program.inbox += bytes(1_000_000)
    bench.advance(LINGER_SECONDS - 0.5)
    assert bench.open
    bench.advance(LINGER_SECONDS)
    assert not bench.open and bench.counters["lingered"] == 1 and bench.ended == 1


def test_the_guest_has_ended_and_the_program_takes_its_time() -> None:
    program = Program()
    bench = opened(program)
    bench.send(hvsock.FIN)
    bench.advance(1000)
    program.inbox += b"the answer"
    program.ended = True
    bench.advance(0.1)
    assert bench.got == b"the answer" and bench.fins == 1 and bench.ended == 1


class Anything(RuleBasedStateMachine):
    """Both ends send, read, stop reading, end and leave; the device is paused and goes on; time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.program = Program()
        self.bench = opened(self.program)
        self.sent_up = bytearray()
        self.sent_down = bytearray()
        self.guest_ended = False
        self.paused = False
        self.pauses = 0
        self.largest = 0

    @precondition(lambda self: not self.guest_ended and self.bench.open)
    @rule(size=st.integers(1, 16384), count=st.integers(1, 8))
    def guest_sends(self, size: int, count: int) -> None:
        for _ in range(count):
            data = (len(self.sent_up) % 251).to_bytes(1, "little") * size
            self.bench.send(hvsock.pack(data))
            self.sent_up += data
        self.largest = max(self.largest, size)

    @precondition(lambda self: not self.guest_ended and self.bench.open)
    @rule()
    def guest_ends(self) -> None:
        self.bench.send(hvsock.FIN)
        self.guest_ended = True

    @rule(reading=st.booleans())
    def guest_reads(self, reading: bool) -> None:
        if reading:
            self.bench.read_on()
        else:
            self.bench.reading = False

    @precondition(lambda self: not self.program.ended)
    @rule(size=st.integers(1, 100_000))
    def program_sends(self, size: int) -> None:
        data = (len(self.sent_down) % 241).to_bytes(1, "little") * size
        self.program.inbox += data
        self.sent_down += data

    @precondition(lambda self: not self.program.ended)
    @rule(leaves=st.booleans())
    def program_ends(self, leaves: bool) -> None:
        self.program.ended = True
        self.program.gone |= leaves

    @rule(room=st.sampled_from([0, 1, 5000, 1 << 30]))
    def program_reads(self, room: int) -> None:
        self.program.room = room

    @rule()
    def pause_or_go_on(self) -> None:
        channel = self.bench.connection.channel
        self.paused = not self.paused
        if self.paused:
            self.pauses += 1
            channel.quiesce()
            assert channel.quiescent or not channel.link
        else:
            channel.unquiesce()

    @rule()
    def run(self) -> None:
        self.bench.run()

    @rule(seconds=st.sampled_from([0.1, 1.0, 7.0]))
    def time_passes(self, seconds: float) -> None:
        if not self.paused:
            self.bench.advance(seconds)

    @invariant()
    def order_and_bounds(self) -> None:
        assert self.sent_up.startswith(self.program.got) and self.sent_down.startswith(self.bench.got)
        assert self.bench.fins <= 1 and self.bench.ended <= 1
        connection = self.bench.connection
        assert connection.kept <= HIGH + (self.pauses + 1) * max(self.largest, 1)
        assert self.bench.counters["to_guest"] - len(self.bench.got) <= RING_PAGES * 4096 + CHUNK
        assert not self.bench.failures and not self.bench.counters["wrong"]

    def teardown(self) -> None:
        """Whatever has happened, when both ends do their part it comes to its end, and nothing is lost."""
        bench, program = self.bench, self.program
        if self.paused:
            self.pause_or_go_on()
        self.guest_reads(True)
        self.program_reads(1 << 30)
        bench.run()
        if not self.guest_ended and bench.open:
            self.guest_ends()
        program.ended = True
        bench.run()
        bench.advance(2.0)
        assert bench.connection.state is State.ENDED and bench.ended == bench.over == 1 and not bench.open
        assert program.closed and not bench.host.readers and not bench.host.writers and not bench.bus.offers
        assert bench.host.next_due() is None
        if not bench.counters["lingered"]:
            assert bench.got == self.sent_down and bench.fins == 1
            if not program.gone:
                assert program.got == self.sent_up and program.heard_end


Anything.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnything = Anything.TestCase
