"""From settings to what happens in one episode: a pure function of the settings, the campaign's seed and a number.

A plan says everything, so that whoever carries it out needs nothing else: the machine, the workloads and their
parameters, and each operation with its own. It is written into the episode's folder as `plan.json`.

Some operations need others before them: a revert needs a checkpoint, a rescind a provider that was added, and after a
revert or a restore of an older snapshot the device is that of then. `World` keeps count of that while operations are
drawn, or read from a script, so that every plan can be carried out.
"""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.places import DESCRIPTIONS as CONFIGURATIONS
from vmbus.soak.draw import Draw, seed_of
from vmbus.soak.records import FORMAT
from vmbus.soak.settings import (
    DISK_LOSES_A_BLOCK,
    LOSE_ONE_IN_A_THOUSAND,
    WEIGHTS,
    Kind,
    Scalar,
    Settings,
    Step,
)
from vmbus.soak.workloads import LAB, LAB_OPTIONS, RECIPES, STOCK_RECIPES
from vmbus.util.explaining import explain
from vmbus.vm.description import GuestDescription, VmDescription, find_description, load_description
from vmbus.vm.moments import Moment

LOSSY_PROVIDER = "vmbus.soak.lossy:LossyBurst"
"""The burst provider of a sabotaged campaign."""

MOST_CHECKPOINTS = 2
"""Checkpoints that a VM has at any time. Each has a copy of the guest's memory."""
MOST_ADDED = 4
"""Providers that are there at once besides those of the description."""

MOST_OPTIONAL = 3
"""Workloads of a share below 1 that run at once: with more, each of them comes to very little."""

Parameters = dict[str, Scalar]

STOCK_OPERATIONS = tuple(kind for kind in WEIGHTS if kind != "driver_kill")
"""What can be done in an episode with Linux's own drivers, which are no process."""
STOCK_CPUS = (1, 2, 4)
"""How many CPUs its guest has. A disk and a card have as many channels, up to their own bounds."""
STOCK_PACE = 8
"""By which a `pace` is divided there: a transaction is a write to a disk, a frame of a connection, or the like."""
_NEEDS_ANOTHER = ("revert", "rescind")


