"""A cable for tests of network cards: frames in and out of a descriptor, without rights and namespaces."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import ClassVar

from vmbus.errors import EnvironmentProblem
from vmbus.providers.network.card import Card
from vmbus.providers.network.interface import Hosts, Port, Settings
from vmbus.providers.network.watch import Trouble
from vmbus.wire.ethernet import OFFLOAD_SIZE, announcement

GUEST = bytes.fromhex("020000000001")
PEER = bytes.fromhex("020000000002")


def frame(payload: bytes = b"", *, source: bytes = PEER, target: bytes = GUEST, kind: int = 0x88B5) -> bytes:
    """An Ethernet frame with an empty offload header."""
    return bytes(OFFLOAD_SIZE) + target + source + struct.pack("!H", kind) + payload


def udp(number: int, port: int, *, size: int = 32, to_guest: bool = True) -> bytes:
    """A UDP datagram's frame, of the flow that `port` names, with a number in it."""
    one, other = b"\xc0\0\2\1", b"\xc0\0\2\2"
    body = struct.pack("!I", number) + bytes(size)
    ports = (9, port) if to_guest else (port, 9)
    datagram = struct.pack("!HHHH", *ports, 8 + len(body), 0) + body
    addresses = one + other if to_guest else other + one
    packet = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(datagram), 0, 0, 64, 17, 0) + addresses + datagram
    source, target = (PEER, GUEST) if to_guest else (GUEST, PEER)
    return frame(packet, source=source, target=target, kind=0x0800)


def number_of(data: bytes | memoryview) -> int:
    """The number in a frame of `udp`."""
    return int(struct.unpack_from("!I", data, OFFLOAD_SIZE + 14 + 20 + 8)[0])


class Cable:
    """What is outside of the host's interface. It stays when the device moves."""

    def __init__(self) -> None:
        self.inside, self.outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.inside, self.outside):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        self.ports = 0
        self.carrier = False
        self.offload = False
        self.sent: list[bytes] = []
        self.announced = 0
        self.refusing = False
        self.missing = False
        self.trouble: Trouble | None = None
        self.hosts: Hosts = ()
        self.news, self.told = socket.socketpair()
        self.news.setblocking(False)

    def becomes(self, trouble: Trouble | None) -> None:
        """Others do something to the interface."""
        self.trouble = trouble
        self.told.send(b"!")

    def push(self, *frames: bytes) -> None:
        """Frames on their way to the guest."""
        for one in frames:
            self.outside.send(one)

    def close(self) -> None:
        for one in (self.inside, self.outside, self.news, self.told):
            one.close()


class CableWatch:
    """What tells of it."""

    def __init__(self, cable: Cable) -> None:
        self.cable = cable
        self.fd = cable.news.fileno()

    def look(self) -> Trouble | None:
        with contextlib.suppress(BlockingIOError):
            self.cable.news.recv(100)
        return self.cable.trouble


class CablePort:
    """The host's end."""

    def __init__(self, cable: Cable, settings: Settings) -> None:
        self.cable = cable
        self.settings = settings
        self.fd = cable.inside.fileno()
        self.watch = CableWatch(cable)
        self.hosts = cable.hosts
        cable.ports += 1
        cable.carrier = settings.carrier

    def read(self) -> bytes | None:
        try:
            return self.cable.inside.recv(1 << 17)
        except BlockingIOError:
            return None

    def write(self, data: bytes | memoryview) -> bool:
        if self.cable.refusing:
            return False
        if bytes(data[16:22]) == bytes(data[32:38]) and data[22:24] == b"\x80\x35":
            self.cable.announced += 1
            assert bytes(data) == announcement(bytes(data[16:22]))
        else:
            self.cable.sent.append(bytes(data))
        return True

    def set_offload(self, wanted: bool) -> None:
        self.cable.offload = wanted

    def set_carrier(self, up: bool) -> None:
        self.cable.carrier = up

    def close(self) -> None:
        self.cable.ports -= 1
        self.cable.carrier = False
        while self.read() is not None:
            pass  # what an interface holds is gone with it


class Cabled(Card):
    """A card with a cable for each kit."""

    of_a_test: ClassVar[bool] = True  # the cables are the tests'
    cables: ClassVar[dict[object, Cable]] = {}

    def make_port(self, settings: Settings) -> Port:
        clock = self.host.clock  # type: ignore[attr-defined]
        if clock not in self.cables:
            self.cables[clock] = Cable()
        cable = self.cables[clock]
        if cable.missing:
            raise EnvironmentProblem("no interface can be made")
        cable.trouble = None
        return CablePort(cable, settings)
