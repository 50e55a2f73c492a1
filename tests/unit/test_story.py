"""The demo's story: what it needs in flight is there at the save, or it saves again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vmbus.testkit import story as stories
from vmbus.testkit.story import Story, missing, save_in_flight

STORY = Story(packets=16)
NOTHING_HELD = ({"queued": 16, "sent": 16}, 0)
RING_EMPTY = ({"queued": 0, "sent": 3}, 1)
ENOUGH = ({"queued": 20, "sent": 16}, 1)


class _Vm:
    """A VM whose saves find what they are told to, though its status always shows enough."""

    control: Any

    def __init__(self, *found: tuple[dict[str, int], int]) -> None:
        self.found = list(found)
        self.saves = 0
        self.control = self

    async def call(self, command: str) -> dict[str, Any]:
        assert command == "status"
        packets = {"queued": 16, "sent": 16}
        return {"packets": packets, "incoming_held": 1, "providers": {"burst": {"tally": {"completed": 16}}}}

    async def save(self, directory: Path, *, keep: bool, **_: Any) -> Any:
        assert keep  # else there is no second save
        directory.mkdir()  # noqa: ASYNC240 - a test
        packets, held = self.found[min(self.saves, len(self.found) - 1)]
        self.saves += 1
        return SimpleNamespace(packets=packets, incoming_held=held)


def _saved(vm: Any, directory: Path) -> Any:
    return asyncio.run(save_in_flight(vm, 1, STORY, directory))


def test_fault_n1_a_save_that_finds_too_little_in_flight_is_made_again(tmp_path: Path) -> None:
    vm = _Vm(NOTHING_HELD, RING_EMPTY, ENOUGH)
    report = _saved(vm, tmp_path / "snapshot")
    assert (vm.saves, report.incoming_held) == (3, 1)
    assert not missing(STORY, report.packets, report.incoming_held)
    assert (tmp_path / "snapshot").is_dir()


def test_fault_n1_what_no_save_ever_finds_is_the_verdicts(tmp_path: Path) -> None:
    vm = _Vm(NOTHING_HELD)
    report = _saved(vm, tmp_path / "snapshot")
    assert vm.saves == stories._SAVES and (tmp_path / "snapshot").is_dir()
    assert missing(STORY, report.packets, report.incoming_held) == ["no provider held an incoming packet at the save"]


def test_fault_n1_the_storys_traffic_does_not_end_before_the_save() -> None:
    counts = [one["count"] for one in STORY.endless().workloads()["workloads"]]
    assert counts == [0, 0] and all(STORY.expected().values())
