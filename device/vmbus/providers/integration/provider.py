"""The provider of the integration services: options, commands, state."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Annotated, Any, ClassVar, Literal, TypeVar
from uuid import UUID, uuid5

import msgspec

from vmbus.errors import StateError, UsageError
from vmbus.providers.base import Bound, Host, Provider
from vmbus.providers.integration.exchange import Exchange, ExchangeState
from vmbus.providers.integration.freezing import Freeze
from vmbus.providers.integration.kvp import MOST_TOLD, Key, Kvp, Value, Wish
from vmbus.providers.integration.parts import Heartbeat, Part, Shutdown, Time, settle
from vmbus.util.explaining import explain
from vmbus.util.records import Count
from vmbus.wire import ic

# 4.0 tells the value of the guest's reference counter with the time, which only the guest knows here.
TIME_VERSIONS = (ic.Version(3, 0), ic.Version(1, 0))

_Arguments = TypeVar("_Arguments")
_Part = TypeVar("_Part", bound=Part)

ServiceName = Literal["heartbeat", "shutdown", "time", "kvp", "vss"]


class IntegrationOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`heartbeat_seconds`, `time_seconds`: between two heartbeats, and two messages with the time (0: only those that
    are needed); `sync_seconds`: between two of these that set the guest's clock (0: only those that are needed);
    `answer_seconds`: how long a command waits for the guest; `values`: what the guest's programs are told in its pool
    `external`."""

    services: list[ServiceName] = msgspec.field(default_factory=lambda: ["heartbeat", "shutdown", "time", "kvp"])
    heartbeat_seconds: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 2.0
    time_seconds: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 5.0
    sync_seconds: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 30.0
    answer_seconds: Annotated[float, msgspec.Meta(gt=0, le=60)] = 8.0
    values: Annotated[dict[Key, Value], msgspec.Meta(max_length=32)] = {}

    def __post_init__(self) -> None:
        if not self.services or len(set(self.services)) != len(self.services):
            raise ValueError(f"services = {self.services}: at least one, and each at most once")
        for key, value in self.values.items():
            Wish(value).check(key)


class _PartState(msgspec.Struct, frozen=True, omit_defaults=True):
    exchange: ExchangeState
    numbers: dict[str, Count]
    wishes: Annotated[dict[Key, Wish], msgspec.Meta(max_length=MOST_TOLD)] | None = None
    """Of the key-value service; states that do not have it are older, and those of the description were told."""


class _State(msgspec.Struct, frozen=True):
    version: Literal[1]
    parts: dict[str, _PartState]


_decoder = msgspec.msgpack.Decoder(_State)


class _ShutdownArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mode: str = "power-off"
    force: bool = False
    text: str = ""


_Pool = Literal["external", "guest", "auto", "auto-external"]


class _GetArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: Key
    pool: _Pool = "guest"


class _SetArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: Key
    value: str | int
    pool: _Pool = "external"
    type: Literal["string", "u32", "u64"] = "string"


class _DeleteArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: Key
    pool: _Pool = "external"


class _ListArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pool: _Pool = "guest"


class _FreezeArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    seconds: Annotated[float, msgspec.Meta(gt=0, le=600)] = 10.0


class _NoArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


def _pool(name: str) -> int:
    return int(ic.Pool[name.upper().replace("-", "_")])


