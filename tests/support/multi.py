"""A provider with sub-channels, mapped GPADLs and packets of its own: for tests of the bus, the device and its state.

Requests on the primary channel, each answered with 8 bytes:
    b"subs" + u32   make that many sub-channels
    b"map_" + u32   map a GPADL for writing, and write its handle into it;  b"mapr" read-only;  b"umap" end the mapping
    b"push" + u32   send so many packets to the guest
    anything else   echoed
"""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

import msgspec

from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.status import KmclError
from vmbus.memory.guest import Grant
from vmbus.providers import Host, Provider
from vmbus.testkit import HostPacket
from vmbus.testkit.loopback.pair import DriverSide
from vmbus_guest.driver import VmbusDriver

MULTI_TYPE = UUID("3c6d1c5e-7d0a-4b56-9b0f-6a1d8f2f4a01")


class MultiOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    force_new: bool = False
    forgetful: bool = False
    """Does not make its sub-channels again when it is restored."""


class MultiProvider(Provider):
    kind = "multi"
    Options = MultiOptions

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        self.channel = self._make(0)
        if self.options.force_new:
            self.channel.set_server_flags(8)
        self.subs: list[ServerChannel] = []
        self.mapped: dict[int, Grant] = {}
        self.completed: list[bytes] = []
        self.cancelled = 0
        self.events: list[str] = []

    def _make(self, index: int) -> ServerChannel:
        channel = ServerChannel(MULTI_TYPE, self.instance, name=f"{self.name}.{index}", subchannel_index=index)
        channel.set_process_packet_callbacks(self._process)
        channel.set_state_change_callbacks(opened=self._opened, closed=self._closed)
        channel.set_save_restore_packet_callbacks(self._save_packet, self._restore_packet)
        return channel

    def start(self) -> None:
        self._go(self.channel)

    def _go(self, channel: ServerChannel) -> None:
        self.host.add_channel(channel)
        channel.enable()
        channel.start()

    def stop(self) -> None:
        self.events.append("stopped")

    def _opened(self, channel: Channel) -> None:
        self.events.append(f"opened {channel.name}")

    def _closed(self, channel: Channel) -> None:
        self.events.append(f"closed {channel.name}")

    def add_subs(self, count: int) -> None:
        for index in range(len(self.subs) + 1, len(self.subs) + 1 + count):
            self.subs.append(self._make(index))
            self._go(self.subs[-1])

    def push(self, channel: ServerChannel, count: int) -> None:
        for number in range(count):
            packet = channel.allocate_packet()
            packet.pointer = number.to_bytes(8, "little")
            packet.completion_routine = self._completed
            packet.send(packet.pointer + bytes(40))

    def _completed(self, packet: Packet, status: int, reply: bytes) -> None:
        if status:
            self.cancelled += 1
        else:
            self.completed.append(packet.pointer)

    def _save_packet(self, _: ServerChannel, packet: Packet, buffer: memoryview) -> int:
        if len(buffer):
            buffer[:8] = packet.pointer
        return 8

    def _restore_packet(self, channel: ServerChannel, lib: bytes, save: bytes) -> None:
        packet = channel.allocate_packet()
        packet.pointer = bytes(save)
        packet.completion_routine = self._completed
        channel.restore_packet(packet, lib)

    def _process(self, channel: Channel, completion: Completion, payload: bytes) -> None:
        command, number = payload[:4], int.from_bytes(payload[4:8], "little")
        reply = payload
        try:
            if command == b"subs":
                self.add_subs(number)
            elif command == b"push":
                assert isinstance(channel, ServerChannel)
                self.push(channel, number)
            elif command in (b"map_", b"mapr"):
                grant = self.mapped[number] = self.channel.map_gpadl(number, read_only=command == b"mapr")
                if command == b"map_":
                    grant.views[0][:4] = number.to_bytes(4, "little")
                reply = bytes(grant.views[0][:8])
            elif command == b"umap":
                self.channel.unmap_gpadl(number)
                del self.mapped[number]
        except KmclError as error:
            reply = b"fail" + int(error.status).to_bytes(4, "little")
        completion.complete(reply)

    def save(self) -> bytes:
        return len(self.subs).to_bytes(4, "little")

    def restore(self, state: bytes) -> None:
        if not self.options.forgetful:
            self.add_subs(int.from_bytes(state, "little"))

    def status(self) -> dict[str, Any]:
        return {"completed": len(self.completed), "subs": len(self.subs), "events": list(self.events)}


class Guest:
    """The guest's end of one channel: asks, and takes what is pushed; while there is a list to `keep` it in, it answers
    nothing."""

    def __init__(self, driver: VmbusDriver, index: int = 0, **arguments: Any) -> None:
        name = f"guest {index}"
        self.end = DriverSide(driver).guest(MULTI_TYPE, subchannel=index, ring_pages=1, name=name, **arguments)
        self.channel = self.end.channel
        self.got: list[int] = []
        self.keep: list[HostPacket] | None = None
        self.end.answer = self._take
        self.end.open()

    def _take(self, packet: HostPacket) -> bytes | None:
        self.got.append(int.from_bytes(packet.payload[:8], "little"))
        if self.keep is None:
            return b""
        self.keep.append(packet)
        return None

    def ask(self, command: bytes, number: int = 0) -> bytes:
        return self.end.request(command + number.to_bytes(4, "little"))
