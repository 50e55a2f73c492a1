"""Child processes that never outlive their owner.

A child runs in a session of its own (a terminal's Ctrl-C reaches us, not it), dies with us (`vmbus.util.launcher`),
and logs to a file in the run directory, which stays bounded (`logs`). Whoever waits for something that a child does
waits through `Child.guard`: if the child dies first, the wait ends at once with an error that shows the end of its
log.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Awaitable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from vmbus.errors import EnvironmentProblem, VmbusError, WaitTimeout, os_error
from vmbus.util.launcher import tied
from vmbus.util.patience import patient
from vmbus.vm.logs import LOOK_EVERY, shorten

T = TypeVar("T")


class ProcessDied(EnvironmentProblem):
    """A program that we started ended when it should have run on."""


# What every QEMU with this device says when the guest's IOMMU switches address spaces: it unmaps what was not mapped.
_HARMLESS = re.compile(r"vfio_container_dma_unmap\(.*No such file|vfio_user_(process|wait_reqs)\b.*No such file")


def log_tail(path: Path, lines: int = 12) -> str:
    """The last telling lines of a log file, indented for an error message; empty if there are none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 32768))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    telling = [line for line in text.splitlines() if line.strip() and not _HARMLESS.search(line)]
    return "\n".join(f"    {line}" for line in telling[-lines:])


class Child:
    """One running child process.

    Use `spawn` to make one. `exited` is a future of the exit status (negative: the signal that killed it). A death with
    status 0 has its reason elsewhere: then the error quotes `witness`, if there is one: what it is, and its file. That
    one is kept bounded like `log`; whoever writes it has to append.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.log = log
        self.witness: tuple[str, Path] | None = None
        self.process = process
        self.exited: asyncio.Task[int] = asyncio.create_task(process.wait(), name=f"exit of {name}")
        self._bounding: asyncio.Task[None] = asyncio.create_task(self._keep_logs_bounded(), name=f"logs of {name}")

    @classmethod
    async def spawn(
        cls,
        name: str,
        argv: Sequence[str],
        log: Path,
        *,
        environment: dict[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        capture_stdout: bool = False,
    ) -> Child:
        """Starts `argv` with its output in `log`.

        `environment` is added to ours. With `capture_stdout`, standard output is readable as
        ``child.process.stdout`` instead. Raises `EnvironmentProblem` if the program cannot be started at all.
        """
        with os_error(f"cannot write {log}"):
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            process = await asyncio.create_subprocess_exec(
                *tied(argv),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if capture_stdout else descriptor,
                stderr=descriptor,
                env={**os.environ, **(environment or {})},
                pass_fds=tuple(pass_fds),
                start_new_session=True,
                umask=0o077,  # logs, sockets and RAM streams are their owner's alone
            )
        except OSError as error:
            raise EnvironmentProblem(f"cannot start {name} ({argv[0]}): {error.strerror}") from error
        finally:
            os.close(descriptor)
        return cls(name, process, log)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return not self.exited.done()

    def death(self, doing: str = "") -> ProcessDied:
        """The error that says how this (ended) child ended, with the end of its log."""
        status = self.exited.result()
        if status < 0:
            try:
                how = f"was killed by {signal.Signals(-status).name}"
            except ValueError:
                how = f"was killed by signal {-status}"
        else:
            how = f"ended with status {status}"
        during = f" while we waited for {doing}" if doing else ""
        tail = log_tail(self.log)
        text = f"{self.name} {how}{during}" + (f"; its last words:\n{tail}" if tail else "; its log says nothing")
        if status == 0 and self.witness is not None:
            what, file = self.witness
            words = log_tail(file)
            text += f"\n{what}:\n{words}" if words else f"\n{what} is empty"
        return ProcessDied(text)

    async def guard(self, work: Awaitable[T], what: str, timeout: float) -> T:
        """Waits for `work`, at most `timeout` seconds and only while this child lives. See `guard_all`."""
        return await guard_all([self], work, what, timeout)

    async def stop(self, grace: float = 0.0) -> None:
        """Ends the child: with SIGTERM and `grace` seconds first if `grace` is not 0, then with SIGKILL."""
        if self.running and grace > 0:
            self._signal(signal.SIGTERM)
            await asyncio.wait({self.exited}, timeout=grace)
        if self.running:
            self._signal(signal.SIGKILL)
        # After SIGKILL only the kernel can be slow; still no wait of ours is unbounded.
        done, _ = await asyncio.wait({self.exited}, timeout=30)
        if not done:
            raise WaitTimeout(f"{self.name} (process {self.pid}) to end after SIGKILL", 30)
        await asyncio.wait({self._bounding}, timeout=1)  # it is ending; no bare await, since it may be cancelled

    async def _keep_logs_bounded(self) -> None:
        """Looks at the sizes of this child's files while it runs, and once more when it has ended."""
        running = True
        while running:
            running = not (await asyncio.wait({self.exited}, timeout=LOOK_EVERY))[0]
            shorten(self.log)
            if self.witness is not None:
                shorten(self.witness[1])

    def _signal(self, number: signal.Signals) -> None:
        # The child leads a process group of its own, so its own children get the signal too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


async def guard_all(children: Iterable[Child], work: Awaitable[T], what: str, timeout: float) -> T:
    """Waits for `work`, at most `timeout` seconds (of a usual machine: see `util.patience`), and only while every one
    of `children` lives.

    Raises `ProcessDied` as soon as a child ends (unless the work is done by then), `WaitTimeout` naming `what` when
    time is up, and whatever the work raises. The work is cancelled in every case but its own end.
    """
    timeout = patient(timeout)
    task = asyncio.ensure_future(work)
    watched = list(children)
    ends = {child.exited for child in watched}
    try:
        await asyncio.wait({task, *ends}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        problem = task.exception() if task.done() and not task.cancelled() else None
        if isinstance(problem, (VmbusError, OSError, EOFError)) and ends:
            # Often the first sign of a dying process is its broken connection, or what the other one says of that: let
            # the death be the error.
            await asyncio.wait(ends, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
        elif task.done():
            return task.result()
        for child in watched:
            if not child.running:
                raise child.death(what) from problem
        if task.done():
            return task.result()
        raise WaitTimeout(what, timeout)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=5)
