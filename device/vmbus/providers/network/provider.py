"""The network provider: joins channels and the host's interface. See docs/provider-network.md."""

import ipaddress
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec

from vmbus.complaints import bounded_log
from vmbus.errors import StateError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.status import Status as PacketStatus
from vmbus.providers.base import Bound, Host
from vmbus.providers.network.card import COUNTERS, Card, CardOptions, InterfaceName
from vmbus.providers.network.interface import Settings
from vmbus.providers.network.queue import Kind, Queue, Sent, describe_saved
from vmbus.records import Count
from vmbus.wire.ethernet import (
    MTU_MAXIMUM,
    MTU_MINIMUM,
    QUEUES_MAXIMUM,
    check_frame,
    flow_hash,
    format_mac,
    frame_limit,
)
from vmbus.wire.network import (
    MESSAGE_LIMIT,
    NETWORK_TYPE,
    VERSION,
    Feature,
    Frames,
    Hello,
    Nic,
    Queues,
    Status,
    message_size,
    pack_reply,
    parse,
)

log = bounded_log(__name__)


class NetworkOptions(CardOptions, frozen=True, forbid_unknown_fields=True):
    """See docs/provider-network.md."""

    guest_interface: InterfaceName = "vmnet0"
    guest_address: str | None = None
    guest_gateway: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
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


class NetworkProvider(Card):
    """See the package's text."""

    kind = "network"
    Options = NetworkOptions

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        self._agreed: _Agreed | None = None
        self._link_told = True  # as the guest knows it
        self._link_in_flight = False
        self._touched: dict[Queue, None] = {}  # queues that frames were added to
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

    def _settings(self, mtu: int) -> Settings:
        """With the guest's address known from the beginning, where it is on the interface's own network."""
        settings, options = super()._settings(mtu), self.options
        if self._carrier and options.address is not None and options.guest_address is not None:
            address = ipaddress.IPv4Interface(options.guest_address).ip
            if address in ipaddress.ip_interface(options.address).network:
                settings = settings._replace(neighbour=(str(address), self.mac))
        return settings

    # ---- the interface -------------------------------------------------------------------------------------------

    @property
    def _guest_there(self) -> bool:
        return self._agreed is not None and self.queues[0].open

    @property
    def _guest_ready(self) -> bool:
        if self._agreed is None or not self.queues[0].channel.active:
            return False
        return all(queue.has_room for queue in self.queues[: self._agreed.in_use])

    @property
    def _guest_mtu(self) -> int | None:
        return None if self._agreed is None else self._agreed.mtu

    @property
    def _guest_offload(self) -> bool | None:
        return None if self._agreed is None else bool(self._agreed.features & Feature.OFFLOAD)

    def _to_guest(self, frame: bytes) -> None:
        """Into the queue of the frame's flow."""
        in_use = 1 if self._agreed is None else self._agreed.in_use
        queue = self.queues[flow_hash(frame) % in_use if in_use > 1 else 0]
        queue.add(frame)
        self._touched[queue] = None

    def _flush(self) -> None:
        touched, self._touched = self._touched, {}
        for queue in touched:
            with queue.channel.batch():
                queue.flush()

    def _completed(self, _: Queue, sent: Sent, status: int) -> None:
        """The guest has taken a packet (or its channel was closed, or the packet was restored: PENDING)."""
        if sent.kind is Kind.LINK:
            self._link_in_flight = status == PacketStatus.PENDING
            if status == PacketStatus.SUCCESS:
                self._link_told = bool(sent.count)
                self._tell_link()
        elif status == PacketStatus.SUCCESS and not self._reading:
            self._read_on()

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
        self._agreed = _Agreed(int(features), mtu, count, 1)
        self._use_offload(bool(features & Feature.OFFLOAD))
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
        agreed, counters = self._agreed, self.counters
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
            taken += self._to_host(frame)
        completion.complete(pack_reply(Status.OK if taken == len(frames) else Status.INVALID, taken))

    # ---- the link ------------------------------------------------------------------------------------------------

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
        if set(saved.counters) - set(COUNTERS):
            raise StateError(f"{what} has unknown counters {sorted(set(saved.counters) - set(COUNTERS))}")
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
            **super().status(),
            "guest": None if agreed is None else msgspec.to_builtins(agreed),
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
