"""Descriptors that somebody wants to hear of: a call whenever one is ready.

Level-triggered: the call comes again and again until what was ready has been taken. A call may also come when nothing
is ready any more (somebody else took it meanwhile), so use non-blocking descriptors. Sockets, pipes, eventfds, TAP and
other devices can be watched; plain files are always ready, and the kernel refuses them.
"""

from __future__ import annotations

import select
from collections.abc import Callable

from vmbus.errors import UsageError
from vmbus.util.complaints import bounded_log

log = bounded_log(__name__)

_READ = select.EPOLLIN | select.EPOLLPRI | select.EPOLLHUP | select.EPOLLERR
_WRITE = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR


def _log(what: str, error: BaseException) -> None:
    log.error("%s raised", what, exc_info=error)


class Watches:
    """A set of descriptors with their calls. Its own `fileno` is readable while any of them is ready.

    `raised`: told of a call that has raised, by what it is and the exception; by default it is logged.
    """

    def __init__(self, raised: Callable[[str, BaseException], None] | None = None) -> None:
        self._raised = raised or _log
        self._epoll = select.epoll()
        self._readers: dict[int, Callable[[], None]] = {}
        self._writers: dict[int, Callable[[], None]] = {}

    def fileno(self) -> int:
        """For whoever waits for several things at once."""
        return self._epoll.fileno()

    def __len__(self) -> int:
        return len(self._readers.keys() | self._writers.keys())

    @property
    def descriptors(self) -> list[int]:
        """What is watched, in ascending order."""
        return sorted(self._readers.keys() | self._writers.keys())

    def add_reader(self, fd: int, call: Callable[[], None]) -> None:
        """Call while `fd` is readable, or hung up; takes the place of an earlier call for it.

        Raises UsageError for a descriptor that cannot be watched.
        """
        self._add(self._readers, fd, call)

    def add_writer(self, fd: int, call: Callable[[], None]) -> None:
        """Call while `fd` can be written to, or is hung up; takes the place of an earlier call for it.

        Raises UsageError for a descriptor that cannot be watched.
        """
        self._add(self._writers, fd, call)

    def remove_reader(self, fd: int) -> bool:
        """Do not call any more. Returns whether there was a call. Remove a descriptor before closing it."""
        return self._remove(self._readers, fd)

    def remove_writer(self, fd: int) -> bool:
        """Do not call any more. Returns whether there was a call. Remove a descriptor before closing it."""
        return self._remove(self._writers, fd)

    def poll(self, timeout: float = 0.0) -> bool:
        """Wait up to `timeout` seconds for one to be ready, and make the calls. Returns whether there was any.

        Of a call that raises `raised` is told, and its descriptor is not watched any more: it would raise for ever.
        """
        ready = self._epoll.poll(timeout)
        for fd, events in ready:
            if events & _READ:
                self._call(self._readers, fd)
            if events & _WRITE:
                self._call(self._writers, fd)
        return bool(ready)

    def close(self) -> None:
        """Watch nothing any more."""
        self._readers.clear()
        self._writers.clear()
        self._epoll.close()

    def _call(self, calls: dict[int, Callable[[], None]], fd: int) -> None:
        call = calls.get(fd)
        if call is None:
            return
        try:
            call()
        except Exception as error:
            if calls.get(fd) is call:
                self._remove(calls, fd)
            what = "add_reader" if calls is self._readers else "add_writer"
            self._raised(f"the call of {what} for descriptor {fd}, which is not watched any more,", error)

    def _add(self, calls: dict[int, Callable[[], None]], fd: int, call: Callable[[], None]) -> None:
        before = calls.get(fd)
        calls[fd] = call
        try:
            self._tell(fd)
        except (OSError, ValueError) as error:
            if before is None:
                del calls[fd]
            raise UsageError(f"descriptor {fd} cannot be watched: {error}") from error

    def _remove(self, calls: dict[int, Callable[[], None]], fd: int) -> bool:
        if calls.pop(fd, None) is None:
            return False
        try:
            self._tell(fd)
        except (OSError, ValueError):
            log.debug("descriptor %d was closed while it was watched", fd)
        return True

    def _tell(self, fd: int) -> None:
        events = (select.EPOLLIN if fd in self._readers else 0) | (select.EPOLLOUT if fd in self._writers else 0)
        if not events:
            self._epoll.unregister(fd)
            return
        try:
            self._epoll.modify(fd, events)
        except FileNotFoundError:  # not known yet, or closed since and opened again
            self._epoll.register(fd, events)
