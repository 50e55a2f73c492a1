"""Folders of campaigns that never ran, for tests of the report: records as a real campaign writes them."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from vmbus.soak.journal import JOURNALS, Record
from vmbus.soak.records import (
    FORMAT,
    BudgetResult,
    Change,
    Comparison,
    Environment,
    EpisodeRecord,
    EventRecord,
    Failure,
    OperationRecord,
    Report,
    Sample,
    State,
    WorkloadRecord,
)

STARTED = datetime(2026, 3, 1, 22, 0, tzinfo=UTC)
KINDS = {  # kind: (weight, seconds, downtime, whether it saves, whether it restores)
    "save_restore": (5, 2.6, 1.9, True, True),
    "save_restore_live": (6, 2.1, 1.2, True, True),
    "migrate": (5, 1.8, 0.19, True, True),
    "cancelled_migration": (2, 0.9, None, False, False),
    "sabotaged_migration": (3, 2.2, None, False, False),
    "checkpoint": (2, 0.7, 0.35, True, False),
    "revert": (2, 0.6, 0.4, False, True),
    "clone": (1, 3.5, 1.4, True, True),
    "pause": (3, 0.4, 0.3, False, False),
    "hot_add": (2, 0.5, None, False, False),
    "kill": (2, 2.8, 2.2, False, True),
    "driver_kill": (2, 1.1, None, False, False),
}
SETTINGS: dict[str, Any] = {"seed": 7, "operations": 300}
ENVIRONMENT: dict[str, Any] = {
    "project": "0.1.0",
    "python": "3.11.2",
    "qemu": "11.1.3",
    "libvfio_user": "built from Debian's source",
    "kernel": "6.1.0",
    "guest_kernel": "6.12.107",
    "accelerator": "tcg",
    "processors": 2,
    "memory_bytes": 8 << 30,
}


class Folder:
    """A campaign's folder that is written line by line."""

    def __init__(self, path: Path, state: str = "finished", planned: int | None = None, **campaign: Any) -> None:
        self.path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.json(
            "campaign.json",
            {
                "format": FORMAT,
                "seed": 7,
                "started": STARTED.isoformat(),
                "settings": SETTINGS,
                "environment": ENVIRONMENT,
                "episodes_planned": planned,
                **campaign,
            },
        )
        self.state(state)
        for name in JOURNALS.values():
            (path / f"{name}.jsonl").write_bytes(b"")

    def state(self, state: str, ran: float = 1200.0, **more: Any) -> None:
        self.json("state.json", msgspec.to_builtins(State(ran=ran, state=state, **more)))  # type: ignore[arg-type]

    def json(self, name: str, value: object) -> None:
        (self.path / name).write_bytes(msgspec.json.encode(value))

    def add(self, *records: Record) -> None:
        for kind, name in JOURNALS.items():
            lines = [msgspec.json.encode(record) + b"\n" for record in records if type(record) is kind]
            with (self.path / f"{name}.jsonl").open("ab") as file:
                file.write(b"".join(lines))


def operation(episode: int = 0, number: int = 0, kind: str = "migrate", **more: Any) -> OperationRecord:
    return OperationRecord(
        **{
            "episode": episode,
            "number": number,
            "kind": kind,
            "outcome": "done",
            "at": 5.0 + 4 * number,
            "seconds": 1.5,
            "packets": {"queued": 100, "sent": 20},
            **more,
        }
    )


def episode(number: int = 0, verdict: str = "passed", **more: Any) -> EpisodeRecord:
    workloads = [WorkloadRecord(driver="echo", verdict="passed", transactions=1000)]
    return EpisodeRecord(
        **{
            "episode": number,
            "seed": 1000 + number,
            "verdict": verdict,
            "started": (STARTED + timedelta(seconds=30 * number)).isoformat(),
            "seconds": 25.0,
            "workloads": workloads,
            "operations": 0,
            "audit": "clean",
            **more,
        }
    )


