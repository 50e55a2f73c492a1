"""The checker's result."""

from __future__ import annotations

from typing import Literal

import msgspec

Verdict = Literal["clean", "broken", "incomplete"]


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


class Report(msgspec.Struct, kw_only=True):
    """The whole result. `verdict` is `clean` only if everything is proven."""

    verdict: Verdict
    problems: list[Problem] = []
    """In the order of the channels' openings; the first one is the first that breaks the proof."""
    missing: list[str] = []
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

    @property
    def clean(self) -> bool:
        """Exactly once and in order, proven for every transaction."""
        return self.verdict == "clean"

    def to_json(self) -> bytes:
        """As a JSON text."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    def __str__(self) -> str:
        lines = [f"{'  then' if number else 'server'}  {record}" for number, record in enumerate(self.timeline)]
        lines += [f" guest  {record}" for record in self.guests]
        for one in self.channels:
            name = one.channel + (f" (sub-channel {one.subchannel})" if one.subchannel else "")
            parts = [f"{one.to_host} packets to the host", f"{one.to_guest} to the guest", f"{one.completed} completed"]
            if one.generations > 1:
                parts.append(f"over {one.generations} servers")
            parts += [f"{len(numbers)} {place}" for place, numbers in one.in_flight.items() if numbers]
            if one.cancelled:
                parts.append(f"{one.cancelled} cancelled at the close")
            if one.dropped:
                parts.append(f"{one.dropped} dropped with the channel")
            lines.append(f"channel {name}: {', '.join(parts)}")
        lines += [f"abandoned: {text}" for text in self.abandoned]
        lines += [f"note: {text}" for text in self.notes]
        lines += [f"NOT PROVEN: {text}" for text in self.missing]
        lines += [f"BROKEN: {problem}" for problem in self.problems]
        counts = f"{self.packets} packets and {self.transactions} completed transactions"
        match self.verdict:
            case "clean":
                lines.append(f"clean: {counts} exactly once and in order, {self.in_flight} in flight at the end")
            case "incomplete":
                lines.append(f"incomplete: no breach in {counts}, but not everything is proven")
            case "broken":
                lines.append(f"broken: {self.problems[0]}")
        return "\n".join(lines)
