"""A device server and its guest in one process, for tests: `LoopbackPair`.

    with LoopbackPair(describe("echo"), library) as pair:
        guest = pair.open(ECHO_TYPE)
        request = guest.send(b"...")
        pair.save_restore()
        assert request.wait() == b"..."

The server and its transport are the real ones; the guest is the driver that test drivers in a VM use, on the calling
thread. Calls that wait move packets meanwhile; nothing moves in between.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from vmbus.device.description import DeviceDescription
from vmbus.device.saved import DeviceState, count_packets
from vmbus.errors import UsageError
from vmbus.testkit.device import RING_PAGES, DeviceUnderTest, InFlight, sole_provider
from vmbus.testkit.guest import TIMEOUT, BufferPages, ChannelEnd, Guest, HostPacket
from vmbus.testkit.loopback.harness import LoopbackServer
from vmbus.transport.library import Library
from vmbus.util.patience import patient
from vmbus_guest.channel_driver import ChannelDriver
from vmbus_guest.driver import VmbusDriver

if TYPE_CHECKING:
    from vmbus.observe.audit.recorder import Recorder


class DriverSide:
    """The guest's ends of channels, over a driver in this process. Implements `vmbus.testkit.guest.Surroundings`."""

    def __init__(self, driver: ChannelDriver) -> None:
        self.driver = driver
        self.guests: list[Guest] = []

    def guest(
        self,
        channel: UUID,
        *,
        instance: UUID | None = None,
        subchannel: int = 0,
        ring_pages: int = RING_PAGES,
        name: str = "",
    ) -> Guest:
        """As `DeviceUnderTest.guest`."""
        end = self.driver.client_channel(
            channel,
            instance=instance,
            subchannel_index=subchannel,
            ring_pages_in=ring_pages,
            ring_pages_out=ring_pages,
            name=name,
        )
        opened = ChannelEnd(end, lambda one: self.driver.enable(one, patient(TIMEOUT)), self.driver.close_channel)
        self.guests.append(Guest(self, opened))
        return self.guests[-1]

    def open(self, channel: UUID, *, answer: Callable[[HostPacket], bytes | None] | None = None, **more: Any) -> Guest:
        """As `guest`, and open it; `answer` as in `Guest`."""
        guest = self.guest(channel, **more)
        guest.answer = answer
        guest.open()
        return guest

    def wait_until(self, condition: Callable[[], bool], timeout: float = TIMEOUT, what: str = "a condition") -> None:
        """Move packets until `condition()` holds. Raises WaitTimeout naming `what`."""
        self.driver.run_until(condition, patient(timeout), what)

    def allocate(self, size: int) -> BufferPages:
        """Guest memory; tests use `Guest.memory`."""
        return BufferPages(self.driver.allocate(size))

    def step(self, what: str) -> None:
        """Nobody counts."""

    def waiting_for(self) -> str:
        """What the channels' failures say."""
        return "".join(f"; {failure}" for failure in self.driver.failures)


