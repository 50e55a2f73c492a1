"""Puts a PCI function's configuration back through the host bridge's ports, with a paused VM's human monitor.

QEMU's vfio-user-pci carries no state: after a restore the function is as after power-on. QEMU forwards every
configuration write of the guest to the server, so the server knows the values; writing them once more makes QEMU
map the BARs and set the interrupt up again.

The ports belong to the guest as well: 0xcf8 latches an address, and the guest may have been stopped between writing
it and using 0xcfc. So the latched value is read first and put back last.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from vmbus.errors import EnvironmentProblem, StateError

ADDRESS_PORT = 0xCF8
DATA_PORT = 0xCFC

Human = Callable[[str], Awaitable[str]]
"""Executes one line of the human monitor and returns its output."""

_SIZES = {1: "b", 2: "h", 4: "w"}
_READ_BACK = re.compile(r"=\s*0x([0-9a-fA-F]+)\s*$")


@dataclass(frozen=True)
class PciAddress:
    """Where a function sits."""

    bus: int
    device: int
    function: int = 0

    def __str__(self) -> str:
        return f"{self.bus:02x}:{self.device:02x}.{self.function}"

    def latch(self, register: int) -> int:
        """The value for 0xcf8 that selects the aligned 32-bit register which contains byte `register`."""
        return 0x80000000 | self.bus << 16 | self.device << 11 | self.function << 8 | (register & 0xFC)


@dataclass(frozen=True)
class Write:
    """One configuration write: `size` bytes (1, 2 or 4) of `value` at byte `offset`."""

    offset: int
    size: int
    value: int

    def __post_init__(self) -> None:
        inside = self.size in _SIZES and 0 <= self.offset <= 256 - self.size and self.offset % self.size == 0
        if not inside or not 0 <= self.value < 1 << 8 * self.size:
            raise StateError(
                f"configuration write of {self.value:#x}, {self.size} bytes at {self.offset:#x} is not a legal access"
            )


def write_lines(address: PciAddress, write: Write) -> Iterator[str]:
    """The monitor's lines for one configuration write."""
    yield f"o /w {ADDRESS_PORT:#x} {address.latch(write.offset):#x}"
    yield f"o /{_SIZES[write.size]} {DATA_PORT + (write.offset & 3):#x} {write.value:#x}"


def read_lines(address: PciAddress, write: Write) -> tuple[str, str]:
    """The monitor's lines that read back what `write` wrote; the second one's output has the value."""
    return (
        f"o /w {ADDRESS_PORT:#x} {address.latch(write.offset):#x}",
        f"i /{_SIZES[write.size]} {DATA_PORT + (write.offset & 3):#x}",
    )


def parse_port(output: str) -> int:
    """The value in the output of the monitor's ``i`` command. Raises `EnvironmentProblem` if there is none."""
    found = _READ_BACK.search(output)
    if found is None:
        raise EnvironmentProblem(f"QEMU's monitor answered a port read with {output!r}")
    return int(found[1], 16)


async def replay(human: Human, address: PciAddress, writes: Iterable[tuple[int, int, int]]) -> int:
    """Performs `writes` (offset, size, value) in their order, checks each by reading it back, and returns their count.

    The VM must be paused. Raises `EnvironmentProblem` naming the register if one does not keep its value.
    """
    checked = [Write(*write) for write in writes]
    latched = parse_port(await human(f"i /w {ADDRESS_PORT:#x}"))
    try:
        lines = [line for write in checked for line in write_lines(address, write)]
        for line, output in zip(lines, await _say_all(human, lines), strict=True):
            _check_silent(line, output)
        pairs = [read_lines(address, write) for write in checked]
        outputs = await _say_all(human, [line for pair in pairs for line in pair])
        for index, write in enumerate(checked):
            _check_silent(pairs[index][0], outputs[2 * index])
            found = parse_port(outputs[2 * index + 1])
            if found != write.value:
                raise EnvironmentProblem(
                    f"PCI function {address} did not take its saved configuration: register {write.offset:#04x} is "
                    f"{found:#x} after writing {write.value:#x} ({write.size} bytes)"
                )
    finally:
        last = f"o /w {ADDRESS_PORT:#x} {latched:#x}"
        _check_silent(last, await human(last))
    return len(checked)


async def _say_all(human: Human, lines: Sequence[str]) -> list[str]:
    """Says all lines without waiting for an answer in between: QEMU takes them one after the other all the same, and
    the guest stands still meanwhile. Returns the answers; raises the first error once all are there."""
    outputs = await asyncio.gather(*(human(line) for line in lines), return_exceptions=True)
    for output in outputs:
        if isinstance(output, BaseException):
            raise output
    return [str(output) for output in outputs]


def _check_silent(line: str, output: str) -> None:
    # The human monitor reports errors as text; a port write that worked prints nothing.
    if output:
        raise EnvironmentProblem(f"QEMU's monitor answered {line!r} with {output!r}")
