"""Clients that have come and not shaken hands yet, and what is looked at in their VERSION exchange."""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

from vmbus.transport import bindings, protocol
from vmbus.transport.connection import Waiting, bound_blocking, look
from vmbus.transport.migration import LONGEST_DATA
from vmbus.transport.protocol import HEADER
from vmbus.util.complaints import bounded_log
from vmbus.util.listening import Listener

logger = bounded_log(__name__)

_LONGEST_VERSION_MESSAGE = 65536
_MOST_PENDING = 8
_COOLING = 0.1


@dataclass
class Pending:
    """A client that has not yet sent its VERSION message."""

    socket: socket.socket
    deadline: float


class Doorway:
    """Lets `_MOST_PENDING` clients wait, each for `handshake_timeout` seconds; `pending`: those that do.

    A client that comes and fails, or goes, keeps its place for `_COOLING` seconds, and nobody else is accepted while
    all places are taken. So neither a crowd nor a lack of descriptors keeps us busy.
    """

    def __init__(
        self, listener: Listener, epoll: select.epoll, handshake_timeout: float, message_timeout: float
    ) -> None:
        self.pending: list[Pending] = []
        self._listener = listener
        self._epoll = epoll
        self._handshake_timeout = handshake_timeout
        self._message_timeout = message_timeout
        self._cooling: list[float] = []  # when places are free again that failed clients had
        self._watched = True  # the listening socket is looked at
        epoll.register(listener.socket.fileno(), select.EPOLLIN)

    @property
    def deadlines(self) -> list[float]:
        """When there is something to do here, whoever comes."""
        return [*(pending.deadline for pending in self.pending), *self._cooling[:1]]

    def places(self) -> int:
        """How many more clients may wait."""
        now = time.monotonic()
        self._cooling = [end for end in self._cooling if end > now]
        return _MOST_PENDING - len(self.pending) - len(self._cooling)

    def cool(self, places: int) -> None:
        """Give away no more than the places that are left, for a while."""
        self._cooling += [time.monotonic() + _COOLING] * places

    def let_in(self) -> None:
        """Accept whoever is there, as far as there are places."""
        while self.places():
            try:
                client = self._listener.accept()
            except OSError as error:
                logger.warning("no client can be accepted on %s for now: %s", self._listener.path, error)
                self.cool(self.places())
                return
            if client is None:
                return
            bound_blocking(client, self._message_timeout)
            self.pending.append(Pending(client, time.monotonic() + self._handshake_timeout))
            self._epoll.register(client.fileno(), select.EPOLLIN | select.EPOLLET)

    def ready(self) -> Iterator[tuple[Pending, int]]:
        """Those whose VERSION message is there, and its bytes. Others are dropped if they have no time left, hang up or
        talk nonsense."""
        for pending in list(self.pending):
            waiting, size, _, _ = look(pending.socket)
            if waiting is Waiting.COMPLETE and size <= _LONGEST_VERSION_MESSAGE:
                yield pending, size
            elif waiting is Waiting.NOTHING or waiting is Waiting.PARTIAL:
                if time.monotonic() >= pending.deadline:
                    self.drop(pending, f"no complete VERSION message within {self._handshake_timeout:g} s")
            elif waiting is Waiting.CLOSED:
                self.drop(pending, "it left before its VERSION message")
            else:
                self.drop(pending, "its first message is not a VERSION message")

    def drop(self, pending: Pending, reason: str) -> None:
        """It may come again."""
        logger.warning("client on %s dropped: %s", self._listener.path, reason)
        self.cool(1)
        self.pending.remove(pending)
        self._epoll.unregister(pending.socket.fileno())
        pending.socket.close()

    def shut(self, chosen: Pending) -> None:
        """A device has one client: this one. The next one waits in the socket's queue without waking us."""
        self.pending.remove(chosen)
        for other in list(self.pending):
            self.drop(other, "another client was faster")
        self._watch(False)

    def open(self) -> None:
        """Whoever comes now wakes us, if there is a place."""
        self._watch(self.places() > 0)

    def _watch(self, wanted: bool) -> None:
        if wanted != self._watched:
            self._watched = wanted
            self._epoll.modify(self._listener.socket.fileno(), select.EPOLLIN if wanted else 0)

    def close(self) -> None:
        """Hang up on all of them."""
        for pending in self.pending:
            pending.socket.close()
        self.pending.clear()


def announced_transfer(version_request: bytes) -> int:
    """The largest data in bytes that the client takes in one message, from its VERSION request."""
    text = version_request[HEADER.size + 4 :].rstrip(b"\0")
    try:
        announced = json.loads(text)["capabilities"]["max_data_xfer_size"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return bindings.MAX_DATA_TRANSFER
    if type(announced) is not int or announced < 0:
        return bindings.MAX_DATA_TRANSFER
    return min(announced, bindings.MAX_DATA_TRANSFER)


def with_shorter_transfers(version_reply: bytes) -> bytes:
    """The answer to VERSION with LONGEST_DATA in the place of the library's limit."""
    message_id, command, _, flags, error = HEADER.unpack_from(version_reply)
    start = HEADER.size + protocol.VERSION_PREFIX.size
    try:
        told = json.loads(version_reply[start:].rstrip(b"\0"))
        told["capabilities"]["max_data_xfer_size"] = min(told["capabilities"]["max_data_xfer_size"], LONGEST_DATA)
    except (ValueError, KeyError, TypeError, RecursionError):
        return version_reply
    body = version_reply[HEADER.size : start] + json.dumps(told, separators=(",", ":")).encode() + b"\0"
    return protocol.encode(message_id, command, body, flags=flags, error=error)
