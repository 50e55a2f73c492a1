"""The audit record of a device server: a recorder that looks at its device, and goes on over a save and a restore."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec.structs import astuple

from vmbus.device.observing import DeviceObserver, PositionState, RecordState
from vmbus.kmcl.channel import Channel, Link
from vmbus.kmcl.observer import How
from vmbus.kmcl.server import ServerChannel
from vmbus.observe.audit.recorder import LifePosition, Recorder, Trace


class RecordingObserver(DeviceObserver):
    """Of one device; `recorder` is its own."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def opened(self, channel: Channel, link: Link, how: How) -> Trace:
        """A channel is open: its trace."""
        return self.recorder.opened(channel, link, how)

    def saved(self, channels: Iterable[ServerChannel]) -> RecordState:
        """Everything so far is written down."""
        recorder = self.recorder
        lives = [PositionState(*one) for one in recorder.saved(channels)]
        return RecordState(recorder.uid, recorder.position, lives)

    def resume(self, state: RecordState | None) -> None:
        """The new record goes on where that of the saved device was."""
        state = state or RecordState("", 0, [])
        lives = [LifePosition(*astuple(one)[: len(LifePosition._fields)]) for one in state.lives]
        self.recorder.resume(state.uid, state.position, lives)

    def restored(self, channels: Iterable[ServerChannel], broken: Mapping[tuple[bytes, int], str]) -> None:
        """What came back is written down."""
        self.recorder.restored(channels, broken)

    def ended(self) -> None:
        """The record is complete."""
        self.recorder.close()
