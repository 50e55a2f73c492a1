"""The report of a campaign: made of its folder alone, at any time, also of one that was killed.

What cannot be read (a line torn by a crash, a file that is not there, what a full disk has swallowed) is left out and
named in `Report.missing`; it never keeps the rest from being reported. The verdict rests on the episodes' records:

    failed        an episode has failed, or contradicts its own verdict (its auditor, its workloads' books), or an
                  operation has failed in an episode that has not come to its end, or the finished campaign has broken
                  one of its budgets (`expected`)
    passed        the campaign is finished, nothing has failed, and at least one episode has passed
    interrupted   everything else
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import msgspec

from vmbus.provision.cache import publish_bytes
from vmbus.soak import expected as expectations
from vmbus.soak.folder import read_campaign, read_state
from vmbus.soak.journal import last_episodes, read_records
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
JUNIT_NAME = "junit.xml"

MAXIMUM_EVENTS = 5000
"""In a report: the last ones, and serious ones first. All are in events.jsonl."""


def build(folder: Path) -> Report:
    """Return the report of the campaign in `folder`.

    Raises UsageError when there is none, or one of another version; EnvironmentProblem when it cannot be read.
    """
    from vmbus.soak.replay import campaign_command, replay_command

    campaign = read_campaign(folder)
    missing: list[str] = []
    state = read_state(folder, missing)
    missing += state.missing
    episodes = last_episodes(read_records(folder, EpisodeRecord, missing))
    operations, unfinished = _last_operations(read_records(folder, OperationRecord, missing), episodes, missing)
    events = _limited(read_records(folder, EventRecord, missing), missing)
    failures = [
        Failure(
            episode=number,
            message=message,
            replay=replay_command(campaign.settings, number, folder),
            kept=episodes[number].kept if number in episodes else "",
        )
        for number, message in sorted(_failed(episodes, [*operations, *unfinished]).items())
    ]
    carried_out = [operation for operation in operations if operation.outcome != "failed"]
    report = Report(
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
    _judge(report, folder, finished=state.state == "finished")
    return report


def _judge(report: Report, folder: Path, *, finished: bool) -> None:
    """Hold the report against what the campaign is expected to keep. What cannot be read there has not been kept."""
    try:
        wanted = expectations.read(folder)
    except ValueError as error:
        report.missing.append(str(error))
        if report.verdict == "passed":
            report.verdict = "interrupted"
        return
    report.budgets, report.comparison = expectations.judge(report, wanted, finished=finished)
    if report.verdict == "passed" and expectations.broken(report):
        report.verdict = "failed"


def write(folder: Path) -> Report:
    """Make `report.json`, `report.html` and `junit.xml` anew, each replaced as a whole; return the report.

    Raises what `build` raises, and OSError when a file cannot be written (the old one is still there then).
    """
    from vmbus.soak.html import render  # the template engine takes a tenth of a second, and is wanted here only
    from vmbus.soak.junit import junit_xml

    report = build(folder)
    publish_bytes(folder / JSON_NAME, encode(report))
    publish_bytes(folder / HTML_NAME, render(report).encode(errors="replace"))
    publish_bytes(folder / JUNIT_NAME, junit_xml(report))
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


# --- judging -------------------------------------------------------------------------------------------------------


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
    found = Counter(record.episode for record in counted)
    short = [record.operations - found[number] for number, record in episodes.items()]
    lacking = [count for count in short if count > 0]
    if lacking:
        missing.append(f"operations.jsonl: the records of {sum(lacking)} operations of {len(lacking)} episodes")
    return counted, unfinished


def _failed(episodes: dict[int, EpisodeRecord], operations: list[OperationRecord]) -> dict[int, str]:
    """What went wrong first, for each episode that failed."""
    failed = {
        record.episode: problem
        for record in episodes.values()
        if (problem := next(_problems(record), None)) is not None
    }
    for operation in operations:
        if operation.outcome == "failed":
            text = f"operation {operation.number}, {operation.kind}: {operation.message}"
            failed.setdefault(operation.episode, text)
    return failed


def _problems(record: EpisodeRecord) -> Iterator[str]:
    """What went wrong in an episode, the most telling first. An episode that says it passed has to mean it."""
    if record.verdict == "failed":
        yield record.failure or "the episode failed, and nothing says why"
    if record.audit == "broken":
        yield "the auditor found a transaction that was not exactly once there"
    for one in record.workloads:
        wrong = (("lost", one.lost), ("duplicated", one.duplicated), ("reordered", one.reordered))
        said = ", ".join(f"{count} {name}" for name, count in (*wrong, ("corrupted", one.corrupted)) if count)
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
