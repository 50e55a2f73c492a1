"""The report of a campaign: made of its folder alone, at any time, also of one that was killed.

What cannot be read (a line torn by a crash, a file that is not there, what a full disk has swallowed) is left out and
named in `Report.missing`; it never keeps the rest from being reported. The verdict rests on the episodes' records:

    failed        an episode has failed, or contradicts its own verdict (its auditor, its workloads' books), or an
                  operation has failed in an episode that has not come to its end
    passed        the campaign is finished, nothing has failed, and at least one episode has passed
    interrupted   everything else
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from vmbus.provision.cache import publish_bytes
from vmbus.soak import folder as folders
from vmbus.soak.records import (
    Count,
    EpisodeRecord,
    EventRecord,
    Failure,
    OperationRecord,
    Report,
    State,
    Verdict,
)

JSON_NAME = "report.json"
HTML_NAME = "report.html"

MAXIMUM_EVENTS = 5000
"""In a report: the last ones, and serious ones first. All are in events.jsonl."""

_Record = TypeVar("_Record", OperationRecord, EventRecord, EpisodeRecord)


def build(folder: Path) -> Report:
    """Return the report of the campaign in `folder`.

    Raises UsageError when there is none, or one of another version; EnvironmentProblem when it cannot be read.
    """
    from vmbus.soak.replay import campaign_command, replay_command

    campaign = folders.read_campaign(folder)
    missing: list[str] = []
    state = _state(folder, missing)
    missing += _said_missing(folder)
    all_episodes = _read(folder, "episodes", EpisodeRecord, missing)
    all_operations = _read(folder, "operations", OperationRecord, missing)
    events = _limited(_read(folder, "events", EventRecord, missing), missing)

    episodes = _last_episodes(all_episodes)
    operations, unfinished = _last_operations(all_operations, episodes, missing)
    failures = [
        Failure(
            episode=number,
            message=message,
            replay=replay_command(campaign.settings, number, folder),
            kept=episodes[number].kept if number in episodes else "",
        )
        for number, message in sorted(_failed(episodes, operations, unfinished).items())
    ]
    carried_out = [operation for operation in operations if operation.outcome != "failed"]
    return Report(
        verdict=_verdict(failures, state, episodes),
        seed=campaign.seed,
        started=campaign.started,
        seconds=state.ran or _seconds(campaign.started, episodes),
        operations=len(carried_out),
        packets=sum(sum(operation.packets.values()) for operation in carried_out),
        transactions=sum(one.transactions for record in episodes.values() for one in record.workloads),
        episodes_planned=campaign.episodes_planned,
        failures=failures,
        by_kind=_by_kind(operations),
        command=campaign_command(campaign.settings, folder),
        environment=campaign.environment,
        settings=campaign.settings,
        episode_records=[episodes[number] for number in sorted(episodes)],
        operation_records=operations,
        events=events,
        missing=missing,
    )


def write(folder: Path) -> Report:
    """Make `report.json` and `report.html` anew in `folder`, each replaced as a whole; return the report.

    Raises what `build` raises, and OSError when a file cannot be written (the old one is still there then).
    """
    from vmbus.soak.html import render  # the template engine takes a tenth of a second, and is wanted here only

    report = build(folder)
    publish_bytes(folder / JSON_NAME, encode(report))
    publish_bytes(folder / HTML_NAME, render(report).encode(errors="replace"))
    return report


def encode(report: Report) -> bytes:
    """Return `report.json`: one line for each record, so that it can be searched and compared line by line."""
    parts = []
    for name in report.__struct_fields__:
        value = getattr(report, name)
        if isinstance(value, list) and value:
            body = b"[\n  " + b",\n  ".join(msgspec.json.encode(one) for one in value) + b"\n ]"
        else:
            body = msgspec.json.encode(value)
        parts.append(msgspec.json.encode(name) + b": " + body)
    return b"{\n " + b",\n ".join(parts) + b"\n}\n"


# --- reading -------------------------------------------------------------------------------------------------------


def _read(folder: Path, journal: folders.Journal, kind: type[_Record], missing: list[str]) -> list[_Record]:
    """Return the records of one journal; what cannot be read goes into `missing`."""
    path = folder / f"{journal}.jsonl"
    decoder = msgspec.json.Decoder(kind)
    records: list[_Record] = []
    bad = 0
    first = ""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    records.append(decoder.decode(line))
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    bad += 1
                    what = "is cut off" if not line.endswith(b"\n") else f"is no record: {error}"
                    first = first or f"line {number} {what}"
    except FileNotFoundError:
        missing.append(f"{path.name}: there is no such file")
    except OSError as error:
        missing.append(f"{path.name}: cannot be read after {len(records)} records: {error.strerror}")
    if bad:
        missing.append(f"{path.name}: {bad} of {len(records) + bad} lines could not be read; {first}")
    return records


def _state(folder: Path, missing: list[str]) -> State:
    path = folder / folders.STATE_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        missing.append(f"{path.name}: whether the campaign came to its end is not known: {said}")
        return State()


def _said_missing(folder: Path) -> list[str]:
    """What the campaign itself could not write."""
    path = folder / folders.MISSING_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[str])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        return [f"{path.name}: it cannot be read, so some records were not written: {error}"]


# --- judging -------------------------------------------------------------------------------------------------------


def _last_episodes(records: list[EpisodeRecord]) -> dict[int, EpisodeRecord]:
    """The record of each episode that counts: the last, but what has once failed stays so."""
    last: dict[int, EpisodeRecord] = {}
    for record in records:
        before = last.get(record.episode)
        if before is None or before.verdict != "failed" or record.verdict == "failed":
            last[record.episode] = record
    return last


def _last_operations(
    records: list[OperationRecord], episodes: dict[int, EpisodeRecord], missing: list[str]
) -> tuple[list[OperationRecord], list[OperationRecord]]:
    """Return the operations of episodes with a record, and those of episodes without one, in order.

    An episode that was cut off is run again, with the same numbers: the last record of each counts.
    """
    last = {(record.episode, record.number): record for record in records}
    ordered = [last[key] for key in sorted(last)]
    counted = [record for record in ordered if record.episode in episodes]
    unfinished = [record for record in ordered if record.episode not in episodes]
    if unfinished:
        numbers = sorted({record.episode for record in unfinished})
        some = ", ".join(str(number) for number in numbers[:8]) + (", ..." if len(numbers) > 8 else "")
        missing.append(
            f"{len(unfinished)} operations of {len(numbers)} episodes without an end ({some}) are not counted: "
            "these episodes will be run again when the campaign is gone on with"
        )
    found: Count = {}
    for record in counted:
        found[str(record.episode)] = found.get(str(record.episode), 0) + 1
    short = [number for number, record in episodes.items() if found.get(str(number), 0) < record.operations]
    if short:
        lacking = sum(episodes[number].operations - found.get(str(number), 0) for number in short)
        missing.append(f"operations.jsonl: the records of {lacking} operations of {len(short)} episodes")
    return counted, unfinished


def _failed(
    episodes: dict[int, EpisodeRecord], operations: list[OperationRecord], unfinished: list[OperationRecord]
) -> dict[int, str]:
    """What went wrong first, for each episode that failed."""
    failed: dict[int, str] = {}
    for record in episodes.values():
        problems = list(_problems(record))
        if problems:
            failed[record.episode] = problems[0]
    for operation in [*operations, *unfinished]:
        if operation.outcome == "failed" and operation.episode not in failed:
            failed[operation.episode] = f"operation {operation.number}, {operation.kind}: {operation.message}"
    return failed


def _problems(record: EpisodeRecord) -> Iterator[str]:
    """What went wrong in an episode, the most telling first. An episode that says it passed has to mean it."""
    if record.verdict == "failed":
        yield record.failure or "the episode failed, and nothing says why"
    if record.audit == "broken":
        yield "the auditor found a transaction that was not exactly once there"
    for one in record.workloads:
        wrong = {
            "lost": one.lost,
            "duplicated": one.duplicated,
            "reordered": one.reordered,
            "corrupted": one.corrupted,
        }
        said = ", ".join(f"{count} {name}" for name, count in wrong.items() if count)
        if said or one.verdict == "failed":
            yield f"{one.driver}: {said or one.message or 'failed'}"
        elif one.verdict != "passed" and record.verdict == "passed":
            yield f"{one.driver} did not come to its end"


def _verdict(failures: list[Failure], state: State, episodes: dict[int, EpisodeRecord]) -> Verdict:
    if failures:
        return "failed"
    if state.state == "finished" and any(record.verdict == "passed" for record in episodes.values()):
        return "passed"
    return "interrupted"


def _by_kind(operations: list[OperationRecord]) -> dict[str, Count]:
    kinds: dict[str, Count] = {}
    for operation in operations:
        count = kinds.setdefault(operation.kind, {"done": 0, "refused": 0, "failed": 0})
        count[operation.outcome] += 1
    return dict(sorted(kinds.items()))


def _limited(events: list[EventRecord], missing: list[str]) -> list[EventRecord]:
    if len(events) <= MAXIMUM_EVENTS:
        return events
    serious = [place for place, event in enumerate(events) if event.serious][-MAXIMUM_EVENTS:]
    rest = [place for place, event in enumerate(events) if not event.serious]
    kept = sorted(serious + rest[len(rest) - (MAXIMUM_EVENTS - len(serious)) :])
    missing.append(f"{len(events) - len(kept)} older events, which are in events.jsonl")
    return [events[place] for place in kept]


def _seconds(started: str, episodes: dict[int, EpisodeRecord]) -> float:
    """From the campaign's beginning to the last episode's end; 0 if times cannot be read."""
    try:
        begin = datetime.fromisoformat(started).timestamp()
        ends = [datetime.fromisoformat(one.started).timestamp() + one.seconds for one in episodes.values()]
    except (ValueError, OverflowError, OSError):
        return 0.0
    return max(0.0, max(ends, default=begin) - begin)
