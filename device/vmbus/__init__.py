"""VMBus-like synthetic devices for Linux guests in stock QEMU, over vfio-user.

The packages, from the wire up: `wire` (what crosses the boundary), `ring` and `memory` (shared memory), `bus`
(offers, versions, GPADLs), `kmcl` (channels and packets), `device` (one PCI function), `vfio_user` (the transport),
`server` (the process), `providers` (the VSPs), `snapshot` and `qemu` (save, restore, launch).
"""

__version__ = "0.1.0"
