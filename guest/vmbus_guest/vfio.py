"""A userspace PCI driver over VFIO (type 1), for a guest with a virtual IOMMU.

The function is found by its ids, handed to `vfio-pci`, and opened through its IOMMU group. All numbers below are those
of Linux' `include/uapi/linux/vfio.h` and of the PCI specification.

DMA memory is one stretch of 2 MiB huge pages, contiguous for the driver and, page by page, for the device. The first
allocation that touches a huge page maps it, with a mapping of its own at a 2 MiB-aligned I/O address: the virtual IOMMU
announces each mapping to the device server as one region, and a server on the 2022 libvfio-user takes at most 16 of
them. A page stays mapped until `close`, even when everything in it was freed: unmapping memory that the server has
written to would spoil a migration in progress.
"""

# os instead of pathlib: this is imported at the start of every test driver, and imports are slow in an emulated guest.
# ruff: noqa: PTH112, PTH208

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import select
import struct

from vmbus.errors import EnvironmentProblem, UsageError
from vmbus_guest.huge_pages import (
    HUGE_PAGE,
    MAP_HUGE_2MB,
    MAP_HUGETLB,
    Buffer,
    Extents,
    all_huge_pages,
    free_huge_pages,
)
from vmbus_guest.kernel_files import link_name, read_text, write_text
from vmbus_guest.pci import PAGE_SIZE, DmaBuffer

VENDOR_ID = 0x5642
DEVICE_ID = 0x4D56

KERNEL_DRIVER = "vmbus_pci"
"""The driver of a function that is for Linux's own VMBus drivers. It cannot be taken from it."""

IOVA_BASE = 1 << 32
"""I/O address of the first huge page: clear of the interrupt window at 0xfee00000, and not mistakable for 32 bits."""

MAXIMUM_HUGE_PAGES = 12
"""Huge pages used at most: with 16 regions for a device in all, a few are left for the hypervisor's own."""

# linux/vfio.h: _IO(';', 100 + n) has no size field, so a request is just the type and the number.
_VFIO = ord(";") << 8 | 100
_GET_API_VERSION = _VFIO + 0
_CHECK_EXTENSION = _VFIO + 1
_SET_IOMMU = _VFIO + 2
_GROUP_GET_STATUS = _VFIO + 3
_GROUP_SET_CONTAINER = _VFIO + 4
_GROUP_GET_DEVICE_FD = _VFIO + 6
_DEVICE_GET_REGION_INFO = _VFIO + 8
_DEVICE_GET_IRQ_INFO = _VFIO + 9
_DEVICE_SET_IRQS = _VFIO + 10
_IOMMU_MAP_DMA = _VFIO + 13
_IOMMU_UNMAP_DMA = _VFIO + 14

_API_VERSION = 0
_TYPE1_IOMMU = 1
_TYPE1V2_IOMMU = 3
_GROUP_VIABLE = 1 << 0
_REGION_READ_WRITE = 1 << 0 | 1 << 1
_REGION_MMAP = 1 << 2
_BAR0_REGION = 0
_CONFIG_REGION = 7
_MSI_INDEX = 1
_IRQ_DATA_NONE = 1 << 0
_IRQ_DATA_EVENTFD = 1 << 2
_IRQ_ACTION_TRIGGER = 1 << 5
_DMA_READ_WRITE = 1 << 0 | 1 << 1

_REGION_INFO = struct.Struct("<IIIIQQ")  # argsz, flags, index, cap_offset, size, offset
_IRQ_INFO = struct.Struct("<IIII")  # argsz, flags, index, count
_IRQ_SET = struct.Struct("<IIIII")  # argsz, flags, index, start, count; then the data
_DMA_MAP = struct.Struct("<IIQQQ")  # argsz, flags, vaddr, iova, size
_DMA_UNMAP = struct.Struct("<IIQQ")  # argsz, flags, iova, size

# PCI: the command register and its bits.
_COMMAND = 0x04
_COMMAND_MEMORY = 1 << 1
_COMMAND_BUS_MASTER = 1 << 2


