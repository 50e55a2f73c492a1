"""The rings in Python: the twin of the native ones in `vmbus/native`, which must do the same to the byte.

What a ring is, and who signals whom, is said in `vmbus.ring`, which is also where others take the rings from.
"""

from collections.abc import Callable
from struct import Struct

from vmbus.errors import PeerError, UsageError
from vmbus.memory.guest import Window
from vmbus.ring.fence import pure_fence as full_fence
from vmbus.wire.gpa import PAGE_SIZE
from vmbus.wire.packet import MAX_PACKET_SIZE, RawPacket, first_packet_size
from vmbus.wire.packet import pure_split_packets as split_packets

HEADER_SIZE = PAGE_SIZE
WRITE_INDEX = 0
READ_INDEX = 4
INTERRUPT_MASK = 8
PENDING_SEND_SIZE = 12
FEATURE_BITS = 64
FEATURE_PENDING_SEND_SIZE = 1

DEFAULT_BATCH = 16384


class RingCorrupt(PeerError):
    """The peer has put an impossible value into the ring; nothing in it can be trusted any more."""


def _index(value: int, size: int, what: str) -> int:
    if value >= size or value & 7:
        raise RingCorrupt(f"{what} is {value:#x} in a ring of {size:#x} bytes")
    return value


class _Ring:
    """What both ends share: the two windows, and figures for people.

    `batches`: how often packets were published (by the writer) or consumed (by the reader) together, each time one
    index store; `signals`: for how many of these the other end had to be signalled.
    """

    __slots__ = ("batches", "data", "header", "signals", "size")

    def __init__(self, header: Window, data: Window) -> None:
        if header.size != HEADER_SIZE or data.size < PAGE_SIZE or data.size % PAGE_SIZE:
            raise RingCorrupt(f"a ring of {header.size} header bytes and {data.size} data bytes")
        self.header = header
        self.data = data
        self.size = data.size
        self.batches = 0
        self.signals = 0

    def _own_index(self, word: int, what: str, own: int | None) -> int:
        found = self.header.load32(word)
        if own is not None and own != found:
            raise RingCorrupt(f"{what} is {found:#x} in the ring and {own:#x} in what was saved: it was overwritten")
        return _index(found, self.size, what)

    def close(self) -> None:
        """Let go of the memory; every later access raises MemoryRevoked."""
        self.header.close()
        self.data.close()

    def describe(self) -> dict[str, int]:
        """The ring's shared words, unvalidated, for inspection."""
        load = self.header.load32
        return {
            "size": self.size,
            "write_index": load(WRITE_INDEX),
            "read_index": load(READ_INDEX),
            "interrupt_mask": load(INTERRUPT_MASK),
            "pending_send_size": load(PENDING_SEND_SIZE),
            "feature_bits": load(FEATURE_BITS),
        }


