"""What a QEMU is that somebody else started, by its own word, and what of that keeps a VMBus device from being saved in
it.

All that stock QEMU needs is here: each line of `MISFITS` is one reason, and docs/plugin.md has them for people.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from vmbus.device.pci import DEVICE_ID, VENDOR_ID
from vmbus.errors import EnvironmentProblem
from vmbus.qemu.connections import QemuMonitor
from vmbus.qemu.pci_replay import PciAddress
from vmbus.qemu.qmp import MIGRATION_ENDS, QmpCommandFailed
from vmbus.util.explaining import explain

ACCELERATORS = ("kvm", "tcg")
MEMORY_MIB = range(128, 65537, 2)
CPUS = range(1, 65)
SLOTS = range(4, 31)
STANDING = frozenset({"paused", "prelaunch"})
"""Run states of a VM that stands, and can go on."""
AWAITING = "inmigrate"
"""That of a QEMU that was started with ``-incoming``."""

_TEMPORARY = re.compile(r"""/vl\.[A-Za-z0-9]{6}(?:"|\Z)""")  # what QEMU calls the files of -snapshot
_MACHINE = re.compile(r"[0-9A-Za-z._ -]{1,64}")


class Backend(msgspec.Struct, frozen=True):
    """A part of the guest's memory."""

    share: bool
    size: int
    id: str = "without a name"


class _Id(msgspec.Struct):
    vendor: int
    device: int


class _Bridge(msgspec.Struct):
    devices: list[_Function] = []


class _Function(msgspec.Struct):
    bus: int
    slot: int
    function: int
    id: _Id
    pci_bridge: _Bridge | None = None


class _Bus(msgspec.Struct):
    devices: list[_Function]


class _Image(msgspec.Struct, frozen=True):
    filename: str = ""


class _Inserted(msgspec.Struct, frozen=True):
    ro: bool
    file: str = ""
    image: _Image = _Image()


class _Drive(msgspec.Struct):
    device: str = ""
    qdev: str = ""
    inserted: _Inserted | None = None


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in bytes."""

    version: str
    name: str
    """Empty if nobody gave it one."""
    arch: str
    machine: str
    """Machine type, such as pc-q35-11.1."""
    accelerator: str
    state: str
    """The run state, e.g. ``running``."""
    memory: int
    backends: list[Backend]
    cpus: int
    room: int
    """CPUs that there can be."""
    functions: list[PciAddress]
    """Where VMBus devices are."""
    disks: list[str]
    """QEMU's own disks that the guest can write to."""
    temporary: list[str]
    """Those of them whose content ends with QEMU."""
    generation_id: bool
    migration: str
    """The status of QEMU's migration; ``none`` if there was none."""
    blockers: list[str]
    """Why QEMU refuses to migrate."""

    @property
    def awaits(self) -> bool:
        """Whether it waits for a stream."""
        return self.state == AWAITING

    @property
    def memory_mib(self) -> int:
        return self.memory >> 20


async def ask_facts(monitor: QemuMonitor) -> Facts:
    """Asks a QEMU what it is. Raises `EnvironmentProblem` for answers that are none, and what the monitor raises."""
    version = (await monitor.execute("query-version"))["qemu"]
    memory = await monitor.execute("query-memory-size-summary")
    drives = _told(await monitor.execute("query-block"), list[_Drive], "disks")
    migration = await monitor.execute("query-migrate")
    disks = [drive for drive in drives if drive.inserted is not None and not drive.inserted.ro]
    try:
        await monitor.execute("query-vm-generation-id")
        generation_id = True
    except QmpCommandFailed:
        generation_id = False
    return Facts(
        version=f"{version['major']}.{version['minor']}.{version['micro']}",
        name=str((await monitor.execute("query-name")).get("name", "")),
        arch=str((await monitor.execute("query-target"))["arch"]),
        machine=str(await monitor.execute("qom-get", {"path": "/machine", "property": "type"})).removesuffix(
            "-machine"
        ),
        accelerator=await _accelerator(monitor),
        state=str((await monitor.execute("query-status"))["status"]),
        memory=int(memory["base-memory"]) + int(memory.get("plugged-memory", 0)),
        backends=_told(await monitor.execute("query-memdev"), list[Backend], "memory"),
        cpus=len(await monitor.execute("query-cpus-fast")),
        room=len(await monitor.execute("query-hotpluggable-cpus")),
        functions=list(_vmbus(_told(await monitor.execute("query-pci"), list[_Bus], "PCI devices"))),
        disks=[_name(drive) for drive in disks],
        temporary=[
            _name(drive)
            for drive in disks
            if drive.inserted and any(map(_TEMPORARY.search, (drive.inserted.file, drive.inserted.image.filename)))
        ],
        generation_id=generation_id,
        migration=str(migration.get("status", "none")),
        blockers=[str(reason) for reason in migration.get("blocked-reasons", [])],
    )