def find_functions(vendor: int, device: int, *, sysfs: str = "/sys") -> list[str]:
    """Return the addresses ("0000:00:05.0") of all PCI functions with these ids, in order."""
    root = f"{sysfs}/bus/pci/devices"
    try:
        names = sorted(os.listdir(root))
    except OSError as error:
        raise EnvironmentProblem(f"cannot list PCI devices in {root}: {error.strerror}; is sysfs mounted?") from error
    found = []
    for name in names:
        ids = [read_text(f"{root}/{name}/{attribute}") for attribute in ("vendor", "device")]
        if ids == [f"{vendor:#06x}", f"{device:#06x}"]:
            found.append(name)
    return found


def free_functions(vendor: int = VENDOR_ID, device: int = DEVICE_ID, *, sysfs: str = "/sys") -> list[str]:
    """As `find_functions`, those that Linux's own VMBus drivers do not have."""
    return [
        name
        for name in find_functions(vendor, device, sysfs=sysfs)
        if link_name(f"{sysfs}/bus/pci/devices/{name}/driver") != KERNEL_DRIVER
    ]


def choose_function(which: str, *, sysfs: str = "/sys", command_line: str = "/proc/cmdline") -> str | None:
    """The address of the function that is meant: by address, or, in a VM with several devices, by the device's name.
    Empty: that of the first device that Linux's own drivers do not have; None if the VM has not several.

    Raises `EnvironmentProblem` that lists what there is.
    """
    words = dict(word.partition("=")[::2] for word in (read_text(command_line) or "").split())
    pairs = [one.partition("@")[::2] for one in words.get("vmbus.functions", "").split(",") if one]
    named = {name: f"0000:00:{slot}.0" for name, slot in pairs}
    if not which:
        free = free_functions(sysfs=sysfs)
        return next((address for address in named.values() if address in free), None)
    address = named.get(which, which)
    found = find_functions(VENDOR_ID, DEVICE_ID, sysfs=sysfs)
    if address not in found:
        there = ", ".join([*found, *named]) or "none"
        raise EnvironmentProblem(f"there is no VMBus function {which!r} in this machine; there: {there}")
    return address


def bind_function(address: str, *, sysfs: str = "/sys") -> None:
    """Hand the function over to `vfio-pci`, taking it from another driver if one has it. Harmless when done already.

    Raises `EnvironmentProblem` if `vfio-pci` is not loaded or does not take the function.
    """
    function = f"{sysfs}/bus/pci/devices/{address}"
    driver = link_name(f"{function}/driver")
    if driver == "vfio-pci":
        return
    if not os.path.isdir(f"{sysfs}/bus/pci/drivers/vfio-pci"):
        raise EnvironmentProblem(
            "the kernel's vfio-pci driver is not loaded; "
            "insert irqbypass, vfio, vfio_iommu_type1, vfio-pci-core and vfio-pci in this order"
        )
    write_text(f"{function}/driver_override", "vfio-pci")
    if driver is not None:
        write_text(f"{function}/driver/unbind", address)
    write_text(f"{sysfs}/bus/pci/drivers_probe", address)
    driver = link_name(f"{function}/driver")
    if driver != "vfio-pci":
        raise EnvironmentProblem(
            f"vfio-pci did not take PCI function {address} (its driver now: {driver or 'none'}); "
            "the kernel log says why"
        )


def iommu_group(address: str, *, sysfs: str = "/sys") -> str:
    """Return the number of the function's IOMMU group. Raises `EnvironmentProblem` if it has none."""
    group = link_name(f"{sysfs}/bus/pci/devices/{address}/iommu_group")
    if group is None:
        raise EnvironmentProblem(
            f"PCI function {address} is in no IOMMU group: the machine has no (virtual) IOMMU or the kernel does not "
            "use it; give QEMU '-device intel-iommu,caching-mode=on,intremap=on' ahead of the device "
            "and the kernel 'intel_iommu=on'"
        )
    return group


