"""Save at every step over the real transport: the real server and its control commands, libvfio-user, a socket, guest
memory in a memfd. Each restore is a new server on a new socket, and a PCI replay.

The server works on a thread of its own whenever it likes, so points are those of the guest's side alone, and what is
compared must not depend on who is first: the scripts see to that.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from typing import Any

from support.step_provider import BackProvider, FrontProvider, PipeProvider, StepProvider
from support.steps import Described, Points, Stuck, Tamper, describe, what_moves
from vmbus.device import saved
from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.errors import WaitTimeout
from vmbus.ring.fence import full_fence
from vmbus.testkit.loopback.function import LoopbackBuffer
from vmbus.testkit.loopback.harness import LoopbackServer
from vmbus.transport.library import Library
from vmbus.wire.synic import Register
from vmbus_guest.driver import VmbusDriver

# What the server has to know: monkeypatched into `vmbus.providers.PROVIDERS`.
KINDS = {provider.kind: provider for provider in (StepProvider, PipeProvider, BackProvider, FrontProvider)}
TICK = 0.002  # seconds, where the providers' timers have 1
QUIET_SECONDS = 10.0


def _described(one: Described) -> ProviderDescription:
    kind, name, instance, options = one
    return ProviderDescription(kind=kind.kind, name=name, instance=str(instance), options=options)


class LoopbackWorld(Points):
    """A device server and a guest's `PciFunction` connected to it; the same for scripts as `support.steps.World`."""

    interrupt_fd = -1

    def __init__(
        self,
        library: Library,
        described: Sequence[Described],
        *,
        patience: float = QUIET_SECONDS,
        tamper: Tamper | None = None,
    ) -> None:
        """`patience`: seconds after which a wait of the guest is in vain. `tamper`: as in `support.steps.World`."""
        super().__init__()
        self.library = library
        self.patience = patience
        self.tamper = tamper
        self.lives = 1
        self._thread = threading.get_ident()
        description = DeviceDescription(name="vmbus0", providers=[_described(one) for one in described])
        self.server = LoopbackServer(description, library)
        try:
            self.function = self.server.function(ram_size=2 << 20)
        except BaseException:
            self.server.stop()
            raise

    def fence(self) -> None:
        """Takes the place of the memory fence, of both ends: on the server's thread it is nothing else."""
        full_fence()
        if threading.get_ident() == self._thread:
            self.point("a fence of the guest")

    # ---- the server ------------------------------------------------------------------------------------------------

    def moved(self) -> tuple[Any, ...]:
        """See Points."""
        server = self.server.server
        return self.writes, self.server.on_loop(lambda: what_moves(server.device, server.providers))

    def _busy(self) -> bool:
        server = self.server.server
        device = server.device
        return server._scheduled or device.busy or device.local_bus.busy or server.timers.next_in() is not None

    def work(self) -> None:
        """Wait until the server has done everything, timers included."""
        self.function.barrier()
        deadline = time.monotonic() + QUIET_SECONDS
        while self.server.on_loop(self._busy):
            if time.monotonic() > deadline:
                raise WaitTimeout("the server to become idle", QUIET_SECONDS)
        self.point("the server is idle")

    def settle(self, driver: VmbusDriver) -> None:
        """Until neither end has anything left to do."""
        deadline = time.monotonic() + QUIET_SECONDS
        while True:
            while driver.step(0.0):
                pass
            self.work()
            if not driver.step(0.0):
                return
            if time.monotonic() > deadline:
                raise Stuck("the two ends never become quiet")

    def offer(self, described: Described) -> None:
        """A provider is added while the server runs."""
        one = _described(described)
        self.server.command(
            "offer",
            provider={"kind": one.kind, "name": one.name, "instance": one.instance, "options": one.options},
        )
        self.point("a hot offer")

    def withdraw(self, name: str) -> None:
        """A provider is taken away while the server runs; the guest, which is us, cannot release its channels now."""
        self.server.command("rescind", name=name, seconds=0.05)
        self.point("a provider withdrawn")

    def provider(self, name: str) -> Any:
        """A provider of the present life."""
        return next(one for one in self.server.server.providers if one.name == name)

    def ending(self) -> dict[str, Any]:
        """What the device has come to."""
        server = self.server.server
        ending: dict[str, Any] = self.server.on_loop(lambda: describe(server.device, server.providers))
        return ending

    def end(self) -> None:
        """Hang up, and end the server."""
        self.function.close()
        self.server.stop()

    # ---- PciFunction -------------------------------------------------------------------------------------------------

    def read32(self, offset: int) -> int:
        """A register."""
        return self.function.read32(offset)

    def write32(self, offset: int, value: int) -> None:
        """A register."""
        self.writes += 1
        self.function.write32(offset, value)
        self.point(f"a write to {Register(offset).name}")

    def allocate(self, size: int) -> LoopbackBuffer:
        """Guest memory."""
        return self.function.allocate(size)

    def free(self, buffer: LoopbackBuffer) -> None:
        """Guest memory."""
        self.function.free(buffer)

    def wait_interrupt(self, timeout: float) -> bool:
        """Whether one came. Nothing takes seconds here: who waits so long waits in vain."""
        if not self.function.wait_interrupt(self.patience if timeout else 0.0):
            if timeout:
                raise Stuck(f"no interrupt in {self.patience} s; the last step was {self.last}")
            return False
        self.point("the interrupt taken")
        return True

    def close(self) -> None:
        """The driver has done with the function."""

    # ---- saves -------------------------------------------------------------------------------------------------------

    def pause(self) -> bool:
        """The server's `pause`."""
        try:
            self.server.command("pause", seconds=1.0)
        except WaitTimeout:
            self.refused += 1
            return False
        return True

    def resume(self) -> None:
        """The server's `resume`."""
        self.server.command("resume")

    def save(self) -> bytes:
        """The server's `save`."""
        path = self.server.directory / f"state-{self.points}-{self.saves}-{time.monotonic_ns()}.bin"
        self.server.command("save", path=str(path))
        data = path.read_bytes()
        path.unlink()
        self.count(saved.decode(data))
        return data

    def restore(self, data: bytes) -> None:
        """A new server, the PCI replay, `restore-finish`. An interrupt that was not taken is lost with the old one."""
        state = saved.decode(data)
        if self.tamper is not None:
            state = self.tamper(self, state)
        description = self.server.server.description
        self.server.stop()
        self.function.wait_interrupt(0.0)
        self.server = LoopbackServer(description, self.library, restore=state)
        self.lives += 1
        self.function.reconnect(self.server.socket_path, state.config)
        report = self.server.command("restore-finish")
        counts = saved.count_packets(state)
        assert report["packets"] == {"queued": counts.queued, "sent": counts.sent}

    def load(self, data: bytes) -> None:
        """The same server, with the state in another life of its device, as in a revert."""
        path = self.server.directory / "load.bin"
        path.write_bytes(data)
        self.server.command("load", path=str(path), sha256=hashlib.sha256(data).hexdigest())
        path.unlink()
        self.function.reset()
        self.function.wait_interrupt(0.0)
        self.function.replay(saved.decode(data).config)
        self.server.command("restore-finish")
