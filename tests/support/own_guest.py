"""Guests that are none of ours: a boot sector that counts on its disk, and an initramfs with a shell script."""

from __future__ import annotations

from pathlib import Path

from vmbus.provision.cache import Cache
from vmbus.provision.guest_files import USERLAND_RECIPE
from vmbus.provision.roots import find_root
from vmbus_guest import newc

BOOT_SECTOR = bytes.fromhex(
    # Real mode, at 0x7c00: segments and stack, the drive's number to 0x7b00; sector 2 is read to 0x8000, and its first
    # 32 bits are taken over as the count in memory, at 0x7b04.
    "fa31c08ed88ec08ed0bc007cfb8816007bb80102e8500066a1008066a3047b"
    # Again and again: sector 2 is read; if it does not have the count of memory, "!" for ever. Count + 1 to memory and
    # to sector 2.
    "b80102e8420066a10080663b06047b752f664066a3047b66a30080b80103e82700"
    # The count as eight letters, A for 0 to P for 15, and a line feed; wait for the next interrupt of the timer.
    "b90800668b1e047b66c1c30488d8240f0441e82300e2f1b00ae81c00f4ebc0"
    # "!", for ever.
    "b021e81400f4ebf8"
    # Moves sector 2 by int 0x13, with what AX says; a letter to the serial port.
    "bb0080b90200b6008a16007bcd1372e8c3baf803eec3"
)


def boot_disk(path: Path, *, size: int = 1 << 20) -> Path:
    """A raw disk that firmware boots: it counts on the disk and in memory, compares both, and says what it comes to."""
    path.write_bytes((BOOT_SECTOR.ljust(510, b"\0") + b"\x55\xaa").ljust(size, b"\0"))
    return path


def counts(console: str) -> list[int]:
    """What such a guest has said."""
    lines = [line.strip() for line in console.splitlines()]
    letters = [line for line in lines if len(line) == 8 and all("A" <= one <= "P" for one in line)]
    return [int("".join(f"{ord(one) - ord('A'):x}" for one in line), 16) for line in letters]


SCRIPT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
echo "own guest: $(/bin/busybox cat /proc/cmdline)"
echo "own guest: device $(/bin/busybox cat /sys/bus/pci/devices/0000:00:05.0/vendor)"
n=0
while true; do n=$((n + 1)); echo "tick $n"; /bin/busybox usleep 50000; done
"""


def initramfs(path: Path) -> Path:
    """An initramfs with busybox and that script: it mounts and loads nothing of ours, and counts."""
    root = find_root(Cache(), USERLAND_RECIPE)
    assert root is not None
    busybox = (root.path / "usr/bin/busybox").read_bytes()
    entries = [
        *(newc.directory(name) for name in ("bin", "dev", "proc", "sys")),
        newc.character_device("dev/console", 5, 1),
        newc.file("bin/busybox", busybox, 0o755),
        newc.file("init", SCRIPT.encode(), 0o755),
    ]
    path.write_bytes(newc.write(entries))
    return path


def ticks(console: str) -> list[int]:
    """What that guest has counted."""
    return [int(line.split()[1]) for line in console.splitlines() if line.startswith("tick ") and line.split()[1:]]
