"""Block: a disk in a raw file or a block device.

provider.py  the channel, its protocol, saved state
disk.py      a disk without a protocol: its image, its core, and the threads that do its work; `scsi` has it, too
core.py      which requests are sound, in what order they run, when a flush is true; no I/O
work.py      one job on a thread, and who waits for it to let go of guest memory
backend.py   preadv, pwritev, fdatasync, fallocate
image.py     finding, making, locking and replacing an image
"""

from vmbus.providers.block.provider import BlockProvider

__all__ = ["BlockProvider"]
