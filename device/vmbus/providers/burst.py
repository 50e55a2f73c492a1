"""Burst: the host sends. A run keeps a window of transactions in flight, more than the ring holds, so that at any
moment some packets are queued on the channel and others are in the ring or taken by the guest.

A guest may ask for any window: what is in flight is bounded by `MOST_PACKETS` and `MOST_BYTES` all the same, the rest
follows as packets are completed, and no more is made in one turn than `vmbus.providers.slices` allows.

The data of a packet is random and gone once it is in the ring. What the guest must answer, a digest, is computed at
the send and kept per transaction: it is the provider's own state of the packet, which only the save callback can
carry over a save. A restored packet without it could not be told from a wrong answer.
"""

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from struct import Struct
from typing import Any
from uuid import UUID

import msgspec

from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.status import Status
from vmbus.providers.base import Bound, Host, Provider
from vmbus.providers.saved import TallyState, saved_run
from vmbus.providers.slices import PIECE, STEP, Slices
from vmbus.util.records import U32, U64, Count
from vmbus.wire import workload

MOST_PACKETS = 32_768
"""Packets that are in flight at most, whatever the window."""
MOST_BYTES = 8 << 20
"""Bytes of data in packets that are in flight at most, unless one packet is larger."""
_SIGNAL = 1024  # what a signal without a reason costs, see `vmbus.providers.slices`

SAVED_TRANSACTION = Struct("<Q16s")