async def _accelerator(monitor: QemuMonitor) -> str:
    try:
        return str((await monitor.execute("query-accelerators"))["enabled"])
    except QmpCommandFailed:  # before 10.2
        return "kvm" if (await monitor.execute("query-kvm"))["enabled"] else "tcg"


def _told(answer: Any, kind: Any, what: str) -> Any:
    try:
        # QEMU's names have hyphens and underscores, and its structures more than is wanted here.
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise EnvironmentProblem(f"what QEMU says of its {what} cannot be understood: {explain(error)}") from error


def _vmbus(buses: list[_Bus]) -> Iterator[PciAddress]:
    def inside(functions: list[_Function]) -> Iterator[PciAddress]:
        for one in functions:
            if (one.id.vendor, one.id.device) == (VENDOR_ID, DEVICE_ID):
                yield PciAddress(one.bus, one.slot, one.function)
            if one.pci_bridge is not None:
                yield from inside(one.pci_bridge.devices)

    for bus in buses:
        yield from inside(bus.devices)


def _name(drive: _Drive) -> str:
    return drive.device or drive.qdev or "without a name"


def _memory(facts: Facts) -> str:
    private = [one.id for one in facts.backends if not one.share]
    if not private and facts.backends:
        return ""
    which = f" ({', '.join(private)})" if private else ""
    return (
        f"guest memory{which} is not shared, so the device server cannot reach it: start QEMU with -object "
        f"memory-backend-memfd,id=mem,size={facts.memory_mib}M,share=on -machine ...,memory-backend=mem"
    )


def _place(facts: Facts) -> str:
    if not facts.functions:
        return (
            'QEMU has no VMBus device: start it with -device \'{"driver": "vfio-user-pci", "socket": {"type": "unix", '
            '"path": "PATH"}}\', with scripts/serve listening at that path before'
        )
    if odd := [str(one) for one in facts.functions if one.bus or one.function or one.device not in SLOTS]:
        return (
            f"the VMBus device at {', '.join(odd)} is not where it can be put back: it can be on bus 0 in a slot from "
            '4 to 30 ("bus": "pcie.0", "addr": "5")'
        )
    return ""


def _size(facts: Facts) -> str:
    if facts.memory_mib not in MEMORY_MIB or facts.memory % (1 << 20):
        return f"guest memory of {facts.memory / 2**20:g} MiB: it can be an even number from 128 to 65536"
    if facts.cpus not in CPUS or facts.room - facts.cpus not in range(65):
        return f"{facts.cpus} CPUs, and room for {facts.room}: there can be 64, and room for 64 more"
    return ""


def _fences(facts: Facts) -> str:
    if facts.accelerator == "tcg" and facts.room < 2:
        return (
            "an emulated machine that can never have a second CPU has no memory fences, and the device server is one: "
            "give it room (-smp 1,maxcpus=2)"
        )
    return ""


def _kind(facts: Facts) -> str:
    if facts.arch != "x86_64":
        return f"QEMU emulates {facts.arch}, and the device is for x86_64"
    if facts.accelerator not in ACCELERATORS:
        return f"QEMU runs under {facts.accelerator}; it can be {' or '.join(ACCELERATORS)}"
    if _MACHINE.fullmatch(facts.machine) is None:
        return f"QEMU's machine is called {facts.machine!r}, and a snapshot cannot be"
    return ""


def _state(facts: Facts) -> str:
    if facts.state in (*STANDING, "running", AWAITING):
        return ""
    if facts.state in ("postmigrate", "finish-migrate"):
        return (
            f"QEMU is {facts.state}: it was saved or migrated, and what it was may run elsewhere; if it does not, "
            "--resume sets it running"
        )
    return f"QEMU is {facts.state}; it has to run, or to be paused"


def _others(facts: Facts) -> str:
    if not facts.awaits and facts.migration not in (*MIGRATION_ENDS, "none"):
        return f"another migration tool is at work: QEMU's migration is {facts.migration}; wait for its end"
    if facts.blockers:
        return f"QEMU refuses to migrate: {'; '.join(facts.blockers)}"
    return ""


def _snapshot_option(facts: Facts) -> str:
    if facts.temporary:
        return f"QEMU was started with -snapshot: what the guest writes to {', '.join(facts.temporary)} ends with it"
    return ""


MISFITS: tuple[Callable[[Facts], str], ...] = (
    _kind,
    _place,
    _memory,
    _size,
    _fences,
    _state,
    _others,
    _snapshot_option,
)
"""Each says why it does not fit, or nothing."""


def misfits(facts: Facts) -> list[str]:
    """All reasons why a VMBus device in such a QEMU cannot be saved; none: it fits."""
    return [reason for check in MISFITS if (reason := check(facts))]
