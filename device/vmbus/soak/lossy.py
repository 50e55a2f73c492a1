"""A burst provider that loses packets on purpose: the sabotage that tests the soak itself. Nothing else uses it.

Every thousandth packet that is restored to it, counted over all its lives, it forgets: it does not know the answer when
that comes, and never sends on.
"""

from __future__ import annotations

from typing import Any

import msgspec

from vmbus.kmcl.server import ServerChannel
from vmbus.providers.burst import BurstProvider
from vmbus.util.records import Count

ONE_IN = 1000


class _State(msgspec.Struct, frozen=True):
    given: Count
    burst: bytes


_decoder = msgspec.msgpack.Decoder(_State)


class LossyBurst(BurstProvider):
    """See the module's text."""

    kind = "vmbus.soak.lossy:LossyBurst"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._given = 0

    def _restore_packet(self, channel: ServerChannel, lib_buf: bytes, save_buf: bytes) -> None:
        self._given += 1
        if self._given % ONE_IN:
            super()._restore_packet(channel, lib_buf, save_buf)
            return
        packet = channel.allocate_packet()
        channel.restore_packet(packet, lib_buf)
        packet.completion_routine = lambda packet, _status, _reply: packet.free()

    def save(self) -> bytes:
        """With the count of packets that were restored."""
        return msgspec.msgpack.encode(_State(self._given, super().save()))

    def check(self, state: bytes) -> None:
        """Raises StateError."""
        super().check(self.decoded(_decoder, state).burst)

    def restore(self, state: bytes) -> None:
        """Raises StateError."""
        saved = self.decoded(_decoder, state)
        self._given = saved.given
        super().restore(saved.burst)