def whole_campaign(path: Path, operations: int = 300, failures: int = 0, seed: int = 7) -> Folder:
    """Write a campaign with everything that a report shows, from a seed."""
    draw = random.Random(seed)
    folder = Folder(path, planned=-(-operations // 8))
    names = list(KINDS)
    written: list[Record] = []
    for index in range(-(-operations // 8)):
        count = min(8, operations - 8 * index)
        failing = index < 3 * failures and index % 3 == 1
        at, records = 6.0, []
        for number in range(count):
            kind = draw.choices(names, [KINDS[name][0] for name in names])[0]
            _, seconds, downtime, saves, restores = KINDS[kind]
            stretch = draw.lognormvariate(0, 0.18)
            refused = kind in ("cancelled_migration", "sabotaged_migration")
            records.append(
                operation(
                    index,
                    number,
                    kind,
                    outcome="refused" if refused else "done",
                    at=round(at, 3),
                    seconds=round(seconds * stretch, 4),
                    downtime=None if downtime is None else round(downtime * stretch * draw.uniform(0.9, 1.1), 4),
                    save_seconds=round(0.55 * stretch * draw.uniform(0.8, 1.2), 4) if saves else None,
                    restore_seconds=round(0.8 * stretch * draw.uniform(0.8, 1.2), 4) if restores else None,
                    memory_bytes=int((100 + 25 * draw.random()) * 2**20) if saves else None,
                    state_bytes=int((90 + 150 * draw.random()) * 2**10) if saves else None,
                    packets={
                        "queued": int(512 * draw.betavariate(4, 2)),
                        "sent": int(466 * draw.betavariate(3, 2)),
                        "held": int(32 * draw.random()),
                    },
                    parameters={"after": draw.choice(["cut link", "full disk", "killed server"])}
                    if kind == "sabotaged_migration"
                    else {},
                )
            )
            at += seconds * stretch + draw.uniform(1.5, 4)
        if failing:
            last = records[-1]
            last.outcome, last.message = "failed", "burst: transaction 40213 was lost after the restore"
        samples, done = [], 0.0
        moment = 4.0
        while moment < at:
            stopped = any(one.at <= moment <= one.at + (one.downtime or 0) for one in records)
            done += 0 if stopped else 700 * draw.uniform(0.85, 1.1)
            samples.append(Sample(at=round(moment, 3), transactions=int(done)))
            moment += 0.5
        written += records
        written.append(EventRecord(episode=index, at=5.1, text="guest booted, drivers echo and burst are started"))
        if failing:
            written.append(EventRecord(episode=index, at=at, text="kept what is needed to see it again", serious=True))
        echo = WorkloadRecord(driver="echo", verdict="passed", transactions=int(done * 0.6))
        burst = WorkloadRecord(driver="burst", verdict="passed", transactions=int(done * 0.4))
        more: dict[str, Any] = {}
        if failing:
            burst.verdict, burst.lost = "failed", 1
            more = {
                "audit": "broken",
                "failure": "burst: transaction 40213 was lost: queued at the save of operation 7, in no ring, no saved "
                "packet and no answer after the restore",
                "kept": f"failures/{index:05}",
            }
        written.append(
            episode(
                index,
                "failed" if failing else "passed",
                started=(STARTED + timedelta(seconds=20 * index)).isoformat(),
                seconds=round(at + 4, 2),
                operations=count,
                samples=samples,
                workloads=[echo, burst],
                **more,
            )
        )
    folder.add(*written)
    return folder


def everywhere(text: str) -> Report:
    """A report with the same text wherever a record can have text of its own."""
    return Report(
        verdict="failed",
        seed=1,
        started=text,
        seconds=1,
        operations=1,
        packets=1,
        transactions=1,
        episodes_planned=None,
        failures=[Failure(episode=0, message=text, replay=text, kept=text)],
        by_kind={text: {"done": 1}},
        command=text,
        environment=Environment(**{name: text for name, value in ENVIRONMENT.items() if isinstance(value, str)}),
        settings={text: text, f"{text}2": [text]},
        episode_records=[
            episode(
                0,
                started=text,
                where=text,
                audit=text,
                failure=text,
                kept=text,
                workloads=[WorkloadRecord(driver=text, verdict=text, message=text, parameters={text: text})],
                samples=[Sample(at=float(at), transactions=100 * at, in_flight={text: 1}) for at in range(30)],
            )
        ],
        operation_records=[
            operation(
                0,
                number,
                text,
                message=text,
                parameters={text: text},
                packets={text: 5},
                downtime=0.1,
                save_seconds=0.1,
                restore_seconds=0.2,
                memory_bytes=1 << 20,
                state_bytes=1 << 10,
            )
            for number in range(3)
        ],
        events=[EventRecord(episode=0, at=1, text=text, serious=serious) for serious in (False, True)],
        missing=[text],
        budgets=[BudgetResult(measure="downtime", kind=text, limit=1.0, value=None, kept=False)],
        comparison=Comparison(
            seed=1,
            started=text,
            growth=0.1,
            differences=[text],
            changes=[Change(kind=text, quantity="save", before=1.0, now=2.0, operations=(9, 9), grown=True)],
        ),
    )
