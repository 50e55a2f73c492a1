"""What the channels of one device may hold for its guest together.

Each channel has its own bounds (`incoming`); 2,047 channels at those would still be too much. A small share is always
a channel's own; beyond that it gets more only while all together stay below the device's bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmbus.kmcl.channel import Channel

MOST_DEVICE_REQUESTS = 65_536
"""Requests of a guest, on all channels, that are not answered yet, or whose answers wait for room in their rings."""
MOST_DEVICE_REQUEST_BYTES = 128 << 20
"""Bytes that these, and the answers that wait, hold together."""
SHARE_REQUESTS = 32
"""Requests that a channel may always have."""
SHARE_BYTES = 64 << 10
"""Bytes that these may always hold."""


class SharedAllowance:
    """Implements `vmbus.kmcl.incoming.Allowance`.

    `refused`: channels that wait for room; `refusals`: how often one had to.
    """

    def __init__(self, channels: Callable[[], Iterable[Channel]], schedule: Callable[[], None]) -> None:
        """`channels`: all that share. `schedule`: have `look` called soon."""
        self._channels = channels
        self._schedule = schedule
        self.refused: dict[Channel, None] = {}
        self.refusals = 0

    def held(self) -> tuple[int, int]:
        """Requests and bytes of all channels."""
        requests = held_bytes = 0
        for channel in self._channels():
            requests += channel.flow.requests
            held_bytes += channel.flow.held_bytes
        return requests, held_bytes

    def summary(self) -> dict[str, int]:
        """For people: what is held now, the bounds, how many channels wait, and how often one had to."""
        requests, held_bytes = self.held()
        return {
            "held": requests,
            "most": MOST_DEVICE_REQUESTS,
            "bytes": held_bytes,
            "most_bytes": MOST_DEVICE_REQUEST_BYTES,
            "blocked_channels": sum(channel.flow.blocked for channel in self._channels()),
            "refused": self.refusals,
        }

    @property
    def _room(self) -> bool:
        requests, held_bytes = self.held()
        return requests < MOST_DEVICE_REQUESTS and held_bytes < MOST_DEVICE_REQUEST_BYTES

    def grants(self, channel: Channel) -> bool:
        """Whether the channel may take further packets; if not, it is woken when there is room."""
        flow = channel.flow
        if (flow.requests < SHARE_REQUESTS and flow.held_bytes < SHARE_BYTES) or self._room:
            return True
        self.refused[channel] = None
        self.refusals += 1
        for other in self._channels():
            other.flow.attention = True
        return False

    @property
    def waiting(self) -> bool:
        """Whether a channel waits for room."""
        return bool(self.refused)

    def settle(self) -> None:
        """Something was completed: there may be room."""
        if self.refused:
            self._schedule()

    def look(self) -> None:
        """Wake who waits, if there is room by now."""
        if self.refused and self._room:
            waiting, self.refused = self.refused, {}
            for channel in waiting:
                if channel.link is not None:
                    channel.link.wake()
