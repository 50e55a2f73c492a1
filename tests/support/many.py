"""A provider with as many channels as it is told to have, each of which answers what it is asked: for tests of what
takes longer, the more channels there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from uuid import UUID, uuid5

import msgspec

from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.server import ServerChannel
from vmbus.providers import Host, Provider

MANY_TYPE = UUID("3c6d1c5e-7d0a-4b56-9b0f-6a1d8f2f4a02")


class ManyOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    channels: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Primary channels."""
    subchannels: int = 0
    """Of the first of them."""


class ManyProvider(Provider):
    """Asked for b"push" it sends a packet of its own, of which it knows again after a restore what was in it."""

    kind = "many"
    Options = ManyOptions

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        self.channels: list[ServerChannel] = []
        self.answered = 0
        self.cancelled = 0

    def _make(self, instance: UUID, index: int) -> None:
        number = len(self.channels)
        channel = ServerChannel(MANY_TYPE, instance, name=f"{self.name} {number}", subchannel_index=index)
        channel.set_process_packet_callbacks(self._process)
        channel.set_save_restore_packet_callbacks(lambda channel, packet, buffer: 0, self._restore_packet)
        self.channels.append(channel)
        self.host.add_channel(channel)
        channel.enable()
        channel.start()

    def start(self) -> None:
        for number in range(self.options.channels):
            self._make(uuid5(self.instance, str(number)) if number else self.instance, 0)
        for index in range(1, self.options.subchannels + 1):
            self._make(self.instance, index)

    def _process(self, channel: Channel, completion: Completion, payload: bytes) -> None:
        if payload[:4] == b"push":
            self._send(channel.allocate_packet(), payload[4:])
        completion.complete(payload)

    def _send(self, packet: Packet, payload: bytes) -> None:
        packet.completion_routine = self._completed
        packet.send(payload)

    def _completed(self, packet: Packet, status: int, reply: bytes) -> None:
        if status:
            self.cancelled += 1
        else:
            self.answered += 1

    def _restore_packet(self, channel: ServerChannel, lib: bytes, save: bytes) -> None:
        packet = channel.allocate_packet()
        packet.completion_routine = self._completed
        channel.restore_packet(packet, lib)

    def check(self, state: bytes) -> None:
        pass

    def save(self) -> bytes:
        return b""

    def restore(self, state: bytes) -> None:
        pass

    def status(self) -> dict[str, Any]:
        return {"answered": self.answered, "cancelled": self.cancelled}
