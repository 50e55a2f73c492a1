"""Campaigns whose episodes are scripted: see `scripted_worker.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vmbus.soak.campaign import CampaignRun, Limits
from vmbus.soak.engine import Engine, LocalEngine
from vmbus.soak.folder import Campaign, CampaignFolder
from vmbus.soak.job import Bounds, Job
from vmbus.soak.journal import R, read_records
from vmbus.soak.progress import Goal, PlainView
from vmbus.soak.records import Environment, EpisodeRecord, EventRecord

WORKER = Path(__file__).with_name("scripted_worker.py")
Steps = list[list[Any]]
QUICK = Limits(beat=0.05, room=0, wait_for_room=0.3, report_every=0.0)


class Script:
    """A row of episodes, each a list of steps; a scripted worker carries them out."""

    def __init__(
        self, *episodes: Steps, bounds: Bounds | None = None, endless: bool = False, command: tuple[str, ...] = ()
    ) -> None:
        self._episodes = episodes
        self._bounds = bounds or Bounds(silence=20.0, longest=60.0, grace=5.0)
        self._command = command or (sys.executable, str(WORKER))
        self.planned = None if endless else len(episodes)

    def job(self, episode: int) -> Job:
        steps = self._episodes[episode % len(self._episodes)]
        plan = json.dumps({"episode": episode, "seed": 100 + episode, "steps": steps}).encode()
        return Job(episode=episode, seed=100 + episode, plan=plan, command=self._command, bounds=self._bounds)


def campaign(**settings: Any) -> Campaign:
    return Campaign(
        seed=1, started="2026-01-01", settings=settings, environment=Environment(), only=settings.pop("only", None)
    )


class Sitting:
    """One sitting of a scripted campaign in a folder."""

    def __init__(
        self, path: Path, row: Script, *, engine: Engine | None = None, limits: Limits = QUICK, **more: Any
    ) -> None:
        only = more.pop("only", None)
        self.folder = CampaignFolder.open(path, more.pop("campaign", None) or campaign(only=only))
        self.shown: list[str] = []  # what the campaign showed
        self.reports = 0
        self.run = CampaignRun(
            self.folder,
            row,
            engine or LocalEngine(parallel=1),
            PlainView(self.shown.append, str(path), Goal()),
            limits=limits,
            replay=lambda episode: f"scripts/soak --episode {episode}",
            report=self._report,
            **more,
        )

    @property
    def text(self) -> str:
        return "\n".join(self.shown)

    def _report(self) -> None:
        self.reports += 1

    async def __call__(self) -> str:
        """To its end. Returns the verdict."""
        try:
            return await self.run.run()
        finally:
            self.folder.close()


def read(path: Path, kind: type[R]) -> list[R]:
    missing: list[str] = []
    records = read_records(path, kind, missing)
    assert missing == []
    return records


def episodes(path: Path) -> dict[int, EpisodeRecord]:
    return {record.episode: record for record in read(path, EpisodeRecord)}


def events(path: Path) -> str:
    return "\n".join(record.text for record in read(path, EventRecord))
