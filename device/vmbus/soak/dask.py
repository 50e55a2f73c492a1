"""Episodes on the machines of a Dask scheduler. Needs the package `distributed`; imported only when it is wanted.

Each episode is one task. Dask says where it runs, and runs it again elsewhere when a machine is lost; what happens in
it follows from its plan, so that is the same episode. What it says comes through a topic of the scheduler while it
runs, and all of it once more with the answer: nothing is missed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import secrets
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from vmbus.errors import EnvironmentProblem, VmbusError
from vmbus.soak import keep, remote
from vmbus.soak.engine import EngineLost
from vmbus.soak.job import WORKER, Job
from vmbus.soak.records import EpisodeRecord, EventRecord, Verdict
from vmbus.soak.remote import Answer, Request
from vmbus.soak.sink import Sink, decoded, tell

try:
    import distributed
    from distributed.comm.core import CommClosedError
except ImportError as error:  # pragma: no cover - the complete test run has it
    raise EnvironmentProblem(
        f"--scheduler needs the Python package 'distributed' (extra: dask), and it cannot be imported: {error}"
    ) from error

_dask: Any = distributed  # half of it has no types
CONNECT_TIMEOUT = 30.0
WORKERS_TIMEOUT = 300.0
"""Seconds for which a scheduler without any worker is waited for."""
ANSWER_MARGIN = 900.0
"""Seconds beyond an episode's own bound: until it begins, and until its files are here."""


def _entry() -> Callable[[bytes], bytes]:
    """The task. A nested function goes by value: a scheduler need not have the project, only workers must."""

    def soak_episode(request: bytes) -> bytes:
        from vmbus.soak.remote import run_request

        return run_request(request)

    return soak_episode


def _probe() -> Callable[[], str]:
    def sources() -> str:
        from vmbus.soak.remote import code_digest

        return code_digest()

    return sources


