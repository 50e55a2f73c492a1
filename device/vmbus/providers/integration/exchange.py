"""One service's channel: the host asks, the guest answers, one request at a time.

When the guest has opened the channel, versions are negotiated; then requests go out in their order, each after the
answer to the one before, however long that takes: Linux reads one message for each interrupt, so a second one would lie
there unread, and some of its services wait for a daemon that may be started much later. Who asked does not wait as
long: a request that was not sent in time is dropped, and the late answer to one that was sent is for nobody. A save
leaves the request that is under way where it is (in the ring, or with the guest), and keeps its number, so that the
answer is known for what it is whenever it comes.
"""

from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Annotated, Any
from uuid import UUID

import msgspec

from vmbus.errors import PeerError, StateError, UsageError, VmbusError, WaitTimeout
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.pipe import PipeMode, frame, unframe
from vmbus.kmcl.server import SERVER_FLAG_OFFER_AS_PIPE, ServerChannel
from vmbus.kmcl.settings import FLAG_IS_PIPE
from vmbus.providers.base import Bound, Host, Timer
from vmbus.util.records import Count
from vmbus.wire import ic

QUEUE = 64
"""Requests that may wait behind the one that is under way."""

Done = Callable[[ic.Message | None, VmbusError | None], None]


def nobody(message: ic.Message | None, error: VmbusError | None) -> None:
    """For requests whose answers matter to nobody."""


class Phase(Enum):
    CLOSED = "closed"
    NEGOTIATING = "negotiating"
    READY = "ready"
    UNSUPPORTED = "unsupported"


class Request:
    """Something to ask the guest.

    Attributes:
        body: its bytes, or what makes them when it is sent.
        done: called once, with the answer or with what prevented it.
        keep: it is saved while it waits to be sent; else whoever asked is gone with the process.
        patient: whoever asked waits without a bound.
    """

    __slots__ = ("body", "done", "keep", "kind", "patient", "timer", "transaction")

    def __init__(
        self,
        kind: int,
        body: bytes | Callable[[], bytes],
        done: Done = nobody,
        *,
        keep: bool = False,
        patient: bool = False,
    ) -> None:
        self.kind = kind
        self.body = body
        self.done = done
        self.keep = keep
        self.patient = patient
        self.timer: Timer | None = None
        self.transaction = 0


_Number = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]


class WaitingState(msgspec.Struct, frozen=True):
    """A request that waited to be sent, see `Request`."""

    kind: _Number
    body: Annotated[bytes, msgspec.Meta(max_length=ic.MAXIMUM_MESSAGE)]


class ExchangeState(msgspec.Struct, frozen=True):
    """What is saved of an exchange. `framework` and `version` are [] before they are negotiated, and for a guest that
    takes none of ours (`unsupported`); `under_way` is the kind of the request that `transaction` was given to."""

    framework: Annotated[list[_Number], msgspec.Meta(max_length=2)]
    version: Annotated[list[_Number], msgspec.Meta(max_length=2)]
    unsupported: bool
    last_transaction: Annotated[int, msgspec.Meta(ge=0, le=255)]
    under_way: _Number | None
    patient: bool
    waiting: Annotated[list[WaitingState], msgspec.Meta(max_length=2 * QUEUE)]
    counters: dict[str, Count]


