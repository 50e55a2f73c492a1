"""The operations of an episode, drawn or of a script, in an order in which they can be carried out.

Some need others before them: a revert needs a checkpoint, a rescind a provider that was added, and after a revert or a
restore of an older snapshot the device is that of then. `World` keeps count of that.
"""

from __future__ import annotations

from collections.abc import Callable

from vmbus.errors import UsageError
from vmbus.soak.draw import Draw, drawn
from vmbus.soak.plan import OperationPlan, Parameters, Scalar
from vmbus.soak.settings import WEIGHTS, Settings, Step
from vmbus.vm.moments import Moment

MOST_CHECKPOINTS = 2
"""Checkpoints that a VM has at any time. Each has a copy of the guest's memory."""
MOST_ADDED = 4
"""Providers that are there at once besides those of the description."""

STOCK_OPERATIONS = tuple(kind for kind in WEIGHTS if kind != "driver_kill")
"""What can be done in an episode with Linux's own drivers, which are no process."""
STOCK_PACE = 8
"""By which a `pace` is divided there: a transaction is a write to a disk, a frame of a connection, or the like."""


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

    def possible(self, kind: str) -> bool:
        """Whether an operation can be carried out now."""
        if kind == "revert":
            return bool(self.checkpoints)
        if kind == "rescind":
            return bool(self.added)
        return kind != "hot_add" or len(self.added) < MOST_ADDED

    def carry_out(self, kind: str, parameters: Parameters) -> None:
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


def _far(draw: Draw, world: World) -> Parameters:
    """`rate` in MB a second, `latency` in seconds, `loss` as a share of packets; `cut`: at which moment, if at all."""
    return {
        "rate": draw.number(20, 100),
        "latency": draw.number(0, 0.004),
        "loss": draw.one_of((0.0, 0.0, 0.0005)),
        "cut": draw.one_of(("", "", "", *(moment.name for moment in BLOWS["link"]))),
    }


def _kill(draw: Draw, world: World) -> Parameters:
    last = draw.chance(0.5) and world.snapshot is not None
    return {"victim": draw.one_of(("server", "qemu")), "snapshot": "last" if last else "new"}


_DRAWN: dict[str, Callable[[Draw, World], Parameters]] = {
    "save_restore": lambda draw, world: {},
    "save_restore_live": lambda draw, world: {},
    "migrate": lambda draw, world: _transport(draw),
    "cancelled_migration": lambda draw, world: {"moment": draw.one_of(_SOURCE_MOMENTS).name, **_transport(draw)},
    "sabotaged_migration": _sabotaged,
    "far_migration": _far,
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
    "cut": ("", *(moment.name for moment in BLOWS["link"])),
}
_RANGES = {"seconds": (0, 60), "multifd": (0, 16), "rate": (0.5, 10_000), "latency": (0, 1), "loss": (0, 0.5)}


def kinds_for(settings: Settings, linux: bool) -> list[str]:
    """The operations that there are for a guest."""
    return [kind for kind in settings.kinds if not linux or kind in STOCK_OPERATIONS or kind not in WEIGHTS]


def draw_operations(settings: Settings, draw: Draw, count: int, linux: bool) -> list[OperationPlan]:
    """What is done in an episode. Raises UsageError for a script that cannot be carried out."""
    world = World()
    kinds = kinds_for(settings, linux)
    pace = max(1, settings.pace // STOCK_PACE) if linux else settings.pace
    plans = []
    for number in range(count):
        after = draw.between(max(1, pace // 4), pace)
        if settings.script:
            step = settings.script[number]
            parameters = _scripted(step, number, _drawn(settings, step.kind, draw, world))
        else:
            weights = {kind: settings.weight(kind) for kind in kinds if world.possible(kind)}
            kind = draw.weighted(weights)
            step = Step(kind=kind)
            parameters = _drawn(settings, kind, draw, world)
        try:
            world.carry_out(step.kind, parameters)
        except UsageError as error:
            raise UsageError(f"script, operation {number} ({step.kind}): {error}") from error
        plans.append(OperationPlan(kind=step.kind, parameters=parameters, after=after))
    return plans


def _drawn(settings: Settings, kind: str, draw: Draw, world: World) -> Parameters:
    if kind in _DRAWN:
        return _DRAWN[kind](draw, world)
    entry = settings.own_operation(kind)
    assert entry is not None, kind
    return drawn(entry.parameters, draw)


def _scripted(step: Step, number: int, there: Parameters) -> Parameters:
    """The parameters of a script's operation: its own, and drawn ones for the rest. Raises UsageError."""
    where, ours = f"script, operation {number} ({step.kind})", step.kind in WEIGHTS
    for name, value in step.parameters.items():
        if name not in there:
            raise UsageError(f"{where}: there is no parameter {name!r}; known: {', '.join(sorted(there)) or 'none'}")
        if type(value) is not type(there[name]) and not (isinstance(there[name], float) and type(value) is int):
            raise UsageError(f"{where}: parameter {name!r} is of type {type(there[name]).__name__}, not {value!r}")
        if ours and name in _ALLOWED and value not in _ALLOWED[name]:
            raise UsageError(
                f"{where}: parameter {name!r} is {value!r}; allowed: {', '.join(map(str, _ALLOWED[name]))}"
            )
    parameters = {**there, **step.parameters}
    if ours:
        _check(step.kind, parameters, where)
    return parameters


def _check(kind: str, parameters: Parameters, where: str) -> None:
    if "moment" in parameters:
        allowed = _SOURCE_MOMENTS if kind == "cancelled_migration" else BLOWS[str(parameters["blow"])]
        if parameters["moment"] not in [moment.name for moment in allowed]:
            names = ", ".join(moment.name for moment in allowed)
            raise UsageError(f"{where}: parameter 'moment' is {parameters['moment']!r}; allowed: {names}")
    for name, (low, high) in _RANGES.items():
        value = parameters.get(name, low)
        if not (isinstance(value, int | float) and low <= value <= high):
            raise UsageError(f"{where}: parameter {name!r} is {value}; it must be from {low} to {high}")
