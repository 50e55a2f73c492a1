"""One episode on another machine: what a Dask worker does for a campaign elsewhere.

It has its own checkout of the project, of the same sources (`code_digest`), and runs the episode as the campaign's own
machine would: a worker process in a folder. What the episode says is sent at once, numbered; the answer has all of it
again, and the files that are to be kept.

A campaign that is gone must not leave episodes running here: it counts a variable of the scheduler up while it lives
(`BEAT`). When that stands still, or says STOP, the episode is ended early.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import time
import zlib
from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

import vmbus
import vmbus_guest
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.providers.loading import author_directories, is_external
from vmbus.provision import provision, provision_debian
from vmbus.soak import keep
from vmbus.soak.job import WORKER, Job, run_job
from vmbus.soak.plan import EpisodePlan
from vmbus.soak.records import EpisodeRecord
from vmbus.soak.room import ROOM_FOR_AN_EPISODE, hit_full_disk, short_of_room
from vmbus.soak.sink import LineSink, encoded
from vmbus.vm.run_directory import RunDirectory, private_base

BEAT = 5.0
"""Seconds between two counts of a living campaign."""
PATIENCE = 60.0
"""Seconds without a count after which the campaign is taken to be gone."""
STOP = -1


class Request(msgspec.Struct, kw_only=True, frozen=True):
    job: Job
    """Its command is empty where it is this machine's own worker program."""
    keep_bytes: int
    topic: str
    """Where what is said goes."""
    heartbeat: str
    """The variable that counts."""
    code: str
    """The digest of the campaign's sources."""
    room: int = ROOM_FOR_AN_EPISODE
    beat: float = BEAT
    patience: float = PATIENCE


class File(msgspec.Struct, frozen=True):
    """A file of a failed episode."""

    name: str
    """Relative to the episode's folder."""
    content: bytes
    """Compressed by zlib."""


class Answer(msgspec.Struct, kw_only=True, frozen=True):
    record: EpisodeRecord
    attempt: str
    """Which run of the episode this is: the same as with what was sent."""
    said: list[bytes]
    """Operations and events, as lines of `sink`."""
    files: list[File] = []
    dropped: list[str] = []


@functools.cache
def code_digest() -> str:
    """A digest of the sources of the library and of the guest's programs."""
    return digest_of([Path(package.__file__).parent for package in (vmbus, vmbus_guest) if package.__file__])


def digest_of(packages: list[Path]) -> str:
    total = hashlib.sha256()
    for root in packages:
        for path in sorted(root.rglob("*.py")):
            total.update(f"{path.relative_to(root)}\0".encode())
            total.update(path.read_bytes())
    return total.hexdigest()[:16]


class _Telling(LineSink):
    """The sink of an episode: numbers what it is told, sends it, and remembers it. Samples and phases are only sent."""

    def __init__(self, send: Callable[[int, bytes], None]) -> None:
        self._send = send
        self.said: list[bytes] = []

    def line(self, kind: str, record: object) -> None:
        remember = kind in ("operation", "event")
        line = encoded(kind, record)
        self._send(len(self.said) if remember else -1, line)
        if remember:
            self.said.append(line)


def run_request(data: bytes) -> bytes:
    """Run an episode inside a task of a Dask worker: a `Request` as MessagePack in, an `Answer` as MessagePack out.

    Raises EnvironmentProblem when this machine cannot run it.
    """
    request = msgspec.msgpack.decode(data, type=Request)
    if request.code != code_digest():
        raise EnvironmentProblem(
            f"this worker runs other sources ({code_digest()}) than the campaign ({request.code}): "
            "update its checkout and start it again"
        )
    if not request.job.command:
        plan = msgspec.json.decode(request.job.plan, type=EpisodePlan)
        _look_for_modules(plan)
        (provision_debian if plan.vm.guest.root else provision)()  # their own bounds, which are not an episode's
    import distributed

    dask: Any = distributed  # half of it has no types
    worker = dask.get_worker()
    heartbeat = dask.Variable(request.heartbeat, client=dask.get_client())
    attempt = os.urandom(8).hex()
    telling = _Telling(
        lambda number, line: worker.log_event(request.topic, [attempt, request.job.episode, number, line.decode()])
    )
    with contextlib.ExitStack() as stack:
        directory = RunDirectory.create(
            f"episode-{request.job.episode}", base=private_base("vmbus-soak"), sockets=False
        )
        stack.callback(directory.remove)
        folder = directory / "episode"
        folder.mkdir(mode=0o700)
        record = asyncio.run(_run(request, folder, telling, lambda: int(heartbeat.get(timeout=request.patience))))
        record.where = str(worker.name)
        short = short_of_room([(directory.path, request.room)])
        if short and hit_full_disk(record, [directory.path]):
            # The campaign runs it again, here or elsewhere.
            record.verdict = "interrupted"
            record.failure = f"the disk of {worker.name} got full: {short}; {record.failure}"
        dropped: list[str] = []
        files: list[File] = []
        if record.verdict == "failed":
            dropped = keep.bound_one(folder, request.keep_bytes)
            files = [
                File(str(path.relative_to(folder)), zlib.compress(path.read_bytes(), 1))
                for path in sorted(folder.rglob("*"))
                if path.is_file() and not path.is_symlink()
            ]
    return msgspec.msgpack.encode(
        Answer(record=record, attempt=attempt, said=telling.said, files=files, dropped=dropped)
    )


def _look_for_modules(plan: EpisodePlan) -> None:
    """Raises EnvironmentProblem where a user's module is not on this machine. None is imported: it would stay."""
    places = [*plan.path, *author_directories()]
    kinds = [one.kind for one in plan.vm.device.providers if is_external(one.kind)]
    for name in [*kinds, *(one.call for one in plan.own if one.call)]:
        package = name.partition(":")[0].partition(".")[0]
        if find_spec(package) is None and PathFinder.find_spec(package, places) is None:
            raise EnvironmentProblem(
                f"{name!r} of the schedule is not on this machine: put its module where the campaign's machine has it "
                f"({', '.join(plan.path)}), or install it"
            )


async def _run(request: Request, folder: Path, telling: _Telling, count: Callable[[], int]) -> EpisodeRecord:
    stop = asyncio.Event()
    job = replace(request.job, command=request.job.command or WORKER)
    watch = asyncio.create_task(_watch(request, count, stop))
    try:
        return await run_job(job, folder, telling, stop)
    finally:
        watch.cancel()


async def _watch(request: Request, count: Callable[[], int], stop: asyncio.Event) -> None:
    """Set `stop` when the campaign says so, or is gone."""
    last, changed = STOP, time.monotonic()
    while time.monotonic() - changed < request.patience:
        # The scheduler may be gone as well: then this campaign cannot hear us any more.
        with contextlib.suppress(Exception):
            now = await asyncio.to_thread(count)
            if now == STOP:
                break
            if now != last:
                last, changed = now, time.monotonic()
        await asyncio.sleep(request.beat / 2)
    stop.set()


def unpack(files: list[File], folder: Path) -> None:
    """Write the files of a failed episode into its folder. Raises UsageError for a name that leads elsewhere."""
    for file in files:
        name = Path(file.name)
        if name.is_absolute() or ".." in name.parts or not name.parts:
            raise UsageError(f"a worker sent a file called {file.name!r}, which is outside of its folder")
        target = folder / name
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as out:
            out.write(zlib.decompress(file.content))
