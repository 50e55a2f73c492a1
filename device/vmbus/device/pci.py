"""The function's configuration space: conventional PCI, one memory BAR, one MSI vector, no INTx.

All interrupt and BAR state is here, so `replay_writes` can put a function back with configuration writes alone.
Sources: PCI Local Bus Specification 3.0, chapters 6.1 to 6.2 (header) and 6.8 (MSI).
"""

from __future__ import annotations

import struct

from vmbus.errors import StateError, UsageError

SIZE = 256
VENDOR_ID = 0x5642
DEVICE_ID = 0x4D56
REVISION = 1
CLASS_CODE = 0xFF0000
BAR0_SIZE = 4096

# Offsets.
COMMAND = 0x04
STATUS = 0x06
BAR0 = 0x10
CAPABILITIES = 0x34
INTERRUPT_LINE = 0x3C
INTERRUPT_PIN = 0x3D
MSI = 0x40
MSI_CONTROL = MSI + 2
MSI_ADDRESS_LOW = MSI + 4
MSI_ADDRESS_HIGH = MSI + 8
MSI_DATA = MSI + 12

# Bits of the command register.
COMMAND_MEMORY = 1 << 1
COMMAND_BUS_MASTER = 1 << 2
COMMAND_PARITY = 1 << 6
COMMAND_SERR = 1 << 8
COMMAND_INTX_DISABLE = 1 << 10
_COMMAND_WRITABLE = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_PARITY | COMMAND_SERR | COMMAND_INTX_DISABLE

# Bits of the status register.
STATUS_CAPABILITIES = 1 << 4
STATUS_WRITE_1_TO_CLEAR = 0xF900  # error bits 8 and 11 to 15

MSI_ENABLE = 1 << 0
_MSI_64_BIT = 1 << 7
_MSI_CAPABILITY_ID = 0x05


def _image(*fields: tuple[int, int, int]) -> bytes:
    """256 bytes with the (offset, size in bytes, value) fields put in."""
    image = bytearray(SIZE)
    for offset, size, value in fields:
        image[offset : offset + size] = value.to_bytes(size, "little")
    return bytes(image)


_AFTER_RESET = _image(
    (0x00, 2, VENDOR_ID),
    (0x02, 2, DEVICE_ID),
    (STATUS, 2, STATUS_CAPABILITIES),
    (0x08, 1, REVISION),
    (0x09, 3, CLASS_CODE),
    (0x2C, 2, VENDOR_ID),
    (0x2E, 2, DEVICE_ID),
    (CAPABILITIES, 1, MSI),
    (MSI, 1, _MSI_CAPABILITY_ID),
    (MSI_CONTROL, 2, _MSI_64_BIT),
)
_WRITABLE = _image(
    (COMMAND, 2, _COMMAND_WRITABLE),
    (BAR0, 4, 0x1_0000_0000 - BAR0_SIZE),
    (INTERRUPT_LINE, 1, 0xFF),
    (MSI_CONTROL, 2, MSI_ENABLE),
    (MSI_ADDRESS_LOW, 4, 0xFFFF_FFFC),
    (MSI_ADDRESS_HIGH, 4, 0xFFFF_FFFF),
    (MSI_DATA, 2, 0xFFFF),
)
_CLEARABLE = _image((STATUS, 2, STATUS_WRITE_1_TO_CLEAR))


