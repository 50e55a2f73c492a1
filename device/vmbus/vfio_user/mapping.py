"""Guest memory that stays safe to touch after the guest has taken it back.

The library maps a region that the client offers, tells us, and unmaps it the moment our unregister callback returns.
Any view over *its* mapping would then kill the process. So we never give out views over its mapping. `GuestMapping`
takes a second mapping of the same shared pages, gives out views over that one, and `revoke` replaces it, in one
system call, by private zero pages. A view that somebody still holds then reads zeroes or leftovers and writes into
nothing; it reaches neither guest memory nor an unmapped page. The address range is given back when the last view
has been garbage collected.
"""

from __future__ import annotations

import ctypes
import errno
import os
import weakref

from vmbus.errors import EnvironmentProblem, UsageError

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

PROT_READ = 1
PROT_WRITE = 2
_MREMAP_MAYMOVE = 1
_MAP_PRIVATE = 0x02
_MAP_FIXED = 0x10
_MAP_ANONYMOUS = 0x20
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.restype = ctypes.c_int
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class _RemoteVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = [
    ctypes.c_int,
    ctypes.POINTER(_RemoteVector),
    ctypes.c_ulong,
    ctypes.POINTER(_RemoteVector),
    ctypes.c_ulong,
    ctypes.c_ulong,
]


class GuestMapping:
    """Our own mapping of `size` bytes of shared memory that is mapped at `address` by someone else.

    `writable` says what the views allow; the pages' protection says what the processor allows. Raises
    EnvironmentProblem if the pages cannot be mapped a second time (they are not shared), or if the file behind them
    is shorter than the mapping (touching the missing pages would kill the process).
    """

    def __init__(self, address: int, size: int, *, writable: bool) -> None:
        if size <= 0:
            raise UsageError(f"a guest mapping needs a size above 0, not {size}")
        lead = address % PAGE_SIZE
        length = (lead + size + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE
        # An old size of 0 makes mremap leave the original alone and map the same shared pages once more.
        duplicate = _libc.mremap(address - lead, 0, length, _MREMAP_MAYMOVE)
        if duplicate is None or duplicate == _MAP_FAILED:
            raise EnvironmentProblem(
                f"guest memory of {size} bytes cannot be mapped a second time: {_errno_text()}; "
                "QEMU's memory backend must be shared (share=on)"
            )
        try:
            protection = PROT_READ | (PROT_WRITE if writable else 0)
            if _libc.mprotect(duplicate, length, protection) != 0:
                access = "writable" if writable else "readable"
                raise EnvironmentProblem(f"guest memory of {size} bytes cannot be made {access}: {_errno_text()}")
            _require_backed(duplicate + lead + size - 1, size)
        except BaseException:
            _libc.munmap(duplicate, length)
            raise
        self.size = size
        self.writable = writable
        self._duplicate: int = duplicate
        self._length = length
        self._revoked = False
        array = (ctypes.c_ubyte * size).from_address(duplicate + lead)
        # Every view, slice and cast keeps this array alive. Never at exit: views may still be in use then.
        self._release = weakref.finalize(array, _libc.munmap, duplicate, length)
        self._release.atexit = False
        view = memoryview(array).cast("B")
        self._view: memoryview | None = view if writable else view.toreadonly()

    @property
    def view(self) -> memoryview:
        """The memory: format "B", `size` items; read-only unless writable. Raises UsageError after `revoke`."""
        if self._view is None:
            raise UsageError("this guest memory was revoked: the guest has taken it back")
        return self._view

    @property
    def revoked(self) -> bool:
        """Whether the guest has taken the memory back."""
        return self._revoked

    @property
    def released(self) -> bool:
        """Whether the address range has been given back to the system: no view of it is left."""
        return not self._release.alive

    def revoke(self) -> None:
        """Cut every view off from guest memory, at once and for ever. Repeating it does nothing."""
        if self._revoked:
            return
        replaced = _libc.mmap(
            self._duplicate,
            self._length,
            PROT_READ | PROT_WRITE,
            _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED,
            -1,
            0,
        )
        if replaced != self._duplicate:
            # Views could still reach memory that the guest uses for something else by now. There is no way on.
            raise EnvironmentProblem(f"guest memory of {self.size} bytes cannot be revoked: {_errno_text()}")
        self._revoked = True
        self._view = None


def _require_backed(address: int, size: int) -> None:
    """Raise EnvironmentProblem if the byte at `address` has no page behind it."""
    byte = ctypes.create_string_buffer(1)
    local = _RemoteVector(ctypes.addressof(byte), 1)
    remote = _RemoteVector(address, 1)
    # Reading through the kernel gives an error where reading directly would raise SIGBUS.
    if _libc.process_vm_readv(os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) == 1:
        return
    if ctypes.get_errno() in (errno.ENOSYS, errno.EPERM):
        return  # a sandbox without this call: trust the client, as every other server does
    raise EnvironmentProblem(f"guest memory of {size} bytes is longer than the file behind it: {_errno_text()}")


def _errno_text() -> str:
    return os.strerror(ctypes.get_errno())
