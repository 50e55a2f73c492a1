"""Saved states of which one channel's packets are edited."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from vmbus.device.saved import DeviceState
from vmbus.kmcl.saved import LibBuf, PacketChunk, decode_chunk, decode_lib, encode


def with_chunks(state: DeviceState, number: int, edit: Callable[[list[bytes]], object]) -> DeviceState:
    """The packets of channel `number` edited; the number of its entries follows."""
    channels = list(state.channels)
    chunks = list(channels[number].chunks)
    edit(chunks)
    chunks[0] = encode(replace(decode_chunk(chunks[0]), entries=len(chunks) - 1))
    channels[number] = replace(channels[number], chunks=chunks)
    return replace(state, channels=channels)


def packet_in(data: bytes) -> tuple[PacketChunk, LibBuf]:
    """The packet of one chunk."""
    chunk = decode_chunk(data)
    assert isinstance(chunk, PacketChunk)
    return chunk, decode_lib(chunk.lib)
