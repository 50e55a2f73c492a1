"""The checker's result."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import msgspec

Verdict = Literal["clean", "broken", "incomplete"]
_LISTED = 8  # channels of one of Linux's drivers that have a line each


class Problem(msgspec.Struct, kw_only=True, frozen=True):
    """One breach. `first` and `last` are the transactions it may be about: the same where it is known exactly.

    `kind`: lost, doubled, reordered, corrupted, invented (taken, but never put), failed (the channel was closed
    because somebody broke its rules), forgotten (the sender does not wait any more for what was not completed).
    """

    kind: str
    channel: str
    direction: str
    where: str
    first: int | None = None
    last: int | None = None
    ordinal: int | None = None
    """How many packets of this direction came before it since the channel was opened."""
    of: Literal["packet", "completion", ""] = ""
    message: str = ""

    def __str__(self) -> str:
        return self.message


class Gap(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that could not be proven. `code` is empty where nobody tells it apart."""

    text: str
    code: Literal["guest-stops-short", "guest-missing", ""] = ""

    def __str__(self) -> str:
        return self.text


class ChannelReport(msgspec.Struct, kw_only=True):
    """One life of a channel. Counts are of packets, completions not among them, and of completed transactions."""

    channel: str
    instance: str
    subchannel: int
    generations: int
    to_guest: int = 0
    to_host: int = 0
    completed: int = 0
    closed: bool = False
    in_flight: dict[str, list[int]] = {}
    """Transactions at the end of the records, by the place where they are."""
    cancelled: int = 0
    """Own packets given back to their owners when the channel was closed, both ends together."""
    dropped: int = 0
    """Packets that went with a channel which was made anew at a restore."""
    driver: str = ""
    """Linux's own driver at the guest's end, which keeps no record: what is here is of the host's half alone."""


class Report(msgspec.Struct, kw_only=True):
    """The whole result. `verdict` is `clean` only if everything is proven."""

    verdict: Verdict
    problems: list[Problem] = []
    """In the order of the channels' openings; the first one is the first that breaks the proof."""
    missing: list[Gap] = []
    """What could not be proven, and why."""
    timeline: list[str] = []
    """The servers' records that make up the VM's life, oldest first."""
    guests: list[str] = []
    abandoned: list[str] = []
    """Records, or their ends, of a future that did not happen."""
    notes: list[str] = []
    channels: list[ChannelReport] = []
    packets: int = 0
    transactions: int = 0
    in_flight: int = 0
    half_packets: int = 0
    """On channels of Linux's own drivers, of which there is the host's half; not among `packets`."""
    half_transactions: int = 0

    def not_proven(self, text: str, code: Literal["guest-stops-short", "guest-missing", ""] = "") -> None:
        """Notes one more gap."""
        self.missing.append(Gap(text, code))

    @property
    def clean(self) -> bool:
        """Exactly once and in order, proven for every transaction; on channels of Linux's own drivers, as far as the
        host's half can prove it."""
        return self.verdict == "clean"

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    def __str__(self) -> str:
        lines = [f"{'  then' if number else 'server'}  {record}" for number, record in enumerate(self.timeline)]
        lines += [f" guest  {record}" for record in self.guests]
        several = Counter(one.driver for one in self.channels if one.driver)
        for driver, count in several.items():
            if count > _LISTED:
                lines.append(self._together(driver))
        for one in self.channels:
            if several[one.driver] > _LISTED:
                continue
            name = one.channel + (f" (sub-channel {one.subchannel})" if one.subchannel else "")
            parts = [f"{one.to_host} packets to the host", f"{one.to_guest} to the guest", f"{one.completed} completed"]
            if one.generations > 1:
                parts.append(f"over {one.generations} servers")
            parts += [f"{len(numbers)} {place}" for place, numbers in one.in_flight.items() if numbers]
            if one.cancelled:
                parts.append(f"{one.cancelled} cancelled at the close")
            if one.dropped:
                parts.append(f"{one.dropped} dropped with the channel")
            if one.driver:
                parts.append(f"host's half: {one.driver} keeps no record")
            lines.append(f"channel {name}: {', '.join(parts)}")
        lines += [f"abandoned: {text}" for text in self.abandoned]
        lines += [f"note: {text}" for text in self.notes]
        lines += [f"NOT PROVEN: {text}" for text in self.missing]
        lines += [f"BROKEN: {problem}" for problem in self.problems]
        counts = f"{self.packets} packets and {self.transactions} completed transactions"
        if several:
            lines.append(
                f"host's half of {several.total()} channels: {self.half_packets} packets and {self.half_transactions} "
                f"transactions{'' if self.problems else ', each completed once'}"
            )
        if self.verdict == "clean" and several and len(self.channels) == several.total():
            lines.append("clean: as far as the host's half can prove it")
            return "\n".join(lines)
        match self.verdict:
            case "clean":
                lines.append(f"clean: {counts} exactly once and in order, {self.in_flight} in flight at the end")
            case "incomplete":
                lines.append(f"incomplete: no breach in {counts}, but not everything is proven")
            case "broken":
                lines.append(f"broken: {self.problems[0]}")
        return "\n".join(lines)

    def _together(self, driver: str) -> str:
        """Many channels of one driver, such as each connection of a socket, on one line."""
        found = [one for one in self.channels if one.driver == driver]
        counts = (sum(one.to_host for one in found), sum(one.to_guest for one in found))
        return (
            f"{len(found)} channels of {driver}: {counts[0]} packets to the host, {counts[1]} to the guest, "
            f"{sum(one.completed for one in found)} completed, {sum(one.closed for one in found)} of them closed, "
            f"host's half: {driver} keeps no record"
        )
