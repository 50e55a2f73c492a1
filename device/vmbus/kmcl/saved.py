"""The saved form of a channel: chunks, each a self-describing, versioned record.

A channel is one `ChannelChunk`, then one chunk per packet in use (and per completion that found no room), in the order
in which they will leave. Inside a packet's chunk, `lib` is the library's own state of the packet (LibBuf) and `save`
what the provider's save callback wrote (SaveBuf). Both are opaque to the other side.

Everything is encoded once and decoded once: `decode_channel` checks each field's type and range, ignores unknown
fields, refuses unknown versions and whatever cannot be a channel, and raises StateError and nothing else.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Annotated, NamedTuple
from uuid import UUID

import msgspec

from vmbus.errors import StateError
from vmbus.util.records import U16, U32, U64, Guid, Refusing, StructVersion, decode
from vmbus.wire.packet import DESCRIPTOR_SIZE, MAX_PACKET_SIZE, PacketType, packet_size

VERSION = 1
# The oldest version that can still be restored; apart from what we write.
OLDEST_VERSION = 1

Bytes = Annotated[bytes, msgspec.Meta(max_length=MAX_PACKET_SIZE)]
MAX_SAVE_BUF = 1 << 24  # bytes that an owner may save for one packet
MAX_ENTRIES = 1 << 20  # packets and completions of one channel; a save of more is refused
SaveBytes = Annotated[bytes, msgspec.Meta(max_length=MAX_SAVE_BUF)]
VersionNumber = Annotated[int, msgspec.Meta(ge=OLDEST_VERSION, le=VERSION)]


class ChannelChunk(msgspec.Struct, tag="channel", frozen=True, gc=False):
    """The channel itself. `entries` is the number of chunks that follow.

    `force_new`: it is made anew at the restore, so that its packets in use were not saved: `left_queued`, `left_sent`.
    """

    version: VersionNumber
    started: bool
    next_transaction: Annotated[int, msgspec.Meta(ge=1, le=1 << 62)]
    entries: Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
    force_new: bool = False
    left_queued: U32 = 0
    left_sent: U32 = 0


class PacketChunk(msgspec.Struct, tag="packet", frozen=True, gc=False):
    """One outgoing packet in use."""

    lib: Annotated[bytes, msgspec.Meta(max_length=MAX_PACKET_SIZE + 256)]
    save: SaveBytes
    version: VersionNumber = 1  # what chunks without it are


class CompletionChunk(msgspec.Struct, tag="completion", frozen=True, gc=False):
    """A completion packet that waits for room in the ring."""

    transaction: U64
    body: Bytes
    version: VersionNumber = 1  # what chunks without it are


Chunk = ChannelChunk | PacketChunk | CompletionChunk


class LibBuf(msgspec.Struct, frozen=True, gc=False):
    """The library's state of one packet. `body` is kept while the packet is queued; a sent one lies in the ring."""

    version: VersionNumber
    transaction: Annotated[int, msgspec.Meta(ge=0)]
    queued: bool
    kind: Annotated[int, msgspec.Meta(ge=int(PacketType.INBAND), le=int(PacketType.GPA_DIRECT))]
    offset8: Annotated[int, msgspec.Meta(ge=2, le=0xFFFF)]
    flags: Annotated[int, msgspec.Meta(ge=0, le=1)]
    body: Bytes


class RingRecord(msgspec.Struct, frozen=True):
    """The words that a ring's two ends share, as they were at the save: for people, but for `own_index`. That is what
    we had published there, from our own memory; None in states that did not keep it."""

    size: U32
    write_index: U32
    read_index: U32
    interrupt_mask: U32
    pending_send_size: U32
    own_index: U32 | None = None
    structure_version: StructVersion = 1


class Counts(NamedTuple):
    """Packets in saved channels, by their state at the save; `completions` wait for room in a ring."""

    queued: int
    sent: int
    completions: int

    @classmethod
    def total(cls, counts: Iterable["Counts"]) -> "Counts":
        return cls(*map(sum, zip((0, 0, 0), *counts, strict=True)))


class SavedPacket(msgspec.Struct, frozen=True, gc=False):
    """An outgoing packet in use: the library's state, decoded and as bytes, and what its owner saved for it."""

    lib: LibBuf
    lib_buf: bytes
    save: bytes


class SavedChannel(NamedTuple):
    """A decoded channel: `sent` packets, then what was queued, in their order; how many of that are `completions`, and
    the bytes of the longest body."""

    head: ChannelChunk
    sent: list[SavedPacket]
    queue: list[SavedPacket | CompletionChunk]
    completions: int
    longest: int

    def check_fits(self, name: str, largest: int) -> None:
        """Raises StateError for what could never leave through a ring that takes packets of `largest` ring bytes."""
        if packet_size(self.longest) > largest:
            raise StateError(
                f"a packet of channel {name} takes {packet_size(self.longest)} ring bytes, and can never fit into its "
                f"ring (at most {largest})"
            )

    @property
    def counts(self) -> Counts:
        """How many packets, by their state."""
        return Counts(len(self.queue) - self.completions, len(self.sent), self.completions)

    @property
    def left_out(self) -> Counts:
        """How many more were in use and not saved."""
        return Counts(self.head.left_queued, self.head.left_sent, 0)


