"""Incoming packets: the handle that their receiver must complete exactly once."""

import os
from threading import get_ident
from typing import cast

from vmbus.kmcl.flow import CompletionBase, Flow
from vmbus.kmcl.status import ChannelStateError, KmclError, Status
from vmbus.memory.guest import Grant, MemoryFault
from vmbus.wire.packet import PacketError, PacketType, TransferPages, parse_gpa_direct, parse_transfer_pages

_GPA_DIRECT = int(PacketType.GPA_DIRECT)


class Completion(CompletionBase):
    """An incoming packet that has not been completed yet (VMBPACKETCOMPLETION); `complete` ends it.

    Attributes:
        transaction: the sender's id.
        wanted: whether the sender waits for a completion packet.
        context: scratch space of the receiver: a bytearray of the channel's client context size, else None.
        deferred: whether the packet was put off with `defer_to_passive`.
        size: bytes that it holds here, for the channel's bounds.
        kind: which `vmbus.wire.packet.PacketType` it is.
    """

    __slots__ = ()

    @property
    def contents(self) -> tuple[bytes, bytes]:
        """As they lay in the ring: the headers of the packet's type, and its payload."""
        return self._body, self._payload

    def external_data(self, *, read_only: bool = False) -> Grant:
        """The guest memory that the packet describes, as memoryviews (VmbChannelPacketGetExternalData).

        The grant dies with `complete`. Asked for twice, it is the same grant, so the first call decides about
        `read_only`. Raises KmclError (DATA_ERROR) when the memory is not what the guest made reachable: complete the
        packet with an error of your protocol; INVALID_DEVICE_REQUEST when the packet has no external data.
        """
        where = f"packet {self.transaction} of channel {self.channel.name}"
        if self.done or not self.has_external_data:
            what = "was completed: its external data is gone" if self.done else "has no external data"
            raise KmclError(f"{where} {what}", Status.INVALID_DEVICE_REQUEST)
        if self._grant is not None:
            return cast(Grant, self._grant)
        self.channel.threads.require_own("external_data")
        memory = self.channel.memory_of(self)
        if memory is None:
            raise KmclError(f"{where}: the channel was closed", Status.CANCELLED)
        try:
            ranges = parse_gpa_direct(self._body, max_bytes=self.channel.maximum_external_data)
            if len(ranges) > self.channel.maximum_chain:
                raise PacketError(f"{len(ranges)} ranges; the channel takes {self.channel.maximum_chain}")
            extents = [extent for one in ranges for extent in one.extents()]
            grant = self._grant = memory.grant(extents, writable=not read_only)
        except (PacketError, MemoryFault) as error:
            raise KmclError(f"external data of {where}: {error}", Status.DATA_ERROR) from error
        return grant

    def move(self, fd: int, offset: int, length: int, *, write: bool, flags: int = 0) -> int | None:
        """Have the kernel move `length` bytes between a file and the memory that the packet describes, all of it:
        pwritev2 with `write`, else preadv2, at `offset`, with `flags`. Returns how many bytes were moved.

        None, and nothing was done, where it is not as simple as that: go over `external_data`, which says what is
        wrong, if anything is. Raises OSError.
        """
        channel = self.channel
        if self.done or self._grant is not None or self.kind != _GPA_DIRECT or length > channel.maximum_external_data:
            return None
        memory = channel.memory_of(self)
        reach = None if memory is None or get_ident() != channel.thread else memory.reach
        moved = None if reach is None else reach.move(self._body, length, fd, offset, write, flags)
        if moved is not None and moved < 0:
            raise OSError(-moved, os.strerror(-moved))
        return moved

    def transfer_pages(self) -> TransferPages:
        """Which parts of memory that was lent to the other end the packet hands over; they are lent again with
        `complete`. Raises KmclError: DATA_ERROR when the description is malformed, INVALID_DEVICE_REQUEST when the
        packet has none."""
        where = f"packet {self.transaction} of channel {self.channel.name}"
        if self.kind != PacketType.TRANSFER_PAGES:
            raise KmclError(f"{where} is not over transfer pages", Status.INVALID_DEVICE_REQUEST)
        try:
            return parse_transfer_pages(self._body)
        except PacketError as error:
            raise KmclError(f"{where}: {error}", Status.DATA_ERROR) from error

    def complete_otherwise(self, reply: bytes) -> None:
        """For `complete`: the checks, other threads, and memory that is to be given back."""
        channel = self.channel
        if self.done:
            raise self.completed_twice()
        if self.wanted and len(reply) > channel.largest_payload:
            raise KmclError(
                f"a reply of {len(reply)} bytes to packet {self.transaction} of channel {channel.name} can never "
                f"fit into its ring (at most {channel.largest_payload})",
                Status.INVALID_PARAMETER,
            )
        if get_ident() != channel.thread:
            channel.threads.complete(self, reply)
        else:
            self.done = True
            self.finish(reply)

    def finish(self, reply: bytes) -> None:
        """For `threads`: the part of `complete` that the channel's own thread does."""
        if self._grant is not None:
            self._grant.release()
        self.channel.flow.complete(self, reply)

    def orphan(self) -> None:
        """For the channel: it is closed by force, and nobody will complete this packet. Its memory is given back."""
        if self._grant is not None:
            self._grant.abandon()

    def defer_to_passive(self) -> None:
        """Have this packet handed over once more, where blocking calls are possible (VmbChannelPacketDeferToPassive).

        Only from inside the packet's `process_packet`; raises ChannelStateError elsewhere, and the second time.
        """
        self.channel.threads.require_own("defer_to_passive")
        self.channel.incoming.defer(self)

    def fail(self, reason: str) -> None:
        """The packet is malformed beyond recovery (VmbChannelPacketFail): the channel is closed. This finishes the
        packet; raises ChannelStateError when it was completed before."""
        self.channel.threads.require_own("the fail of a packet")
        if self.done:
            raise self.completed_twice()
        self.done = True
        if self._grant is not None:
            self._grant.release()
        self.channel.fail_incoming(self, f"packet {self.transaction}: {reason}")

    def completed_twice(self) -> ChannelStateError:
        return ChannelStateError(
            f"packet {self.transaction} of channel {self.channel.name} was completed already; "
            "each incoming packet is completed exactly once",
            Status.INVALID_DEVICE_REQUEST,
        )


Flow.completions = Completion
