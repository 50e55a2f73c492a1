"""The inspection of a live device. Runs on its event loop, so it takes a bounded time: what could be many is counted,
and only the first of them are listed.

Nothing is changed, and nothing that the guest shares is written. Ring words are loaded once each and shown as found.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from vmbus.bus.server import BusServer
from vmbus.device.device import Device
from vmbus.errors import PeerError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.packet import Packet, PacketState
from vmbus.kmcl.server import ServerChannel
from vmbus.memory.guest import GuestMemory
from vmbus.observe.audit.device import RecordingObserver
from vmbus.observe.inspection.document import (
    DEFAULT_PACKETS,
    MOST_PACKETS,
    AuditInfo,
    BoundInfo,
    BusInfo,
    ChannelInfo,
    DirtyLogInfo,
    FaultInfo,
    InFlight,
    Inspection,
    MemoryInfo,
    PacketInfo,
    ProviderInfo,
    RingInfo,
    Source,
    part_of,
)
from vmbus.observe.inspection.parts import (
    bus_info,
    completion_info,
    function_info,
    offer_info,
    packet_info,
    synic_info,
)
from vmbus.observe.inspection.plain import plain
from vmbus.observe.words import Seen, clean, describe
from vmbus.providers import Provider
from vmbus.ring import RingReader, RingWriter
from vmbus.server.services import ProviderServices

_MOST_GPADLS = 512
_MOST_RANGES = 20_000  # that are added up, all GPADLs together


class Owned(Protocol):
    @property
    def channels(self) -> Sequence[ServerChannel]: ...
    @property
    def clients(self) -> Sequence[ClientChannel]: ...


class Listing:
    """How much of the packets is listed: at most `packets` of each sort for each channel, and only of the channels in
    `channels` (names; None: all). The budget is for the whole document."""

    def __init__(self, packets: int = DEFAULT_PACKETS, channels: Iterable[str] | None = None) -> None:
        self.packets = packets
        self._channels = None if channels is None else frozenset(channels)
        self._budget = MOST_PACKETS

    def most(self, channel: str) -> int:
        """How many of a sort may be listed for this channel now."""
        if self._channels is not None and channel not in self._channels:
            return 0
        return max(0, min(self.packets, self._budget // 3))

    def spend(self, packets: int) -> None:
        """So many were listed."""
        self._budget -= packets


def inspect_device(
    name: str,
    config: bytes,
    device: Device,
    providers: Sequence[Provider],
    owners: Mapping[str, Owned],
    listing: Listing,
) -> Inspection:
    """The device `name` as it is now. `owners`: what each provider has, by its name."""
    began = time.perf_counter()
    now = time.monotonic()
    by_name = {provider.name: provider for provider in providers}
    owner_of = {id(channel): owner for owner, owned in owners.items() for channel in owned.channels}
    known = {id(channel) for channel in device.channels}
    channels: list[ChannelInfo] = []

    def add(channel: Channel, owner: str, **more: Any) -> None:
        channels.append(_channel(channel, owner, by_name.get(owner), listing, now, **more))

    for channel in device.channels:
        add(channel, owner_of.get(id(channel), ""), relid=device.relid_of(channel))
    for owner, owned in owners.items():
        for server in owned.channels:
            if id(server) not in known:
                add(server, owner, local=True)
        for client in owned.clients:
            add(client, owner, local=True, end="client")
    document = Inspection(
        source=Source(kind="server", name=name),
        device=name,
        in_flight=sum((channel.in_flight for channel in channels), InFlight()),
        function=function_info(config),
        synic=synic_info(device.synic.save(), device.synic.bad_accesses),
        bus=_bus(device.bus),
        channels=channels,
        providers=[_provider(provider, owners.get(provider.name)) for provider in providers],
        memory=_memory(device.memory),
        audit=_audit(device),
    )
    document.seconds = time.perf_counter() - began
    return document


# ---- channels --------------------------------------------------------------------------------------------------------


def _channel(
    channel: Channel, owner: str, namer: Provider | None, listing: Listing, now: float, **more: Any
) -> ChannelInfo:
    packets, count = _packets(channel, namer, listing.most(channel.name), now)
    listing.spend(len(packets))
    info = ChannelInfo(
        name=channel.name,
        provider=owner,
        interface_type=str(getattr(channel, "interface_type", "")),
        instance="" if channel.interface_instance is None else str(channel.interface_instance),
        subchannel=getattr(channel, "subchannel_index", 0),
        state=channel.state.value,
        started=channel.started,
        quiescing=channel.quiescing,
        blocked=channel.flow.blocked,
        request_bytes=channel.flow.held_bytes,
        pipe=channel.is_pipe,
        next_transaction=channel.next_transaction,
        in_flight=count,
        packets=packets,
        omitted=count.total - len(packets),
        counters=dict(channel.counters),
        **more,
    )
    try:
        if (rings := channel.rings) is not None:
            info.rings = [_ring("incoming", rings[0]), _ring("outgoing", rings[1])]
    except PeerError as error:
        info.rings_problem = str(error)
    return info


def _packets(channel: Channel, namer: Provider | None, most: int, now: float) -> tuple[list[PacketInfo], InFlight]:
    """At most `most` of each sort, and how many there are."""
    seen = channel.in_flight(most)
    type_ = channel.interface_type if isinstance(channel, ServerChannel) else None
    packets = [
        PacketInfo(
            transaction=one.transaction,
            state="held",
            age=now - since,
            completion=one.wanted,
            external=one.has_external_data,
            words="" if type_ is None else describe(type_, Seen(False, one.kind, one.transaction, *one.contents)),
        )
        for one, since in seen.held
    ]
    for entry in [*seen.sent, *seen.waiting]:
        if isinstance(entry, Packet):
            queued = entry.state is PacketState.QUEUED
            info = packet_info(type_, entry, queued=queued)
            info.restored = channel.is_restored(entry)
            if namer is not None and not queued:
                info.words = _sent(namer, entry)
        else:
            info = completion_info(type_, entry.transaction, entry.body)
        info.age = now - entry.since
        packets.append(info)
    return packets, InFlight(seen.queued_count, seen.sent_count, seen.completions_count, seen.held_count)


def _sent(namer: Provider, packet: Packet) -> str:
    try:
        return clean(namer.name_packet(packet))
    except Exception as error:  # it is only looked at: shown, and no reason to fail
        return clean(f"its provider cannot say: {error!r}")


def _ring(direction: Literal["incoming", "outgoing"], ring: RingReader | RingWriter) -> RingInfo:
    counts = {"batches": ring.batches, "signals": ring.signals, "suppressed": ring.batches - ring.signals}
    words: dict[str, Any] = {**ring.describe(), **counts}
    info = RingInfo(direction=direction, own_index=ring.own_index, **words)
    info.judge()
    return info


# ---- the rest --------------------------------------------------------------------------------------------------------


def _bus(bus: BusServer) -> BusInfo:
    info = bus_info(
        bus.state.value,
        bus.version,
        [
            offer_info(one.record, getattr(one.owner, "name", ""), sorted(one.mapped), one.teardowns)
            for one in bus.offers
        ],
        bus.gpadls.complete.values(),
        bus.gpadls.partial.values(),
        offers_requested=bus.offers_requested,
        most=(_MOST_GPADLS, _MOST_RANGES),
    )
    info.rejected = bus.rejected
    return info


def _provider(provider: Provider, owned: Owned | None) -> ProviderInfo:
    info = ProviderInfo(kind=provider.kind, name=provider.name, instance=str(provider.instance))
    host = owned if isinstance(owned, ProviderServices) else None
    if host is not None:
        info.errors = host.faults.count
        info.faults = [part_of(FaultInfo, fault) for fault in host.faults.list]
    try:
        bounds = (host.bounds() if host is not None else {}) | provider.bounds()
        info.bounds = {name: part_of(BoundInfo, bound) for name, bound in bounds.items()}
        info.status = plain(dict(provider.status()))
    except Exception as error:  # an author's code: the rest is shown all the same
        info.problem = f"status() raised {error!r}"
    return info


def _memory(memory: GuestMemory) -> MemoryInfo:
    regions = memory.mapped()
    info = MemoryInfo(regions=len(regions), bytes=sum(size for _, size, _ in regions), log=None)
    if (log := memory.log) is not None:
        info.log = DirtyLogInfo(pages=len(log.pages), bytes=4096 * len(log.pages), broken=log.broken or "")
    return info


def _audit(device: Device) -> AuditInfo | None:
    for observer in device.observers:
        if isinstance(observer, RecordingObserver):
            one = observer.recorder
            return AuditInfo(uid=one.uid, position=one.position, path=one.path, failed=one.failed)
    return None
