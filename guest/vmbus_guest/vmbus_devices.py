"""Devices of Linux's own VMBus, in sysfs, and how a program gets one: bound to `uio_hv_generic`, as /dev/uioN.

While it is bound a device costs the kernel memory, up to 47 MiB for buffers that are made for network cards. So it is
bound when it is used, and given back afterwards.
"""

# os instead of pathlib: imports are slow in an emulated guest.
# ruff: noqa: PTH112, PTH119, PTH208

from __future__ import annotations

import fcntl
import os
from typing import NamedTuple
from uuid import UUID

from vmbus.errors import EnvironmentProblem
from vmbus_guest.kernel_files import link_name, read_text, write_text

UIO_DRIVER = "uio_hv_generic"


class VmbusDevice(NamedTuple):
    """A primary channel that Linux's bus was offered."""

    instance: UUID
    interface_type: UUID
    relid: int
    path: str
    """Its folder in sysfs."""

    @property
    def driver(self) -> str | None:
        """The kernel's driver that has it."""
        return link_name(f"{self.path}/driver")


def bus_is_there(sysfs: str = "/sys") -> bool:
    """Whether Linux's VMBus driver is loaded and has been offered anything."""
    try:
        return bool(os.listdir(f"{sysfs}/bus/vmbus/devices"))
    except OSError:
        return False


def find_devices(interface_type: UUID | None = None, *, sysfs: str = "/sys") -> list[VmbusDevice]:
    """The devices of a type (of all), in the order of their offers. Raises EnvironmentProblem without such a bus."""
    root = f"{sysfs}/bus/vmbus/devices"
    try:
        names = os.listdir(root)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot list VMBus devices in {root}: {error.strerror}; the guest needs Linux's own drivers: "
            'give its description [guest] driver = "linux"'
        ) from error
    found = []
    for name in names:
        path = f"{root}/{name}"
        texts = [read_text(f"{path}/{attribute}") for attribute in ("device_id", "class_id", "id")]
        try:
            instance, kind, relid = UUID(texts[0] or ""), UUID(texts[1] or ""), int(texts[2] or "")
        except ValueError:
            continue  # it is going, or is another kind of thing
        if interface_type in (None, kind):
            found.append(VmbusDevice(instance, kind, relid, path))
    return sorted(found, key=lambda device: device.relid)


def reserve(device: VmbusDevice) -> int | None:
    """Keep other processes of ours from using it, until the descriptor returned is closed; None if one uses it."""
    descriptor = os.open(device.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def bind_device(device: VmbusDevice, *, sysfs: str = "/sys") -> str:
    """Hand a device over to `uio_hv_generic`, and return its name there, such as "uio0". Harmless when done already.

    Raises EnvironmentProblem if another driver has it, or that one does not take it.
    """
    driver = device.driver
    if driver not in (None, UIO_DRIVER):
        raise EnvironmentProblem(f"VMBus device {device.instance} is in use by Linux's driver {driver}")
    if driver is None:
        folder = f"{sysfs}/bus/vmbus/drivers/{UIO_DRIVER}"
        if not os.path.isdir(folder):
            raise EnvironmentProblem(f"the kernel's {UIO_DRIVER} is not loaded")
        write_text(f"{device.path}/driver_override", UIO_DRIVER)
        write_text(f"{folder}/bind", os.path.basename(device.path))
    try:
        names = os.listdir(f"{device.path}/uio")
    except OSError:
        names = []
    if not names:
        raise EnvironmentProblem(f"{UIO_DRIVER} did not take VMBus device {device.instance}; the kernel log says why")
    return names[0]


def give_back(device: VmbusDevice, *, sysfs: str = "/sys") -> None:
    """Undo `bind_device`. Harmless when nothing is bound, or the device is gone."""
    if device.driver == UIO_DRIVER:
        write_text(f"{sysfs}/bus/vmbus/drivers/{UIO_DRIVER}/unbind", os.path.basename(device.path))
        write_text(f"{device.path}/driver_override", "\n")


def map_size(name: str, number: int, *, sysfs: str = "/sys") -> int:
    """Bytes of a map of /dev/uioN. Raises EnvironmentProblem."""
    text = read_text(f"{sysfs}/class/uio/{name}/maps/map{number}/size")
    if text is None:
        raise EnvironmentProblem(f"/dev/{name} has no map {number}")
    return int(text, 16)
