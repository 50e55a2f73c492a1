"""The blocks of a pcapng file that we use: making them, and a strict reader of captures, also of edited ones.

We write little-endian sections with nanoseconds, one interface for each channel. All interfaces have the link type
LINKTYPE_USER0 (147), which is for private use, and the same snap length, since some readers insist on that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from struct import Struct, error
from typing import BinaryIO, NamedTuple
from uuid import UUID

from vmbus.errors import EnvironmentProblem, StateError
from vmbus.observe.capture.record import Record, parse

LINKTYPE_USER0 = 147
LINKTYPE_ETHERNET = 1
SECTION = 0x0A0D0D0A
INTERFACE = 1
SIMPLE_PACKET = 3
STATISTICS = 5
PACKET = 6

MAGIC = 0x1A2B3C4D
MAX_BLOCK = 16 << 20
MAX_INTERFACES = 1 << 16

_ENDS = Struct("<II")
_LENGTH = Struct("<I")
_SECTION = Struct("<IHHq")
_INTERFACE = Struct("<HHI")
_PACKET = Struct("<IIIII")
_STATISTICS = Struct("<III")
_OPTION = Struct("<HH")

_END_OF_OPTIONS = 0
_COMMENT = 1
_SHB_USERAPPL = 4
_IF_NAME = 2
_IF_DESCRIPTION = 3
_IF_TSRESOL = 9
_EPB_FLAGS = 2
_EPB_DROPCOUNT = 4
_ISB_STARTTIME = 2
_ISB_ENDTIME = 3
_ISB_IFRECV = 4
_ISB_IFDROP = 5

_DESCRIPTION = re.compile(r"type=([0-9a-f-]{36}) instance=([0-9a-f-]{36}) subchannel=(\d{1,5})")


class Interface(NamedTuple):
    """One channel of a capture. `name`: with `/N` behind it for sub-channel N."""

    name: str
    type: UUID
    instance: UUID
    subchannel: int

    @property
    def description(self) -> str:
        """As it stands in the interface's description."""
        return f"type={self.type} instance={self.instance} subchannel={self.subchannel}"

    @property
    def channel(self) -> str:
        """The channel's name, which its sub-channels have too."""
        return self.name.removesuffix(f"/{self.subchannel}")

    def selected(self, patterns: Sequence[str]) -> bool:
        """Whether one of the patterns means it; none: all are meant. A pattern is a channel's name, its interface type
        or its instance (GUIDs), with `/N` behind it only sub-channel N (0 is the primary)."""
        return not patterns or any(self._is(pattern) for pattern in patterns)

    def _is(self, pattern: str) -> bool:
        text, _, number = pattern.rpartition("/")
        if re.fullmatch(r"\d{1,5}", number) and text:
            if int(number) != self.subchannel:
                return False
            pattern = text
        return pattern == self.channel or pattern.lower() in (str(self.type), str(self.instance))


class Captured(NamedTuple):
    """One record of a capture. `at`: nanoseconds since 1970. `lost`: how many packets of this channel were lost before
    it. `number`: of the record in its file, from 1, as other tools count."""

    number: int
    interface: int
    at: int
    lost: int
    record: Record


# ---- writing ----------------------------------------------------------------------------------------------------


def _block(kind: int, body: bytes) -> bytes:
    size = 12 + len(body)
    return b"".join((_ENDS.pack(kind, size), body, _LENGTH.pack(size)))


def _option(code: int, value: bytes) -> bytes:
    return _OPTION.pack(code, len(value)) + value + bytes(-len(value) % 4)


def _text(code: int, text: str) -> bytes:
    return _option(code, text.encode()[:1000])


def section_block(application: str, comment: str) -> bytes:
    """The first block of a file."""
    options = _text(_COMMENT, comment) + _text(_SHB_USERAPPL, application) + _option(_END_OF_OPTIONS, b"")
    return _block(SECTION, _SECTION.pack(MAGIC, 1, 0, -1) + options)


def interface_block(interface: Interface, snaplen: int, link_type: int = LINKTYPE_USER0) -> bytes:
    """A channel: the next interface of the section."""
    options = (
        _text(_IF_NAME, interface.name)
        + _text(_IF_DESCRIPTION, interface.description)
        + _option(_IF_TSRESOL, b"\x09")
        + _option(_END_OF_OPTIONS, b"")
    )
    return _block(INTERFACE, _INTERFACE.pack(link_type, 0, snaplen) + options)


_PACKET_OPTIONS = tuple(
    _option(_EPB_FLAGS, _LENGTH.pack(1 + direction)) + _option(_END_OF_OPTIONS, b"") for direction in range(2)
)
_DROPPED_OPTION = Struct("<HHQ")


