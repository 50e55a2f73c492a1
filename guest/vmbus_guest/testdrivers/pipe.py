"""Test driver `pipe`: channels in pipe mode. Messages are numbered and come back transformed, one for one; a stream of
bytes comes back transformed, however it is cut. Uses the pipes of the lab.

Parameters:

    mode    "message", "byte", or "both"
    count   messages on each pipe, or pieces of the stream; 0: until stopped
    size    most bytes in one of them
    window  how many may be on their way
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any
from uuid import UUID

from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.pipe import MAX_DATA, Pipe, PipeMode
from vmbus.wire.lab import LAB_PIPE_TYPE, MESSAGE, transform_stream
from vmbus.wire.messages import OfferChannel
from vmbus.wire.workload import Pattern, Sequence, Tally, transform
from vmbus_guest.channel_driver import ChannelDriver
from vmbus_guest.testdrivers.context import Parameters
from vmbus_guest.testdrivers.workload import Workload

_MODES = {"message": (PipeMode.MESSAGE,), "byte": (PipeMode.BYTE,), "both": (PipeMode.MESSAGE, PipeMode.BYTE)}
_PATTERN = Pattern(13)


def _is_message(offer: OfferChannel) -> bool:
    return int.from_bytes(offer.user_defined[:4], "little") == PipeMode.MESSAGE


_HAS_MODE = {PipeMode.MESSAGE: _is_message, PipeMode.BYTE: lambda offer: not _is_message(offer)}


class End:
    """The guest's end of one pipe."""

    def __init__(self, channel: ClientChannel, mode: PipeMode, size: int, moved: Callable[[], None]) -> None:
        self.channel = channel
        self.mode = mode
        self.tally = Tally()
        self.sent = 0
        self.bytes = 0
        """Of data that came back."""
        self._size = size
        self._moved = moved
        self._sequence = Sequence(self.tally)
        self._expected: list[bytes] = []  # of a stream: pieces that are on their way, transformed
        self._begun = 0  # bytes of the first of them that came back
        self._pipe = Pipe(channel, mode, self._data)

    @property
    def on_its_way(self) -> int:
        """Messages, or pieces, that have not come back."""
        return self.sent - self.tally.completed

    def write(self) -> None:
        """Send one more."""
        number = self.sent
        self.sent += 1
        self.tally.started += 1
        data = _PATTERN.data(number, 1 + (number * 2654435761 & 0xFFFFFFFF) % self._size)
        if self.mode is PipeMode.BYTE:
            self._expected.append(transform_stream(data))
            self._pipe.write(data)
        else:
            self._pipe.write(MESSAGE.pack(number, zlib.crc32(data)) + data)

    def _data(self, data: bytes) -> None:
        self._moved()
        if self.mode is PipeMode.BYTE:
            self._stream(data)
            return
        self.bytes += len(data) - MESSAGE.size
        if len(data) < MESSAGE.size:
            self.tally.corrupted += 1
            return
        number, crc = MESSAGE.unpack_from(data)
        content = data[MESSAGE.size :]
        self._sequence.arrived(number)
        self.tally.completed += 1
        size = 1 + (number * 2654435761 & 0xFFFFFFFF) % self._size
        if zlib.crc32(content) != crc or content != transform(_PATTERN.data(number, size), number):
            self.tally.corrupted += 1

    def _stream(self, data: bytes) -> None:
        self.bytes += len(data)
        while data:
            if not self._expected:
                self.tally.duplicated += 1  # more than was ever sent
                return
            wanted = self._expected[0][self._begun : self._begun + len(data)]
            if data[: len(wanted)] != wanted:
                self.tally.corrupted += 1
            data = data[len(wanted) :]
            self._begun += len(wanted)
            if self._begun == len(self._expected[0]):
                del self._expected[0]
                self._begun = 0
                self.tally.completed += 1


class PipeWorkload(Workload):
    """See the module's text."""

    name = "pipe"
    interface_type = LAB_PIPE_TYPE
    provider = "lab"
    default_pages = 4

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        mode = parameters.get("mode", "both")
        self._count = parameters.get("count", 300, minimum=0)
        self._size = parameters.get("size", 1000, minimum=1, maximum=MAX_DATA - MESSAGE.size)
        self._window = parameters.get("window", 32, minimum=1, maximum=4096)
        if mode not in _MODES:
            raise UsageError(f"parameter 'mode' is {', '.join(_MODES)}; not '{mode}'")
        if self._instance is not None and mode == "both":
            raise UsageError("parameter 'instance' names one pipe: give 'mode' as well")
        self._modes = _MODES[mode]
        self.ends: list[End] = []

    def open(self, driver: ChannelDriver) -> None:
        """Open one pipe of each mode."""
        self.driver = driver
        for mode in self._modes:
            instance = driver.claim(LAB_PIPE_TYPE, self._instance, wanted=_HAS_MODE[mode])
            if instance is None:
                raise EnvironmentProblem("this device offers no pipes; it needs a provider of kind 'lab'")
            channel = self._make(instance, mode)
            self.ends.append(End(channel, mode, self._size, self.moved))
            driver.enable(channel)
        self.channel = self.ends[0].channel

    def _make(self, instance: UUID, mode: PipeMode) -> ClientChannel:
        return self.driver.client_channel(
            LAB_PIPE_TYPE,
            instance=instance,
            ring_pages_in=self._pages_in,
            ring_pages_out=self._pages_out,
            name=f"{self.name} ({mode.name.lower()})",
        )

    def begin(self) -> None:
        """The first turn writes."""

    def tick(self, now: float) -> float:
        """Write what the window has room for."""
        for end in self.ends:
            with end.channel.batch():
                while end.channel.active and end.on_its_way < self._window and not self._no_more(end):
                    end.write()
        return super().tick(now)

    def _no_more(self, end: End) -> bool:
        return self._stopped or (self._count > 0 and end.sent >= self._count)

    def trouble_now(self, now: float, driver: ChannelDriver) -> str | None:
        """Either pipe may be gone."""
        for end in self.ends:
            if not end.channel.active:
                return f"channel {end.channel.name} is {end.channel.state.value}; {'; '.join(driver.failures)}"
        return super().trouble_now(now, driver)

    def finished(self) -> bool:
        """All written, all back."""
        return all(self._no_more(end) and end.on_its_way <= 0 for end in self.ends)

    def counts(self) -> dict[str, Any]:
        total = {name: sum(end.tally.as_dict()[name] for end in self.ends) for name in Tally.__slots__}
        return {"sent": sum(end.sent for end in self.ends), **total, "bytes": sum(end.bytes for end in self.ends)}

    def result(self) -> dict[str, Any]:
        """Both pipes together. What has not come back is lost."""
        for end in self.ends:
            end.tally.lost = max(end.tally.lost, end.on_its_way)
        return self.counts()

    def good(self) -> bool:
        """Everything came back, once, in order, as it must be."""
        return self.finished() and all(end.tally.good and end.tally.completed == end.sent for end in self.ends)


WORKLOAD = PipeWorkload
