"""One context of the library (`vfu_ctx_t`): a PCI function that is realized, for one client."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import socket
import tempfile
from pathlib import Path
from typing import Any

from vmbus.errors import EnvironmentProblem, VmbusError
from vmbus.transport import bindings
from vmbus.transport.callbacks import Callbacks
from vmbus.transport.library import Generation, Library
from vmbus.transport.migration import MigrationRefused
from vmbus.util.complaints import bounded_log
from vmbus.util.listening import LONGEST_PATH

_library_logger = bounded_log(f"{__name__}.library")

CONFIG_SIZE = 256
# QEMU takes back ranges in which nothing is left whenever the guest switches its IOMMU address space. The advice about
# twin_socket is for servers that send messages while the guest runs; `write_through_client` does not.
_NOISE = re.compile(r"cmd 3 failed: No such file|failed to remove DMA region .*No such file|without the twin_socket")


class AddressNotMapped(VmbusError):
    """The client does not offer (writable) memory at this I/O address."""


class LibraryContext:
    """It has a private connection, `private`, that waits to be accepted: see `attach`."""

    def __init__(
        self,
        library: Library,
        calls: Callbacks,
        folder: Path | None,
        *,
        bar0_size: int,
        msi_vectors: int,
        max_dma_regions: int,
    ) -> None:
        """`folder`: see `folder_for`. Raises EnvironmentProblem if the library refuses the set-up, and OSError."""
        self._vfu = library.cdll
        self._generation = library.generation
        self._calls = calls
        self._kept: list[Any] = []  # C holds only bare pointers to them
        with tempfile.TemporaryDirectory(prefix=".c-", dir=folder) as directory:
            path = Path(directory) / "s"
            pointer = self._vfu.vfu_create_ctx(
                bindings.TRANS_SOCK, os.fsencode(path), bindings.FLAG_ATTACH_NB, None, bindings.DEV_TYPE_PCI
            )
            if pointer is None:
                raise EnvironmentProblem(f"libvfio-user cannot create a device on {path}: {_errno_text()}")
            self._pointer: int = pointer
            self.private = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self._set_up(library, bar0_size, msi_vectors, max_dma_regions)
                self.private.connect(os.fspath(path))
            except BaseException:
                self.private.close()
                self._vfu.vfu_destroy_ctx(pointer)
                raise

    def _set_up(self, library: Library, bar0_size: int, msi_vectors: int, max_dma_regions: int) -> None:
        vfu, pointer, calls = self._vfu, self._pointer, self._calls

        def keep(callback: Any) -> Any:
            self._kept.append(callback)
            return callback

        def require(result: int, what: str) -> None:
            if result < 0:
                raise EnvironmentProblem(f"libvfio-user ({library.path}) refuses {what}: {_errno_text()}")

        os.set_inheritable(vfu.vfu_get_poll_fd(pointer), False)
        level = 7 if _library_logger.isEnabledFor(logging.DEBUG) else 4
        require(vfu.vfu_setup_log(pointer, keep(bindings.LogCallback(_on_log)), level), "the log")
        # Before region 7: the new generation resets that region's flags here.
        require(vfu.vfu_pci_init(pointer, bindings.PCI_CONVENTIONAL, 0, 0), "the PCI set-up")
        read_write = bindings.REGION_READ | bindings.REGION_WRITE
        handler = calls.handler
        for index, size, flags, what, read, write in (
            (
                bindings.REGION_BAR0,
                bar0_size,
                read_write | bindings.REGION_MEM,
                "BAR0",
                handler.bar0_read,
                handler.bar0_write,
            ),
            (
                bindings.REGION_CONFIG,
                CONFIG_SIZE,
                read_write | bindings.REGION_ALWAYS_CB,
                "configuration space",
                handler.config_read,
                handler.config_write,
            ),
        ):
            callback = keep(bindings.RegionCallback(calls.region_callback(what, read, write)))
            require(vfu.vfu_setup_region(pointer, index, size, callback, flags, None, 0, -1, 0), what)
        require(
            vfu.vfu_setup_device_reset_cb(pointer, keep(bindings.ResetCallback(calls.on_reset))), "the reset callback"
        )
        register = keep(bindings.DmaCallback(calls.on_dma_register))
        unregister = keep(bindings.DmaCallback(calls.on_dma_unregister))
        if library.generation is Generation.NEW:
            result = vfu.vfu_setup_device_dma(pointer, max_dma_regions, register, unregister)
        else:
            result = vfu.vfu_setup_device_dma(pointer, register, unregister)
        require(result, "the DMA callbacks")
        for kind, count in (
            (bindings.IRQ_INTX, 0),
            (bindings.IRQ_MSI, msi_vectors),
            (bindings.IRQ_MSIX, 0),
            (bindings.IRQ_ERR, 0),
            (bindings.IRQ_REQ, 0),
        ):
            require(vfu.vfu_setup_device_nr_irqs(pointer, kind, count), f"{count} interrupts of type {kind}")
        if calls.migration is not None:
            callbacks = bindings.MigrationCallbacks(
                bindings.MIGRATION_CALLBACKS_VERSION,
                keep(bindings.TransitionCallback(calls.on_transition)),
                keep(bindings.DataCallback(calls.on_read_data)),
                keep(bindings.DataCallback(calls.on_write_data)),
            )
            require(vfu.vfu_setup_device_migration_callbacks(pointer, ctypes.byref(callbacks)), "migration")
        require(vfu.vfu_realize_ctx(pointer), "the whole set-up")

    def destroy(self) -> None:
        """Unmaps and resets through the callbacks."""
        self.private.close()
        self._vfu.vfu_destroy_ctx(self._pointer)
        self._kept.clear()

    def attach(self) -> str | None:
        """Accept the private connection, whose first message is there. Returns why that failed, or None."""
        return None if self._vfu.vfu_attach_ctx(self._pointer) == 0 else os.strerror(ctypes.get_errno())

    def read_from(self, client: socket.socket) -> None:
        """From here on requests come from there: its descriptor takes the place of the connection that there was."""
        os.dup2(client.fileno(), self._vfu.vfu_get_poll_fd(self._pointer), inheritable=False)

    def run(self) -> str | None:
        """One request. Returns None, or why the connection must end ("" if the client simply left)."""
        result = self._vfu.vfu_run_ctx(self._pointer)
        error = ctypes.get_errno()
        self._calls.raise_escaped()
        if result >= 0:
            return None
        if error in (errno.ENOTCONN, errno.EBADF):
            return ""
        return f"the library gave up on it: {os.strerror(error)}"

    def trigger(self, vector: int) -> bool:
        """Raise an interrupt. False if the client has set up no eventfd for it."""
        return bool(self._vfu.vfu_irq_trigger(self._pointer, vector) == 0)

    def mark_dirty(self, iova: int, size: int) -> None:
        """Tell the library that memory in one of its regions was written. Raises MigrationRefused if there is none."""
        entry, pointer = bindings.ScatterGather(), self._pointer
        found = self._vfu.vfu_addr_to_sgl(pointer, iova, size, ctypes.byref(entry), 1, bindings.PROT_WRITE)
        if found != 1:
            raise MigrationRefused(f"libvfio-user cannot mark {size} bytes at {iova:#x} as written", errno.EIO)
        self._vfu.vfu_sgl_mark_dirty(pointer, ctypes.byref(entry), 1)

    def write(self, iova: int, chunk: bytes) -> int:
        """Have the client write to its memory. Returns an errno, or 0. Raises AddressNotMapped."""
        entry, pointer = bindings.ScatterGather(), self._pointer
        count = self._vfu.vfu_addr_to_sgl(pointer, iova, len(chunk), ctypes.byref(entry), 1, bindings.PROT_WRITE)
        if count != 1:
            reason = _errno_text() if count == -1 else "it spans several regions"
            raise AddressNotMapped(f"libvfio-user cannot resolve {len(chunk)} bytes at I/O address {iova:#x}: {reason}")
        if self._generation is Generation.OLD:
            # This generation sends the start of the region as the address, whatever the offset within it.
            entry.region_base += entry.offset
            result = self._vfu.vfu_sgl_write(pointer, ctypes.byref(entry), 1, chunk)
        else:
            result = self._vfu.vfu_sgl_write(pointer, ctypes.byref(entry), 1, chunk, 0)
        return ctypes.get_errno() if result else 0


def _on_log(_context: int, level: int, message: bytes) -> None:
    try:
        text = message.decode("utf-8", "replace")
        if _NOISE.search(text):
            severity = logging.DEBUG
        else:
            severity = logging.ERROR if level <= 3 else logging.WARNING if level == 4 else logging.DEBUG
        _library_logger.log(severity, "%s", text)
    except Exception:
        # There is nowhere left to report to.
        return


def folder_for(folder: Path | None) -> Path | None:
    """Where a context may have its own socket for a moment: in the directory of ours, if there is room for a name, else
    None.

    Whoever owns that directory clears it away if we are killed meanwhile.
    """
    if folder is None or len(os.fsencode(folder)) + len("/.c-12345678/s") > LONGEST_PATH:
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _errno_text() -> str:
    return os.strerror(ctypes.get_errno())
