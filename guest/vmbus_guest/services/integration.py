"""Service `integration`: the guest's end of heartbeat, time, shutdown and key-value exchange.

It answers as Linux's own drivers do: in a packet that repeats the request's transaction id, in a message of the
request's length.

Parameters, besides the common ones of `Workload`:

    directory    where the key-value pools are
    set_clock    whether the clock is set when the host tells the time
    least_step   seconds by which it must be wrong for that: a message may be under way for longer than a clock is wrong
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

from vmbus.errors import PeerError, UsageError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.pipe import frame, unframe
from vmbus.kmcl.settings import FLAG_IS_PIPE
from vmbus.wire import ic
from vmbus_guest.services.kvp import DIRECTORY, POOLS, Store
from vmbus_guest.services.service import Service
from vmbus_guest.services.system import LinuxSystem
from vmbus_guest.testdrivers.context import Parameters

ANSWERED = (ic.HEARTBEAT, ic.SHUTDOWN, ic.TIME, ic.KVP)
"""What this service can do."""
RING_PAGES = 4
"""Data pages of each ring, unless the parameters say otherwise: messages are few, and at most two pages long."""


class System(Protocol):
    """See `vmbus_guest.services.system.LinuxSystem`."""

    def now(self) -> float: ...

    def set_clock(self, seconds: float) -> None: ...

    def end(self, *, restart: bool, force: bool) -> None: ...

    def facts(self) -> dict[str, str]: ...


class IntegrationService(Service):
    """See the module's text."""

    name = "integration"
    interface_type = ic.HEARTBEAT.interface_type

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._pages_in = parameters.get("ring_pages_in", RING_PAGES)
        self._pages_out = parameters.get("ring_pages_out", RING_PAGES)
        directory = parameters.get("directory", DIRECTORY)
        self._set_clock = parameters.get("set_clock", True)
        self._least_step = parameters.get("least_step", 0.25, minimum=0)
        self.system = self.make_system()
        self.store = Store(directory, self.system.facts)
        self._versions: dict[str, tuple[ic.Version, ic.Version]] = {}
        self._ending: ic.Shutdown | None = None
        self.done = {"heartbeats": 0, "syncs": 0, "samples": 0, "kvp": 0, "refused": 0}
        self.last_offset = 0.0
        self.largest_offset = 0.0

    def make_system(self) -> System:
        """The system to act on. Raises EnvironmentProblem on a machine that is not a guest."""
        return LinuxSystem()

    def channels_wanted(self) -> list[ClientChannel]:
        """One for each service that the host may have."""
        channels = []
        for service in ANSWERED:
            channel = self.make_channel(service.interface_type, f"{self.name}-{service.name}")
            channel.set_flags(FLAG_IS_PIPE)
            channel.set_process_packet_callbacks(functools.partial(self._process, service))
            channels.append(channel)
        self.channel = channels[0]
        return channels

    def tick(self, now: float) -> float:
        """End the machine, once the host has the answer."""
        request, self._ending = self._ending, None
        if request is not None:
            restart = bool(request.flags & ic.ShutdownFlag.RESTART)
            self.system.end(restart=restart, force=bool(request.flags & ic.ShutdownFlag.FORCE))
        return super().tick(now)

    def counts(self) -> dict[str, Any]:
        """What was done; `clock` is the time of the report."""
        return {
            **super().counts(),
            **self.done,
            "clock": self.system.now(),
            "last_offset": round(self.last_offset, 6),
            "largest_offset": round(self.largest_offset, 6),
            "versions": {name: f"{version}" for name, (_, version) in self._versions.items()},
        }

    # ---- requests --------------------------------------------------------------------------------------------------

    def _process(self, service: ic.Service, channel: Channel, completion: Completion, payload: bytes) -> None:
        try:
            message = ic.parse(unframe(payload))
            if not message.flags & ic.Flag.REQUEST:
                raise ic.IcError("a message that is no request")
            answer = self._answer(service, message)
        except PeerError as error:
            completion.fail(str(error))
            return
        completion.complete()
        if answer.status != ic.IcStatus.OK:
            self.done["refused"] += 1
        channel.allocate_packet().send(
            frame(answer.pack()), wait_for_completion=False, transaction=completion.transaction
        )

    def _answer(self, service: ic.Service, message: ic.Message) -> ic.Message:
        if message.kind == ic.MessageType.NEGOTIATE:
            choice = ic.choose(message.body, ic.FRAMEWORK_VERSIONS, service.versions)
            if choice is None:
                self._versions.pop(service.name, None)
            else:
                self._versions[service.name] = choice
            return message.reply(ic.answer_negotiation(choice))
        if message.kind != service.message_type or service.name not in self._versions:
            return message.reply(status=ic.IcStatus.NOT_SUPPORTED)
        version = self._versions[service.name][1]
        match message.kind:
            case ic.MessageType.HEARTBEAT:
                self.done["heartbeats"] += 1
                sequence = (ic.parse_heartbeat(message.body) + 1) % (1 << 64)
                return message.reply(ic.heartbeat(sequence)[:8])
            case ic.MessageType.TIME:
                return self._time(message, ic.parse_time_sync(message.body, version))
            case ic.MessageType.SHUTDOWN:
                return self._shutdown(message, ic.parse_shutdown(message.body))
            case _:
                return self._exchange(message, ic.parse_kvp(message.body))

    def _time(self, message: ic.Message, sync: ic.TimeSync) -> ic.Message:
        self.last_offset = sync.seconds - self.system.now()
        if abs(self.last_offset) > abs(self.largest_offset):
            self.largest_offset = self.last_offset
        if sync.flag != ic.TimeFlag.SYNC:
            self.done["samples"] += 1
            return message.reply()
        self.done["syncs"] += 1
        if self._set_clock and abs(self.last_offset) >= self._least_step:
            try:
                self.system.set_clock(sync.seconds)
            except (OSError, OverflowError, ValueError):  # a time that this system does not know
                return message.reply(status=ic.IcStatus.FAIL)
        return message.reply()

    def _shutdown(self, message: ic.Message, request: ic.Shutdown) -> ic.Message:
        if request.flags & ~(ic.ShutdownFlag.FORCE | ic.ShutdownFlag.RESTART):
            return message.reply(status=ic.IcStatus.NOT_SUPPORTED)
        self._ending = request
        return message.reply()

    def _exchange(self, message: ic.Message, request: ic.Kvp) -> ic.Message:
        self.done["kvp"] += 1
        pool = next((name for name, number in POOLS.items() if number == request.pool), "")
        try:
            answer = self._look_up(pool, request)
        except (UsageError, OSError):
            return message.reply(status=ic.IcStatus.FAIL)
        if answer is None:
            return message.reply(status=ic.IcStatus.NO_MORE_ITEMS)
        return message.reply(ic.kvp(answer))

    def _look_up(self, pool: str, request: ic.Kvp) -> ic.Kvp | None:
        """The answer, None for what is not there. Raises UsageError for what cannot be done."""
        values = self.store.values(pool)
        match request.operation:
            case ic.KvpOperation.SET:
                self.store.set(pool, request.key, request.value, request.value_type)
                return request
            case ic.KvpOperation.DELETE:
                return request if self.store.delete(pool, request.key) else None
            case ic.KvpOperation.ENUMERATE:
                if request.position >= len(values):
                    return None
                key = list(values)[request.position]
            case _:
                key = request.key
        if key not in values:
            return None
        kind, value = values[key]
        return request._replace(key=key, value=value, value_type=kind)
