"""An author's own provider, for tests: not one of the package's, found by its module.

A request is answered with itself in capitals; one that describes memory also has that memory in capitals. After each
`every` requests the guest gets a packet with the count, which it confirms; the command `ring` has more of them sent.
"""

from __future__ import annotations

from struct import Struct
from typing import Annotated, Any
from uuid import UUID

import msgspec

from vmbus.errors import StateError, UsageError
from vmbus.kmcl import Channel, Completion, Packet, Status
from vmbus.kmcl.server import ServerChannel
from vmbus.providers import Provider

BELL_TYPE = UUID("0d5c1c0e-8f3f-4f0e-9a57-1f5f6a8f2be1")
NUMBER = Struct("<Q")
STATE = Struct("<QQ")


class BellOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`every`: requests between two packets of the provider's."""

    every: Annotated[int, msgspec.Meta(ge=1)] = 3


class Bell(Provider):
    """See the module's text."""

    kind = "bell"
    Options = BellOptions

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.served = self.confirmed = 0
        self.channel = ServerChannel(BELL_TYPE, self.instance, name=self.name)

    def start(self) -> None:
        self.channel.set_maximum_external_data(1 << 20)
        self.channel.set_process_packet_callbacks(self._process)
        self.channel.set_save_restore_packet_callbacks(self._save_packet, self._restore_packet)
        self.host.add_channel(self.channel)
        self.channel.enable()
        self.channel.start()

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        self.served += 1
        if completion.has_external_data:
            for view in completion.external_data().views:
                view[:] = bytes(view).upper()
        completion.complete(payload.rstrip(b"\0").upper())
        if self.served % self.options.every == 0:
            self._ring(self.served)

    def _ring(self, number: int) -> None:
        packet = self.channel.allocate_packet()
        packet.pointer = number
        packet.completion_routine = self._confirmed
        packet.send(NUMBER.pack(number) + bytes(240))

    def _confirmed(self, packet: Packet, status: int, reply: bytes) -> None:
        if status == Status.SUCCESS:
            self.confirmed += 1
        packet.free()

    def _save_packet(self, _: ServerChannel, packet: Packet, buffer: memoryview) -> int:
        if len(buffer) >= NUMBER.size:
            NUMBER.pack_into(buffer, 0, packet.pointer)
        return NUMBER.size

    def _restore_packet(self, channel: ServerChannel, lib_buf: bytes, save_buf: bytes) -> None:
        packet = channel.allocate_packet()
        channel.restore_packet(packet, lib_buf)
        (packet.pointer,) = NUMBER.unpack(save_buf)
        packet.completion_routine = self._confirmed

    def save(self) -> bytes:
        return STATE.pack(self.served, self.confirmed)

    def restore(self, state: bytes) -> None:
        if len(state) != STATE.size:
            raise StateError(f"bell: {len(state)} bytes of state")
        self.served, self.confirmed = STATE.unpack(state)

    def command(self, name: str, arguments: Any) -> dict[str, Any]:
        if name != "ring":
            raise UsageError(f"bell: no command {name!r}")
        for number in range(int(arguments["times"])):
            self._ring(number)
        return {"rung": int(arguments["times"])}

    def status(self) -> dict[str, Any]:
        return {"served": self.served, "confirmed": self.confirmed}