def packet_block(
    interface: int, at: int, data: bytes, original: int, direction: int, lost: int = 0, comment: str = ""
) -> bytes:
    """One record, `data`, of `original` bytes. `lost`: packets of this interface that are missing before it. `comment`:
    what tools show beside it."""
    options = _PACKET_OPTIONS[direction]
    if lost:
        options = _DROPPED_OPTION.pack(_EPB_DROPCOUNT, 8, lost) + options
    if comment:
        options = _text(_COMMENT, comment) + options
    pad = -len(data) % 4
    size = 32 + len(data) + pad + len(options)
    return b"".join(
        (
            _ENDS.pack(PACKET, size),
            _PACKET.pack(interface, at >> 32, at & 0xFFFFFFFF, len(data), original),
            data,
            bytes(pad),
            options,
            _LENGTH.pack(size),
        )
    )


def statistics_block(interface: int, began: int, ended: int, seen: int, lost: int) -> bytes:
    """The end of an interface: how many packets there were, and how many of them are not in the file."""
    words = Struct("<II")
    options = (
        _option(_ISB_STARTTIME, words.pack(began >> 32, began & 0xFFFFFFFF))
        + _option(_ISB_ENDTIME, words.pack(ended >> 32, ended & 0xFFFFFFFF))
        + _option(_ISB_IFRECV, seen.to_bytes(8, "little"))
        + _option(_ISB_IFDROP, lost.to_bytes(8, "little"))
        + _option(_END_OF_OPTIONS, b"")
    )
    return _block(STATISTICS, _STATISTICS.pack(interface, ended >> 32, ended & 0xFFFFFFFF) + options)


# ---- reading ----------------------------------------------------------------------------------------------------


