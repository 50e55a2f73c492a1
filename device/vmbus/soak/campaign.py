"""The campaign itself: which episode is next, how many at once, what becomes of each, and when it is over.

It is over when all episodes have been run, its time is up (running episodes still come to their end), too many have
failed, it is interrupted, or it cannot go on (no room on the disk for long, an engine that is lost). In the last two
cases the same command goes on with it later. No failure of an episode ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
from msgspec.structs import replace

from vmbus.errors import VmbusError
from vmbus.soak import keep
from vmbus.soak.engine import Engine, EngineLost
from vmbus.soak.folder import CampaignFolder
from vmbus.soak.job import Job
from vmbus.soak.progress import View
from vmbus.soak.records import (
    CAMPAIGN,
    EpisodeRecord,
    EventRecord,
    OperationRecord,
    Sample,
    State,
    Verdict,
)
from vmbus.soak.room import ROOM_FOR_AN_EPISODE, ROOM_FOR_RECORDS, hit_full_disk, short_of_room
from vmbus.soak.sink import Sink


class Row(Protocol):
    @property
    def planned(self) -> int | None:
        """How many there are; None when the campaign runs for a time."""

    def job(self, episode: int) -> Job:
        """What is to be done in one of them."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What bounds a campaign, besides its plan."""

    seconds: float | None = None
    """No episode begins after so many seconds, all sittings together."""
    failures: int = 25
    """The campaign ends after so many failed episodes: by then it is something that concerns all of them."""
    keep_bytes: int = keep.ONE_LIMIT
    """What is kept of one failure; of all together `keep.ALL_LIMIT_FACTOR` times as much."""
    wait_for_room: float = 600.0
    """Seconds that a full disk is waited for before the campaign gives up for now."""
    room: int = ROOM_FOR_AN_EPISODE
    """Bytes that must be free before an episode begins."""
    attempts: int = 3
    """How often an episode is run that a full disk or a lost engine has spoilt."""
    beat: float = 5.0
    """Seconds between two looks at the disk and the clock."""
    report_every: float = 60.0
    """Seconds between two reports of what there is so far."""


