"""A whole device with a guest's driver at its other end, in one thread and without a transport."""

import json
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from vmbus.device import saved
from vmbus.device.device import Device
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.server import ServerChannel
from vmbus.providers import Provider, provider_class
from vmbus_guest.driver import VmbusDriver

PAGE = 4096
BASE = 0x1_0000_0000
CONFIG = bytes(range(256))


class Buffer:
    """Implements DmaBuffer."""

    def __init__(self, iova: int, view: memoryview) -> None:
        self.iova = iova
        self.view = view
        self.size = len(view)


class Timer:
    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Machine:
    """A device and its providers (a `Host`), and guest memory of 16 MiB in regions of `region` bytes.

    It is also the guest's `PciFunction`: registers go straight to the device, waiting for an interrupt runs it.
    """

    interrupt_fd = -1

    def __init__(self, kinds: Sequence[str] = ("echo", "burst"), *, region: int = 1 << 20, **options: Any) -> None:
        self.kinds = list(kinds)
        self.options = options
        self.region = region
        self.ram = bytearray(16 << 20)
        self.used = bytearray(len(self.ram) // PAGE)
        self.boot()
        self.map_all()

    def boot(self) -> None:
        """A fresh device, as in a new server process; guest memory stays."""
        self.scheduled = False
        self.pending_interrupt = False
        self.timers: list[Timer] = []
        self.soon: list[Callable[[], None]] = []
        # Time stands still in a turn, so that what is done in one does not depend on how busy the machine is.
        self.device = Device(self._interrupt, self._schedule, later=self.later, clock=lambda: 0.0)
        self.providers: list[Provider] = []
        for number, kind in enumerate(self.kinds):
            provider = provider_class(kind)(self, f"{kind}{number}", UUID(int=number + 1), self.options.get(kind, {}))
            self.providers.append(provider)
            provider.start()

    def map_all(self) -> None:
        for start in range(0, len(self.ram), self.region):
            view = memoryview(self.ram)[start : start + self.region]
            self.device.memory.map(BASE + start, view, True)

    # what the device's surroundings do

    def _interrupt(self) -> None:
        self.pending_interrupt = True

    def _schedule(self) -> None:
        self.scheduled = True

    def add_channel(self, channel: ServerChannel) -> None:
        self.device.add_channel(channel)

    def remove_channel(self, channel: ServerChannel, gone: Callable[[], None] | None = None) -> None:
        self.device.remove_channel(channel, gone)

    def call_soon(self, call: Callable[[], None]) -> None:
        self.soon.append(call)

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(call))
        return self.timers[-1]

    def later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """How the device has channels looked at again; None: it does not."""
        return self.call_later(seconds, call)

    def serve(self, turns: int = 100_000) -> None:
        """Run the device until it is idle."""
        for _ in range(turns):
            if not self.scheduled and not self.soon:
                return
            calls, self.soon = self.soon, []
            for call in calls:
                call()
            self.scheduled = False
            self.device.service()
        raise AssertionError("the device never becomes idle")

    def fire_timers(self) -> bool:
        """All timers run out. Returns whether there was one."""
        due, self.timers = self.timers, []
        calls = [timer.call for timer in due if timer.call is not None]
        for call in calls:
            call()
        return bool(calls)

    # PciFunction

    def read32(self, offset: int) -> int:
        return int.from_bytes(self.device.bar_read(offset, 4), "little")

    def write32(self, offset: int, value: int) -> None:
        self.device.bar_write(offset, value.to_bytes(4, "little"))

    def allocate(self, size: int) -> Buffer:
        pages = size // PAGE
        first = self.used.find(bytes(pages))
        assert first >= 0, "out of guest memory"
        self.used[first : first + pages] = b"\1" * pages
        start = first * PAGE
        self.ram[start : start + size] = bytes(size)
        return Buffer(BASE + start, memoryview(self.ram)[start : start + size])

    def free(self, buffer: Buffer) -> None:
        first = (buffer.iova - BASE) // PAGE
        self.used[first : first + buffer.size // PAGE] = bytes(buffer.size // PAGE)

    def wait_interrupt(self, timeout: float) -> bool:
        self.serve()
        if not self.pending_interrupt and timeout:
            self.fire_timers()
            self.serve()
        fired, self.pending_interrupt = self.pending_interrupt, False
        return fired

    def close(self) -> None:
        pass

    # saving and restoring

    def channel(self, kind: str) -> ServerChannel:
        return next(provider.channel for provider in self.providers if provider.kind == kind)

    def quiesce(self) -> None:
        self.device.freeze()
        for channel in self.device.channels:
            channel.quiesce()
            assert channel.quiescent

    def save(self) -> saved.DeviceState:
        self.quiesce()
        return saved.save_device("vmbus0", CONFIG, self.device, self.providers)

    def adopt(self, state: saved.DeviceState) -> saved.Restored:
        """This device, a fresh one, becomes that one; it does not run yet."""
        saved.check_fits(state, "vmbus0", self.device, self.providers)
        self.device.freeze()
        self.map_all()
        return saved.restore_device(state, self.device, self.providers)

    def come_back(self, state: saved.DeviceState) -> None:
        """A new device takes the place of the old one, under the guest's feet."""
        self.boot()
        self.adopt(state)
        self.device.thaw()


def connect(machine: Machine) -> VmbusDriver:
    return VmbusDriver(machine)  # type: ignore[arg-type]


def describe(state: saved.DeviceState) -> str:
    """For comparing states: everything in them, as text."""
    import msgspec

    return json.dumps(msgspec.to_builtins(state), indent=1)


def open_echo(driver: VmbusDriver, **pages: int) -> Channel:
    from vmbus.wire.workload import ECHO_TYPE

    channel = driver.client_channel(ECHO_TYPE, name="echo", **pages)
    driver.enable(channel)
    return channel
