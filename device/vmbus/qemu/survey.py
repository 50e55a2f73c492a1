"""Looks at a QEMU and at device servers that somebody else started: whether they fit, and belong together."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vmbus.device.description import DeviceDescription
from vmbus.device.pci import INTERRUPT_LINE
from vmbus.errors import EnvironmentProblem, VmbusError, os_error
from vmbus.qemu.connections import QemuMonitor
from vmbus.qemu.facts import Facts, ask_facts, misfits
from vmbus.qemu.pci_replay import ADDRESS_PORT, PciAddress, Write, parse_port, read_lines, write_lines
from vmbus.qemu.qmp import MIGRATION_ENDS, Monitor, give_migration_up
from vmbus.server.control import CONTROL_SUFFIX, ControlClient

GREETING_TIMEOUT = 5.0
"""Seconds for a monitor to greet: one that somebody else uses does not."""
_ANSWER_TIMEOUT = 10.0
_CREDENTIALS = struct.Struct("3i")
_BAR0 = re.compile(r"vfio-user:(.+?)(?<! base) BAR 0\[0\]")
_ONE_CLIENT = (
    "; a monitor serves one client at a time: give QEMU one that nobody else uses (-qmp unix:PATH,server=on,wait=off)"
)
_KNOCKS = 2  # bytes of chance by which a device is told from others


class DoesNotFit(EnvironmentProblem):
    """A QEMU that somebody else started, or its device server, is not as it has to be; the message has all reasons."""

    def __init__(self, reasons: Sequence[str]) -> None:
        if len(reasons) > 1:
            text = "this does not fit:\n" + "\n".join(f"  * {reason}" for reason in reasons)
        else:
            text = f"this does not fit: {reasons[0]}"
        super().__init__(text)


@dataclass(frozen=True)
class Survey:
    """What was found: the devices in the order of their slots."""

    facts: Facts
    controls: list[Path]
    devices: list[DeviceDescription]


async def survey(qmp: Path, controls: Sequence[Path], *, awaits: bool = False, resume: bool = False) -> Survey:
    """Looks at the QEMU with a monitor at `qmp` and at the servers with these control sockets.

    `awaits`: they have to await a state, and not to run. `resume`: what an operation that was interrupted has left
    standing is set running first. The vCPUs stop for a moment: it is tried whether what is done to the device in QEMU
    reaches these servers. Without control sockets they are beside QEMU's ends of the devices, where scripts/serve puts
    them. Raises `DoesNotFit` with all reasons, and what the monitor raises.
    """
    own = os.getuid()
    reasons: list[str] = []
    async with _monitor(qmp, own, reasons) as monitor:
        controls = controls or await usual_controls(monitor)
        for path in controls:
            with os_error(f"there is no device server at {path} (--control PATH says another place)"):
                uid = os.stat(path).st_uid  # noqa: PTH116 - nothing to wait for
            if uid != own:
                reasons.append(_of_another("the device server", path, uid, own))
        clients = [ControlClient(path) for path in controls]
        try:
            if resume and not reasons:
                await run_on(monitor, clients)
            facts = await ask_facts(monitor)
            statuses = [await client.call("status", _ANSWER_TIMEOUT) for client in clients]
            reasons += misfits(facts)
            if facts.awaits != awaits:
                reasons.append(_NOT_AWAITING if awaits else _AWAITING)
            reasons += [
                reason
                for path, status in zip(controls, statuses, strict=True)
                if (reason := _server(path, status, awaits=awaits))
            ]
            if facts.functions and len(facts.functions) != len(controls):
                reasons.append(
                    f"QEMU has {len(facts.functions)} VMBus devices ({', '.join(map(str, facts.functions))}), and "
                    f"{len(controls)} control sockets were given: --control PATH for each"
                )
            if reasons:
                raise DoesNotFit(reasons)
            addresses = sorted(facts.functions, key=lambda one: one.device)
            order = await matched(monitor, addresses, clients)
        finally:
            for client in clients:
                client.close()
    descriptions = [msgspec.convert(status["description"], DeviceDescription) for status in statuses]
    return Survey(facts, [controls[index] for index in order], [descriptions[index] for index in order])


_AWAITING = "QEMU awaits a stream (-incoming): a snapshot is put into it with --restore, a migration with --receive"
_NOT_AWAITING = "QEMU does not await a stream: start it with -S -incoming defer"


def _server(path: Path, status: dict[str, Any], *, awaits: bool) -> str:
    phase = status.get("phase")
    if not status.get("connected"):
        return f"no QEMU is connected to the device server at {path}"
    if awaits:
        if phase != "awaiting":
            return f"the device server at {path} is {phase}: start it with scripts/serve --await-state"
        return ""
    if phase in ("pausing", "paused"):
        return (
            f"the device server at {path} is {phase}: an operation was interrupted. If it was no migration that was "
            "handed over, --resume sets the VM running again"
        )
    return "" if phase == "running" else f"the device server at {path} is {phase}: it needs --restore SNAPSHOT"


def _of_another(what: str, path: Path, uid: int, own: int) -> str:
    return (
        f"{what} ({path}) is of user {uid}, and this is user {own}: QEMU, the device server and this command read and "
        "write the same files; run this as that user (setpriv, runuser)"
    )


@contextlib.asynccontextmanager
async def _monitor(path: Path, own: int, reasons: list[str]) -> AsyncIterator[Monitor]:
    """A connection to the monitor; a reason more if its QEMU is of another user."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        with os_error(f"cannot connect to QEMU's monitor at {path}"):
            try:
                connection.connect(os.fspath(path))
            except BlockingIOError as error:
                raise EnvironmentProblem(f"others wait for QEMU's monitor at {path} already{_ONE_CLIENT}") from error
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(credentials)
        if uid != own:
            reasons.append(_of_another("QEMU", path, uid, own))
        monitor = Monitor(f"QEMU at {path}")
        try:
            await monitor.connect(connection, GREETING_TIMEOUT)
        except VmbusError as error:
            raise EnvironmentProblem(f"{error}{_ONE_CLIENT}") from error
    except BaseException:
        connection.close()
        raise
    try:
        yield monitor
    finally:
        await monitor.close()