class DaskEngine:
    """An `Engine`. Use `connect`, and `close` it."""

    def __init__(self, client: Any, address: str, parallel: int | None, beat: float, patience: float) -> None:
        """Use `connect`."""
        self._client = client
        self._address = address
        self._parallel = parallel
        self._beat = beat
        self._patience = patience
        self._name = f"vmbus-soak-{secrets.token_hex(8)}"
        self._heartbeat: Any = _dask.Variable(self._name, client=client)
        self._listeners: dict[int, _Listener] = {}
        self._last_worker = time.monotonic()
        self._stopping = False
        self._beating: asyncio.Task[None] | None = None
        self.keep_bytes = keep.ONE_LIMIT

    @classmethod
    async def connect(
        cls, address: str, parallel: int | None = None, *, beat: float = remote.BEAT, patience: float = remote.PATIENCE
    ) -> DaskEngine:
        """Connect to a scheduler, such as tcp://host:8786. `parallel`: at most so many episodes at once.

        Raises `EnvironmentProblem` when it cannot be reached, or its workers cannot do this.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of versions: those that matter are looked at below
                client = _dask.Client(
                    address, asynchronous=True, timeout=CONNECT_TIMEOUT, set_as_default=False, name="vmbus-soak"
                )
                try:
                    await client
                except BaseException:
                    await _closed(client)
                    raise
        except (OSError, ValueError, RuntimeError) as error:
            raise EnvironmentProblem(f"cannot connect to the Dask scheduler {address}: {error}") from error
        engine = cls(client, address, parallel, beat, patience)
        try:
            await engine._check_workers()
            await engine._heartbeat.set(0)
        except BaseException:
            await engine.close()
            raise
        engine._beating = asyncio.create_task(engine._beats(), name="sign of life for the workers")
        client.subscribe_topic(engine._name, engine._heard)
        return engine

    async def _check_workers(self) -> None:
        """Each worker that is there now can do it; those that come later are asked with each episode."""
        try:
            answers = await asyncio.wait_for(self._client.run(_probe(), on_error="return"), CONNECT_TIMEOUT)
        except OSError as error:
            raise EnvironmentProblem(
                f"the workers of the Dask scheduler {self._address} do not answer: {error}"
            ) from error
        ours = remote.code_digest()
        for worker, answer in answers.items():
            if isinstance(answer, ImportError):
                raise EnvironmentProblem(_no_project(f"the Dask worker {worker}", answer))
            if isinstance(answer, BaseException):
                raise EnvironmentProblem(
                    f"the Dask worker {worker} cannot run a task of ours ({type(answer).__name__}: {answer}); "
                    f"{await self._versions()}"
                )
            if answer != ours:
                raise EnvironmentProblem(
                    f"the Dask worker {worker} runs other sources of the project ({answer}) than this campaign "
                    f"({ours}): update its checkout and start it again"
                )

    async def _versions(self) -> str:
        """Whether versions of packages differ, for people."""
        with contextlib.suppress(Exception), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                await self._client.get_versions(check=True)
            except ValueError as error:
                return str(error)
            if caught:
                return str(caught[-1].message)
        return "the versions of its packages are as here"

    @property
    def description(self) -> str:
        return f"the Dask scheduler {self._address}"

    async def slots(self) -> int:
        try:
            threads: dict[str, int] = await asyncio.wait_for(self._client.nthreads(), CONNECT_TIMEOUT)
        except (OSError, RuntimeError) as error:
            raise EngineLost(f"the Dask scheduler {self._address} does not answer: {error}") from error
        total = sum(threads.values())
        if total:
            self._last_worker = time.monotonic()
        elif time.monotonic() - self._last_worker > WORKERS_TIMEOUT:
            raise EngineLost(f"the Dask scheduler {self._address} has had no worker for {WORKERS_TIMEOUT:g} s")
        return total if self._parallel is None else min(total, self._parallel)

    async def run(self, job: Job, folder: Path, sink: Sink, stop: asyncio.Event) -> EpisodeRecord:
        request = Request(
            job=replace(job, command=() if job.command == WORKER else job.command),
            keep_bytes=self.keep_bytes,
            topic=self._name,
            heartbeat=self._name,
            code=remote.code_digest(),
            beat=self._beat,
            patience=self._patience,
        )
        listener = self._listeners[job.episode] = _Listener(sink)
        future = None
        began = time.monotonic()
        try:
            future = self._client.submit(
                _entry(),
                msgspec.msgpack.encode(request),
                key=f"vmbus-soak-{job.episode}-{secrets.token_hex(8)}",
                pure=False,
            )
            data = await self._result(future, job, stop)
        except (CommClosedError, concurrent.futures.CancelledError, _Lost) as error:
            raise EngineLost(f"the Dask scheduler {self._address} has lost episode {job.episode}: {error}") from error
        except ImportError as error:
            raise EngineLost(_no_project("a Dask worker", error)) from error
        except EnvironmentProblem as error:
            raise EngineLost(f"a Dask worker cannot run an episode: {error}") from error
        except distributed.KilledWorker as error:
            return _made_up(job, began, f"the Dask workers that ran it died, one after the other: {error}")
        except (VmbusError, OSError, RuntimeError) as error:
            return _made_up(job, began, f"the Dask worker failed: {type(error).__name__}: {error}")
        finally:
            del self._listeners[job.episode]
            if future is not None:
                future.release()
        if data is None:
            return _made_up(job, began, "ended early on request", verdict="interrupted")
        answer = msgspec.msgpack.decode(data, type=Answer)
        for number, line in enumerate(answer.said):
            listener.take(answer.attempt, number, line)
        remote.unpack(answer.files, folder)
        if answer.dropped:
            text = f"not kept, to save room: {'; '.join(answer.dropped)}"
            sink.event(EventRecord(episode=job.episode, at=answer.record.seconds, text=text))
        return answer.record

    async def _result(self, future: Any, job: Job, stop: asyncio.Event) -> bytes | None:
        """Wait for the answer; None when `stop` was set and none has come."""
        result = asyncio.ensure_future(_awaited(future))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait(
                {result, stopping}, timeout=job.bounds.longest + ANSWER_MARGIN, return_when=asyncio.FIRST_COMPLETED
            )
            if not result.done() and stop.is_set():
                await self._stop()
                await asyncio.wait({result}, timeout=job.bounds.grace + 4 * self._beat + 10)
                if not result.done():
                    await future.cancel()
                    return None
            if not result.done():
                await future.cancel()
                raise _Lost(f"no answer in {job.bounds.longest + ANSWER_MARGIN:g} s")
            return result.result()
        finally:
            stopping.cancel()
            result.cancel()

    async def _stop(self) -> None:
        """Tell all workers to end their episodes early."""
        self._stopping = True
        with contextlib.suppress(OSError):
            await asyncio.wait_for(self._heartbeat.set(remote.STOP), CONNECT_TIMEOUT)

    async def _beats(self) -> None:
        count = 0
        while not self._stopping:
            count += 1
            # A scheduler that is away for a moment is noticed by `slots` and by the tasks.
            with contextlib.suppress(OSError, RuntimeError):
                await self._heartbeat.set(count)
            await asyncio.sleep(self._beat)

    def _heard(self, event: tuple[float, Any]) -> None:
        """Something that an episode says, live. Whatever is wrong with it: the answer has it again."""
        with contextlib.suppress(ValueError, TypeError):
            attempt, episode, number, line = event[1]
            listener = self._listeners.get(episode)
            if listener is not None:
                listener.take(attempt, number, line.encode())

    async def close(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
        await _closed(self._client)


class _Listener:
    """Takes what an episode says in its order, each thing once, from whichever way it comes first."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._attempt = ""
        self.heard = 0

    def take(self, attempt: str, number: int, line: bytes) -> None:
        if attempt != self._attempt:
            self._attempt = attempt  # Dask runs it again, from its beginning
            self.heard = 0
        if number >= 0:
            if number != self.heard:
                return  # heard already, or something before it is on its way: the answer has it
            self.heard += 1
        tell(self._sink, *decoded(line))


class _Lost(Exception):
    """No answer will come."""


async def _closed(client: Any) -> None:
    with contextlib.suppress(Exception):  # the scheduler may be gone; nothing is lost with it
        await asyncio.wait_for(client.close(), 10)


async def _awaited(future: Any) -> bytes:
    result: bytes = await future
    return result


def _no_project(worker: str, error: ImportError) -> str:
    return (
        f"{worker} cannot import the project ({error}): start it in a checkout, "
        "with scripts/_run -m distributed.cli.dask_worker ADDRESS"
    )


def _made_up(job: Job, began: float, failure: str, verdict: Verdict = "failed") -> EpisodeRecord:
    seconds = round(time.monotonic() - began, 3)
    return EpisodeRecord(
        episode=job.episode, seed=job.seed, verdict=verdict, started="", seconds=seconds, failure=failure
    )
