"""The proof: every packet of both ends exactly once and in order, or the first transaction that breaks it.

For each life of a channel, matched by its nonce, and each direction, the n-th packet that one end put is the n-th that
the other took, with the same kind, transaction and bytes. For each end: what it accepted was put once, in order, and
what wanted a completion got exactly one. At each restore, what came back is what was saved. Whatever is unfinished at
the end of the records is named as in flight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from uuid import UUID

from vmbus.errors import UsageError
from vmbus.observe.audit import format as f
from vmbus.observe.audit.pair import Pair
from vmbus.observe.audit.records import Life, Mark, Record, guest_timeline, host_timeline, lineage, read_records
from vmbus.observe.audit.report import Gap, Report, Verdict
from vmbus.wire.linux import driver_of


def check_paths(paths: Iterable[Path], *, leaf: str | Sequence[str] | None = None) -> Report:
    """Check the records among files and directories.

    `leaf`: the beginning of the uid of the server's record with which the timeline ends (of a VM with several devices,
    one for each); without it, for each device's name the one for which the guest's records were fetched last, else the
    newest that no other goes on from. Raises EnvironmentProblem for files that are not there or cannot be read,
    StateError for damaged ones, UsageError for a leaf that is not there.
    """
    return check_records(read_records(paths), leaf=leaf)


def check_records(records: Sequence[Record], *, leaf: str | Sequence[str] | None = None) -> Report:
    """See `check_paths`."""
    notes = [
        f"{one.source}: its last {one.torn} bytes are a torn event, and were left out" for one in records if one.torn
    ]
    usable = [one for one in records if not one.empty]
    found = [lineage(usable, end) for end in _leaves(usable, leaf)]
    paths = [path for path, _ in found]
    inside = {record.uid for path in paths for record, _ in path}
    guests, marks = _guests(usable, paths)
    hosts = [host_timeline(path, mark) for path, mark in zip(paths, marks, strict=True)]
    guest = guest_timeline(guests)
    abandoned = [f"{record}: all of it" for record in usable if record.side == "host" and record.uid not in inside]
    for record, cut in (one for path in paths for one in path[:-1]):
        rest = sum(event.kind in (f.PUT, f.TAKEN) for event in record.events[cut:])
        if rest:
            abandoned.append(f"{record}: what came after the save ({rest} blocks of packets)")
    report = Report(
        verdict="clean",
        missing=[Gap(text) for _, missing in found for text in missing],
        timeline=[str(record) for path in paths for record, _ in path],
        guests=[str(record) for record in guests],
        abandoned=abandoned,
        notes=notes,
    )
    lives: dict[str, tuple[Life, bool]] = {}
    for host, path, mark in zip(hosts, paths, marks, strict=True):
        lives |= {nonce: (life, _complete(path, mark)) for nonce, life in host.lives.items()}
    _check_lives(report, lives, guest.lives)
    theirs = [one for host in hosts for one in host.troubles]
    skip = {one.nonce for one in theirs if one.nonce}
    troubles = [one for one in (*theirs, *guest.troubles) if not one.nonce or one.nonce in skip]
    report.missing += [Gap(one.message) for one in troubles]
    for life in (*(one for host in hosts for one in host.unknown), *guest.unknown):
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


def _leaves(records: Sequence[Record], wanted: str | Sequence[str] | None) -> list[Record]:
    """The records with which timelines end, of each device one."""
    hosts = [record for record in records if record.side == "host"]
    if not hosts:
        raise UsageError("there is no record of a server among these")
    if wanted is None:
        names = dict.fromkeys(record.name for record in hosts)
        return [_latest([one for one in records if one.side != "host" or one.name == name]) for name in names]
    leaves = []
    for leaf in [wanted] if isinstance(wanted, str) else wanted:
        found = [record for record in hosts if record.uid.startswith(leaf)]
        if len(found) != 1:
            raise UsageError(f"{len(found)} records of servers begin with {leaf!r}; there: {_names(hosts)}")
        leaves += found
    return leaves


def _latest(records: Sequence[Record]) -> Record:
    hosts = [record for record in records if record.side == "host"]
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


def _guests(
    records: Iterable[Record], paths: Sequence[Sequence[tuple[Record, int]]]
) -> tuple[list[Record], list[Mark | None]]:
    """For each process of the guest its latest record that is of these timelines, which are of the devices of one VM;
    and where each of them was when the guest's records were fetched for the last time."""
    best: dict[str, tuple[tuple[int, int, int], Record]] = {}
    last: list[tuple[tuple[int, int], Mark] | None] = [None] * len(paths)
    cuts = {
        record.uid: (number, index - len(path), cut)  # the last server of each timeline counts as the latest
        for number, path in enumerate(paths)
        for index, (record, cut) in enumerate(path)
    }
    for record in records:
        if record.side != "guest":
            continue
        rank = (-len(cuts) - 1, 0, len(record.events))  # a record that was not fetched by us: of any timeline
        if (mark := record.collected) is not None:
            number, age, cut = cuts.get(mark.uid, (0, 0, -1))
            if mark.position > cut:
                continue
            rank = (age, mark.position, len(record.events))
            if (before := last[number]) is None or before[0] < (age, mark.position):
                last[number] = ((age, mark.position), mark)
        if record.uid not in best or best[record.uid][0] < rank:
            best[record.uid] = (rank, record)
    return [record for _, record in best.values()], [None if one is None else one[1] for one in last]


def _complete(path: Sequence[tuple[Record, int]], mark: Mark | None) -> bool:
    """Whether the servers' side reaches beyond the guest's: then the guest cannot have taken more than was put."""
    last, cut = path[-1]
    return last.complete and (mark is None or mark.uid != last.uid or cut > mark.position)


# ---- lives -----------------------------------------------------------------------------------------------------------


def _check_lives(report: Report, host: dict[str, tuple[Life, bool]], guest: dict[str, Life]) -> None:
    """`host`: with each life, whether its server's side reaches beyond the guest's."""
    for nonce in [*host, *(nonce for nonce in guest if nonce not in host)]:
        one, host_complete = host.get(nonce, (None, False))
        other = guest.get(nonce)
        if one is not None and not one.known:
            continue  # told already
        if one is not None and other is not None and other.known:
            Pair(report, one, other, host_complete).check()
            continue
        if one is not None and not one.out.count and not one.incoming.count:
            continue  # opened and closed again, before the guest's end was there to see it
        if one is not None and other is None and (driver := _linux_driver(one.interface_type)) is not None:
            half = Life(nonce, one.name, one.instance, one.subchannel)
            Pair(report, one, half, host_complete).check_half(driver)
            continue
        name = (one or guest[nonce]).name
        end = "server" if one is None else "guest"
        text = f"the {end}'s record of channel {name!r} (life {nonce[:8]}) is not here"
        report.not_proven(text, "" if one is None else "guest-missing")


def _linux_driver(interface_type: str) -> str | None:
    """The driver of Linux's that has a channel of that type, which keeps no record."""
    try:
        return driver_of(UUID(interface_type))
    except ValueError:
        return None  # of a record from before types were written down
