"""The guest's end of a channel, driven by a test: the same for every device under test (`vmbus.testkit.device`).

What carries a channel is an `End`: a client channel in this process (`ChannelEnd`), or one in a VM's guest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from vmbus.errors import UsageError, WaitTimeout
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.status import Status
from vmbus.testkit.contract import ContractViolation, shorten
from vmbus.wire.gpa import PAGE_SIZE
from vmbus.wire.packet import PacketType, TransferPages
from vmbus_guest.pci import DmaBuffer

TIMEOUT = 10.0
"""Seconds that a call waits by itself: in the kit of virtual time."""

Extents = Sequence[tuple[int, int]]


class Pages(Protocol):
    """Guest memory that the device can reach, from the I/O address `iova` on."""

    @property
    def iova(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes: ...

    def write(self, offset: int, data: bytes) -> None: ...

    def take_away(self) -> None:
        """Make it unreachable. Raises UsageError where that cannot be done for these pages alone."""


class Surroundings(Protocol):
    """What a guest's end needs of its device."""

    def allocate(self, size: int) -> Pages:
        """Zeroed memory; `size` is a multiple of 4096 bytes."""

    def wait_until(self, condition: Callable[[], bool], timeout: float = TIMEOUT, what: str = "a condition") -> None:
        """Let both ends work until `condition()` holds. Raises WaitTimeout."""

    def step(self, what: str) -> None:
        """One step of the test is done."""

    def waiting_for(self) -> str:
        """What may still happen, as the end of a message."""


class Taken(Protocol):
    """A packet that has come, with which one completes it."""

    @property
    def transaction(self) -> int: ...

    @property
    def wanted(self) -> bool:
        """Whether its sender waits for a completion."""

    def complete(self, reply: bytes = b"") -> None: ...


class End(Protocol):
    """What carries one channel of the guest's."""

    @property
    def name(self) -> str: ...

    @property
    def is_open(self) -> bool: ...

    def open(self) -> None:
        """Donate rings and open the channel, which is offered or will be. Raises what refuses it."""

    def close(self) -> None: ...

    def listen(self, take: Callable[[Taken, bytes, TransferPages | None], None]) -> None:
        """Have `take` called with each packet that comes, its payload, and what it hands over of lent memory."""

    def send(
        self, payload: bytes, external: Extents | None, wanted: bool, completed: Callable[[int, bytes], None]
    ) -> int:
        """Send a packet, whose number this returns; `completed` is called with status and reply in the end."""

    def holds(self, transaction: int) -> bool:
        """Whether a packet that came is to be completed yet."""

    def away(self, away: bool) -> None:
        """Take no packets from here on, or take them again."""


class ChannelEnd:
    """A client channel in this process: implements `End`."""

    def __init__(
        self, channel: ClientChannel, opened: Callable[[ClientChannel], None], closed: Callable[[ClientChannel], None]
    ) -> None:
        self.channel = channel
        self.open = lambda: opened(channel)
        self.close = lambda: closed(channel)

    @property
    def name(self) -> str:
        return self.channel.name

    @property
    def is_open(self) -> bool:
        return self.channel.state in (ChannelState.OPENED, ChannelState.ACTIVE)

    def listen(self, take: Callable[[Taken, bytes, TransferPages | None], None]) -> None:
        def process(_: Channel, completion: Completion, payload: bytes) -> None:
            over_pages = completion.kind == PacketType.TRANSFER_PAGES
            take(completion, payload, completion.transfer_pages() if over_pages else None)

        self.channel.set_process_packet_callbacks(process)

    def send(
        self, payload: bytes, external: Extents | None, wanted: bool, completed: Callable[[int, bytes], None]
    ) -> int:
        def completion_routine(packet: Packet, status: int, reply: bytes) -> None:
            completed(status, reply)
            packet.free()

        packet = self.channel.allocate_packet()
        packet.completion_routine = completion_routine
        packet.send(payload, external=external, wait_for_completion=wanted)
        return packet.transaction

    def holds(self, transaction: int) -> bool:
        return transaction in self.channel.outstanding

    def away(self, away: bool) -> None:
        if away:
            self.channel.quiesce()
        else:
            self.channel.unquiesce()


