"""The proof: every packet of both ends exactly once and in order, or the first transaction that breaks it.

For each life of a channel, matched by its nonce, and each direction, the n-th packet that one end put is the n-th that
the other took, with the same kind, transaction and bytes. For each end: what it accepted was put once, in order, and
what wanted a completion got exactly one. At each restore, what came back is what was saved. Whatever is unfinished at
the end of the records is named as in flight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from vmbus.errors import UsageError
from vmbus.observe.audit import format as f
from vmbus.observe.audit import given, half
from vmbus.observe.audit.records import (
    COMPLETION,
    UNKNOWN,
    Lane,
    Life,
    Mark,
    Record,
    guest_timeline,
    host_timeline,
    lineage,
    read_records,
)
from vmbus.observe.audit.report import ChannelReport, Gap, Problem, Report, Verdict
from vmbus.wire.linux import driver_of

TO_GUEST = "to the guest"
TO_HOST = "to the host"
_WINDOW = 1 << 16  # packets looked at to tell one breach from another
_STEP = 4096


def check_paths(paths: Iterable[Path], *, leaf: str | None = None) -> Report:
    """Check the records among files and directories.

    `leaf`: the beginning of the uid of the server's record with which the timeline ends; without it, the one for which
    the guest's records were fetched last, else the newest that no other goes on from. Raises EnvironmentProblem for
    files that are not there or cannot be read, StateError for damaged ones, UsageError for a leaf that is not there.
    """
    return check_records(read_records(paths), leaf=leaf)


def check_records(records: Sequence[Record], *, leaf: str | None = None) -> Report:
    """See `check_paths`."""
    notes = [
        f"{one.source}: its last {one.torn} bytes are a torn event, and were left out" for one in records if one.torn
    ]
    usable = [one for one in records if not one.empty]
    end = _leaf(usable, leaf)
    path, missing = lineage(usable, end)
    inside = {record.uid: cut for record, cut in path}
    guests = _guests(usable, inside)
    mark = _mark(guests, path)
    host = host_timeline(path, mark)
    guest = guest_timeline(guests)
    abandoned = [
        f"{record}: all of it"
        for record in usable
        if record.side == "host" and record.uid not in inside and record.uid != end.uid
    ]
    for record, cut in path[:-1]:
        rest = sum(event.kind in (f.PUT, f.TAKEN) for event in record.events[cut:])
        if rest:
            abandoned.append(f"{record}: what came after the save ({rest} blocks of packets)")
    report = Report(
        verdict="clean",
        missing=[Gap(text) for text in missing],
        timeline=[str(record) for record, _ in path],
        guests=[str(record) for record in guests],
        abandoned=abandoned,
        notes=notes,
    )
    _check_lives(report, host.lives, guest.lives, host_complete=_complete(path, mark))
    skip = {one.nonce for one in host.troubles if one.nonce}
    troubles = [one for one in (*host.troubles, *guest.troubles) if not one.nonce or one.nonce in skip]
    report.missing += [Gap(one.message) for one in troubles]
    for life in (*host.unknown, *guest.unknown):
        report.not_proven(f"channel {life.name!r} was opened while the other end did not record")
    whole, halves = ([one for one in report.channels if bool(one.driver) is alone] for alone in (False, True))
    report.packets = sum(one.to_host + one.to_guest for one in whole)
    report.transactions = sum(one.completed for one in whole)
    report.in_flight = sum(len(numbers) for one in whole for numbers in one.in_flight.values())
    report.half_packets = sum(one.to_host + one.to_guest for one in halves)
    report.half_transactions = sum(one.completed for one in halves)
    verdict: Verdict = "broken" if report.problems else "incomplete" if report.missing else "clean"
    report.verdict = verdict
    return report


def _linux_driver(interface_type: str) -> str | None:
    """The driver of Linux's that has a channel of that type, which keeps no record."""
    try:
        return driver_of(UUID(interface_type))
    except ValueError:
        return None  # of a record from before types were written down


