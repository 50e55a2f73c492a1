"""From a VM description to QEMU's arguments: a pure function, so that a test can look at every word of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.provision import Provisioned
from vmbus.provision.debian_system import LABEL
from vmbus.vm.description import VmDescription
from vmbus.vm.own_disks import DiskState, Layer
from vmbus.vm.own_guest import OwnDisk, hostfwd
from vmbus.vm.sockets import Sockets, numbered

AGENT_PORT = "org.vmbus.agent"
"""Name of the virtio-serial port that the guest's agent opens."""

_SERIAL_SLOT = 3  # the virtio-serial controller; fixed, so that a restored VM has it in the same place


@dataclass(frozen=True)
class Programs:
    """What the set-up found or made: everything that a VM needs from this machine.

    `qemu` is the command to put before QEMU's own arguments (a private root needs its loader in front);
    `libvfio_user` is None if the server should look for the library itself.
    """

    qemu: tuple[str, ...]
    qemu_version: str
    accelerator: str
    kernel: Path | None
    initramfs: Path | None
    """What QEMU boots; None: nothing of the kind, as with a disk of one's own."""
    libvfio_user: Path | None = None
    no_linux_driver: str = ""
    """Why the guest's image cannot have `driver = "linux"`; empty: it can."""
    debian: Path | None = None
    """An image with a Debian, to be copied for guests that have none yet (`vmbus.vm.root`)."""
    foreign: bool = False
    """QEMU is none that we start: its owner knows how (`vmbus.operations.attach`)."""
    extra: tuple[str, ...] = ()
    """Arguments added to QEMU's own: for measurements against its devices. They are in no snapshot."""


def programs_from(provisioned: Provisioned) -> Programs:
    """What a VM needs of a finished set-up."""
    return Programs(
        qemu=provisioned.qemu.argv,
        qemu_version=provisioned.qemu.version_text,
        accelerator=provisioned.accelerator.name,
        kernel=provisioned.kernel,
        initramfs=provisioned.image,
        libvfio_user=provisioned.libvfio_user,
        no_linux_driver=provisioned.kernel_module_problem,
    )


def runs_under(accelerator: str, programs: Programs) -> bool:
    """Whether a VM that was saved under an accelerator can run here: TCG is everywhere, KVM where it is used."""
    return accelerator in ("tcg", programs.accelerator)


def machine_version(qemu_version: str) -> str:
    """The versioned machine type that the alias ``q35`` means in this QEMU: 11.1.3 has ``pc-q35-11.1``.

    A snapshot records it, since RAM and device layouts belong to it.
    """
    parts = qemu_version.split(".")
    if len(parts) < 2 or not (parts[0].isdigit() and parts[1].isdigit()):
        raise UsageError(f"{qemu_version!r} is not a QEMU version such as 11.1.3")
    return f"pc-q35-{parts[0]}.{parts[1]}"


_MACHINE = re.compile(r"pc-q35-(\d{1,3})\.(\d{1,3})")


def serves_machine(qemu_version: str, machine: str) -> bool:
    """Whether this QEMU has that machine type: a later one keeps those of earlier ones, and takes their streams."""
    here, there = (_MACHINE.fullmatch(one) for one in (machine_version(qemu_version), machine))
    if here is None or there is None:
        return False
    return (int(here[1]), int(here[2])) >= (int(there[1]), int(there[2]))


def default_spare_cpus(cpus: int, accelerator: str) -> int:
    """CPUs that a new machine of so many gets room for, and does not have.

    QEMU emulates a machine that can never have a second CPU without atomicity: the guest's locked instructions, which
    are its fences, become plain ones. But the device server is a second CPU, and the rings need fences on both sides.
    The guest sees the room, and no CPU in it. QEMU's stream only fits a machine with the same, so it is recorded.
    """
    return 1 if accelerator == "tcg" and cpus == 1 else 0


def with_available_driver(description: VmDescription, programs: Programs) -> tuple[VmDescription, str]:
    """The description as this machine can serve it, and a sentence if that is with another driver than it says.

    Raises EnvironmentProblem if the other driver would be of no use.
    """
    if not description.guest.linux or not programs.no_linux_driver or description.foreign:
        return description, ""
    if description.guest.root:
        raise EnvironmentProblem(
            f"the guest's root file system is on a disk for Linux's own drivers, and they cannot be used: "
            f"{programs.no_linux_driver}"
        )
    guest = msgspec.structs.replace(description.guest, driver=msgspec.UNSET)
    notice = f"the guest has the userspace driver instead of Linux's own: {programs.no_linux_driver}"
    return msgspec.structs.replace(description, guest=guest), notice


AUDIT_WORD = "vmbus.audit=on"
"""On the guest kernel's command line: the agent has test drivers keep audit records."""


