"""The guest's end of a channel, driven by a test."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from vmbus.bus.connection import LocalBuffer
from vmbus.bus.local import LocalBus
from vmbus.errors import UsageError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.status import Status
from vmbus.testkit.contract import ContractViolation, shorten
from vmbus.wire.gpa import PAGE_SIZE
from vmbus.wire.packet import PacketType

Extents = Sequence[tuple[int, int]]


class Surroundings(Protocol):
    """What a client needs of its kit."""

    bus: LocalBus

    def run(self) -> None:
        """Until everything is quiet."""

    def step(self, what: str) -> None:
        """One step of the script is done."""

    def waiting_for(self) -> str:
        """What may still happen, for messages."""


class Memory:
    """Guest memory that a packet can describe: `size` bytes from `address`."""

    def __init__(self, bus: LocalBus, size: int) -> None:
        self._bus = bus
        self._buffer: LocalBuffer = bus.allocate(-(-max(size, 1) // PAGE_SIZE) * PAGE_SIZE)
        self.address = self._buffer.iova
        self.size = size

    @property
    def data(self) -> bytes:
        """What is in it now."""
        return bytes(self._buffer.view[: self.size])

    @data.setter
    def data(self, data: bytes) -> None:
        self._buffer.view[: len(data)] = data

    def part(self, offset: int, length: int) -> list[tuple[int, int]]:
        """A part, in the form that `send` takes."""
        return [(self.address + offset, length)]

    def take_away(self) -> None:
        """The guest makes it unreachable, for tests of what the provider does then."""
        self._bus.free(self._buffer)


class Request:
    """A packet that the guest has sent.

    Attributes:
        transaction: its number on the wire; providers see the same number in `Completion.transaction`.
        payload: what was sent. done: the provider has completed it, or the channel was closed (CANCELLED).
        status: `Status.SUCCESS` or `Status.CANCELLED` when done.
    """

    def __init__(self, client: "Client", payload: bytes, wanted: bool) -> None:
        self.client = client
        self.payload = payload
        self.wanted = wanted
        self.transaction = 0
        self.done = False
        self.status: int | None = None
        self._reply = b""

    @property
    def reply(self) -> bytes:
        """What it was completed with. Raises ContractViolation when it was not."""
        if not self.done or self.status != Status.SUCCESS:
            state = "was cancelled, since the channel closed" if self.done else "is not completed"
            raise ContractViolation(
                f"packet {self.transaction} ({shorten(self.payload)}) of channel {self.client.name} {state}; expected: "
                f"completion.complete(reply) by the provider{self.client.surroundings.waiting_for()}"
            )
        return self._reply

    def completed(self, packet: Packet, status: int, reply: bytes) -> None:
        """The completion routine."""
        assert not self.done, f"packet {self.transaction} of channel {self.client.name} came back twice"
        self.done = True
        self.status = status
        self._reply = reply
        packet.free()


class HostPacket:
    """A packet that the provider has sent and the guest has taken.

    Attributes:
        payload: its bytes. pages: what it hands over of memory that the guest has lent, if it does (`TransferPages`).
            wanted: whether the provider waits for its completion. completed: whether it got it.
    """

    def __init__(self, client: "Client", completion: Completion, payload: bytes) -> None:
        self.client = client
        self.payload = payload
        self.transaction = completion.transaction
        over_pages = completion.kind == PacketType.TRANSFER_PAGES
        self.pages = completion.transfer_pages() if over_pages else None
        self.wanted = completion.wanted
        self.completed = False
        self._completion = completion

    @property
    def holds_up(self) -> bool:
        """Whether its channel is open and waits for it."""
        return self.transaction in self.client.channel.outstanding

    def complete(self, reply: bytes = b"") -> None:
        """Complete it, as a guest's driver does. Raises ChannelStateError when that was done before."""
        self.completed = True
        self._completion.complete(reply)
        self.client.surroundings.step(f"complete() of packet {self.transaction} by the guest")


