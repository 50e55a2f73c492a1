"""SCSI: disks for Linux's hv_storvsc, behind one controller. See docs/provider-scsi.md.

provider.py    options, commands, what is saved, and the life of the disks
adapter.py     the channels: packets of the guest's, and their answers
handshake.py   which step of the protocol comes when; no I/O
commands.py    what a command block asks of a disk; no I/O
unit.py        a logical unit: a disk of `vmbus.providers.disk.disk`, and what SCSI has beside it
"""

from vmbus.providers.scsi.provider import ScsiProvider

__all__ = ["ScsiProvider"]