class WorkloadPlan(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One test driver in the guest."""

    driver: str
    provider: str
    """Its provider's name in the device's description."""
    parameters: dict[str, Any]


class OperationPlan(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One operation. It begins when `after` further transactions are completed, and enough packets are in flight."""

    kind: Kind
    parameters: Parameters = {}
    after: int = 0


class EpisodePlan(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One episode, whole. Fields that settings have too are explained there."""

    format: int = FORMAT
    episode: int
    seed: int
    vm: VmDescription
    workloads: list[WorkloadPlan]
    operations: list[OperationPlan]
    audit: bool
    packets: int
    operation_seconds: float
    finish_seconds: float
    sabotage: str = ""


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
    vm, workloads = _stock_machine(settings, draw) if linux else _machine(settings, draw)
    return EpisodePlan(
        episode=index,
        seed=own,
        vm=vm,
        workloads=workloads,
        operations=_operations(settings, draw, count, linux),
        audit=settings.audit,
        packets=settings.packets,
        operation_seconds=settings.operation_seconds,
        finish_seconds=settings.finish_seconds,
        sabotage=settings.sabotage,
    )


def encode_plan(plan: EpisodePlan) -> bytes:
    """A plan as JSON for people and programs."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n"


def load_plan(path: Path) -> EpisodePlan:
    """Reads a plan. Raises EnvironmentProblem if it cannot be read, UsageError (file, field, reason) if it is wrong."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EnvironmentProblem(f"cannot read plan {path}: {error.strerror}") from error
    try:
        found = json.loads(data)
        version = found.get("format") if isinstance(found, dict) else None
        if version != FORMAT:
            raise UsageError(f"{path}: a plan of format {version!r}; this version has format {FORMAT}")
        return msgspec.convert(found, EpisodePlan)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {explain(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON: {error}") from error


# ---- machine and workloads -------------------------------------------------------------------------------------------


def linux_share(settings: Settings) -> float:
    """Of the episodes whose guest has Linux's own drivers, as far as the settings decide it. Raises UsageError."""
    if settings.sabotage:
        return float(settings.sabotage == DISK_LOSES_A_BLOCK)
    if settings.description:
        return float(_description(settings.description).guest.linux)
    return settings.linux if _fits(settings, STOCK_OPERATIONS) else 0.0


def _linux(settings: Settings, own: int) -> bool:
    """Whether the episode with this seed has Linux's own drivers. Drawn by itself, so that it leaves everything else as
    it was."""
    if not Draw(seed_of(own, 0)).chance(linux_share(settings)):
        return False
    if _fits(settings, STOCK_OPERATIONS):
        return True
    raise UsageError("none of these operations, or not all of the script's, are there with Linux's own drivers")


def _fits(settings: Settings, kinds: tuple[Kind, ...]) -> bool:
    """Whether there is something to be done, with these operations alone."""
    if settings.script:
        return all(step.kind in kinds for step in settings.script)
    return any(settings.weight(kind) > 0 for kind in kinds if kind not in _NEEDS_ANOTHER)


@functools.cache
def _description(name: str) -> VmDescription:
    if name:
        return load_description(find_description(name, CONFIGURATIONS))
    # A device needs a provider; this one is a workload's, or idle.
    first = ProviderDescription("echo", "echo", str(_instance("echo")))
    return VmDescription("soak", DeviceDescription("vmbus0", [first]), guest=GuestDescription(huge_pages=24))


def _instance(name: str) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_URL, f"vmbus-soak:{name}")


def _machine(settings: Settings, draw: Draw) -> tuple[VmDescription, list[WorkloadPlan]]:
    vm = _description(settings.description)
    providers = list(vm.device.providers)
    free = {provider.name for provider in providers}
    workloads = []
    # All is drawn, also for those that do not run: so a share that is changed leaves the others as they were.
    drawn = {
        name: (
            draw.chance(settings.share(name)),
            draw.number(0, 1),
            recipe.options(draw),
            recipe.parameters(draw, settings.packets),
        )
        for name, recipe in RECIPES.items()
    }
    optional = [name for name in RECIPES if drawn[name][0] and settings.share(name) < 1]
    left_out = sorted(optional, key=lambda name: drawn[name][1])[MOST_OPTIONAL:]
    for name, recipe in RECIPES.items():
        runs, _, options, parameters = drawn[name]
        if not runs or name in left_out:
            continue
        if recipe.provider == LAB:
            lab = next((one for one in providers if one.kind == LAB), None)
            if lab is None:
                taken = {provider.name for provider in providers}
                lab = ProviderDescription(LAB, _unused(LAB, taken), str(_instance(LAB)), LAB_OPTIONS)
                providers.append(lab)
            parameters = {"stall_seconds": settings.stall_seconds, **parameters}
            workloads.append(WorkloadPlan(driver=name, provider=lab.name, parameters=parameters))
            continue
        sabotaged = settings.sabotage == LOSE_ONE_IN_A_THOUSAND and recipe.provider == "burst"
        kind = LOSSY_PROVIDER if sabotaged else recipe.provider
        at = next((at for at, one in enumerate(providers) if one.kind == recipe.provider and one.name in free), None)
        if at is None:
            taken = {provider.name for provider in providers}
            provider = ProviderDescription(kind, _unused(name, taken), str(_instance(name)), options)
            providers.append(provider)
        else:
            provider = msgspec.structs.replace(providers[at], kind=kind, options={**providers[at].options, **options})
            providers[at] = provider
        free.discard(provider.name)
        parameters = {"instance": provider.instance, "stall_seconds": settings.stall_seconds, **parameters}
        workloads.append(WorkloadPlan(driver=name, provider=provider.name, parameters=parameters))
    device = msgspec.structs.replace(vm.device, providers=providers)
    return msgspec.structs.replace(vm, device=device), workloads


def _stock_machine(settings: Settings, draw: Draw) -> tuple[VmDescription, list[WorkloadPlan]]:
    """With Linux's own drivers: each workload has a provider, one of the description's own if it has such a one."""
    cpus = draw.one_of(STOCK_CPUS)
    vm = _description(settings.description)
    providers = list(vm.device.providers)
    if not settings.description:
        providers = []
        guest = GuestDescription(driver="linux")
        vm = msgspec.structs.replace(vm, guest=guest, memory_mib=512, cpus=cpus)
    workloads = []
    for name, recipe in STOCK_RECIPES.items():
        runs = draw.chance(settings.share(name))
        options, parameters = recipe.options(draw), recipe.parameters(draw, settings.packets)
        if not runs:
            continue
        at = next((at for at, one in enumerate(providers) if one.kind == recipe.provider), None)
        if at is None:
            taken = {provider.name for provider in providers}
            provider = ProviderDescription(recipe.provider, _unused(name, taken), str(_instance(name)), options)
            providers.append(provider)
        else:
            provider = msgspec.structs.replace(providers[at], options={**providers[at].options, **options})
            providers[at] = provider
        workloads.append(WorkloadPlan(driver=name, provider=provider.name, parameters=parameters))
    if not workloads:
        raise UsageError("no workload is left for an episode with Linux's own drivers: give one of them the share 1")
    device = msgspec.structs.replace(vm.device, providers=providers)
    return msgspec.structs.replace(vm, device=device), workloads


def _unused(name: str, taken: set[str]) -> str:
    return next(one for one in (name, *(f"{name}-{number}" for number in range(2, 300))) if one not in taken)


# ---- operations ------------------------------------------------------------------------------------------------------


class World:
    """What operations find: `added` providers by name, `checkpoints` by tag with the providers of then, and those of
    the last snapshot (None: there is none)."""

    def __init__(self) -> None:
        self.added: list[str] = []
        self.checkpoints: dict[str, list[str]] = {}
        self.snapshot: list[str] | None = None
        self._names = 0

    def name(self, what: str) -> str:
        """A name that was not there before."""
        self._names += 1
        return f"{what}-{self._names}"

    def possible(self, kind: Kind) -> bool:
        """Whether an operation can be carried out now."""
        if kind == "revert":
            return bool(self.checkpoints)
        if kind == "rescind":
            return bool(self.added)
        return kind != "hot_add" or len(self.added) < MOST_ADDED

    def carry_out(self, kind: Kind, parameters: Parameters) -> None:
        """What is there afterwards. Raises UsageError for what cannot be carried out."""
        if kind == "checkpoint":
            tag = str(parameters["tag"])
            if tag in self.checkpoints:
                raise UsageError(f"there is a checkpoint {tag!r} already")
            if len(self.checkpoints) == MOST_CHECKPOINTS:
                del self.checkpoints[next(iter(self.checkpoints))]
            self.checkpoints[tag] = list(self.added)
        elif kind == "revert":
            tag = str(parameters["tag"])
            if tag not in self.checkpoints:
                raise UsageError(f"there is no checkpoint {tag!r}; there: {', '.join(self.checkpoints) or 'none'}")
            self.added = list(self.checkpoints[tag])
        elif kind == "hot_add":
            name = str(parameters["name"])
            if name in self.added:
                raise UsageError(f"a provider {name!r} was added already")
            if len(self.added) == MOST_ADDED:
                raise UsageError(f"{MOST_ADDED} providers were added already: rescind one")
            self.added.append(name)
        elif kind == "rescind":
            name = str(parameters["name"])
            if name not in self.added:
                raise UsageError(f"no provider {name!r} was added; there: {', '.join(self.added) or 'none'}")
            self.added.remove(name)
        elif kind == "kill" and parameters["snapshot"] == "last":
            if self.snapshot is None:
                raise UsageError("there is no snapshot yet that the VM could be restored from")
            self.added = list(self.snapshot)
        elif kind in ("save_restore", "save_restore_live", "clone", "kill"):
            self.snapshot = list(self.added)


_SOURCE_MOMENTS = (
    Moment.BEFORE_STREAM,
    Moment.RAM_COPY,
    Moment.PRE_SWITCHOVER,
    Moment.SAVING,
    Moment.WRITING,
    Moment.STOPPED,
)
_DESTINATION_MOMENTS = (Moment.LOADING, Moment.PCI_REPLAY, Moment.PACKET_RESTORE, Moment.BEFORE_CONT)
BLOWS: dict[str, tuple[Moment, ...]] = {
    "destination_server": _DESTINATION_MOMENTS,
    "destination_qemu": _DESTINATION_MOMENTS,
    "link": (Moment.RAM_COPY, Moment.WRITING, Moment.STOPPED),
}
"""What may hit a migration, and when. The VM runs on at the source in each case."""


def _transport(draw: Draw) -> Parameters:
    return {"transport": draw.one_of(("unix", "tcp")), "multifd": draw.one_of((0, 0, 2))}


def _sabotaged(draw: Draw, world: World) -> Parameters:
    blow = draw.one_of(tuple(BLOWS))
    return {"blow": blow, "moment": draw.one_of(BLOWS[blow]).name}


def _kill(draw: Draw, world: World) -> Parameters:
    last = draw.chance(0.5) and world.snapshot is not None
    return {"victim": draw.one_of(("server", "qemu")), "snapshot": "last" if last else "new"}


_DRAWN: dict[Kind, Callable[[Draw, World], Parameters]] = {
    "save_restore": lambda draw, world: {},
    "save_restore_live": lambda draw, world: {},
    "migrate": lambda draw, world: _transport(draw),
    "cancelled_migration": lambda draw, world: {"moment": draw.one_of(_SOURCE_MOMENTS).name, **_transport(draw)},
    "sabotaged_migration": _sabotaged,
    "full_disk": lambda draw, world: {"live": draw.chance(0.5)},
    "checkpoint": lambda draw, world: {"tag": world.name("t")},
    "revert": lambda draw, world: {"tag": draw.one_of(list(world.checkpoints) or [""])},
    "clone": lambda draw, world: {"live": draw.chance(0.5)},
    "pause": lambda draw, world: {"seconds": draw.number(0.1, 1.0)},
    "hot_add": lambda draw, world: {"name": world.name("added")},
    "rescind": lambda draw, world: {"name": draw.one_of(world.added or [""])},
    "kill": _kill,
    "driver_kill": lambda draw, world: {},
}

_ALLOWED: dict[str, tuple[Scalar, ...]] = {
    "transport": ("unix", "tcp"),
    "victim": ("server", "qemu"),
    "snapshot": ("last", "new"),
    "blow": tuple(BLOWS),
    "live": (False, True),
}


def _operations(settings: Settings, draw: Draw, count: int, linux: bool) -> list[OperationPlan]:
    world = World()
    kinds = STOCK_OPERATIONS if linux else tuple(WEIGHTS)
    pace = max(1, settings.pace // STOCK_PACE) if linux else settings.pace
    plans = []
    for number in range(count):
        after = draw.between(max(1, pace // 4), pace)
        if settings.script:
            step = settings.script[number]
            parameters = _scripted(step, number, draw, world)
        else:
            weights = {kind: settings.weight(kind) for kind in WEIGHTS if kind in kinds and world.possible(kind)}
            kind = draw.weighted(weights)
            step = Step(kind=kind)
            parameters = _DRAWN[kind](draw, world)
        try:
            world.carry_out(step.kind, parameters)
        except UsageError as error:
            raise UsageError(f"script, operation {number} ({step.kind}): {error}") from error
        plans.append(OperationPlan(kind=step.kind, parameters=parameters, after=after))
    return plans


def _scripted(step: Step, number: int, draw: Draw, world: World) -> Parameters:
    """The parameters of a script's operation: its own, and drawn ones for the rest. Raises UsageError."""
    where = f"script, operation {number} ({step.kind})"
    drawn = _DRAWN[step.kind](draw, world)
    for name, value in step.parameters.items():
        if name not in drawn:
            raise UsageError(f"{where}: there is no parameter {name!r}; known: {', '.join(sorted(drawn)) or 'none'}")
        if type(value) is not type(drawn[name]) and not (isinstance(drawn[name], float) and type(value) is int):
            raise UsageError(f"{where}: parameter {name!r} is of type {type(drawn[name]).__name__}, not {value!r}")
        if name in _ALLOWED and value not in _ALLOWED[name]:
            raise UsageError(
                f"{where}: parameter {name!r} is {value!r}; allowed: {', '.join(map(str, _ALLOWED[name]))}"
            )
    parameters = {**drawn, **step.parameters}
    _check(step.kind, parameters, where)
    return parameters


def _check(kind: Kind, parameters: Parameters, where: str) -> None:
    if "moment" in parameters:
        allowed = _SOURCE_MOMENTS if kind == "cancelled_migration" else BLOWS[str(parameters["blow"])]
        if parameters["moment"] not in [moment.name for moment in allowed]:
            names = ", ".join(moment.name for moment in allowed)
            raise UsageError(f"{where}: parameter 'moment' is {parameters['moment']!r}; allowed: {names}")
    if "seconds" in parameters and not 0 <= float(parameters["seconds"]) <= 60:
        raise UsageError(f"{where}: parameter 'seconds' is {parameters['seconds']}; it must be from 0 to 60")
    if "multifd" in parameters and parameters["multifd"] not in range(17):
        raise UsageError(f"{where}: parameter 'multifd' is {parameters['multifd']}; it must be from 0 to 16")