class RingWriter(_Ring):
    """The writing end. Packets are staged with `put` and become visible together with `commit`.

    `largest`: ring bytes of the largest packet (descriptor, padding and trailer included) that can ever fit.
    """

    __slots__ = (
        "_free",
        "_index",
        "_packers",
        "_peer",
        "_published",
        "_requested",
        "_staged",
        "largest",
    )

    def __init__(self, header: Window, data: Window, *, own: int | None = None) -> None:
        """Attach. `own`: the write index as it was saved; None: whatever the ring has. Raises RingCorrupt."""
        super().__init__(header, data)
        self.largest = min(self.size - 16, MAX_PACKET_SIZE)
        self._index = self._own_index(WRITE_INDEX, "write index", own)
        self._published = self._index
        self._peer = _index(header.load32(READ_INDEX), self.size, "read index")
        self._free = self.size - 8 - (self._index - self._peer) % self.size
        self._staged: list[bytes] = []
        self._packers: dict[int, Callable[..., bytes]] = {}
        self._requested = header.load32(PENDING_SEND_SIZE) != 0
        header.store32(FEATURE_BITS, header.load32(FEATURE_BITS) | FEATURE_PENDING_SEND_SIZE)

    @property
    def own_index(self) -> int:
        """What we have published as write index; the ring's own word may have been overwritten since."""
        return self._published

    @property
    def staged(self) -> bytes:
        """What `commit` would publish now: ring bytes of whole packets, or nothing."""
        if len(self._staged) > 1:
            self._staged = [b"".join(self._staged)]
        return self._staged[0] if self._staged else b""

    @property
    def empty(self) -> bool:
        """Whether the reader has taken everything that was published."""
        return self.header.load32(READ_INDEX) == self._published

    def free(self) -> int:
        """Ring bytes that may be filled now. Raises RingCorrupt."""
        size = self.size
        read = _index(self.header.load32(READ_INDEX), size, "read index")
        if (read - self._peer) % size > (self._published - self._peer) % size:
            raise RingCorrupt(f"read index went from {self._peer:#x} to {read:#x}, past what was written")
        self._peer = read
        self._free = size - 8 - (self._index - read) % size
        return self._free

    def put(self, kind: int, flags: int, transaction: int, body: bytes, offset8: int = 2, /) -> bool:
        """Stage one packet; `body` is everything behind the descriptor. False: no room. Raises RingCorrupt."""
        padded = (len(body) + 7) & ~7
        total = padded + 24
        if total > self._free and total > self.free():
            return False
        pack = self._packers.get(padded)
        if pack is None:
            pack = self._packers[padded] = Struct(f"<HHHHQ{padded}sQ").pack
        start = self._index
        self._staged.append(pack(kind, offset8, (padded + 16) >> 3, flags, transaction, body, start << 32))
        self._free -= total
        start += total
        self._index = start - self.size if start >= self.size else start
        return True

    def commit(self) -> bool:
        """Publish what is staged, with one index store. True: the reader must be signalled (S1)."""
        if not self._staged:
            return False
        data = self._staged[0] if len(self._staged) == 1 else b"".join(self._staged)
        self._staged.clear()
        old = self._published
        first = self.size - old
        if len(data) <= first:
            self.data.write(old, data)
        else:
            self.data.write(old, data[:first])
            self.data.write(0, data[first:])
        header = self.header
        header.store32(WRITE_INDEX, self._index)
        self._published = self._index
        self.batches += 1
        full_fence()
        if header.load32(INTERRUPT_MASK) or header.load32(READ_INDEX) != old:
            return False
        self.signals += 1
        return True

    def request_space(self, total: int, /) -> bool:
        """Ask to be signalled when `total` ring bytes are free (S4). True: they are free already, put again."""
        # A little more than one packet is asked for, so that a nearly full ring is not signalled for every packet.
        wanted = min(max(total, (self.size - 8) // 4), self.largest) & ~7
        self.header.store32(PENDING_SEND_SIZE, wanted)
        self._requested = True
        full_fence()
        if self.free() < total:
            return False
        self.cancel_request()
        return True

    def cancel_request(self) -> None:
        """Nothing is waiting for space any more."""
        if self._requested:
            self.header.store32(PENDING_SEND_SIZE, 0)
            self._requested = False


class RingReader(_Ring):
    """The reading end. `fetch` copies packets, `advance` gives their space back. `batch`: the last copy made."""

    __slots__ = ("_index", "_peer", "batch")

    def __init__(self, header: Window, data: Window, *, own: int | None = None) -> None:
        """Attach. `own`: the read index as it was saved; None: whatever the ring has. Raises RingCorrupt."""
        super().__init__(header, data)
        self._index = self._own_index(READ_INDEX, "read index", own)
        self._peer = _index(header.load32(WRITE_INDEX), self.size, "write index")
        self.batch = b""

    @property
    def own_index(self) -> int:
        """What we have published as read index; the ring's own word may have been overwritten since."""
        return self._index

    def available(self) -> int:
        """Bytes that the writer has published and we have not consumed. Raises RingCorrupt."""
        size = self.size
        write = _index(self.header.load32(WRITE_INDEX), size, "write index")
        if (self._peer - self._index) % size > (write - self._index) % size:
            raise RingCorrupt(f"write index went back from {self._peer:#x} to {write:#x}")
        self._peer = write
        return (write - self._index) % size

    def _copy(self, length: int) -> bytes:
        first = self.size - self._index
        if length <= first:
            return self.data.read(self._index, length)
        return self.data.read(self._index, first) + self.data.read(0, length - first)

    def fetch(self, limit: int = DEFAULT_BATCH, /) -> tuple[list[RawPacket], str | None]:
        """Copy about `limit` bytes of packets (at least one packet) and parse the copy.

        Returns the packets (none: the ring is empty) and, when a malformed packet follows them, what is wrong.
        Nothing is consumed. Raises RingCorrupt for impossible indices.
        """
        available = self.available()
        if not available:
            return [], None
        length = min(available, limit)
        if available > limit:
            # A packet longer than the limit is copied and parsed once, too. (Only a hint: it may change before that.)
            hint = first_packet_size(self.data.read(self._index, 8) + bytes(8))
            if length < hint <= available:
                length = hint
        self.batch = data = self._copy(length)
        packets, error = split_packets(data)
        if not packets and error is None:
            # It became longer since it was looked at. Copy again, and believe only the new copy.
            wanted = max(first_packet_size(data), limit)
            if wanted <= available:
                self.batch = self._copy(wanted)
                packets, error = split_packets(self.batch)
            if not packets and error is None:
                error = f"a packet claims {wanted} bytes and {available} were written"
        return packets, error

    def advance(self, consumed: int, /) -> bool:
        """Give `consumed` bytes back to the writer. True: it waits for space and must be signalled (S2)."""
        if not 0 <= consumed <= self.size:
            raise UsageError(f"{consumed} bytes cannot be consumed from a ring of {self.size}")
        index = self._index + consumed
        size = self.size
        self._index = index = index - size if index >= size else index
        header = self.header
        header.store32(READ_INDEX, index)
        self.batches += 1
        full_fence()
        pending = header.load32(PENDING_SEND_SIZE) & ~7
        if not pending:
            return False
        free = size - 8 - self.available()
        if not free - consumed < pending <= free:
            return False
        self.signals += 1
        return True

    def mask(self) -> None:
        """We are awake: the writer need not signal."""
        self.header.store32(INTERRUPT_MASK, 1)

    def unmask(self) -> bool:
        """Go idle (S3). True: it is quiet. False: packets came meanwhile; masked again, go on reading."""
        self.header.store32(INTERRUPT_MASK, 0)
        full_fence()
        if not self.available():
            return True
        self.header.store32(INTERRUPT_MASK, 1)
        return False
