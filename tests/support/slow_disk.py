"""A controller of disks whose storage takes its time, so that requests are in flight whenever a save comes.

For device servers of their own: VMBUS_PROVIDER_PATH names the directory above this package.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from vmbus.providers.disk.backend import Backend
from vmbus.providers.disk.image import Image
from vmbus.providers.scsi import ScsiProvider

KIND = "support.slow_disk:SlowScsiProvider"
SECONDS = 0.02


class SlowBackend:
    """Every operation takes `SECONDS` longer."""

    def __init__(self, below: Backend) -> None:
        self.below = below

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        time.sleep(SECONDS)
        self.below.read(offset, views)

    def write(self, offset: int, views: Sequence[memoryview], *, durable: bool) -> None:
        time.sleep(SECONDS)
        self.below.write(offset, views, durable=durable)

    def flush(self) -> None:
        time.sleep(SECONDS)
        self.below.flush()

    def discard(self, offset: int, length: int) -> None:
        time.sleep(SECONDS)
        self.below.discard(offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool, durable: bool) -> None:
        time.sleep(SECONDS)
        self.below.write_zeroes(offset, length, may_unmap=may_unmap, durable=durable)

    def close(self) -> None:
        self.below.close()


class SlowScsiProvider(ScsiProvider):
    """See the module's text."""

    def make_backend(self, image: Image) -> Backend:
        return SlowBackend(image.backend)