class CaptureReader:
    """Reads a capture file, strictly: what is not as the format says is a StateError that names the block.

    A context manager; iterate over it once for the records. `interfaces` grows meanwhile; so do `lost` (packets that
    the capture has missed, by interface) and `torn` (why the file's last block was left out; empty: it was not).
    """

    def __init__(self, path: Path) -> None:
        """Raises EnvironmentProblem if the file cannot be read, StateError if it is no such file."""
        self.path = path
        self.interfaces: list[Interface] = []
        self.lost: dict[int, int] = {}
        self.torn = ""
        self._scale: list[tuple[int, int]] = []  # of an interface's clock: (multiply by, divide by) for nanoseconds
        self._base = 0  # of the present section's interfaces
        self._place = f"{path}"
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as problem:
            raise EnvironmentProblem(f"cannot read capture {path}: {problem.strerror}") from problem

    def __enter__(self) -> CaptureReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _wrong(self, what: str) -> StateError:
        return StateError(f"{self._place}: {what}")

    def __iter__(self) -> Iterator[Captured]:
        try:
            yield from self._records()
        except OSError as problem:
            raise EnvironmentProblem(f"cannot read capture {self.path}: {problem}") from problem

    def _records(self) -> Iterator[Captured]:
        offset = number = index = 0
        while True:
            self._place = f"capture {self.path}, block {index} at byte {offset}"
            head = self._file.read(_ENDS.size)
            if not head:
                if not index:
                    raise self._wrong("the file is empty")
                return
            if len(head) < _ENDS.size:
                if not index:
                    raise self._wrong("this is no pcapng file: it is shorter than a block")
                return self._tear(len(head))
            kind, size = _ENDS.unpack(head)
            if index == 0 and kind != SECTION:
                raise self._wrong(f"this is no pcapng file: it begins with {head[:4].hex()}, not with 0a0d0d0a")
            if kind == SECTION:
                magic = self._file.read(4)
                if magic == MAGIC.to_bytes(4, "big"):
                    raise self._wrong("a big-endian section, which no capture of ours has")
                if len(magic) == 4 and magic != MAGIC.to_bytes(4, "little"):
                    raise self._wrong(f"the byte order magic is {magic.hex()}: this is no pcapng file")
            else:
                magic = b""
            if size % 4 or not 12 <= size <= MAX_BLOCK:
                raise self._wrong(f"a block of {size} bytes; 12 to {MAX_BLOCK}, in steps of 4, are possible")
            rest = magic + self._file.read(size - _ENDS.size - len(magic))
            if len(rest) < size - _ENDS.size:
                return self._tear(_ENDS.size + len(rest))
            (again,) = _LENGTH.unpack_from(rest, len(rest) - 4)
            if again != size:
                raise self._wrong(f"a block that claims {size} bytes at its beginning and {again} at its end")
            body = rest[:-4]
            try:
                if kind == SECTION:
                    self._section(body)
                elif kind == INTERFACE:
                    self._interface(body)
                elif kind == PACKET:
                    number += 1
                    yield self._packet(body, number)
                elif kind == STATISTICS:
                    self._statistics(body)
                elif kind == SIMPLE_PACKET:
                    raise StateError("a simple packet block: without a time, so it is not of a capture of ours")
                # Others (names, secrets, what tools add) tell nothing about channels.
            except error as problem:
                raise self._wrong(f"the block of type {kind} is too short: {problem}") from problem
            except StateError as problem:
                raise self._wrong(str(problem)) from problem
            offset += size
            index += 1

    def _tear(self, size: int) -> None:
        self.torn = (
            f"{self._place}: the file ends inside this block; its {size} bytes are left out (the server was killed, "
            "the disk was full, or it is still being written)"
        )

    def _options(self, data: bytes) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        at = 0
        while at < len(data):
            code, size = _OPTION.unpack_from(data, at)
            at += _OPTION.size
            if code == _END_OF_OPTIONS:
                break
            if at + size > len(data):
                raise StateError(f"option {code} of {size} bytes runs over the end of its block")
            found.setdefault(code, data[at : at + size])
            at += size + -size % 4
        return found

    def _section(self, body: bytes) -> None:
        _, major, minor, length = _SECTION.unpack_from(body)
        if (major, minor) not in ((1, 0), (1, 2)):
            raise StateError(f"pcapng version {major}.{minor}; 1.0 can be read")
        if length < -1:
            raise StateError(f"a section of {length} bytes")
        self._base = len(self.interfaces)

    def _interface(self, body: bytes) -> None:
        link, _, _ = _INTERFACE.unpack_from(body)
        if link != LINKTYPE_USER0:
            raise StateError(f"an interface of link type {link}; captures of channels have {LINKTYPE_USER0}")
        if len(self.interfaces) >= MAX_INTERFACES:
            raise StateError(f"more than {MAX_INTERFACES} interfaces")
        options = self._options(body[_INTERFACE.size :])
        text = options.get(_IF_DESCRIPTION, b"").decode(errors="replace")
        found = _DESCRIPTION.fullmatch(text)
        try:
            if found is None:
                raise ValueError
            identity = UUID(found[1]), UUID(found[2]), int(found[3])
        except ValueError:
            raise StateError(
                f"the interface's description {text[:120]!r} names no channel: this is no capture of channels"
            ) from None
        resolution = options.get(_IF_TSRESOL, b"\x06")
        if len(resolution) != 1:
            raise StateError(f"a time resolution of {len(resolution)} bytes")
        power = resolution[0] & 0x7F
        unit = 2**power if resolution[0] & 0x80 else 10**power
        self._scale.append((1_000_000_000, unit))
        name = options.get(_IF_NAME, b"").decode(errors="replace")[:255]
        self.interfaces.append(Interface(name, *identity))

    def _index(self, number: int) -> int:
        if self._base + number >= len(self.interfaces):
            raise StateError(f"interface {number}, and there are {len(self.interfaces) - self._base} so far")
        return self._base + number

    def _packet(self, body: bytes, number: int) -> Captured:
        interface, high, low, captured, original = _PACKET.unpack_from(body)
        index = self._index(interface)
        padded = captured + -captured % 4
        if captured > original or _PACKET.size + padded > len(body):
            raise StateError(f"a packet of {original} bytes with {captured} captured, in a block of {len(body)}")
        data = body[_PACKET.size : _PACKET.size + captured]
        options = self._options(body[_PACKET.size + padded :])
        dropped = options.get(_EPB_DROPCOUNT, b"")
        if len(dropped) not in (0, 8):
            raise StateError(f"a drop count of {len(dropped)} bytes")
        lost = int.from_bytes(dropped, "little")
        if lost:
            self.lost[index] = self.lost.get(index, 0) + lost
        multiply, divide = self._scale[index]
        return Captured(number, index, (high << 32 | low) * multiply // divide, lost, parse(data, original))

    def _statistics(self, body: bytes) -> None:
        interface, _, _ = _STATISTICS.unpack_from(body)
        index = self._index(interface)
        dropped = self._options(body[_STATISTICS.size :]).get(_ISB_IFDROP, b"")
        if len(dropped) == 8 and (lost := int.from_bytes(dropped, "little")):
            # Also those behind which no packet came any more.
            self.lost[index] = max(lost, self.lost.get(index, 0))