def _leaf(records: Sequence[Record], wanted: str | None) -> Record:
    hosts = [record for record in records if record.side == "host"]
    if wanted is not None:
        found = [record for record in hosts if record.uid.startswith(wanted)]
        if len(found) != 1:
            raise UsageError(f"{len(found)} records of servers begin with {wanted!r}; there: {_names(hosts)}")
        return found[0]
    if not hosts:
        raise UsageError("there is no record of a server among these")
    marks = [record.collected for record in sorted(records, key=lambda one: one.started) if record.collected]
    by_uid = {record.uid: record for record in hosts}
    collected = [by_uid[mark.uid] for mark in marks if mark.uid in by_uid]
    if collected:
        return max(collected, key=lambda record: record.started)
    parents = {mark.uid for record in hosts if (mark := record.parent()[0]) is not None}
    leaves = [record for record in hosts if record.uid not in parents]
    return max(leaves or hosts, key=lambda record: record.started)


def _names(records: Iterable[Record]) -> str:
    return ", ".join(str(record) for record in records) or "none"


def _guests(records: Iterable[Record], inside: dict[str, int]) -> list[Record]:
    """For each process of the guest its latest record that is of this timeline."""
    order = list(inside)
    best: dict[str, tuple[tuple[int, int, int], Record]] = {}
    for record in records:
        if record.side != "guest":
            continue
        rank = (-1, 0, len(record.events))  # a record that was not fetched by us: of any timeline
        if record.collected is not None:
            uid, position = record.collected
            if uid not in inside or position > inside[uid]:
                continue
            rank = (order.index(uid), position, len(record.events))
        if record.uid not in best or best[record.uid][0] < rank:
            best[record.uid] = (rank, record)
    return [record for _, record in best.values()]


def _mark(guests: Iterable[Record], path: Sequence[tuple[Record, int]]) -> Mark | None:
    """Where the servers' timeline was when the guest's records were fetched for the last time."""
    order = [record.uid for record, _ in path]
    marks = [record.collected for record in guests if record.collected is not None]
    return max(marks, key=lambda mark: (order.index(mark.uid), mark.position), default=None)


def _complete(path: Sequence[tuple[Record, int]], mark: Mark | None) -> bool:
    """Whether the servers' side reaches beyond the guest's: then the guest cannot have taken more than was put."""
    last, cut = path[-1]
    return last.complete and (mark is None or mark.uid != last.uid or cut > mark.position)


# ---- lives -----------------------------------------------------------------------------------------------------------


def _check_lives(report: Report, host: dict[str, Life], guest: dict[str, Life], *, host_complete: bool) -> None:
    for nonce in [*host, *(nonce for nonce in guest if nonce not in host)]:
        one, other = host.get(nonce), guest.get(nonce)
        either = one or other
        assert either is not None
        if one is None or other is None or not one.known or not other.known:
            if one is not None and not one.known:
                continue  # told already
            end = "the guest's" if one is not None else "the server's"
            if one is not None and not one.out.count and not one.incoming.count:
                continue  # opened and closed again, before the guest's end was there to see it
            if one is not None and other is None and (driver := _linux_driver(one.interface_type)) is not None:
                _Pair(report, one, Life(nonce, one.name, one.instance, one.subchannel), host_complete).check_half(
                    driver
                )
                continue
            text = f"{end} record of channel {either.name!r} (life {nonce[:8]}) is not here"
            report.not_proven(text, "guest-missing" if one is not None else "")
            continue
        _Pair(report, one, other, host_complete).check()


