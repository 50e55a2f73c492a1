"""Block: a disk in a raw file or a block device.

provider.py  the channel, options, saved state
core.py      which requests are sound, in what order they run, when a flush is true; no I/O
backend.py   preadv, pwritev, fdatasync, fallocate
image.py     finding, making, locking and replacing an image
"""

from vmbus.providers.block.provider import BlockProvider

__all__ = ["BlockProvider"]