async def usual_controls(monitor: QemuMonitor) -> list[Path]:
    """Where the control sockets are of the servers that QEMU's devices are connected to, unless somebody has said
    otherwise. QEMU names the memory of such a device by its socket."""
    found = []
    for folder in ("/machine/peripheral", "/machine/peripheral-anon"):
        for one in await monitor.execute("qom-list", {"path": folder}):
            if one.get("type") != "child<vfio-user-pci>":
                continue
            for part in await monitor.execute("qom-list", {"path": f"{folder}/{one['name']}"}):
                if (name := _BAR0.fullmatch(str(part.get("name", "")))) is not None:
                    path = name[1].replace("\\x2f", "/")
                    found.append(Path(path).with_name(Path(path).name + CONTROL_SUFFIX))
    return found


async def run_on(monitor: QemuMonitor, clients: Sequence[ControlClient]) -> None:
    """Sets a VM running that an operation has left standing when it was killed. Raises what its parts raise."""
    status, _ = await monitor.migration_status()
    if status not in (*MIGRATION_ENDS, "none"):
        await give_migration_up(monitor)
    for client in clients:
        if (await client.call("status", _ANSWER_TIMEOUT))["phase"] in ("pausing", "paused"):
            await client.call("resume")
        with contextlib.suppress(VmbusError):
            await client.call("log-stop")
    await monitor.cont()


async def matched(monitor: QemuMonitor, addresses: Sequence[PciAddress], clients: Sequence[ControlClient]) -> list[int]:
    """Which of the servers has the device at each of these addresses: their numbers.

    A byte of chance is written into a register of the function that nothing depends on, and looked for at the servers;
    then what was there is put back. Raises `DoesNotFit` for a device that none of them has.
    """
    ran = await monitor.running()
    if ran:
        await monitor.execute("stop")
    try:
        found = []
        for address in addresses:
            candidates = list(range(len(clients)))
            before = await _line(monitor, address)
            try:
                for byte in random.sample([one for one in range(1, 255) if one != before], _KNOCKS):
                    await _line(monitor, address, byte)
                    candidates = [index for index in candidates if await _seen(clients[index]) == byte]
            finally:
                await _line(monitor, address, before)
            if len(candidates) != 1:
                raise DoesNotFit(
                    [f"no device server that was named has the device at {address}: it is that of another VM"]
                )
            found += candidates
        return found
    finally:
        if ran:
            await monitor.cont()


async def _line(monitor: QemuMonitor, address: PciAddress, byte: int | None = None) -> int:
    """The interrupt line register of a function, which is firmware's notice for the system; written if `byte` is
    given."""
    latched = parse_port(await monitor.human(f"i /w {ADDRESS_PORT:#x}"))
    write = Write(INTERRUPT_LINE, 1, byte or 0)
    try:
        if byte is not None:
            for line in write_lines(address, write):
                await monitor.human(line)
        select, read = read_lines(address, write)
        await monitor.human(select)
        return parse_port(await monitor.human(read))
    finally:
        await monitor.human(f"o /w {ADDRESS_PORT:#x} {latched:#x}")


async def _seen(client: ControlClient) -> int:
    config = bytes.fromhex((await client.call("pci", _ANSWER_TIMEOUT))["config"])
    return config[INTERRUPT_LINE]