class _Pair:
    """One life as both ends saw it."""

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
        host, guest, channel = self._host, self._guest, self._channel
        channel.closed = host.closed is not None or bool(host.dropped)
        for who, saved, back in host.restored:
            self._restored(who, saved, back)
        self._sequence(host, TO_GUEST)
        self._sequence(guest, TO_HOST)
        # The server's record was flushed before the guest's was fetched, and again after it.
        open_end = not guest.complete or (guest.closed is None and host.at_mark is None)
        seen = host.incoming.count if guest.closed is not None or host.at_mark is None else host.at_mark[1]
        self._compare(guest.out, host.incoming, TO_HOST, None if open_end else seen)
        self._compare(host.out, guest.incoming, TO_GUEST, guest.incoming.count if self._host_complete else None)
        if not guest.complete:
            text = f"the guest's record of channel {guest.name!r} stops short: its process died"
            self._report.not_proven(text, "guest-stops-short")
        if not self._host_complete and not channel.closed:
            self._report.not_proven(f"the server's record of channel {host.name!r} stops short")
        channel.to_guest = self._finished(host, guest, TO_GUEST)
        channel.to_host = self._finished(guest, host, TO_HOST)
        for life in (host, guest):
            if life.closed is not None:
                channel.cancelled += len(life.closed.get("sent", [])) + len(life.closed.get("queued", []))
        if host.dropped:
            last = host.in_use[-1][2] if host.in_use else {}
            channel.dropped = len(last.get("sent", [])) + len(last.get("queued", []))
        for life, incoming, direction in ((host, guest.out, TO_HOST), (guest, host.out, TO_GUEST)):
            for reason, _, taken, who in life.failures:
                self._failed(reason, taken, who, incoming, direction)

    def check_half(self, driver: str) -> None:
        """There is the server's record alone: `driver`, of Linux, keeps none."""
        host, channel = self._host, self._channel
        channel.driver = driver
        channel.closed = host.closed is not None or bool(host.dropped)
        for who, saved, back in host.restored:
            self._restored(who, saved, back)
        self._sequence(host, TO_GUEST)
        channel.completed, breach = half.check(host)
        if breach is not None:
            message = f"{breach.message} (in the host's half)"
            if breach.own:
                where, completion, direction = "at its sender (the server)", breach.kind != "lost", TO_HOST
            else:
                where, completion, direction = "at its receiver (the server)", True, TO_GUEST
            self._add(breach.kind, direction, where, message, first=breach.transaction, completion=completion)
        if not self._host_complete and not channel.closed:
            self._report.not_proven(f"the server's record of channel {host.name!r} stops short")
        if host.out.brief or host.incoming.brief:
            self._report.not_proven(
                f"channel {host.name!r}: its record got brief, and one half alone says nothing of single packets then"
            )
        channel.to_guest, channel.to_host = _packets(host.out), _packets(host.incoming)
        last = host.last_in_use()
        if host.closed is not None:
            channel.cancelled = len(host.closed.get("sent", [])) + len(host.closed.get("queued", []))
        elif last is not None:
            own = [number for kind, number, _ in last.get("queued", []) if kind != COMPLETION]
            if host.dropped:
                channel.dropped = len(last.get("sent", [])) + len(last.get("queued", []))
            else:
                places = {
                    f"held by the server ({TO_HOST})": last.get("awaited", []),
                    f"not completed ({TO_GUEST})": last.get("sent", []),
                    f"queued ({TO_GUEST})": own,
                }
                channel.in_flight = {place: list(numbers) for place, numbers in places.items() if numbers}
        for reason, _, taken, who in host.failures:
            self._failed(reason, taken, who, Lane(), TO_HOST)

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

    def _restored(self, who: str, saved: dict[str, Any], back: dict[str, Any]) -> None:
        """What was saved is what came back, in the same order."""
        where = f"between the save and its restore in {who}"
        for field in ("sent", "queued"):
            before, after = saved.get(field, []), back.get(field, [])
            if before == after:
                continue
            mine = [tuple(one) if field == "queued" else (0, one) for one in before]
            theirs = [tuple(one) if field == "queued" else (0, one) for one in after]
            kind, (number, transaction) = _difference([one[:2] for one in mine], [one[:2] for one in theirs])
            if kind == "":
                kind = "corrupted"
                number, transaction = next(a[:2] for a, b in zip(mine, theirs, strict=True) if a != b)
            self._add(
                kind,
                TO_GUEST,
                where,
                f"{len(before)} packets were {field} at the save, {len(after)} came back",
                first=transaction,
                completion=number == COMPLETION,
            )
        if saved.get("next") != back.get("next"):
            message = f"the next transaction was {saved.get('next')}, and came back as {back.get('next')}"
            self._add("corrupted", TO_GUEST, where, message)

    def _sequence(self, life: Life, direction: str) -> None:
        """An end puts its packets in the order in which it accepted them: their transactions are consecutive."""
        lane = life.out
        expected = life.first
        where = f"between its sender and the ring ({'server' if life is self._host else 'guest'})"
        if life is self._guest and given.ids_given(life):
            self._with_given(life, direction, where)
            return
        occasions = list(life.in_use)
        if life.closed is not None:
            occasions.append(("closed", lane.count, life.closed))
        start = 0
        for _, count, body in occasions:
            expected = self._consecutive(life, direction, start, count, expected, where)
            if expected < 0:
                return
            queued = [number for kind, number, _ in body.get("queued", []) if kind != COMPLETION and number]
            if not expected:  # behind brief blocks
                expected = queued[0] if queued else int(body.get("next", 0))
            if life.failures and body is life.closed:
                # What was staged when the channel failed was never put: its sender gives it up with the rest.
                queued = [*sorted(number for number in body.get("sent", []) if number >= expected), *queued]
            following = expected
            for number in [*queued, int(body.get("next", following + len(queued)))]:
                while following in life.withdrawn:
                    following += 1
                if number != following and number not in life.withdrawn:
                    self._add(
                        "lost" if number > following else "doubled",
                        direction,
                        where,
                        f"{number} follows it in the queue",
                        first=min(following, number),
                        completion=False,
                    )
                    return
                following = number + 1
            start = count
        self._consecutive(life, direction, start, lane.count, expected, where)

    def _with_given(self, life: Life, direction: str, where: str) -> None:
        """The same where some packets have ids of their sender's choice."""
        breach = given.check(life)
        if breach is not None:
            kind, first, message = breach
            self._add(kind, direction, where, message, first=first, completion=False)

    def _consecutive(self, life: Life, direction: str, start: int, stop: int, expected: int, where: str) -> int:
        """The transaction expected after the packets from `start` to `stop`; -1 when they are not in order."""
        lane = life.out
        for at in range(start, stop, _STEP):
            end = min(at + _STEP, stop)
            kinds = lane.kinds[at:end]
            if UNKNOWN in kinds:
                # Brief: nothing is known of single packets, but how many there were; the next block says where it is.
                expected = 0
                continue
            completions = kinds.count(COMPLETION)
            if completions == len(kinds):
                continue
            numbers = lane.transactions[at:end]
            # 0 is the number of packets that belong to no request: it says nothing about their order.
            mine = [number for kind, number in zip(kinds, numbers, strict=True) if kind != COMPLETION and number]
            if not mine:
                continue
            if not expected:
                expected = mine[0]
            if mine == list(range(expected, expected + len(mine))):
                expected += len(mine)
                continue
            for number in mine:
                while expected in life.withdrawn:
                    expected += 1
                if number != expected:
                    kind = "lost" if number > expected else "doubled"
                    if kind == "lost" and expected in lane.transactions[at:]:
                        kind = "reordered"
                    message = f"{number} was put instead"
                    first = min(number, expected)
                    self._add(kind, direction, where, message, first=first, completion=False)
                    return -1
                expected += 1
        return expected

    # ---- both ends -------------------------------------------------------------------------------------------------

    def _compare(self, writer: Lane, reader: Lane, direction: str, covered: int | None) -> None:
        """The n-th packet put is the n-th taken. `covered`: so many taken ones must be among those put; None: the
        record of `writer` may stop short."""
        ring = f"in the ring {direction}"
        common = min(writer.count, reader.count)
        index = _first_difference(writer, reader, common)
        good, bad = _first_bad_point(writer, reader, common)
        if bad is not None and (index is None or index >= bad):
            first, last = writer.key(good), writer.key(bad - 1)
            numbers = sorted((first[1], last[1]))
            exact = bad - good == 1
            known = first[0] != UNKNOWN and last[0] != UNKNOWN
            self._add(
                "corrupted",
                direction,
                ring,
                f"the bytes taken are not the bytes put, in packets {good} to {bad - 1} since the opening",
                first=numbers[0] if known else None,
                last=numbers[-1] if known else None,
                ordinal=good,
                completion=first[0] == COMPLETION if exact and known else None,
            )
            return
        if index is not None:
            mine = [writer.key(one) for one in range(index, min(writer.count, index + _WINDOW))]
            theirs = [reader.key(one) for one in range(index, min(reader.count, index + _WINDOW))]
            before = {reader.key(one) for one in range(max(0, index - _WINDOW), index)}
            kind, (packet_kind, number) = _difference(mine, theirs, before)
            self._add(
                kind or "corrupted",
                direction,
                ring,
                f"put was {_name(mine[0])}, taken was {_name(theirs[0])}, as packet {index} since the opening",
                first=number,
                ordinal=index,
                completion=packet_kind == COMPLETION,
            )
            return
        if covered is not None and covered > writer.count:
            packet_kind, number = reader.key(writer.count)
            seen = packet_kind != UNKNOWN and (packet_kind, number) in {
                reader.key(one) for one in range(max(0, writer.count - _WINDOW), writer.count)
            }
            self._add(
                "doubled" if seen else "invented",
                direction,
                ring,
                f"{covered} packets were taken, and {writer.count} were put",
                first=number if packet_kind != UNKNOWN else None,
                ordinal=writer.count,
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
        packets = _packets(lane)
        wanted = _select(lane, wanted=True)
        done = _select(sender.incoming, wanted=False)
        answered = _select(receiver.out, wanted=False)
        brief = lane.brief + sender.incoming.brief + receiver.out.brief
        self._channel.completed += len(done) + sender.incoming.completions_in_brief
        if brief:
            note = f"channel {sender.name!r}: its record got brief, so completions were counted and not named"
            if note not in self._report.notes:
                self._report.notes.append(note)
            ends = sender.last_in_use()
            count = len(wanted) + lane.wanted_in_brief - len(done) - sender.incoming.completions_in_brief
            if ends is not None and sender.closed is None and len(ends.get("sent", [])) != count:
                message = f"{count} transactions have no completion, and {who} waits for {len(ends['sent'])}"
                self._add("lost", direction, "on its way back", message)
            return packets
        back = TO_HOST if direction == TO_GUEST else TO_GUEST
        # Of packets as the receiver took them: its record may be fetched later than the sender's.
        taken = _select(receiver.incoming, wanted=True)
        # A record that stops short may have what was put and not what was taken before it, or the other way round.
        cut = sender.closed is None and not sender.complete
        known = max(wanted, taken, key=len) if cut else wanted
        left = self._match(known, done, back, f"at its sender ({who})")
        short = receiver.closed is None and not receiver.complete
        self._match(max(wanted, taken, key=len) if short else taken, answered, back, "at its receiver")
        if left is None:
            return packets
        ends = sender.closed if sender.closed is not None else sender.last_in_use()
        if ends is not None and not cut:
            waiting = set(ends.get("sent", []))
            for number in left:
                if number not in waiting:
                    message = "it was put and never completed, and its sender does not wait for it any more"
                    self._add("forgotten", direction, f"at its sender ({who})", message, first=number, completion=False)
                    break
        if self._channel.closed or receiver.closed is not None:
            return packets
        self._in_flight(sender, receiver, direction, left, answered)
        return packets

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
        taken = set(_select_packets(receiver.incoming))
        answers = set(answered)
        places: dict[str, list[int]] = {}
        ends = sender.last_in_use()
        for number in left:
            if number in answers:
                place = "completion in the ring"
            elif number in taken:
                place = "held by the receiver"
            else:
                place = "in the ring"
            places.setdefault(f"{place} ({direction})", []).append(number)
        if ends is not None:
            queued = [number for kind, number, _ in ends.get("queued", []) if kind != COMPLETION]
            if queued:
                places[f"queued ({direction})"] = queued
        self._channel.in_flight |= places

    def _failed(self, reason: str, taken: int, who: str, incoming: Lane, direction: str) -> None:
        """A channel that was failed: the packet that its end was about to take, or had just taken."""
        packet_kind, number = incoming.key(taken) if taken < incoming.count else (UNKNOWN, 0)
        self._add(
            "failed",
            direction,
            f"at {who}",
            reason,
            first=number if packet_kind != UNKNOWN else None,
            ordinal=taken,
            completion=packet_kind == COMPLETION if packet_kind != UNKNOWN else None,
        )


# ---- lanes -----------------------------------------------------------------------------------------------------------


def _name(key: tuple[int, int]) -> str:
    if key[0] == UNKNOWN:
        return "an unrecorded one"
    return f"the {'completion' if key[0] == COMPLETION else 'packet'} of transaction {key[1]}"


def _first_difference(writer: Lane, reader: Lane, common: int) -> int | None:
    """The first packet of which both ends recorded another kind or transaction."""
    for start in range(0, common, _STEP):
        stop = min(start + _STEP, common)
        if (
            writer.kinds[start:stop] == reader.kinds[start:stop]
            and writer.transactions[start:stop] == reader.transactions[start:stop]
        ):
            continue
        for index in range(start, stop):
            one, other = writer.key(index), reader.key(index)
            if one != other and UNKNOWN not in (one[0], other[0]):
                return index
    return None


def _first_bad_point(writer: Lane, reader: Lane, common: int) -> tuple[int, int | None]:
    """The last point up to which the bytes of both ends agree, and the first at which they do not."""
    good = 0
    points = writer.points.keys() & reader.points.keys()
    for point in sorted(points):
        if point > common:
            break
        if writer.points[point] != reader.points[point]:
            return good, point
        good = point
    return good, None


def _difference(
    mine: Sequence[tuple[int, int]], theirs: Sequence[tuple[int, int]], before: Iterable[tuple[int, int]] = ()
) -> tuple[str, tuple[int, int]]:
    """How the second list breaks the first: the kind of breach, and the packet it is about. "" if they are equal."""
    seen = set(before)
    for index, expected in enumerate(mine):
        if index >= len(theirs):
            return "lost", expected
        found = theirs[index]
        if found == expected:
            seen.add(found)
            continue
        if found in seen:
            return "doubled", found
        later = expected in theirs[index:]
        known = found in mine[index:]
        if later and known:
            return "reordered", expected
        if known:
            return "lost", expected
        return ("invented", found) if later else ("corrupted", expected)
    if len(theirs) > len(mine):
        found = theirs[len(mine)]
        return ("doubled" if found in seen else "invented"), found
    return "", (0, 0)


def _packets(lane: Lane) -> int:
    """How many packets, completions not counted."""
    return lane.count - lane.kinds.count(COMPLETION) - lane.completions_in_brief


def _select(lane: Lane, *, wanted: bool) -> list[int]:
    """The transactions of packets that want a completion, or those of completions."""
    if wanted:
        if not lane.kinds.count(COMPLETION) and not lane.flags.count(0):
            return lane.transactions.tolist()
        rows = zip(lane.kinds, lane.flags, lane.transactions, strict=True)
        return [number for kind, flag, number in rows if flag and kind not in (COMPLETION, UNKNOWN)]
    if lane.kinds.count(COMPLETION) == lane.count:
        return lane.transactions.tolist()
    return [number for kind, number in zip(lane.kinds, lane.transactions, strict=True) if kind == COMPLETION]


def _select_packets(lane: Lane) -> Iterable[int]:
    return (
        number for kind, number in zip(lane.kinds, lane.transactions, strict=True) if kind not in (COMPLETION, UNKNOWN)
    )