class CampaignRun:
    def __init__(
        self,
        folder: CampaignFolder,
        row: Row,
        engine: Engine,
        view: View,
        *,
        limits: Limits | None = None,
        scratch: Path | None = None,
        replay: Callable[[int], str] = lambda episode: "",
        report: Callable[[], object] = lambda: None,
    ) -> None:
        """`scratch` is where episodes keep their big files; `report` writes the report; `replay` names a command."""
        self._folder = folder
        self._row = row
        self._engine = engine
        self._view = view
        self._limits = limits or Limits()
        self._scratch = scratch
        self._replay = replay
        self._report = report
        self._stop = asyncio.Event()
        self._before = folder.state.ran
        self._began = time.monotonic()
        self._running: set[asyncio.Task[None]] = set()
        self._again: list[int] = []
        self._attempts: dict[int, int] = {}
        self._rest: Iterator[int] = iter(())
        self._done: dict[int, EpisodeRecord] = {}
        self._reason = ""
        self._reported = self._began
        self._reporting: asyncio.Task[None] | None = None

    def interrupt(self, reason: str = "interrupted") -> None:
        """Begin no further episode, and end those that run; their records say that they were."""
        if not self._stop.is_set():
            self._reason = reason
            self._stop.set()
            self._say(f"{reason}: running episodes are ended early; the same command goes on with the campaign")

    def abort(self) -> None:
        """The same, by force: nothing is waited for. What was written down stays."""
        self.interrupt()
        for task in self._running:
            task.cancel()

    @property
    def ran(self) -> float:
        """Seconds for which the campaign ran, all sittings together."""
        return self._before + time.monotonic() - self._began

    async def run(self) -> Verdict:
        """Run what there is to run. The report is written before this returns.

        Raises OSError when the report cannot be written, not even into the reserve.
        """
        self._done = self._folder.finished()
        if self._folder.resumed:
            self._say(f"gone on with after {self._before:.0f} s, with {len(self._done)} finished episodes")
        self._rest = self._episodes()
        self._note(state="running")
        try:
            await self._work()
        except EngineLost as error:
            self.interrupt(str(error))
        finally:
            await self._end_running()
        if self._reporting is not None:
            await self._reporting
        self._tell_problems()
        if not self._folder.flush():
            # Episodes whose records are not on the disk are run again.
            self.interrupt(f"{self._folder.waiting} records found no room on the disk")
        finished = not self._stop.is_set()
        self._note(state="finished" if finished else "interrupted")
        self._folder.with_room(self._report)
        if self._failed:
            return "failed"
        return "passed" if finished and self._done else "interrupted"

    # --- which episode is next -------------------------------------------------------------------------------------

    @property
    def _failed(self) -> int:
        return sum(record.verdict == "failed" for record in self._done.values())

    def _over(self) -> bool:
        """Whether no further episode is to begin."""
        if self._stop.is_set():
            return True
        if self._failed >= self._limits.failures:
            self._reason = f"{self._failed} episodes have failed, so the campaign is ended"
            return True
        return self._limits.seconds is not None and self.ran >= self._limits.seconds

    def _episodes(self) -> Iterator[int]:
        """Those that have not been run, in their order."""
        only, planned = self._folder.campaign.only, self._row.planned
        if only is not None:
            row: Iterable[int] = (only,)
        else:
            row = itertools.count() if planned is None else range(planned)
        return (episode for episode in row if episode not in self._done)

    async def _work(self) -> None:
        while True:
            slots = 0 if self._over() else await self._engine.slots()
            while len(self._running) < slots and await self._room() and not self._over():
                episode = self._again.pop(0) if self._again else next(self._rest, None)
                if episode is None:
                    break
                self._running.add(asyncio.create_task(self._episode(episode), name=f"episode {episode}"))
            if not self._running and (slots or self._over()):
                break
            done = await self._next_end()
            self._running -= done
            for task in done:
                if not task.cancelled():
                    task.result()
            self._write_down()
            self._report_so_far(bool(done))
        if self._reason and not self._stop.is_set():
            self._say(self._reason, serious=True)

    async def _next_end(self) -> set[asyncio.Task[None]]:
        """Wait until an episode ends, the campaign is interrupted, or a beat has passed. Returns what has ended."""
        interrupted = None if self._stop.is_set() else asyncio.create_task(self._stop.wait())
        waited_for: set[asyncio.Task[Any]] = {*self._running, *filter(None, [interrupted])}
        await asyncio.wait(waited_for, timeout=self._limits.beat, return_when=asyncio.FIRST_COMPLETED)
        if interrupted is not None:
            interrupted.cancel()
        return {task for task in self._running if task.done()}

    async def _end_running(self) -> None:
        """However `_work` has ended: no episode is left behind."""
        if self._running:
            self._stop.set()
            await asyncio.gather(*self._running, return_exceptions=True)
            self._running.clear()

    # --- one episode -----------------------------------------------------------------------------------------------

    async def _episode(self, episode: int) -> None:
        self._attempts[episode] = self._attempts.get(episode, 0) + 1
        job = self._row.job(episode)
        working = self._folder.working(episode)
        self._view.started(episode)
        sink = _EpisodeSink(self._folder, self._view, episode)
        try:
            record = await self._engine.run(job, working, sink, self._stop)
        except EngineLost:
            self._folder.discard(working)
            raise
        spoilt = self._spoilt(record)
        if spoilt:
            self._folder.discard(working)
            if self._attempts[episode] < self._limits.attempts:
                self._say(f"episode {episode} is run again: {spoilt}", serious=True)
                self._again.append(episode)
            else:
                self.interrupt(f"episode {episode} was run {self._limits.attempts} times in vain: {spoilt}")
            self._view.ended(replace(record, verdict="interrupted"), "")
            return
        replay = ""
        if record.verdict == "failed":
            replay = self._replay(episode)
            record.kept = self._keep(working)
        else:
            self._folder.discard(working)
        self._folder.write(record)
        if record.verdict != "interrupted":
            self._done[episode] = record
        self._view.ended(record, replay)

    def _keep(self, working: Path) -> str:
        try:
            dropped = keep.bound_one(working, self._limits.keep_bytes)
            kept = self._folder.keep(working)
            dropped += keep.bound_all(self._folder.path / "failures", self._limits.keep_bytes * keep.ALL_LIMIT_FACTOR)
        except OSError as error:
            self._say(f"what was to be kept of a failure is not complete: {error}", serious=True)
            return str(working.relative_to(self._folder.path))
        if dropped:
            self._say(f"not kept, to save room: {'; '.join(dropped)}")
        return kept

    # --- room ------------------------------------------------------------------------------------------------------

    def _short_of_room(self) -> str:
        """Which place is short of room, for people; empty if none is."""
        return short_of_room(self._places())

    def _places(self) -> list[tuple[Path, int]]:
        """Where episodes and the campaign write, and how many bytes have to be free there."""
        places = [(self._folder.path, min(ROOM_FOR_RECORDS, self._limits.room))]
        return places if self._scratch is None else [*places, (self._scratch, self._limits.room)]

    def _spoilt(self, record: EpisodeRecord) -> str:
        """Why an episode says nothing about the device, and has to be run again; empty if it does say something.

        One that got into a full disk fails, and says so itself; one that nobody asked to end early has lost its engine.
        """
        if hit_full_disk(record, [path for path, _ in self._places()]):
            short = self._short_of_room()
            return f"the disk got full: {short}; {record.failure}" if short else ""
        if record.verdict == "interrupted" and not self._stop.is_set():
            return record.failure or "it ended early, unasked"
        return ""

    async def _room(self) -> bool:
        """Wait for room on the disk, while nothing new begins. False if the campaign ends meanwhile."""
        short = self._short_of_room()
        if not short:
            return True
        self._say(f"no episode begins: {short}; waiting up to {self._limits.wait_for_room:g} s for room", serious=True)
        deadline = time.monotonic() + self._limits.wait_for_room
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), min(self._limits.beat, self._limits.wait_for_room))
            self._write_down()
            if not self._short_of_room():
                self._say("there is room again")
                return True
            if time.monotonic() >= deadline:
                self.interrupt(f"no room on the disk for {self._limits.wait_for_room:g} s ({self._short_of_room()})")
        return False

    # --- what is told ----------------------------------------------------------------------------------------------

    def _say(self, text: str, *, serious: bool = False) -> None:
        event = EventRecord(episode=CAMPAIGN, at=round(self.ran, 3), text=text, serious=serious)
        self._folder.write(event)
        self._view.event(event)

    def _tell_problems(self) -> None:
        while self._folder.problems:
            self._say(self._folder.problems.pop(0), serious=True)

    def _note(self, *, state: Literal["running", "interrupted", "finished"]) -> None:
        self._folder.state = State(ran=round(self.ran, 3), state=state, reason=self._reason)
        self._folder.save_state()

    def _write_down(self) -> None:
        """What waits for room, what went wrong with the folder, and how far the campaign has come."""
        self._folder.flush()
        self._tell_problems()
        self._note(state="running")

    def _report_so_far(self, something_new: bool) -> None:
        """Write the report of what there is, from time to time, so that one can look at it meanwhile."""
        now = time.monotonic()
        busy = self._reporting is not None and not self._reporting.done()
        if something_new and not busy and now - self._reported >= self._limits.report_every:
            self._reported = now
            self._reporting = asyncio.create_task(self._write_report())

    async def _write_report(self) -> None:
        try:
            await asyncio.to_thread(self._report)
        except (OSError, VmbusError) as error:
            self._say(f"the report so far could not be written: {error}")


class _EpisodeSink(Sink):
    """Writes down what an episode tells, and shows it."""

    def __init__(self, folder: CampaignFolder, view: View, episode: int) -> None:
        self._folder = folder
        self._view = view
        self._episode = episode

    def operation(self, record: OperationRecord) -> None:
        self._folder.write(record)
        self._view.operation(record)

    def event(self, record: EventRecord) -> None:
        self._folder.write(record)
        self._view.event(record)

    def sample(self, sample: Sample) -> None:
        self._view.sample(self._episode, sample)

    def phase(self, text: str) -> None:
        self._view.phase(self._episode, text)
