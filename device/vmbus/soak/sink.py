"""Who is told of an episode while it runs."""

from __future__ import annotations

from typing import Protocol

from vmbus.soak.records import EventRecord, OperationRecord, Sample


class Sink(Protocol):
    """Is told of an episode as it happens."""

    def operation(self, record: OperationRecord) -> None:
        """An operation has ended."""

    def event(self, record: EventRecord) -> None:
        """Something that a reader should see."""

    def sample(self, sample: Sample) -> None:
        """Where the episode is now."""

    def phase(self, text: str) -> None:
        """What the episode does now, for people."""


class NoSink:
    """Does nothing with it."""

    def operation(self, record: OperationRecord) -> None:
        """Not kept."""

    def event(self, record: EventRecord) -> None:
        """Not kept."""

    def sample(self, sample: Sample) -> None:
        """Not kept."""

    def phase(self, text: str) -> None:
        """Not kept."""
