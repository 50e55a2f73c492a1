"""A storage driver as Linux's in the test kit, with the SCSI provider's disks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.disk import Fault, FaultyBackend
from support.storvsc import Driver, Extents, Pending
from vmbus.providers.disk.backend import Backend
from vmbus.providers.disk.image import Image
from vmbus.providers.scsi import ScsiProvider
from vmbus.testkit import ProviderTest
from vmbus.testkit.guest import Guest as Channel
from vmbus.testkit.guest import Request
from vmbus.wire import storvsp

MIB = 1 << 20
BLOCKS = MIB // 512
ONE: dict[str, Any] = {"luns": [{"lun": 0, "image": "disk.img", "size_mib": 1, "create": True}]}
TWO: dict[str, Any] = {
    "luns": [*ONE["luns"], {"lun": 3, "image": "other.img", "size_mib": 2, "create": True, "block_size": 4096}]
}


class KitPort:
    """Implements Port."""

    def __init__(self, kit: ProviderTest, client: Channel) -> None:
        self.kit = kit
        self.client = client

    def send(self, payload: bytes, external: Extents | None) -> Request:
        return self.client.send(payload, external=None if external is None else list(external))

    def wait(self, *pending: Pending) -> None:
        self.kit.run()
        assert all(one.done for one in pending), "a request has no answer: Linux would wait for ever"


class KitMemory:
    """Implements Memory."""

    def __init__(self, client: Channel) -> None:
        self.memory = client.memory(bytes(2 * MIB))

    def put(self, data: bytes) -> None:
        self.memory.data = data

    def get(self, length: int) -> bytes:
        return self.memory.data[:length]

    def extents(self, length: int, at: int = 0) -> list[tuple[int, int]]:
        return self.memory.part(at, length)


class Guest(Driver):
    """A driver in the kit."""

    def __init__(self, kit: ProviderTest, *, connect: bool = True, sub_channels: int = 0) -> None:
        self.kit = kit
        self.client = kit.open(kit.provider.name)
        super().__init__(KitPort(kit, self.client), KitMemory(self.client))
        if connect:
            self.connect(sub_channels=sub_channels)
            for index in range(1, sub_channels + 1):
                self.ports.append(KitPort(kit, kit.open(f"{kit.provider.name}.{index}")))

    @property
    def provider(self) -> ScsiProvider:
        assert isinstance(self.kit.provider, ScsiProvider)
        return self.kit.provider

    def notices(self) -> list[int]:
        """Operations of the packets that have come unasked."""
        self.kit.run()
        packets = self.client.packets[self.client.received :]
        self.client.received = len(self.client.packets)
        for packet in packets:
            assert packet.transaction == 0 and not packet.wanted
        return [storvsp.parse_head(packet.payload)[0] for packet in packets]


def faulty(*faults: Fault) -> type[ScsiProvider]:
    class Faulty(ScsiProvider):
        def make_backend(self, image: Image) -> Backend:
            return FaultyBackend(image.backend, list(faults))

    return Faulty


def pattern(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


@pytest.fixture(autouse=True)
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "disks"
    monkeypatch.setenv("VMBUS_DISKS", str(directory))
    return directory


@pytest.fixture
def guest() -> Iterator[Guest]:
    with ProviderTest(ScsiProvider, options=ONE) as kit:
        yield Guest(kit)