def window_of(run: workload.BurstStart) -> int:
    """How many packets of a run are in flight at most."""
    return min(run.window, MOST_PACKETS, max(1, MOST_BYTES // max(1, run.size)))


class Transaction:
    """What the provider must know to judge an answer."""

    __slots__ = ("digest", "sequence")

    def __init__(self, sequence: int, digest: bytes) -> None:
        self.sequence = sequence
        self.digest = digest


class BurstRuns(Provider):
    """The books of runs, whichever face of KMCL sends their packets: what is in flight, and how its answers were."""

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        self.tally = workload.Tally()
        self.restored = 0
        self.runs = 0
        self._run: workload.BurstStart | None = None
        self._issued = 0
        self._answers = workload.Sequence(self.tally)
        self._slices = Slices(host)
        self._filling = False

    def _begin(self, run: workload.BurstStart) -> None:
        self.tally = workload.Tally()
        self._answers = workload.Sequence(self.tally)
        self._run = run
        self._issued = 0
        self.runs += 1

    def _has_room(self) -> bool:
        run = self._run
        return run is not None and self._issued < run.packets and self._in_flight < window_of(run)

    @property
    def _in_flight(self) -> int:
        return self._issued - self.tally.completed

    def _fill(self) -> None:
        """Send up to the window: now, and in later turns what is more than this one may do."""
        if not self._filling and self._has_room():
            self._filling = True
            self._slices.do(self, self._filled())

    @abstractmethod
    def _filled(self) -> Iterator[int]:
        """Sends what there is room for; yields what each step has cost."""

    def _next(self) -> tuple[Transaction, bytes]:
        """The next packet of the run: what to know of it, and its payload."""
        assert self._run is not None
        sequence = self._issued
        self._issued += 1
        self.tally.started += 1
        data = os.urandom(self._run.size)
        return Transaction(sequence, workload.burst_digest(sequence, data)), workload.burst_data(sequence, data)

    def _answered(self, transaction: Transaction, reply: bytes) -> None:
        self.tally.completed += 1
        self._answers.arrived(transaction.sequence)
        if reply[: workload.BURST_ANSWER.size] != workload.BURST_ANSWER.pack(transaction.sequence, transaction.digest):
            self.tally.corrupted += 1

    def _over(self) -> bytes | None:
        """The report of a run that is over with this, for the guest."""
        run, tally = self._run, self.tally
        if run is None or tally.completed < run.packets:
            return None
        self._run = None
        wrong = tally.lost + tally.duplicated + tally.reordered + tally.corrupted
        return workload.BurstDone(tally.started, tally.completed, wrong).pack()

    @classmethod
    def describe_packet(cls, saved: bytes) -> dict[str, Any]:
        sequence, digest = SAVED_TRANSACTION.unpack(saved)
        return {"sequence": sequence, "digest": digest.hex()}

    def _books(self) -> dict[str, Any]:
        return {
            "run": None if self._run is None else self._run[:3],
            "issued": self._issued,
            "next_answer": self._answers.next,
            "tally": TallyState.of(self.tally),
            "restored": self.restored,
            "runs": self.runs,
        }

    def _take_books(self, saved: Any, run: workload.BurstStart | None) -> None:
        self._run = run
        saved.tally.load_into(self.tally)
        self._issued = saved.issued
        self._answers.next = saved.next_answer
        self.restored = saved.restored
        self.runs = saved.runs

    def status(self) -> dict[str, Any]:
        return {
            "running": self._run is not None,
            "runs": self.runs,
            "issued": self._issued,
            "restored": self.restored,
            "tally": self.tally.as_dict(),
        }

    def bounds(self) -> dict[str, Bound]:
        run = self._run
        most = MOST_PACKETS if run is None else window_of(run)
        limited = run is not None and most < run.window
        return {
            "packets in flight": Bound(self._in_flight if run is not None else 0, most, int(limited)),
            "work in a turn": Bound(self._slices.waiting, None, self._slices.reached),
        }


class _State(msgspec.Struct, frozen=True):
    run: tuple[U32, U64, U32] | None
    issued: U64
    next_answer: U64
    tally: TallyState
    done_sent: bool
    restored: Count
    runs: Count
    needless: U32 = 0


_decoder = msgspec.msgpack.Decoder(_State)


class BurstProvider(BurstRuns):
    """See the module's text."""

    kind = "burst"

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        self._done_sent = False
        self.channel = ServerChannel(workload.BURST_TYPE, instance, name=name)

    def start(self) -> None:
        self.channel.set_process_packet_callbacks(self._process)
        self.channel.set_state_change_callbacks(started=self._started, closed=self._closed)
        self.channel.set_save_restore_packet_callbacks(self._save_packet, self._restore_packet)
        self.host.add_channel(self.channel)
        self.channel.enable()
        self.channel.start()

    # ---- a run -------------------------------------------------------------------------------------------------

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        if workload.is_burst_stop(payload):
            completion.complete(workload.STATUS_OK.to_bytes(4, "little"))
            if self._run is not None:
                self._run = self._run._replace(packets=self._issued)
                self._finish_if_done()
            return
        start = workload.parse_burst_start(payload)
        too_long = start is not None and start.size + workload.BURST_DATA.size > self.channel.largest_payload
        if start is None or self._run is not None or too_long:  # the guest chooses how large its rings are
            completion.complete(workload.STATUS_MALFORMED.to_bytes(4, "little"))
            return
        completion.complete(workload.STATUS_OK.to_bytes(4, "little"))
        self._begin(start)
        self._done_sent = False
        with self.channel.batch():
            self._fill()
            self._finish_if_done()

    def _cost(self) -> int:
        run = self._run
        return 0 if run is None else PIECE + run.size + run.needless * _SIGNAL

    def _filled(self) -> Iterator[int]:
        try:
            # At rest nothing is sent: the rest follows at `started`.
            while self.channel.active and self._has_room():
                cost = 0
                with self.channel.batch():
                    while cost < STEP and self._has_room():
                        cost += self._cost()
                        self._issue(self.channel.allocate_packet())
                yield cost
        finally:
            self._filling = False

    def _started(self, _: Channel) -> None:
        self._fill()

    def _issue(self, packet: Packet) -> None:
        """Send the next packet of the run with a fresh or a used packet object."""
        assert self._run is not None
        needless = self._run.needless
        packet.pointer, payload = self._next()
        packet.completion_routine = self._completed
        packet.send(payload)
        for _ in range(needless):
            self.channel.signal_needlessly()

    def _completed(self, packet: Packet, status: int, reply: bytes) -> None:
        if status == Status.CANCELLED:
            packet.free()
            return
        self._answered(packet.pointer, reply)
        if self._slices.open and self._has_room():
            self._slices.spend(self._cost())
            self._issue(packet)
        else:
            packet.free()
            self._fill()
            self._finish_if_done()

    def _finish_if_done(self) -> None:
        report = self._over()
        if report is not None:
            self._done_sent = True
            self.channel.allocate_packet().send(report, wait_for_completion=False)

    def _closed(self, _: Channel) -> None:
        self._run = None

    # ---- save and restore --------------------------------------------------------------------------------------

    def _save_packet(self, _: ServerChannel, packet: Packet, buffer: memoryview) -> int:
        transaction = packet.pointer
        if transaction is None:
            return 0
        if len(buffer) >= SAVED_TRANSACTION.size:
            SAVED_TRANSACTION.pack_into(buffer, 0, transaction.sequence, transaction.digest)
        return SAVED_TRANSACTION.size

    def _restore_packet(self, channel: ServerChannel, lib_buf: bytes, save_buf: bytes) -> None:
        packet = channel.allocate_packet()
        channel.restore_packet(packet, lib_buf)
        if save_buf:
            sequence, digest = SAVED_TRANSACTION.unpack(save_buf)
            packet.pointer = Transaction(sequence, digest)
            packet.completion_routine = self._completed
            self.restored += 1

    def save(self) -> bytes:
        needless = 0 if self._run is None else self._run.needless
        return msgspec.msgpack.encode(_State(**self._books(), done_sent=self._done_sent, needless=needless))

    def _decoded(self, state: bytes) -> tuple[_State, workload.BurstStart | None]:
        saved = self.decoded(_decoder, state)
        return saved, saved_run(saved.run, saved.needless, saved.issued)

    def check(self, state: bytes) -> None:
        self._decoded(state)

    def restore(self, state: bytes) -> None:
        saved, run = self._decoded(state)
        self._take_books(saved, run)
        self._done_sent = saved.done_sent

    def status(self) -> dict[str, Any]:
        packets = {"queued": self.channel.packets_queued, "sent": self.channel.packets_sent}
        return {**super().status(), "packets": packets}
