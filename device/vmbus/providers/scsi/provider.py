"""The SCSI provider: options, commands, what is saved, and the life of the disks. See docs/provider-scsi.md."""

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec

from vmbus.errors import StateError, UsageError
from vmbus.kmcl.channel import Channel
from vmbus.providers.base import Bound, Host, Provider
from vmbus.providers.disk.backend import Backend
from vmbus.providers.disk.disk import MOST_JOBS
from vmbus.providers.disk.image import MEBIBYTE, Image
from vmbus.providers.scsi.adapter import Adapter
from vmbus.providers.scsi.handshake import Phase
from vmbus.providers.scsi.unit import MOST_UNITS, Unit, UnitOptions, UnitState
from vmbus.util.complaints import bounded_log
from vmbus.util.explaining import explain
from vmbus.util.records import decode
from vmbus.wire.storvsp import VERSIONS, Operation

log = bounded_log(__name__)

MOST_SUB_CHANNELS = 64
"""Sub-channels of one controller."""
DEPARTURE_SECONDS = 5.0
"""How long a guest has, once all logical units are gone, to let go of them before the controller is withdrawn."""
_CALM_SECONDS = 0.5  # without a request from it: it has
_LOOK_EVERY = 0.05


class ScsiOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See docs/provider-scsi.md."""

    luns: Annotated[list[UnitOptions], msgspec.Meta(max_length=MOST_UNITS)] = []
    sub_channels: Annotated[int, msgspec.Meta(ge=0, le=MOST_SUB_CHANNELS)] = 4
    queue_depth: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 512
    poll_us: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0

    def __post_init__(self) -> None:
        _check_units(self.luns, ValueError)


def _check_units(luns: list[UnitOptions], error: type[Exception]) -> None:
    numbers = [one.lun for one in luns]
    images = [one.image for one in luns]
    if len(set(numbers)) != len(numbers):
        raise error(f"two logical units have the same lun: {sorted(numbers)}")
    if len(set(images)) != len(images):
        raise error(f"two logical units have the same image: {sorted(images)}")


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is saved. `asked`: for how many sub-channels; `offered`: which there are."""

    version: Literal[1]
    phase: Phase
    protocol: Literal[0, 0x0501, 0x0600, 0x0602]
    asked: Annotated[int, msgspec.Meta(ge=0, le=MOST_SUB_CHANNELS)]
    offered: Annotated[
        list[Annotated[int, msgspec.Meta(ge=1, le=MOST_SUB_CHANNELS)]], msgspec.Meta(max_length=MOST_SUB_CHANNELS)
    ]
    units: Annotated[list[UnitState], msgspec.Meta(max_length=MOST_UNITS)]


_decoder = msgspec.msgpack.Decoder(_State)


def images_in(state: bytes) -> list[str]:
    """The images that a saved state asks for. Raises StateError."""
    return [unit.options.image for unit in decode(_decoder, state, "the saved state of a controller").units]