class Exchange:
    """See the module's text.

    Attributes:
        service: which one. channel: its channel.
        version: of the messages, once it is negotiated.
        counters: requests `sent` and `answered`; those that their askers gave up (`unanswered`), sent or not; answers
            to nothing that was asked (`stray`).
        on_ready: called whenever requests can go out: versions are agreed on and the channel has started, again after a
            pause or a restore.
        on_suspend: called when the channel comes to rest. on_closed: called when it is closed.
        on_old_answer: `done` of the request that was under way at a save.
    """

    def __init__(
        self, host: Host, service: ic.Service, instance: UUID, name: str, versions: Sequence[ic.Version], seconds: float
    ) -> None:
        """`versions`: of the messages, to offer; `seconds`: how long an asker waits for an answer."""
        self.service = service
        self.name = name
        self.version: ic.Version | None = None
        self.counters = {"sent": 0, "answered": 0, "unanswered": 0, "stray": 0}
        self.on_ready: Callable[[], None] = lambda: None
        self.on_suspend: Callable[[], None] = lambda: None
        self.on_closed: Callable[[], None] = lambda: None
        self.on_old_answer: Done = nobody
        self.phase = Phase.CLOSED
        self._host = host
        self._versions = tuple(versions)
        self._seconds = seconds
        self._framework = ic.Version(0, 0)
        self._under_way: Request | None = None
        self._waiting: deque[Request] = deque()
        self._refused = 0
        self._last_transaction = 0
        self.channel = ServerChannel(service.interface_type, instance, name=name)

    def start(self) -> None:
        channel = self.channel
        channel.set_flags(FLAG_IS_PIPE)
        channel.set_server_flags(SERVER_FLAG_OFFER_AS_PIPE)
        channel.user_defined = PipeMode.MESSAGE.to_bytes(4, "little")
        channel.set_process_packet_callbacks(self._process)
        channel.set_state_change_callbacks(
            opened=self._opened, closed=self._closed, started=self._started, suspend=self._suspended
        )
        # There is nothing to add to a message that waits for room in the ring.
        channel.set_save_restore_packet_callbacks(_save_packet, _restore_packet)
        self._host.add_channel(channel)
        channel.enable()
        channel.start()

    def stop(self) -> None:
        self._stop_timers()

    # ---- requests --------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether a request would go out at once."""
        return self.phase is Phase.READY and self._under_way is None and not self._waiting

    def ask(self, request: Request, *, bounded: bool = True) -> None:
        """Send a request after those before it. Raises UsageError when the guest's service is not there, or (`bounded`)
        does not answer."""
        if self.phase in (Phase.CLOSED, Phase.UNSUPPORTED):
            reason = "it has not opened the channel" if self.phase is Phase.CLOSED else "it takes none of our versions"
            raise UsageError(f"the guest's {self.service.name} service is not there: {reason}")
        if bounded and len(self._waiting) >= QUEUE:
            self._refused += 1
            raise UsageError(f"the guest's {self.service.name} service does not answer: {QUEUE} requests wait")
        self._waiting.append(request)
        self._start_timer(request)
        self._pump()

    def _pump(self) -> None:
        if self._under_way is not None or not self.channel.active:
            return
        if self.phase is Phase.NEGOTIATING:
            offer = ic.negotiation(ic.FRAMEWORK_VERSIONS, self._versions)
            self._send(Request(ic.MessageType.NEGOTIATE, offer, patient=True))
        elif self.phase is Phase.READY and self._waiting:
            self._send(self._waiting.popleft())

    @property
    def bound(self) -> Bound:
        return Bound(len(self._waiting), QUEUE, self._refused)

    def _send(self, request: Request) -> None:
        self._last_transaction = request.transaction = self._last_transaction % 255 + 1
        self._under_way = request
        self.counters["sent"] += 1
        body = request.body if isinstance(request.body, bytes) else request.body()
        message = ic.Message(
            request.kind,
            body,
            self._framework,
            self.version or ic.Version(0, 0),
            transaction=request.transaction,
        )
        self.channel.allocate_packet().send(frame(message.pack()), wait_for_completion=False)

    def _start_timer(self, request: Request) -> None:
        # While the channel is at rest nobody can answer.
        if not request.patient and request.timer is None and self.channel.active:
            request.timer = self._host.call_later(self._seconds, lambda: self._time_passed(request))

    def _stop_timers(self) -> None:
        for request in self._unsettled():
            _stop_timer(request)

    def _unsettled(self) -> list[Request]:
        return [*([] if self._under_way is None else [self._under_way]), *self._waiting]

    def _time_passed(self, request: Request) -> None:
        """Whoever asked waits no longer."""
        request.timer = None
        request.patient = True
        if request is not self._under_way:
            self._waiting.remove(request)
        done, request.done = request.done, nobody
        self.counters["unanswered"] += 1
        what = f"the guest's answer ({self.service.name} service)"
        if self.phase is Phase.NEGOTIATING:
            what = f"the guest's {self.service.name} service to agree on versions: perhaps its daemon does not run"
        done(None, WaitTimeout(what, self._seconds))

    # ---- the guest -------------------------------------------------------------------------------------------------

    def _process(self, channel: Channel, completion: Completion, payload: bytes) -> None:
        try:
            message = ic.parse(unframe(payload))
            request = self._under_way
            if (
                request is None
                or message.transaction != request.transaction
                or message.kind != request.kind
                or not message.flags & ic.Flag.RESPONSE
            ):
                self.counters["stray"] += 1
                completion.complete()
                return
            if request.kind == ic.MessageType.NEGOTIATE:
                self._agree(message)
        except PeerError as error:
            completion.fail(f"{self.service.name} service: {error}")
            return
        completion.complete()
        _stop_timer(request)
        self._under_way = None
        self.counters["answered"] += 1
        if request.kind == ic.MessageType.NEGOTIATE:
            if self.phase is Phase.READY:
                self.on_ready()
        else:
            request.done(message, None)
        self._pump()

    def _agree(self, message: ic.Message) -> None:
        """The guest's choice. Raises IcError for one that was not offered."""
        frameworks, versions = ic.parse_negotiation(message.body)
        if not frameworks or not versions or message.status != ic.IcStatus.OK:
            self.phase = Phase.UNSUPPORTED
            self._give_up("it takes none of our versions")
            return
        if frameworks[0] not in ic.FRAMEWORK_VERSIONS or versions[0] not in self._versions:
            raise ic.IcError(f"the guest chose versions {frameworks[0]} and {versions[0]}, which were not offered")
        self._framework, self.version = frameworks[0], versions[0]
        self.phase = Phase.READY

    def _opened(self, _: Channel) -> None:
        self._forget()
        self.phase = Phase.NEGOTIATING

    def _started(self, _: Channel) -> None:
        for request in self._unsettled():
            self._start_timer(request)
        if self.phase is Phase.READY:
            self.on_ready()
        self._pump()

    def _suspended(self, _: Channel) -> None:
        self._stop_timers()
        self.on_suspend()

    def _closed(self, _: Channel) -> None:
        self._forget()
        self.phase = Phase.CLOSED
        self.on_closed()

    def _forget(self) -> None:
        self._framework, self.version = ic.Version(0, 0), None
        self._give_up("it has closed the channel")

    def _give_up(self, reason: str) -> None:
        self._stop_timers()
        requests = self._unsettled()
        self._under_way = None
        self._waiting.clear()
        for request in requests:
            if request.kind != ic.MessageType.NEGOTIATE:
                request.done(None, UsageError(f"the guest's {self.service.name} service went away: {reason}"))

    # ---- save and restore ------------------------------------------------------------------------------------------

    def save(self) -> ExchangeState:
        agreed = self.version is not None
        request = self._under_way
        return ExchangeState(
            framework=list(self._framework) if agreed else [],
            version=list(self.version) if self.version is not None else [],
            unsupported=self.phase is Phase.UNSUPPORTED,
            last_transaction=self._last_transaction,
            under_way=None if request is None else int(request.kind),
            patient=request is not None and request.patient,
            waiting=[
                WaitingState(int(one.kind), one.body)
                for one in self._waiting
                if one.keep and isinstance(one.body, bytes)
            ],
            counters=dict(self.counters),
        )

    def check(self, state: ExchangeState) -> None:
        """Raises StateError for a state that `restore` could not take over."""
        framework, version = state.framework, state.version
        if set(state.counters) != set(self.counters):
            raise StateError(f"the state of the {self.service.name} service has other counters: {state.counters}")
        if (version or framework) and (
            tuple(framework) not in ic.FRAMEWORK_VERSIONS or tuple(version) not in self._versions
        ):
            raise StateError(f"the {self.service.name} service agreed on versions {framework} and {version}")

    def restore(self, state: ExchangeState) -> None:
        """Take over what `check` has passed; the channel is on its rings again if it was open."""
        framework, version = state.framework, state.version
        if version or framework:
            self._framework, self.version = ic.Version(*framework), ic.Version(*version)
        self._last_transaction = state.last_transaction
        self.counters.update(state.counters)
        if state.under_way is not None:
            self._under_way = Request(state.under_way, b"", self.on_old_answer, patient=state.patient)
            self._under_way.transaction = state.last_transaction
        # Nobody waits for them any more, and they are still to be done.
        self._waiting.extend(Request(one.kind, one.body, keep=True, patient=True) for one in state.waiting)
        if self.channel.state is not ChannelState.OPENED:
            self.phase = Phase.CLOSED
        elif state.unsupported:
            self.phase = Phase.UNSUPPORTED
        else:
            self.phase = Phase.NEGOTIATING if self.version is None else Phase.READY

    def status(self) -> dict[str, Any]:
        return {
            "phase": self.phase.value,
            "version": None if self.version is None else str(self.version),
            "under_way": self._under_way is not None,
            "waiting": len(self._waiting),
            **self.counters,
        }


def _stop_timer(request: Request) -> None:
    if request.timer is not None:
        request.timer.cancel()
        request.timer = None


def _save_packet(channel: ServerChannel, packet: Packet, buffer: memoryview) -> int:
    return 0


def _restore_packet(channel: ServerChannel, lib_buf: bytes, save_buf: bytes) -> None:
    channel.restore_packet(channel.allocate_packet(), lib_buf)
