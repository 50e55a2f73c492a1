"""The player of a replay: opens a capture's channels, sends its guest's packets, and compares what the host sends."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from vmbus.errors import PeerError, StateError, WaitTimeout
from vmbus.kmcl import Channel, ChannelState, ClientChannel, Completion, Packet, Status
from vmbus.observe.capture import record as r
from vmbus.observe.capture.pcapng import Captured, CaptureReader, Interface
from vmbus.observe.capture.record import Record
from vmbus.testkit.replay_report import Difference, ReplayOptions, ReplayReport, What, compared
from vmbus.wire.gpa import PAGE_SIZE, GpaRange
from vmbus.wire.packet import MAX_PACKET_SIZE, PacketType, parse_gpa_direct
from vmbus_guest.driver import VmbusDriver

if TYPE_CHECKING:
    from vmbus_guest.pci import DmaBuffer

_COMPLETION = int(PacketType.COMPLETION)
_GPA_DIRECT = int(PacketType.GPA_DIRECT)

MAX_EXTERNAL = 64 << 20
"""Most bytes of one packet's external data in a capture that can be replayed."""
_MOST_RING_PAGES = 4096
_NOWHERE = 0x7000_0000_0000  # an I/O address at which there is no memory
_MOST_NOTES = 50

_NO_OPENING = "a channel was open before the capture began: its provider then had a past that it has not here"


@dataclass
class _Request:
    """A packet of the guest's that waits for its completion. `places`: of the external data in the buffer, (start,
    length)."""

    before: bytes
    buffer: DmaBuffer | None = None
    places: list[tuple[int, int]] = field(default_factory=list)
    done: bool = False
    status: int = 0
    reply: bytes = b""
    after: bytes = b""


@dataclass
class _Line:
    """One channel of the replay. `asked` and `held`: by captured transaction. `silent`: the host has closed it although
    the capture goes on."""

    name: str
    offer: tuple[UUID, UUID, int]
    channel: ClientChannel | None = None
    asked: dict[int, deque[_Request]] = field(default_factory=dict)
    arrived: deque[tuple[bytes, bool, Completion]] = field(default_factory=deque)
    held: dict[int, Completion] = field(default_factory=dict)
    silent: bool = False

    @property
    def active(self) -> bool:
        return self.channel is not None and self.channel.state is ChannelState.ACTIVE


