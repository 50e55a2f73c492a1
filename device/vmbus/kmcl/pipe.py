"""Pipe mode: a channel as datagrams or as a stream of bytes, instead of packets with transactions.

Every packet of a pipe starts with `u32 type, u32 size`: type 1 is data, `size` its exact length in bytes, at most
16384. In MESSAGE mode one packet is one message; in BYTE mode packet boundaries mean nothing. There are no
transactions and no external data.
"""

from collections.abc import Callable
from enum import IntEnum
from struct import Struct

from vmbus.errors import PeerError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.settings import FLAG_IS_PIPE
from vmbus.kmcl.status import KmclError, Status

HEADER = Struct("<II")
TYPE_DATA = 1
MAX_DATA = 16384


class PipeMode(IntEnum):
    """How the bytes of packets relate; the value travels in the offer."""

    BYTE = 0
    MESSAGE = 4


class PipeError(PeerError):
    """A packet on a pipe without a proper pipe header."""


def frame(data: bytes) -> bytes:
    return HEADER.pack(TYPE_DATA, len(data)) + data


def unframe(payload: bytes) -> bytes:
    """The data of one packet. Raises PipeError for a wrong type, and for a length beyond what came."""
    if len(payload) < HEADER.size:
        raise PipeError(f"a pipe packet of {len(payload)} bytes has no header")
    kind, size = HEADER.unpack_from(payload)
    if kind != TYPE_DATA or size > len(payload) - HEADER.size or size > MAX_DATA:
        raise PipeError(f"a pipe packet of type {kind} with {size} bytes in a payload of {len(payload)}")
    return payload[HEADER.size : HEADER.size + size]


class Pipe:
    """Reads and writes data on a channel in pipe mode; it takes the channel's packet callback.

    `on_data(data)` is called with each message (MESSAGE), or with whatever bytes came (BYTE).
    """

    def __init__(self, channel: Channel, mode: PipeMode, on_data: Callable[[bytes], None]) -> None:
        """Configure a disabled channel for pipe mode."""
        channel.set_flags(FLAG_IS_PIPE)
        channel.set_process_packet_callbacks(self._process)
        self.channel = channel
        self.mode = mode
        self._on_data = on_data

    def _process(self, channel: Channel, completion: Completion, payload: bytes) -> None:
        try:
            data = unframe(payload)
        except PipeError as error:
            completion.fail(str(error))
            return
        completion.complete()
        self._on_data(data)

    def write(self, data: bytes) -> None:
        """Send a message (at most 16384 bytes in MESSAGE mode), or bytes (any number in BYTE mode), in order.

        Raises KmclError (INVALID_PARAMETER) for a message that is too long.
        """
        if self.mode is PipeMode.MESSAGE:
            if len(data) > MAX_DATA:
                raise KmclError(
                    f"a message of {len(data)} bytes on the pipe of channel {self.channel.name}; at most {MAX_DATA}",
                    Status.INVALID_PARAMETER,
                )
            pieces = [data]
        else:
            room = min(self.channel.maximum_packet_size, self.channel.largest_payload) - HEADER.size
            most = max(1, min(MAX_DATA, room))
            pieces = [data[start : start + most] for start in range(0, len(data), most)]
        with self.channel.batch():
            for piece in pieces:
                self.channel.allocate_packet().send(frame(piece), wait_for_completion=False)