class IntegrationProvider(Provider):
    """See the package's text."""

    kind = "integration"
    Options = IntegrationOptions
    clock: ClassVar[Callable[[], float]] = time.time
    steady: ClassVar[Callable[[], float]] = time.monotonic  # stands still while this machine sleeps, as the guest does

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        settings: IntegrationOptions = self.options
        self.parts: dict[str, Part] = {}
        for service in ic.SERVICES:
            if service.name in settings.services:
                self.parts[service.name] = self._make(service)

    def _make(self, service: ic.Service) -> Part:
        settings: IntegrationOptions = self.options
        versions = TIME_VERSIONS if service is ic.TIME else service.versions
        # Each service has an offer of its own; the description gives one GUID for all.
        instance = uuid5(self.instance, service.name)
        name = f"{self.name}-{service.name}"
        exchange = Exchange(self.host, service, instance, name, versions, settings.answer_seconds)
        if service is ic.HEARTBEAT:
            return Heartbeat(exchange, self.host, settings.heartbeat_seconds)
        if service is ic.TIME:
            seconds, sync_seconds = settings.time_seconds, settings.sync_seconds
            return Time(exchange, self.host, seconds, sync_seconds, type(self).clock, type(self).steady)
        if service is ic.KVP:
            return Kvp(exchange, settings.values)
        if service is ic.VSS:
            return Freeze(exchange, self.host)
        return Shutdown(exchange)

    def start(self) -> None:
        for part in self.parts.values():
            part.exchange.start()

    def stop(self) -> None:
        for part in self.parts.values():
            part.suspend()
            part.exchange.stop()

    # ---- commands --------------------------------------------------------------------------------------------------

    def command(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any] | Future[dict[str, Any]]:
        match name:
            case "heartbeat":
                self._arguments(name, arguments, _NoArguments)
                return self._part(Heartbeat, "heartbeat").status()
            case "time-sync":
                self._arguments(name, arguments, _NoArguments)
                return self._tell_time()
            case "shutdown":
                end = self._arguments(name, arguments, _ShutdownArguments)
                return self._part(Shutdown, "shutdown").request(end.mode, force=end.force, text=end.text)
            case "kvp-get":
                get = self._arguments(name, arguments, _GetArguments)
                return self._part(Kvp, "kvp").get(get.key, _pool(get.pool))
            case "kvp-set":
                put = self._arguments(name, arguments, _SetArguments)
                wish = Wish(str(put.value), ic.ValueType[put.type.upper()])
                return self._part(Kvp, "kvp").change(put.key, wish, _pool(put.pool))
            case "kvp-delete":
                delete = self._arguments(name, arguments, _DeleteArguments)
                return self._part(Kvp, "kvp").change(delete.key, Wish(None), _pool(delete.pool))
            case "kvp-list":
                which = self._arguments(name, arguments, _ListArguments)
                return self._part(Kvp, "kvp").list(_pool(which.pool))
            case "freeze":
                freeze = self._arguments(name, arguments, _FreezeArguments)
                return self._part(Freeze, "vss").freeze(freeze.seconds)
            case "thaw":
                self._arguments(name, arguments, _NoArguments)
                return self._part(Freeze, "vss").thaw()
        raise UsageError(
            f"provider {self.name!r} has no command {name!r}; it has heartbeat, time-sync, shutdown, kvp-get, kvp-set, "
            "kvp-delete, kvp-list, freeze, thaw"
        )

    def _tell_time(self) -> Future[dict[str, Any]]:
        answer: Future[dict[str, Any]] = Future()

        def done(message: ic.Message | None, error: Exception | None) -> None:
            settle(answer, None if message is None else {"status": message.status}, error)

        self._part(Time, "time").tell(ic.TimeFlag.SYNC, done)
        return answer

    def _arguments(self, command: str, arguments: Mapping[str, Any], kind: type[_Arguments]) -> _Arguments:
        try:
            return msgspec.convert(dict(arguments), kind)
        except msgspec.ValidationError as error:
            raise UsageError(f"{command}: {explain(error)}") from error

    def _part(self, kind: type[_Part], name: str) -> _Part:
        part = self.parts.get(name)
        if not isinstance(part, kind):
            raise UsageError(f"provider {self.name!r} does not have the service {name!r}; see its option services")
        return part

    # ---- save and restore ------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        return msgspec.msgpack.encode(
            _State(
                version=1,
                parts={
                    name: _PartState(
                        part.exchange.save(), dict(part.numbers), part.wishes if isinstance(part, Kvp) else None
                    )
                    for name, part in self.parts.items()
                },
            )
        )

    def _decoded(self, state: bytes) -> _State:
        saved = self.decoded(_decoder, state)
        if set(saved.parts) != set(self.parts):
            raise StateError(f"provider {self.name!r} was saved with the services {sorted(saved.parts)}")
        for name, part in self.parts.items():
            record = saved.parts[name]
            if set(record.numbers) != set(part.numbers):
                raise StateError(f"the state of the {name} service has other numbers: {sorted(record.numbers)}")
            part.exchange.check(record.exchange)
            for key, wish in (record.wishes or {}).items():
                try:
                    wish.check(key)
                except ValueError as error:
                    raise StateError(f"the state of the {name} service: {error}") from None
        return saved

    def check(self, state: bytes) -> None:
        self._decoded(state)

    def restore(self, state: bytes) -> None:
        saved = self._decoded(state)
        for name, part in self.parts.items():
            part.exchange.restore(saved.parts[name].exchange)
            part.numbers.update(saved.parts[name].numbers)
            wishes = saved.parts[name].wishes
            if isinstance(part, Kvp) and wishes is not None:
                part.wishes = dict(wishes)

    def status(self) -> dict[str, Any]:
        return {name: part.status() for name, part in self.parts.items()}

    def bounds(self) -> dict[str, Bound]:
        return {f"{name} requests": part.exchange.bound for name, part in self.parts.items()}
