"""A model of a VM for operations: its own monitor and control connection, which notes in which order it was asked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp.events import EventListener

from vmbus.errors import Code, EnvironmentProblem, VmbusError
from vmbus.operations.stream import REFUSED_CAPABILITIES
from vmbus.qemu.pci_function import MAGIC
from vmbus.qemu.qmp import MigrationFailed
from vmbus.snapshot.manifest import Machine
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription

BAR0 = 0xFEBF1000


class LogBroken(VmbusError):
    """What the server says when its dirty log cannot be trusted any more."""

    code = Code.LOG_BROKEN


def write_new(path: Path | str, data: bytes) -> None:
    with Path(path).open("xb") as file:
        file.write(data)


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
        self.vcpus = True
        self.device = "running"
        self.migration = "none"
        self.capabilities = dict.fromkeys(REFUSED_CAPABILITIES, False)
        self.mode = "normal"
        self.steps: list[str] = []
        self.fail: dict[str, list[BaseException]] = {}
        self.dead = False
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def monitor(self) -> Any:
        return self

    @property
    def control(self) -> Any:
        return self

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

    async def perform(self, command: str, given: dict[str, Any]) -> Any:
        """All other commands."""

    async def human(self, line: str, *, timeout: float = 1.0) -> str:
        self.step("barrier")
        return f"0: {MAGIC:#x}"

    async def running(self) -> bool:
        return self.vcpus

    async def cont(self) -> None:
        self.step("cont")
        self.vcpus = True

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
