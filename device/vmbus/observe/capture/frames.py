"""The Ethernet frames of network cards out of a capture, as a file that every tool for network captures understands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import vmbus
from vmbus.errors import EnvironmentProblem, PeerError
from vmbus.observe.capture import record as r
from vmbus.observe.capture.pcapng import LINKTYPE_ETHERNET, CaptureReader, interface_block, packet_block, section_block
from vmbus.observe.capture.sink import open_output
from vmbus.wire import nvsp, rndis
from vmbus.wire.packet import PacketType

SNAPLEN = 1 << 18
"""Bytes of a frame in such a file: more than any has."""

_COMMENT = "Frames of a network card, from a capture of its VMBus channels. Checksums may be the hardware's to fill in."


class Exported(NamedTuple):
    """How many frames there were, and packets whose frames are not there, or not whole, in the capture."""

    frames: int
    missing: int


def export(source: Path, target: Path) -> Exported:
    """Write the frames in capture `source` to a new file. Raises EnvironmentProblem, StateError or UsageError."""
    frames = missing = 0
    cards: dict[int, int] = {}  # interfaces there, by those here
    with CaptureReader(source) as reader, os.fdopen(open_output(target.absolute()), "wb") as output:
        try:
            output.write(section_block(f"vmbus-device {vmbus.__version__}", _COMMENT))
            for one in reader:
                if not _carries_frames(reader.interfaces[one.interface].type == nvsp.NVSP_TYPE, one.record):
                    continue
                if one.interface not in cards:
                    cards[one.interface] = len(cards)
                    output.write(interface_block(reader.interfaces[one.interface], SNAPLEN, LINKTYPE_ETHERNET))
                try:
                    for frame in _frames(one.record):
                        size = len(frame)
                        block = packet_block(cards[one.interface], one.at, frame, size, one.record.direction)
                        output.write(block)
                        frames += 1
                except PeerError:
                    missing += 1
        except OSError as error:
            raise EnvironmentProblem(f"cannot write {target}: {error.strerror}") from error
    return Exported(frames, missing)


def _carries_frames(card: bool, record: r.Record) -> bool:
    if not card or record.record != r.PACKET or record.kind == PacketType.COMPLETION:
        return False
    message = nvsp.parse(record.payload)
    return isinstance(message, nvsp.Rndis) and message.channel == nvsp.DATA_CHANNEL


def _frames(record: r.Record) -> Iterator[bytes]:
    """Raises RndisError behind the last whole one, if there are more."""
    if not record.external:
        raise rndis.RndisError("its frames were not captured")
    for message in rndis.messages(record.external):
        found = rndis.parse(message)
        if isinstance(found, rndis.Packet):
            yield bytes(found.frame)
    if len(record.external) < record.external_size:
        raise rndis.RndisError("its frames were cut")
