"""The requests of an attached client: those that the library handles, and those that are looked at first.

The latter offer memory, take it back, or are about migration. What is answered here is never seen by the library.
"""

from __future__ import annotations

import os
import socket
import struct
from itertools import islice

from vmbus.transport import bindings, protocol
from vmbus.transport.callbacks import Callbacks
from vmbus.transport.connection import bound_blocking, receive
from vmbus.transport.library_context import LibraryContext
from vmbus.transport.migration import LONGEST_LOOK, FeatureGate, MigrationRefused
from vmbus.transport.offers import Offer, Region
from vmbus.transport.protocol import HEADER
from vmbus.util.complaints import bounded_log

logger = bounded_log(__name__)


class Requests:
    """Of one client, which has a context of the library's for itself."""

    def __init__(
        self,
        client: socket.socket,
        context: LibraryContext,
        calls: Callbacks,
        gate: FeatureGate,
        message_timeout: float,
    ) -> None:
        self._client = client
        self._context = context
        self._calls = calls
        self._gate = gate
        self._message_timeout = message_timeout

    def watched(self, command: int, size: int, room: int) -> tuple[int, str | None]:
        """One request that is looked at first. Returns how much of `room` it took, and as `library`."""
        if command == protocol.Command.DMA_MAP:
            return 1, self._map(size)
        try:
            start = self._client.recv(min(size, LONGEST_LOOK), socket.MSG_PEEK | socket.MSG_DONTWAIT)
            after = self._gate.before(command, start[HEADER.size :])
        except MigrationRefused as refusal:
            logger.error("the client's migration: %s", refusal)
            return 1, self._answer(size, refusal.errno)
        except OSError:
            return 1, ""
        if command == protocol.Command.DMA_UNMAP:
            done, problem = self._unmap(size, room)
        else:
            done, problem = 1, self.library()
        if problem is None and after is not None:
            after()
        return done, problem

    def _answer(self, size: int, code: int, body: bytes | None = None) -> str | None:
        """Take the next request, of `size` bytes, off the socket and answer it: with an error, or 0. Returns as above.

        `body`: of the answer; None for what the request itself says.
        """
        try:
            request = b""
            while len(request) < size:  # a read ends where descriptors come along
                piece, stray = receive(self._client, size - len(request), socket.MSG_WAITALL)
                for fd in stray:
                    os.close(fd)
                if not piece:
                    return ""
                request += piece
            message_id, command, _, flags, _ = HEADER.unpack_from(request)
            if not flags & protocol.FLAG_NO_REPLY:
                answer = protocol.TYPE_REPLY | (protocol.FLAG_ERROR if code else 0)
                content = b"" if code else request[HEADER.size :] if body is None else body
                self._client.sendall(protocol.encode(message_id, command, content, flags=answer, error=code))
        except OSError as error:
            return f"its request could not be answered ({error})"
        return None

    def library(self) -> str | None:
        """One request. Returns None, or why the connection must end ("" if the client simply left)."""
        return self._context.run()

    def _map(self, size: int) -> str | None:
        """A DMA_MAP request of `size` bytes. Returns as `library`."""
        wanted = HEADER.size + protocol.DMA_MAP.size
        if size < wanted:
            return self.library()  # refused there
        descriptors: list[int] = []
        try:
            start, descriptors = receive(self._client, wanted, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            if len(start) < wanted:
                return "it sent a request to map memory in pieces"
            offer = Offer.read(start[HEADER.size :], descriptors)
            code = self._calls.regions.answer(offer, descriptors)
        except OSError:
            return ""
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        if code is not None:
            return self._answer(size, code, b"")
        self._calls.offer = offer
        try:
            return self.library()
        finally:
            self._calls.offer = None

    def _unmap(self, size: int, room: int) -> tuple[int, str | None]:
        """A DMA_UNMAP request of `size` bytes, to which nothing else is to be said. Returns as `_run_watched`.

        The request stays where it is until the last of its regions is gone: `run` then comes back to it.
        """
        wanted = HEADER.size + protocol.DMA_UNMAP.size
        try:
            start = self._client.recv(wanted, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            return 1, ""
        if size != wanted or len(start) != wanted:
            return 1, self.library()
        _, flags, iova, length = protocol.DMA_UNMAP.unpack_from(start, HEADER.size)
        inside: list[Region] = []
        if flags == 0:
            inside = list(islice(self._calls.regions.inside(iova, iova + length), room + 1))
        elif flags == protocol.DMA_UNMAP_ALL and not iova and not length:
            inside = list(islice(self._calls.regions, room + 1))
        if not inside or (flags == 0 and (inside[0].iova, inside[0].size) == (iova, length)):
            return 1, self.library()
        if (problem := self.unmap(inside[:room])) is not None or len(inside) > room:
            return room, problem
        return len(inside), self._answer(size, 0)

    def unmap(self, regions: list[Region]) -> str | None:
        """Have the library remove regions, with requests on a connection of our own. Returns as above."""
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            return f"no connection can be had to take back its memory ({error})"
        with ours, theirs:
            for end in (ours, theirs):
                bound_blocking(end, self._message_timeout)
            self._context.read_from(theirs)
            try:
                for region in regions:
                    body = protocol.DMA_UNMAP.pack(protocol.DMA_UNMAP.size, 0, region.iova, region.size)
                    ours.sendall(protocol.encode(0, protocol.Command.DMA_UNMAP, body))
                    if (problem := self.library()) is not None:
                        return problem or "the library gave up on it while memory was taken back"
                    reply = ours.recv(bindings.MAX_MESSAGE)
                    if HEADER.unpack_from(reply)[3] & protocol.FLAG_ERROR:
                        return f"the library does not take back memory at {region.iova:#x}"
            except (OSError, struct.error) as error:
                return f"the library does not take back memory ({error})"
            finally:
                self._context.read_from(self._client)
        return None
