"""The host's end of the guest agent: requests as JSON lines over the virtio-serial port's unix socket.

The connection may break and the VM may be restored under a request: a request's line, or its answer, can be lost
then. So every request has an id that no other process of ours ever used before, is sent again under the same id
after a reconnect or a silence, and the agent answers a repeated id from memory instead of doing the work twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vmbus.errors import EnvironmentProblem, UsageError, VmbusError, WaitTimeout
from vmbus.util.patience import patient

T = TypeVar("T")

LINE_LIMIT = 8 << 20
"""Longest line accepted from a guest, in bytes. A guest that sends more is cut off."""

RESEND_INTERVAL = 5.0
"""Seconds without an answer after which a request is sent again."""

TURN_SECONDS = 0.004
"""Seconds of a turn of the event loop that go into a guest's lines."""

_RECONNECT_INTERVAL = 0.2
LONGEST_BOUND = 3600.0
"""Seconds that an agent waits at the most, for whatever it is asked to wait for."""
_EXECUTE_GRACE = 20.0  # seconds that a guest may need to say that a program has ended


class AgentError(VmbusError):
    """The agent answered a request with an error; `code` is its name for it."""

    def __init__(self, command: str, code: str, message: str) -> None:
        super().__init__(f"the guest's agent failed {command!r}: {message}" + (f" ({code})" if code else ""), code=code)


def decode_line(line: bytes) -> dict[str, Any] | None:
    """What a guest says in a line; None for everything that is no JSON object. Raises nothing."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):  # a decoding error is a ValueError
        return None
    return message if isinstance(message, dict) else None


class _Turn:
    """Lets others run while lines are read that are there already: reading them never waits, whatever a guest sends."""

    def __init__(self) -> None:
        self._begun = time.monotonic()

    async def over(self) -> None:
        if time.monotonic() - self._begun > TURN_SECONDS:
            await asyncio.sleep(0)
            self._begun = time.monotonic()


class GuestWentBack(EnvironmentProblem):
    """The guest that was asked is not the one that is there now: it was taken back to an earlier moment, where what ran
    then runs again, or booted again."""


@dataclass(frozen=True)
class GuestOutput:
    code: int
    """Exit status; a signal's number, negative, if one has ended it."""
    output: str
    """What it printed, both streams in one; of much, the beginning."""
    bytes: int
    """How many bytes it printed."""


class _Executed(msgspec.Struct):
    code: int
    output: str
    bytes: int
    expired: bool


def convert(result: dict[str, Any], wanted: type[T], command: str) -> T:
    """A guest's result as what it should be. Raises `AgentError`: a guest's word is not to be relied on."""
    try:
        return msgspec.convert(result, wanted)
    except msgspec.ValidationError as error:
        raise AgentError(command, "malformed", f"its answer is not one: {error}") from error


def agents_bound(seconds: float) -> float:
    """A bound that the agent is to keep: longer on a slow machine, but no longer than it allows."""
    return max(seconds, min(patient(seconds), LONGEST_BOUND))


