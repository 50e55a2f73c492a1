"""The saved form of a channel: chunks, each a self-describing, versioned record.

A channel is one `ChannelChunk`, then one chunk per packet in use (and per completion that found no room), in the order
in which they will leave. Inside a packet's chunk, `lib` is the library's own state of the packet (LibBuf) and `save`
what the provider's save callback wrote (SaveBuf). Both are opaque to the other side.

Decoding checks every field's type and range, ignores unknown fields, and refuses unknown versions.
"""

from typing import Annotated, Any

import msgspec

from vmbus.errors import StateError
from vmbus.wire.packet import DESCRIPTOR_SIZE, MAX_PACKET_SIZE, PacketType

VERSION = 1
# The oldest version that can still be restored; apart from what we write.
OLDEST_VERSION = 1

U64 = Annotated[int, msgspec.Meta(ge=0)]
Bytes = Annotated[bytes, msgspec.Meta(max_length=MAX_PACKET_SIZE)]
MAX_SAVE_BUF = 1 << 24  # bytes that an owner may save for one packet
SaveBytes = Annotated[bytes, msgspec.Meta(max_length=MAX_SAVE_BUF)]
VersionNumber = Annotated[int, msgspec.Meta(ge=OLDEST_VERSION, le=VERSION)]


class ChannelChunk(msgspec.Struct, tag="channel", frozen=True):
    """The channel itself. `entries` is the number of chunks that follow."""

    version: VersionNumber
    started: bool
    next_transaction: Annotated[int, msgspec.Meta(ge=1, le=1 << 62)]
    entries: Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]


class PacketChunk(msgspec.Struct, tag="packet", frozen=True):
    """One outgoing packet in use."""

    lib: Annotated[bytes, msgspec.Meta(max_length=MAX_PACKET_SIZE + 256)]
    save: SaveBytes
    version: VersionNumber = 1  # what chunks without it are


class CompletionChunk(msgspec.Struct, tag="completion", frozen=True):
    """A completion packet that waits for room in the ring."""

    transaction: U64
    body: Bytes
    version: VersionNumber = 1  # what chunks without it are


Chunk = ChannelChunk | PacketChunk | CompletionChunk


class LibBuf(msgspec.Struct, frozen=True):
    """The library's state of one packet. `body` is kept while the packet is queued; a sent one lies in the ring."""

    version: VersionNumber
    transaction: Annotated[int, msgspec.Meta(ge=1)]
    queued: bool
    kind: Annotated[int, msgspec.Meta(ge=int(PacketType.INBAND), le=int(PacketType.GPA_DIRECT))]
    offset8: Annotated[int, msgspec.Meta(ge=2, le=0xFFFF)]
    flags: Annotated[int, msgspec.Meta(ge=0, le=1)]
    body: Bytes


_KINDS = {PacketType.INBAND, PacketType.GPA_DIRECT}
_encoder = msgspec.msgpack.Encoder()
_chunk_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Chunk)
_lib_decoder = msgspec.msgpack.Decoder(LibBuf)


def encode(record: Chunk | LibBuf) -> bytes:
    """One record as bytes."""
    return _encoder.encode(record)


def decode_chunk(data: bytes) -> Chunk:
    """One chunk. Raises StateError."""
    try:
        chunk: Chunk = _chunk_decoder.decode(data)
    except (msgspec.MsgspecError, ValueError) as error:
        raise StateError(f"a chunk of saved channel state is not valid: {error}") from error
    return chunk


def decode_lib(data: bytes) -> LibBuf:
    """The library's state of a packet. Raises StateError."""
    try:
        lib = _lib_decoder.decode(data)
    except (msgspec.MsgspecError, ValueError) as error:
        raise StateError(f"the saved state of a packet (LibBuf) is not valid: {error}") from error
    headers = lib.offset8 * 8 - DESCRIPTOR_SIZE
    if lib.kind not in _KINDS or (lib.kind == PacketType.INBAND) != (headers == 0):
        raise StateError(f"a saved packet of type {lib.kind} has {headers} bytes of headers, which cannot be")
    if not lib.queued and not lib.flags:
        raise StateError(f"packet {lib.transaction} was sent and wants no completion, so it cannot be in use")
    if lib.queued and headers > len(lib.body):
        raise StateError(f"a saved packet has {headers} bytes of headers in a body of {len(lib.body)}")
    return lib
