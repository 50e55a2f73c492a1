"""QEMU's stream: the settings under which it is sent, how it begins, and how long its last pass may take."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from qemu.qmp.events import EventListener

from vmbus.errors import EnvironmentProblem, UsageError, WaitTimeout
from vmbus.qemu.connections import QemuMonitor
from vmbus.qemu.qmp import MigrationFailed, QmpCommandFailed, capabilities

MAX_BANDWIDTH = 8 << 30
"""Bytes per second for QEMU's stream into a file: no limit in practice (its default suits a shared network)."""

DOWNTIME_LIMITS = (20, 40, 80, 160, 300)
"""Milliseconds that QEMU may plan for its last pass of a live copy: the first at first, the next ones if that does not
suffice. QEMU's own default is the last. It stops the vCPUs as soon as it expects to send the rest in that time, so on a
fast way it would stop them with a hundred megabytes to go, where a further pass of the running VM leaves nearly none.
Where the guest writes faster than that, only a higher limit lets the copy end."""
DOWNTIME_PATIENCE = 2.0
"""Seconds with one of these limits, counted from the end of QEMU's first pass."""

REFUSED_CAPABILITIES = {
    "background-snapshot": "it protects only QEMU's own view of guest memory, and the device server writes past it",
    "mapped-ram": "its file has another layout than the one that is loaded here, and a network stream cannot have it",
    "postcopy-ram": "the device server would read guest memory that has not arrived yet",
    "x-colo": "it runs the guest twice, and there is one device",
    "x-ignore-shared": "guest memory is shared with the device server, so it would be left out of the stream",
}
"""Capabilities of QEMU's migration that break what is promised here, and why. None of them is ever switched off in
silence: whoever switched it on wanted something."""

CONNECT_TIMEOUT = 10.0
"""Seconds for QEMU to reach another host: TCP itself tries for minutes."""

_CONNECTED = {"active", "device", "pre-switchover", "completed"}  # statuses of a migration whose stream has begun


@dataclass(frozen=True)
class StreamSettings:
    """How QEMU sends its stream. `multifd` is the number of connections for memory, 0 for none of their own.

    `timeout` bounds, in seconds, the copy of memory while the guest runs; None allows for a slow disk.
    `downtime_limit` is what QEMU may plan for its last pass, in milliseconds; None: `DOWNTIME_LIMITS`. `bandwidth` is
    the most that it sends, in bytes per second, while the guest runs; None: `MAX_BANDWIDTH`.
    """

    multifd: int = 0
    timeout: float | None = None
    downtime_limit: int | None = None
    bandwidth: int | None = None


async def refuse_unsafe_settings(monitor: QemuMonitor) -> None:
    """Raises `UsageError` if somebody has set QEMU's migration to something that would break what is promised."""
    found = await monitor.execute("query-migrate-capabilities")
    for name in sorted(one["capability"] for one in found if one["state"]):
        if name in REFUSED_CAPABILITIES:
            raise UsageError(
                f"QEMU's migration capability {name!r} is switched on, and does not go together with the VMBus device: "
                f"{REFUSED_CAPABILITIES[name]}; switch it off (migrate-set-capabilities)"
            )
    mode = (await monitor.execute("query-migrate-parameters")).get("mode", "normal")
    if mode != "normal":
        raise UsageError(
            f"QEMU's migration mode is {mode!r}, which keeps guest memory where it is instead of sending it, and knows "
            "nothing of the VMBus device; set it to 'normal' (migrate-set-parameters)"
        )


async def set_migration(monitor: QemuMonitor, stream: StreamSettings, *, live: bool) -> None:
    """Sets all that matters, each time: an earlier operation, or somebody else, may have left it otherwise."""
    await refuse_unsafe_settings(monitor)
    wanted = capabilities(events=True, pause_before_switchover=live, multifd=stream.multifd > 0)
    await monitor.execute("migrate-set-capabilities", wanted)
    parameters: dict[str, object] = {"max-bandwidth": stream.bandwidth or MAX_BANDWIDTH}
    if stream.multifd:
        parameters["multifd-channels"] = stream.multifd
    if live:
        parameters["downtime-limit"] = stream.downtime_limit or DOWNTIME_LIMITS[0]
    await monitor.execute("migrate-set-parameters", parameters)


async def begin_stream(monitor: QemuMonitor, channels: list[dict[str, object]], way: str | None) -> None:
    """Has QEMU send its stream. `way`: the other host, which has to be reached soon."""
    try:
        await monitor.execute("migrate", {"channels": channels})
    except QmpCommandFailed as error:
        if (await monitor.execute("query-status"))["status"] != "postmigrate":
            raise
        raise UsageError(
            "the VM was paused when it was saved before, and QEMU sends one that stands still only once: let it run "
            "first (QMP's cont), or note checkpoints of it, which it may have any number of"
        ) from error
    if way is None:
        return
    try:
        await monitor.wait_migration(_CONNECTED, CONNECT_TIMEOUT, f"QEMU to connect to {way}")
    except (WaitTimeout, MigrationFailed) as error:
        raise EnvironmentProblem(
            f"{error}; guest memory goes to {way}, a port of its own: it has to be let through (and forwarded, if the "
            "other one is), and scripts/run-vm --receive ADDRESS --stream-port PORT says which one it is"
        ) from error


@asynccontextmanager
async def growing_limit(monitor: QemuMonitor, stream: StreamSettings) -> AsyncIterator[None]:
    """While the block waits for the copy to catch up: see `DOWNTIME_LIMITS`."""
    caught_up = asyncio.Event()
    growing = asyncio.create_task(_grow_limit(monitor, stream, caught_up))
    try:
        yield
    except BaseException:
        caught_up.set()
        await asyncio.gather(growing, return_exceptions=True)  # what the block says is what matters
        raise
    caught_up.set()
    await growing


async def _grow_limit(monitor: QemuMonitor, stream: StreamSettings, caught_up: asyncio.Event) -> None:
    if stream.downtime_limit is not None:
        return
    limits = iter(DOWNTIME_LIMITS[1:])
    while not await _set_within(caught_up, DOWNTIME_PATIENCE):
        ram = (await monitor.execute("query-migrate")).get("ram", {})
        if int(ram.get("dirty-sync-count", 0)) < 2:  # all of memory is sent once, however long that takes
            continue
        limit = next(limits, None)
        if limit is None:
            return
        await monitor.execute("migrate-set-parameters", {"downtime-limit": limit})


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


def stop_time(stops: EventListener) -> float:
    """CLOCK_MONOTONIC of the STOP event among `stops`, or now if there is none (the VM was stopped already)."""
    now, wall = time.monotonic(), time.time()
    for event in stops.history:
        stamp = event.get("timestamp")
        if isinstance(stamp, dict):
            lag = wall - (float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6)
            return now - min(max(lag, 0.0), 60.0)  # QEMU stamps with the wall clock, which may be set meanwhile
    return now
