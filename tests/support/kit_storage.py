"""A storage driver as Linux's in the test kit, with the SCSI provider's disks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.disk import Fault, FaultyBackend
from support.storvsc import MIB, Driver
from vmbus import providers
from vmbus.providers.disk.backend import Backend
from vmbus.providers.disk.image import Image
from vmbus.providers.scsi import ScsiProvider
from vmbus.testkit import ProviderTest

BLOCKS = MIB // 512
ONE: dict[str, Any] = {"luns": [{"lun": 0, "image": "disk.img", "size_mib": 1, "create": True}]}
TWO: dict[str, Any] = {
    "luns": [*ONE["luns"], {"lun": 3, "image": "other.img", "size_mib": 2, "create": True, "block_size": 4096}]
}


class Guest(Driver):
    """A driver in the kit."""

    def __init__(self, kit: ProviderTest, *, connect: bool = True, sub_channels: int = 0) -> None:
        self.kit = kit
        self.client = kit.open(kit.provider.name)
        super().__init__(self.client)
        if connect:
            self.connect(sub_channels=sub_channels)
            for index in range(1, sub_channels + 1):
                self.ports.append(kit.open(f"{kit.provider.name}.{index}"))

    @property
    def provider(self) -> ScsiProvider:
        assert isinstance(self.kit.provider, ScsiProvider)
        return self.kit.provider

    def notices(self) -> list[int]:
        self.kit.run()
        return super().notices()


def faulty(*faults: Fault) -> type[ScsiProvider]:
    class Faulty(ScsiProvider):
        def make_backend(self, image: Image) -> Backend:
            return FaultyBackend(image.backend, list(faults))

    return Faulty


@pytest.fixture(autouse=True)
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "disks"
    monkeypatch.setenv("VMBUS_DISKS", str(directory))
    return directory


@pytest.fixture
def guest() -> Iterator[Guest]:
    with ProviderTest(ScsiProvider, options=ONE) as kit:
        yield Guest(kit)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fault]]:
    """What is to go wrong in the storage of the image slow.img."""
    faults: list[Fault] = []

    class Faulty(ScsiProvider):
        def make_backend(self, image: Image) -> Backend:
            return FaultyBackend(image.backend, faults) if image.path.name == "slow.img" else image.backend

    monkeypatch.setitem(providers.PROVIDERS, "scsi", Faulty)
    yield faults
    for fault in faults:
        fault.go.set()
