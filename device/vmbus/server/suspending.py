"""Commands around a save: `pause`, `save`, `flush`, and `resume`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vmbus.device import saved
from vmbus.errors import EnvironmentProblem, PeerError, UsageError, WaitTimeout
from vmbus.kmcl.server import ServerChannel
from vmbus.memory.guest import DirtyLogBroken
from vmbus.server.commands import Answer, Arguments, Command, Seconds
from vmbus.server.files import copy_files, wanted_files
from vmbus.server.interrupt import bounded
from vmbus.server.phase import Phase, Step, require
from vmbus.transport.context import AddressNotMapped, ClientBusy, ClientGone, ClientRefused
from vmbus.util.complaints import bounded_log
from vmbus.util.pieces import in_turns

if TYPE_CHECKING:
    from vmbus.server.app import DeviceServer

log = bounded_log(__name__)

_FLUSH_TRIES = 100
_TAKE_AGAIN = 0.05  # seconds between tries to take outside resources that somebody else still has
_CALLED_OFF = "the pause was called off: resume came while it waited"
_PAUSED = (Phase.PAUSED,)


class PauseArguments(Arguments, frozen=True):
    seconds: Seconds = 10.0


class SaveArguments(Arguments, frozen=True):
    """`path`: of the new file. `files`: the directory for copies of the providers' files. `seconds`: what the
    providers' callbacks may take. `durable`: the file is on the disk when this answers, as it has to be unless it only
    lives for a while, or the caller sees to that. `moving`: for a live migration, which takes no files along."""

    path: str
    files: str | None = None
    seconds: Seconds = 30.0
    durable: bool = True
    moving: bool = False


class ResumeArguments(Arguments, frozen=True):
    """For how long it is tried if a provider cannot take back what it gave up at the pause."""

    seconds: Seconds = 0.0


def fail(future: asyncio.Future[Any], error: BaseException) -> None:
    """Unless it is done."""
    if not future.done():
        future.set_exception(error)


async def suspend(
    server: DeviceServer,
    channels: Sequence[ServerChannel],
    seconds: float,
    quiet: asyncio.Future[None] | None = None,
) -> None:
    """Hold channels and wait until their owner has completed what it has; they go on if that fails.

    `quiet`: done when they are at rest; whoever sets an exception there ends the wait. Raises WaitTimeout.
    """
    quiet = quiet or server.loop.create_future()
    waiting = set(channels)

    def one_quiet(channel: ServerChannel) -> None:
        waiting.discard(channel)
        if not waiting and not quiet.done():
            quiet.set_result(None)

    for channel in channels:
        channel.quiesce()
        channel.when_quiet(functools.partial(one_quiet, channel))
    if not waiting:
        return
    try:
        with server.ends_with_faults(functools.partial(fail, quiet)):
            await asyncio.wait_for(quiet, seconds)
    except TimeoutError:
        missing = {channel.name: channel.outstanding[:8] for channel in channels if channel.outstanding}
        raise WaitTimeout(f"the owners of channels to complete incoming packets {missing}", seconds) from None
    finally:
        for channel in channels:
            if channel.quiescing and waiting:
                channel.unquiesce()


async def _pause(server: DeviceServer, asked: PauseArguments) -> Answer:
    """Take no new packets, and wait until providers have completed those that they hold."""
    seconds = asked.seconds
    async with server.alone("pause", (Phase.RUNNING,), seconds):
        started = time.monotonic()
        # What the guest wrote to registers before it was stopped must be seen before the state is taken.
        server.drain()
        while server.device.backlog:  # noqa: ASYNC110 - each turn does a part of it
            await asyncio.sleep(0)
        channels = server.device.channels
        server.held_at_pause = sum(len(channel.outstanding) for channel in channels)
        server.device.freeze()
        server.step(Step.PAUSE)
        server.pausing = server.loop.create_future()
        try:
            await suspend(server, channels, seconds, server.pausing)
            await server.services.idle(started + seconds - time.monotonic())
            if server.phase is not Phase.PAUSING:
                raise UsageError(_CALLED_OFF)
            server.deactivate()
            files = sorted(wanted_files(server.providers))
            server.step(Step.REST)
            server.note("paused")
        finally:
            if server.phase is Phase.PAUSING:
                server.run_on()
        # Whoever saves now has to allow for the time that the copies of these take.
        return {"incoming_held": server.held_at_pause, "files": files, "seconds": time.monotonic() - started}


async def _resume(server: DeviceServer, asked: ResumeArguments) -> Answer:
    """Go on as if there had been no pause; a pause that still waits for providers is called off.

    If a provider cannot take back what it gave up, the server stays paused, and `resume` may be repeated.
    """
    if server.phase is not Phase.PAUSING:
        async with server.alone("resume", _PAUSED):
            await _take_back(server, asked.seconds)
            server.run_on()
    else:
        if server.pausing is not None:
            fail(server.pausing, UsageError(_CALLED_OFF))
        await _take_back(server, asked.seconds)
        server.run_on()
    return {}


async def _take_back(server: DeviceServer, seconds: float) -> None:
    """Activate the providers; for `seconds` again and again: whoever has what they want may just be ending."""
    phase, deadline = server.phase, time.monotonic() + seconds
    while True:
        try:
            return server.activate()
        except EnvironmentProblem as error:
            if time.monotonic() >= deadline:
                raise
            log.info("%s; trying again", error)
        await asyncio.sleep(_TAKE_AGAIN)
        require(server.phase, (phase,), "resume")


async def _save(server: DeviceServer, asked: SaveArguments) -> Answer:
    """Write the state into a new file: if the client migrates the device, the one that it reads."""
    given = server.driven.given if server.phase is Phase.DRIVEN else None
    started = time.monotonic()
    sizes: dict[str, int] = {}
    if given is not None:
        state, data = saved.decode(given), given
    else:
        require(server.phase, _PAUSED, "save")
        sizes = await _files(server, asked)
        async with server.alone("save", _PAUSED, asked.seconds):
            state, data = await _state(server, asked.seconds)
    _write(asked.path, data, durable=asked.durable)
    server.note("saved")
    counts = saved.count_packets(state)
    return {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "files": sizes,
        "packets": {"queued": counts.queued, "sent": counts.sent},
        "completions_queued": counts.completions,
        "incoming_held": server.held_at_pause if given is None else server.driven.held,
        "config": server.config.snapshot().hex(),
        "description": msgspec.to_builtins(server.description),
        "seconds": time.monotonic() - started,
    }


async def _files(server: DeviceServer, asked: SaveArguments) -> dict[str, int]:
    """Copy the providers' files; returns their sizes in bytes."""
    wanted = wanted_files(server.providers, moving=asked.moving)
    if not wanted:
        return {}
    if asked.files is None:
        raise UsageError(
            f"the files {sorted(map(str, wanted.values()))} of providers belong to the device's state, and "
            "nothing takes them along here"
        )
    directory = Path(asked.files)
    sizes = await asyncio.to_thread(copy_files, wanted, directory)
    try:
        require(server.phase, _PAUSED, "save")
    except UsageError:  # resumed meanwhile: what was copied may be of no moment at all
        for name in sizes:
            (directory / name).unlink(missing_ok=True)
        raise
    return sizes