def linux_words(description: VmDescription) -> list[str]:
    """Words for the guest's init: which modules to load, and which function is for Linux's own drivers."""
    return [f"vmbus.driver={description.guest.driver}", f"vmbus_pci.function=0000:00:{description.slot:02x}.0"]


def function_words(description: VmDescription) -> list[str]:
    """A word for the guest's programs, if there are several devices: which one is in which slot."""
    if not description.further:
        return []
    names = zip(description.all_devices, description.slots, strict=True)
    return ["vmbus.functions=" + ",".join(f"{device.name}@{slot:02x}" for device, slot in names)]


def kernel_arguments(description: VmDescription, *, audit: bool = False) -> str:
    """The guest kernel's command line. That of a kernel of one's own is nobody else's affair."""
    own = description.mine
    if own.foreign:
        return "console=ttyS0" if own.append is None else own.append
    words = [
        "console=ttyS0",
        "rdinit=/init",
        "panic=-1",
        # The kernel counts the timer's interrupts for some milliseconds of the CPU's time, and panics without any: on a
        # busy host, an emulated machine may have had no turn to raise them yet.
        "no_timer_check",
        # A guest that is emulated would test its ciphers for a sixth of the time that its boot takes.
        "cryptomgr.notests",
        "quiet",
        *(linux_words(description) if description.guest.linux else []),
        *(
            ["intel_iommu=on", "iommu=pt", f"hugepages={description.guest.huge_pages}"]
            if description.guest.vfio
            else []
        ),
        *function_words(description),
        *([f"vmbus.root={LABEL}"] if description.guest.root else []),
        *([AUDIT_WORD] if audit else []),
        *description.guest.kernel_arguments,
        *([own.append] if own.append else []),
    ]
    return " ".join(words)


def machine_of(description: VmDescription, qemu_version: str) -> str:
    """The versioned type of a new machine: see `machine_version`."""
    wanted = description.mine.machine_type or "q35"
    return machine_version(qemu_version) if wanted == "q35" else wanted


def qemu_arguments(
    description: VmDescription,
    programs: Programs,
    run_directory: Path,
    *,
    qmp: str | None = None,
    incoming: bool = False,
    with_device: bool = True,
    audit: bool = False,
    spare_cpus: int | None = None,
    machine_type: str | None = None,
    generation_id: bool = True,
    gdb: str | None = None,
    disks: Sequence[DiskState] = (),
) -> list[str]:
    """QEMU's whole command for a description, ready to be executed.

    `qmp` replaces the supervisor's monitor socket by another chardev setting (such as an inherited descriptor);
    `incoming` makes it wait, paused, for a state to be loaded; without `with_device` the VMBus devices are left out
    (for tests of the rest). What a machine has that was made once, if it is not that of a new one: `spare_cpus`, the
    number of CPUs to leave room for; `machine_type`; `generation_id`, by which a guest notices that it is a copy.
    `gdb`: where QEMU's stub for it listens, as in `OwnGuest.gdb`. `disks`: what was found of the description's.
    """
    paths = Sockets(run_directory)
    # Appended to, so that it can be shortened while QEMU has it open (qemu/logs.py).
    console_log = f"logfile={_escape(paths.console_log)},logappend=on"
    memory = f"{description.memory_mib}M"
    own = description.mine
    machine = f"{machine_type or machine_of(description, programs.qemu_version)},memory-backend=mem"
    if programs.accelerator == "kvm":
        machine += ",kernel-irqchip=split"  # interrupt remapping needs it
    if own.by_firmware:
        machine += ",graphics=off"  # firmware and boot loader are on the console, too
    machine += own.machine_properties
    cpu = own.cpu or "qemu64"
    if programs.accelerator == "tcg" and own.cpu is None:
        cpu += ",+rdrand"  # else the guest collects randomness for a second before Python may start
    if spare_cpus is None:
        spare_cpus = default_spare_cpus(description.cpus, programs.accelerator)
    room = f",maxcpus={description.cpus + spare_cpus}" if spare_cpus else ""
    arguments = [
        *programs.qemu,
        *("-name", f"guest={description.name}"),
        *("-accel", programs.accelerator),
        *("-cpu", cpu),
        *("-machine", machine),
        *("-m", memory),
        *("-smp", f"{description.cpus}{room}"),
        # Shared, or the server gets no descriptor of guest memory to map.
        *("-object", f"memory-backend-memfd,id=mem,size={memory},share=on"),
        "-no-user-config",
        "-nodefaults",
        *("-display", "none"),
        *("-msg", "timestamp=on"),
        # Before the device that it translates for. Caching mode makes the guest announce every mapping. Linux's own
        # drivers tell the device physical addresses, and need none.
        *(["-device", "intel-iommu,caching-mode=on,intremap=on"] if description.guest.vfio else []),
        # Another one in each QEMU: after a restore the guest's random numbers begin anew, in each clone in another way.
        *(["-device", "vmgenid,guid=auto,id=generation"] if generation_id else []),
        *("-chardev", f"{_socket_chardev('console', paths.console)},{console_log}"),
        *("-serial", "chardev:console"),
        *("-chardev", qmp or _socket_chardev("qmp", paths.qmp)),
        *("-mon", "chardev=qmp,mode=control"),
        *("-chardev", _socket_chardev("qmp-tools", paths.qmp_tools)),
        *("-mon", "chardev=qmp-tools,mode=control"),
        *("-device", f"virtio-serial-pci,id=serial,addr={_SERIAL_SLOT}"),
        *("-chardev", _socket_chardev("agent", paths.agent)),
        *("-device", f"virtserialport,id=agent-port,bus=serial.0,nr=1,chardev=agent,name={AGENT_PORT}"),
    ]
    for index, slot in enumerate(description.slots if with_device else ()):
        device = {
            "driver": "vfio-user-pci",
            "id": numbered("vmbus", index),
            "socket": {"type": "unix", "path": str(paths.vfio_of(index))},
            "addr": f"{slot:x}",
            "rombar": 0,
        }
        arguments += ["-device", json.dumps(device)]
    if programs.kernel is not None:
        arguments += ["-kernel", str(programs.kernel), "-append", kernel_arguments(description, audit=audit)]
    if programs.initramfs is not None:
        # Behind a comma QEMU looks for another module of a multiboot kernel.
        arguments += ["-initrd", _escape(programs.initramfs)]
    arguments += [*_own_devices(description, disks), *_gdb_stub(gdb, paths), *own.qemu_args]
    arguments += programs.extra
    if incoming:
        arguments += ["-S", "-incoming", "defer"]
    return arguments