class VfioFunction:
    """One PCI function under VFIO. Implements `vmbus_guest.pci.PciFunction`. Made by `VfioFunction.open`."""

    def __init__(
        self, address: str, container: int, group: int, device: int, resources: contextlib.ExitStack, sharers: int = 1
    ) -> None:
        """`sharers`: how many functions share the huge pages."""
        self.address = address
        self._container = container
        self._group = group
        self._device = device
        self._resources = resources
        self._closed = False
        self._mapped: set[int] = set()  # huge pages, by number
        self._fresh = 0  # everything from this offset on was never given out, so it is still zero

        bar = self._region(_BAR0_REGION, "BAR0")
        if not bar[1] & _REGION_MMAP:
            raise EnvironmentProblem(f"BAR0 of PCI function {address} cannot be mapped ({bar[4]} bytes)")
        config = self._region(_CONFIG_REGION, "the configuration space")
        self._config_offset = config[5]
        # The order matters: VFIO lets nobody touch a BAR while memory decoding is off.
        self._set_command(_COMMAND_MEMORY | _COMMAND_BUS_MASTER, 0)
        self.bar0_size = bar[4]
        bar0 = mmap.mmap(device, bar[4], mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=bar[5])
        resources.callback(bar0.close)
        self._registers = memoryview(bar0).cast("I")
        resources.callback(self._registers.release)

        self._memory, self._base = self._reserve(sharers)
        self._extents = Extents(len(self._memory))
        resources.callback(self._unmap_all)

        self.interrupt_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        resources.callback(os.close, self.interrupt_fd)
        self._poll = select.poll()
        self._poll.register(self.interrupt_fd, select.POLLIN)
        self._enable_msi()

    @classmethod
    def open(
        cls,
        vendor: int = VENDOR_ID,
        device: int = DEVICE_ID,
        *,
        address: str | None = None,
        sysfs: str = "/sys",
        dev: str = "/dev",
    ) -> VfioFunction:
        """Take over the first function with these ids that Linux's own drivers do not have (or the one at `address`),
        ready for registers, DMA and MSI.

        Raises `EnvironmentProblem`: no such function, no `vfio-pci`, no virtual IOMMU, a group that is not viable or
        in use by another process, no huge pages.
        """
        free = free_functions(vendor, device, sysfs=sysfs)
        if address is None:
            found = find_functions(vendor, device, sysfs=sysfs)
            if not found:
                raise EnvironmentProblem(
                    f"no PCI function {vendor:04x}:{device:04x} in this machine; was it started with the device server?"
                )
            if not free:
                raise EnvironmentProblem(
                    f"PCI function {found[0]} is driven by Linux's own VMBus drivers in this machine: its description "
                    'has driver = "linux"'
                )
            address = free[0]
        group_number = iommu_group(address, sysfs=sysfs)
        bind_function(address, sysfs=sysfs)
        with contextlib.ExitStack() as stack:
            container = _open_node(f"{dev}/vfio/vfio", "the VFIO container")
            stack.callback(os.close, container)
            version = fcntl.ioctl(container, _GET_API_VERSION)
            if version != _API_VERSION:
                raise EnvironmentProblem(f"the kernel speaks VFIO API version {version}, this driver version 0")
            group = _open_node(f"{dev}/vfio/{group_number}", f"IOMMU group {group_number} of PCI function {address}")
            stack.callback(os.close, group)
            status = bytearray(struct.pack("<II", 8, 0))
            fcntl.ioctl(group, _GROUP_GET_STATUS, status)
            if not struct.unpack("<II", status)[1] & _GROUP_VIABLE:
                raise EnvironmentProblem(
                    f"IOMMU group {group_number} of PCI function {address} is not viable: it holds other functions "
                    "that have a kernel driver; give the device a slot of its own on the root bus"
                )
            _ioctl(group, _GROUP_SET_CONTAINER, struct.pack("<i", container), f"join IOMMU group {group_number}")
            kind = next(
                (kind for kind in (_TYPE1V2_IOMMU, _TYPE1_IOMMU) if fcntl.ioctl(container, _CHECK_EXTENSION, kind)),
                None,
            )
            if kind is None:
                raise EnvironmentProblem("the kernel has no VFIO type 1 IOMMU driver; insert vfio_iommu_type1")
            try:
                fcntl.ioctl(container, _SET_IOMMU, kind)
            except OSError as error:
                raise EnvironmentProblem(
                    f"the virtual IOMMU does not serve IOMMU group {group_number}: {error.strerror}"
                ) from error
            name = bytearray(address.encode() + b"\0")
            try:
                descriptor = fcntl.ioctl(group, _GROUP_GET_DEVICE_FD, name)
            except OSError as error:
                raise EnvironmentProblem(f"VFIO does not open PCI function {address}: {error.strerror}") from error
            stack.callback(os.close, descriptor)
            function = cls(address, container, group, descriptor, stack, max(1, len(free)))
            function._resources = stack.pop_all()
            return function
        raise AssertionError("unreachable")

    def __enter__(self) -> VfioFunction:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Registers

    def read32(self, offset: int) -> int:
        """Read a BAR0 register at `offset` (bytes, a multiple of 4)."""
        return self._registers[offset >> 2]

    def write32(self, offset: int, value: int) -> None:
        """Write a BAR0 register at `offset` (bytes, a multiple of 4)."""
        self._registers[offset >> 2] = value

    def read_config(self, offset: int, size: int) -> bytes:
        """Read `size` bytes of the configuration space."""
        return os.pread(self._device, size, self._config_offset + offset)

    def write_config(self, offset: int, data: bytes) -> None:
        """Write to the configuration space (through VFIO's filter)."""
        os.pwrite(self._device, data, self._config_offset + offset)

    # Memory

    def allocate(self, size: int) -> Buffer:
        """Return `size` bytes (rounded up to whole pages) of zeroed memory that the device reaches.

        Raises `UsageError` for a size that is not positive, `EnvironmentProblem` when the huge pages are used up.
        """
        if size <= 0:
            raise UsageError(f"cannot allocate {size} bytes of DMA memory")
        size = -(-size // PAGE_SIZE) * PAGE_SIZE
        start = self._extents.take(size)
        if start is None:
            raise EnvironmentProblem(
                f"no {size} contiguous bytes of DMA memory left: {self._extents.size} bytes in huge pages, "
                f"{self._extents.free_bytes} free, {self._extents.largest} in one piece; start the guest with more "
                f"huge pages (the driver uses up to {MAXIMUM_HUGE_PAGES})"
            )
        try:
            for page in range(start // HUGE_PAGE, (start + size - 1) // HUGE_PAGE + 1):
                self._map(page)
        except BaseException:
            self._extents.give(start, size)
            raise
        view = self._memory[start : start + size]
        if start < self._fresh:
            view[:] = bytes(size)
        self._fresh = max(self._fresh, start + size)
        return Buffer(IOVA_BASE + start, size, view)

    def free(self, buffer: DmaBuffer) -> None:
        """Give a buffer of `allocate` back. Raises `UsageError` if it is not one, or was freed before."""
        self._extents.give(buffer.iova - IOVA_BASE, buffer.size)

    def trim(self) -> int:
        """Unmap the huge pages in which nothing is allocated; returns how many. Raises `EnvironmentProblem`."""
        idle = [page for page in sorted(self._mapped) if self._extents.is_free(page * HUGE_PAGE, HUGE_PAGE)]
        for page in idle:
            self._unmap(page)
            self._mapped.discard(page)
        return len(idle)

    # Interrupts

    def wait_interrupt(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds (at least 0) for the MSI; True if it fired since the last call."""
        if timeout > 0 and not self._poll.poll(timeout * 1000):
            return False
        try:
            os.eventfd_read(self.interrupt_fd)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Disable MSI and bus mastering, unmap all memory, let the function go. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._quiet(self._disable_msi)  # first quiet, then unreachable
        self._quiet(self._set_command, 0, _COMMAND_BUS_MASTER)
        self._resources.close()

    # Set-up

    def _region(self, index: int, what: str) -> tuple[int, int, int, int, int, int]:
        info = bytearray(_REGION_INFO.pack(_REGION_INFO.size, 0, index, 0, 0, 0))
        _ioctl(self._device, _DEVICE_GET_REGION_INFO, info, f"describe {what} of PCI function {self.address}")
        region = _REGION_INFO.unpack(info)
        if region[4] == 0 or region[1] & _REGION_READ_WRITE != _REGION_READ_WRITE:
            raise EnvironmentProblem(f"PCI function {self.address} has no usable {what.removeprefix('the ')}")
        return region

    def _set_command(self, set_bits: int, clear_bits: int) -> None:
        (command,) = struct.unpack("<H", self.read_config(_COMMAND, 2))
        self.write_config(_COMMAND, struct.pack("<H", command & ~clear_bits | set_bits))

    def _enable_msi(self) -> None:
        info = bytearray(_IRQ_INFO.pack(_IRQ_INFO.size, 0, _MSI_INDEX, 0))
        _ioctl(self._device, _DEVICE_GET_IRQ_INFO, info, f"describe the MSI of PCI function {self.address}")
        if _IRQ_INFO.unpack(info)[3] < 1:
            raise EnvironmentProblem(f"PCI function {self.address} has no MSI capability")
        self._set_irqs(_IRQ_DATA_EVENTFD | _IRQ_ACTION_TRIGGER, struct.pack("<i", self.interrupt_fd), 1, "enable")

    def _disable_msi(self) -> None:
        self._set_irqs(_IRQ_DATA_NONE | _IRQ_ACTION_TRIGGER, b"", 0, "disable")

    def _set_irqs(self, flags: int, data: bytes, count: int, what: str) -> None:
        request = _IRQ_SET.pack(_IRQ_SET.size + len(data), flags, _MSI_INDEX, 0, count) + data
        _ioctl(self._device, _DEVICE_SET_IRQS, request, f"{what} the MSI of PCI function {self.address}")

    def _reserve(self, sharers: int) -> tuple[memoryview, int]:
        """Reserve the huge pages, as many as leave the other functions theirs. Returns their memory and its address in
        this process."""
        free = free_huge_pages()
        share = free if sharers == 1 else max(1, all_huge_pages() // sharers)
        for pages in range(min(free, share, MAXIMUM_HUGE_PAGES), 0, -1):  # fewer, if another process is quicker
            try:
                memory = mmap.mmap(
                    -1,
                    pages * HUGE_PAGE,
                    # Shared, not private: a fork must not make pages that the device has pinned copy-on-write.
                    mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_HUGETLB | MAP_HUGE_2MB,
                    mmap.PROT_READ | mmap.PROT_WRITE,
                )
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
                continue
            base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            view = memoryview(memory)
            self._resources.callback(_release, memory, view)
            return view, base
        raise EnvironmentProblem(
            f"no free 2 MiB huge pages (free now: {free}): another driver holds them, or the kernel was "
            "started without; give it 'hugepages=12' or write a number to /proc/sys/vm/nr_hugepages"
        )

    def _map(self, page: int) -> None:
        """Map a huge page for the device, if it is not mapped yet."""
        if page in self._mapped:
            return
        offset = page * HUGE_PAGE
        iova = IOVA_BASE + offset
        _ioctl(
            self._container,
            _IOMMU_MAP_DMA,
            _DMA_MAP.pack(_DMA_MAP.size, _DMA_READ_WRITE, self._base + offset, iova, HUGE_PAGE),
            f"map 2 MiB of DMA memory at I/O address {iova:#x}",
        )
        self._mapped.add(page)

    def _unmap_all(self) -> None:
        for page in self._mapped:
            self._quiet(self._unmap, page)
        self._mapped.clear()

    def _unmap(self, page: int) -> None:
        request = bytearray(_DMA_UNMAP.pack(_DMA_UNMAP.size, 0, IOVA_BASE + page * HUGE_PAGE, HUGE_PAGE))
        _ioctl(self._container, _IOMMU_UNMAP_DMA, request, "unmap DMA memory")

    @staticmethod
    def _quiet(step: object, *arguments: object) -> None:
        """Run a step of the way down. The device may be gone by then; the kernel cleans up with the descriptors."""
        assert callable(step)
        with contextlib.suppress(OSError, EnvironmentProblem):
            step(*arguments)


def _release(memory: mmap.mmap, view: memoryview) -> None:
    """Give the huge pages back, unless someone still holds a view of a buffer: then they go with that view."""
    with contextlib.suppress(BufferError):
        view.release()
        memory.close()


def _ioctl(descriptor: int, request: int, argument: bytes | bytearray, what: str) -> None:
    try:
        fcntl.ioctl(descriptor, request, argument)
    except OSError as error:
        raise EnvironmentProblem(f"VFIO cannot {what}: {error.strerror} (errno {error.errno})") from error


def _open_node(path: str, what: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise EnvironmentProblem(f"{path} does not exist: the kernel's vfio modules are not loaded") from None
    except OSError as error:
        hint = "; another driver process has it open" if error.errno == errno.EBUSY else ""
        raise EnvironmentProblem(f"cannot open {what} ({path}): {error.strerror}{hint}") from error
