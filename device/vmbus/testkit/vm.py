"""A provider in a VM, tested as in the kit: `VmDevice`.

The guest's ends are in the guest, where the test driver `remote` does what the test says, a message each through the
agent. What happens to packets meanwhile is fetched whenever the test waits.
"""

from __future__ import annotations

import itertools
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any
from uuid import UUID

import msgspec

from vmbus.device.description import DeviceDescription
from vmbus.errors import PeerError, UsageError, WaitTimeout
from vmbus.testkit.blocking import BlockingVm, Job
from vmbus.testkit.device import RING_PAGES, DeviceUnderTest, InFlight, sole_provider
from vmbus.testkit.guest import TIMEOUT, Extents, Guest, Taken
from vmbus.util.patience import patient
from vmbus.wire.packet import TransferPages

PIECE = 24 << 10
"""Bytes of memory in one message."""
LOOK = 0.1
"""Seconds for which the guest waits for something to tell, before the test looks at its condition again."""


class _News(msgspec.Struct):
    completed: int = 0
    status: int = 0
    came: int = 0
    channel: int = 0
    transaction: int = 0
    wanted: bool = False
    data: str = ""
    pages: tuple[int, list[tuple[int, int]]] | None = None


class _Told(msgspec.Struct):
    news: list[_News]
    more: bool
    states: list[str]
    failures: list[str]


class _RemoteTaken:
    """A packet that came in the guest: implements `Taken`."""

    def __init__(self, device: VmDevice, news: _News) -> None:
        self._device = device
        self._number = news.came
        self.transaction = news.transaction
        self.wanted = news.wanted
        self.held = True

    def complete(self, reply: bytes = b"") -> None:
        self._device.ask("complete", packet=self._number, reply=b64encode(reply).decode())
        self.held = False


class _RemoteEnd:
    """A channel in the guest: implements `End`."""

    def __init__(self, device: VmDevice, number: int, name: str) -> None:
        self._device = device
        self.number = number
        self.name = name
        self.state = "disabled"
        self.taken: dict[int, _RemoteTaken] = {}
        self._take: Callable[[Taken, bytes, TransferPages | None], None] | None = None

    @property
    def is_open(self) -> bool:
        self._device.look()
        return self.state in ("opened", "active")

    def open(self) -> None:
        self._device.ask("open", channel=self.number, timeout=patient(TIMEOUT))

    def close(self) -> None:
        self._device.ask("close", channel=self.number)
        self._device.look()

    def away(self, away: bool) -> None:
        self._device.ask("away", channel=self.number, away=away)

    def listen(self, take: Callable[[Taken, bytes, TransferPages | None], None]) -> None:
        self._take = take

    def came(self, news: _News) -> None:
        taken = self.taken[news.transaction] = _RemoteTaken(self._device, news)
        assert self._take is not None
        self._take(taken, b64decode(news.data), None if news.pages is None else TransferPages(*news.pages))

    def send(
        self, payload: bytes, external: Extents | None, wanted: bool, completed: Callable[[int, bytes], None]
    ) -> int:
        tag = self._device.expect(completed)
        return int(
            self._device.ask(
                "send",
                channel=self.number,
                tag=tag,
                payload=b64encode(payload).decode(),
                external=None if external is None else [list(one) for one in external],
                wanted=wanted,
            )
        )

    def holds(self, transaction: int) -> bool:
        taken = self.taken.get(transaction)
        return self.is_open and taken is not None and taken.held and taken.wanted


class _RemotePages:
    """Memory in the guest: implements `Pages`."""

    def __init__(self, device: VmDevice, iova: int) -> None:
        self._device = device
        self.iova = iova

    def read(self, offset: int, length: int) -> bytes:
        pieces = [(at, min(PIECE, offset + length - at)) for at in range(offset, offset + length, PIECE)]
        return b"".join(
            b64decode(self._device.ask("read", iova=self.iova, offset=at, length=size)) for at, size in pieces
        )

    def write(self, offset: int, data: bytes) -> None:
        for at in range(0, len(data), PIECE):
            piece = b64encode(data[at : at + PIECE]).decode()
            self._device.ask("write", iova=self.iova, offset=offset + at, data=piece)

    def take_away(self) -> None:
        raise UsageError("only in the kit can some of a guest's memory be taken away alone")


