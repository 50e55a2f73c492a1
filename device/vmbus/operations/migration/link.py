"""A channel that carries messages and knows whether the other side lives.

Both sides say Ping once a second. Whoever hears nothing for `SILENCE` seconds takes the other side for gone: a cut
link, a stopped process and a dead host all look like that, and TCP alone would wait a quarter of an hour.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, TypeVar, overload

from vmbus.errors import EnvironmentProblem, VmbusError, WaitTimeout
from vmbus.operations.migration.channel import Channel, LinkLost
from vmbus.operations.migration.messages import Failed, Message, Ping, decode, encode, short
from vmbus.util.patience import patient

PING_INTERVAL = 1.0
SILENCE = 10.0
"""Seconds without a sign of life after which the other side counts as gone; of a usual machine, unless somebody has
chosen them: see `vmbus.util.patience`."""

_MOST_WAITING = 16  # messages that nobody has asked for yet; then we stop reading

A = TypeVar("A", bound=Message)
B = TypeVar("B", bound=Message)


class PeerFailed(EnvironmentProblem):
    """The other side said that it gives the migration up."""


class Silence(LinkLost):
    """Nothing comes any more, and nothing says why: the link may be cut, and the other side live on."""


class Link:
    """Messages over a channel. Use as an async context manager; the channel is closed with it."""

    def __init__(self, channel: Channel, *, silence: float | None = None) -> None:
        self.channel = channel
        self.failure: asyncio.Future[VmbusError] = asyncio.get_running_loop().create_future()
        """Done when the link is of no use any more: `LinkLost`, or `PeerFailed`."""
        self._silence = patient(SILENCE) if silence is None else silence
        self._called_off = False
        self._waiting: deque[Message] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def name(self) -> str:
        """The other side, for messages to people."""
        return self.channel.name

    async def __aenter__(self) -> Link:
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._ping())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail(LinkLost(f"the connection to {self.name} was closed"))
        self.channel.close()

    def _fail(self, error: VmbusError) -> None:
        if not self.failure.done():
            self.failure.set_result(error)
        self._changed.set()

    async def _read(self) -> None:
        try:
            while True:
                await self._room.wait()
                try:
                    async with asyncio.timeout(self._silence):
                        data = await self.channel.receive()
                except TimeoutError:
                    raise Silence(
                        f"nothing came from {self.name} for {self._silence:g} s: it is gone, or the link is cut"
                    ) from None
                message = decode(data, self.name)
                if isinstance(message, Ping):
                    continue
                if isinstance(message, Failed):
                    raise PeerFailed(f"{self.name} gives up: {message.reason}")
                self._waiting.append(message)
                if len(self._waiting) >= _MOST_WAITING:
                    self._room.clear()
                self._changed.set()
        except VmbusError as error:
            self._fail(error)

    async def _ping(self) -> None:
        with contextlib.suppress(VmbusError):  # the reading side notices it too, and knows more
            while True:
                await self.send(Ping())
                await asyncio.sleep(PING_INTERVAL)

    async def send(self, message: Message) -> None:
        """Sends a message. Raises `LinkLost`, also if the other side takes nothing for the time of its `silence`,
        whatever it says itself meanwhile: then the link is of no use any more."""
        try:
            await self.channel.send(encode(message), self._silence)
        except LinkLost as error:
            self._fail(error)
            raise

    async def tell_failure(self, error: object, timeout: float = 2.0) -> None:
        """Tells the other side that we give up, if that is possible at all. Never raises."""
        with contextlib.suppress(VmbusError, TimeoutError):
            async with asyncio.timeout(timeout):
                await self.send(Failed(reason=short(error)))

    async def call_off(self, error: object, timeout: float) -> None:
        """Tells the other side that we give up, and waits at most `timeout` seconds for its word that it has ended
        everything, or for the end of the link. Never raises, and interrupts no `watch`."""
        self._called_off = True
        await self.tell_failure(error)
        await asyncio.wait({self.failure}, timeout=timeout)

    @overload
    async def expect(self, first: type[A], /, *, timeout: float, what: str) -> A: ...
    @overload
    async def expect(self, first: type[A], second: type[B], /, *, timeout: float, what: str) -> A | B: ...
    async def expect(
        self, first: type[Any], second: type[Any] | None = None, /, *, timeout: float, what: str
    ) -> Message:
        """The next message, which must be of one of these kinds.

        Raises `PeerFailed`, `LinkLost` (also for a message of another kind), and `WaitTimeout` naming `what`.
        """
        try:
            async with asyncio.timeout(timeout):
                while not self._waiting:
                    if self.failure.done():
                        raise self.failure.result()
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise WaitTimeout(f"{self.name}: {what}", timeout) from None
        message: Message = self._waiting.popleft()
        self._room.set()
        kinds = [first] if second is None else [first, second]
        if not any(isinstance(message, kind) for kind in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise LinkLost(f"{self.name} sent {type(message).__name__} where {expected} belongs")
        return message

    @contextlib.asynccontextmanager
    async def watch(self) -> AsyncIterator[None]:
        """While the block runs, a failure of the link interrupts it: the block is cancelled, and when it has cleaned up
        the link's error is raised in its place."""
        task = asyncio.current_task()
        assert task is not None
        cancelling = task.cancelling()
        interrupted = over = False

        def interrupt(_: object) -> None:
            nonlocal interrupted
            if self._called_off or over:  # it may have been on its way when the block ended
                return
            interrupted = True
            task.cancel("the link failed")

        if self.failure.done():
            raise self.failure.result()
        self.failure.add_done_callback(interrupt)
        try:
            yield
        except asyncio.CancelledError:
            if interrupted and task.uncancel() <= cancelling:
                raise self.failure.result() from None
            raise
        except BaseException:
            if interrupted:
                task.uncancel()
            raise
        finally:
            over = True
            self.failure.remove_done_callback(interrupt)
        if interrupted:  # the block was over before the interruption came
            task.uncancel()
