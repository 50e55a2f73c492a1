"""Both endpoints under random calls, legal and illegal, with saves and restores, compared with a simple model.

The model knows each end's state and wish, whether it is quiesced, and what was sent. It says which call must be
refused, what must arrive (everything, once, in order), and what must come back (each packet, once).
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from support.endpoints import Bench
from support.pair import BASE, INSTANCE, TYPE
from vmbus.errors import WaitTimeout
from vmbus.kmcl import Channel, ChannelState, ChannelStateError, Completion, KmclError, Packet, Status
from vmbus.kmcl.server import ServerChannel

DISABLED, CLOSED, OPENED, ACTIVE, CLOSING = ChannelState
OPEN = (OPENED, ACTIVE)
NUMBER = Struct("<Q")
SYNC = b"SYNC"
SIDES = st.sampled_from(["server", "client"])
RARELY = st.sampled_from([False, False, False, True])  # what ends the traffic comes less often than the traffic
OTHER = {"server": "client", "client": "server"}


class End:
    """What the model knows of one end."""

    def __init__(self) -> None:
        self.state = DISABLED
        self.started = False
        self.quiescing = False
        self.paused_early = False
        self.quota = 0
        self.passive = False
        self.defers = False
        self.put_off = 0
        self.sent: list[int] = []
        self.received: list[int] = []
        self.unresolved: set[int] = set()
        self.held_packets: list[tuple[Completion, bytes]] = []

    def suspend(self) -> None:
        if self.state is ACTIVE:
            self.state = OPENED

    def activate(self) -> None:
        if self.state is OPENED and self.started and not self.quiescing:
            self.state = ACTIVE


class BothEnds(RuleBasedStateMachine):
    """The rules are the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.ends = {"server": End(), "client": End()}
        self.next = 0
        self.refuse_open = False
        self.set_up(self.bench.server)
        self.bench.client.set_process_packet_callbacks(self.take)
        self.bench.server.bind(lambda _: None, self.bench.withdraw)

    def set_up(self, server: ServerChannel) -> None:
        server.set_process_packet_callbacks(self.take)
        server.set_state_change_callbacks(opened=self.opened)
        server.set_save_restore_packet_callbacks(self.save_packet, self.restore_packet)
        server.waiter = self.bench.wait

    def channel(self, side: str) -> Channel:
        return self.bench.server if side == "server" else self.bench.client

    def side(self, channel: Channel) -> str:
        return "client" if channel is self.bench.client else "server"

    # ---- callbacks -----------------------------------------------------------------------------------------------

    def opened(self, channel: Channel) -> None:
        if self.refuse_open:
            raise KmclError("refused", Status.INSUFFICIENT_RESOURCES)

    def take(self, channel: Channel, completion: Completion, payload: bytes) -> None:
        if payload.startswith(SYNC):
            completion.complete(payload)
            return
        end = self.ends[self.side(channel)]
        if completion.deferred:
            end.put_off -= 1
        else:
            assert not end.quota or len(channel.outstanding) <= end.quota
            if end.defers:
                if not end.passive:
                    completion.defer_to_passive()
                    end.put_off += 1
                    return
                self.refused(completion.defer_to_passive)
        if completion.has_external_data:
            assert completion.external_data(read_only=True).size == 24
        end.received.append(NUMBER.unpack_from(payload)[0])
        end.held_packets.append((completion, payload))

    def done(self, packet: Packet, status: int, reply: bytes) -> None:
        end = self.ends[self.side(packet.channel)]
        end.unresolved.remove(packet.pointer)  # exactly once, or this raises
        if status == Status.SUCCESS:
            assert not reply or NUMBER.unpack_from(reply)[0] == packet.pointer
        else:
            assert status == Status.CANCELLED

    def save_packet(self, channel: ServerChannel, packet: Packet, buffer: memoryview) -> int:
        if buffer:
            buffer[:] = NUMBER.pack(packet.pointer)
        return NUMBER.size

    def restore_packet(self, channel: ServerChannel, lib_buf: bytes, save_buf: bytes) -> None:
        packet = channel.allocate_packet()
        channel.restore_packet(packet, lib_buf)
        (packet.pointer,) = NUMBER.unpack(save_buf)
        packet.completion_routine = self.done

    # ---- the model's verdicts --------------------------------------------------------------------------------------

    def refused(self, call: Callable[[], object]) -> None:
        with pytest.raises(ChannelStateError):
            call()

    def closes(self, side: str, *, force: bool = False) -> None:
        end = self.ends[side]
        if end.state in (*OPEN, CLOSING):
            if force:
                end.held_packets.clear()
                end.put_off = 0
            end.state = CLOSING if end.held_packets else CLOSED

    # ---- life ------------------------------------------------------------------------------------------------------

    @initialize(opened=st.sampled_from([True, True, True, False]))
    def begin(self, opened: bool) -> None:
        if opened:
            self.enable("server")
            self.enable("client")
            self.start("server")
            self.open(False)

    @rule(side=SIDES)
    def enable(self, side: str) -> None:
        end = self.ends[side]
        if end.state is not DISABLED:
            self.refused(self.channel(side).enable)
            return
        self.channel(side).enable()
        end.state = CLOSED
        if side == "client":
            end.started, end.paused_early = not end.paused_early, False

    @rule(refuse=st.sampled_from([False, False, False, True]))
    def open(self, refuse: bool) -> None:
        if any(end.state is not CLOSED for end in self.ends.values()):
            busy = next(side for side, end in self.ends.items() if end.state is not CLOSED)
            if hasattr(self.bench, "server_link"):
                self.refused(lambda: self.channel(busy).open(self.bench.server_link))
            return
        self.refuse_open = refuse
        self.bench.ready.clear()
        if refuse:
            with pytest.raises(KmclError, match="refused"):
                self.bench.open(start=False)
            return
        for end in self.ends.values():
            end.sent, end.received, end.state = [], [], OPENED
            end.activate()
        self.bench.open(start=False)

    @rule(force=st.booleans(), really=RARELY)
    def close(self, force: bool, really: bool) -> None:
        if not really:
            return
        for side, end in self.ends.items():
            legal = end.state in OPEN or end.state is CLOSING
            call = lambda side=side: self.channel(side).close(lambda: None, force=force)  # noqa: E731
            if legal:
                call()
                self.closes(side, force=force)
            else:
                self.refused(call)

    @rule(side=SIDES)
    def start(self, side: str) -> None:
        end = self.ends[side]
        if end.state is DISABLED:
            self.refused(self.channel(side).start)
            return
        end.started = True
        end.activate()
        self.channel(side).start()

    @rule(side=SIDES, blocking=st.booleans())
    def pause(self, side: str, blocking: bool) -> None:
        end, channel = self.ends[side], self.channel(side)
        end.started = False
        end.paused_early = end.state is DISABLED
        if blocking and channel.outstanding:
            with pytest.raises(WaitTimeout, match="to complete incoming packets"):
                channel.pause(1)
        else:
            (channel.pause if blocking else channel.begin_pause)()
        end.suspend()

    @rule(side=SIDES, quiesce=RARELY)
    def quiesce(self, side: str, quiesce: bool) -> None:
        end, channel = self.ends[side], self.channel(side)
        end.quiescing = quiesce
        if quiesce:
            channel.quiesce()
            end.suspend()
        else:
            end.activate()
            channel.unquiesce()

    @rule(side=SIDES, really=RARELY)
    def disable(self, side: str, really: bool) -> None:
        if not really:
            return
        end, channel = self.ends[side], self.channel(side)
        if side == "client":
            if end.state in OPEN:
                self.closes_politely(channel)
            elif end.state is CLOSING:
                self.refused(channel.disable)
            else:
                channel.disable()
                end.state = DISABLED
        elif end.state is DISABLED:
            self.refused(channel.disable)
        elif channel.outstanding:
            with pytest.raises(WaitTimeout, match="to complete incoming packets"):
                channel.disable(1)
            end.started = False
            end.suspend()
        else:
            channel.disable()
            end.state = DISABLED
            self.closes("client", force=True)

    def closes_politely(self, client: Channel) -> None:
        if client.outstanding:
            self.refused(client.disable)
        else:
            client.disable()
        self.closes("server")
        self.closes("client")
        if self.ends["client"].state is CLOSED:
            self.ends["client"].state = DISABLED

    @rule(side=SIDES)
    def set_up_late(self, side: str) -> None:
        if self.ends[side].state is DISABLED:
            self.channel(side).set_client_context_size(8)
        else:
            self.refused(lambda: self.channel(side).set_client_context_size(8))
            self.refused(self.channel(side).cleanup)

    # ---- traffic ---------------------------------------------------------------------------------------------------

    @rule(side=SIDES, count=st.integers(1, 50), wait=st.booleans(), size=st.sampled_from([8, 100, 900]))
    def send(self, side: str, count: int, wait: bool, size: int) -> None:
        end = self.ends[side]
        for _ in range(count):
            packet = self.channel(side).allocate_packet()
            packet.pointer, packet.completion_routine = self.next, self.done
            payload = NUMBER.pack(self.next) + bytes(size - 8)
            external = [(BASE, 16), (BASE + 5000, 8)] if wait and side == "client" and size == 100 else None
            if end.state not in OPEN:
                self.refused(lambda packet=packet, payload=payload: packet.send(payload))
                return
            end.sent.append(self.next)
            end.unresolved.add(self.next)
            self.next += 1
            packet.send(payload, wait_for_completion=wait, external=external)

    @rule(side=SIDES, picks=st.lists(st.integers(0, 10), min_size=1, max_size=20), twice=st.booleans())
    def complete(self, side: str, picks: list[int], twice: bool) -> None:
        end = self.ends[side]
        for pick in picks:
            if end.held_packets:
                completion, payload = end.held_packets.pop(pick % len(end.held_packets))
                if end.state is CLOSING and not end.held_packets:
                    end.state = CLOSED
                completion.complete(payload)
                if twice:
                    self.refused(completion.complete)

    @rule(side=SIDES, count=st.integers(1, 4))
    def turn(self, side: str, count: int) -> None:
        for _ in range(count):
            self.bench.turn(side)

    @rule()
    def run(self) -> None:
        self.bench.run()

    @rule(side=SIDES, quota=st.sampled_from([0, 1, 3, 50, 1 << 30]))
    def quota(self, side: str, quota: int) -> None:
        if quota:
            self.channel(side).set_transaction_quota(quota)
            self.ends[side].quota = quota
        else:
            with pytest.raises(KmclError):
                self.channel(side).set_transaction_quota(0)

    @rule(side=SIDES, passive=st.booleans(), defers=st.booleans())
    def way_of_processing(self, side: str, passive: bool, defers: bool) -> None:
        end = self.ends[side]
        end.passive, end.defers = passive, defers
        self.channel(side).set_incoming_processing_at_passive(passive)

    @rule(size=st.sampled_from([8, 2000]))
    def synchronous_request(self, size: int) -> None:
        server, client = self.ends["server"], self.ends["client"]
        free = all(end.quota in (0, 1 << 30) for end in (server, client))
        payload = SYNC + bytes(size - 4)
        try:
            reply = self.bench.client.send_synchronous_request(payload, timeout=1)
            assert reply == payload and client.state is ACTIVE
        except KmclError as error:
            if client.state is not ACTIVE:
                assert error.status is Status.DEVICE_REMOVED
            else:
                assert error.status is Status.CANCELLED and not (free and server.state is ACTIVE)

    @rule(waits=st.booleans())
    def synchronous_request_of_the_server(self, waits: bool) -> None:
        end = self.ends["server"]
        try:
            self.bench.server.send_synchronous_request(SYNC + bytes(200), wait_for_completion=waits, timeout=0)
            assert end.state is ACTIVE and not waits
        except KmclError as error:
            expected = Status.INVALID_PARAMETER if waits else Status.DEVICE_REMOVED
            if end.state is ACTIVE and not waits:
                expected = Status.BUFFER_OVERFLOW
            assert error.status is expected

    # ---- saves -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.ends["server"].state in OPEN)
    @rule(size=st.sampled_from([1, 300, 4000, 1 << 20]), steps=st.integers(0, 3), replace=st.booleans())
    def save(self, size: int, steps: int, replace: bool) -> None:
        end, server = self.ends["server"], self.bench.server
        if end.state is ACTIVE:
            self.refused(server.save_begin)
        server.quiesce()
        end.suspend()
        if server.outstanding:
            self.refused(server.save_begin)
        else:
            server.save_begin()
            for _ in range(steps):
                server.save_continue(size)
            server.save_end()
            if replace:
                self.replace(server, size)
                return
        if not end.quiescing:
            end.activate()
            server.unquiesce()

    def replace(self, old: ServerChannel, size: int) -> None:
        parts = []
        old.save_begin()
        more = True
        while more:
            step = old.save_continue(size)
            if not step.data and step.more:
                step = old.save_continue(step.required)
            parts.append(step.data)
            more = step.more
        old.save_end()
        end = self.ends["server"]
        new = ServerChannel(TYPE, INSTANCE, name="server")
        self.set_up(new)
        new.bind(lambda _: None, self.bench.withdraw)
        new.enable()
        self.bench.server, self.bench.server_link = new, self.bench.link("server")
        new.reopen(self.bench.server_link)
        assert [new.restore_from_buffer(part) for part in parts] == [False] * (len(parts) - 1) + [True]
        assert new.restored_started == end.started
        if end.quota:
            new.set_transaction_quota(end.quota)
        new.set_incoming_processing_at_passive(end.passive)
        end.quiescing = False
        if new.restored_started:
            end.activate()
            new.start()
        self.bench.ready |= {"server", "client"}

    # ---- what always holds -----------------------------------------------------------------------------------------

    @invariant()
    def model_and_channels_agree(self) -> None:
        for side, end in self.ends.items():
            channel = self.channel(side)
            assert channel.state is end.state, side
            assert channel.started == end.started, side
            in_use = [packet.pointer for packet in channel.packets_in_use if packet.pointer is not None]
            assert len(in_use) == len(set(in_use)) and set(in_use) == end.unresolved, side
            assert len(channel.outstanding) == len(end.held_packets) + end.put_off, side
            assert end.received == self.ends[OTHER[side]].sent[: len(end.received)], side
            if end.state in (DISABLED, CLOSED):
                assert not end.unresolved and not end.held_packets and not channel.outgoing.queue, side
        if hasattr(self.bench, "server_link"):
            assert not self.bench.server_link.failures and not self.bench.client_link.failures

    def teardown(self) -> None:
        """Let everything through; nothing may be left."""
        if all(end.state in OPEN for end in self.ends.values()):
            for side in SIDES_LIST:
                self.quota(side, 1 << 30)
                self.quiesce(side, False)
                self.start(side)
            for _ in range(500):
                self.bench.run()
                for side in SIDES_LIST:
                    self.complete(side, [0] * 100, False)
                busy = any(end.unresolved or end.held_packets for end in self.ends.values())
                if not self.bench.ready and not busy:
                    break
            self.model_and_channels_agree()
            for side, end in self.ends.items():
                assert end.received == self.ends[OTHER[side]].sent
                assert not end.held_packets and not self.channel(side).packets_in_use
                assert not self.channel(side).outgoing.queue


SIDES_LIST = ["server", "client"]
TestBothEnds = BothEnds.TestCase
TestBothEnds.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
