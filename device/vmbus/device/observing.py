"""Who looks at a device, beside its owner: an `Observer` of its channels that also hears of saves and restores.

The device knows none of them: whoever makes it adds them (`Device.add_observer`). One of them may keep a record that
goes on over a restore; where that record was is a part of the saved state, `RecordState`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated

import msgspec

from vmbus.util.records import U16, U32, U64, Count, Guid, StructVersion

if TYPE_CHECKING:
    from vmbus.kmcl.channel import Channel, Link
    from vmbus.kmcl.observer import How, LifeObserver
    from vmbus.kmcl.server import ServerChannel

MOST_CHANNELS = 4094
"""In a saved state: as many as the guest can know, and as many again that their provider does not offer now."""


class PositionState(msgspec.Struct, frozen=True):
    """Where the record of an open channel is: packets so far in each direction, and the CRC-32 of their bytes."""

    instance: Guid
    subchannel: U16
    nonce: Guid
    put: Count
    put_crc: U32
    taken: Count
    taken_crc: U32
    structure_version: StructVersion = 1


class RecordState(msgspec.Struct, frozen=True):
    """Which record the observer wrote, and how many of its events came before the save."""

    uid: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    position: U64
    lives: Annotated[list[PositionState], msgspec.Meta(max_length=MOST_CHANNELS)]
    structure_version: StructVersion = 1


class DeviceObserver:
    """Implements `Observer`. All that is told here may be ignored, as these methods do. Nothing of it may raise."""

    def opened(self, channel: Channel, link: Link, how: How) -> LifeObserver | None:
        """A channel is open on these rings. None: this is not looked at."""
        return None

    def note(self, event: str) -> None:
        """Something happened to the device that people want to see between the packets: paused, saved, restored,
        running."""

    def saved(self, channels: Iterable[ServerChannel]) -> RecordState | None:
        """A save is taken now, with these channels. Returns what it has to carry of the observer's record."""
        return None

    def resume(self, state: RecordState | None) -> None:
        """Before the channels come back: what the saved state carries of a record."""

    def restored(self, channels: Iterable[ServerChannel], broken: Mapping[tuple[bytes, int], str]) -> None:
        """The channels are back. `broken`: those among them that were made anew because of their rings, and why."""

    def ended(self) -> None:
        """The device is discarded, or its process ends."""
