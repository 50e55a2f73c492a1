"""What becomes of the host's interface while it is used: others may switch it off, take it out of its bridge, or remove
it. The kernel tells of it over rtnetlink(7), to everybody, in the interface's network namespace.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from enum import StrEnum
from struct import Struct
from struct import error as StructError

from vmbus.errors import os_error

_ROUTE = 0
_LINK_GROUP = 1
_ERROR, _NEW, _GONE, _GET = 2, 16, 17, 18
_REQUEST = 1
_MASTER = 10  # attribute
_UP = 1

_HEADER = Struct("=IHHII")  # length, type, flags, sequence, port
_LINK = Struct("=BxHiII")  # family, kind of hardware, index, flags, what has changed
_ATTRIBUTE = Struct("=HH")
_NUMBER = Struct("=i")


class Trouble(StrEnum):
    """Why an interface is of no use now."""

    GONE = "it was removed"
    DOWN = "it is switched off"
    NO_BRIDGE = "it is no port of its bridge any more"


class News:
    """What messages of the kernel's say about one interface. Sans-I/O.

    Attributes: trouble: what is wrong with it; None: nothing.
    """

    def __init__(self, index: int, bridged: bool) -> None:
        self.index = index
        self.trouble: Trouble | None = None
        self._bridged = bridged

    def request(self) -> bytes:
        """A question for how it is."""
        return _HEADER.pack(_HEADER.size + _LINK.size, _GET, _REQUEST, 0, 0) + _LINK.pack(0, 0, self.index, 0, 0)

    def take(self, data: bytes) -> None:
        """Messages, one behind the other. What makes no sense is passed over."""
        try:
            for kind, body in _messages(data):
                if kind == _ERROR:
                    if _NUMBER.unpack_from(body)[0] == -errno.ENODEV:
                        self.trouble = Trouble.GONE
                elif kind in (_NEW, _GONE):
                    self._link(kind, body)
        except StructError:
            pass

    def _link(self, kind: int, body: bytes) -> None:
        family, _, index, flags, _ = _LINK.unpack_from(body)
        if index != self.index or family:  # a bridge's messages about its ports have a family
            return
        if kind == _GONE:
            self.trouble = Trouble.GONE
        elif not flags & _UP:
            self.trouble = Trouble.DOWN
        else:
            self.trouble = Trouble.NO_BRIDGE if self._bridged and not _has_master(body) else None


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return
        yield kind, data[at + _HEADER.size : at + length]
        at += -(-length // 4) * 4


def _has_master(body: bytes) -> bool:
    at = _LINK.size
    while at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if kind == _MASTER:
            return True
        if length < _ATTRIBUTE.size:
            return False
        at += -(-length // 4) * 4
    return False


class Watch:
    """The kernel's messages about one interface, until `close`. `fd`: readable when there are some."""

    def __init__(self, name: str, bridged: bool) -> None:
        """In the network namespace of the calling thread. Raises EnvironmentProblem."""
        with os_error(f"cannot watch interface {name!r}"):
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _ROUTE)
            try:
                self._news = News(socket.if_nametoindex(name), bridged)
                self._socket.bind((0, _LINK_GROUP))
                self._socket.send(self._news.request())  # since before this, nobody has looked
            except BaseException:
                self._socket.close()
                raise
        self.fd = self._socket.fileno()

    def look(self) -> Trouble | None:
        """What is wrong with it, by all that was told so far."""
        while True:
            try:
                self._news.take(self._socket.recv(1 << 16))
            except BlockingIOError:
                return self._news.trouble
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._socket.send(self._news.request())  # messages were lost

    def close(self) -> None:
        """Look no more. Repeating it does nothing."""
        self._socket.close()
