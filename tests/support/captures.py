"""What is in a capture's file, and such files made by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import UUID

from click.testing import CliRunner

from vmbus.cli import main
from vmbus.observe.capture import pcapng, record
from vmbus.observe.capture.pcapng import CaptureReader, Interface
from vmbus.observe.capture.record import Record
from vmbus.observe.words import describe

ECHO = Interface("echo", UUID(int=1), UUID(int=2), 0)


def packets_of(path: Path) -> list[Record]:
    """All of them, of a whole capture that has missed none."""
    with CaptureReader(path) as reader:
        found = [one.record for one in reader if one.record.record == record.PACKET]
        assert (reader.torn, reader.lost) == ("", {})
    return found


def events_of(path: Path) -> list[str]:
    """Their names."""
    with CaptureReader(path) as reader:
        return [json.loads(one.record.payload)["event"] for one in reader if one.record.record == record.EVENT]


def said_in(path: Path) -> list[str]:
    """What each packet says, in words of its protocol."""
    with CaptureReader(path) as reader:
        packets = [one for one in reader if one.record.record == record.PACKET]
        return [describe(reader.interfaces[one.interface].type, one.record.seen()) for one in packets]


def file_of(*records: Record, interface: Interface = ECHO, cut: int | None = None) -> bytes:
    """A capture with these records, each of them cut behind `cut` bytes."""
    return b"".join(_blocks(records, interface, cut))


def _blocks(records: Iterable[Record], interface: Interface, cut: int | None) -> Iterable[bytes]:
    yield pcapng.section_block("test", "comment")
    yield pcapng.interface_block(interface, 1 << 20)
    for number, one in enumerate(records):
        data = one.pack()
        original = len(data) - len(one.external) + one.external_size
        yield pcapng.packet_block(0, 10**18 + number, data[:cut], original, one.direction)


def command(*words: object) -> Any:
    """`capture`, as typed."""
    return CliRunner().invoke(main, ["capture", *map(str, words)])
