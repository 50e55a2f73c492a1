"""Block: a disk of `vmbus.providers.disk`, and a protocol of our own."""

from vmbus.providers.block.provider import BlockProvider

__all__ = ["BlockProvider"]