class BufferPages:
    """Memory that the test sees in this process: implements `Pages`."""

    def __init__(self, buffer: DmaBuffer, free: Callable[[DmaBuffer], None] | None = None) -> None:
        """`free` makes it unreachable."""
        self.buffer = buffer
        self.iova = buffer.iova
        self._free = free

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.buffer.view[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self.buffer.view[offset : offset + len(data)] = data

    def take_away(self) -> None:
        if self._free is None:
            raise UsageError("only in the kit can some of a guest's memory be taken away alone")
        self._free(self.buffer)


class Memory:
    """Guest memory that a packet can describe: `size` bytes from `address`."""

    def __init__(self, pages: Pages, size: int) -> None:
        self.pages = pages
        self.address = pages.iova
        self.size = size

    @property
    def data(self) -> bytes:
        """What is in it now."""
        return self.pages.read(0, self.size)

    @data.setter
    def data(self, data: bytes) -> None:
        self.pages.write(0, data)

    def read(self, offset: int, length: int) -> bytes:
        """Some of it."""
        return self.pages.read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Change some of it."""
        self.pages.write(offset, data)

    def part(self, offset: int = 0, length: int | None = None) -> list[tuple[int, int]]:
        """A part, in the form that `send` takes."""
        return [(self.address + offset, self.size - offset if length is None else length)]

    def take_away(self) -> None:
        """The guest makes it unreachable, for tests of what the provider does then. Raises UsageError but in the kit,
        since elsewhere it shares pieces with the rings."""
        self.pages.take_away()


class Request:
    """A packet that the guest has sent.

    Attributes:
        transaction: its number on the wire; providers see the same number in `Completion.transaction`.
        payload: what was sent. done: the provider has completed it, or the channel was closed (CANCELLED).
        status: `Status.SUCCESS` or `Status.CANCELLED` when done.
    """

    def __init__(self, guest: Guest, payload: bytes, wanted: bool) -> None:
        self.guest = guest
        self.payload = payload
        self.wanted = wanted
        self.transaction = 0
        self.done = False
        self.status: int | None = None
        self._reply = b""

    @property
    def reply(self) -> bytes:
        """What it was completed with, padded to a multiple of 8. Raises ContractViolation when it was not."""
        if not self.done or self.status != Status.SUCCESS:
            state = "was cancelled, since the channel closed" if self.done else "is not completed"
            raise ContractViolation(
                f"packet {self.transaction} ({shorten(self.payload)}) of channel {self.guest.name} {state}; expected: "
                f"completion.complete(reply) by the provider{self.guest.surroundings.waiting_for()}"
            )
        return self._reply

    def wait(self, timeout: float = TIMEOUT) -> bytes:
        """The reply, when it has come. Raises ContractViolation when it has not after `timeout` seconds."""
        with suppress(WaitTimeout):
            self.guest.surroundings.wait_until(lambda: self.done, timeout, f"the completion of {self.transaction}")
        return self.reply

    def completed(self, status: int, reply: bytes) -> None:
        """Its completion has come."""
        assert not self.done, f"packet {self.transaction} of channel {self.guest.name} came back twice"
        self.done = True
        self.status = status
        self._reply = reply


class HostPacket:
    """A packet that the provider has sent and the guest has taken.

    Attributes:
        payload: its bytes. pages: what it hands over of memory that the guest has lent, if it does (`TransferPages`).
            wanted: whether the provider waits for its completion. completed: whether it got it.
    """

    def __init__(self, guest: Guest, taken: Taken, payload: bytes, pages: TransferPages | None) -> None:
        self.guest = guest
        self.payload = payload
        self.pages = pages
        self.transaction = taken.transaction
        self.wanted = taken.wanted
        self.completed = False
        self._taken = taken

    @property
    def holds_up(self) -> bool:
        """Whether its channel is open and waits for it."""
        return self.guest.end.holds(self.transaction)

    def complete(self, reply: bytes = b"") -> None:
        """Complete it, as a guest's driver does. Raises ChannelStateError when that was done before."""
        self.completed = True
        self._taken.complete(reply)
        self.guest.surroundings.step(f"complete() of packet {self.transaction} by the guest")


class Guest:
    """One channel as a guest sees it. It survives saves, restores and migrations of the device.

    Attributes:
        requests: all that was sent, oldest first. packets: all that came from the provider, oldest first.
        answer: called with each packet from the provider; the bytes that it returns complete it, None leaves it.
    """

    def __init__(self, surroundings: Surroundings, end: End) -> None:
        self.surroundings = surroundings
        self.end = end
        self.name = end.name
        self.requests: list[Request] = []
        self.packets: list[HostPacket] = []
        self.answer: Callable[[HostPacket], bytes | None] | None = None
        self.received = 0
        end.listen(self._take)

    @property
    def channel(self) -> ClientChannel:
        """The KMCL channel. Raises UsageError where that is in a VM."""
        if not isinstance(self.end, ChannelEnd):
            raise UsageError(f"channel {self.name} is in the VM: only what Guest offers can be done with it")
        return self.end.channel

    def _take(self, taken: Taken, payload: bytes, pages: TransferPages | None) -> None:
        packet = HostPacket(self, taken, payload, pages)
        self.packets.append(packet)
        reply = None if self.answer is None else self.answer(packet)
        if reply is not None:
            packet.completed = True
            taken.complete(reply)

    @property
    def is_open(self) -> bool:
        """Whether the channel is open."""
        return self.end.is_open

    def open(self) -> None:
        """Donate rings and open the channel. Raises what the provider's opened callback raised to refuse."""
        self.end.open()
        self.surroundings.step("open()")

    def close(self) -> None:
        """Close the channel, as the guest's driver does when it ends. What was not answered comes back CANCELLED.

        Raises UsageError while the guest itself holds packets that the provider waits for.
        """
        held = [packet.transaction for packet in self.packets if not packet.completed and packet.holds_up]
        if held:
            raise UsageError(
                f"the guest itself still holds packets {held} of channel {self.name}; complete() them first"
            )
        self.end.close()
        self.surroundings.step("close()")

    @contextmanager
    def away(self) -> Iterator[None]:
        """Inside, the guest takes no packets: those of the provider fill the ring, and then queue on its channel."""
        self.end.away(True)
        try:
            yield
        finally:
            self.end.away(False)

    # ---- to the provider -----------------------------------------------------------------------------------------

    def memory(self, content: bytes | int) -> Memory:
        """Guest memory with these bytes, or of that many zero bytes."""
        size = content if isinstance(content, int) else len(content)
        memory = Memory(self.surroundings.allocate(-(-max(size, 1) // PAGE_SIZE) * PAGE_SIZE), size)
        if not isinstance(content, int):
            memory.data = content
        return memory

    def send(
        self, payload: bytes, *, external: Memory | Extents | None = None, wait_for_completion: bool = True
    ) -> Request:
        """Send a packet; it is taken when the test waits.

        Args:
            external: guest memory that the packet describes, whole or as (address, length) pairs.
            wait_for_completion: ask the provider for a completion packet.
        """
        request = Request(self, payload, wait_for_completion)
        where = external.part() if isinstance(external, Memory) else external
        request.transaction = self.end.send(payload, where, wait_for_completion, request.completed)
        self.requests.append(request)
        self.surroundings.step(f"send() of packet {request.transaction} by the guest")
        return request

    def request(self, payload: bytes, *, external: Memory | Extents | None = None, timeout: float = TIMEOUT) -> bytes:
        """Send a request, wait for its reply, and return that. Raises ContractViolation when none came."""
        return self.send(payload, external=external).wait(timeout)

    # ---- from the provider ---------------------------------------------------------------------------------------

    def receive(self, timeout: float = TIMEOUT) -> HostPacket:
        """The oldest packet of the provider that was not received before; waits if there is none yet.

        Raises ContractViolation when none comes.
        """
        with suppress(WaitTimeout):
            self.surroundings.wait_until(lambda: bool(self.unreceived), timeout, f"a packet on channel {self.name}")
        if not self.unreceived:
            raise ContractViolation(
                f"expected: a packet sent by the provider on channel {self.name}; {self.received} have come so far"
                f"{self.surroundings.waiting_for()}"
            )
        self.received += 1
        return self.packets[self.received - 1]

    @property
    def unreceived(self) -> int:
        """Packets that came and were not asked for with `receive`."""
        return len(self.packets) - self.received

    def transcript(self) -> dict[str, object]:
        """All that a guest could tell of this channel, for comparing two runs."""
        return {
            "requests": [(one.payload, one.done, one.status, one._reply) for one in self.requests],
            "packets": [(one.payload, one.wanted) for one in self.packets],
        }
