"""Linux's ends of the integration services, as `hv_utils` and `hv_kvp_daemon` of 6.12 behave: its drivers' habits, not
its code. For tests without a kernel.

The habits that matter: answers are made in the request's own buffer, so they have its length. The clock is set by
messages with the flag for it, by no others. The key-value channel is not read at all before the daemon has come, and
then one message at a time; a message that arrives while another is being worked on lies there until something else
happens (`overrun` counts these). A request to get a value is answered well, and without the value. All values are text.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.pipe import frame, unframe
from vmbus.kmcl.settings import FLAG_IS_PIPE
from vmbus.wire import ic
from vmbus_guest.driver import VmbusDriver

FACTS = ("FullyQualifiedDomainName", "IntegrationServicesVersion", "NetworkAddressIPv4", "NetworkAddressIPv6")
ANSWERED = (ic.HEARTBEAT, ic.SHUTDOWN, ic.TIME, ic.KVP)
"""The services that are here."""


class LinuxAnswers:
    """What the four services answer, and what they did. `offset`: by how much the guest's clock is ahead of `clock`."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.offset = 0.0
        self.heartbeats = self.samples = 0
        self.sets: list[float] = []
        """What the clock was set to."""
        self.ended: list[int] = []
        self.pools: dict[int, dict[str, str]] = {number: {} for number in range(5)}
        self.pools[ic.Pool.AUTO] = {name: f"the guest's {name}" for name in FACTS}
        self._versions: dict[str, ic.Version] = {}

    def answer(self, service: ic.Service, message: ic.Message) -> ic.Message:
        """The answer to a message of the host's."""
        if message.kind == ic.MessageType.NEGOTIATE:
            choice = ic.choose(message.body, ic.FRAMEWORK_VERSIONS, service.versions)
            if choice is not None:
                self._versions[service.name] = choice[1]
            return message.reply(ic.answer_negotiation(choice))
        assert message.kind == service.message_type and message.version == self._versions[service.name]
        match service.name:
            case "heartbeat":
                self.heartbeats += 1
                return message.reply(ic.heartbeat(ic.parse_heartbeat(message.body) + 1)[:8])
            case "time":
                told = ic.parse_time_sync(message.body, message.version)
                if told.flag & ic.TimeFlag.SYNC:
                    self.sets.append(told.seconds)
                    self.offset = told.seconds - self.clock()
                else:
                    self.samples += 1
                return message.reply()
            case "shutdown":
                flags = ic.parse_shutdown(message.body).flags
                known = flags in (0, 1, 2, 3)
                if known:
                    self.ended.append(flags)
                return message.reply(status=ic.IcStatus.OK if known else ic.IcStatus.FAIL)
            case _:
                return self._kvp(message, ic.parse_kvp(message.body))

    def _kvp(self, message: ic.Message, request: ic.Kvp) -> ic.Message:
        if len(message.body) < len(ic.kvp(request)):
            return message.reply(status=ic.IcStatus.FAIL)
        pool = self.pools[request.pool]
        missing = message.reply(status=ic.IcStatus.NO_MORE_ITEMS)
        match request.operation:
            case ic.KvpOperation.GET:
                return message.reply()
            case ic.KvpOperation.SET:
                if request.pool == ic.Pool.AUTO:
                    return missing
                pool[request.key] = request.value
                return message.reply()
            case ic.KvpOperation.DELETE:
                return message.reply() if pool.pop(request.key, None) is not None else missing
            case _:
                if request.position >= len(pool):
                    return missing
                key = list(pool)[request.position]
                text = ic.ValueType.STRING
                return message.reply(ic.kvp(request._replace(key=key, value=pool[key], value_type=text)))


class HvUtils(LinuxAnswers):
    """The four services over a driver."""

    def __init__(self, driver: VmbusDriver, *, daemon: bool = True) -> None:
        super().__init__()
        self.daemon = daemon
        self.busy: float | None = None
        """Seconds that the daemon takes for each answer, unless None."""
        self.overrun = 0
        self._unread: list[tuple[Channel, int, ic.Message]] = []
        self.channels: dict[str, ClientChannel] = {}
        for service in ANSWERED:
            channel = driver.client_channel(service.interface_type, ring_pages_in=4, ring_pages_out=4)
            channel.set_flags(FLAG_IS_PIPE)
            channel.set_process_packet_callbacks(functools.partial(self._arrived, service))
            self.channels[service.name] = channel
            driver.enable(channel)
        driver.on_rescind = self._rescinded

    def _rescinded(self, channel: ClientChannel) -> None:
        self._unread.clear()
        channel.enable()

    def start_daemon(self) -> None:
        """It registers, and the driver reads what lies there."""
        self.daemon = True
        self.go_on()

    def go_on(self) -> None:
        """Read one message from the key-value channel, if there is one and somebody to answer it."""
        if self.daemon and self._unread:
            channel, transaction, message = self._unread.pop(0)
            self._send(channel, transaction, self.answer(ic.KVP, message))

    def _arrived(self, service: ic.Service, channel: Channel, completion: Completion, payload: bytes) -> None:
        message = ic.parse(unframe(payload))
        completion.complete()
        if service is not ic.KVP:
            self._send(channel, completion.transaction, self.answer(service, message))
            return
        self.overrun += bool(self._unread)
        self._unread.append((channel, completion.transaction, message))
        if self.busy is None:
            self.go_on()

    @staticmethod
    def _send(channel: Channel, transaction: int, message: ic.Message) -> None:
        channel.allocate_packet().send(frame(message.pack()), wait_for_completion=False, transaction=transaction)