class Player:
    """The guest of captures, played on a driver; what it finds goes into the report."""

    def __init__(
        self,
        driver: VmbusDriver,
        options: ReplayOptions,
        report: ReplayReport,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.gave_up = False
        self._missing = 0
        self._tell = tell
        self._driver = driver
        self._options = options
        self._report = report
        self._lines: dict[tuple[UUID, UUID, int], _Line | None] = {}  # by captured channel
        self._first = 0
        self._began = time.monotonic()
        self._noted: dict[str, int] = {}

    # ---- the report ------------------------------------------------------------------------------------------------

    def _note(self, text: str) -> None:
        """Tell people; the same thing once, with how often."""
        if text not in self._noted:
            self._tell(text)
        self._noted[text] = self._noted.get(text, 0) + 1

    def _differs(self, line: _Line, what: What, message: str, number: int = 0) -> None:
        self._tell(f"{what}: channel {line.name}, record {number}: {message}")
        if what == "missing":
            self._missing += 1
            if self._missing == self._options.give_up and not self.gave_up:
                self.gave_up = True
                self._note(f"given up: {self._missing} things did not come within {self._options.timeout:g} s each")
        self._report.add(Difference(record=number, channel=line.name, what=what, message=message))

    # ---- channels --------------------------------------------------------------------------------------------------

    def _line(self, interface: Interface) -> _Line | None:
        key = (interface.type, interface.instance, interface.subchannel)
        if key not in self._lines:
            self._lines[key] = self._find(interface)
        return self._lines[key]

    def _find(self, interface: Interface) -> _Line | None:
        name = f"{interface.name} ({interface.description})"
        if not interface.selected(self._options.channels):
            self._report.left_out.append(name)
            return None
        taken = {line.offer for line in self._lines.values() if line is not None}
        offers = (
            (offer.interface_type, offer.interface_instance, offer.subchannel_index)
            for offer in self._driver.bus.offers.values()
        )
        wanted = interface.type, interface.subchannel
        fitting = [offer for offer in offers if (offer[0], offer[2]) == wanted and offer not in taken]
        # The same instance if there is one, else whatever is of that type.
        fitting.sort(key=lambda offer: offer[1] != interface.instance)
        if not fitting and interface.subchannel == 0:
            self._report.left_out.append(name)
            return None
        # A sub-channel may be offered only once its primary has asked for it.
        offer = fitting[0] if fitting else (interface.type, self._primary(interface), interface.subchannel)
        self._report.channels.append(name)
        return _Line(interface.name, offer)

    def _primary(self, interface: Interface) -> UUID:
        for key, line in self._lines.items():
            if line is not None and key[:2] == (interface.type, interface.instance):
                return line.offer[1]
        return interface.instance

    def _open(self, line: _Line, number: int, details: Mapping[str, Any]) -> None:
        if line.channel is not None:
            self._close(line)
        type_, instance, subchannel = line.offer
        channel = self._driver.client_channel(
            type_,
            instance=instance,
            ring_pages_out=_pages(details, "ring_to_host"),
            ring_pages_in=_pages(details, "ring_to_guest"),
            name=line.name,
            subchannel_index=subchannel,
        )
        channel.set_maximum_packet_size(MAX_PACKET_SIZE)
        channel.set_maximum_external_data(MAX_EXTERNAL)

        def process(channel: Channel, completion: Completion, payload: bytes) -> None:
            line.arrived.append((payload, completion.wanted, completion))
            if self._options.ignore_packets:
                completion.complete()

        channel.set_process_packet_callbacks(process)
        line.silent = False
        try:
            self._driver.enable(channel, self._options.timeout)
        except (PeerError, WaitTimeout) as error:
            line.silent = True
            self._differs(line, "channel", f"it cannot be opened: {error}", number)
            return
        line.channel = channel

    def _close(self, line: _Line) -> None:
        channel, line.channel = line.channel, None
        self._answer_all(line)
        line.asked.clear()
        if channel is not None and channel.state in (ChannelState.OPENED, ChannelState.ACTIVE):
            try:
                self._driver.close_channel(channel, self._options.timeout)
            except WaitTimeout as error:
                self._differs(line, "channel", f"it cannot be closed: {error}")
                line.silent = True

    def _answer_all(self, line: _Line) -> None:
        for completion in [*line.held.values(), *(completion for _, _, completion in line.arrived)]:
            if not completion.done:
                completion.complete()
        line.held.clear()
        line.arrived.clear()

    # ---- records ---------------------------------------------------------------------------------------------------

    def play_file(self, path: Path) -> None:
        """One capture, unless it was given up before. Raises StateError if it cannot be replayed."""
        if self.gave_up:
            return
        with CaptureReader(path) as reader:
            for one in reader:
                self.play(one, reader.interfaces[one.interface])
                if self.gave_up:
                    break
            if reader.torn:
                self._report.notes.append(reader.torn)
            for index, lost in reader.lost.items():
                name = reader.interfaces[index].name
                self._report.notes.append(f"{lost} packets of channel {name} were not captured")

    def play(self, one: Captured, interface: Interface) -> None:
        """One record of the capture. Raises StateError if it cannot be replayed."""
        line = self._line(interface)
        if line is None:
            return
        if one.lost:
            self._note("the capture has lost packets: what follows them may differ for that reason alone")
        record = one.record
        if record.record == r.EVENT:
            self._event(line, one.number, record)
            return
        if line.channel is None and not line.silent:
            self._note(_NO_OPENING)
            self._open(line, one.number, {})
        if line.silent:
            return
        if record.direction == r.TO_GUEST:
            self._expect(line, one.number, record)
        else:
            self._keep_time(one.at)
            if line.active:
                self._send(line, one.number, record)
        if line.channel is not None and not line.active:
            line.silent = True
            self._differs(line, "channel", "the host has closed it, and in the capture it went on", one.number)

    def _event(self, line: _Line, number: int, record: Record) -> None:
        try:
            details = json.loads(record.payload)
            event = details["event"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise StateError(f"record {number}: an event that is no JSON object with its name") from None
        if event == "opened":
            self._open(line, number, details)
        elif event in ("joined", "resumed") and line.channel is None and not line.silent:
            self._note(_NO_OPENING)
            self._open(line, number, details)
        elif event == "closed":
            line.silent = False
            self._close(line)
        elif event == "failed":
            self._note(f"in the capture, channel {line.name} failed: {str(details.get('reason'))[:200]}")

    def _keep_time(self, at: int) -> None:
        """With `timed`: wait until as much time has passed as in the capture."""
        self._driver.step(0)
        if not self._options.timed:
            return
        if not self._first:
            self._first, self._began = at, time.monotonic()
        due = self._began + (at - self._first) / 1e9
        while (left := due - time.monotonic()) > 0:
            self._driver.step(min(left, 1.0))

    def _wait(self, condition: Callable[[], bool], line: _Line) -> bool:
        try:
            self._driver.run_until(lambda: condition() or not line.active, self._options.timeout, "")
        except WaitTimeout:
            return False
        return condition()

    # ---- to the host -----------------------------------------------------------------------------------------------

    def _send(self, line: _Line, number: int, record: Record) -> None:
        if not record.whole:
            raise StateError(
                f"record {number} was cut by the snap length ({record.missing} bytes of the packet are missing): it "
                "cannot be replayed; capture with a larger --snaplen"
            )
        channel = line.channel
        assert channel is not None
        if record.kind == _COMPLETION:
            if self._options.ignore_packets:
                return
            completion = line.held.pop(record.transaction, None)
            if completion is None:
                self._note("the capture has the guest's answers to packets that are not in it, or did not come here")
            elif not completion.done:
                completion.complete(record.payload)
                self._report.sent += 1
            return
        packet = channel.allocate_packet()
        self._report.sent += 1
        if record.kind == _GPA_DIRECT:
            self._send_external(line, number, record, packet)
        elif record.wanted:
            request = self._asked(line, record, packet, b"")
            assert not request.done
            packet.send(record.payload)
        else:
            packet.send(record.payload, wait_for_completion=False, transaction=record.transaction)

    def _asked(self, line: _Line, record: Record, packet: Packet, before: bytes) -> _Request:
        request = _Request(before)

        def completed(_: Packet, status: int, reply: bytes) -> None:
            request.done, request.status, request.reply = True, status, reply
            if request.buffer is not None:
                view = request.buffer.view
                request.after = b"".join([bytes(view[start : start + length]) for start, length in request.places])
                self._driver.free(request.buffer)
                request.buffer = None

        packet.completion_routine = completed
        line.asked.setdefault(record.transaction, deque()).append(request)
        return request

    def _send_external(self, line: _Line, number: int, record: Record, packet: Packet) -> None:
        try:
            ranges = parse_gpa_direct(record.body, max_bytes=MAX_EXTERNAL)
        except PeerError as error:
            self._report.sent -= 1
            self._note(f"record {number} is left out: it cannot be sent by a well-behaved guest ({error})")
            return
        if not record.wanted:
            self._report.sent -= 1
            self._note(f"record {number} is left out: external data without a completion")
            return
        request = self._asked(line, record, packet, record.external)
        if record.bits & r.UNREADABLE:
            moved, _ = _laid_out(ranges, _NOWHERE)
        else:
            if len(record.external) < record.external_size:
                self._note("external data was not captured in full: zeros take the place of the rest (--external)")
            buffer = self._driver.allocate(sum(len(one.pfns) for one in ranges) * PAGE_SIZE)
            moved, request.places = _laid_out(ranges, buffer.iova)
            left = record.external
            for start, length in request.places:
                part, left = left[:length], left[length:]
                buffer.view[start : start + len(part)] = part
            request.buffer = buffer
        packet.send(record.payload, external_ranges=moved)

    # ---- to the guest ----------------------------------------------------------------------------------------------

    def _expect(self, line: _Line, number: int, record: Record) -> None:
        if record.kind == _COMPLETION:
            self._expect_answer(line, number, record)
        elif not self._options.ignore_packets:
            self._expect_packet(line, number, record)

    def _expect_answer(self, line: _Line, number: int, record: Record) -> None:
        requests = line.asked.get(record.transaction)
        if not requests:
            self._note("the capture has answers to requests that are not in it (from before it, or left out)")
            return
        request = requests.popleft()
        if not requests:
            del line.asked[record.transaction]
        if not self._wait(lambda: request.done, line) or request.status != Status.SUCCESS:
            if line.active:
                self._differs(line, "missing", f"no answer to request {record.transaction} in time", number)
            return
        self._report.answers += 1
        if text := compared(record.payload, request.reply, cut=not record.whole, ignore=self._options.ignore):
            self._differs(line, "answer", f"to request {record.transaction}: {text}", number)
        if self._options.ignore_external or not record.external_size or record.bits & r.UNREADABLE:
            return
        wanted = request.before if record.bits & r.UNCHANGED else record.external
        if text := compared(wanted, request.after[: len(wanted)], cut=True):
            self._differs(line, "external data", f"after request {record.transaction}: {text}", number)

    def _expect_packet(self, line: _Line, number: int, record: Record) -> None:
        if not self._wait(lambda: self._next(line, record) is not None, line):
            if line.active:
                self._differs(line, "missing", f"packet {record.transaction} of the provider did not come", number)
            return
        index = self._next(line, record)
        assert index is not None
        payload, wanted, completion = line.arrived[index]
        del line.arrived[index]
        self._report.packets += 1
        if wanted != record.wanted:
            self._differs(line, "packet", f"it wants a completion: {wanted}, and captured {record.wanted}", number)
        if text := compared(record.payload, payload, cut=not record.whole, ignore=self._options.ignore):
            self._differs(line, "packet", text, number)
        if wanted and record.wanted:
            line.held[record.transaction] = completion
        else:
            completion.complete()

    def _next(self, line: _Line, record: Record) -> int | None:
        """Which of the packets that have come is the next one of those that the captured one belongs to."""
        if self._options.key is None:
            return 0 if line.arrived else None
        first, behind = self._options.key
        mine = record.payload[first:behind]
        return next((index for index, one in enumerate(line.arrived) if one[0][first:behind] == mine), None)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """All records were played: look for what came besides, and close the channels."""
        quiet_since = time.monotonic()
        deadline = quiet_since + self._options.timeout
        while (now := time.monotonic()) < min(quiet_since + self._options.settle, deadline):
            if self._driver.step(self._options.settle):
                quiet_since = now
        for line in self._lines.values():
            if line is None:
                continue
            if line.arrived and not self._options.ignore_packets:
                self._differs(line, "unexpected", f"{len(line.arrived)} packets of the provider that were not captured")
            if not line.silent:
                self._close(line)
        for text, count in list(self._noted.items())[:_MOST_NOTES]:
            self._report.notes.append(text if count == 1 else f"{text} ({count} times)")


def _pages(details: Mapping[str, Any], name: str) -> int:
    """Data pages of a ring, as an opening tells it; 16 if it does not."""
    size = details.get(name, 16 * PAGE_SIZE)
    if not isinstance(size, int) or size % PAGE_SIZE or not 1 <= size // PAGE_SIZE <= _MOST_RING_PAGES:
        raise StateError(f"an opening with {name} = {size!r}: no size of a ring that can be replayed")
    return size // PAGE_SIZE


def _laid_out(ranges: Sequence[GpaRange], iova: int) -> tuple[list[GpaRange], list[tuple[int, int]]]:
    """The same ranges, as to lengths and offsets in their first pages, one behind the other from `iova` on; and where
    their bytes are from there: (start, length)."""
    moved, places = [], []
    page = 0
    for one in ranges:
        first = iova // PAGE_SIZE + page
        moved.append(GpaRange(one.byte_count, one.byte_offset, tuple(range(first, first + len(one.pfns)))))
        places.append((page * PAGE_SIZE + one.byte_offset, one.byte_count))
        page += len(one.pfns)
    return moved, places
