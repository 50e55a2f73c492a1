"""Both ends of a live migration without QEMU: models of a VM that leaves and of one that arrives, in one world.

The world holds what the whole protocol is for: the vCPUs never run on both sides, and it counts what is left over.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from support import pace
from support.model_vm import PACKETS, ModelVm
from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.errors import EnvironmentProblem, StateError
from vmbus.operations.migration.address import Address
from vmbus.operations.migration.arrival import Arrival
from vmbus.operations.migration.destination import Destination
from vmbus.operations.migration.messages import Prepare
from vmbus.operations.migration.source import Source
from vmbus.operations.migration.verdicts import Verdicts
from vmbus.qemu.pci_function import MAGIC
from vmbus.qemu.qmp import MigrationFailed
from vmbus.snapshot.manifest import Packets
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription

STATE = b"the device's state " * 40_000  # several chunks
DEVICE = DeviceDescription("vmbus0", [ProviderDescription("echo", "echo", "6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7a01")])
SECRET = bytes(range(32))


class World:
    """What is true outside of all processes."""

    def __init__(self) -> None:
        self._running: set[str] = set()
        self.both = False
        self.lock: str | None = "source"
        """Which side owns what only one may own (a provider's outside resources)."""
        self.stream: asyncio.Event = asyncio.Event()
        self.cut = False  # the stream ended before its end
        """Set when the source's QEMU has sent everything."""

    def take(self, side: str) -> None:
        """Raises as a server whose provider cannot be activated."""
        if self.lock not in (None, side):
            raise EnvironmentProblem(f"the lock is the {self.lock}'s")
        self.lock = side

    def give_up(self, side: str) -> None:
        if self.lock == side:
            self.lock = None

    def set_running(self, side: str, running: bool) -> None:
        (self._running.add if running else self._running.discard)(side)
        self.both = self.both or len(self._running) > 1

    @property
    def running(self) -> set[str]:
        return set(self._running)


class LeavingVm(ModelVm):
    """The VM as far as a migration touches it."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        super().__init__(VmDescription("demo", DEVICE), make_programs(folder), folder)
        self.machine = msgspec.structs.replace(self.machine, spare_cpus=3)
        self.state = STATE
        self.set_running(True)

    def set_running(self, running: bool) -> None:
        self.world.set_running("source", running)

    async def running(self) -> bool:
        return "source" in self.world.running

    async def kill(self) -> None:
        await super().kill()
        self.set_running(False)
        self.world.give_up("source")

    async def perform(self, command: str, given: dict[str, Any]) -> Any:
        if command == "migrate-continue":
            self.world.stream.set()
        elif command == "migrate_cancel" and not self.world.stream.is_set():
            self.world.cut = True
            self.world.stream.set()
        found = await super().perform(command, given)
        return {"ram": {"transferred": 5 << 20}} if command == "query-migrate" else found

    async def human(self, line: str, *, timeout: float = 1.0) -> str:
        return f"0: {MAGIC:#x}"

    async def call(self, command: str, timeout: float = 1.0, **arguments: Any) -> dict[str, Any]:
        found = await super().call(command, timeout, **arguments)
        if command == "pause":
            self.world.give_up("source")
        return found

    async def take_back(self, seconds: float) -> None:
        seconds = pace.seconds(seconds)
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            try:
                return self.world.take("source")
            except EnvironmentProblem:
                if asyncio.get_running_loop().time() >= deadline:
                    raise
            await asyncio.sleep(0.01)


class ArrivingVm(Arrival):
    """The steps of an arrival without QEMU and server."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self._folder = folder
        self.starts = 0
        self.steps: list[str] = []
        self.fail: dict[str, list[Exception]] = {}
        self.discarded = False
        self.working = False
        self.qemu_drives = False
        self.config = bytes(256)  # of the PCI function
        self.state = b""

    def step(self, name: str) -> None:
        self.steps.append(name)
        if failures := self.fail.get(name):
            raise failures.pop(0)

    @property
    def folder(self) -> Path:
        return self._folder

    async def start(self, phases: Any, multifd: int) -> int | str:
        self.step("start")
        self.config = bytes(256)
        self.starts += 1
        self.world.stream.clear()
        self.world.cut = False
        return str(self._folder / "stream.sock")

    async def driven(self) -> bool:
        return self.qemu_drives

    async def replay_ahead(self, configs: Sequence[bytes]) -> None:
        self.step("replay_ahead")
        (self.config,) = configs

    async def load_states(self, states: Sequence[tuple[Path, str, DeviceDescription]]) -> Packets:
        self.step("load_states")
        ((path, sha256, device),) = states
        self.state = path.read_bytes()
        if hashlib.sha256(self.state).hexdigest() != sha256:
            raise StateError("the digest differs")
        assert device == DEVICE
        return Packets(**PACKETS)

    async def loaded(self) -> None:
        self.step("loaded")
        await self.world.stream.wait()
        if self.world.cut:
            raise MigrationFailed("load of migration failed: Section footer error")

    async def replay(self, configs: Sequence[bytes]) -> int:
        self.step("replay")
        (config,) = configs
        written = 7 if config == self.config else 14
        self.config = config
        return written

    async def rebuild(self) -> tuple[Packets, int]:
        self.step("rebuild")
        self.world.take("destination")
        return Packets(**PACKETS), 2

    async def release(self) -> None:
        self.step("release")
        self.working = True

    async def run(self) -> None:
        self.step("run")
        assert self.world.lock == "destination"
        assert self.working
        self.world.set_running("destination", True)

    async def start_over(self) -> None:
        self.step("start_over")

    async def discard(self) -> None:
        self.discarded = True
        self.world.set_running("destination", False)
        self.world.give_up("destination")


def make_programs(folder: Path, *, kernel: bytes = b"kernel", initramfs: bytes = b"initramfs" * 100_000) -> Programs:
    """Programs with small boot files in `folder` (made if need be)."""
    folder.mkdir(exist_ok=True, mode=0o700)
    files = {"vmlinuz-here": kernel, "initramfs-here": initramfs}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return Programs(("qemu",), "11.1.3", "tcg", *(folder / name for name in files))


class Pair:
    """A source and a destination of one migration. `migrate` runs both."""

    def __init__(self, folder: Path, listener: Any, *, address: Address | None = None, **options: Any) -> None:
        self.world = World()
        self.leaving = options.pop("leaving", LeavingVm)(self.world, folder / "source")
        (folder / "arrived").mkdir(exist_ok=True, mode=0o700)
        self.arriving = options.pop("arriving", ArrivingVm)(self.world, folder / "arrived")
        secret, tls = options.pop("secret", SECRET), options.pop("tls", None)
        self.boot_files: list[Path] = []
        self.prepared: Prepare | None = None

        def build(prepare: Prepare, kernel: Path, initramfs: Path, host: str | None) -> ArrivingVm:
            self.boot_files = [kernel, initramfs]
            self.prepared = prepare
            return self.arriving

        there = options.pop("programs", None) or make_programs(folder / "destination")
        shared = {name: options.pop(name) for name in ("silence",) if name in options}
        to_source = {name: options.pop(name) for name in ("ask_timeout",) if name in options}
        source_at, destination_at = options.pop("source_at", None), options.pop("destination_at", None)
        self.listener = listener
        (folder / "verdicts").mkdir(exist_ok=True)
        self.verdicts = Verdicts(folder / "verdicts")
        self.destination = Destination(
            listener,
            there,
            lambda _: self.arriving.folder,
            build,
            verdicts=self.verdicts,
            **shared,
            **options,
            **({"at": destination_at} if destination_at else {}),
        )
        self.source = Source(
            self.leaving,
            address or listener.address,
            secret,
            tls,
            **shared,
            **to_source,
            **({"at": source_at} if source_at else {}),
        )

    async def migrate(self) -> SimpleNamespace:
        """Both sides' outcomes: `report` or `problem` of the source, `arrived` or `refusal` of the destination."""
        found = SimpleNamespace(report=None, problem=None, arrived=False, refusal=None)
        receiving = asyncio.create_task(self.destination.run(30))
        try:
            found.report = await self.source.run()
        except (Exception, asyncio.CancelledError) as error:
            found.problem = error
        try:
            async with asyncio.timeout(pace.seconds(30)):
                await receiving
            found.arrived = True
        except (Exception, asyncio.CancelledError) as error:
            found.refusal = error
        return found
