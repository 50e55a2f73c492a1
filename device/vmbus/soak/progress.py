"""Shows how a campaign goes: a live view on a terminal, plain lines elsewhere. Both show the same figures.

The live view has the campaign's figures, a line for each running episode, and the last events. Plain lines tell of each
operation and event as it ends, and now and then of the whole.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vmbus.soak.records import CAMPAIGN, EpisodeRecord, EventRecord, OperationRecord, Sample

EVENTS_SHOWN = 8
SUMMARY_EVERY = 60.0
"""Seconds between two lines about the whole, without a terminal."""


class Figures:
    """What both views show. It is told the same as a view; it counts this sitting only, and says what was before."""

    def __init__(self, *, planned: int | None, seconds: float | None, before: float = 0.0, finished: int = 0) -> None:
        """`planned`: operations in all, if they are counted; `before`: seconds of earlier sittings."""
        self.planned = planned
        self.seconds = seconds
        self.before = before
        self.finished = finished
        self.failed = 0
        self.operations = 0
        self.refused = 0
        self.packets = 0
        self.transactions = 0
        self.downtimes: list[float] = []
        self.running: dict[int, _Running] = {}
        self.events: deque[Text] = deque(maxlen=EVENTS_SHOWN)
        self._began = time.monotonic()

    @property
    def ran(self) -> float:
        return self.before + time.monotonic() - self._began

    @property
    def in_flight(self) -> dict[str, int]:
        """Packets by state, all running episodes together."""
        total: dict[str, int] = {}
        for one in self.running.values():
            for state, count in one.sample.in_flight.items():
                total[state] = total.get(state, 0) + count
        return total

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

    def sample(self, episode: int, sample: Sample) -> None:
        if episode in self.running:
            self.running[episode].sample = sample

    def phase(self, episode: int, text: str) -> None:
        if episode in self.running:
            self.running[episode].phase = text

    def ended(self, record: EpisodeRecord) -> None:
        self.running.pop(record.episode, None)
        self.finished += record.verdict != "interrupted"
        self.failed += record.verdict == "failed"
        self.transactions += sum(workload.transactions for workload in record.workloads)

    def summary(self) -> str:
        """The whole in one line."""
        parts = [f"{self.operations}{f' of {self.planned}' if self.planned is not None else ''} operations"]
        if self.refused:
            parts.append(f"{self.refused} of them refused as they should be")
        parts.append(f"{self.finished} episodes, {self.failed} failed")
        parts.append(f"{self.packets} packets carried over")
        if self.downtimes:
            average = sum(self.downtimes) / len(self.downtimes)
            parts.append(f"downtime {average:.2f} s on average, {max(self.downtimes):.2f} s at most")
        flying = self.in_flight
        if flying:
            parts.append("in flight now: " + counts(flying))
        return "; ".join(parts)


class _Running:
    """A running episode."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.operations = 0
        self.phase = "start"
        self.sample = Sample(at=0.0, transactions=0)


def counts(values: dict[str, int]) -> str:
    """Counts by name, for people."""
    return ", ".join(f"{count} {name}" for name, count in values.items()) or "none"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def operation_text(record: OperationRecord) -> str:
    """One operation in a line."""
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
    """One event in a line."""
    return record.text if record.episode == CAMPAIGN else f"episode {record.episode}: {record.text}"


def failure_text(record: EpisodeRecord, folder: str, replay: str) -> str:
    """A failed episode: what, where it is kept, and how to see it again."""
    lines = [f"FAILED  episode {record.episode}: {record.failure or 'no reason was told'}"]
    if record.kept:
        lines.append(f"        kept:   {folder}/{record.kept}")
    if replay:
        lines.append(f"        replay: {replay}")
    return "\n".join(lines)


