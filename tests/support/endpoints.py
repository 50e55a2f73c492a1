"""Two KMCL endpoints with everything that a bus gives them: opening again and again, waiting, GPADLs."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

from support.pair import Pair, PairLink
from vmbus.errors import PeerError, WaitTimeout
from vmbus.kmcl import Channel, ChannelState, Completion, Packet
from vmbus.kmcl.server import ServerChannel
from vmbus.memory.guest import Grant


class GpadlLink(PairLink):
    """A link with GPADLs: one table for both ends."""

    def create_gpadl(self, extents: Sequence[tuple[int, int]], read_only: bool) -> int:
        if not 0 < sum(length for _, length in extents) <= 1 << 20:
            raise PeerError("a GPADL of nothing, or of more than there is")
        self.pair.gpadls[len(self.pair.gpadls) + 1] = list(extents)
        return len(self.pair.gpadls)

    def delete_gpadl(self, handle: int) -> None:
        if handle not in self.pair.gpadls:
            raise PeerError("no such GPADL")
        self.pair.wait(lambda: handle not in self.pair.mapped, 1, "the GPADL to be unmapped")
        del self.pair.gpadls[handle]

    def map_gpadl(self, handle: int, read_only: bool) -> Grant:
        if handle not in self.pair.gpadls or handle in self.pair.mapped:
            raise PeerError("unknown, or mapped")
        grant = self.memory.grant(self.pair.gpadls[handle], writable=not read_only)
        self.pair.mapped[handle] = grant
        return grant

    def unmap_gpadl(self, handle: int) -> None:
        if handle not in self.pair.mapped:
            raise PeerError("not mapped")
        self.pair.mapped.pop(handle).release()

    def close_channel(self, timeout: float) -> None:
        self.pair.client.close(lambda: None)
        self.pair.server.close(lambda: None)


class Bench(Pair):
    """A pair that can be opened again and again, and in which blocking calls take turns until nothing is left to do.

    Both ends keep what they receive in `taken`, and every finished packet's outcome in `outcomes`.
    """

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.gpadls: dict[int, list[tuple[int, int]]] = {}
        self.mapped: dict[int, Grant] = {}
        self.waits: list[tuple[float, str]] = []
        self.taken: dict[str, list[tuple[Completion, bytes]]] = {"server": [], "client": []}
        self.outcomes: list[tuple[int, bytes]] = []
        for channel in (self.server, self.client):
            channel.waiter = self.wait
            channel.set_process_packet_callbacks(self.take)

    def take(self, channel: Channel, completion: Completion, payload: bytes) -> None:
        self.taken["client" if channel is self.client else "server"].append((completion, payload))

    def link(self, side: str) -> PairLink:
        plain = super().link(side)
        return GpadlLink(self, plain.side, plain.memory, plain.reader, plain.writer)

    def wait(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        self.waits.append((timeout, what))
        while not condition():
            if not self.ready:
                raise WaitTimeout(what, timeout)
            self.turn(min(self.ready))

    def withdraw(self, channel: ServerChannel) -> None:
        for one in (self.server, self.client):
            if one.state not in (ChannelState.CLOSED, ChannelState.DISABLED):
                one.close(lambda: None, force=True)

    def open(self, *, start: bool = True) -> Bench:
        self.ram[:] = bytes(len(self.ram))
        if self.server.state is ChannelState.DISABLED:
            self.server.bind(lambda _: None, self.withdraw)
            self.server.enable()
        if self.client.state is ChannelState.DISABLED:
            self.client.enable()
        self.server_link, self.client_link = self.link("server"), self.link("client")
        self.server.open(self.server_link)
        self.client.open(self.client_link)
        if start:
            self.server.start()
        self.server.activate()
        self.client.activate()
        return self

    def close(self) -> None:
        self.client.close(lambda: None)
        self.server.close(lambda: None)

    def send(self, side: str = "client", payload: bytes = b"request!", **arguments: Any) -> Packet:
        packet = (self.server if side == "server" else self.client).allocate_packet()
        packet.completion_routine = lambda _, status, reply: self.outcomes.append((status, reply))
        packet.send(payload, **arguments)
        return packet

    def answer(self, side: str = "server") -> None:
        """Complete everything that an end holds, with what was sent."""
        for completion, payload in self.taken[side]:
            completion.complete(payload)
        self.taken[side].clear()


class Recorder:
    """A VSP that numbers its packets and records all that happens."""

    def __init__(self, channel: ServerChannel) -> None:
        self.channel = channel
        self.events: list[str] = []
        self.incoming: list[tuple[Completion, bytes]] = []
        self.answers: list[tuple[int, int, bytes]] = []
        self.next = 0
        self.calls: list[tuple[int, int]] = []
        channel.set_process_packet_callbacks(self.process)
        channel.set_state_change_callbacks(
            opened=lambda _: self.events.append("opened"),
            closed=lambda _: self.events.append("closed"),
            suspend=lambda _: self.events.append("suspend"),
            started=lambda _: self.events.append("started"),
            post_started=lambda _: self.events.append("post_started"),
        )
        channel.set_save_restore_packet_callbacks(self.save, self.restore)

    def process(self, channel: Channel, completion: Completion, payload: bytes) -> None:
        self.incoming.append((completion, payload))

    def send(self, payload: bytes | None = None, **arguments: Any) -> None:
        packet = self.channel.allocate_packet()
        packet.pointer = self.next
        packet.completion_routine = self.completed
        self.next += 1
        packet.send(struct.pack("<Q", packet.pointer) if payload is None else payload, **arguments)

    def completed(self, packet: Packet, status: int, reply: bytes) -> None:
        self.answers.append((packet.pointer, status, reply))

    def save(self, channel: ServerChannel, packet: Packet, buffer: memoryview) -> int:
        self.calls.append((packet.pointer, len(buffer)))
        if len(buffer) >= 8:
            buffer[:8] = struct.pack("<Q", packet.pointer)
        return 8

    def restore(self, channel: ServerChannel, lib_buf: bytes, save_buf: bytes) -> None:
        packet = channel.allocate_packet()
        channel.restore_packet(packet, lib_buf)
        (packet.pointer,) = struct.unpack("<Q", save_buf)
        packet.completion_routine = self.completed
