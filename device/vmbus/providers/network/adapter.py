"""The card as RNDIS has it: control messages and what they set, the filter, and frames in both directions."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any
from uuid import UUID

from vmbus.kmcl.completion import Completion
from vmbus.kmcl.status import Status as PacketStatus
from vmbus.providers.base import Host, Timer
from vmbus.providers.network import oids
from vmbus.providers.network.backlog import Backlog
from vmbus.providers.network.card import COUNTERS, DRAIN_BYTES, FRAMES_PER_TURN, Card
from vmbus.providers.network.departure import LINK_SECONDS, calm
from vmbus.providers.network.lent import Lent
from vmbus.providers.network.offload import to_guest, to_host
from vmbus.providers.network.queue import Kind, Queue, Sent
from vmbus.providers.network.spread import Spread
from vmbus.util.complaints import bounded_log
from vmbus.wire import nvsp, rndis
from vmbus.wire.ethernet import OFFLOAD_SIZE, check_frame

log = bounded_log(__name__)

MOST_CONTROL = 64
"""Control messages to the guest that wait for room."""
MTU_UNSAID = 1500
"""That of a guest that says nothing of one, as the oldest version has it."""
MOST_FRAMES = 64
"""Frames of the guest's in one packet; it is told of fewer."""

OK = nvsp.rndis_complete(nvsp.Status.SUCCESS)
FAILED = nvsp.rndis_complete(nvsp.Status.FAILURE)
BAD_RNDIS = nvsp.rndis_complete(nvsp.Status.INVALID_RNDIS)

_OWN_COUNTERS = ("filtered", "control", "backlog_lost")
ALL_COUNTERS = (*COUNTERS, *_OWN_COUNTERS)


