"""Service `block`: a disk of the host's appears as a block device of the kernel's, through its nbd driver.

Requests of the kernel come over a socket and go to the host as packets, several at a time, long ones in pieces. Data is
read from and written to the socket in the very memory that the host sees. When the host withdraws the disk, requests
wait, and are sent again when it is offered anew: each of them may be done twice without harm. A disk that comes back as
another one, or not within `wait_seconds`, makes them fail with an I/O error.

Parameters, besides the common ones of `Workload`:

    device        the number of the nbd device: 0 is /dev/nbd0
    buffer_mib    memory for data in flight
    wait_seconds  how long requests wait for a disk that was withdrawn; 0: for ever
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from vmbus.errors import EnvironmentProblem
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.status import Status as PacketStatus
from vmbus.wire import block as wire
from vmbus.wire.block import BLOCK_TYPE, Disk, Feature, Flag, Hello, Op, Status, parse_disk, parse_status
from vmbus_guest import nbd
from vmbus_guest.channel_driver import ChannelDriver
from vmbus_guest.huge_pages import Extents
from vmbus_guest.pci import PAGE_SIZE
from vmbus_guest.services.service import Service
from vmbus_guest.testdrivers.context import Parameters
from vmbus_guest.testdrivers.workload import LONGEST_STEP

_PER_TURN = 64  # requests read from the kernel before the host's replies get their turn
_REPLY_SECONDS = 30
_END_SECONDS = 10.0

_OPS = {
    nbd.READ: Op.READ,
    nbd.WRITE: Op.WRITE,
    nbd.FLUSH: Op.FLUSH,
    nbd.TRIM: Op.DISCARD,
    nbd.WRITE_ZEROES: Op.WRITE_ZEROES,
}
_ERRORS: dict[int, int] = {
    Status.NO_SPACE: errno.ENOSPC,
    Status.READ_ONLY: errno.EPERM,
    Status.UNSUPPORTED: errno.EOPNOTSUPP,
}
_HAS_DATA = frozenset({Op.READ, Op.WRITE})


class Attached(Protocol):
    """What the service needs of the kernel's device; see `vmbus_guest.nbd.NbdDevice`."""

    path: str
    socket: socket.socket

    def close(self) -> None:
        """Detach."""


def attach(number: int, disk: Disk) -> Attached:
    """Make the disk a device of the kernel's."""
    nbd.load_module()
    flags = nbd.FLAG_SEND_FLUSH
    for feature, flag in (
        (Feature.READ_ONLY, nbd.FLAG_READ_ONLY),
        (Feature.FUA, nbd.FLAG_SEND_FUA),
        (Feature.DISCARD, nbd.FLAG_SEND_TRIM),
        (Feature.WRITE_ZEROES, nbd.FLAG_SEND_WRITE_ZEROES),
    ):
        if disk.features & feature:
            flags |= flag
    device = nbd.NbdDevice(number, disk.size, disk.block_size, flags)
    device.set_queue("max_sectors_kb", disk.maximum_data >> 10)
    return device


class _Request:
    """A request of the kernel's. `left`: pieces that the host has not answered, or that were not even sent."""

    __slots__ = ("error", "flags", "handle", "left", "length", "offset", "op", "pieces")

    def __init__(self, op: Op, flags: int, handle: int, offset: int, length: int) -> None:
        self.op = op
        self.flags = flags
        self.handle = handle
        self.offset = offset
        self.length = length
        self.pieces: list[_Piece] = []
        self.left = 0
        self.error = 0


class _Piece:
    """What one packet asks for. `start`: where its data is in the service's memory, -1 without data."""

    __slots__ = ("filled", "length", "number", "offset", "request", "start")

    def __init__(self, request: _Request, number: int, offset: int, length: int) -> None:
        self.request = request
        self.number = number
        self.offset = offset
        self.length = length
        self.start = -1
        self.filled = 0


