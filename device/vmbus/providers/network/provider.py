"""The network provider: joins channels and the host's interface. See docs/provider-network.md."""

import hashlib
import ipaddress
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec

from vmbus.complaints import bounded_log
from vmbus.errors import EnvironmentProblem, StateError, UsageError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.status import Status as PacketStatus
from vmbus.providers.base import Bound, Host, Provider, Timer
from vmbus.providers.network.interface import Port, Settings, open_port, set_mtu
from vmbus.providers.network.queue import Kind, Queue, Sent, describe_saved
from vmbus.providers.network.veth import open_veth
from vmbus.records import Count
from vmbus.wire.network import (
    MESSAGE_LIMIT,
    MTU_MAXIMUM,
    MTU_MINIMUM,
    NETWORK_TYPE,
    QUEUES_MAXIMUM,
    VERSION,
    Feature,
    Frames,
    Hello,
    Nic,
    Queues,
    Status,
    announcement,
    check_frame,
    flow_hash,
    format_mac,
    frame_limit,
    message_size,
    pack_reply,
    parse,
    parse_mac,
)

log = bounded_log(__name__)

FRAMES_PER_TURN = 64
"""Frames read from the interface before others on the loop get their turn."""
DRAIN_BYTES = 4 << 20
"""At a pause, most bytes of frames taken out of the interface, to travel with the state."""
ANNOUNCE_AFTER = (0.01, 0.1, 0.3, 0.6, 1.2)
"""Seconds after the interface was made in which the guest's address is announced; not before the device runs here."""

_Interface = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,14}$")]
_COUNTERS = ("to_guest", "to_host", "bytes_to_host", "refused", "no_link", "not_taken", "drained", "announced")


class NetworkOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See docs/provider-network.md."""

    mac: str | None = None
    mtu: Annotated[int, msgspec.Meta(ge=MTU_MINIMUM, le=MTU_MAXIMUM)] = 1500
    queues: Annotated[int, msgspec.Meta(ge=1, le=QUEUES_MAXIMUM)] = 1
    offload: bool = True
    window_kib: Annotated[int, msgspec.Meta(ge=64, le=16384)] = 512
    end: Literal["tap", "veth"] = "tap"
    interface: _Interface | None = None
    namespace: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    bridge: _Interface | None = None
    address: str | None = None
    guest_interface: _Interface = "vmnet0"
    guest_address: str | None = None
    guest_gateway: str | None = None

    def __post_init__(self) -> None:
        if self.mac is not None:
            parse_mac(self.mac)
        if self.address is not None:
            ipaddress.ip_interface(self.address)
        if self.guest_address is not None:
            ipaddress.IPv4Interface(self.guest_address)
        if self.guest_gateway is not None:
            ipaddress.IPv4Address(self.guest_gateway)


class _Agreed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What HELLO has settled. `in_use`: queues over which the guest takes frames."""

    features: Annotated[int, msgspec.Meta(ge=0, le=int(Feature.OFFLOAD))]
    mtu: Annotated[int, msgspec.Meta(ge=MTU_MINIMUM, le=MTU_MAXIMUM)]
    queues: Annotated[int, msgspec.Meta(ge=1, le=QUEUES_MAXIMUM)]
    in_use: Annotated[int, msgspec.Meta(ge=1, le=QUEUES_MAXIMUM)]


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is saved. `channels`: that exist; `link_told`: what the guest was told last."""

    version: Literal[1]
    mac: Annotated[bytes, msgspec.Meta(min_length=6, max_length=6)]
    agreed: _Agreed | None
    channels: Annotated[int, msgspec.Meta(ge=1, le=QUEUES_MAXIMUM)]
    link: bool
    link_told: bool
    counters: dict[str, Count]


_decoder = msgspec.msgpack.Decoder(_State)


class NetworkProvider(Provider):
    """See the package's text."""

    kind = "network"
    Options = NetworkOptions

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        chosen: NetworkOptions = self.options
        digest = hashlib.sha256(b"network " + instance.bytes).digest()
        self.mac = derived_mac(digest) if chosen.mac is None else parse_mac(chosen.mac)
        self.settings = Settings(
            name=chosen.interface or f"vmnet-{digest[:4].hex()}",
            # The same after every move, or the guest would go on talking to an address that is no more. High, so that
            # a bridge does not take it for its own.
            mac=b"\xfe" + digest[8:13],
            mtu=chosen.mtu,
            namespace=chosen.namespace,
            address=chosen.address,
            bridge=chosen.bridge,
        )
        self.counters = dict.fromkeys(_COUNTERS, 0)
        self.port: Port | None = None
        self._agreed: _Agreed | None = None
        self._link = True  # as tools want it
        self._link_told = True  # as the guest knows it
        self._link_in_flight = False
        self._carrier = False  # whether the interface has a link
        self._reading = False
        self._announcements: list[Timer] = []
        self._mtu_wanted = 0
        self._mtu_changing = False
        self._lost_reason = ""
        self.queues = [self._make_queue(0)]

    # ---- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._offer(self.queues[0])

    def _make_queue(self, index: int) -> Queue:
        channel = ServerChannel(
            NETWORK_TYPE, self.instance, name=f"{self.name}.{index}" if index else self.name, subchannel_index=index
        )
        queue = Queue(index, channel, self.options.window_kib << 10, self._completed)
        channel.set_maximum_packet_size(MESSAGE_LIMIT)
        channel.set_process_packet_callbacks(partial(self._process, queue))
        channel.set_state_change_callbacks(opened=self._opened, closed=self._closed, started=self._started)
        channel.set_save_restore_packet_callbacks(queue.save_packet, queue.restore_packet)
        return queue

    def _offer(self, queue: Queue) -> None:
        self.host.add_channel(queue.channel)
        queue.channel.enable()
        queue.channel.start()

    def _add_queues(self, count: int) -> None:
        while len(self.queues) < count:
            queue = self._make_queue(len(self.queues))
            self.queues.append(queue)
            self._offer(queue)

    def activate(self) -> None:
        """Make the interface, and tell the network where the guest is."""
        if self.port is not None:
            return
        mtu = self.options.mtu if self._agreed is None else self._agreed.mtu
        self._lost_reason = ""
        self._carrier = self._has_link
        settings = self.settings._replace(mtu=mtu, carrier=self._carrier)
        if self._carrier and self.options.address is not None and self.options.guest_address is not None:
            address = ipaddress.IPv4Interface(self.options.guest_address).ip
            if address in ipaddress.ip_interface(self.options.address).network:
                settings = settings._replace(neighbour=(str(address), self.mac))
        self.port = self.make_port(settings)
        if self._agreed is not None:
            try:
                self.port.set_offload(bool(self._agreed.features & Feature.OFFLOAD))
            except OSError as error:
                raise EnvironmentProblem(
                    f"interface {self.settings.name!r} cannot take the offloads that the guest knows of: {error}"
                ) from error
        self._update()
        if self._agreed is not None:
            # By timers, which stand still until the device runs: a destination that has everything, but may still be
            # discarded, must not draw the guest's frames to itself.
            for seconds in ANNOUNCE_AFTER:
                self._announcements.append(self.host.call_later(seconds, self._announce))

    def make_port(self, settings: Settings) -> Port:
        """The host's end. Tests put another one here."""
        return open_port(settings) if self.options.end == "tap" else open_veth(settings)

    def deactivate(self) -> None:
        """Take along what the interface holds for the guest, then remove it: another host may have one now."""
        if self.port is not None and self._agreed is not None and self.queues[0].open:
            self._drain(self.port)
        self._close_port()

    def stop(self) -> None:
        self._close_port()

    def _close_port(self) -> None:
        for timer in self._announcements:
            timer.cancel()
        self._announcements.clear()
        if self.port is not None:
            self._stop_reading()
            self.port.close()
            self.port = None

    def _drain(self, port: Port) -> None:
        """Frames that the kernel holds become packets, which queue, and are saved with the others."""
        taken = 0
        try:
            while taken < DRAIN_BYTES and (frame := port.read()) is not None:
                taken += len(frame)
                self._to_guest(frame).add(frame)
                self.counters["drained"] += 1
        except OSError as error:
            self._lost(error)
        for queue in self.queues:
            queue.flush()

    # ---- the interface -------------------------------------------------------------------------------------------

    @property
    def _has_link(self) -> bool:
        """Whether there is a guest that may be sent frames (later, while it is paused)."""
        return self._agreed is not None and self._link and self.queues[0].open

    def _update(self) -> None:
        """Let the interface have a link, and read it, exactly when there is a guest for its frames."""
        port = self.port
        if port is None or self._lost_reason:
            return
        link = self._has_link
        if link is not self._carrier:
            self._carrier = link
            try:
                port.set_carrier(link)
            except OSError as error:
                self._lost(error)
                return
        if link:
            self._read_on()
        else:
            self._stop_reading()

    def _read_on(self) -> None:
        if self._reading or self.port is None or self._agreed is None or not self._link or self._lost_reason:
            return
        in_use = self.queues[: self._agreed.in_use]
        if in_use[0].channel.active and all(queue.has_room for queue in in_use):
            self._reading = True
            self.host.add_reader(self.port.fd, self._readable)

    def _stop_reading(self) -> None:
        if self._reading and self.port is not None:
            self._reading = False
            self.host.remove_reader(self.port.fd)

    def _lost(self, error: OSError) -> None:
        """The interface is gone: somebody has removed it."""
        self._stop_reading()
        if not self._lost_reason:
            self._lost_reason = error.strerror or str(error)
            log.error("network %s: interface %s is gone: %s", self.name, self.settings.name, self._lost_reason)

    def _readable(self) -> None:
        """Frames for the guest."""
        port = self.port
        assert port is not None
        touched: dict[Queue, None] = {}
        try:
            for _ in range(FRAMES_PER_TURN):
                frame = port.read()
                if frame is None:
                    break
                queue = self._to_guest(frame)
                queue.add(frame)
                touched[queue] = None
                if not queue.has_room:
                    self._stop_reading()
                    break
        except OSError as error:
            self._lost(error)
        for queue in touched:
            with queue.channel.batch():
                queue.flush()

    def _to_guest(self, frame: bytes) -> Queue:
        """The queue of a frame's flow."""
        self.counters["to_guest"] += 1
        in_use = 1 if self._agreed is None else self._agreed.in_use
        return self.queues[flow_hash(frame) % in_use if in_use > 1 else 0]

    def _completed(self, _: Queue, sent: Sent, status: int) -> None:
        """The guest has taken a packet (or its channel was closed, or the packet was restored: PENDING)."""
        if sent.kind is Kind.LINK:
            self._link_in_flight = status == PacketStatus.PENDING
            if status == PacketStatus.SUCCESS:
                self._link_told = bool(sent.count)
                self._tell_link()
        elif status == PacketStatus.SUCCESS and not self._reading:
            self._read_on()

    def _announce(self) -> None:
        """Switches learn from it where the guest is now."""
        if self.port is not None and self._link:
            try:
                self.counters["announced"] += self.port.write(announcement(self.mac))
            except OSError as error:
                self._lost(error)

    # ---- channels ------------------------------------------------------------------------------------------------

    def _opened(self, channel: Channel) -> None:
        if channel is self.queues[0].channel:
            self._agreed = None

    def _started(self, channel: Channel) -> None:
        if channel is self.queues[0].channel:
            self._update()

    def _closed(self, channel: Channel) -> None:
        if channel is self.queues[0].channel:
            self._agreed = None
            self._link_in_flight = False
            self._update()
        elif self._agreed is not None:
            # The guest says again which it has.
            self._agreed = msgspec.structs.replace(self._agreed, in_use=1)

    def _process(self, queue: Queue, _: Channel, completion: Completion, payload: bytes) -> None:
        message = parse(payload)
        if isinstance(message, Frames):
            self._from_guest(completion, message.frames)
        elif isinstance(message, Hello) and queue is self.queues[0]:
            self._hello(queue, completion, message)
        elif isinstance(message, Queues) and queue is self.queues[0]:
            completion.complete(pack_reply(self._use_queues(message.number)))
        else:
            self._refuse(completion, Status.INVALID)

    def _refuse(self, completion: Completion, status: Status) -> None:
        self.counters["refused"] += 1
        completion.complete(pack_reply(status))

    def _hello(self, queue: Queue, completion: Completion, hello: Hello) -> None:
        options: NetworkOptions = self.options
        if hello.version < VERSION:
            self._refuse(completion, Status.UNSUPPORTED)
            return
        if hello.queues < 1 or 0 < hello.mtu < MTU_MINIMUM:
            self._refuse(completion, Status.INVALID)
            return
        mtu = min(options.mtu, hello.mtu or options.mtu)
        features = hello.features & Feature.OFFLOAD if options.offload else 0
        largest = queue.channel.largest_payload
        if largest < message_size(1, frame_limit(mtu, features)):
            features = 0
        if largest < message_size(1, frame_limit(mtu, features)):
            self._refuse(completion, Status.RING_TOO_SMALL)
            return
        count = min(options.queues, hello.queues)
        before = self._agreed.mtu if self._agreed is not None else options.mtu
        self._agreed = _Agreed(int(features), mtu, count, 1)
        if self.port is not None:
            try:
                self.port.set_offload(bool(features & Feature.OFFLOAD))
            except OSError as error:
                self._lost(error)
            if mtu != before:
                self._change_mtu(mtu)
        self._link_told = self._link
        nic = Nic(
            version=VERSION,
            features=int(features),
            mtu=mtu,
            queues=count,
            link=self._link,
            mac=self.mac,
            interface=options.guest_interface,
            gateway=b"" if options.guest_gateway is None else ipaddress.IPv4Address(options.guest_gateway).packed,
        )
        if options.guest_address is not None:
            address = ipaddress.IPv4Interface(options.guest_address)
            nic = nic._replace(address=address.packed, prefix=address.network.prefixlen)
        completion.complete(nic.pack())
        self._add_queues(count)
        self._update()

    def _change_mtu(self, mtu: int) -> None:
        """Bring the interface's MTU to this. One change at a time: a guest may say HELLO faster than they are made, and
        a pause waits for those under way."""
        self._mtu_wanted = mtu
        if self._mtu_changing:
            return

        def done(_: None, error: BaseException | None) -> None:
            self._mtu_changing = False
            if error is not None:
                log.error("network %s: %s", self.name, error)
            if self._mtu_wanted != mtu and self.port is not None:
                self._change_mtu(self._mtu_wanted)

        self._mtu_changing = True
        self.host.run_blocking(partial(set_mtu, self.settings, mtu), done)

    def _use_queues(self, count: int) -> Status:
        """QUEUES: the guest takes frames on the first `count` channels."""
        if self._agreed is None:
            return Status.NO_HELLO
        if not 1 <= count <= self._agreed.queues or not all(queue.channel.active for queue in self.queues[:count]):
            self.counters["refused"] += 1
            return Status.INVALID
        self._agreed = msgspec.structs.replace(self._agreed, in_use=count)
        return Status.OK

    def _from_guest(self, completion: Completion, frames: list[memoryview]) -> None:
        agreed, port, counters = self._agreed, self.port, self.counters
        if agreed is None:
            self._refuse(completion, Status.NO_HELLO)
            return
        if not self._link:
            counters["no_link"] += len(frames)
            completion.complete(pack_reply(Status.NO_LINK))
            return
        taken = 0
        for frame in frames:
            wrong = check_frame(frame, agreed.mtu, agreed.features)
            if wrong:
                counters["refused"] += 1
                log.debug("network %s: %s", self.name, wrong)
                continue
            try:
                if port is not None and port.write(frame):
                    taken += 1
                    counters["bytes_to_host"] += len(frame)
                else:
                    counters["not_taken"] += 1
            except OSError as error:
                counters["not_taken"] += 1
                self._lost(error)
        counters["to_host"] += taken
        completion.complete(pack_reply(Status.OK if taken == len(frames) else Status.INVALID, taken))

    # ---- the link ------------------------------------------------------------------------------------------------

    def command(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """`link state=up|down` pulls the cable, or puts it in again; `announce` tells switches where the guest is."""
        if name == "link" and set(arguments) <= {"state"}:
            state = arguments.get("state")
            if state not in ("up", "down", None):
                raise UsageError(f"network {self.name!r}: state is 'up' or 'down', not {state!r}")
            if state is not None:
                self._link = state == "up"
                self._update()
                self._tell_link()
            return {"link": "up" if self._link else "down"}
        if name == "announce" and not arguments:
            self._announce()
            return {"announced": self.counters["announced"]}
        raise UsageError(f"network {self.name!r} has the commands 'link' (state=up, state=down) and 'announce'")

    def _tell_link(self) -> None:
        """One message at a time: what changed meanwhile is told when the guest has taken it."""
        if self._agreed is None or self._link_in_flight or self._link == self._link_told or not self.queues[0].open:
            return
        self._link_in_flight = True
        self.queues[0].send_link(self._link)

    # ---- save and restore ----------------------------------------------------------------------------------------

    def save(self) -> bytes:
        return msgspec.msgpack.encode(
            _State(
                version=1,
                mac=self.mac,
                agreed=self._agreed,
                channels=len(self.queues),
                link=self._link,
                link_told=self._link_told,
                counters=self.counters,
            )
        )

    def _decoded(self, state: bytes) -> _State:
        options: NetworkOptions = self.options
        what = f"the saved state of network {self.name!r}"
        saved = self.decoded(_decoder, state)
        if saved.mac != self.mac:
            raise StateError(f"{what} has the address {format_mac(saved.mac)}, and here it is {format_mac(self.mac)}")
        agreed = saved.agreed
        if saved.channels > options.queues or (
            agreed is not None and (agreed.mtu > options.mtu or not agreed.in_use <= agreed.queues <= saved.channels)
        ):
            raise StateError(
                f"{what} has {saved.channels} queues and {agreed}, and here there are {options.queues} queues and an "
                f"MTU of {options.mtu}"
            )
        if set(saved.counters) - set(_COUNTERS):
            raise StateError(f"{what} has unknown counters {sorted(set(saved.counters) - set(_COUNTERS))}")
        return saved

    def check(self, state: bytes) -> None:
        self._decoded(state)

    def restore(self, state: bytes) -> None:
        saved = self._decoded(state)
        self.counters |= saved.counters
        self._agreed = saved.agreed
        self._link = saved.link
        self._link_told = saved.link_told
        self._add_queues(saved.channels)

    @classmethod
    def describe_packet(cls, saved: bytes) -> dict[str, Any]:
        return describe_saved(saved)

    def status(self) -> dict[str, Any]:
        agreed = self._agreed
        return {
            "interface": self.settings.name,
            "namespace": self.settings.namespace,
            "present": self.port is not None and not self._lost_reason,
            "mac": format_mac(self.mac),
            "link": "up" if self._link else "down",
            "guest": None if agreed is None else msgspec.to_builtins(agreed),
            **self.counters,
            "queues": [
                {**queue.counters, "outstanding": queue.outstanding, "in_flight": queue.channel.packets_sent}
                for queue in self.queues
            ],
        }

    def bounds(self) -> dict[str, Bound]:
        return {
            f"bytes to the guest, queue {queue.index}": Bound(queue.outstanding, queue.window, queue.filled)
            for queue in self.queues
        }


def derived_mac(digest: bytes) -> bytes:
    """A station's address, locally administered, from a digest of what it belongs to."""
    return bytes([digest[0] & 0xFC | 0x02]) + digest[1:6]
