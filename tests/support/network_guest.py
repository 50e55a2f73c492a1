"""A guest's end of a VMBus network card, as Linux's hv_netvsc is one: in the test kit, and at a real device server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from struct import pack, unpack_from
from typing import Any

from support.nic import Cabled
from vmbus.providers.network import NetworkProvider, oids
from vmbus.providers.network.spread import DEFAULT_KEY, UDP4
from vmbus.testkit import Guest, HostPacket, Memory, ProviderTest
from vmbus.testkit.loopback.pair import DriverSide
from vmbus.wire import nvsp, rndis
from vmbus.wire.ethernet import NO_OFFLOAD
from vmbus.wire.packet import TransferPages

HASH_INFO = 0x1701 | UDP4
"""What Linux says, and datagrams beside it."""
UP = 0xD
"""The packet filter of an interface that is up."""
SUCCESS = nvsp.Status.SUCCESS
CONTROL_AREA = 8192
"""Bytes of memory for control messages, two pages: one may cross them."""


class CabledNetwork(Cabled, NetworkProvider):
    """The provider, with a cable for each kit."""


Take = Callable[[bytes, TransferPages | None, Callable[[bytes], None]], None]
"""Called with a packet of the host's: its payload, what it hands over, and how it is completed."""


class Ends:
    """What carries the guest's packets: its ends of a card's channels, in the kit or over a driver. `index`: of the
    channel."""

    def __init__(self, device: ProviderTest | DriverSide, ring_pages: int = 32) -> None:
        self.device = device
        self.ring_pages = ring_pages
        self.guests: dict[int, Guest] = {}

    def open(self, index: int, take: Take) -> None:
        def answer(packet: HostPacket) -> bytes | None:
            replies: list[bytes] = []
            inside = True

            def done(reply: bytes) -> None:
                if inside:
                    replies.append(reply)
                else:
                    packet.complete(reply)

            take(packet.payload, packet.pages, done)
            inside = False
            return replies[0] if replies else None

        self.guests[index] = self.device.open(
            nvsp.NVSP_TYPE, subchannel=index, ring_pages=self.ring_pages, answer=answer
        )

    def close(self) -> None:
        for index in sorted(self.guests, reverse=True):
            if self.guests[index].is_open:
                self.guests[index].close()
        self._run()

    def _run(self) -> None:
        if isinstance(self.device, ProviderTest):
            self.device.run()

    def ask(self, index: int, payload: bytes, external: Sequence[tuple[int, int]] | None) -> bytes:
        return self.guests[index].request(payload, external=external, timeout=20.0)

    def tell(self, payload: bytes) -> None:
        self.guests[0].send(payload, wait_for_completion=False)
        self._run()

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        self._run()
        self.device.wait_until(condition, 20.0, what)

    def allocate(self, size: int) -> Memory:
        return Memory(self.device.allocate(-(-size // 4096) * 4096), size)

    def lend(self, memory: Memory, size: int) -> int:
        return self.guests[0].channel.create_gpadl([(memory.address, size)])


class NetworkGuest:
    """A guest that has set the card up as far as `steps` say, and completes what comes unless `holding`.

    Attributes:
        frames: that came, with an empty offload header in front. messages: the RNDIS messages, whole.
        link: indications in their order. replies: to control requests, by their number.
    """

    STEPS = ("init", "configure", "receive", "send", "initialize", "filter")

    def __init__(
        self,
        ends: Ends,
        *,
        version: int = nvsp.VERSION_6_1,
        mtu: int = 1500,
        receive: int = 2 << 20,
        send: int = 64 << 10,
        upto: str = "filter",
        coalescing: bool = False,
    ) -> None:
        self.ends = ends
        self.version = version
        self.mtu = mtu
        self.receive_size, self.send_size = receive, send
        self.coalescing = coalescing
        self.holding = False
        self.held: list[Callable[[], None]] = []
        self.frames: list[bytes] = []
        self.messages: list[bytes] = []
        self.packets: list[int] = []  # how many messages each had
        self.by_channel: dict[int, list[bytes]] = {}
        self.link: list[int] = []
        self.replies: dict[int, bytes] = {}
        self.section = self.sections = self.send_section = 0
        self._next = 1
        self.receive: Memory = ends.allocate(receive)
        self.send_memory: Memory = ends.allocate(send)
        self.area: Memory = ends.allocate(CONTROL_AREA)
        self.set_up(upto)

    def set_up(self, upto: str = "filter") -> None:
        """Open the card and go through the steps, as far as this one."""
        self.ends.open(0, partial(self._take, 0))
        for step in self.STEPS[: self.STEPS.index(upto) + 1]:
            getattr(self, f"step_{step}")()

    # ---- steps -------------------------------------------------------------------------------------------------------

    def step_init(self) -> None:
        answer = self.nvsp(nvsp.Init(self.version, self.version))
        assert answer.type == nvsp.Type.INIT_COMPLETE and answer.words[2] == SUCCESS, answer

    def step_configure(self) -> None:
        self.ends.tell(nvsp.pack_message(nvsp.NdisConfig(self.mtu + 14, 0x8)))
        self.ends.tell(nvsp.pack_message(nvsp.NdisVersion(6, 30)))

    def step_receive(self) -> None:
        handle = self.ends.lend(self.receive, self.receive_size)
        answer = self.nvsp(nvsp.ReceiveBuffer(handle, nvsp.RECEIVE_BUFFER_ID))
        assert answer.type == nvsp.Type.RECEIVE_BUFFER_COMPLETE, answer
        status, sections, offset, self.section, self.sections, _ = answer.words[:6]
        assert (status, sections, offset) == (SUCCESS, 1, 0) and self.section >= 68
        assert self.section * self.sections <= self.receive_size

    def step_send(self) -> None:
        answer = self.nvsp(nvsp.SendBuffer(self.ends.lend(self.send_memory, self.send_size), 0))
        assert answer.type == nvsp.Type.SEND_BUFFER_COMPLETE and answer.words[0] == SUCCESS, answer
        self.send_section = answer.words[1]

    def step_initialize(self) -> None:
        reply = self.control(rndis.initialize)
        assert unpack_from("<I", reply, 12)[0] == 0 and unpack_from("<I", reply, 32)[0] == rndis.PACKETS_PER_MESSAGE
        parameters = bytearray(pack("<BBH", 0x80, 3, 28) + bytes(24))
        parameters[4:9] = b"\1\4\4\4\4"
        parameters[22:24] = b"\2\2" if self.coalescing else b"\1\1"
        assert self.set(oids.OFFLOAD_PARAMETERS, bytes(parameters)) == 0
        self.query(oids.MEDIA_CONNECT_STATUS)

    def open_queues(self, count: int) -> int:
        """Ask for so many channels, open them, and have frames spread over them; how many there are."""
        answer = self.nvsp(nvsp.SubChannels(1, count - 1))
        assert answer.type == nvsp.Type.SUB_CHANNELS and answer.words[0] == SUCCESS, answer
        granted = answer.words[1]
        assert 1 <= granted <= count - 1
        for index in range(1, granted + 1):
            self.ends.open(index, partial(self._take, index))
        table = [number % (granted + 1) for number in range(oids.RSS_ENTRIES)]
        assert self.spread(table) == 0
        return granted + 1

    def spread(
        self, table: Sequence[int] = (), key: bytes = DEFAULT_KEY, *, info: int = HASH_INFO, flags: int = 0
    ) -> int:
        """Have frames spread over the queues; the status of the answer."""
        places = (4 * len(table), 40, len(key), 40 + 4 * len(table))
        head = pack("<BBHHHIHxxIHxxIIII", 0x89, 2, 40, flags, 0, info, *places, 0, 0, 0)
        return self.set(oids.RSS_PARAMETERS, head + pack(f"<{len(table)}I", *table) + key)

    def step_filter(self) -> None:
        assert self.set_filter(UP) == 0

    def shut_down(self) -> None:
        """As Linux does it: filter, HALT, the buffers, the channel."""
        self.set_filter(0)
        self.halt()
        self.revoke()
        self.ends.close()

    def revoke(self) -> None:
        self.ends.tell(nvsp.pack_message(nvsp.RevokeReceiveBuffer(nvsp.RECEIVE_BUFFER_ID)))
        self.ends.tell(nvsp.pack_message(nvsp.RevokeSendBuffer(0)))

    def halt(self) -> None:
        assert self.send_control(rndis.halt(self._number())) == SUCCESS

    # ---- messages ----------------------------------------------------------------------------------------------------

    def _number(self) -> int:
        self._next += 1
        return self._next - 1

    def nvsp(self, message: nvsp.Message) -> nvsp.Parsed:
        return nvsp.parse_answer(self.ends.ask(0, nvsp.pack_message(message), None))

    def send_control(self, message: bytes) -> int:
        """A control message, across two pages; the status of its packet."""
        start = 4096 - len(message) // 2
        self.area.write(start, message)
        return self.send_rndis(nvsp.CONTROL_CHANNEL, nvsp.NO_SECTION, 0, [(self.area.address + start, len(message))])

    def send_rndis(
        self, channel: int, section: int, size: int, external: list[tuple[int, int]] | None, index: int = 0
    ) -> int:
        answer = nvsp.parse_answer(
            self.ends.ask(index, nvsp.pack_message(nvsp.Rndis(channel, section, size)), external)
        )
        assert answer.type == nvsp.Type.RNDIS_COMPLETE, answer
        return answer.words[0]

    def control(self, make: Callable[..., bytes], *arguments: Any) -> bytes:
        """A control request, and the answer to it."""
        number = self._number()
        assert self.send_control(make(number, *arguments)) == SUCCESS
        self.ends.wait(lambda: number in self.replies, f"the answer to control request {number}")
        return self.replies[number]

    def query(self, oid: int, data: bytes = b"") -> bytes | None:
        """The data of the answer; None when there is none, and the status says why."""
        reply = self.control(rndis.query, oid, data)
        kind, size, _, status, length, offset = unpack_from("<6I", reply)
        assert kind == rndis.Type.QUERY_COMPLETE and size == len(reply) and offset == 16 and length == size - 24
        return reply[24:] if status == 0 else None

    def set(self, oid: int, data: bytes) -> int:
        """The status of the answer."""
        reply = self.control(rndis.set_oid, oid, data)
        return int(unpack_from("<I", reply, 12)[0])

    def set_filter(self, wanted: int) -> int:
        return self.set(oids.PACKET_FILTER, pack("<I", wanted))

    # ---- frames ------------------------------------------------------------------------------------------------------

    def send(self, *frames: bytes, shape: int = 1, information: bytes = b"", index: int = 0) -> int:
        """Frames, each without an offload header, in one packet; the status of the packet.

        Shape 1: all in a section of the send buffer. 2: one, in pages of its own, header and data apart. 3: all but the
        last one's data in a section.
        """
        whole = [rndis.packet_header(len(one), information) + one for one in frames]
        whole = [one + bytes(-len(one) % 8) if place < len(whole) - 1 else one for place, one in enumerate(whole)]
        whole = [one[:4] + pack("<I", len(one)) + one[8:] for one in whole]
        data = b"".join(whole)
        head = 0 if shape == 2 else len(data) if shape == 1 else len(data) - len(frames[-1])
        section = nvsp.NO_SECTION if shape == 2 else 1
        if shape != 2:
            self.send_memory.write(self.send_section, data[:head])
        external = None
        if head < len(data):
            memory = self.ends.allocate(len(data) + 8192)
            # The header crosses a page, as it may with a driver that gives each range one page.
            memory.write(4096 - 20, data[head:])
            external = [(memory.address + 4096 - 20, 20), (memory.address + 4096, len(data) - head - 20)]
            external = (
                [(at, size) for at, size in external if size > 0]
                if len(data) - head > 20
                else [(memory.address + 4096 - 20, len(data) - head)]
            )
        return self.send_rndis(nvsp.DATA_CHANNEL, section, head, external, index)

    def _take(self, index: int, payload: bytes, pages: TransferPages | None, done: Callable[[bytes], None]) -> None:
        """A packet of the host's, checked as Linux does, and more."""
        kind, channel, section, size = unpack_from("<4I", payload)
        assert kind == nvsp.Type.RNDIS and (section, size) == (nvsp.NO_SECTION, 0), payload
        assert pages is not None and pages.page_set == nvsp.RECEIVE_BUFFER_ID and len(pages.ranges) <= 375
        assert 24 + 8 * len(pages.ranges) + len(payload) <= 4624
        self.packets.append(len(pages.ranges))
        for offset, length in pages.ranges:
            assert offset + length <= self.section * self.sections and 8 <= length <= self.section
            message = self.receive.read(offset, length)
            assert unpack_from("<I", message, 4)[0] == length, "one range is one message"
            self.messages.append(message)
            if channel == nvsp.DATA_CHANNEL:
                frame = self._frame_of(message)
                self.frames.append(frame)
                self.by_channel.setdefault(index, []).append(frame)
            else:
                self._take_control(message)
        answer = pack("<II", nvsp.Type.RNDIS_COMPLETE, SUCCESS).ljust(40, b"\0")
        if self.holding:
            self.held.append(partial(done, answer))
        else:
            done(answer)

    @staticmethod
    def _frame_of(message: bytes) -> bytes:
        found = rndis.parse(memoryview(message))
        assert isinstance(found, rndis.Packet)
        (at, total) = unpack_from("<II", message, 28)
        assert total % 16 == 0 and (at == 36 or not total), "per-packet information has 16 bytes a piece"
        for place in range(44, 44 + total, 16):
            assert unpack_from("<I", message, place)[0] == 16 and unpack_from("<I", message, place + 8)[0] == 12
        return NO_OFFLOAD + bytes(found.frame)

    def _take_control(self, message: bytes) -> None:
        kind, _, number = unpack_from("<III", message)
        if kind == rndis.Type.INDICATE:
            self.link.append(number)
        else:
            assert number not in self.replies, "answered twice"
            self.replies[number] = message

    def release(self) -> None:
        """Complete what was held."""
        self.holding = False
        held, self.held = self.held, []
        for done in held:
            done()
