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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from vmbus.device.description import DeviceDescription
from vmbus.device.saved import count_packets
from vmbus.errors import StateError
from vmbus.kmcl import Channel, ClientChannel, Completion, Packet, Status
from vmbus.testkit.loopback.harness import LoopbackServer
from vmbus.transport.library import Library
from vmbus_guest.driver import VmbusDriver

TIMEOUT = 10.0  # seconds


class GuestRequest:
    """A packet that the guest has sent. `done`: it was completed, with `status` and `reply` (padded to 8 bytes)."""

    def __init__(self, pair: LoopbackPair, what: str) -> None:
        self._pair = pair
        self._what = what
        self.done = False
        self.status = 0
        self.reply = b""

    def completed(self, _: Packet, status: int, reply: bytes) -> None:
        """The completion routine."""
        self.done, self.status, self.reply = True, status, reply

    def wait(self, timeout: float = TIMEOUT) -> bytes:
        """The reply, padded to 8 bytes. Raises WaitTimeout, StateError when the channel was closed instead."""
        self._pair.run_until(lambda: self.done, timeout, f"the completion of {self._what}")
        if self.status != Status.SUCCESS:
            raise StateError(f"{self._what} was cancelled, since its channel was closed")
        return self.reply


class PairMemory:
    """Guest memory that a packet can describe: `data` is what is in it."""

    def __init__(self, driver: VmbusDriver, size: int) -> None:
        self._buffer = driver.allocate(-(-max(size, 1) // 4096) * 4096)
        self.size = size

    @property
    def data(self) -> bytes:
        """What is in it now."""
        return bytes(self._buffer.view[: self.size])

    @data.setter
    def data(self, data: bytes) -> None:
        self._buffer.view[: len(data)] = data

    def part(self, offset: int = 0, length: int | None = None) -> list[tuple[int, int]]:
        """A part, as `send` takes it."""
        return [(self._buffer.iova + offset, self.size - offset if length is None else length)]


class Guest:
    """The guest's end of an open channel. `received`: packets of the provider that nobody has asked for yet."""

    def __init__(self, pair: LoopbackPair, channel: ClientChannel) -> None:
        self.pair = pair
        self.channel = channel
        self.received: deque[tuple[Completion, bytes]] = deque()

    def process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        """The packet callback."""
        self.received.append((completion, payload))

    def send(self, payload: bytes, *, external: Sequence[tuple[int, int]] | None = None) -> GuestRequest:
        """Send a request that wants a completion; `external`: memory that it describes, see `LoopbackPair.memory`."""
        packet = self.channel.allocate_packet()
        request = GuestRequest(self.pair, f"a request of {len(payload)} bytes on channel {self.channel.name}")
        packet.completion_routine = request.completed
        packet.send(payload, external=external)
        self.pair.packets += 1
        return request

    def request(self, payload: bytes, *, external: Sequence[tuple[int, int]] | None = None) -> bytes:
        """Send a request, and wait for its reply."""
        return self.send(payload, external=external).wait()

    def receive(self, timeout: float = TIMEOUT, *, reply: bytes = b"") -> bytes:
        """The payload of the provider's next packet, which is completed with `reply`. Raises WaitTimeout."""
        what = f"a packet of the provider on channel {self.channel.name}"
        self.pair.run_until(lambda: bool(self.received), timeout, what)
        completion, payload = self.received.popleft()
        completion.complete(reply)
        self.pair.packets += 1
        return payload

    def close(self) -> None:
        """Close the channel."""
        self.pair.driver.close_channel(self.channel)


class LoopbackPair:
    """See the module's text. A context manager.

    Attributes:
        server: the `LoopbackServer`, another one after each restore. driver: the guest's driver.
        saves: how often it was saved and restored. packets: how many packets tests have sent and received.
    """

    def __init__(
        self, description: DeviceDescription, library: Library, *, capture: Path | None = None, **guest: Any
    ) -> None:
        """`guest`: settings of the guest's PCI function, see `LoopbackFunction`. Raises what the server raises."""
        self.description = description
        self.library = library
        self.saves = 0
        self.packets = 0
        self._stack = contextlib.ExitStack()
        self.server = LoopbackServer(description, library, capture=capture)
        try:
            self.function = self.server.function(**guest)
            self._stack.callback(self.function.close)
            self.driver = VmbusDriver(self.function)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LoopbackPair:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the guest -------------------------------------------------------------------------------------------------

    def open(
        self, interface_type: UUID, *, instance: UUID | None = None, subchannel: int = 0, ring_pages: int = 16
    ) -> Guest:
        """Open a channel as a guest. Raises WaitTimeout if it is not offered, PeerError if it is refused."""
        channel = self.driver.client_channel(
            interface_type,
            instance=instance,
            subchannel_index=subchannel,
            ring_pages_in=ring_pages,
            ring_pages_out=ring_pages,
        )
        guest = Guest(self, channel)
        channel.set_process_packet_callbacks(guest.process)
        self.driver.enable(channel, TIMEOUT)
        return guest

    def memory(self, size: int, data: bytes = b"") -> PairMemory:
        """Guest memory for external data, with this in it."""
        memory = PairMemory(self.driver, size)
        memory.data = data
        return memory

    def run_until(self, condition: Callable[[], bool], timeout: float = TIMEOUT, what: str = "a condition") -> None:
        """Move packets until `condition()` holds. Raises WaitTimeout naming `what`."""
        self.driver.run_until(condition, timeout, what)

    def run_for(self, seconds: float) -> None:
        """Move packets for a while, for what should not happen."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.driver.step(left)

    # ---- the host --------------------------------------------------------------------------------------------------

    def command(self, command: str, /, **arguments: Any) -> dict[str, Any]:
        """A control command of the server."""
        return self.server.command(command, **arguments)

    def provider(self, name: str, command: str, /, **arguments: Any) -> dict[str, Any]:
        """A provider's own command."""
        return self.server.command("provider", name=name, command=command, arguments=arguments)

    def status(self) -> dict[str, Any]:
        """The server's status."""
        return self.server.command("status")

    def save_restore(self) -> dict[str, int]:
        """Save the device into another server, which takes over; guest memory and everything in flight stay.

        Returns the packets in flight of the device at that moment, `queued` and `sent`.
        """
        old = self.server
        with tempfile.TemporaryDirectory(prefix="vmbus-pair-") as directory:
            files = Path(directory)
            state = old.save(files)
            counts = count_packets(state)
            new = LoopbackServer(self.description, self.library, restore=state, files=files)
            try:
                # As with a VM: the old server is gone before the new one owns what only one may.
                old.stop()
                self.server = new
                self.function.reconnect(new.socket_path, state.config)
                new.command("restore-finish")
            except BaseException:
                new.stop()
                raise
        self.saves += 1
        return {"queued": counts.queued, "sent": counts.sent}

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