class Adapter(Card):
    """See the module's text. The channels, and what NVSP says on them, are `NetworkProvider`'s.

    Attributes:
        queues: the channels, the primary one first. backlog: frames that the guest has not got, from before a pause.
    """

    queues: list[Queue]

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        self.counters |= dict.fromkeys(_OWN_COUNTERS, 0)
        self.backlog = Backlog(DRAIN_BYTES)
        self._control: deque[tuple[Kind, bytes]] = deque()
        self._touched: dict[Queue, None] = {}
        self._going = False  # it is about to be withdrawn
        self._heard = 0  # packets of the guest's
        self._link_timer: Timer | None = None  # while the guest may still be at the last change of the link
        self._use_address(self.mac)
        self._forget()

    def _forget(self) -> None:
        """As it is when a guest has just opened the card."""
        self._version = 0
        self._mtu = min(self.options.mtu, MTU_UNSAID)
        self._receive: Lent | None = None
        self._receive_size = self._page_set = 0
        self._send: Lent | None = None
        self._send_size = self._send_id = 0
        self._halt()

    def _halt(self) -> None:
        self._initialized = False
        self._filter = 0
        self._coalescing = False
        self._spread = Spread()
        self._control.clear()
        self.backlog.clear()
        self._link_told = True
        self._link_in_flight = False

    # ---- the interface: see Card -------------------------------------------------------------------------------------

    @property
    def _guest_there(self) -> bool:
        if self._going or not self._initialized or not self._filter:
            return False
        return self._receive is not None and self.queues[0].open

    @property
    def _guest_ready(self) -> bool:
        if not self._guest_there or not self.queues[0].channel.active or self.backlog:
            return False
        return all(queue.has_room for queue in self._in_use)

    @property
    def _in_use(self) -> list[Queue]:
        queues = self.queues
        return [queues[index] for index in self._spread.queues if index < len(queues)]

    @property
    def _guest_mtu(self) -> int | None:
        return self._mtu if self._version else None

    @property
    def _guest_offload(self) -> bool | None:
        return self._coalescing

    def _to_guest(self, frame: bytes) -> None:
        if not self._passes(frame):
            self.counters["filtered"] += 1
        elif self.backlog or not self.queues[0].channel.active:
            self.counters["backlog_lost"] += not self.backlog.append(frame)
        else:
            self._hand_over(frame)

    def _hand_over(self, frame: bytes) -> None:
        queue = self._queue_of(frame)
        queue.add(to_guest(frame))
        self._touched[queue] = None

    def _queue_of(self, frame: bytes) -> Queue:
        index = self._spread.queue_of(frame)
        return self.queues[index if index < len(self.queues) and self.queues[index].channel.active else 0]

    def _passes(self, frame: bytes) -> bool:
        """Whether the guest's filter lets a frame through."""
        wanted, first = self._filter, frame[OFFLOAD_SIZE]
        if wanted & oids.FILTER_PROMISCUOUS:
            return True
        if not first & 1:
            return bool(wanted & oids.FILTER_DIRECTED) and frame.startswith(self._stations, OFFLOAD_SIZE)
        if frame.startswith(b"\xff" * 6, OFFLOAD_SIZE):
            return bool(wanted & oids.FILTER_BROADCAST)
        return bool(wanted & (oids.FILTER_MULTICAST | oids.FILTER_ALL_MULTICAST))

    def _flush(self) -> None:
        touched, self._touched = self._touched, {}
        for queue in touched:
            queue.flush()

    def _deliver_backlog(self) -> None:
        """Frames from before a pause, as far as there is room; in turns."""
        if not self.backlog or not self.queues[0].channel.active:
            return
        for _ in range(FRAMES_PER_TURN):
            if not self.backlog or not self._queue_of(self.backlog.first).has_room:
                break
            self._hand_over(self.backlog.popleft())
        self._flush()
        if self.backlog and self._queue_of(self.backlog.first).has_room:
            self.host.call_soon(self._deliver_backlog)
        self._read_on()

    def _completed(self, _: Queue, sent: Sent, status: int) -> None:
        """The guest has taken a packet (or its channel was closed, or the packet was restored: PENDING)."""
        if sent.kind is Kind.LINK:
            self._link_in_flight = status == PacketStatus.PENDING
        if status != PacketStatus.SUCCESS:
            return
        if sent.kind is not Kind.FRAMES:
            self._send_control()
            self._tell_link()
        if self.backlog:
            self._deliver_backlog()
        elif not self._reading:
            self._read_on()

    # ---- from the guest ----------------------------------------------------------------------------------------------

    def _refuse(self, completion: Completion, reply: bytes, why: object) -> None:
        self.counters["refused"] += 1
        log.warning("network %s: the guest's %s is refused", self.name, why)
        completion.complete(reply)

    def _take_frames(self, completion: Completion, data: bytes) -> None:
        """Frames for the host: those before one that makes no sense are sent."""
        try:
            for number, one in enumerate(rndis.messages(data)):
                if number >= MOST_FRAMES:
                    raise rndis.RndisError(f"more than {MOST_FRAMES} frames")
                found = rndis.parse(one)
                if not isinstance(found, rndis.Packet):
                    raise rndis.RndisError("control message among frames")
                self._from_guest(found)
        except rndis.RndisError as error:
            self._refuse(completion, BAD_RNDIS, f"packet ({error})")
            return
        completion.complete(OK)

    def _from_guest(self, packet: rndis.Packet) -> None:
        """A frame for the host. Raises RndisError."""
        frame = to_host(packet, self.options.offload)
        # A guest that has lowered its MTU still sends what had waited.
        if wrong := check_frame(frame, self.options.mtu, self.options.offload):
            raise rndis.RndisError(wrong)
        if not self._link:
            self.counters["no_link"] += 1
        else:
            self._to_host(frame)

    def _take_control(self, completion: Completion, data: bytes) -> None:
        """Control messages: the packet is completed, then they are answered by messages of their own."""
        if len(self._control) >= MOST_CONTROL:
            self._refuse(completion, FAILED, "control message, with all those that wait,")
            return
        try:
            found = [rndis.parse(one) for one in rndis.messages(data)]
            if len(found) != 1 or isinstance(found[0], rndis.Packet):
                raise rndis.RndisError(f"{len(found)} control messages in a packet, or a frame among them")
        except rndis.RndisError as error:
            self._refuse(completion, BAD_RNDIS, f"packet ({error})")
            return
        completion.complete(OK)
        self.counters["control"] += 1
        self._answer(found[0])
        self._send_control()

    def _answer(self, message: rndis.Message) -> None:
        match message:
            case rndis.Initialize(request):
                self._initialized = True
                self._change_mtu(self._mtu)  # a guest that says nothing of an MTU has another one than its predecessor
                self._say(rndis.initialize_complete(request))
            case rndis.Halt():
                self._halt()
                self._update()
            case rndis.Reset():
                self._filter = 0
                self._say(rndis.reset_complete())
                self._update()
            case rndis.Keepalive(request):
                self._say(rndis.keepalive_complete(request))
            case rndis.Query(request, oid):
                self._say(self._query(request, oid))
            case rndis.Set(request, oid, data):
                status = self._set(oid, data) if self._initialized else rndis.Status.FAILURE
                if status:
                    self.counters["refused"] += 1
                self._say(rndis.set_complete(request, status))

    def _query(self, request: int, oid: int) -> bytes:
        data = oids.answer(self, oid) if self._initialized else None
        if oid == oids.MEDIA_CONNECT_STATUS:
            self._link_told = self.link_up
        if data is None:
            return rndis.query_complete(request, rndis.Status.NOT_SUPPORTED)
        return rndis.query_complete(request, rndis.Status.SUCCESS, data)

    def _set(self, oid: int, data: bytes) -> int:
        if oid == oids.PACKET_FILTER:
            if len(data) < 4:
                return rndis.Status.INVALID_DATA
            self._filter = int.from_bytes(data[:4], "little")
            if not self._filter:
                self.backlog.clear()
            self._update()
        elif oid == oids.OFFLOAD_PARAMETERS:
            if not oids.offload_parameters(data):
                return rndis.Status.INVALID_DATA
            wanted = oids.coalescing_wanted(data)
            if wanted is not None:
                self._coalescing = wanted and self.offers_coalescing
                self._use_offload(self._coalescing)
        elif oid == oids.RSS_PARAMETERS:
            spread = oids.rss_parameters(data, len(self.queues), self._spread)
            if spread is None:
                return rndis.Status.INVALID_DATA
            self._spread = spread
            self._update()
        elif oid in (oids.CURRENT_ADDRESS, oids.CONFIG_PARAMETER):
            return self._set_address(oid, data)
        elif oid != oids.MULTICAST_LIST:
            return rndis.Status.NOT_SUPPORTED
        return rndis.Status.SUCCESS

    def _set_address(self, oid: int, data: bytes) -> int:
        """The guest wants another Ethernet address, or its own again."""
        if oid == oids.CONFIG_PARAMETER:
            name, text = oids.config_parameter(data) or ("", "")
            if name != "NetworkAddress":
                return rndis.Status.NOT_SUPPORTED if name else rndis.Status.INVALID_DATA
            wanted = oids.station(text) if text else self.mac
        else:
            wanted = oids.station(data.hex())
        if wanted is None:
            return rndis.Status.INVALID_DATA
        self._use_address(wanted)
        self._announce()
        return rndis.Status.SUCCESS

    def _use_address(self, address: bytes) -> None:
        """Frames for its own one reach the guest all the same: a driver that begins anew takes that one again."""
        self.address = address
        self._stations = (self.mac, address)

    def _say(self, message: bytes, kind: Kind = Kind.CONTROL) -> None:
        self._control.append((kind, message))

    def _send_control(self) -> None:
        """What waits, as far as there is room for it."""
        queue = self.queues[0]
        while self._control and queue.channel.active and queue.has_control_room(len(self._control[0][1])):
            kind, message = self._control.popleft()
            queue.control(message, kind)

    def _tell_link(self) -> None:
        """One message at a time: what changed meanwhile is told when the guest has taken it."""
        if not self._initialized or self._link_in_flight or self.link_up is self._link_told or not self.queues[0].open:
            return
        self._link_in_flight, self._link_told = True, self.link_up
        self._forget_link()
        self._link_timer = self.host.call_later(LINK_SECONDS, self._forget_link)
        status = rndis.Status.MEDIA_CONNECT if self._link_told else rndis.Status.MEDIA_DISCONNECT
        self._say(rndis.indicate(status), Kind.LINK)
        self._send_control()

    def _forget_link(self) -> None:
        timer, self._link_timer = self._link_timer, None
        if timer is not None:
            timer.cancel()

    def _close_port(self) -> None:
        self._forget_link()
        super()._close_port()

    # ---- its end -----------------------------------------------------------------------------------------------------

    def depart(self) -> Future[None] | None:
        """See `departure`."""
        if not self._initialized or not self.queues[0].open:
            return None
        settled = self._link_timer is None
        self._going = True
        self._update()
        self._tell_link()
        return calm(self.host, list(self.queues), lambda: self._heard, settled)

    def stay(self) -> None:
        """It is not withdrawn after all."""
        self._going = False
        self._update()
        self._tell_link()

    # ---- what OIDs tell ----------------------------------------------------------------------------------------------

    @property
    def mtu(self) -> int:
        """The largest that the guest may have."""
        return int(self.options.mtu)

    @property
    def offers_offload(self) -> bool:
        """Whether the guest may leave checksums and segmentation to us."""
        return bool(self.options.offload)

    @property
    def offers_coalescing(self) -> bool:
        """Whether it may get frames that are longer than its MTU."""
        return bool(self.options.offload) and self._version >= nvsp.VERSION_6_1

    @property
    def queue_count(self) -> int:
        return int(self.options.queues)

    @property
    def link_up(self) -> bool:
        """As tools want it, while the interface is of use, and the card here to stay."""
        return self._link and not self._going and self._trouble is None

    @property
    def filter(self) -> int:
        return self._filter

    @property
    def statistics(self) -> dict[str, int]:
        return self.counters