async def _state(server: DeviceServer, seconds: float) -> tuple[saved.DeviceState, bytes]:
    deadline = time.monotonic() + seconds

    def around() -> AbstractContextManager[None]:
        return bounded(seconds, "the providers to give their state", deadline - time.monotonic())

    name, config = server.description.name, server.config.snapshot()
    with server.client_waits():
        state = await in_turns(saved.saving(name, config, server.device, server.providers), around)
        await asyncio.sleep(0)
        data = saved.encode(state)
        await asyncio.sleep(0)
        # What cannot be restored was not saved, and is said now, while the guest is still there.
        return await in_turns(saved.verifying(data, server.providers), around), data


def _write(path: str, data: bytes, *, durable: bool) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"cannot write device state to {path!r}: {error}") from error
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path)  # noqa: PTH108 - one call on a local file
        raise EnvironmentProblem(f"cannot write device state to {path!r}: {error}") from error


async def _flush(server: DeviceServer, _: Arguments) -> Answer:
    """Write every page that we touched since log-start once more, through the client, so that it sees it."""
    async with server.alone("flush", _PAUSED):
        context = server.context
        assert context is not None
        started = time.monotonic()
        pages = size = 0
        runs = server.device.memory.dirty_runs()
        if runs and not server.config.bus_master:
            # Not for ever, if its driver was killed just now; so the pass is repeated, as when memory went away.
            raise DirtyLogBroken(
                "the guest has switched off the device's bus mastering, and QEMU writes no memory for it like that: "
                f"{len(runs)} runs of pages that the device has written cannot be copied; cancel this pass and start "
                "again, or save the VM stopped, which needs no such copies"
            )
        for iova, length in runs:
            try:
                data = server.device.memory.read(iova, length)
                for _try in range(_FLUSH_TRIES):
                    try:
                        context.write_through_client(iova, data)
                        break
                    except ClientBusy:
                        server.run_transport()
                else:
                    raise EnvironmentProblem("the client never stopped sending requests; are the vCPUs stopped?")
            except (PeerError, AddressNotMapped, ClientGone, ClientRefused) as error:
                raise DirtyLogBroken(f"{error}; cancel this pass and start again") from error
            pages += length // 4096
            size += length
        return {"pages": pages, "bytes": size, "seconds": time.monotonic() - started}


COMMANDS = {
    "pause": Command(_pause, PauseArguments, (Phase.RUNNING,)),
    "resume": Command(_resume, ResumeArguments, (Phase.PAUSED, Phase.PAUSING)),
    "save": Command(_save, SaveArguments),
    "flush": Command(_flush, phases=_PAUSED),
}