class AgentClient:
    """A client of one VM's agent. Several requests may be under way at once. Timeouts are seconds of a usual machine
    (see `vmbus.util.patience`).

    `on_event` is called with every line that is not an answer (``{"event": ...}``); it must not raise.
    """

    def __init__(
        self,
        path: Path,
        *,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        resend_interval: float = RESEND_INTERVAL,
    ) -> None:
        self._path = path
        self._on_event = on_event
        self._resend_interval = resend_interval
        # A random start: the guest's memory of answered ids survives a restore, our counter does not.
        self._next_id = secrets.randbits(40) << 12
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._lines: dict[int, bytes] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._connected = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.reconnects = 0

    async def connect(self, timeout: float = 10.0) -> None:
        """Connects, and stays connected (reconnecting if need be) until `close`."""
        timeout = patient(timeout)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"agent client of {self._path}")
        try:
            async with asyncio.timeout(timeout):
                await self._connected.wait()
        except TimeoutError:
            raise WaitTimeout(f"a connection to the agent's socket {self._path}", timeout) from None

    async def close(self) -> None:
        """Ends the connection; requests under way fail with `EnvironmentProblem`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None
        for future in self._answers.values():
            if not future.done():
                future.set_exception(EnvironmentProblem("the connection to the guest's agent was closed"))
        self._answers.clear()
        self._lines.clear()

    async def go_back(self, reason: str) -> None:
        """The guest has gone back in time, or boots again: requests under way fail with `GuestWentBack` (`reason`), and
        the connection is made anew, since the guest may have been in the middle of another line then. They are not sent
        again: who asked for a reboot would have another one, and a guest that went back does not know what it did.

        Ids are never used again, so an answer that the guest gives once more, to somebody who asked in a past that is
        undone, finds nobody waiting for it.
        """
        for number, future in list(self._answers.items()):
            if not future.done():
                future.set_exception(GuestWentBack(reason))
            self._lines.pop(number, None)
        if self._task is not None:
            former = self._task
            former.cancel()
            self._connected.clear()
            self._task = asyncio.create_task(self._run(former), name=f"agent client of {self._path}")
            await self.connect()

    async def call(self, command: str, /, *, timeout: float = 30.0, **arguments: Any) -> dict[str, Any]:
        """Sends one request and returns its result.

        Raises `AgentError` if the agent answers with an error, `WaitTimeout` if it does not answer in `timeout`
        seconds, and `UsageError` before `connect`.
        """
        return await self.request(command, arguments, timeout=timeout)

    async def request(self, command: str, arguments: dict[str, Any], *, timeout: float) -> dict[str, Any]:
        """As `call`, with the arguments as a dictionary (which may then have any keys)."""
        if self._task is None:
            raise UsageError("the agent client is not connected: call connect() first")
        timeout = patient(timeout)
        self._next_id += 1
        number = self._next_id
        line = json.dumps({"id": number, "command": command, "arguments": arguments}).encode() + b"\n"
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        self._lines[number] = line
        try:
            async with asyncio.timeout(timeout):
                await self._send(line)
                while True:
                    await asyncio.wait({future}, timeout=self._resend_interval)
                    if future.done():
                        break
                    await self._send(line)
        except TimeoutError:
            raise WaitTimeout(f"the guest's agent to answer {command!r}", timeout) from None
        finally:
            self._answers.pop(number, None)
            self._lines.pop(number, None)
        answer = future.result()
        if "error" in answer:
            error = answer["error"]
            if isinstance(error, dict):
                raise AgentError(command, str(error.get("kind", "")), str(error.get("message", "")))
            raise AgentError(command, "", str(error))
        result = answer.get("result")
        return result if isinstance(result, dict) else {"value": result}

    async def execute(self, argv: Sequence[str], *, timeout: float) -> GuestOutput:
        """Runs a program in the guest; one that has not ended after `timeout` seconds is killed.

        Raises `WaitTimeout` then, with the beginning of what it printed; `AgentError` if it cannot be started.
        """
        within = agents_bound(timeout)
        arguments = {"argv": list(argv), "timeout": within}
        answer = await self.request("execute", arguments, timeout=timeout + _EXECUTE_GRACE)
        result = convert(answer, _Executed, "execute")
        if result.expired:
            shown = " ".join(argv)
            raise WaitTimeout(f"{shown!r} in the guest to end; it printed {result.output[:2000]!r}", within)
        return GuestOutput(result.code, result.output, result.bytes)

    async def wait_ready(self, timeout: float) -> None:
        """Waits until the agent answers, e.g. after the guest's boot. Raises `WaitTimeout`."""
        within = patient(timeout)
        try:
            async with asyncio.timeout(within):
                while True:
                    with contextlib.suppress(GuestWentBack):  # it boots once more
                        await self.request("ping", {}, timeout=timeout)
                        return
        except (TimeoutError, WaitTimeout):
            raise WaitTimeout("the guest's agent to come up (see the console's log)", within) from None

    async def _send(self, line: bytes) -> None:
        writer = self._writer
        if writer is None:
            return  # the next connection sends everything that has no answer yet
        with contextlib.suppress(OSError):
            writer.write(line)
            await writer.drain()

    async def _run(self, former: asyncio.Task[None] | None = None) -> None:
        """`former`: the task that did this until now; its end is waited for."""
        if former is not None:
            await asyncio.wait({former})
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(str(self._path), limit=LINE_LIMIT)
            except OSError:
                await asyncio.sleep(_RECONNECT_INTERVAL)  # the socket is not there yet, or QEMU is gone
                continue
            self._writer = writer
            try:
                # An empty line first: it ends whatever half a line an earlier connection left behind.
                writer.write(b"\n" + b"".join(self._lines.values()))
                self._connected.set()
                await self._read(reader)
            except (OSError, ValueError, asyncio.LimitOverrunError):
                pass
            finally:
                self._writer = None
                self._connected.clear()
                writer.close()
            self.reconnects += 1
            await asyncio.sleep(_RECONNECT_INTERVAL)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        turn = _Turn()
        while line := await reader.readline():
            await turn.over()
            message = decode_line(line)
            if message is None:
                continue  # the rest of a line whose start went to an earlier connection, or a guest's nonsense
            number = message.get("id")
            if isinstance(number, int) and ("result" in message or "error" in message):
                future = self._answers.get(number)
                if future is not None and not future.done():
                    future.set_result(message)
            elif "event" in message and self._on_event is not None:
                self._on_event(message)