class VmDevice(DeviceUnderTest):
    """See the module's text. `vm` is what is behind it: the guest runs on in it, whatever a test does."""

    def __init__(self, vm: BlockingVm) -> None:
        self.vm = vm
        self.saves = 0
        self._job: Job = vm.start("remote")
        self._ends: list[_RemoteEnd] = []
        self._expected: dict[int, Callable[[int, bytes], None]] = {}
        self._tags = itertools.count(1)
        self._failures: list[str] = []

    def __exit__(self, *_: object) -> None:
        self.vm.kill()

    # ---- the driver in the guest -----------------------------------------------------------------------------------

    def ask(self, do: str, /, **arguments: Any) -> Any:
        """Have the driver do something, and return what came of it. Raises VmbusError with what went wrong there."""
        answer = self.vm.agent("ask", job=self._job.number, message={"do": do, **arguments}, timeout=60.0)
        if error := answer.get("error"):
            raise PeerError(f"in the guest: {error.get('type')}: {error.get('message')}")
        return answer.get("value")

    def expect(self, completed: Callable[[int, bytes], None]) -> int:
        """A tag for a packet that will be completed."""
        tag = next(self._tags)
        self._expected[tag] = completed
        return tag

    def look(self, wait: float = 0.0) -> None:
        """Take what has happened in the guest; wait up to so many seconds for something."""
        while True:
            told = msgspec.convert(self.ask("news", wait=wait), _Told)
            for end, state in zip(self._ends, told.states, strict=True):
                end.state = state.lower()
            self._failures = told.failures
            for news in told.news:
                if news.came:
                    self._ends[news.channel].came(news)
                else:
                    self._expected.pop(news.completed)(news.status, b64decode(news.data))
            if not told.more:
                return
            wait = 0.0

    # ---- the guest -------------------------------------------------------------------------------------------------

    def guest(
        self,
        channel: UUID | None = None,
        *,
        instance: UUID | None = None,
        subchannel: int = 0,
        ring_pages: int = RING_PAGES,
    ) -> Guest:
        """See `DeviceUnderTest.guest`."""
        if channel is None:
            offers = self.ask("offers")
            if len(offers) != 1:
                raise UsageError(f"there are {len(offers)} channels: which one is meant?")
            channel, instance = UUID(offers[0]["type"]), UUID(offers[0]["instance"])
        names = [one.name for one in self._description.providers]
        name = names[0] if len(names) == 1 else str(channel)
        number = self.ask(
            "channel",
            type=str(channel),
            instance=str(instance) if instance else None,
            subchannel=subchannel,
            pages=ring_pages,
            name=name,
        )
        self._ends.append(_RemoteEnd(self, number, name))
        return Guest(self, self._ends[-1])

    def allocate(self, size: int) -> _RemotePages:
        """Guest memory; tests use `Guest.memory`."""
        return _RemotePages(self, int(self.ask("allocate", size=size)))

    def wait_until(self, condition: Callable[[], bool], timeout: float = TIMEOUT, what: str = "a condition") -> None:
        """See `DeviceUnderTest.wait_until`."""
        bound = patient(timeout)
        deadline = time.monotonic() + bound
        while not condition():
            if time.monotonic() > deadline:
                raise WaitTimeout(f"{what} (VM {self.vm.name!r})", bound)
            self.look(LOOK)

    def advance(self, seconds: float) -> None:
        """Let so much time pass."""
        with suppress(WaitTimeout):
            end = time.monotonic() + seconds
            self.wait_until(lambda: time.monotonic() >= end, seconds + TIMEOUT)

    def waiting_for(self) -> str:
        """What the channels' failures say."""
        return "".join(f"; {failure}" for failure in self._failures)

    # ---- the host --------------------------------------------------------------------------------------------------

    @property
    def _description(self) -> DeviceDescription:
        return self.vm.machine.description.device

    def command(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        """A tool's command to the provider, of which there is one; `vm.provider` is for several."""
        return self.vm.provider(sole_provider(self._description), name, **arguments)

    def status(self) -> dict[str, Any]:
        """The provider's own status, of which there is one; the server's is `vm.status()`."""
        found: Mapping[str, Any] = self.vm.status()["providers"][sole_provider(self._description)]
        return dict(found)

    def in_flight(self) -> InFlight:
        """The device's packets in flight now."""
        found = self.vm.in_flight()
        return InFlight(found["queued"], found["sent"])

    def save_restore(self) -> InFlight:
        """Save the VM, end its processes, and restore it in fresh ones."""
        return self._moved(self.vm.save_restore()[0].packets)

    def migrate(self) -> InFlight:
        """Live migration to a second VM on this host, which takes its place."""
        return self._moved(self.vm.migrate().packets)

    def _moved(self, packets: Mapping[str, int]) -> InFlight:
        self.saves += 1
        return InFlight(packets["queued"], packets["sent"])
