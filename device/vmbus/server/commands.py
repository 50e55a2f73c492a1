"""What tools may ask of a device server: a command is a struct of arguments and a function.

`Seconds` and the like are what is checked of arguments; a function gets them decoded. Those of other rooms are plugged
in with their instruments, see `vmbus.server.instruments`.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec

import vmbus
from vmbus.errors import UsageError
from vmbus.native.choice import CORE
from vmbus.server.phase import Phase
from vmbus.util.complaints import COMPLAINTS
from vmbus.util.explaining import explain

if TYPE_CHECKING:
    from vmbus.server.app import DeviceServer

Answer = dict[str, Any]

LONGEST_PAUSE = 3600.0
"""Seconds that a command may be told to wait."""
Seconds = Annotated[float, msgspec.Meta(ge=0, le=LONGEST_PAUSE)]


class Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """None, for commands that take none; the base of the others."""


class Command(NamedTuple):
    """`do` is called with the server and `arguments`, decoded; `phases`: in which the server has to be, any if none."""

    do: Callable[[DeviceServer, Any], Awaitable[Answer]]
    arguments: type[Arguments] = Arguments
    phases: tuple[Phase, ...] = ()

    def decode(self, name: str, arguments: dict[str, Any]) -> Arguments:
        """Raises UsageError that names the command and the argument."""
        try:
            return msgspec.convert(arguments, self.arguments)
        except msgspec.ValidationError as error:
            raise UsageError(f"{name}: {explain(error, self.arguments)}") from error


def facts(server: DeviceServer) -> Answer:
    """What `status` and an inspection say alike of the process and its transport."""
    context = server.context
    return {
        "version": vmbus.__version__,
        "libvfio_user": server.library.description,
        "pid": os.getpid(),
        "phase": server.phase.value,
        "connected": context is not None and context.attached,
        "driven_by_client": context is not None and context.driven_by_client,
        "migration": {"state": server.driven.state.name.lower(), "complete": server.driven.complete},
        "resets": server.device.resets,
        "core": CORE,
        "requests": server.device.allowance.summary(),
        "longest_turn": server.turns.summary(),
        "complaints": COMPLAINTS.summary(),
    }


async def _status(server: DeviceServer, _: Arguments) -> Answer:
    device, session = server.device, server.session
    return facts(server) | {
        "device": server.description.name,
        "bus": device.bus.state.value,
        "packets": {
            "queued": sum(channel.packets_queued for channel in device.channels),
            "sent": sum(channel.packets_sent for channel in device.channels),
        },
        "incoming_held": sum(len(channel.outstanding) for channel in device.channels),
        "internal_errors": device.internal_errors,
        "providers": session.status(),
        "faults": session.faults(),
        "bounds": session.bounds(),
        "description": msgspec.to_builtins(server.description),
    }


async def _pci(server: DeviceServer, _: Arguments) -> Answer:
    return {"config": server.config.snapshot().hex(), "bar0": server.config.bar0_address}


async def _log_start(server: DeviceServer, _: Arguments) -> Answer:
    server.device.memory.start_log()
    return {}


async def _log_stop(server: DeviceServer, _: Arguments) -> Answer:
    server.device.memory.stop_log()
    return {}


async def _stop(server: DeviceServer, _: Arguments) -> Answer:
    server.loop.call_soon(server.stop)
    return {}


COMMANDS = {
    "status": Command(_status),
    "pci": Command(_pci),
    "log-start": Command(_log_start),
    "log-stop": Command(_log_stop),
    "stop": Command(_stop),
}
