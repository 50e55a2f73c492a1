"""Finding what a user wants to look at: a running VM's device, a server by its control socket, or something saved."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.observe.inspection.document import DEFAULT_PACKETS, Inspection, from_answer
from vmbus.observe.inspection.saved import inspect_path, saved_devices
from vmbus.server.control import ControlClient
from vmbus.util.explaining import check_name
from vmbus.vm.run_directory import running_vms, runtime_base
from vmbus.vm.sockets import Sockets

TIMEOUT = 10.0
"""Seconds that a device server may take to answer. It answers between two turns of its channels."""


class Running:
    """A device server of a running VM, or one at a control socket. `name`: for people. `further`: the control sockets
    of the VM's other devices."""

    def __init__(self, name: str, control: Path, further: Sequence[Path] = ()) -> None:
        self.name = name
        self._control = control
        self._further = further

    @classmethod
    def vm(cls, name: str) -> Running:
        """That of the first device of VM `name`, whether it runs or not."""
        sockets = Sockets(runtime_base() / check_name(name))
        return cls(name, sockets.control, sockets.controls[1:])

    async def devices(self) -> list[tuple[str, Running]]:
        """Each of the VM's devices, with its name; of an only one the name is empty. Raises as `look`."""
        if not self._further:
            return [("", self)]
        found = [Running(self.name, control) for control in (self._control, *self._further)]
        return [(str((await one._ask("status"))["device"]), one) for one in found]

    @property
    def control(self) -> Path:
        """Where the server is asked."""
        return self._control

    async def look(self, packets: int = DEFAULT_PACKETS, channels: Sequence[str] | None = None) -> Inspection:
        """The device as it is now; `packets` of each sort are listed for each channel, of `channels` only.

        Raises EnvironmentProblem when there is no server, WaitTimeout when it does not answer, StateError when it is
        of another version, ControlError.
        """
        arguments = {} if channels is None else {"channels": list(channels)}
        return from_answer(await self._ask("inspect", packets=packets, **arguments), self.name)

    async def _ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        client = ControlClient(self._control)
        try:
            return await client.call(command, timeout=TIMEOUT, **arguments)
        finally:
            client.close()


@dataclass(frozen=True)
class Saved:
    """A device of something saved. `index`: which one of several; the first is 0."""

    path: Path
    index: int = 0

    async def devices(self) -> list[tuple[str, Saved]]:
        """As of `Running`. Raises StateError as a look does."""
        return [(name, Saved(self.path, index)) for index, name in enumerate(saved_devices(self.path))]


Target = Running | Saved


async def chosen(target: Target, device: str | None) -> list[Target]:
    """The devices that are meant, of a VM's or a snapshot's: by name, or by number from 1 on; None: all of them.

    Raises UsageError that says what there is, and as a look does.
    """
    found: Sequence[tuple[str, Target]] = await target.devices()
    if device is None:
        return [one for _, one in found]
    for number, (name, one) in enumerate(found, 1):
        if device in (name, str(number)) and device:
            return [one]
    there = ", ".join(name for name, _ in found if name) or "only one"
    raise UsageError(f"there is no device {device!r}; there: {there}")


def find(word: str | None, *, names: Sequence[str] | None = None) -> Target:
    """What a word on the command line means: the VM of that name, else what is at that path. None: the only VM.

    A word with a slash is always a path; a path of a control socket is the server behind it. Raises UsageError.
    """
    names = running_vms() if names is None else names
    if word is None:
        if len(names) == 1:
            return Running.vm(names[0])
        if names:
            raise UsageError(f"several VMs are running ({', '.join(names)}): say which one")
        raise UsageError("no VM is running; name a snapshot to look into, or start a VM with scripts/run-vm")
    if "/" not in word and word in names:
        return Running.vm(word)
    path = Path(word)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = 0
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"cannot look at {word!r}: {error}") from error
    if stat.S_ISSOCK(mode):
        return Running(word, path)
    if not mode and "/" not in word:
        running = ", ".join(names) or "none"
        raise UsageError(f"{word!r} is neither a running VM (running: {running}) nor a snapshot in this directory")
    return Saved(path)


async def look(target: Target, packets: int | None = None, channels: Sequence[str] | None = None) -> Inspection:
    """The document. `packets`: how many are listed; None: of something saved all. Raises what its parts raise."""
    if isinstance(target, Running):
        return await target.look(DEFAULT_PACKETS if packets is None else packets, channels)
    document = inspect_path(target.path, target.index)
    for channel in document.channels:
        most = 0 if channels is not None and channel.name not in channels else packets
        if most is not None:
            channel.omitted = max(0, len(channel.packets) - most)
            del channel.packets[most:]
    return document
