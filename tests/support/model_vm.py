"""A model of a VM for operations: its own monitor and control connection, which notes in which order it was asked.

It keeps what matters: whether the vCPUs run, whether the device is at rest, whether a migration is under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from qemu.qmp.events import EventListener

from vmbus.errors import Code, EnvironmentProblem, VmbusError
from vmbus.operations.stream import REFUSED_CAPABILITIES
from vmbus.qemu.device import DeviceInstance
from vmbus.qemu.pci_function import MAGIC
from vmbus.qemu.pci_replay import PciAddress
from vmbus.qemu.qmp import MIGRATION_ENDS, MigrationFailed
from vmbus.snapshot.manifest import Machine
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.own_disks import DiskState

BAR0 = 0xFEBF1000
CONFIG = bytes.fromhex("4256564d") + bytes(range(252))
PACKETS = {"queued": 3, "sent": 4}


class LogBroken(VmbusError):
    """What the server says when its dirty log cannot be trusted any more."""

    code = Code.LOG_BROKEN


def write_new(path: Path | str, data: bytes) -> None:
    with Path(path).open("xb") as file:
        file.write(data)


class ModelDevice(DeviceInstance):
    """Its function is put back as the model does it."""

    def __init__(self, vm: ModelVm) -> None:
        super().__init__(vm.description.device, PciAddress(0, 5), vm.monitor, vm.control)
        self._vm = vm

    async def put_back(self, config: bytes, only: Sequence[tuple[int, int, int]] | None = None) -> int:
        return await self._vm.put_back(config)


class ModelVm:
    """What `vmbus.operations.vm.Vm` wants. `fail` names steps that fail, each time with the next of its errors."""

    name = "demo"
    ended = False
    moved_to: str | None = None
    departure: Any = None

    def __init__(
        self, description: VmDescription, programs: Programs | None = None, folder: Path | None = None
    ) -> None:
        self.description = description
        self.programs = programs or Programs(("qemu",), "11.1.3", "tcg", Path("kernel"), Path("initramfs"))
        self.machine = Machine(
            type="pc-q35-11.1", accelerator="tcg", pci_address="00:05.0", pci_config="", spare_cpus=1
        )
        self.folder = folder
        self.images: dict[Path, Any] = {}
        self.disks: list[DiskState] = []
        self.vcpus = self.ran = True
        self.device = "running"
        self.driven = False
        self.logging = False
        self.migration = "none"
        self.config = CONFIG
        self.bar0: int | None = BAR0
        self.state = b"state"
        self.capabilities = dict.fromkeys(REFUSED_CAPABILITIES, False)
        self.mode = "normal"
        self.steps: list[str] = []
        self.fail: dict[str, list[BaseException]] = {}
        self.dead = False
        self.idle = asyncio.Event()
        self.idle.set()
        self.devices: Sequence[DeviceInstance] = [ModelDevice(self)]

    @property
    def monitor(self) -> Any:
        return self

    @property
    def control(self) -> Any:
        return self

    async def put_back(self, config: bytes) -> int:
        raise NotImplementedError

    def room(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder

    def own_migration(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    async def kill(self) -> None:
        self.ended = True

    def step(self, name: str) -> None:
        self.steps.append(name)
        if self.dead:
            raise EnvironmentProblem("gone")
        if failures := self.fail.get(name):
            raise failures.pop(0)

    # the monitor

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = 1.0
    ) -> Any:
        self.step(command)
        given: Any = arguments or {}
        match command:
            case "query-migrate-capabilities":
                return [{"capability": name, "state": state} for name, state in self.capabilities.items()]
            case "query-migrate-parameters":
                return {"mode": self.mode}
            case "migrate-set-capabilities":
                self.capabilities |= {one["capability"]: one["state"] for one in given["capabilities"]}
        return await self.perform(command, given)

    def set_running(self, running: bool) -> None:
        self.vcpus = running

    async def perform(self, command: str, given: dict[str, Any]) -> Any:
        """All other commands."""
        match command:
            case "stop":
                self.set_running(False)
            case "migrate":
                assert self.migration in ("none", *MIGRATION_ENDS)
                self.ran = await self.running()
                pauses = self.capabilities["pause-before-switchover"]
                assert pauses or not self.ran
                self.set_running(False)
                self.migration = "pre-switchover" if pauses else "completed"
                if file := given["channels"][0]["addr"].get("filename"):
                    write_new(file, b"ram")
            case "migrate-continue":
                assert self.migration == "pre-switchover"
                self.migration = "completed"
            case "migrate_cancel":
                self.migration = "cancelled"
                self.set_running(self.ran)

    async def human(self, line: str, *, timeout: float = 1.0) -> str:
        self.step("barrier")
        return f"0: {MAGIC:#x}"

    async def running(self) -> bool:
        return self.vcpus

    async def cont(self) -> None:
        self.step("cont")
        self.set_running(True)

    async def migration_status(self) -> tuple[str, str]:
        return self.migration, ""

    async def wait_migration(self, wanted: Collection[str], timeout: float, what: str) -> str:
        self.step("wait " + "/".join(sorted(wanted)))
        if self.migration not in wanted:
            raise MigrationFailed(what)
        return self.migration

    @contextlib.contextmanager
    def listen(self, *events: str) -> Iterator[EventListener]:
        yield EventListener(events)

    # the control connection

    async def call(self, command: str, timeout: float = 1.0, **arguments: Any) -> dict[str, Any]:
        if command not in ("status", "pci"):
            self.step(command)
        elif self.dead:
            raise EnvironmentProblem("gone")
        match command:
            case "status":
                return {"phase": self.device, "driven_by_client": self.driven, "description": self.described}
            case "pci":
                return {"config": self.config.hex(), "bar0": self.bar0}
            case "log-start" | "log-stop":
                self.logging = command == "log-start"
            case "pause":
                assert self.device == "running" and not await self.running()
                self.device = "paused"
            case "save":
                assert self.device == "paused"
                return self.saved(arguments["path"])
            case "flush":
                assert self.device == "paused" and self.logging and self.migration == "pre-switchover"
                return {"pages": 6, "bytes": 6 * 4096}
            case "resume":
                assert self.device == "paused"
                await self.take_back(arguments["seconds"])
                self.device = "running"
        return {}

    def saved(self, path: str) -> dict[str, Any]:
        write_new(path, self.state)
        return {
            "sha256": hashlib.sha256(self.state).hexdigest(),
            "bytes": len(self.state),
            "packets": PACKETS,
            "incoming_held": 5,
            "config": self.config.hex(),
            "description": self.described,
        }

    async def take_back(self, seconds: float) -> None:
        """What its providers gave up."""

    @property
    def described(self) -> Any:
        return msgspec.to_builtins(self.description.device)
