"""How captures are replayed, and what a replay finds: options, the report, and the comparison of bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Literal

import msgspec

from vmbus.errors import UsageError

_MOST_DIFFERENCES = 100
_SHOWN = 32  # bytes of a difference

What = Literal["answer", "external data", "packet", "missing", "unexpected", "channel"]


class Difference(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One thing that came otherwise than captured."""

    record: int
    """Its number in its file; 0: it is not there."""
    channel: str
    what: What
    message: str


class ReplayReport(msgspec.Struct, kw_only=True):
    """What a replay has found. The counts are of packets."""

    files: list[str]
    provider: str
    channels: list[str] = []
    """Those that were replayed."""
    left_out: list[str] = []
    """Those in the capture that this provider does not offer, or that were not asked for."""
    sent: int = 0
    answers: int = 0
    """Completions that came and were compared."""
    packets: int = 0
    """Packets of the provider's own that came and were compared."""
    differences: int = 0
    details: list[Difference] = []
    """The first of the differences."""
    notes: list[str] = []
    """What people should know before they trust this."""
    seconds: float = 0.0

    @property
    def same(self) -> bool:
        """Whether everything came as captured."""
        return not self.differences

    def add(self, difference: Difference) -> None:
        """One more; the first of them in detail."""
        self.differences += 1
        if len(self.details) < _MOST_DIFFERENCES:
            self.details.append(difference)

    def to_json(self) -> str:
        """For programs; `same` included."""
        return json.dumps({"same": self.same, **msgspec.to_builtins(self)}, indent=2)

    def __str__(self) -> str:
        lines = [f"note: {note}" for note in self.notes]
        lines += [f"left out: channel {name}" for name in self.left_out]
        lines += [
            f"{one.what}: channel {one.channel}{f', record {one.record}' if one.record else ''}: {one.message}"
            for one in self.details
        ]
        if self.differences > len(self.details):
            lines.append(f"... and {self.differences - len(self.details)} more")
        lines.append(
            f"{'the same' if self.same else f'{self.differences} differences'}: {self.sent} packets sent to "
            f"{self.provider} on {len(self.channels)} channels, {self.answers} answers and {self.packets} packets of "
            f"its own compared, in {self.seconds:.2f} s"
        )
        return "\n".join(lines)


class ReplayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to replay.

    channels: patterns as for a capture; none: all that the provider offers.
    ignore: bytes of answers and packets that may differ, (first, behind the last).
    ignore_packets: packets of the provider's own are answered and not compared, for providers that send what they like.
    ignore_external: external data is not compared.
    key: bytes that say what a packet of the provider's belongs to, (first, behind the last): the order is compared
        among those that have the same there. Without it all packets of a channel have one order, which nobody promises
        where requests are worked on at the same time.
    timed: guest packets keep their distances in time; else each is sent as soon as what came before it has happened.
    timeout: seconds to wait for each thing that the provider should send.
    settle: seconds of quiet at the end after which nothing more is expected.
    give_up: after so many things that did not come in time the replay ends: each of the rest would be waited for, too.
    """

    channels: tuple[str, ...] = ()
    ignore: tuple[tuple[int, int], ...] = ()
    ignore_packets: bool = False
    ignore_external: bool = False
    key: tuple[int, int] | None = None
    timed: bool = False
    timeout: float = 10.0
    settle: float = 0.2
    give_up: int = 5


def parse_ranges(texts: Iterable[str]) -> tuple[tuple[int, int], ...]:
    """`FIRST:BEHIND` words, such as 8:16. Raises UsageError."""
    found = []
    for text in texts:
        first, _, behind = text.partition(":")
        if not (first.isdigit() and behind.isdigit()) or int(first) >= int(behind):
            raise UsageError(f"{text!r} is no range of bytes such as 8:16")
        found.append((int(first), int(behind)))
    return tuple(found)


def compared(wanted: bytes, got: bytes, *, cut: bool, ignore: Iterable[tuple[int, int]] = ()) -> str:
    """What is different, for people; empty if nothing is. `cut`: of what was wanted there is only the beginning.
    `ignore`: bytes that may differ, (first, behind the last)."""
    for first, behind in ignore:
        wanted, got = _mask(wanted, first, behind), _mask(got, first, behind)
    if cut:
        got = got[: len(wanted)]
    if wanted == got:
        return ""
    if len(wanted) != len(got):
        return f"{len(got)} bytes instead of {len(wanted)}"
    at = next(index for index, (a, b) in enumerate(zip(wanted, got, strict=True)) if a != b)
    return f"from byte {at} on {got[at : at + _SHOWN].hex()} instead of {wanted[at : at + _SHOWN].hex()}"


def _mask(data: bytes, first: int, behind: int) -> bytes:
    end = min(behind, len(data))
    return data if first >= end else data[:first] + bytes(end - first) + data[end:]