class ChannelRecord(msgspec.Struct, frozen=True, dict=True):
    """One channel's chunks. `incoming`, `outgoing`: its rings, while it was open."""

    instance: Guid
    chunks: Annotated[list[bytes], msgspec.Meta(max_length=MAX_ENTRIES + 1)]
    subchannel: U16 = 0
    incoming: RingRecord | None = None
    outgoing: RingRecord | None = None
    structure_version: StructVersion = 1

    @property
    def key(self) -> tuple[bytes, int]:
        """Which channel it is: instance and sub-channel."""
        return self.instance, self.subchannel

    @property
    def own_indices(self) -> tuple[int | None, int | None]:
        """What we had published: of the incoming ring its read index, of the outgoing one its write index."""
        rings = self.incoming, self.outgoing
        incoming, outgoing = (None if ring is None else ring.own_index for ring in rings)
        return incoming, outgoing

    @cached_property
    def decoded(self) -> SavedChannel:
        """The chunks, decoded when somebody first asks. Raises StateError."""
        number = f" (sub-channel {self.subchannel})" if self.subchannel else ""
        return decode_channel(self.chunks, f"{UUID(bytes_le=self.instance)}{number}")


_INBAND = int(PacketType.INBAND)
_KINDS = {_INBAND, int(PacketType.TRANSFER_PAGES), int(PacketType.GPA_DIRECT)}
_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
_chunk_decoder: msgspec.msgpack.Decoder[Chunk] = msgspec.msgpack.Decoder(Chunk)
_lib_decoder = msgspec.msgpack.Decoder(LibBuf)


def decode_chunk(data: bytes) -> Chunk:
    """One chunk. Raises StateError."""
    return decode(_chunk_decoder, data, "a chunk of saved channel state")


def decode_lib(data: bytes) -> LibBuf:
    """The library's state of a packet. Raises StateError."""
    lib = decode(_lib_decoder, data, "the saved state of a packet (LibBuf)")
    _check_lib(lib)
    return lib


def _check_lib(lib: LibBuf) -> None:
    headers = lib.offset8 * 8 - DESCRIPTOR_SIZE
    if lib.kind not in _KINDS or (lib.kind == _INBAND) != (headers == 0):
        raise StateError(f"a saved packet of type {lib.kind} has {headers} bytes of headers, which cannot be")
    if not lib.transaction and lib.flags:
        raise StateError("a saved packet wants a completion, and has no transaction id to find it by")
    if not lib.queued and not lib.flags:
        raise StateError(f"packet {lib.transaction} was sent and wants no completion, so it cannot be in use")
    if lib.queued and headers > len(lib.body):
        raise StateError(f"a saved packet has {headers} bytes of headers in a body of {len(lib.body)}")


def decode_channel(chunks: Sequence[bytes], name: str) -> SavedChannel:
    """All chunks of channel `name`. Raises StateError."""
    head = decode_chunk(chunks[0]) if chunks else None
    if not isinstance(head, ChannelChunk) or head.entries != len(chunks) - 1:
        raise StateError(f"the saved state of channel {name} does not start with a channel chunk or is cut")
    if head.entries > MAX_ENTRIES or (head.force_new and head.entries):
        raise StateError(f"the saved state of channel {name} has {head.entries} packets, more than can be")
    with Refusing(f"the saved state of channel {name}"):
        return _decode_entries(head, chunks[1:], name)


def _decode_entries(head: ChannelChunk, chunks: Sequence[bytes], name: str) -> SavedChannel:
    sent: list[SavedPacket] = []
    queue: list[SavedPacket | CompletionChunk] = []
    completions = longest = 0
    seen = set()
    limit = head.next_transaction
    decode_one, decode_its_lib = _chunk_decoder.decode, _lib_decoder.decode
    for data in chunks:
        chunk = decode_one(data)
        if isinstance(chunk, PacketChunk):
            lib_buf = chunk.lib
            lib = decode_its_lib(lib_buf)
            _check_lib(lib)
            transaction = lib.transaction
            if transaction >= limit:
                raise StateError(f"packet {transaction} of channel {name} is newer than the channel's state")
            if transaction in seen and transaction:  # 0 stands for none
                raise StateError(f"packet {transaction} of channel {name} is there twice")
            seen.add(transaction)
            packet = SavedPacket(lib, lib_buf, chunk.save)
            if lib.queued:
                longest = max(longest, len(lib.body))
                queue.append(packet)
            elif queue:
                raise StateError(f"packet {transaction} of channel {name} was sent after one that was queued")
            else:
                sent.append(packet)
        elif isinstance(chunk, CompletionChunk):
            longest = max(longest, len(chunk.body))
            queue.append(chunk)
            completions += 1
        else:
            raise StateError(f"the saved state of channel {name} has a second channel chunk")
    return SavedChannel(head, sent, queue, completions, longest)
