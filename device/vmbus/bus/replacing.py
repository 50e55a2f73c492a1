"""Save, replace, restore: the order, for whatever carries channels (a device, or a bus within this process).

A save first lets every channel whose rings could not be taken up again fail, alone; then all that is left is written
down. A restore goes through the steps of `put_back`. Nothing runs in between: channels are held, then started at the
end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol
from uuid import UUID

from vmbus.errors import StateError
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.saved import ChannelRecord, Counts, SavedChannel
from vmbus.kmcl.server import ServerChannel
from vmbus.util.pieces import Pieces

Key = tuple[bytes, int]
"""Which channel: instance GUID and sub-channel."""


def key_of(channel: ServerChannel) -> Key:
    """Of a live channel what `ChannelRecord.key` is of a saved one."""
    return channel.interface_instance.bytes_le, channel.subchannel_index


class Restored(NamedTuple):
    """What a restore brought back: `packets`, and those `dropped` with channels that were made anew (`renewed`).

    `unsaved`: of the dropped ones those that the state did not have either, since it was known at the save.
    `broken`: which of these channels nobody wanted anew, and why: words in their rings were not those at the save.
    """

    packets: Counts
    dropped: Counts
    unsaved: Counts
    renewed: int
    broken: Mapping[Key, str]


class Carrier(Protocol):
    """What carries channels. `renewed`: those that the other end knew and that are made anew: their rings are left
    alone, and their packets are dropped. `lost`: those among them whose owner has to be told. `broken`: see `Restored`.
    """

    renewed: set[Key]
    lost: set[Key]
    broken: dict[Key, str]

    @property
    def channels(self) -> Iterable[ServerChannel]:
        """Those that exist now."""

    def reattach(self, *, primaries: bool) -> Pieces[None]:
        """Put channels that were open back on their rings: primary channels, or sub-channels. Raises StateError."""


def save_channels(channels: Iterable[ServerChannel]) -> Pieces[list[ChannelRecord]]:
    """The records of channels that are held and quiescent. Raises what they raise."""
    channels = list(channels)
    # Sub-channels share the fate of their primary.
    anew = {channel.interface_instance for channel in channels if channel.force_new_channel}
    records = []
    for channel in channels:
        yield
        # A sub-channel that its owner has disabled is nothing any more: its owner need not make it again.
        if not (channel.subchannel_index and channel.state is ChannelState.DISABLED):
            records.append(channel.record(anew=channel.interface_instance in anew))
    return records


def put_back(
    carrier: Carrier,
    saved: Mapping[Key, SavedChannel],
    owners: Iterable[None],
    before_start: Callable[[], None],
) -> Pieces[Restored]:
    """Restore `saved` into fresh channels, piece by piece.

    Primary channels get their rings; `owners`, iterated, gives the owners their own state, with which they make their
    sub-channels again; sub-channels get their rings; packets come through the restore callbacks; `before_start` is
    called, and only then are the channels started that were. Raises StateError for a channel that is missing (unless it
    has force_new), and what callbacks raise.
    """
    yield from carrier.reattach(primaries=True)
    yield from owners
    yield from carrier.reattach(primaries=False)
    live = {key_of(channel): channel for channel in carrier.channels}
    started: set[Key] = set()
    for key, one in saved.items():
        yield
        channel = live.get(key)
        if channel is None:
            if key not in carrier.renewed and not one.head.force_new:
                raise StateError(f"{channel_name(key)} was saved, and its owner did not make it again")
            continue
        if key in carrier.lost:
            channel.lost()
        if one.head.started if key in carrier.renewed else channel.restore(one):
            started.add(key)
    kept = Counts.total(one.counts for key, one in saved.items() if key not in carrier.renewed)
    queued = sum(channel.packets_queued for channel in live.values())
    sent = sum(channel.packets_sent for channel in live.values())
    if (queued, sent) != (kept.queued, kept.sent):
        raise StateError(f"{kept.queued} queued and {kept.sent} sent packets were saved, {queued} and {sent} came back")
    before_start()
    for key, channel in live.items():
        yield
        if channel.state is ChannelState.DISABLED:
            channel.started = key in started  # the wish, for when its owner enables it
        elif key in started:
            channel.start()
        elif key in saved:
            channel.begin_pause()
    gone = [one for key, one in saved.items() if key in carrier.renewed]
    unsaved = Counts.total(one.left_out for one in gone)
    dropped = Counts.total([unsaved, *(one.counts for one in gone)])
    return Restored(packets=kept, dropped=dropped, unsaved=unsaved, renewed=len(carrier.renewed), broken=carrier.broken)


def channel_name(key: Key) -> str:
    """For errors, where only the key is known."""
    return (f"sub-channel {key[1]}" if key[1] else "the channel") + f" of instance {UUID(bytes_le=key[0])}"