class _Resize(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    lun: Annotated[int, msgspec.Meta(ge=0, lt=MOST_UNITS)]
    size_mib: Annotated[int, msgspec.Meta(ge=1, le=1 << 26)] | None = None


class _Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class _Number(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    lun: Annotated[int, msgspec.Meta(ge=0, lt=MOST_UNITS)]


Answer = dict[str, Any] | Future[dict[str, Any]]


class ScsiProvider(Provider):
    """See the package's text. Commands: `luns`, `add-lun`, `remove-lun`, `resize`."""

    kind = "scsi"
    Options = ScsiOptions

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        chosen: ScsiOptions = self.options
        self.adapter = Adapter(
            host,
            name,
            instance,
            self,
            sub_channels=chosen.sub_channels,
            queue_depth=chosen.queue_depth,
            poll_seconds=chosen.poll_us / 1e6,
        )
        self.units: dict[int, Unit] = {}
        self._set_units([self._make(one) for one in chosen.luns])
        self._leaving: list[Unit] = []
        self._away: dict[int, Unit] = {}  # hidden from the guest, since the controller goes
        self._files: dict[str, Path] = {}
        self._resting = False

    def _make(self, options: UnitOptions) -> Unit:
        return Unit(self.host, self.name, self.instance, options, self.adapter.answer, self.make_backend)

    def make_backend(self, image: Image) -> Backend:
        """What carries out the requests. Tests put faults in here."""
        return image.backend

    def _set_units(self, units: list[Unit]) -> None:
        self.units = {unit.lun: unit for unit in units}
        # None takes all threads: the others go on, however slow one is.
        share = max(1, MOST_JOBS // max(1, len(units)))
        for unit in units:
            unit.disk.most_jobs = share

    @property
    def _all(self) -> list[Unit]:
        return [*self.units.values(), *self._away.values(), *self._leaving]

    # ---- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.adapter.start()

    def activate(self) -> None:
        taken: list[Unit] = []
        for unit in self._all:
            if unit.disk.active:
                continue
            try:
                unit.disk.activate()
            except BaseException:
                for other in taken:
                    other.disk.deactivate()
                raise
            taken.append(unit)
        self._files = {}
        if self.adapter.untidy:
            self.host.call_soon(self.adapter.arrange)

    def deactivate(self) -> None:
        failures: list[Exception] = []
        for unit in self._all:
            try:
                unit.disk.deactivate()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def stop(self) -> None:
        for unit in self._all:
            unit.disk.close()

    # ---- for the adapter -----------------------------------------------------------------------------------------

    def forget(self, channel: Channel) -> None:
        """A channel is closed: nobody waits for what came over it."""
        for unit in self._all:
            unit.disk.forget(lambda asked: asked.completion.channel is channel)

    def go(self) -> None:
        self._resting = False
        for unit in self.units.values():
            unit.disk.go()

    def rest(self) -> None:
        self._resting = True
        for unit in self._all:
            unit.disk.rest()

    # ---- commands ------------------------------------------------------------------------------------------------

    def command(self, name: str, arguments: Mapping[str, Any]) -> Answer:
        if name == "luns":
            self._arguments(name, arguments, _Nothing)
            return {"luns": [self.units[lun].status() for lun in sorted(self.units)]}
        if name == "add-lun":
            return self._add(self._arguments(name, arguments, UnitOptions))
        if name == "remove-lun":
            return self._remove(self._unit(self._arguments(name, arguments, _Number).lun))
        if name == "resize":
            wanted = self._arguments(name, arguments, _Resize)
            return self._resize(self._unit(wanted.lun), wanted.size_mib)
        raise UsageError(
            f"provider {self.name!r} (scsi) has no command {name!r}; there are luns, add-lun, remove-lun and resize"
        )

    def _arguments(self, name: str, arguments: Mapping[str, Any], kind: type[Any]) -> Any:
        try:
            return msgspec.convert(dict(arguments), kind)
        except msgspec.ValidationError as error:
            raise UsageError(f"provider {self.name!r} (scsi), {name}: {explain(error)}") from error

    def _unit(self, lun: int) -> Unit:
        unit = self.units.get(lun)
        if unit is None:
            raise UsageError(f"provider {self.name!r} (scsi) has no lun {lun}; there are {sorted(self.units)}")
        return unit

    def _add(self, options: UnitOptions) -> dict[str, Any]:
        """Plug a logical unit in, and tell the guest."""
        if any(unit.lun == options.lun for unit in self._all):
            raise UsageError(f"provider {self.name!r} (scsi) has lun {options.lun} already")
        _check_units([*(unit.options for unit in self._all), options], UsageError)
        unit = self._make(options)
        unit.disk.activate()
        if self._resting:
            unit.disk.rest()
        self._set_units([*self.units.values(), unit])
        self.adapter.notify()
        return unit.status()

    def _remove(self, unit: Unit) -> "Future[dict[str, Any]]":
        """Take a logical unit away. For the guest it is gone at once; what it has asked for before is still done. The
        answer comes when the image is closed."""
        gone: Future[dict[str, Any]] = Future()
        self._set_units([one for one in self.units.values() if one is not unit])
        unit.leaving = True
        unit.disk.most_jobs = max(1, MOST_JOBS // (len(self.units) + 1))
        self._leaving.append(unit)

        def idle() -> None:
            failed = unit.disk.core is not None and unit.disk.core.flush_failed
            unit.disk.close()
            self._leaving.remove(unit)
            if not gone.set_running_or_notify_cancel():
                return
            if failed:
                gone.set_exception(
                    UsageError(f"lun {unit.lun} is gone, but not all of its data came to stable storage: see the log")
                )
            else:
                gone.set_result({"lun": unit.lun, "image": unit.options.image})

        unit.disk.on_idle = idle
        self.adapter.notify()
        unit.disk.rest()
        return gone

    def _resize(self, unit: Unit, size_mib: int | None) -> "Future[dict[str, Any]]":
        """Make a disk larger, or take notice that its image has become so, and tell the guest."""
        work = unit.disk.grow(None if size_mib is None else size_mib * MEBIBYTE)
        answer: Future[dict[str, Any]] = Future()

        def done(size: int | None, error: BaseException | None) -> None:
            unit.disk.lost(error)
            if not answer.set_running_or_notify_cancel():
                return
            try:
                if error is not None:
                    raise UsageError(f"the image of lun {unit.lun} cannot become larger: {error}") from error
                assert size is not None
                if unit.disk.resized(size):
                    unit.grown = True
                    self.adapter.notify()
            except UsageError as refusal:
                answer.set_exception(refusal)
            else:
                answer.set_result({"lun": unit.lun, "size": size})

        self.host.run_blocking(work, done)
        return answer

    # ---- before it is withdrawn ------------------------------------------------------------------------------------

    def depart(self) -> "Future[None] | None":
        """Linux takes no answers any more once a channel is rescinded, and waits for them for ever. So first all
        logical units vanish, the guest lets go of them, and everything is answered."""
        if self.adapter.handshake.phase is not Phase.READY or not self.adapter.open:
            return None
        self._away, self.units = self.units, {}
        self.adapter.notify()
        calm: Future[None] = Future()
        looks = quiet = 0
        seen = self.adapter.counters["requests"]

        def look() -> None:
            nonlocal looks, quiet, seen
            if calm.done():
                return
            looks += 1
            asked = self.adapter.counters["requests"]
            quiet = quiet + 1 if asked == seen and not self.adapter.outstanding and self.adapter.answers_read else 0
            seen = asked
            enough = quiet * _LOOK_EVERY >= _CALM_SECONDS or looks * _LOOK_EVERY >= DEPARTURE_SECONDS
            if enough or not self.adapter.open:
                calm.set_result(None)
            else:
                self.host.call_later(_LOOK_EVERY, look)

        look()
        return calm

    def stay(self) -> None:
        """It is not withdrawn after all."""
        if self._away:
            self._set_units([*self._away.values(), *self.units.values()])
            self._away = {}
            self.adapter.notify()

    # ---- save and restore ------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        handshake = self.adapter.handshake
        if self._leaving or self._away:
            raise UsageError(
                f"controller {self.name!r}: lun {[unit.lun for unit in (*self._leaving, *self._away.values())]} is "
                "about to go; try again when it has"
            )
        state = _State(
            1,
            handshake.phase,
            _VERSIONS[handshake.version],
            handshake.sub_channels,
            self.adapter.sub_channels,
            [self.units[lun].save() for lun in sorted(self.units)],
        )
        return msgspec.msgpack.encode(state)

    def _decoded(self, state: bytes) -> _State:
        saved = self.decoded(_decoder, state)
        _check_units([unit.options for unit in saved.units], StateError)
        for unit in saved.units:
            if unit.disk.block_size != unit.options.block_size or unit.disk.size % unit.disk.block_size:
                raise StateError(
                    f"lun {unit.options.lun} of the saved controller {self.name!r} has {unit.disk.size} bytes in "
                    f"blocks of {unit.disk.block_size}, and its block_size is {unit.options.block_size}"
                )
        if len(set(saved.offered)) != len(saved.offered):
            raise StateError(f"the saved controller {self.name!r} has sub-channels {saved.offered}")
        if (saved.phase in (Phase.START, Phase.BEGUN)) == bool(saved.protocol):
            raise StateError(
                f"the saved controller {self.name!r} is in phase {saved.phase.value}, with protocol version "
                f"{saved.protocol:#x}"
            )
        if saved.asked and saved.phase not in (Phase.DESCRIBED, Phase.READY):
            raise StateError(f"the saved controller {self.name!r} has sub-channels in phase {saved.phase.value}")
        names = {f"lun-{unit.options.lun}" for unit in saved.units}
        if unknown := sorted(set(self._files) - names):
            raise StateError(f"the snapshot of controller {self.name!r} has {unknown}, and no such logical unit")
        return saved

    def check(self, state: bytes) -> None:
        self._decoded(state)

    def restore(self, state: bytes) -> None:
        saved = self._decoded(state)
        for unit in self._all:
            unit.disk.close()
        units = []
        for one in saved.units:
            unit = self._make(one.options)
            unit.restore(one)
            unit.disk.restore_file(self._files.get(unit.file_name))
            units.append(unit)
        self._set_units(units)
        handshake = self.adapter.handshake
        handshake.phase, handshake.version, handshake.sub_channels = saved.phase, saved.protocol, saved.asked
        self.adapter.restore_sub_channels(saved.offered)

    def files(self) -> dict[str, Path]:
        found = {unit.file_name: unit.disk.file for unit in self.units.values()}
        return {name: file for name, file in found.items() if file is not None}

    def shared_files(self) -> list[str]:
        return [unit.file_name for unit in self.units.values() if unit.disk.shared]

    def restore_files(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)

    # ---- inspection ----------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        handshake = self.adapter.handshake
        return {
            "phase": handshake.phase.value,
            "protocol": f"{handshake.version >> 8}.{handshake.version & 0xFF}" if handshake.version else None,
            "sub_channels": len(self.adapter.sub_channels),
            **self.adapter.counters,
            "luns": [unit.status() for unit in self._all],
        }

    def bounds(self) -> dict[str, Bound]:
        depth = self.options.queue_depth
        now = max((unit.disk.core.under_way for unit in self._all if unit.disk.core is not None), default=0)
        return {"requests to a disk": Bound(now, depth * (len(self.adapter.sub_channels) + 1), self.adapter.full)}

    @classmethod
    def describe_packet(cls, saved: bytes) -> dict[str, Any]:
        return {"operation": Operation(int.from_bytes(saved[:4], "little")).name}


_VERSIONS: dict[int, Any] = {version: version for version in (0, *VERSIONS)}