def disk_node(number: int) -> str:
    """The name of the block node of a disk of one's own."""
    return f"disk{number}"


def _own_devices(description: VmDescription, disks: Sequence[DiskState]) -> list[str]:
    """Disks and cards of one's own: from the highest slot downwards, so that nothing else moves with their number."""
    slots = iter(slot for slot in range(30, _SERIAL_SLOT, -1) if slot not in description.slots)
    found: list[str] = []

    def option(name: str, value: dict[str, object]) -> None:
        found.extend((name, json.dumps(value)))

    own = description.mine
    for number, disk in enumerate(own.disks):
        node = disk_node(number)
        option("-blockdev", disk_blockdev(disk, node, disks[number].behind if disks else []))
        device: dict[str, object] = {"id": f"{node}-device", "drive": node, "bootindex": number + 1}
        if disk.bus == "sata":
            option("-device", {"driver": "ide-hd", "bus": f"ide.{number}", **device})
        else:
            option("-device", {"driver": "virtio-blk-pci", "addr": f"{next(slots):x}", **device})
    for number, nic in enumerate(own.nics):
        name = f"nic{number}"
        forwards = [{"str": hostfwd(rule)} for rule in nic.hostfwd]
        option("-netdev", {"type": nic.kind, "id": name, **({"hostfwd": forwards} if forwards else {})})
        card = {"driver": nic.model, "id": f"{name}-device", "netdev": name, "addr": f"{next(slots):x}"}
        option("-device", {**card, "romfile": ""})
    return found


def disk_blockdev(disk: OwnDisk, node: str, behind: Sequence[Layer]) -> dict[str, object]:
    """What QEMU opens for a disk, with every file behind it: none that only an image names."""
    found = _image(disk.driver, disk.file, disk.read_only, node)
    image = found
    for number, layer in enumerate(behind):
        image["backing"] = _image(layer.format, layer.file, True, f"{node}-{number + 1}")
        image = image["backing"]
    return found


def _image(driver: str, file: str, read_only: bool, node: str) -> dict[str, Any]:
    common: dict[str, object] = {"read-only": read_only, "discard": "unmap"}
    protocol: dict[str, object] = {"driver": "file", "filename": file, "node-name": f"{node}-file", **common}
    found: dict[str, object] = {"driver": driver, "node-name": node, "file": protocol, **common}
    return {**found, "backing": None} if driver == "qcow2" else found


def _gdb_stub(gdb: str | None, paths: Sockets) -> list[str]:
    if gdb is None:
        return []
    where = f"unix:{_escape(paths.gdb)},server=on,wait=off" if gdb == "socket" else f"tcp:127.0.0.1:{gdb}"
    return ["-gdb", where]


def _socket_chardev(name: str, path: Path) -> str:
    return f"socket,id={name},path={_escape(path)},server=on,wait=off"


def _escape(path: Path) -> str:
    """A path inside a comma-separated option: QEMU reads a doubled comma as one."""
    return str(path).replace(",", ",,")
