"""Runs one episode as a process of its own, and reads what it says; used here and on other machines alike.

The worker gets a folder with `plan.json`, and writes one JSON object a line on standard output:
`{"kind": KIND, "record": RECORD}`. Its last line is the episode's record. Whatever else it does is a failed episode
with a message, and never the end of the campaign:

    it dies                   what killed it, and the last lines of its log
    it is silent for long     it hangs: it is asked to end, then killed
    it takes too long         the same
    it prints something else  the first such line is quoted; what it did say is taken all the same
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import sys
import time
from pathlib import Path

import msgspec

import vmbus
import vmbus_guest
from vmbus.errors import VmbusError
from vmbus.soak.records import EpisodeRecord, EventRecord, OperationRecord
from vmbus.soak.sink import Sink, decoded, tell
from vmbus.vm.process import Child

WORKER = (sys.executable, "-m", "vmbus.soak.worker")
PLAN = "plan.json"
LOG = "worker.log"
_IMPORT_ROOTS = list(
    dict.fromkeys(
        [
            *(str(Path(package.__file__).parents[1]) for package in (vmbus, vmbus_guest) if package.__file__),
            *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
        ]
    )
)
LINE_LIMIT = 32 << 20
"""Bytes that a line may have. An episode's record carries all its samples."""
_QUOTED = 200


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """How long an episode's worker is waited for, in seconds."""

    silence: float = 300.0
    """Without a line from it."""
    longest: float = 3600.0
    """All together."""
    grace: float = 60.0
    """Between the request to end, and the end by force."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    episode: int
    seed: int
    plan: bytes
    """The episode's plan as JSON."""
    command: tuple[str, ...] = WORKER
    """The worker's command line; the folder is added."""
    bounds: Bounds = Bounds()


class _Reader:
    """Takes the worker's lines apart."""

    def __init__(self, job: Job, sink: Sink) -> None:
        self._job = job
        self._sink = sink
        self.heard = time.monotonic()
        self.doing = "start"
        self.end: EpisodeRecord | None = None
        self.rubbish = 0
        self.first_rubbish = ""

    async def read(self, stream: asyncio.StreamReader) -> None:
        """Read to the end of the output."""
        parts: list[bytes] = []  # of the line that has no end yet
        length = 0
        too_long = False
        while chunk := await stream.read(1 << 16):
            first, *more = chunk.split(b"\n")
            parts.append(first)
            length += len(first)
            for following in more:
                if not too_long:  # else it was counted when it got too long
                    self._take(b"".join(parts))
                parts, length, too_long = [following], len(following), False
            if length > LINE_LIMIT:
                if not too_long:
                    self._wrong(b"".join(parts))
                parts, length, too_long = [], 0, True
        if not too_long:
            self._take(b"".join(parts))

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            self._understand(line)
        except ValueError:
            self._wrong(line)
        else:
            self.heard = time.monotonic()

    def _understand(self, line: bytes) -> None:
        kind, record = decoded(line)
        if self.end is not None:
            raise ValueError("a line after the last one")
        if isinstance(record, OperationRecord | EventRecord | EpisodeRecord) and record.episode != self._job.episode:
            raise ValueError("a record of another episode")
        if isinstance(record, EpisodeRecord):
            self.end = record
            return
        if kind == "phase":
            self.doing = record
        tell(self._sink, kind, record)

    def _wrong(self, line: bytes) -> None:
        if not self.rubbish:
            self.first_rubbish = line[:_QUOTED].decode(errors="replace")
        self.rubbish += 1


async def run_job(job: Job, folder: Path, sink: Sink, stop: asyncio.Event, *, where: str = "") -> EpisodeRecord:
    """Run the episode in `folder`, which exists; `stop` ends it early. Returns its record, whatever happens to it."""
    started, began = datetime.datetime.now(datetime.UTC), time.monotonic()
    reader = _Reader(job, sink)
    asked_to_end = False
    problem = ""
    try:
        plan = folder / PLAN
        plan.write_bytes(job.plan)
        plan.chmod(0o600)
        child = await Child.spawn(
            f"the worker of episode {job.episode}",
            [*job.command, str(folder)],
            folder / LOG,
            environment={"PYTHONPATH": os.pathsep.join(_IMPORT_ROOTS)},
            capture_stdout=True,
        )
    except (VmbusError, OSError) as error:
        problem = f"the episode's worker could not be started: {error}"
    else:
        assert child.process.stdout is not None
        reading = asyncio.create_task(reader.read(child.process.stdout), name=f"output of {child.name}")
        stopping = asyncio.create_task(stop.wait())
        try:
            problem, asked_to_end = await _watch(child, reader, stopping, job.bounds, began)
        finally:
            stopping.cancel()
            if child.running:
                await child.stop()  # also when we are cancelled
            # What it has written is in the pipe; a process of its own that holds the pipe open is not waited for.
            await asyncio.wait({reading}, timeout=5)
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
        if not problem and reader.end is None and not asked_to_end:
            problem = str(child.death())
    return _judge(
        job,
        reader,
        problem,
        asked_to_end,
        EpisodeRecord(
            episode=job.episode,
            seed=job.seed,
            verdict="interrupted",
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - began, 3),
            where=where,
        ),
    )


async def _watch(
    child: Child, reader: _Reader, stopping: asyncio.Task[object], bounds: Bounds, began: float
) -> tuple[str, bool]:
    """Wait for the child's end. Returns what was wrong, and whether it was asked to end early."""
    while child.running:
        now = time.monotonic()
        left = min(reader.heard + bounds.silence, began + bounds.longest) - now
        if left <= 0:
            silent = now - reader.heard >= bounds.silence
            problem = (
                f"the worker hangs: it said nothing for {bounds.silence:g} s"
                if silent
                else (f"the worker did not come to its end in {bounds.longest:g} s")
            )
            await child.stop(bounds.grace)
            return f"{problem} (in: {reader.doing})", False
        await asyncio.wait({child.exited, stopping}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done() and child.running:
            await child.stop(bounds.grace)
            return "", True
    return "", False


def _judge(job: Job, reader: _Reader, problem: str, asked_to_end: bool, unknown: EpisodeRecord) -> EpisodeRecord:
    """The episode's record: the worker's own, unless something is wrong with the worker."""
    if reader.rubbish and not problem:
        problem = (
            f"the worker printed {reader.rubbish} lines that are no records, so some may be missing; "
            f"the first: {reader.first_rubbish!r}"
        )
    record = reader.end or unknown
    record.where = unknown.where
    if problem and record.verdict != "failed":
        record.verdict = "failed"
        record.failure = problem
    elif problem:
        record.failure = f"{record.failure}; {problem}" if record.failure else problem
    elif reader.end is None and asked_to_end:
        record.failure = "ended early on request"
    return record
