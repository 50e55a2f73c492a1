"""Lanes: one direction of a channel's life as one end recorded it, and how the other end's record of it differs."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import compress
from operator import and_

from vmbus.errors import StateError
from vmbus.observe.audit import format as f

COMPLETION = 11
UNKNOWN = 0
"""The kind of a packet of which a brief record says nothing."""
STEP = 4096
"""Packets that are compared in one piece."""
_PACKET = bytes(kind not in (COMPLETION, UNKNOWN) for kind in range(256))
_ANSWER = bytes(kind == COMPLETION for kind in range(256))

Key = tuple[int, int]
"""Kind and transaction of a packet."""


class Lane:
    """`kinds`, `flags` and `transactions` of packets, and `points`, CRC-32 of the first n packets' ring bytes, by n. Of
    those in brief blocks there are numbers alone."""

    def __init__(self) -> None:
        self.kinds = bytearray()
        self.flags = bytearray()
        self.transactions = array("Q")
        self.points: dict[int, int] = {0: 0}
        self.brief = 0
        self.wanted_in_brief = 0
        self.completions_in_brief = 0

    @property
    def count(self) -> int:
        """Packets and completions."""
        return len(self.kinds)

    @property
    def packets(self) -> int:
        """How many packets, completions not counted."""
        return self.count - self.kinds.count(COMPLETION) - self.completions_in_brief

    @property
    def wanted(self) -> list[int]:
        """The transactions of packets that want a completion."""
        return list(compress(self.transactions, map(and_, self.kinds.translate(_PACKET), self.flags)))

    @property
    def completions(self) -> list[int]:
        return list(compress(self.transactions, self.kinds.translate(_ANSWER)))

    @property
    def requests(self) -> set[int]:
        return set(compress(self.transactions, self.kinds.translate(_PACKET)))

    def key(self, index: int) -> Key:
        """Of a packet."""
        return self.kinds[index], self.transactions[index]

    def add(self, body: bytes, source: str) -> None:
        """Append a block. Raises StateError when it does not continue what is there."""
        try:
            values = f.BLOCK.unpack_from(body)
            first, count, crc, wanted, completions, form, kind, flag, transaction, number, grain = values
            sums = array("I")
            at = f.BLOCK.size + number * sums.itemsize
            sums.frombytes(body[f.BLOCK.size : at])
            if len(sums) != number or first != self.count or count < 1 or grain < 1:
                raise ValueError(f"a block of packets {first} to {first + count - 1} behind {self.count} packets")
            if form == f.RUN:
                self.kinds += bytes([kind]) * count
                self.flags += bytes([flag]) * count
                self.transactions.extend(range(transaction, transaction + count))
            elif form == f.COLUMNS:
                numbers = array("Q")
                numbers.frombytes(body[at + 2 * count :])
                if len(numbers) != count:
                    raise ValueError(f"{len(numbers)} transactions of {count} packets")
                self.kinds += body[at : at + count]
                self.flags += body[at + count : at + 2 * count]
                self.transactions += numbers
            elif form == f.BRIEF:
                self.kinds += bytes(count)
                self.flags += bytes(count)
                self.transactions.frombytes(bytes(8 * count))
                self.brief += count
                self.wanted_in_brief += wanted
                self.completions_in_brief += completions
            else:
                raise ValueError(f"form {form}")
        except (ValueError, OverflowError, MemoryError, f.BLOCK_ERROR) as error:
            raise StateError(f"{source} is damaged: a block of packets is not valid: {error}") from error
        end = first + count
        for point, value in zip(range((first // grain + 1) * grain, end + 1, grain), sums, strict=False):
            self.points[point] = value
        self.points[end] = crc


def name_of(key: Key) -> str:
    """For people."""
    if key[0] == UNKNOWN:
        return "an unrecorded one"
    return f"the {'completion' if key[0] == COMPLETION else 'packet'} of transaction {key[1]}"


def first_difference(writer: Lane, reader: Lane, common: int) -> int | None:
    """The first packet of which both ends recorded another kind or transaction."""
    for start in range(0, common, STEP):
        part = slice(start, min(start + STEP, common))
        if writer.kinds[part] == reader.kinds[part] and writer.transactions[part] == reader.transactions[part]:
            continue
        for index in range(part.start, part.stop):
            one, other = writer.key(index), reader.key(index)
            if one != other and UNKNOWN not in (one[0], other[0]):
                return index
    return None


def first_bad_point(writer: Lane, reader: Lane, common: int) -> tuple[int, int | None]:
    """The last point up to which the bytes of both ends agree, and the first at which they do not."""
    good = 0
    for point in sorted(writer.points.keys() & reader.points.keys()):
        if point > common:
            break
        if writer.points[point] != reader.points[point]:
            return good, point
        good = point
    return good, None


def difference(mine: Sequence[Key], theirs: Sequence[Key], before: Iterable[Key] = ()) -> tuple[str, Key]:
    """How the second list breaks the first: the kind of breach, and the packet it is about. "" if they are equal."""
    seen = set(before)
    for index, expected in enumerate(mine):
        if index >= len(theirs):
            return "lost", expected
        found = theirs[index]
        if found == expected:
            seen.add(found)
            continue
        if found in seen:
            return "doubled", found
        later = expected in theirs[index:]
        known = found in mine[index:]
        if later and known:
            return "reordered", expected
        if known:
            return "lost", expected
        return ("invented", found) if later else ("corrupted", expected)
    if len(theirs) > len(mine):
        found = theirs[len(mine)]
        return ("doubled" if found in seen else "invented"), found
    return "", (0, 0)
