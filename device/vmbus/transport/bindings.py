"""libvfio-user's functions, structures and constants, for both generations (Linux, LP64).

One table, `FUNCTIONS`, says what each function takes and gives. A context is always `c_void_p`: the default would
cut the pointer to 32 bits. Only `vfu_setup_device_dma` has a different argument in the middle, and the migration
callbacks are others; the new generation's extra trailing arguments are listed too.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_bool,
    c_char,
    c_char_p,
    c_int,
    c_int64,
    c_size_t,
    c_ssize_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any, NamedTuple

# Transport, device type, flags of a context.
TRANS_SOCK = 0
DEV_TYPE_PCI = 0
FLAG_ATTACH_NB = 1

# Regions and their flags.
REGION_BAR0 = 0
REGION_CONFIG = 7
REGION_READ = 1
REGION_WRITE = 2
REGION_MEM = 4
REGION_ALWAYS_CB = 8

# Interrupt types.
IRQ_INTX = 0
IRQ_MSI = 1
IRQ_MSIX = 2
IRQ_ERR = 3
IRQ_REQ = 4

# Reset types.
RESET_DEVICE = 0
RESET_LOST_CONN = 1
RESET_PCI_FLR = 2

# PCI types.
PCI_CONVENTIONAL = 0

# Memory protection, as in mmap.
PROT_READ = 1
PROT_WRITE = 2

# Version of the migration callbacks' structure, and the states that they are given.
MIGRATION_CALLBACKS_VERSION = 2
MIGRATION_STOP = 0
MIGRATION_RUNNING = 1
MIGRATION_STOP_COPY = 2
MIGRATION_PRE_COPY = 3
MIGRATION_RESUMING = 4

# DMA regions that the 2022 generation can hold; fixed in the library.
OLD_MAX_DMA_REGIONS = 16
# The larger of the two sides' limits for one message of data; fixed in the library.
MAX_DATA_TRANSFER = 1 << 20
MAX_MESSAGE = MAX_DATA_TRANSFER + 32
SG_SIZE = 40


class IoVec(Structure):
    """`struct iovec`."""

    _fields_ = (("base", c_void_p), ("len", c_size_t))


class DmaInfo(Structure):
    """`vfu_dma_info_t`: valid only during the callback."""

    _fields_ = (
        ("iova", IoVec),
        ("vaddr", c_void_p),  # None: the region came without a file, it can only be reached by messages
        ("mapping", IoVec),  # what the library mapped: starts on a page, may start before vaddr
        ("page_size", c_uint64),
        ("prot", c_uint32),
    )


class ScatterGather(Structure):
    """`dma_sg_t`, opaque to callers; the two fields we need have the same place in both generations."""

    _fields_ = (
        ("region_base", c_uint64),  # the address a message will carry
        ("region", c_uint64),
        ("length", c_uint64),
        ("offset", c_uint64),  # within the region
        ("writeable", c_uint64),
    )


LogCallback = CFUNCTYPE(None, c_void_p, c_int, c_char_p, use_errno=True)
RegionCallback = CFUNCTYPE(c_ssize_t, c_void_p, POINTER(c_char), c_size_t, c_int64, c_bool, use_errno=True)
ResetCallback = CFUNCTYPE(c_int, c_void_p, c_int, use_errno=True)
DmaCallback = CFUNCTYPE(None, c_void_p, POINTER(DmaInfo), use_errno=True)
TransitionCallback = CFUNCTYPE(c_int, c_void_p, c_int, use_errno=True)
DataCallback = CFUNCTYPE(c_ssize_t, c_void_p, c_void_p, c_uint64, use_errno=True)


class MigrationCallbacks(Structure):
    """`vfu_migration_callbacks_t` of the new generation; copied by the library."""

    _fields_ = (
        ("version", c_int),
        ("transition", TransitionCallback),
        ("read_data", DataCallback),
        ("write_data", DataCallback),
    )


class Prototype(NamedTuple):
    """What a function gives and takes; `new_arguments` where the new generation differs."""

    result: Any
    arguments: tuple[Any, ...]
    new_arguments: tuple[Any, ...] | None = None


_CTX = c_void_p
_SG = POINTER(ScatterGather)

FUNCTIONS: dict[str, Prototype] = {
    "vfu_create_ctx": Prototype(c_void_p, (c_int, c_char_p, c_int, c_void_p, c_int)),
    "vfu_realize_ctx": Prototype(c_int, (_CTX,)),
    "vfu_attach_ctx": Prototype(c_int, (_CTX,)),
    "vfu_get_poll_fd": Prototype(c_int, (_CTX,)),
    "vfu_run_ctx": Prototype(c_int, (_CTX,)),
    "vfu_destroy_ctx": Prototype(None, (_CTX,)),
    "vfu_setup_log": Prototype(c_int, (_CTX, LogCallback, c_int)),
    "vfu_setup_region": Prototype(
        c_int, (_CTX, c_int, c_size_t, RegionCallback, c_int, POINTER(IoVec), c_uint32, c_int, c_uint64)
    ),
    "vfu_setup_device_reset_cb": Prototype(c_int, (_CTX, ResetCallback)),
    "vfu_setup_device_dma": Prototype(
        c_int, (_CTX, DmaCallback, DmaCallback), new_arguments=(_CTX, c_size_t, DmaCallback, DmaCallback)
    ),
    "vfu_setup_device_nr_irqs": Prototype(c_int, (_CTX, c_int, c_uint32)),
    "vfu_irq_trigger": Prototype(c_int, (_CTX, c_uint32)),
    "vfu_addr_to_sgl": Prototype(c_int, (_CTX, c_uint64, c_size_t, _SG, c_size_t, c_int)),
    "vfu_sgl_write": Prototype(
        c_int, (_CTX, _SG, c_size_t, c_void_p), new_arguments=(_CTX, _SG, c_size_t, c_void_p, c_int)
    ),
    "vfu_sgl_mark_dirty": Prototype(None, (_CTX, _SG, c_size_t)),
    # The old generation's has another structure and an offset; it is never called.
    "vfu_setup_device_migration_callbacks": Prototype(
        c_int, (_CTX, c_void_p, c_uint64), new_arguments=(_CTX, POINTER(MigrationCallbacks))
    ),
    "dma_sg_size": Prototype(c_size_t, ()),
    "vfu_pci_init": Prototype(c_int, (_CTX, c_int, c_int, c_int)),
}


def declare(cdll: ctypes.CDLL, *, new_abi: bool) -> None:
    """Set result and argument types of every function in the table."""
    for name, prototype in FUNCTIONS.items():
        function = getattr(cdll, name)
        function.restype = prototype.result
        newer = prototype.new_arguments
        function.argtypes = newer if new_abi and newer is not None else prototype.arguments