class PlainView:
    """Lines, for files and for people without a terminal."""

    def __init__(self, figures: Figures, write: Callable[[str], None], folder: str) -> None:
        self._figures = figures
        self._write = write
        self._folder = folder
        self._last = time.monotonic()

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _line(self, text: str) -> None:
        self._write(f"{clock(self._figures.ran):>8}  {text}")
        if time.monotonic() - self._last >= SUMMARY_EVERY:
            self._last = time.monotonic()
            self._write(f"{clock(self._figures.ran):>8}  {self._figures.summary()}")

    def started(self, episode: int) -> None:
        self._figures.started(episode)
        self._line(f"episode {episode} begins")

    def operation(self, record: OperationRecord) -> None:
        self._figures.operation(record)
        self._line(operation_text(record))

    def event(self, record: EventRecord) -> None:
        self._line(("! " if record.serious else "") + event_text(record))

    def sample(self, episode: int, sample: Sample) -> None:
        self._figures.sample(episode, sample)

    def phase(self, episode: int, text: str) -> None:
        self._figures.phase(episode, text)

    def ended(self, record: EpisodeRecord, replay: str) -> None:
        self._figures.ended(record)
        if record.verdict == "failed":
            self._line(failure_text(record, self._folder, replay))
        else:
            self._line(f"episode {record.episode} {record.verdict} after {record.seconds:.1f} s")


class LiveView:
    """The same on a terminal: figures that change in place, with failures as lines above them."""

    def __init__(self, figures: Figures, console: Console, folder: str, title: str) -> None:
        self._figures = figures
        self._console = console
        self._folder = folder
        self._title = title
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._live.__exit__(None, None, None)

    def started(self, episode: int) -> None:
        self._figures.started(episode)

    def operation(self, record: OperationRecord) -> None:
        self._figures.operation(record)
        self._note(operation_text(record), record.outcome == "failed")

    def event(self, record: EventRecord) -> None:
        self._note(event_text(record), record.serious)

    def sample(self, episode: int, sample: Sample) -> None:
        self._figures.sample(episode, sample)

    def phase(self, episode: int, text: str) -> None:
        self._figures.phase(episode, text)

    def ended(self, record: EpisodeRecord, replay: str) -> None:
        self._figures.ended(record)
        if record.verdict == "failed":
            text = failure_text(record, self._folder, replay)
            self._console.print(text, style="red", soft_wrap=True, highlight=False)
        else:
            self._note(f"episode {record.episode} {record.verdict} after {record.seconds:.1f} s", False)

    def _note(self, text: str, serious: bool) -> None:
        line = f"{clock(self._figures.ran):>8}  {text}"
        self._figures.events.append(Text(line, style="red" if serious else ""))

    def render(self) -> RenderableType:
        """The view as it is now."""
        figures = self._figures
        head = Table.grid(padding=(0, 2))
        head.add_column(justify="right", style="dim")
        head.add_column()
        of = "" if figures.planned is None else f" of {figures.planned}"
        left = "" if figures.seconds is None else f" of {clock(figures.seconds)}"
        head.add_row("time", f"{clock(figures.ran)}{left}")
        head.add_row(
            "operations done", f"{figures.operations}{of}, {figures.refused} of them refused as they should be"
        )
        failed = (f"{figures.failed} failed", "bold red") if figures.failed else "none failed"
        head.add_row("episodes ended", Text.assemble(f"{figures.finished}, ", failed))
        head.add_row("packets in flight", counts(figures.in_flight))
        head.add_row("carried over", f"{figures.packets} packets so far")
        if figures.downtimes:
            total, most = sum(figures.downtimes), max(figures.downtimes)
            average = total / len(figures.downtimes)
            head.add_row("downtime so far", f"{average:.2f} s on average, {most:.2f} s at most, {total:.1f} s in all")
        else:
            head.add_row("downtime so far", "none")
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for heading in ("episode", "since", "operations", "transactions", "in flight", "doing"):
            table.add_column(heading, justify="left" if heading == "doing" else "right", no_wrap=True)
        for episode, one in sorted(figures.running.items()):
            table.add_row(
                str(episode),
                clock(time.monotonic() - one.began),
                str(one.operations),
                str(one.sample.transactions),
                str(sum(one.sample.in_flight.values())),
                one.phase,
            )
        events = Text("\n").join(figures.events) if figures.events else Text("nothing yet", style="dim")
        events.no_wrap, events.overflow = True, "ellipsis"
        return Group(
            Text(self._title, style="bold"),
            head,
            table,
            Text("last events", style="bold"),
            events,
            Text("Ctrl-C ends it; the same command goes on with it", style="dim"),
        )