class ConfigSpace:
    """256 bytes of configuration space as the guest sees them. Accesses may have any size and alignment."""

    def __init__(self) -> None:
        self._bytes = bytearray(_AFTER_RESET)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`. Raises UsageError beyond the space."""
        _check_range(offset, size)
        return bytes(self._bytes[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        """What a configuration write does: read-only bits stay, error bits of the status are cleared by ones.

        Raises UsageError beyond the space.
        """
        _check_range(offset, len(data))
        for index, value in enumerate(data, offset):
            writable, clearable = _WRITABLE[index], _CLEARABLE[index]
            self._bytes[index] = (self._bytes[index] & ~writable & ~(value & clearable)) | (value & writable)

    def reset(self) -> None:
        """The state after a reset of the function."""
        self._bytes[:] = _AFTER_RESET

    def report_errors(self, bits: int) -> None:
        """Set error bits of the status register (the guest clears them by writing ones)."""
        if bits & ~STATUS_WRITE_1_TO_CLEAR:
            raise UsageError(f"status bits {bits:#06x}: only {STATUS_WRITE_1_TO_CLEAR:#06x} report errors")
        status = self._u16(STATUS) | bits
        self._bytes[STATUS : STATUS + 2] = status.to_bytes(2, "little")

    def snapshot(self) -> bytes:
        """All 256 bytes."""
        return bytes(self._bytes)

    def load(self, config: bytes) -> None:
        """Take over what `snapshot` gave. Raises StateError, and changes nothing, if it is of another function."""
        _check_function(config)
        self._bytes[:] = config

    @property
    def memory_enabled(self) -> bool:
        """Whether the function answers to memory accesses."""
        return bool(self._u16(COMMAND) & COMMAND_MEMORY)

    @property
    def bus_master(self) -> bool:
        """Whether the function may access guest memory and send interrupts."""
        return bool(self._u16(COMMAND) & COMMAND_BUS_MASTER)

    @property
    def msi_enabled(self) -> bool:
        """Whether interrupts are sent as messages."""
        return bool(self._u16(MSI_CONTROL) & MSI_ENABLE)

    @property
    def bar0_address(self) -> int | None:
        """Where BAR0 answers in the guest's physical address space; None while it does not."""
        return bar0_address(self._bytes)

    def _u16(self, offset: int) -> int:
        return int.from_bytes(self._bytes[offset : offset + 2], "little")


def bar0_address(config: bytes | bytearray) -> int | None:
    """Where BAR0 answers, according to 256 bytes of configuration space; None if memory is off or BAR0 is unset."""
    (command,) = struct.unpack_from("<H", config, COMMAND)
    (bar0,) = struct.unpack_from("<I", config, BAR0)
    address = int(bar0) & ~(BAR0_SIZE - 1)
    return address if command & COMMAND_MEMORY and address else None


def replay_writes(config: bytes) -> list[tuple[int, int, int]]:
    """The configuration writes (offset, size in bytes, value) that bring a reset function to `config`, in order.

    Addresses come before what enables them: BAR, interrupt line, MSI address and data, MSI control, and the command
    register last. Raises StateError if `config` is not 256 bytes of this function's configuration space.
    """
    _check_function(config)
    fields = (
        (BAR0, 4),
        (INTERRUPT_LINE, 1),
        (MSI_ADDRESS_LOW, 4),
        (MSI_ADDRESS_HIGH, 4),
        (MSI_DATA, 2),
        (MSI_CONTROL, 2),
        (COMMAND, 2),
    )
    return [(offset, size, int.from_bytes(config[offset : offset + size], "little")) for offset, size in fields]


def without_interrupts(config: bytes) -> bytes:
    """The same configuration space with MSI switched off.

    An interrupt that is enabled while the guest's interrupt remapping is not there yet keeps a route which nobody has
    translated (KVM's, above all).
    """
    (control,) = struct.unpack_from("<H", config, MSI_CONTROL)
    return config[:MSI_CONTROL] + struct.pack("<H", control & ~MSI_ENABLE) + config[MSI_CONTROL + 2 :]


def interrupt_writes(config: bytes) -> list[tuple[int, int, int]]:
    """Of `replay_writes` those that are missing after `without_interrupts`."""
    return [write for write in replay_writes(config) if write[0] == MSI_CONTROL]


def _check_range(offset: int, size: int) -> None:
    if not 0 <= offset <= offset + size <= SIZE:
        raise UsageError(f"configuration space has {SIZE} bytes: no {size} bytes at {offset:#x}")


def _check_function(config: bytes) -> None:
    if len(config) != SIZE:
        raise StateError(f"configuration space of {len(config)} bytes: this function has {SIZE}")
    for index, (saved, fixed) in enumerate(zip(config, _AFTER_RESET, strict=True)):
        changeable = _WRITABLE[index] | _CLEARABLE[index]
        if (saved ^ fixed) & ~changeable & 0xFF:
            raise StateError(
                f"configuration space is not this function's: byte {index:#04x} is {saved:#04x}, "
                f"where this function has {fixed:#04x} with only the bits {changeable:#04x} free to change"
            )
