"""Starts the processes of an instance, QEMU and a server for each device, and its connections to them."""

from __future__ import annotations

import contextlib
import socket
import sys
from asyncio import StreamReader
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vmbus.errors import EnvironmentProblem, os_error
from vmbus.places import import_path
from vmbus.providers.disk.image import CLONE_VARIABLE
from vmbus.qemu.agent import decode_line
from vmbus.qemu.device import DeviceInstance, each
from vmbus.vm.command_line import qemu_arguments
from vmbus.vm.process import Child
from vmbus.vm.sockets import numbered

if TYPE_CHECKING:
    from vmbus.qemu.instance import Instance

START_TIMEOUT = 60.0
"""Seconds that the server and QEMU have for coming up, each."""


async def start_servers(vm: Instance, states: Sequence[Path] | None, files: Path | None, *, awaiting: bool) -> None:
    """The device servers, when they listen: from power-on, from their `states` (`files`: the directory with their
    providers' files), or `awaiting` those that the command `load` brings."""
    await each(vm.devices, lambda device: _start_server(vm, device, states, files, awaiting=awaiting))


async def _start_server(
    vm: Instance, device: DeviceInstance, states: Sequence[Path] | None, files: Path | None, *, awaiting: bool
) -> None:
    index = vm.devices.index(device)
    file = vm.run_directory / numbered("device.json", index)
    with os_error(f"cannot write {file}"):
        file.write_bytes(device.description.to_json())
    capture = vm.capture and vm.capture.absolute()
    options: dict[str, object] = {
        "--socket": vm.paths.vfio_of(index),
        "--control": vm.paths.control_of(index),
        "--libvfio-user": vm.programs.libvfio_user,
        "--restore": states and states[index],
        "--files": files,
        "--audit": vm.audit and vm.audit.absolute(),
        "--capture": capture and capture.with_name(numbered(capture.name, index)),
        "--external": vm.external if vm.capture else None,
    }
    arguments = [sys.executable, "-m", "vmbus.cli.serve", str(file), *(["--await-state"] if awaiting else [])]
    for name, value in options.items():
        arguments += [] if value is None else [name, str(value)]
    environment = {"PYTHONPATH": import_path()}
    if vm.clone:
        environment[CLONE_VARIABLE] = str(vm.run_directory.room("disks"))
    which = f" for {device.name!r}" if len(vm.devices) > 1 else ""
    device.server = await Child.spawn(
        f"the device server{which} of VM {vm.name!r}",
        arguments,
        vm.run_directory / numbered("server.log", index),
        environment=environment,
        capture_stdout=True,
    )
    await device.server.guard(_listening(vm, device.server), "the device server to listen", START_TIMEOUT)


async def _listening(vm: Instance, server: Child) -> None:
    """Reads the server's standard output up to its word that it listens; the rest goes to its log."""
    output = server.process.stdout
    assert output is not None
    while line := await output.readline():
        message = decode_line(line)
        if message is not None and message.get("event") == "listening":
            vm.background(_drain(output, server.log))
            return
        with contextlib.suppress(OSError), server.log.open("ab") as log:  # a full disk loses the log, no more
            log.write(line)
    await server.exited  # it closed its output: the guard around us reports how it ended
    raise EnvironmentProblem("the device server ended before it listened")


async def _drain(stream: StreamReader, log: Path) -> None:
    """Moves what a process still prints into its log."""
    with log.open("ab", buffering=0) as file:
        while data := await stream.read(65536):
            with contextlib.suppress(OSError):
                file.write(data)


async def start_qemu(vm: Instance, *, incoming: bool) -> None:
    """QEMU, when its monitor answers."""
    # The monitor's socket is made here and handed over, so that there is never a moment at which it is not there
    # yet: we connect at once, and if QEMU dies the connection breaks at once.
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(str(vm.paths.qmp))
        vm.paths.qmp.chmod(0o600)
        listener.listen(1)
        vm.paths.console_log.unlink(missing_ok=True)  # of an earlier start: QEMU appends
        arguments = qemu_arguments(
            vm.description,
            vm.programs,
            vm.run_directory.path,
            qmp=f"socket,id=qmp,fd={listener.fileno()},server=on,wait=off",
            incoming=incoming,
            audit=vm.audit is not None,
            spare_cpus=vm.machine.spare_cpus,
            machine_type=vm.machine.type,
            generation_id=vm.machine.generation_id,
            gdb=vm.gdb,
            disks=vm.disks,
        )
        vm.qemu = await Child.spawn(
            f"QEMU of VM {vm.name!r}", arguments, vm.run_directory / "qemu.log", pass_fds=[listener.fileno()]
        )
        vm.qemu.witness = ("the guest's console", vm.paths.console_log)
    finally:
        listener.close()
    await vm.guard(vm.monitor.connect(vm.paths.qmp, START_TIMEOUT), "QEMU to start", START_TIMEOUT)