class Client:
    """One channel as a guest sees it. It survives saves and restores of the provider.

    Attributes:
        requests: all that was sent, oldest first. packets: all that came from the provider, oldest first.
        answer: called with each packet from the provider; the bytes that it returns complete it, None leaves it.
    """

    def __init__(self, surroundings: Surroundings, channel: ClientChannel) -> None:
        self.surroundings = surroundings
        self.channel = channel
        self.name = channel.name
        self.requests: list[Request] = []
        self.packets: list[HostPacket] = []
        self.answer: Callable[[HostPacket], bytes | None] | None = None
        self._received = 0
        channel.set_process_packet_callbacks(self._process)

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        packet = HostPacket(self, completion, payload)
        self.packets.append(packet)
        reply = None if self.answer is None else self.answer(packet)
        if reply is not None:
            packet.completed = True
            completion.complete(reply)

    @property
    def is_open(self) -> bool:
        """Whether the channel is open."""
        return self.channel.state in (ChannelState.OPENED, ChannelState.ACTIVE)

    def open(self) -> None:
        """Donate rings and open the channel. Raises what the provider's opened callback raised to refuse."""
        self.surroundings.bus.open(self.channel)
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
        self.surroundings.bus.close(self.channel)
        self.surroundings.step("close()")

    @contextmanager
    def away(self) -> Iterator[None]:
        """Inside, the guest takes no packets: those of the provider fill the ring, and then queue on its channel."""
        self.channel.quiesce()
        try:
            yield
        finally:
            self.channel.unquiesce()

    # ---- to the provider -----------------------------------------------------------------------------------------

    def memory(self, content: bytes | int) -> Memory:
        """Guest memory with these bytes, or of that many zero bytes."""
        if isinstance(content, int):
            return Memory(self.surroundings.bus, content)
        memory = Memory(self.surroundings.bus, len(content))
        memory.data = content
        return memory

    def send(
        self, payload: bytes, *, external: Memory | Extents | None = None, wait_for_completion: bool = True
    ) -> Request:
        """Send a packet; it is taken when the kit runs.

        Args:
            external: guest memory that the packet describes, whole or as (address, length) pairs.
            wait_for_completion: ask the provider for a completion packet.
        """
        request = Request(self, payload, wait_for_completion)
        packet = self.channel.allocate_packet()
        packet.completion_routine = request.completed
        where = [(external.address, external.size)] if isinstance(external, Memory) else external
        packet.send(payload, external=where, wait_for_completion=wait_for_completion)
        request.transaction = packet.transaction
        self.requests.append(request)
        self.surroundings.step(f"send() of packet {request.transaction} by the guest")
        return request

    def request(self, payload: bytes, *, external: Memory | Extents | None = None) -> bytes:
        """Send, run, and return the reply. Raises ContractViolation when none came."""
        request = self.send(payload, external=external)
        self.surroundings.run()
        return request.reply

    # ---- from the provider ---------------------------------------------------------------------------------------

    def receive(self) -> HostPacket:
        """The oldest packet of the provider that was not received before; runs if there is none yet.

        Raises ContractViolation when none comes.
        """
        if self._received == len(self.packets):
            self.surroundings.run()
        if self._received == len(self.packets):
            raise ContractViolation(
                f"expected: a packet sent by the provider on channel {self.name}; {self._received} have come so far"
                f"{self.surroundings.waiting_for()}"
            )
        self._received += 1
        return self.packets[self._received - 1]

    @property
    def unreceived(self) -> int:
        """Packets that came and were not asked for with `receive`."""
        return len(self.packets) - self._received

    def transcript(self) -> dict[str, object]:
        """All that a guest could tell of this channel, for comparing two runs."""
        return {
            "requests": [(one.payload, one.done, one.status, one._reply) for one in self.requests],
            "packets": [(one.payload, one.wanted) for one in self.packets],
        }
