"""Guest memory that stays safe to touch after the guest has taken it back.

The library maps a region that the client offers, tells us, and unmaps it the moment our unregister callback returns.
Any view over *its* mapping would then kill the process. So we never give out views over its mapping. `GuestMapping`
takes a second mapping of the same shared pages, gives out views over that one, and `revoke` replaces it, in one
system call, by private zero pages. A view that somebody still holds then reads zeroes or leftovers and writes into
nothing; it reaches neither guest memory nor an unmapped page. The address range is given back when the last view
has been garbage collected.

A page may also go without anybody's asking: the client makes the file shorter (QEMU's sealed memfd cannot be), or the
system has no page left for a hole in it. Touching it raises SIGBUS, in the middle of whatever we do. `_on_bus_error`
answers as `revoke` does, and the touch goes on with zero pages. That a signal handler runs Python here is sound since
the signal is never asynchronous: the thread was about to copy bytes, under a view, and is in no other C code.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import weakref
from typing import Any

from vmbus.errors import EnvironmentProblem, UsageError

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

PROT_READ = 1
PROT_WRITE = 2
_MAP_SHARED = 0x01
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


class _SignalAction(ctypes.Structure):
    """`struct sigaction` of the C library (Linux, LP64)."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_SA_SIGINFO, _SA_RESTART, _SA_NODEFER = 0x4, 0x1000_0000, 0x4000_0000
_SIGINFO_ADDRESS = 16  # offset in `siginfo_t`


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
            _guard.install()
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
        self._release = weakref.finalize(array, _give_back, duplicate, length)
        self._release.atexit = False
        _guard.mapped[duplicate] = length
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
        return self._revoked

    @property
    def released(self) -> bool:
        """Whether the address range has been given back to the system: no view of it is left."""
        return not self._release.alive

    @property
    def lost(self) -> bool:
        """Whether pages were missing when somebody touched them: the views reach nothing any more."""
        return self._duplicate in _guard.lost and not self.released

    def revoke(self) -> None:
        """Cut every view off from guest memory, at once and for ever. Repeating it does nothing."""
        if self._revoked:
            return
        self._view = None  # the last one, mostly: then the address range is gone with it
        _guard.lost.discard(self._duplicate)
        if not self.released and not _replace(self._duplicate, self._length):
            # Views could still reach memory that the guest uses for something else by now. There is no way on.
            raise EnvironmentProblem(f"guest memory of {self.size} bytes cannot be revoked: {_errno_text()}")
        self._revoked = True


class _Guard:
    """Catches SIGBUS over our mappings.

    Attributes:
        mapped: where our mappings begin, and their lengths.
        lost: the beginnings of those of which a page was missing.
    """

    def __init__(self) -> None:
        self.mapped: dict[int, int] = {}
        self.lost: set[int] = set()
        self._before: _SignalAction | None = None
        self._handler: Any = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(self._on_bus_error)

    def install(self) -> None:
        """From now on. Repeating it does nothing."""
        if self._before is not None:
            return
        before, handler = _SignalAction(), ctypes.cast(self._handler, ctypes.c_void_p)
        ours = _SignalAction(handler, (ctypes.c_ulong * 16)(), _SA_SIGINFO | _SA_RESTART | _SA_NODEFER, None)
        if _libc.sigaction(signal.SIGBUS, ctypes.byref(ours), ctypes.byref(before)) != 0:
            raise EnvironmentProblem(f"SIGBUS cannot be caught: {_errno_text()}")
        self._before = before

    def _on_bus_error(self, _signal: int, info: int, _context: int) -> None:
        # On whichever thread touched the page. It logs nothing: the thread may hold any of Python's locks.
        address = ctypes.c_void_p.from_address(info + _SIGINFO_ADDRESS).value or 0
        for start, length in list(self.mapped.items()):
            if start <= address < start + length and _replace(start, length):
                self.lost.add(start)
                return
        # None of our business: the page is touched again, and what was to be done about it is done.
        before, self._before = self._before, None
        if before is not None:
            _libc.sigaction(signal.SIGBUS, ctypes.byref(before), None)


_guard = _Guard()


def any_lost() -> bool:
    """Whether pages of any mapping were missing, and it has not been given back."""
    return bool(_guard.lost)


def mapping_error(descriptor: int, offset: int, *, writable: bool) -> int:
    """The errno with which a file cannot be mapped at `offset`, or 0."""
    protection = PROT_READ | (PROT_WRITE if writable else 0)
    address = _libc.mmap(None, PAGE_SIZE, protection, _MAP_SHARED, descriptor, offset // PAGE_SIZE * PAGE_SIZE)
    if address is None or address == _MAP_FAILED:
        return ctypes.get_errno()
    _libc.munmap(address, PAGE_SIZE)
    return 0


def _replace(address: int, length: int) -> bool:
    """Put private zero pages in the place of whatever is there."""
    protection, flags = PROT_READ | PROT_WRITE, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
    return bool(_libc.mmap(address, length, protection, flags, -1, 0) == address)


def _give_back(address: int, length: int) -> None:
    _guard.mapped.pop(address, None)  # first: somebody else may be given the address as soon as it is free
    _guard.lost.discard(address)
    _libc.munmap(address, length)


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
