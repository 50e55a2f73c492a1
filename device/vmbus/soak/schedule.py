"""From settings to what happens in one episode: a pure function of the settings, the campaign's seed and a number."""

from __future__ import annotations

from vmbus.errors import UsageError
from vmbus.soak.draw import Draw, seed_of
from vmbus.soak.entries import check_workload, function_of
from vmbus.soak.machines import description_of, machine, stock_machine
from vmbus.soak.plan import EpisodePlan
from vmbus.soak.sequence import draw_operations, kinds_for
from vmbus.soak.settings import DISK_LOSES_A_BLOCK, WEIGHTS, Settings
from vmbus.soak.workloads import RECIPES


def episodes_planned(settings: Settings) -> int | None:
    """How many episodes the campaign has; None when it runs for a time."""
    return None if settings.total is None else -(-settings.total // settings.length)


def plan_episode(settings: Settings, seed: int, index: int) -> EpisodePlan:
    """What happens in episode `index`. Raises UsageError for a script or a description that cannot be carried out."""
    own = seed_of(seed, index)
    draw = Draw(own)
    count = settings.length
    if settings.total is not None:
        count = min(count, settings.total - index * settings.length)
        if count <= 0:
            raise UsageError(f"episode {index} is none of this campaign: it has {episodes_planned(settings)}, from 0")
    linux = _linux(settings, own)
    vm, workloads = stock_machine(settings, draw) if linux else machine(settings, draw)
    if not workloads:
        which = "with Linux's own drivers" if linux else "without Linux's own drivers"
        raise UsageError(f"no workload is left for episode {index}, {which}: give one the share 1")
    operations = draw_operations(settings, draw, count, linux)
    kinds = dict.fromkeys(one.kind for one in operations)
    sends = linux or any(one.driver in RECIPES and RECIPES[one.driver].sends for one in workloads)
    return EpisodePlan(
        episode=index,
        seed=own,
        vm=vm,
        workloads=workloads,
        operations=operations,
        audit=settings.audit,
        packets=settings.packets if sends else 0,
        operation_seconds=settings.operation_seconds,
        finish_seconds=settings.finish_seconds,
        sabotage=settings.sabotage,
        own=[entry for kind in kinds if kind not in WEIGHTS and (entry := settings.own_operation(kind)) is not None],
        path=settings.path,
    )


def linux_share(settings: Settings) -> float:
    """Of the episodes whose guest has Linux's own drivers, as far as the settings decide it. Raises UsageError."""
    if settings.sabotage:
        return float(settings.sabotage == DISK_LOSES_A_BLOCK)
    if settings.description:
        return float(description_of(settings.description).guest.linux)
    return settings.linux if _fits(settings) else 0.0


def _linux(settings: Settings, own: int) -> bool:
    """Whether the episode with this seed has Linux's own drivers. Drawn by itself, so that it leaves everything else as
    it was."""
    if not Draw(seed_of(own, 0)).chance(linux_share(settings)):
        return False
    if _fits(settings):
        return True
    raise UsageError("none of these operations, or not all of the script's, are there with Linux's own drivers")


def _fits(settings: Settings) -> bool:
    """Whether there is something to be done with Linux's own drivers."""
    kinds = kinds_for(settings, True)
    if settings.script:
        return all(step.kind in kinds for step in settings.script)
    return any(settings.weight(kind) > 0 for kind in kinds if kind not in ("revert", "rescind"))


def check_own(settings: Settings) -> None:
    """Import what the settings name of the user's, and check what can be checked without a guest. Raises UsageError,
    EnvironmentProblem."""
    for entry in settings.own_workloads():
        check_workload(entry, settings.path)
    for kind in settings.kinds:
        own = None if kind in WEIGHTS else settings.own_operation(kind)
        if own is not None and own.call:
            function_of(own.call, settings.path)
