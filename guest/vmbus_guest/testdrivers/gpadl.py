"""Test driver `gpadl`: memory is lent to the lab, which maps it, transforms what is in it, and lets go of it; then it
is taken back. Some stay mapped at the host for a second transform, and are taken back while they are: then the host has
to let go before the guest gets them.

Parameters:

    count     GPADLs in all; 0: until stopped
    live      lent at the same time
    size      most bytes of one
    keep      share (0 to 1) of them that stay mapped at the host
"""

from __future__ import annotations

import zlib
from typing import Any

from vmbus.kmcl.status import Status as PacketStatus
from vmbus.wire.lab import HANDLE, KEEP, Op, request
from vmbus.wire.workload import STATUS_OK, Pattern, echo_request, parse_echo_reply, transform
from vmbus_guest.pci import PAGE_SIZE, DmaBuffer
from vmbus_guest.testdrivers.context import Parameters
from vmbus_guest.testdrivers.requests import LabWorkload, post
from vmbus_guest.testdrivers.workload import CountedWorkload

_BLOCK = 1 << 16


class Loan:
    def __init__(self, buffer: DmaBuffer, handle: int, kept: bool) -> None:
        self.buffer = buffer
        self.handle = handle
        self.kept = kept
        self.sequence = 0
        self.transforms = 0
        self.answered = False


class GpadlWorkload(CountedWorkload, LabWorkload):
    """See the module's text."""

    name = "gpadl"
    default_pages = 2
    default_count = 40

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._live = parameters.get("live", 4, minimum=1, maximum=64)
        self._size = parameters.get("size", 256 << 10, minimum=PAGE_SIZE, maximum=4 << 20)
        self._keep = parameters.get("keep", 0.3, minimum=0, maximum=1)
        self._pattern = Pattern(5)
        self._loans: list[Loan] = []
        self.lent = 0
        self.returned = 0
        self.bytes = 0

    def begin(self) -> None:
        """The first turn lends."""

    def tick(self, now: float) -> float:
        """Take back what was answered, lend anew."""
        for loan in [loan for loan in self._loans if loan.answered]:
            loan.answered = False
            if loan.kept and loan.transforms < 2:
                self._transform(loan)
            else:
                self._take_back(loan)
        while len(self._loans) < self._live and not self._no_more():
            self._lend()
        return super().tick(now)

    def _no_more(self) -> bool:
        return self._stopped or (self._count > 0 and self.lent >= self._count)

    def _lend(self) -> None:
        number = self.lent
        mixed = (number * 2654435761) & 0xFFFFFFFF
        pages = 1 + mixed % (self._size // PAGE_SIZE)
        buffer = self.driver.allocate(pages * PAGE_SIZE)
        for start in range(0, buffer.size, _BLOCK):
            part = self._pattern.data(number + start, min(_BLOCK, buffer.size - start))
            buffer.view[start : start + len(part)] = part
        handle = self.driver.create_gpadl(self.channel, buffer)
        self.lent += 1
        loan = Loan(buffer, handle, (mixed >> 8) / (1 << 24) < self._keep)
        self._loans.append(loan)
        self._transform(loan)

    def _transform(self, loan: Loan) -> None:
        data = bytes(loan.buffer.view)
        loan.sequence = sequence = self._issued
        self._issued += 1
        self.tally.started += 1

        def answered(status: int, reply: bytes) -> None:
            if status != PacketStatus.SUCCESS:
                return
            self.moved()
            self.tally.completed += 1
            self._sequence.arrived(sequence)
            parsed = parse_echo_reply(reply)
            expected = transform(data, sequence)
            if (
                parsed is None
                or (parsed.status, parsed.sequence, parsed.crc) != (STATUS_OK, sequence, zlib.crc32(expected))
                or loan.buffer.view != expected
            ):
                self.tally.corrupted += 1
            loan.transforms += 1
            loan.answered = True
            self.bytes += len(data)

        body = HANDLE.pack(loan.handle, 0) + echo_request(sequence, data, inline=False)
        post(self.channel, request(Op.GPADL, KEEP if loan.kept else 0, body), answered)

    def _take_back(self, loan: Loan) -> None:
        if loan.kept:
            # Not waited for: the host may hear of the teardown first, and has to put it off.
            post(self.channel, request(Op.UNMAP, loan.handle))
        self.channel.delete_gpadl(loan.handle)
        self._loans.remove(loan)
        loan.buffer.view[:8] = bytes(8)  # ours alone again
        self.driver.free(loan.buffer)
        self.returned += 1
        self.moved()

    def finished(self) -> bool:
        """All lent, all taken back."""
        return self._no_more() and not self._loans

    def counts(self) -> dict[str, Any]:
        return {"lent": self.lent, "returned": self.returned, **self.tally.as_dict(), "bytes": self.bytes}

    def good(self) -> bool:
        """Every piece came back, and the host had done to it what it was asked for."""
        return (
            self.finished() and self.tally.good and self.lent == self.returned and self.tally.completed == self._issued
        )


WORKLOAD = GpadlWorkload
