"""Who is told of an episode while it runs, and how what is told crosses processes and machines: as JSON lines."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from vmbus.soak.records import EpisodeRecord, EventRecord, OperationRecord, Sample


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


class NoSink(Sink):
    """Does nothing with it."""


class LineSink:
    """A sink that makes a line of each thing: override `line`. Not made to be used as it is."""

    def line(self, kind: str, record: object) -> None:
        """One thing, of one of the kinds that a sink has methods for."""
        raise NotImplementedError

    def operation(self, record: OperationRecord) -> None:
        self.line("operation", record)

    def event(self, record: EventRecord) -> None:
        self.line("event", record)

    def sample(self, sample: Sample) -> None:
        self.line("sample", sample)

    def phase(self, text: str) -> None:
        self.line("phase", text)


class _Line(msgspec.Struct):
    kind: str
    record: msgspec.Raw


_line = msgspec.json.Decoder(_Line)
_records: dict[str, msgspec.json.Decoder[Any]] = {
    "operation": msgspec.json.Decoder(OperationRecord),
    "event": msgspec.json.Decoder(EventRecord),
    "sample": msgspec.json.Decoder(Sample),
    "phase": msgspec.json.Decoder(str),
    "episode": msgspec.json.Decoder(EpisodeRecord),  # the last line: no sink is told of it
}


def encoded(kind: str, record: object) -> bytes:
    """One thing that is told, as a line without its end."""
    return msgspec.json.encode({"kind": kind, "record": record})


def decoded(line: bytes) -> tuple[str, Any]:
    """The kind and the record of such a line. Raises ValueError for anything else."""
    parsed = _line.decode(line)
    if parsed.kind not in _records:
        raise ValueError("no such kind")
    return parsed.kind, _records[parsed.kind].decode(parsed.record)


def tell(sink: Sink, kind: str, record: Any) -> None:
    """Tell a sink what was decoded."""
    getattr(sink, kind)(record)
