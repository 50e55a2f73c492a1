"""The inspection of a live device. Runs on its event loop, so it takes a bounded time: what could be many is counted,
and only the first of them are listed.

Nothing is changed, and nothing that the guest shares is written. Ring words are loaded once each and shown as found.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from vmbus.bus.offers import Offer
from vmbus.bus.server import BusServer
from vmbus.device.device import Device
from vmbus.errors import PeerError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.server import ServerChannel
from vmbus.memory.guest import GuestMemory
from vmbus.observe.inspection.document import (
    DEFAULT_PACKETS,
    MOST_PACKETS,
    AuditInfo,
    BoundInfo,
    BusInfo,
    ChannelInfo,
    DirtyLogInfo,
    FaultInfo,
    GpadlInfo,
    InFlight,
    Inspection,
    MemoryInfo,
    OfferInfo,
    OpenInfo,
    PacketInfo,
    PartialInfo,
    ProviderInfo,
    RingInfo,
    Source,
)
from vmbus.observe.inspection.plain import (
    function_info,
    kind_name,
    plain,
    preview,
    queued_words,
    synic_info,
    version_name,
)
from vmbus.observe.words import Seen, clean, describe
from vmbus.providers import Provider
from vmbus.ring import RingReader, RingWriter
from vmbus.server.services import ProviderServices
from vmbus.wire.packet import PacketType

_MOST_GPADLS = 512
_MOST_RANGES = 20_000  # that are added up, all GPADLs together
_MESSAGES = 16
_COMPLETION = int(PacketType.COMPLETION)


class Owned(Protocol):
    """What one provider has."""

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
        self.providers: Mapping[str, Provider] = {}

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
    channels: list[ChannelInfo] = []
    owner_of = {id(channel): owner for owner, owned in owners.items() for channel in owned.channels}
    listing.providers = {provider.name: provider for provider in providers}
    for channel in device.channels:
        channels.append(_server_channel(channel, owner_of.get(id(channel), ""), device.relid_of(channel), listing, now))
    known = {id(channel) for channel in device.channels}
    for owner, owned in owners.items():
        for server in owned.channels:
            if id(server) not in known:
                channels.append(_server_channel(server, owner, 0, listing, now, local=True))
        channels += [_client_channel(client, owner, listing, now) for client in owned.clients]
    document = Inspection(
        source=Source(kind="server", name=name),
        device=name,
        in_flight=sum((channel.in_flight for channel in channels), InFlight()),
        function=function_info(config),
        synic=synic_info(
            enabled=device.synic.enabled,
            fault=device.synic.fault,
            registers=device.synic.values,
            post_status=device.synic.post_status,
            outbox=[device.synic.outbox[index] for index in range(min(_MESSAGES, len(device.synic.outbox)))],
            waiting=len(device.synic.outbox),
            bad_accesses=device.synic.bad_accesses,
        ),
        bus=_bus(device.bus),
        channels=channels,
        providers=[_provider(provider, owners.get(provider.name)) for provider in providers],
        memory=_memory(device.memory),
        audit=_audit(device),
    )
    document.seconds = time.perf_counter() - began
    return document


# ---- channels --------------------------------------------------------------------------------------------------------


def _server_channel(
    channel: ServerChannel, owner: str, relid: int, listing: Listing, now: float, *, local: bool = False
) -> ChannelInfo:
    info = _channel(channel, owner, listing, now)
    info.interface_type = str(channel.interface_type)
    info.relid = relid
    info.local = local
    return info


def _client_channel(channel: ClientChannel, owner: str, listing: Listing, now: float) -> ChannelInfo:
    info = _channel(channel, owner, listing, now)
    info.interface_type = str(channel.interface_type)
    info.end = "client"
    info.local = True
    return info


def _channel(channel: Channel, owner: str, listing: Listing, now: float) -> ChannelInfo:
    seen = channel.in_flight(listing.most(channel.name))
    server = isinstance(channel, ServerChannel)
    packets = [
        PacketInfo(
            transaction=completion.transaction,
            state="held",
            age=now - since,
            completion=completion.wanted,
            external=completion.has_external_data,
            words=_words(channel, completion.kind, completion.transaction, *completion.contents, to_guest=not server),
        )
        for completion, since in seen.held
    ]
    namer = listing.providers.get(owner)
    packets += [_packet(channel, packet, now, namer) for packet in seen.sent]
    for entry in seen.waiting:
        if isinstance(entry, Packet):
            packets.append(_packet(channel, entry, now, namer))
        else:
            packets.append(
                PacketInfo(
                    transaction=entry.transaction,
                    state="completion",
                    age=now - entry.since,
                    kind="completion",
                    size=len(entry.body),
                    body=preview(entry.body),
                    words=_words(channel, _COMPLETION, entry.transaction, b"", entry.body, to_guest=server),
                )
            )
    listing.spend(len(packets))
    count = InFlight(seen.queued_count, seen.sent_count, seen.completions_count, seen.held_count)
    info = ChannelInfo(
        name=channel.name,
        provider=owner,
        interface_type="",
        instance="" if channel.interface_instance is None else str(channel.interface_instance),
        subchannel=getattr(channel, "subchannel_index", 0),
        relid=0,
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
    )
    rings = channel.rings
    if rings is not None:
        try:
            info.rings = [_ring("incoming", rings[0]), _ring("outgoing", rings[1])]
        except PeerError as error:
            info.rings_problem = str(error)
    return info


def _packet(channel: Channel, packet: Packet, now: float, namer: Provider | None) -> PacketInfo:
    queued = packet.state.value == "queued"
    return PacketInfo(
        transaction=packet.transaction,
        state="queued" if queued else "sent",
        age=now - packet.since,
        restored=channel.is_restored(packet),
        kind=kind_name(packet.kind),
        completion=packet.flags != 0,
        size=len(packet.body) if queued else None,
        body=preview(packet.body) if queued else "",
        words=_queued(channel, packet) if queued else _sent(namer, packet),
    )


def _queued(channel: Channel, packet: Packet) -> str:
    if not isinstance(channel, ServerChannel):
        return ""
    return queued_words(channel.interface_type, packet.kind, packet.transaction, packet.offset8, packet.body)


def _sent(namer: Provider | None, packet: Packet) -> str:
    if namer is None:
        return ""
    try:
        return clean(namer.name_packet(packet))
    except Exception as error:  # it is only looked at: shown, and no reason to fail
        return clean(f"its provider cannot say: {error!r}")


def _words(channel: Channel, kind: int, transaction: int, body: bytes, payload: bytes, *, to_guest: bool) -> str:
    type_ = getattr(channel, "interface_type", None)
    return "" if type_ is None else describe(type_, Seen(to_guest, kind, transaction, body, payload))


def _ring(direction: str, ring: RingReader | RingWriter) -> RingInfo:
    words = ring.describe()
    info = RingInfo(
        direction="incoming" if direction == "incoming" else "outgoing",
        size=words["size"],
        write_index=words["write_index"],
        read_index=words["read_index"],
        interrupt_mask=words["interrupt_mask"],
        pending_send_size=words["pending_send_size"],
        feature_bits=words["feature_bits"],
        own_index=ring.own_index,
        batches=ring.batches,
        signals=ring.signals,
        suppressed=ring.batches - ring.signals,
    )
    info.judge()
    return info


# ---- the bus ---------------------------------------------------------------------------------------------------------


def _bus(bus: BusServer) -> BusInfo:
    rings = {(offer.relid, offer.request.ring_gpadl) for offer in bus.offers if offer.request is not None}
    mapped = {(offer.relid, handle) for offer in bus.offers for handle in offer.mapped}
    leaving = {(offer.relid, handle) for offer in bus.offers for handle in offer.teardowns}
    gpadls: list[GpadlInfo] = []
    ranges = 0
    for key, gpadl in bus.gpadls.complete.items():
        ranges += len(gpadl.ranges)
        if len(gpadls) >= _MOST_GPADLS or ranges > _MOST_RANGES:
            break
        gpadls.append(
            GpadlInfo(
                relid=gpadl.relid,
                handle=gpadl.handle,
                bytes=gpadl.size,
                pages=sum(len(one.pfns) for one in gpadl.ranges),
                ranges=len(gpadl.ranges),
                address=first_address(gpadl.ranges[0].pfns, gpadl.ranges[0].byte_offset) if gpadl.ranges else 0,
                use="rings" if key in rings else "mapped" if key in mapped else "",
                tearing_down=key in leaving,
            )
        )
    return BusInfo(
        state=bus.state.value,
        version=version_name(bus.version) if bus.version else "",
        offers_requested=bus.offers_requested,
        rejected=bus.rejected,
        offers=[_offer(offer) for offer in bus.offers],
        gpadls=gpadls,
        gpadls_omitted=len(bus.gpadls.complete) - len(gpadls),
        partial=[
            PartialInfo(
                relid=one.relid,
                handle=one.handle,
                range_bytes=one.range_bytes,
                range_count=one.range_count,
                received=len(one.data),
            )
            for one in bus.gpadls.partial.values()
        ],
    )


def first_address(pfns: Sequence[int], byte_offset: int) -> int:
    """The I/O address at which a range begins."""
    return pfns[0] * 4096 + byte_offset if pfns else 0


def _offer(offer: Offer) -> OfferInfo:
    request = offer.request
    return OfferInfo(
        relid=offer.relid,
        state=offer.state.value,
        channel=getattr(offer.owner, "name", ""),
        interface_type=str(offer.interface_type),
        instance=str(offer.instance),
        subchannel=offer.subchannel,
        withdrawn=not offer.wanted,
        open=None
        if request is None
        else OpenInfo(
            open_id=request.open_id,
            ring_gpadl=request.ring_gpadl,
            target_vp=request.target_vp,
            downstream_page_offset=request.downstream_page_offset,
            user_data=request.user_data.rstrip(b"\0").hex(),
        ),
        mapped=sorted(offer.mapped),
        teardowns=list(offer.teardowns),
    )


# ---- the rest --------------------------------------------------------------------------------------------------------


def _provider(provider: Provider, owned: Owned | None) -> ProviderInfo:
    info = ProviderInfo(kind=provider.kind, name=provider.name, instance=str(provider.instance))
    host = owned if isinstance(owned, ProviderServices) else None
    if host is not None:
        info.errors = host.faults.count
        info.faults = [FaultInfo(**fault._asdict()) for fault in host.faults.list]
    try:
        bounds = (host.bounds() if host is not None else {}) | provider.bounds()
        info.bounds = {name: BoundInfo(**bound._asdict()) for name, bound in bounds.items()}
        info.status = plain(dict(provider.status()))
    except Exception as error:  # an author's code: the rest is shown all the same
        info.problem = f"status() raised {error!r}"
    return info


def _memory(memory: GuestMemory) -> MemoryInfo:
    regions = memory.mapped()
    log = memory.log
    return MemoryInfo(
        regions=len(regions),
        bytes=sum(size for _, size, _ in regions),
        log=None
        if log is None
        else DirtyLogInfo(pages=len(log.pages), bytes=4096 * len(log.pages), broken=log.broken or ""),
    )


def _audit(device: Device) -> AuditInfo | None:
    recorder = device.recorder
    if recorder is None:
        return None
    return AuditInfo(uid=recorder.uid, position=recorder.position, path=recorder.path, failed=recorder.failed)