class LoopbackPair(DeviceUnderTest):
    """See the module's text. A context manager.

    Attributes:
        server: the `LoopbackServer`, another one after each restore or migration. driver: the guest's driver.
    """

    def __init__(
        self,
        description: DeviceDescription,
        library: Library,
        *,
        capture: Path | None = None,
        audit: Path | None = None,
        recorder: Recorder | None = None,
        **guest: Any,
    ) -> None:
        """`capture`, `audit`: as for the server. `recorder`: of the guest's packets. `guest`: settings of the guest's
        PCI function, see `LoopbackFunction`. Raises what the server raises."""
        self.description = description
        self.library = library
        self.audit = audit
        self.saves = 0
        self._stack = contextlib.ExitStack()
        self.server = LoopbackServer(description, library, capture=capture, audit=audit)
        try:
            self.function = self.server.function(**guest)
            self._stack.callback(self.function.close)
            self.driver = VmbusDriver(self.function, recorder=recorder)
            self.side = DriverSide(self.driver)
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

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
            offers = [one for one in self.driver.bus.offers.values() if not one.subchannel_index]
            if len(offers) != 1:
                raise UsageError(f"there are {len(offers)} channels: which one is meant?")
            channel, instance = offers[0].interface_type, offers[0].interface_instance
        names = [one.name for one in self.description.providers]
        name = names[0] if len(names) == 1 else str(channel)
        return self.side.guest(channel, instance=instance, subchannel=subchannel, ring_pages=ring_pages, name=name)

    @property
    def packets(self) -> int:
        """How many packets tests have sent and received."""
        return sum(len(guest.requests) + guest.received for guest in self.side.guests)

    def allocate(self, size: int) -> BufferPages:
        """Guest memory; tests use `Guest.memory`."""
        return self.side.allocate(size)

    def wait_until(self, condition: Callable[[], bool], timeout: float = TIMEOUT, what: str = "a condition") -> None:
        """Move packets until `condition()` holds. Raises WaitTimeout naming `what`."""
        self.side.wait_until(condition, timeout, what)

    def advance(self, seconds: float) -> None:
        """Move packets for a while."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.driver.step(left)

    # ---- the host --------------------------------------------------------------------------------------------------

    def command(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        """A tool's command to the provider, of which there is one."""
        return self.provider(sole_provider(self.description), name, **arguments)

    def provider(self, name: str, command: str, /, **arguments: Any) -> dict[str, Any]:
        """A command to one of several providers."""
        return self.server.command("provider", name=name, command=command, arguments=arguments)

    def status(self) -> dict[str, Any]:
        """The provider's own status, of which there is one; the server's is `server.command("status")`."""
        return dict(self.server.command("status")["providers"][sole_provider(self.description)])

    def in_flight(self) -> InFlight:
        """The device's packets in flight now."""
        packets = self.server.command("status")["packets"]
        return InFlight(packets["queued"], packets["sent"])

    def save_restore(self) -> InFlight:
        """Save the device into another server, which takes over; guest memory and everything in flight stay."""
        with tempfile.TemporaryDirectory(prefix="vmbus-pair-") as directory:
            files = Path(directory)
            state = self.save(files)
            self.restore(state, files)
        counts = count_packets(state)
        return InFlight(counts.queued, counts.sent)

    def save(self, files: Path | None = None) -> DeviceState:
        """Pause the device and take its state; providers' files go into the directory `files`."""
        return self.server.save(files)

    def restore(self, state: DeviceState, files: Path | None = None, *, config: bytes | None = b"") -> dict[str, Any]:
        """Go on with another server, from a state of `save`; what that server says of the restore. Where it refuses,
        it is there, and is not finished.

        `config`: for the PCI function, in the place of the state's; None: nothing is put back.
        """
        new = LoopbackServer(self.description, self.library, restore=state, files=files, audit=self.audit)
        # As with a VM: the old server is gone before the new one owns what only one may.
        self.server.stop()
        self.server = new
        self.function.reconnect(new.socket_path, state.config if config == b"" else config)
        report = new.command("restore-finish")
        self.saves += 1
        return report

    def migrate(self) -> InFlight:
        """Move the device to another server, which has guest memory of its own: a copy of what there was when the
        device stood still. The old server is there until the new one runs. Raises UsageError for files that only a
        snapshot carries."""
        old = self.server
        try:
            state = old.save(moving=True)
        except BaseException:
            old.command("resume")
            raise
        new = LoopbackServer(self.description, self.library, restore=state, audit=self.audit)
        try:
            self.function.move_to(self.function.another_client(new.socket_path, bytes(self.function.ram)))
            self.function.reset()
            self.function.replay(state.config)
            new.command("restore-finish")
        except BaseException:
            new.stop()
            raise
        self.server = new
        old.stop()
        self.saves += 1
        counts = count_packets(state)
        return InFlight(counts.queued, counts.sent)

    @contextlib.contextmanager
    def capture(self, path: Path, *, channels: Sequence[str] = (), **options: int) -> Iterator[Path]:
        """Capture the server's packets into the new file `path` while the block runs (docs/capture.md)."""
        server = self.server
        settings = {"channels": list(channels), **options}
        server.command("capture-start", path=str(path.absolute()), options=settings)
        try:
            yield path
        finally:
            if self.server is server:
                server.command("capture-stop")

    def close(self) -> None:
        """End both. Repeating it does nothing."""
        try:
            self._stack.close()
        finally:
            self.server.stop()
