"""A thin typed layer over qemu.qmp: bounded commands, our errors, migration waits, the human monitor's commands."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import ExecuteError, QMPClient, QMPError
from qemu.qmp.events import EventListener
from qemu.qmp.protocol import Runstate

from vmbus.errors import EnvironmentProblem, WaitTimeout, code_in
from vmbus.qemu.connections import QemuMonitor
from vmbus.util.patience import Guard, patient
from vmbus.vm.process import guard_all

COMMAND_TIMEOUT = 20.0
"""Seconds that QEMU may take to answer a command, unless the caller says otherwise."""

_POLL_INTERVAL = 0.25  # seconds between looks at the migration's status when no event comes

MIGRATION_ENDS = frozenset({"completed", "failed", "cancelled"})
"""Statuses that a migration does not leave again."""


class QmpCommandFailed(EnvironmentProblem):
    """QEMU refused a command; the message is QEMU's."""


class MigrationFailed(EnvironmentProblem):
    """A migration ended otherwise than the caller needed."""


async def give_migration_up(monitor: QemuMonitor) -> None:
    """Cancels a migration that is under way, and waits for its end."""
    await monitor.execute("migrate_cancel")
    with contextlib.suppress(MigrationFailed):  # "failed" is an end as good as "cancelled"
        await monitor.wait_migration({"cancelled", "completed", "none"}, patient(60.0), "QEMU to give the migration up")


class Monitor:
    """A connection to one QEMU's monitor.

    Timeouts are seconds of a usual machine (see `vmbus.util.patience`).

    Every method raises `WaitTimeout` when QEMU does not answer in time, `QmpCommandFailed` when it refuses, and
    `EnvironmentProblem` when the connection is lost.
    """

    def __init__(self, name: str, guard: Guard | None = None) -> None:
        """`guard`: what waits for each answer, for a QEMU that may die meanwhile."""
        self.name = name
        self._guard = guard or functools.partial(guard_all, ())
        self._client = QMPClient(name)
        # The library complains aloud about every lost connection; ours are reported by whoever waits.
        self._client.logger = self._client.logger.getChild("quiet")
        self._client.logger.setLevel("CRITICAL")

    async def connect(self, address: Path | socket.socket, timeout: float = COMMAND_TIMEOUT) -> None:
        """Connects to a monitor socket (a path, or a socket that is connected already)."""
        timeout = patient(timeout)
        target = str(address) if isinstance(address, Path) else address
        try:
            async with asyncio.timeout(timeout):
                await self._client.connect(target)
        except TimeoutError:
            raise WaitTimeout(f"the monitor of {self.name} to greet", timeout) from None
        except QMPError as error:
            raise EnvironmentProblem(f"cannot connect to the monitor of {self.name}: {error}") from error

    async def lost(self) -> None:
        """Waits (without a bound) until the connection has ended, whoever ended it."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    async def close(self) -> None:
        """Ends the connection. Never raises for a connection that is broken already."""
        with contextlib.suppress(QMPError, EOFError, OSError, TimeoutError):
            async with asyncio.timeout(5):
                await self._client.disconnect()

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = COMMAND_TIMEOUT
    ) -> Any:
        """Executes one command and returns its value (decoded JSON; see QEMU's reference for its shape)."""
        what = f"{self.name} to answer the monitor command {command!r}"
        return await self._guard(self._execute(command, arguments), what, timeout)

    async def _execute(self, command: str, arguments: Mapping[str, object] | None) -> Any:
        try:
            return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise QmpCommandFailed(f"{self.name} refused {command!r}: {error}") from error
        except (QMPError, EOFError, OSError) as error:
            raise EnvironmentProblem(f"lost the monitor of {self.name} during {command!r}: {error}") from error

    async def human(self, line: str, *, timeout: float = COMMAND_TIMEOUT) -> str:
        """Executes a line of the human monitor and returns what it prints, without surrounding blanks."""
        text = await self.execute("human-monitor-command", {"command-line": line}, timeout=timeout)
        return str(text).strip()

    async def status(self) -> str:
        """The run state, e.g. ``running``, ``paused``, ``inmigrate``, ``postmigrate``."""
        return str((await self.execute("query-status"))["status"])

    async def running(self) -> bool:
        """Whether the vCPUs run."""
        return bool((await self.execute("query-status"))["running"])

    async def cont(self) -> None:
        """Lets the vCPUs run; does nothing if they do.

        After a migration QEMU needs a moment more until it may run again, and says nothing when that is over: so this
        asks until it is.
        """
        timeout = patient(COMMAND_TIMEOUT)
        deadline = time.monotonic() + timeout
        while (state := await self.status()) == "finish-migrate":
            if time.monotonic() > deadline:
                raise WaitTimeout(f"{self.name} to finish its migration", timeout)
            await asyncio.sleep(0.005)
        if state != "running":
            await self.execute("cont")

    def listen(self, *events: str) -> contextlib.AbstractContextManager[EventListener]:
        """A context in which the named events are collected."""
        return self._client.listener(events)

    def listening(self, *listeners: EventListener) -> contextlib.AbstractContextManager[None]:
        """A context in which these listeners are told of events."""
        return self._client.listen(*listeners)

    async def migration_status(self) -> tuple[str, str]:
        """The migration's status and, if it failed, QEMU's reason (else an empty text)."""
        found = await self.execute("query-migrate")
        return str(found.get("status", "none")), str(found.get("error-desc", ""))

    async def wait_migration(self, wanted: Collection[str], timeout: float, what: str) -> str:
        """Waits until the migration has one of the `wanted` statuses and returns it.

        `timeout` is what a user may have chosen, and is taken as it is.

        Raises `MigrationFailed` with QEMU's reason if it ends in any other way. The status is asked for, and MIGRATION
        events (which the caller has switched on, or not) only shorten the wait until the next question.
        """
        work = self._wait_migration(wanted, time.monotonic() + timeout, timeout, what)
        return str(await self._guard(work, what, timeout + 1))

    async def _wait_migration(self, wanted: Collection[str], deadline: float, timeout: float, what: str) -> str:
        with self.listen("MIGRATION") as events:
            while True:
                status, reason = await self.migration_status()
                if status in wanted:
                    return status
                if status in MIGRATION_ENDS:
                    raise MigrationFailed(
                        f"{what}: the migration of {self.name} {status}" + (f": {reason}" if reason else ""),
                        code=code_in(reason),
                    )
                left = deadline - time.monotonic()
                if left <= 0:
                    raise WaitTimeout(f"{what} (the migration of {self.name} is {status!r})", timeout)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left, _POLL_INTERVAL)):
                        await events.get()
                events.clear()


def capabilities(**states: bool) -> dict[str, object]:
    """The arguments of migrate-set-capabilities; names with an underscore for a hyphen."""
    return {"capabilities": [{"capability": name.replace("_", "-"), "state": state} for name, state in states.items()]}


def file_channel(path: Path) -> list[dict[str, object]]:
    """The `channels` argument of migrate and migrate-incoming for a plain file.

    The older ``file:PATH`` form would read a comma in the path as the start of an option.
    """
    return [{"channel-type": "main", "addr": {"transport": "file", "filename": str(path), "offset": 0}}]