class BlockService(Service):
    """See the module's text."""

    name = "block"
    interface_type = BLOCK_TYPE
    attach: Callable[[int, Disk], Attached] = staticmethod(attach)

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._number = parameters.get("device", 0, minimum=0, maximum=15)
        self._size = parameters.get("buffer_mib", 4, minimum=1, maximum=16) << 20
        self._wait_seconds = parameters.get("wait_seconds", 60.0, minimum=0)
        self._disk: Disk | None = None
        self._device: Attached | None = None
        self._ready = False
        self._foreign = ""  # why the disk that came back is not the one that went
        self._away_since = 0.0
        self._given_up = False
        self._header = b""
        self._receiving: _Request | None = None  # a write whose data still comes
        self._starved: _Request | None = None  # one without memory for its (next) data
        self._left = False  # whether the kernel has given up
        self._reading = False  # whether the socket is watched
        self._requests: dict[int, _Request] = {}  # by number, in order
        self._waiting: list[_Piece] = []  # to be sent once the disk is there
        self._pieces = 0
        self._stop_at = 0.0
        self._tally = {"requests": 0, "bytes_read": 0, "bytes_written": 0, "flushes": 0, "errors": 0, "resent": 0}

    # ---- the channel ---------------------------------------------------------------------------------------------

    def open(self, driver: ChannelDriver) -> None:
        """Take memory, then ask for the channel."""
        self._buffer = driver.allocate(self._size)
        self._extents = Extents(self._size)
        super().open(driver)

    def prepare(self) -> None:
        """The host sends nothing but completions."""
        self.channel.set_process_packet_callbacks(self._process)
        self.channel.set_state_change_callbacks(started=self._started, suspend=self._suspend)
        self._away_since = time.monotonic()

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        completion.fail("the host's end of a disk sends no packets")

    def _started(self, channel: Channel) -> None:
        packet = channel.allocate_packet()
        packet.completion_routine = self._greeted
        packet.send(Hello().pack())

    def _suspend(self, _: Channel) -> None:
        if self._ready:
            self._away_since = time.monotonic()
        self._ready = False

    def _greeted(self, packet: Packet, status: int, reply: bytes) -> None:
        packet.free()
        if status != PacketStatus.SUCCESS:
            return
        disk = parse_disk(reply)
        if disk is None or not disk.maximum_data or disk.maximum_data % PAGE_SIZE or not disk.maximum_range:
            self._foreign = f"the host's answer to HELLO makes no sense: {reply[:64].hex()}"
        elif self._disk is None:
            self._disk = disk
            try:
                self._device = self.attach(self._number, disk)
            except EnvironmentProblem as error:
                self.trouble.append(str(error))
                return
            # Whoever waits here for ever has been left by the kernel.
            patience = struct.pack("@ll", _REPLY_SECONDS, 0)
            self._device.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        else:
            self._foreign = _difference(self._disk, disk)
        if self._foreign:
            self._give_up()
            return
        self._ready = True
        self._given_up = False
        waiting, self._waiting = sorted(self._waiting, key=lambda piece: piece.number), []
        with self.channel.batch():
            for piece in waiting:
                self._tally["resent"] += 1
                self._send(piece)
        self._read_on()

    # ---- from the kernel -----------------------------------------------------------------------------------------

    def _read_on(self) -> None:
        """Take requests from the kernel again, if nothing is in the way."""
        request = self._starved
        if request is not None:
            self._starved = None
            found = self._find_memory(request) if request.op is Op.READ else self._next_piece(request)
            if not found:
                return
        if not self._reading and self._device is not None and not self._left:
            self._reading = True
            self.driver.watch(self._device.socket.fileno(), self._readable)

    def _stop_reading(self) -> None:
        if self._reading and self._device is not None:
            self._reading = False
            self.driver.unwatch(self._device.socket.fileno())

    def _readable(self) -> None:
        device = self._device
        assert device is not None
        with self.channel.batch():
            for _ in range(_PER_TURN):
                if not self._reading or not self._take(device.socket):
                    return

    def _take(self, peer: socket.socket) -> bool:
        """Read once; False when there is no more for now."""
        try:
            if self._receiving is not None:
                piece = self._receiving.pieces[-1]
                start = piece.start + piece.filled
                view = self._buffer.view[start : piece.start + piece.length]
                count = peer.recv_into(view, 0, socket.MSG_DONTWAIT)
                piece.filled += count
            else:
                data = peer.recv(nbd.REQUEST.size - len(self._header), socket.MSG_DONTWAIT)
                self._header += data
                count = len(data)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._kernel_left(error.strerror or str(error))
            return False
        if count == 0:
            self._kernel_left("it closed its socket")
            return False
        if self._receiving is not None:
            if piece.filled == piece.length:
                self._dispatch(piece)
                self._next_piece(self._receiving)
        elif len(self._header) == nbd.REQUEST.size:
            header, self._header = self._header, b""
            self._begin(*nbd.REQUEST.unpack(header))
        return True

    def _kernel_left(self, reason: str) -> None:
        self._stop_reading()
        self._left = True
        if not self._stopped:
            self.trouble.append(f"the kernel left the disk: {reason}")

    def _begin(self, magic: int, kind: int, handle: int, offset: int, length: int) -> None:
        command, flags = kind & 0xFFFF, kind & ~0xFFFF
        if magic != nbd.REQUEST_MAGIC:
            self._kernel_left(f"its request begins with {magic:#x}")
            return
        if command == nbd.DISCONNECT:
            self._left = True
            self._stop_reading()
            return
        self._tally["requests"] += 1
        op = _OPS.get(command)
        request = _Request(op or Op.FLUSH, 0, handle, offset, length)
        self._requests[id(request)] = request
        if op is None or (not length and op is not Op.FLUSH):
            request.error = errno.EOPNOTSUPP if op is None else errno.EINVAL
            self._reply(request)
            return
        if flags & nbd.COMMAND_FLAG_FUA and op in (Op.WRITE, Op.WRITE_ZEROES):
            request.flags |= Flag.FUA
        if op is Op.WRITE_ZEROES and not flags & nbd.COMMAND_FLAG_NO_HOLE:
            request.flags |= Flag.MAY_UNMAP
        if op is Op.FLUSH:
            self._tally["flushes"] += 1
            request.offset = request.length = 0
            self._dispatch(self._piece(request, 0, 0))
        elif op is Op.WRITE:
            self._receiving = request
            request.left = 1  # not done before all its data has come
            self._next_piece(request)
        elif op is Op.READ:
            self._find_memory(request)
        else:
            self._cut(request)

    def _piece(self, request: _Request, offset: int, length: int) -> _Piece:
        self._pieces += 1
        piece = _Piece(request, self._pieces, offset, length)
        request.pieces.append(piece)
        request.left += 1
        return piece

    def _cut(self, request: _Request) -> None:
        """Pieces of a request without data, sent at once."""
        assert self._disk is not None
        most, end = self._disk.maximum_range, request.offset + request.length
        pieces = [self._piece(request, at, min(most, end - at)) for at in range(request.offset, end, most)]
        for piece in pieces:
            self._dispatch(piece)

    @property
    def _longest_piece(self) -> int:
        assert self._disk is not None
        return min(self._disk.maximum_data, self._size // 2)

    def _next_piece(self, request: _Request) -> bool:
        """Memory for the next data of a write; False, and nothing is read any more, while there is none."""
        done = sum(piece.length for piece in request.pieces)
        if done == request.length:
            self._receiving = None
            self._finish_piece(request)
            return True
        length = min(self._longest_piece, request.length - done)
        start = self._extents.take(-(-length // PAGE_SIZE) * PAGE_SIZE)
        if start is None:
            self._starved = request
            self._stop_reading()
            return False
        self._piece(request, request.offset + done, length).start = start
        return True

    def _find_memory(self, request: _Request) -> bool:
        """Memory for all data of a read, then send it; False, and nothing is read any more, while there is none."""
        if request.length > self._size:
            request.error = errno.ENOMEM
            self._reply(request)
            return True
        done = 0
        while done < request.length:
            length = min(self._longest_piece, request.length - done)
            start = self._extents.take(-(-length // PAGE_SIZE) * PAGE_SIZE)
            if start is None:
                # All or nothing: what it held could be just what keeps the rest from being in one piece.
                for piece in request.pieces:
                    self._release(piece)
                request.pieces.clear()
                request.left = 0
                self._starved = request
                self._stop_reading()
                return False
            self._piece(request, request.offset + done, length).start = start
            done += length
        for piece in list(request.pieces):
            self._dispatch(piece)
        return True

    # ---- to the host ---------------------------------------------------------------------------------------------

    def _dispatch(self, piece: _Piece) -> None:
        if self._given_up or self._foreign:
            piece.request.error = errno.EIO
            self._piece_done(piece)
        elif self._ready:
            self._send(piece)
        else:
            self._waiting.append(piece)

    def _send(self, piece: _Piece) -> None:
        request = piece.request
        packet = self.channel.allocate_packet()
        packet.pointer = piece
        packet.completion_routine = self._completed
        message = wire.Request(request.op, request.flags, piece.offset, piece.length).pack()
        data = request.op in _HAS_DATA
        packet.send(message, external=[(self._buffer.iova + piece.start, piece.length)] if data else None)

    def _completed(self, packet: Packet, status: int, reply: bytes) -> None:
        piece: _Piece = packet.pointer
        packet.free()
        if status != PacketStatus.SUCCESS:  # the channel is gone, and with it the answer
            self._dispatch(piece)
            return
        answer = parse_status(reply)
        if answer != Status.OK:
            piece.request.error = _ERRORS.get(answer, errno.EIO)
        self._piece_done(piece)

    def _piece_done(self, piece: _Piece) -> None:
        request = piece.request
        if request.op is not Op.READ:
            self._release(piece)
        self._finish_piece(request)
        if self._starved is not None:
            self._read_on()

    def _finish_piece(self, request: _Request) -> None:
        request.left -= 1
        if not request.left:
            self._reply(request)

    def _release(self, piece: _Piece) -> None:
        if piece.start >= 0:
            self._extents.give(piece.start, -(-piece.length // PAGE_SIZE) * PAGE_SIZE)
            piece.start = -1

    def _reply(self, request: _Request) -> None:
        del self._requests[id(request)]
        parts: list[bytes | memoryview] = [nbd.REPLY.pack(nbd.REPLY_MAGIC, request.error, request.handle)]
        if request.error:
            self._tally["errors"] += 1
        elif request.op is Op.READ:
            self._tally["bytes_read"] += request.length
            parts += [self._buffer.view[piece.start : piece.start + piece.length] for piece in request.pieces]
        elif request.op is Op.WRITE:
            self._tally["bytes_written"] += request.length
        try:
            self._say(parts)
        except OSError as error:
            self._kernel_left(f"it takes no replies: {error}")
        for piece in request.pieces:
            self._release(piece)
        if self._starved is not None:
            self._read_on()

    def _say(self, parts: list[bytes | memoryview]) -> None:
        """All of it; the kernel reads its end on a thread of its own, whatever we are doing."""
        assert self._device is not None
        pending = deque(parts)
        while pending:
            sent = self._device.socket.sendmsg(pending)
            while pending and sent >= len(pending[0]):
                sent -= len(pending.popleft())
            if sent:
                pending[0] = memoryview(pending[0])[sent:]

    # ---- the disk is away ----------------------------------------------------------------------------------------

    def tick(self, now: float) -> float:
        """Give up on a disk that does not come back."""
        away = self._disk is not None and not self._ready and self._wait_seconds > 0
        if away and not self._given_up and now - self._away_since > self._wait_seconds:
            self._give_up()
        return now + LONGEST_STEP

    def _give_up(self) -> None:
        """What waits fails, and what comes until the disk is back."""
        self._given_up = True
        waiting, self._waiting = self._waiting, []
        for piece in waiting:
            piece.request.error = errno.EIO
            self._piece_done(piece)

    # ---- the end -------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Serve what the kernel has asked for; `finished` tells when that is done."""
        super().stop()
        self._stop_at = time.monotonic() + _END_SECONDS

    def finished(self) -> bool:
        """When it was stopped, and the kernel waits for nothing (or has waited long enough)."""
        return self._stopped and (not self._requests or time.monotonic() > self._stop_at)

    def close(self) -> None:
        """Detach the device; whatever is still asked of it fails."""
        self._stop_reading()
        if self._device is not None:
            self._device.close()
            self._device = None
        super().close()

    def counts(self) -> dict[str, Any]:
        """What was done, and where it is."""
        return {
            **super().counts(),
            **self._tally,
            "device": None if self._device is None else self._device.path,
            "ready": self._ready,
            "in_flight": len(self._requests),
            "waiting": len(self._waiting),
            **({"foreign": self._foreign} if self._foreign else {}),
        }

    def good(self) -> bool:
        """The disk was the same one all the time."""
        return not self._foreign


def _difference(before: Disk, now: Disk) -> str:
    for what in ("identity", "size", "block_size", "features"):
        one, other = getattr(before, what), getattr(now, what)
        if one != other:
            return f"the disk came back as another one: its {what} was {one!r} and is {other!r}"
    return ""
