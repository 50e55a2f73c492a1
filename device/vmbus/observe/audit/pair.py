"""One life of a channel as both ends saw it, or as the server's did alone. Whatever breaks the proof becomes a problem
of the report."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from vmbus.observe.audit import half, lanes, order
from vmbus.observe.audit.lanes import COMPLETION, UNKNOWN, Lane
from vmbus.observe.audit.records import Life
from vmbus.observe.audit.report import ChannelReport, Problem, Report

TO_GUEST = "to the guest"
TO_HOST = "to the host"
_WINDOW = 1 << 16  # packets looked at to tell one breach from another


class Pair:
    """See the module's text."""

    def __init__(self, report: Report, host: Life, guest: Life, host_complete: bool) -> None:
        self._report = report
        self._host = host
        self._guest = guest
        self._host_complete = host_complete and host.complete
        self._channel = ChannelReport(
            channel=host.name, instance=host.instance, subchannel=host.subchannel, generations=host.generations
        )
        report.channels.append(self._channel)

    def check(self) -> None:
        """Both records are there."""
        host, guest, channel = self._host, self._guest, self._channel
        self._own_end()
        self._order(guest, TO_HOST)
        # The server's record was flushed before the guest's was fetched, and again after it.
        open_end = not guest.complete or (guest.closed is None and host.at_mark is None)
        seen = host.incoming.count if guest.closed is not None or host.at_mark is None else host.at_mark[1]
        self._compare(guest.out, host.incoming, TO_HOST, None if open_end else seen)
        self._compare(host.out, guest.incoming, TO_GUEST, guest.incoming.count if self._host_complete else None)
        if not guest.complete:
            text = f"the guest's record of channel {guest.name!r} stops short: its process died"
            self._report.not_proven(text, "guest-stops-short")
        self._stops_short()
        channel.to_guest = self._finished(host, guest, TO_GUEST)
        channel.to_host = self._finished(guest, host, TO_HOST)
        channel.cancelled = sum(_own(life.closed) for life in (host, guest) if life.closed is not None)
        if host.dropped:
            channel.dropped = _own(host.latest)
        self._failures(host, guest.out, TO_HOST)
        self._failures(guest, host.out, TO_GUEST)

    def check_half(self, driver: str) -> None:
        """There is the server's record alone: `driver`, of Linux, keeps none."""
        host, channel = self._host, self._channel
        channel.driver = driver
        self._own_end()
        channel.completed, breach = half.check(host)
        if breach is not None:
            message = f"{breach.message} (in the host's half)"
            if breach.own:
                where, completion, direction = "at its sender (the server)", breach.kind != "lost", TO_HOST
            else:
                where, completion, direction = "at its receiver (the server)", True, TO_GUEST
            self._add(breach.kind, direction, where, message, first=breach.transaction, completion=completion)
        self._stops_short()
        if host.out.brief or host.incoming.brief:
            self._report.not_proven(
                f"channel {host.name!r}: its record got brief, and one half alone says nothing of single packets then"
            )
        channel.to_guest, channel.to_host = host.out.packets, host.incoming.packets
        last = host.last_in_use()
        if host.closed is not None:
            channel.cancelled = _own(host.closed)
        elif last is not None and host.dropped:
            channel.dropped = _own(last)
        elif last is not None:
            places = {
                f"held by the server ({TO_HOST})": list(last.get("awaited", [])),
                f"not completed ({TO_GUEST})": list(last.get("sent", [])),
                f"queued ({TO_GUEST})": _queued(last),
            }
            channel.in_flight = {place: numbers for place, numbers in places.items() if numbers}
        self._failures(host, Lane(), TO_HOST)

    def _add(
        self,
        kind: str,
        direction: str,
        where: str,
        message: str,
        *,
        first: int | None = None,
        last: int | None = None,
        ordinal: int | None = None,
        completion: bool | None = None,
    ) -> None:
        of: Literal["packet", "completion", ""] = "" if completion is None else "completion" if completion else "packet"
        what = ""
        if first is not None:
            what = f"{of or 'packet'} of transaction {first}"
            if last is not None and last != first:
                what = f"one of the packets with transactions {first} to {last}"
        name = self._host.name
        if kind == "failed":
            text = f"channel {name!r}, {direction}: it was failed {where}" + (f", at the {what}" if what else "")
        else:
            text = f"channel {name!r}, {direction}: {what or 'something'} is {kind} {where}"
        self._report.problems.append(
            Problem(
                kind=kind,
                channel=name,
                direction=direction,
                where=where,
                first=first,
                last=first if last is None else last,
                ordinal=ordinal,
                of=of,
                message=f"{text}: {message}" if message else text,
            )
        )

    # ---- one end ---------------------------------------------------------------------------------------------------

    def _own_end(self) -> None:
        """What the server's record says by itself."""
        host = self._host
        self._channel.closed = host.closed is not None or bool(host.dropped)
        for who, saved, back in host.restored:
            self._restored(who, saved, back)
        self._order(host, TO_GUEST)

    def _stops_short(self) -> None:
        if not self._host_complete and not self._channel.closed:
            self._report.not_proven(f"the server's record of channel {self._host.name!r} stops short")

    def _restored(self, who: str, saved: dict[str, Any], back: dict[str, Any]) -> None:
        """What was saved is what came back, in the same order."""
        where = f"between the save and its restore in {who}"
        for field in ("sent", "queued"):
            before, after = saved.get(field, []), back.get(field, [])
            if before == after:
                continue
            mine, theirs = ([tuple(one) if field == "queued" else (0, one) for one in side] for side in (before, after))
            kind, (number, transaction) = lanes.difference([one[:2] for one in mine], [one[:2] for one in theirs])
            if kind == "":
                kind = "corrupted"
                number, transaction = next(a[:2] for a, b in zip(mine, theirs, strict=True) if a != b)
            message = f"{len(before)} packets were {field} at the save, {len(after)} came back"
            self._add(kind, TO_GUEST, where, message, first=transaction, completion=number == COMPLETION)
        if saved.get("next") != back.get("next"):
            message = f"the next transaction was {saved.get('next')}, and came back as {back.get('next')}"
            self._add("corrupted", TO_GUEST, where, message)

    def _order(self, life: Life, direction: str) -> None:
        """An end puts its packets in the order in which it accepted them."""
        guest = life is self._guest
        breach = order.check(life, given=guest and order.ids_given(life))
        if breach is not None:
            kind, first, message = breach
            where = f"between its sender and the ring ({'guest' if guest else 'server'})"
            self._add(kind, direction, where, message, first=first, completion=False)

    # ---- both ends -------------------------------------------------------------------------------------------------

    def _compare(self, writer: Lane, reader: Lane, direction: str, covered: int | None) -> None:
        """The n-th packet put is the n-th taken. `covered`: so many taken ones must be among those put; None: the
        record of `writer` may stop short."""
        ring = f"in the ring {direction}"
        common = min(writer.count, reader.count)
        index = lanes.first_difference(writer, reader, common)
        good, bad = lanes.first_bad_point(writer, reader, common)
        if bad is not None and (index is None or index >= bad):
            first, last = writer.key(good), writer.key(bad - 1)
            known = UNKNOWN not in (first[0], last[0])
            numbers = sorted((first[1], last[1])) if known else [None, None]
            self._add(
                "corrupted",
                direction,
                ring,
                f"the bytes taken are not the bytes put, in packets {good} to {bad - 1} since the opening",
                first=numbers[0],
                last=numbers[1],
                ordinal=good,
                completion=first[0] == COMPLETION if bad - good == 1 and known else None,
            )
        elif index is not None:
            mine, theirs = (
                [lane.key(one) for one in range(index, min(lane.count, index + _WINDOW))] for lane in (writer, reader)
            )
            before = {reader.key(one) for one in range(max(0, index - _WINDOW), index)}
            kind, (packet_kind, number) = lanes.difference(mine, theirs, before)
            put, taken = lanes.name_of(mine[0]), lanes.name_of(theirs[0])
            message = f"put was {put}, taken was {taken}, as packet {index} since the opening"
            completion = packet_kind == COMPLETION
            self._add(kind or "corrupted", direction, ring, message, first=number, ordinal=index, completion=completion)
        elif covered is not None and covered > writer.count:
            end = writer.count
            packet_kind, number = reader.key(end)
            known = packet_kind != UNKNOWN
            seen = known and reader.key(end) in {reader.key(one) for one in range(max(0, end - _WINDOW), end)}
            self._add(
                "doubled" if seen else "invented",
                direction,
                ring,
                f"{covered} packets were taken, and {end} were put",
                first=number if known else None,
                ordinal=end,
                completion=packet_kind == COMPLETION,
            )
        elif (writer.brief or reader.brief) and good < common:
            self._report.not_proven(
                f"channel {self._host.name!r}, {direction}: the bytes of the last {common - good} packets taken are "
                "not compared yet: a record got brief, and has no checksum there that the other one has, too"
            )

    def _finished(self, sender: Life, receiver: Life, direction: str) -> int:
        """Every packet that wants a completion got one, or is in flight; returns how many packets there were."""
        lane = sender.out
        who = "the server" if sender is self._host else "the guest"
        wanted, done, answered = lane.wanted, sender.incoming.completions, receiver.out.completions
        self._channel.completed += len(done) + sender.incoming.completions_in_brief
        if lane.brief + sender.incoming.brief + receiver.out.brief:
            self._counted(sender, direction, who, len(wanted), len(done))
            return lane.packets
        back = TO_HOST if direction == TO_GUEST else TO_GUEST
        # Of packets as the receiver took them: its record may be fetched later than the sender's.
        taken = receiver.incoming.wanted
        # A record that stops short may have what was put and not what was taken before it, or the other way round.
        cut = sender.closed is None and not sender.complete
        known = max(wanted, taken, key=len) if cut else wanted
        left = self._match(known, done, back, f"at its sender ({who})")
        short = receiver.closed is None and not receiver.complete
        self._match(max(wanted, taken, key=len) if short else taken, answered, back, "at its receiver")
        if left is None:
            return lane.packets
        ends = sender.closed if sender.closed is not None else sender.last_in_use()
        if ends is not None and not cut:
            waiting = set(ends.get("sent", []))
            forgotten = next((number for number in left if number not in waiting), None)
            if forgotten is not None:
                message = "it was put and never completed, and its sender does not wait for it any more"
                where = f"at its sender ({who})"
                self._add("forgotten", direction, where, message, first=forgotten, completion=False)
        if not self._channel.closed and receiver.closed is None:
            self._in_flight(sender, receiver, direction, left, answered)
        return lane.packets

    def _counted(self, sender: Life, direction: str, who: str, wanted: int, done: int) -> None:
        """Of brief records: as many wait for a completion as have none."""
        note = f"channel {sender.name!r}: its record got brief, so completions were counted and not named"
        if note not in self._report.notes:
            self._report.notes.append(note)
        ends = sender.last_in_use()
        count = wanted + sender.out.wanted_in_brief - done - sender.incoming.completions_in_brief
        if ends is not None and sender.closed is None and len(ends.get("sent", [])) != count:
            message = f"{count} transactions have no completion, and {who} waits for {len(ends['sent'])}"
            self._add("lost", direction, "on its way back", message)

    def _match(self, wanted: list[int], done: list[int], direction: str, where: str) -> list[int] | None:
        """Each completion is of a packet that wants one, and the only one; those without. None after a breach."""
        if wanted[: len(done)] == done:
            return wanted[len(done) :]
        # An id comes again when its request has been completed.
        open_ = Counter(wanted)
        for number in done:
            if open_.get(number):
                open_[number] -= 1
                continue
            kind = "doubled" if number in open_ else "invented"
            message = "it was completed before" if kind == "doubled" else "no packet wanted it"
            self._add(kind, direction, where, message, first=number, completion=True)
            return None
        return list(open_.elements())

    def _in_flight(self, sender: Life, receiver: Life, direction: str, left: list[int], answered: list[int]) -> None:
        taken = receiver.incoming.requests
        answers = set(answered)
        places: dict[str, list[int]] = {}
        for number in left:
            if number in answers:
                place = "completion in the ring"
            else:
                place = "held by the receiver" if number in taken else "in the ring"
            places.setdefault(f"{place} ({direction})", []).append(number)
        if queued := _queued(sender.last_in_use() or {}):
            places[f"queued ({direction})"] = queued
        self._channel.in_flight |= places

    def _failures(self, life: Life, incoming: Lane, direction: str) -> None:
        """A channel that was failed: the packet that its end was about to take, or had just taken."""
        for reason, _, taken, who in life.failures:
            packet_kind, number = incoming.key(taken) if taken < incoming.count else (UNKNOWN, 0)
            known = packet_kind != UNKNOWN
            self._add(
                "failed",
                direction,
                f"at {who}",
                reason,
                first=number if known else None,
                ordinal=taken,
                completion=packet_kind == COMPLETION if known else None,
            )


def _own(body: dict[str, Any]) -> int:
    """How many packets of its own an end had under way."""
    return len(body.get("sent", [])) + len(body.get("queued", []))


def _queued(body: dict[str, Any]) -> list[int]:
    return [number for kind, number, _ in body.get("queued", []) if kind != COMPLETION]
