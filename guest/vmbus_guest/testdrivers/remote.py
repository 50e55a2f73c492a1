"""Test driver `remote`: does what a test on the host tells it, message by message.

Parameters:

    access  how the device is reached: 'vfio', 'uio' (through Linux's own bus), or 'auto'
    function  which device of several: its name, or its function's address (default: the first that Linux has not)

A message is a line on standard input, an object with `id` and `do`; each is answered by an event `answer`, whose
`result` has what the function below returns, or `error`. Bytes are in base64. What happens to packets meanwhile is
fetched with `news`. `vmbus.testkit.vm` is the other end.
"""

from __future__ import annotations

import json
import os
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import Any
from uuid import UUID

from vmbus.errors import UsageError, VmbusError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.status import KmclError
from vmbus.wire.packet import PacketType
from vmbus_guest.channel_driver import ChannelDriver
from vmbus_guest.driver import VmbusDriver
from vmbus_guest.pci import DmaBuffer
from vmbus_guest.testdrivers.context import Context

MOST_NEWS = 256 << 10
"""Bytes of packets in one answer; the rest comes with the next."""
LONGEST_NEWS = 5.0
"""Seconds for which `news` waits at most."""
_STEP = 0.25


class Remote:
    """The channels, memory and packets of one run."""

    def __init__(self, driver: ChannelDriver) -> None:
        self.driver = driver
        self.news_: list[dict[str, Any]] = []
        self._channels: list[ClientChannel] = []
        self._buffers: dict[int, DmaBuffer] = {}
        self._held: dict[int, Completion] = {}
        self._taken = 0

    def offers(self) -> list[dict[str, Any]]:
        """Primary channels that are offered now."""
        assert isinstance(self.driver, VmbusDriver)
        bus = self.driver.bus
        return [
            {"type": str(offer.interface_type), "instance": str(offer.interface_instance)}
            for relid, offer in bus.offers.items()
            if not offer.subchannel_index and relid not in bus.rescinded
        ]

    def channel(self, type: str, instance: str | None, subchannel: int, pages: int, name: str) -> int:
        """A channel, not open yet; its number."""
        number = len(self._channels)
        channel = self.driver.client_channel(
            UUID(type),
            instance=UUID(instance) if instance else None,
            subchannel_index=subchannel,
            ring_pages_in=pages,
            ring_pages_out=pages,
            name=name,
        )

        def take(_: Channel, completion: Completion, payload: bytes) -> None:
            self._take(number, completion, payload)

        channel.set_process_packet_callbacks(take)
        self._channels.append(channel)
        return number

    def open(self, channel: int, timeout: float) -> None:
        self.driver.enable(self._channels[channel], timeout)

    def close(self, channel: int) -> None:
        self.driver.close_channel(self._channels[channel])

    def away(self, channel: int, away: bool) -> None:
        if away:
            self._channels[channel].quiesce()
        else:
            self._channels[channel].unquiesce()

    def allocate(self, size: int) -> int:
        """Memory; its I/O address."""
        buffer = self.driver.allocate(size)
        self._buffers[buffer.iova] = buffer
        return buffer.iova

    def read(self, iova: int, offset: int, length: int) -> str:
        return b64encode(self._buffers[iova].view[offset : offset + length]).decode()

    def write(self, iova: int, offset: int, data: str) -> None:
        content = b64decode(data)
        self._buffers[iova].view[offset : offset + len(content)] = content

    def send(self, channel: int, tag: int, payload: str, external: list[list[int]] | None, wanted: bool) -> int:
        """Send a packet; its number. Its completion is news with `tag`."""

        def completed(packet: Packet, status: int, reply: bytes) -> None:
            self.news_.append({"completed": tag, "status": int(status), "data": b64encode(reply).decode()})
            packet.free()

        packet = self._channels[channel].allocate_packet()
        packet.completion_routine = completed
        where = None if external is None else [(iova, length) for iova, length in external]
        packet.send(b64decode(payload), external=where, wait_for_completion=wanted)
        return packet.transaction

    def _take(self, channel: int, completion: Completion, payload: bytes) -> None:
        self._taken += 1
        self._held[self._taken] = completion
        pages = completion.transfer_pages() if completion.kind == PacketType.TRANSFER_PAGES else None
        self.news_.append(
            {
                "came": self._taken,
                "channel": channel,
                "transaction": completion.transaction,
                "wanted": completion.wanted,
                "data": b64encode(payload).decode(),
                "pages": None if pages is None else [pages.page_set, [list(one) for one in pages.ranges]],
            }
        )

    def complete(self, packet: int, reply: str) -> None:
        if packet not in self._held:
            raise UsageError(f"packet {packet} was completed already")
        self._held.pop(packet).complete(b64decode(reply))

    def news(self) -> dict[str, Any]:
        """What has happened since the last time: completions, packets of the host's, and which channels are open."""
        size, count = 0, 0
        while count < len(self.news_) and size < MOST_NEWS:
            size += len(self.news_[count]["data"]) + 100
            count += 1
        found, self.news_ = self.news_[:count], self.news_[count:]
        states = [channel.state.value for channel in self._channels]
        return {"news": found, "more": bool(self.news_), "states": states, "failures": self.driver.failures}


def run(context: Context) -> dict[str, Any]:
    """See the module's text."""
    access = context.parameters.get("access", "auto")
    function = context.parameters.get("function", "")
    context.parameters.check()
    with context.connect(access, function) as driver:
        remote = Remote(driver)
        os.set_blocking(0, False)
        driver.watch(0, lambda: None)
        lines = _Lines()
        waiting: tuple[Any, float] | None = None
        asked = 0
        while not context.stop_requested and not lines.ended:
            for message in lines.read():
                asked += 1
                if message["do"] == "news":
                    waiting = message["id"], time.monotonic() + min(float(message["wait"]), LONGEST_NEWS)
                else:
                    context.report("answer", id=message["id"], result=_done(remote, message))
            if waiting is not None and (remote.news_ or time.monotonic() >= waiting[1]):
                context.report("answer", id=waiting[0], result={"value": remote.news()})
                waiting = None
            left = _STEP if waiting is None else max(0.0, min(_STEP, waiting[1] - time.monotonic()))
            driver.step(left)
            context.look_for_flush(time.monotonic())
            if context.progress_due:
                context.progress(asked=asked)
        driver.unwatch(0)
    return {"verdict": "passed", "asked": asked}


def _done(remote: Remote, message: dict[str, Any]) -> dict[str, Any]:
    arguments = {key: value for key, value in message.items() if key not in ("id", "do")}
    work: Callable[..., Any] = getattr(remote, str(message["do"]))
    try:
        return {"value": work(**arguments)}
    except (VmbusError, KmclError, KeyError, IndexError, TypeError, ValueError) as error:
        return {"error": {"type": type(error).__name__, "message": str(error)}}


class _Lines:
    """Messages from standard input."""

    def __init__(self) -> None:
        self._rest = b""
        self.ended = False

    def read(self) -> list[dict[str, Any]]:
        try:
            data = os.read(0, 1 << 16)
        except BlockingIOError:
            return []
        self.ended = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]
