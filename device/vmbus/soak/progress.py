"""Shows how a campaign goes: a live view on a terminal, plain lines elsewhere. Both show the same figures.

The live view has the campaign's figures, a line for each running episode, and the last events. Plain lines tell of each
operation and event as it ends, and now and then of the whole.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vmbus.soak.records import CAMPAIGN, EpisodeRecord, EventRecord, OperationRecord, Sample

EVENTS_SHOWN = 8
SUMMARY_EVERY = 60.0
"""Seconds between two lines about the whole, without a terminal."""


class _Running:
    def __init__(self) -> None:
        self.began = time.monotonic()
        self.operations = 0
        self.phase = "start"
        self.sample = Sample(at=0.0, transactions=0)


class Goal(NamedTuple):
    """What a campaign is to come to, and what earlier sittings came to."""

    operations: int | None = None
    """In all, if they are counted."""
    seconds: float | None = None
    before: float = 0.0
    """Seconds of earlier sittings."""


class View:
    """What is shown: the figures of this sitting, and what was before. Is told of everything; use it as a `with`."""

    def __init__(self, folder: str, goal: Goal) -> None:
        self.folder = folder
        self.goal = goal
        self.finished = 0
        self.failed = 0
        self.operations = 0
        self.refused = 0
        self.packets = 0
        self.downtimes: list[float] = []
        self.running: dict[int, _Running] = {}
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def line(self, text: str, *, wrong: bool = False) -> None:
        """Something has happened that is told in a line."""

    def failure(self, text: str) -> None:
        self.line(text, wrong=True)

    @property
    def ran(self) -> float:
        return self.goal.before + time.monotonic() - self._began

    @property
    def in_flight(self) -> dict[str, int]:
        """Packets by state, all running episodes together."""
        total: Counter[str] = Counter()
        for one in self.running.values():
            total.update(one.sample.in_flight)
        return dict(total)

    def started(self, episode: int) -> None:
        self.running[episode] = _Running()

    def operation(self, record: OperationRecord) -> None:
        self.operations += record.outcome != "failed"
        self.refused += record.outcome == "refused"
        self.packets += sum(record.packets.values())
        if record.downtime is not None:
            self.downtimes.append(record.downtime)
        if record.episode in self.running:
            self.running[record.episode].operations += 1
        self.line(operation_text(record), wrong=record.outcome == "failed")

    def event(self, record: EventRecord) -> None:
        """Something happened."""
        self.line(event_text(record), wrong=record.serious)

    def sample(self, episode: int, sample: Sample) -> None:
        if episode in self.running:
            self.running[episode].sample = sample

    def phase(self, episode: int, text: str) -> None:
        if episode in self.running:
            self.running[episode].phase = text

    def ended(self, record: EpisodeRecord, replay: str) -> None:
        """An episode has ended; `replay` is the command that runs it again, for one that failed."""
        self.running.pop(record.episode, None)
        self.finished += record.verdict != "interrupted"
        self.failed += record.verdict == "failed"
        if record.verdict == "failed":
            kept = f"{self.folder}/{record.kept}" if record.kept else ""
            self.failure(failure_text(record.episode, record.failure, kept, replay))
        else:
            self.line(f"episode {record.episode} {record.verdict} after {record.seconds:.1f} s")

    def summary(self) -> str:
        """The whole in one line."""
        parts = [f"{self.operations}{self._of(self.goal.operations)} operations"]
        if self.refused:
            parts.append(f"{self.refused} of them refused as they should be")
        parts.append(f"{self.finished} episodes, {self.failed} failed")
        parts.append(f"{self.packets} packets carried over")
        if self.downtimes:
            parts.append(f"downtime {self.downtime_text()}")
        if flying := self.in_flight:
            parts.append("in flight now: " + counts(flying))
        return "; ".join(parts)

    @staticmethod
    def _of(all_of_it: object) -> str:
        return "" if all_of_it is None else f" of {all_of_it}"

    def downtime_text(self) -> str:
        average = sum(self.downtimes) / len(self.downtimes)
        return f"{average:.2f} s on average, {max(self.downtimes):.2f} s at most"


class PlainView(View):
    """Lines, for files and for people without a terminal."""

    def __init__(self, write: Callable[[str], None], folder: str, goal: Goal) -> None:
        super().__init__(folder, goal)
        self._write = write
        self._last = time.monotonic()

    def started(self, episode: int) -> None:
        super().started(episode)
        self.line(f"episode {episode} begins")

    def event(self, record: EventRecord) -> None:
        self.line(("! " if record.serious else "") + event_text(record))

    def line(self, text: str, *, wrong: bool = False) -> None:
        self._write(f"{clock(self.ran):>8}  {text}")
        if time.monotonic() - self._last >= SUMMARY_EVERY:
            self._last = time.monotonic()
            self._write(f"{clock(self.ran):>8}  {self.summary()}")


class LiveView(View):
    """The same on a terminal: figures that change in place, with failures as lines above them."""

    def __init__(self, console: Console, title: str, folder: str, goal: Goal) -> None:
        super().__init__(folder, goal)
        self._console = console
        self._title = title
        self._events: deque[Text] = deque(maxlen=EVENTS_SHOWN)
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.__exit__(None, None, None)

    def failure(self, text: str) -> None:
        self._console.print(text, style="red", soft_wrap=True, highlight=False)

    def line(self, text: str, *, wrong: bool = False) -> None:
        self._events.append(Text(f"{clock(self.ran):>8}  {text}", style="red" if wrong else ""))

    def render(self) -> RenderableType:
        head = Table.grid(padding=(0, 2))
        head.add_column(justify="right", style="dim")
        head.add_column()
        of = self._of(self.goal.operations)
        left = self._of(None if self.goal.seconds is None else clock(self.goal.seconds))
        failed = (f"{self.failed} failed", "bold red") if self.failed else "none failed"
        downtime = f"{self.downtime_text()}, {sum(self.downtimes):.1f} s in all" if self.downtimes else "none"
        head.add_row("time", f"{clock(self.ran)}{left}")
        head.add_row("operations done", f"{self.operations}{of}, {self.refused} of them refused as they should be")
        head.add_row("episodes ended", Text.assemble(f"{self.finished}, ", failed))
        head.add_row("packets in flight", counts(self.in_flight))
        head.add_row("carried over", f"{self.packets} packets so far")
        head.add_row("downtime so far", downtime)
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for heading in ("episode", "since", "operations", "transactions", "in flight", "doing"):
            table.add_column(heading, justify="left" if heading == "doing" else "right", no_wrap=True)
        for episode, one in sorted(self.running.items()):
            flying = sum(one.sample.in_flight.values())
            cells = (episode, clock(time.monotonic() - one.began), one.operations, one.sample.transactions, flying)
            table.add_row(*map(str, cells), one.phase)
        events = Text("\n").join(self._events) if self._events else Text("nothing yet", style="dim")
        events.no_wrap, events.overflow = True, "ellipsis"
        return Group(
            Text(self._title, style="bold"),
            head,
            table,
            Text("last events", style="bold"),
            events,
            Text("Ctrl-C ends it; the same command goes on with it", style="dim"),
        )


# --- texts ---------------------------------------------------------------------------------------------------------


def counts(values: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in values.items()) or "none"


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def operation_text(record: OperationRecord) -> str:
    parts = [f"episode {record.episode}, operation {record.number}: {record.kind} {record.outcome}"]
    parts.append(f"{record.seconds:.2f} s")
    if record.downtime is not None:
        parts.append(f"downtime {record.downtime:.2f} s")
    if record.packets:
        parts.append(f"{sum(record.packets.values())} packets in flight")
    if record.message:
        parts.append(record.message)
    return ", ".join(parts)


def event_text(record: EventRecord) -> str:
    return record.text if record.episode == CAMPAIGN else f"episode {record.episode}: {record.text}"


def failure_text(episode: int, failure: str, kept: str, replay: str) -> str:
    """A failed episode: what, where it is kept, and how to see it again."""
    lines = [f"FAILED  episode {episode}: {failure or 'no reason was told'}"]
    lines += [f"        {name:7} {text}" for name, text in (("kept:", kept), ("replay:", replay)) if text]
    return "\n".join(lines)
