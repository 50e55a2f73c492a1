"""Commands that bring a saved state: `load` puts another session in the present one's place, `restore-finish` starts
it when the guest is there."""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vmbus.bus.replacing import Restored, channel_name
from vmbus.device import saved
from vmbus.device.description import DeviceDescription
from vmbus.errors import EnvironmentProblem, StateError, UsageError
from vmbus.kmcl.saved import Counts
from vmbus.server.commands import Answer, Arguments, Command
from vmbus.server.files import files_of
from vmbus.server.phase import NEXT, Phase, Step, require
from vmbus.util.pieces import in_turns

if TYPE_CHECKING:
    from vmbus.server.app import DeviceServer

_LOADABLE = tuple(NEXT[Step.LOAD])
_RESTORING = (Phase.RESTORING,)


class LoadArguments(Arguments, frozen=True):
    """`path`, `sha256`: of the file with the state. `description`: of the device in the state, when it is not the
    present one. `files`: the directory with the providers' files that belong to the state. `check`: only say whether
    the state would be taken."""

    path: str
    sha256: str
    description: DeviceDescription | None = None
    check: bool = False
    files: str | None = None


class FinishArguments(Arguments, frozen=True):
    """`frozen`: stand still until `resume`, as after a pause. Until then no provider does anything that another server,
    with the same state, would do once more."""

    frozen: bool = False


def read_state(path: Path, sha256: str | None = None) -> saved.DeviceState:
    """The state in a file, whose digest the caller may know. Raises EnvironmentProblem or StateError."""
    try:
        data = saved.read_file(path)
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"cannot read device state {str(path)!r}: {error}") from error
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise StateError(f"the device state in {path} is not the one meant: its SHA-256 is {found}, not {sha256}")
    return saved.decode(data)


def _require_loadable(server: DeviceServer) -> None:
    require(server.phase, _LOADABLE, "load")
    if server.device.memory.log is not None:
        raise UsageError("load: a dirty log is running, so the device is being saved; end that first (log-stop)")


async def _load(server: DeviceServer, asked: LoadArguments) -> Answer:
    """Take the state in a file for the device's own, and discard what the device is now.

    Everything is checked first: a refusal leaves the server as it was. Then QEMU's part and restore-finish are awaited,
    as with a start from saved state.
    """
    _require_loadable(server)
    async with server.alone("load", _LOADABLE):
        _require_loadable(server)
        started = time.monotonic()
        state = read_state(Path(asked.path), asked.sha256)
        await asyncio.sleep(0)
        counts = saved.count_packets(state)
        wanted = asked.description or server.description

        def before() -> None:
            # What the guest wrote to registers until now was meant for the session that ends.
            server.drain()
            _require_loadable(server)

        def taken() -> None:
            server.step(Step.LOAD)
            server.restore = state
            server.files = None if asked.files is None else Path(asked.files)
            server.held_at_pause = 0

        if asked.check:
            (await in_turns(server.fitting_session(state, wanted, observed=False))).end()
        else:
            await in_turns(server.changing_session(state, wanted, before, taken))
        return {
            "packets": _in_flight(counts),
            "channels": state.bus.open_channels,
            "seconds": time.monotonic() - started,
        }


async def _finish(server: DeviceServer, asked: FinishArguments) -> Answer:
    """QEMU has loaded the guest and the PCI function is back: rebuild everything and run."""
    started = time.monotonic()
    async with server.alone("restore-finish", _RESTORING):
        restored = await _restored(server)
        server.restore = None
        server.note("restored")
        if asked.frozen:
            server.step(Step.RESTORE_FROZEN)
        else:
            server.step(Step.RESTORE)
            server.device.thaw()
    return {
        "packets": _in_flight(restored.packets),
        "dropped": _in_flight(restored.dropped),
        "unsaved": _in_flight(restored.unsaved),
        "renewed": restored.renewed,
        "broken": {channel_name(key): reason for key, reason in restored.broken.items()},
        "channels": sum(channel.active for channel in server.device.channels),
        "seconds": time.monotonic() - started,
    }


async def _restored(server: DeviceServer) -> Restored:
    """In pieces: tools are answered meanwhile, the client afterwards. Raises StateError, EnvironmentProblem."""
    state = server.restore
    assert state is not None
    server.drain()
    config = server.config.snapshot()
    if config != state.config:
        raise StateError(
            "the PCI function was not put back as it was saved: its configuration space is "
            f"{config.hex()}, saved was {state.config.hex()}"
        )
    files = {provider.name: files_of(provider, server.files) for provider in server.providers}
    with server.client_waits():
        return await in_turns(
            saved.restoring(state, server.device, server.providers, files=files, before_start=server.activate)
        )


def _in_flight(counts: Counts) -> dict[str, int]:
    return {"queued": counts.queued, "sent": counts.sent}


COMMANDS = {
    "load": Command(_load, LoadArguments),
    "restore-finish": Command(_finish, FinishArguments, _RESTORING),
}
