"""Trees like /sys, with one bus. How the kernel reacts is up to the test."""

from __future__ import annotations

from pathlib import Path


class Sysfs:
    """`devices`: the folder of the bus' devices."""

    def __init__(self, root: Path, bus: str) -> None:
        self.root = root
        self.bus = root / "bus" / bus
        self.devices = self.bus / "devices"
        self.devices.mkdir(parents=True)

    def __str__(self) -> str:
        return str(self.root)

    def driver(self, name: str) -> Path:
        """A driver of the bus."""
        folder = self.bus / "drivers" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("bind", "unbind"):
            (folder / file).touch()
        return folder

    def add(self, name: str, **texts: str) -> Path:
        """A device with these files."""
        folder = self.devices / name
        folder.mkdir()
        for file, text in texts.items():
            (folder / file).write_text(f"{text}\n")
        (folder / "driver_override").touch()
        return folder
