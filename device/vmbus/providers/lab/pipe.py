"""A pipe of the lab: messages or bytes come back transformed."""

from zlib import crc32

import msgspec

from vmbus.errors import PeerError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.pipe import Pipe, PipeMode
from vmbus.kmcl.server import ServerChannel
from vmbus.providers.base import Host
from vmbus.providers.saved import TallyState
from vmbus.util.records import U64, Count
from vmbus.wire.lab import MESSAGE, transform_stream
from vmbus.wire.workload import Sequence, Tally, transform


class PipeState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    next_sequence: U64
    tally: TallyState
    bytes: Count


class PipeEnd:
    def __init__(self, host: Host, channel: ServerChannel, mode: PipeMode) -> None:
        self._host = host
        self.channel = channel
        self.mode = mode
        self.tally = Tally()
        self._sequence = Sequence(self.tally)
        self.bytes = 0
        channel.user_defined = mode.to_bytes(4, "little")
        self._pipe = Pipe(channel, mode, self._data)
        channel.set_state_change_callbacks(opened=self._opened)
        channel.set_save_restore_packet_callbacks(lambda _, packet, buffer: 0, self._restore_packet)

    def start(self) -> None:
        self._host.add_channel(self.channel)
        self.channel.enable()
        self.channel.start()

    def _opened(self, _: Channel) -> None:
        self.tally = Tally()
        self._sequence = Sequence(self.tally)
        self.bytes = 0

    def _data(self, data: bytes) -> None:
        self.bytes += len(data)
        if self.mode is PipeMode.BYTE:
            self._pipe.write(transform_stream(data))
            return
        self.tally.started += 1
        if len(data) < MESSAGE.size:
            raise PeerError(f"a message of {len(data)} bytes on the pipe of channel {self.channel.name}")
        sequence, crc = MESSAGE.unpack_from(data)
        content = data[MESSAGE.size :]
        self._sequence.arrived(sequence)
        if crc32(content) != crc:
            self.tally.corrupted += 1
        self.tally.completed += 1
        answer = transform(content, sequence)
        self._pipe.write(MESSAGE.pack(sequence, crc32(answer)) + answer)

    def _restore_packet(self, channel: ServerChannel, lib_buf: bytes, save_buf: bytes) -> None:
        packet: Packet = channel.allocate_packet()
        channel.restore_packet(packet, lib_buf)

    def save(self) -> PipeState:
        return PipeState(self._sequence.next, TallyState.of(self.tally), self.bytes)

    def restore(self, state: PipeState) -> None:
        state.tally.load_into(self.tally)
        self._sequence.next = state.next_sequence
        self.bytes = state.bytes
