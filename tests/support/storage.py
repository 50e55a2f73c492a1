"""A storage driver as Linux's behind a PCI function: the channels of a `VmbusDriver`, and memory that it owns."""

from __future__ import annotations

import random
from typing import Any

from support.storvsc import Driver, Extents, Pending
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.status import Status as PacketStatus
from vmbus.testkit.loopback.function import LoopbackFunction
from vmbus.testkit.loopback.harness import LoopbackServer
from vmbus.wire.storvsp import STORVSP_TYPE
from vmbus_guest.driver import VmbusDriver

MIB = 1 << 20


class Sent:
    """Implements Pending."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes]] = []

    def completed(self, packet: Packet, status: int, reply: bytes) -> None:
        self.answers.append((status, reply))
        packet.free()

    @property
    def done(self) -> bool:
        return bool(self.answers)

    @property
    def reply(self) -> bytes:
        assert len(self.answers) == 1, "not exactly once"
        status, reply = self.answers[0]
        assert status == PacketStatus.SUCCESS
        return reply


class ChannelPort:
    """Implements Port."""

    def __init__(self, driver: VmbusDriver, channel: Channel) -> None:
        self.driver = driver
        self.channel = channel

    def send(self, payload: bytes, external: Extents | None) -> Sent:
        sent = Sent()
        packet = self.channel.allocate_packet()
        packet.completion_routine = sent.completed
        packet.send(payload, external=None if external is None else list(external))
        return sent

    def wait(self, *pending: Pending, seconds: float = 20.0) -> None:
        self.driver.run_until(lambda: all(one.done for one in pending), seconds, "answers of the controller")


class Memory:
    """Implements Memory."""

    def __init__(self, driver: VmbusDriver, size: int = 4 * MIB) -> None:
        self.buffer = driver.allocate(size)

    def put(self, data: bytes, at: int = 0) -> None:
        self.buffer.view[at : at + len(data)] = data

    def get(self, length: int, at: int = 0) -> bytes:
        return bytes(self.buffer.view[at : at + length])

    def extents(self, length: int, at: int = 0) -> list[tuple[int, int]]:
        return [(self.buffer.iova + at, length)]


class Controller(Driver):
    """A driver of `bus`'s controller. `notices`: what has come unasked."""

    def __init__(self, bus: VmbusDriver, *, sub_channels: int = 0, memory: int = 4 * MIB, **pages: int) -> None:
        self.bus = bus
        self.notices: list[bytes] = []
        channel = bus.client_channel(STORVSP_TYPE, name="storage", **pages)
        channel.set_process_packet_callbacks(self._unasked)
        bus.enable(channel)
        self.channel = channel
        self.data = Memory(bus, memory)
        super().__init__(ChannelPort(bus, channel), self.data)
        self.connect(sub_channels=sub_channels)
        for index in range(1, sub_channels + 1):
            sub_channel = bus.client_channel(STORVSP_TYPE, name=f"storage.{index}", subchannel_index=index, **pages)
            bus.enable(sub_channel)
            self.ports.append(ChannelPort(bus, sub_channel))

    def _unasked(self, _: Channel, completion: Completion, payload: bytes) -> None:
        assert completion.transaction == 0 and not completion.wanted
        self.notices.append(payload)
        completion.complete()


class Guest(Controller):
    """A driver of its own behind a PCI function."""

    def __init__(self, function: LoopbackFunction, **more: int) -> None:
        self.function = function
        super().__init__(VmbusDriver(function), **more)

    def close(self) -> None:
        self.bus.close()


def pattern(length: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(length)


def status(server: LoopbackServer) -> dict[str, Any]:
    return dict(server.command("status")["providers"]["scsi"])


def disk_status(server: LoopbackServer, index: int = 0) -> dict[str, Any]:
    """Of one of its disks."""
    return dict(status(server)["luns"][index])
