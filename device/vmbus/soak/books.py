"""The books of an episode: what guest, providers and auditor have counted, and what of it is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from vmbus.errors import VmbusError
from vmbus.observe.audit.report import Report
from vmbus.soak.plan import WorkloadPlan
from vmbus.soak.records import Count

MIXED = "mixed"
FAULTS = ("lost", "duplicated", "reordered", "corrupted")

# What a killed driver explains: its record stops short, or has nothing of its last channels.
_DEAD = ("guest-stops-short", "guest-missing")


class Fault(VmbusError):
    """Something is not as it must be: the soak has found what it looks for."""


@dataclass(frozen=True)
class Session:
    """What is known of a VM's workloads at one moment of it.

    `jobs`: the guest's number of each program that runs: of a workload, or of MIXED. `baseline`: the hosts' tallies
    when they were started, `marks`: what else of a provider's status a workload's verdict compares. `before`:
    transactions completed by earlier drivers. `killed`: drivers that were killed up to then. `moves`: how often the
    guest found itself restored, up to then; `backs`: how often with another end of its network than the one that it
    had spoken with, which has not gone back.
    """

    jobs: dict[str, int]
    baseline: dict[str, Count]
    before: int = 0
    killed: int = 0
    marks: dict[str, Count] = field(default_factory=dict)
    moves: int = 0
    backs: int = 0

    def moved(self, *, back: bool = False) -> Session:
        """This one, restored, migrated, or (`back`) taken back to."""
        return replace(self, moves=self.moves + 1, backs=self.backs + back)


def tallies(status: dict[str, Any]) -> dict[str, Count]:
    """The books of a server's providers that keep any, by name."""
    found = {}
    for name, provider in status["providers"].items():
        if isinstance(tally := provider.get("tally"), dict):
            found[name] = {str(kind): int(count) for kind, count in tally.items()}
    return found


def number_at(status: dict[str, Any], one: WorkloadPlan, path: str) -> int:
    """A count in the status of a workload's provider; dots lead into tables. Raises Fault if it is not there."""
    value: Any = status["providers"][one.provider]
    for step in path.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    if type(value) is not int:
        raise Fault(f"workload {one.driver}: the status of its provider {one.provider!r} has no count {path!r}")
    return value


def flight(status: dict[str, Any]) -> Count:
    """Packets in flight by state: the host's ``queued`` and ``sent`` ones, and the guest's ``held`` by providers."""
    packets = status["packets"]
    return {"queued": int(packets["queued"]), "sent": int(packets["sent"]), "held": int(status["incoming_held"])}


def in_words(counts: Count) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def result_in_words(result: dict[str, Any]) -> str:
    """A driver's result, for people."""
    counts = ", ".join(f"{key} {result[key]}" for key in ("completed", *FAULTS) if key in result)
    return "; ".join([counts, *map(str, result.get("trouble", []))])


def report_in_words(report: dict[str, Any]) -> str:
    """How a job of the guest's ended, or what it says, for people."""
    error = report.get("error")
    if error:
        return str(error.get("message", error))
    result = report.get("result") or {}
    parts = result.get("workloads", [result] if result else [])
    return (
        " | ".join(f"{one.get('name', report.get('driver'))}: {result_in_words(one)}" for one in parts)
        or "it says nothing"
    )


def disagreements(session: Session, one: WorkloadPlan, result: dict[str, Any], status: dict[str, Any]) -> Iterator[str]:
    """What speaks against a workload's `verdict`."""
    for mine, path in one.verdict.items():
        if type(result.get(mine)) is not int:
            yield f"workload {one.driver}: its driver's result has no count {mine!r}"
            continue
        counted = number_at(status, one, path) - session.marks[one.driver][path]
        if counted != result[mine]:
            yield (
                f"workload {one.driver}: {mine!r} of its driver's result is {result[mine]}, and {path!r} of its "
                f"provider's status has risen by {counted} meanwhile"
            )


def judge(report: Report, session: Session) -> list[str]:
    """What speaks against a record. A driver that was killed leaves one that stops short."""
    if report.verdict == "broken":
        return [f"the auditor: {report.problems[0]}"]
    if report.verdict == "clean":
        return []
    unproven = [gap for gap in report.missing if not (session.killed and gap.code in _DEAD)]
    return [f"the auditor could not prove all: {unproven[0]}"] if unproven else []
