"""What an operation needs of a VM, and that there is one at a time."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

from vmbus.errors import UsageError
from vmbus.qemu.connections import QemuMonitor
from vmbus.qemu.device import DeviceInstance
from vmbus.snapshot.manifest import Machine
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.errors import OperationFailed
from vmbus.vm.own_disks import DiskState

if TYPE_CHECKING:
    from vmbus.operations.image import Image
    from vmbus.operations.migration.source import Source

P = ParamSpec("P")
R = TypeVar("R")


class Vm(Protocol):
    """A VM: `vmbus.operations.machine.VirtualMachine`, or a test's model of one."""

    description: VmDescription
    moved_to: str | None
    """Where it went, once a migration has succeeded: it has ended here then."""
    departure: Source | None
    """The last migration from here, which may be in doubt."""
    disks: list[DiskState]
    """Of one's own, as they were before anything was started."""
    images: dict[Path, Image]
    """The images of checkpoints that QEMU has open, by their directories."""

    @property
    def name(self) -> str: ...
    @property
    def programs(self) -> Programs: ...
    @property
    def machine(self) -> Machine:
        """Without the functions' configurations."""

    @property
    def monitor(self) -> QemuMonitor: ...
    @property
    def devices(self) -> Sequence[DeviceInstance]:
        """In the order of the description."""

    @property
    def idle(self) -> asyncio.Event:
        """Set while no operation is under way that stops or moves the VM."""

    @property
    def ended(self) -> bool: ...
    def room(self, name: str) -> Path:
        """A directory of its own, made if need be."""

    @property
    def tunnel_socket(self) -> Path:
        """Where QEMU's stream goes in when the VM leaves by TLS."""

    def own_migration(self) -> AbstractContextManager[None]:
        """A context in which QEMU may migrate, save and load."""

    async def renew_agent(self, reason: str) -> None:
        """Has the connection to the guest's agent renewed, and fails what is asked of the agent."""

    async def kill(self) -> None:
        """Ends the VM's processes."""


V = TypeVar("V", bound=Vm)


@asynccontextmanager
async def alone(vm: Vm) -> AsyncIterator[None]:
    """Nothing else stops or moves the VM while the block runs; one that is lost in it is ended. Raises `UsageError`."""
    if not vm.idle.is_set():
        raise UsageError(f"VM {vm.name!r} is being saved or migrated already; try again when that is over")
    vm.idle.clear()
    try:
        yield
    except OperationFailed as error:
        if not error.source_alive:
            await vm.kill()
        raise
    finally:
        vm.idle.set()


def operation(
    what: str,
) -> Callable[[Callable[Concatenate[V, P], Awaitable[R]]], Callable[Concatenate[V, P], Coroutine[Any, Any, R]]]:
    """A function that stops or moves its VM (to `what` it): see `alone`. It raises `UsageError` for one that has ended,
    or that waits for a decision about its migration."""

    def decorate(
        function: Callable[Concatenate[V, P], Awaitable[R]],
    ) -> Callable[Concatenate[V, P], Coroutine[Any, Any, R]]:
        @functools.wraps(function)
        async def perform(vm: V, /, *arguments: P.args, **options: P.kwargs) -> R:
            if vm.ended:
                raise UsageError(f"VM {vm.name!r} has ended: there is nothing to {what}")
            if vm.departure is not None and vm.departure.in_doubt:
                raise UsageError(f"VM {vm.name!r} waits for a decision about its migration: resolve that first")
            async with alone(vm):
                return await function(vm, *arguments, **options)

        return perform

    return decorate
