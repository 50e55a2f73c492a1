"""The device's saved state: one documented, versioned, checksummed file.

Layout: 8 bytes of magic `VMBSTATE`, u32 format version, u32 reserved 0, u64 length of the body, 32 bytes SHA-256 of the
body, then the body: a MessagePack map (docs/state-format.md). Decoding trusts nothing: magic, version, length, digest,
then every field's type and range, then whether it fits the device it is to be restored into.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from struct import Struct
from typing import Annotated, Any, NamedTuple
from uuid import UUID

import msgspec

from vmbus.audit.recorder import LanePosition, LifePosition
from vmbus.bus.gpadl import Gpadl, PartialGpadl
from vmbus.bus.server import ConnectionState, Offer, OfferState, OpenRequest
from vmbus.complaints import bounded_log
from vmbus.device import Device
from vmbus.errors import PeerError, StateError, UsageError
from vmbus.kmcl.saved import ChannelChunk, PacketChunk, decode_chunk, decode_lib
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.states import ChannelState
from vmbus.kmcl.status import KmclError
from vmbus.providers.base import Provider
from vmbus.synic import WRITABLE_REGISTERS, PostStatus, page_extents
from vmbus.vfio_user.pci import COMMAND, COMMAND_BUS_MASTER
from vmbus.wire import messages as m
from vmbus.wire.gpa import GpaRange, page_count

log = bounded_log(__name__)

MAGIC = b"VMBSTATE"
FORMAT_VERSION = 1
# The oldest format that can still be restored; apart from what we write.
OLDEST_VERSION = 1
MAX_BODY = 1 << 30

_HEAD = Struct("<8sIIQ32s")
HEAD_SIZE = _HEAD.size

# Of each structure below, for a change that a new optional field cannot express.
OLDEST_STRUCTURE_VERSION = 1
NEWEST_STRUCTURE_VERSION = 1
StructVersion = Annotated[int, msgspec.Meta(ge=OLDEST_STRUCTURE_VERSION, le=NEWEST_STRUCTURE_VERSION)]

U16 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
U64 = Annotated[int, msgspec.Meta(ge=0)]
PacketCount = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Relid = Annotated[int, msgspec.Meta(ge=0, le=2047)]
Guid = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class SynicState(msgspec.Struct, frozen=True):
    """Registers, and messages that the guest has not taken."""

    enabled: bool
    fault: bool
    registers: dict[U16, U32]
    post_status: U32
    outbox: list[Annotated[bytes, msgspec.Meta(min_length=8, max_length=240)]]
    structure_version: StructVersion = 1


class OpenState(msgspec.Struct, frozen=True):
    """The guest's OPENCHANNEL."""

    open_id: U32
    ring_gpadl: U32
    target_vp: U32
    downstream_page_offset: U32
    user_data: Annotated[bytes, msgspec.Meta(max_length=120)]
    structure_version: StructVersion = 1


class OfferStateRecord(msgspec.Struct, frozen=True):
    """One offer, by its GUIDs. `withdrawn`: its owner is gone, and the guest has yet to release the relid."""

    interface_type: Guid
    instance: Guid
    subchannel: U16
    relid: Relid
    state: str
    open: OpenState | None
    withdrawn: bool = False
    structure_version: StructVersion = 1


class RangeState(msgspec.Struct, frozen=True, array_like=True):
    """One GPA range."""

    byte_count: U32
    byte_offset: Annotated[int, msgspec.Meta(ge=0, le=4095)]
    pfns: list[Annotated[int, msgspec.Meta(ge=0, le=(1 << 52) - 1)]]


class GpadlState(msgspec.Struct, frozen=True):
    """A complete GPADL. `tearing_down`: the guest wants it back, and the channel's owner had it mapped."""

    relid: Relid
    handle: U32
    ranges: list[RangeState]
    tearing_down: bool = False
    structure_version: StructVersion = 1


class PartialState(msgspec.Struct, frozen=True):
    """A GPADL of which some messages are still to come."""

    relid: Relid
    handle: U32
    range_bytes: U16
    range_count: U16
    data: Annotated[bytes, msgspec.Meta(max_length=65536)]
    structure_version: StructVersion = 1


class BusState(msgspec.Struct, frozen=True):
    """The connection, offers and GPADLs."""

    connected: bool
    version: U32
    offers_requested: bool
    offers: list[OfferStateRecord]
    gpadls: list[GpadlState]
    partial: list[PartialState]
    structure_version: StructVersion = 1


class RingRecord(msgspec.Struct, frozen=True):
    """The words that a ring's two ends share, as they were at the save. For people: a restore looks at the ring."""

    size: U32
    write_index: U32
    read_index: U32
    interrupt_mask: U32
    pending_send_size: U32
    structure_version: StructVersion = 1


class ChannelRecord(msgspec.Struct, frozen=True):
    """One channel's chunks, see `vmbus.kmcl.saved`. `incoming`, `outgoing`: its rings, while it was open."""

    instance: Guid
    chunks: list[bytes]
    subchannel: U16 = 0
    incoming: RingRecord | None = None
    outgoing: RingRecord | None = None
    structure_version: StructVersion = 1


class ProviderRecord(msgspec.Struct, frozen=True):
    """One provider: what it is, and its own bytes."""

    kind: str
    name: str
    instance: Guid
    state: bytes
    structure_version: StructVersion = 1


class LifeRecord(msgspec.Struct, frozen=True):
    """Where the audit record of an open channel is: packets so far in each direction, and the CRC-32 of their bytes."""

    instance: Guid
    subchannel: U16
    nonce: Guid
    put: PacketCount
    put_crc: U32
    taken: PacketCount
    taken_crc: U32
    structure_version: StructVersion = 1


class AuditState(msgspec.Struct, frozen=True):
    """Which audit record the server wrote, and how many of its events came before the save."""

    uid: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    position: U64
    lives: list[LifeRecord]
    structure_version: StructVersion = 1


class DeviceState(msgspec.Struct, frozen=True):
    """Everything the server holds about one device. `config` is the 256-byte PCI configuration space."""

    device: str
    config: Annotated[bytes, msgspec.Meta(min_length=256, max_length=256)]
    synic: SynicState
    bus: BusState
    channels: list[ChannelRecord]
    providers: list[ProviderRecord]
    audit: AuditState | None = None


class Counts(msgspec.Struct, frozen=True):
    """Packets in a saved state, by their state at the save; `completions` wait for room in a ring."""

    queued: int
    sent: int
    completions: int


class Restored(NamedTuple):
    """What a restore brought back: `packets`, and those `dropped` with channels that were made anew (`renewed`)."""

    packets: Counts
    dropped: Counts
    renewed: int


_decoder = msgspec.msgpack.Decoder(DeviceState)


def encode(state: DeviceState) -> bytes:
    """The file's bytes."""
    body = msgspec.msgpack.encode(state)
    if len(body) > MAX_BODY:
        raise StateError(f"the state has {len(body)} bytes, more than the {MAX_BODY} that can be restored")
    return _HEAD.pack(MAGIC, FORMAT_VERSION, 0, len(body), hashlib.sha256(body).digest()) + body


def expected_size(head: bytes) -> int:
    """How many bytes a state has, head included, by its first HEAD_SIZE bytes. Raises StateError as `decode` does."""
    length, _ = _parse_head(head)
    if length > MAX_BODY:
        raise StateError(f"device state announces a body of {length} bytes; at most {MAX_BODY} can be restored")
    return _HEAD.size + length


def _parse_head(data: bytes) -> tuple[int, bytes]:
    """Length and digest of the body."""
    if len(data) < _HEAD.size:
        raise StateError(f"device state of {len(data)} bytes is cut short: the head alone has {_HEAD.size}")
    magic, version, reserved, length, digest = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise StateError(f"this is not device state: it starts with {magic!r}, not {MAGIC!r}")
    if not OLDEST_VERSION <= version <= FORMAT_VERSION:
        raise StateError(
            f"device state has format version {version}; this program restores {OLDEST_VERSION} to {FORMAT_VERSION}"
        )
    if reserved:
        raise StateError(f"device state is damaged: a reserved word of its head is {reserved:#x}")
    return length, digest


def decode(data: bytes) -> DeviceState:
    """The state in a file's bytes. Raises StateError saying what is wrong with them."""
    length, digest = _parse_head(data)
    body = data[_HEAD.size :]
    if length != len(body) or length > MAX_BODY:
        raise StateError(f"device state has a body of {len(body)} bytes where its head says {length}")
    if hashlib.sha256(body).digest() != digest:
        raise StateError("device state is damaged: its SHA-256 does not match")
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, ValueError) as error:
        raise StateError(f"device state is not valid: {error}") from error


def count_packets(state: DeviceState) -> Counts:
    """How many packets a state holds. Raises StateError."""
    return _count(state.channels)


def _count(records: Iterable[ChannelRecord]) -> Counts:
    queued = sent = completions = 0
    for record in records:
        for data in record.chunks:
            chunk = decode_chunk(data)
            if isinstance(chunk, PacketChunk):
                if decode_lib(chunk.lib).queued:
                    queued += 1
                else:
                    sent += 1
            elif not isinstance(chunk, ChannelChunk):
                completions += 1
    return Counts(queued, sent, completions)


# ---- save ----------------------------------------------------------------------------------------------------------


def save_device(name: str, config: bytes, device: Device, providers: list[Provider]) -> DeviceState:
    """The state of a device whose channels are all quiescent. Changes nothing.

    Raises StateError for a bus that is in the middle of closing a channel, and what channels and providers raise.
    """
    synic = device.synic
    bus = device.bus
    for offer in bus.offers:
        if offer.state in (OfferState.OPENING, OfferState.CLOSING):
            raise StateError(f"channel {offer.owner.name} is {offer.state.value}: it cannot be saved before that ends")
    tearing_down = {(offer.relid, handle) for offer in bus.offers for handle in offer.teardowns}
    return DeviceState(
        device=name,
        config=config,
        synic=SynicState(
            enabled=synic.enabled,
            fault=synic.fault,
            registers=dict(synic.values),
            post_status=int(synic.post_status),
            outbox=list(synic.outbox),
        ),
        bus=BusState(
            connected=bus.state is ConnectionState.CONNECTED,
            version=bus.version,
            offers_requested=bus.offers_requested,
            offers=[_offer_record(offer) for offer in bus.offers],
            gpadls=[
                GpadlState(
                    g.relid,
                    g.handle,
                    [RangeState(r.byte_count, r.byte_offset, list(r.pfns)) for r in g.ranges],
                    tearing_down=(g.relid, g.handle) in tearing_down,
                )
                for g in bus.gpadls.complete.values()
            ],
            partial=[
                PartialState(p.relid, p.handle, p.range_bytes, p.range_count, p.data)
                for p in bus.gpadls.partial.values()
            ],
        ),
        channels=[
            ChannelRecord(
                channel.interface_instance.bytes_le, channel.save(), channel.subchannel_index, *_ring_records(channel)
            )
            for channel in device.channels
            # A sub-channel that its owner has disabled is nothing any more: its owner need not make it again.
            if not (channel.subchannel_index and channel.state is ChannelState.DISABLED)
        ],
        providers=[
            ProviderRecord(provider.kind, provider.name, provider.instance.bytes_le, provider.save())
            for provider in providers
        ],
        audit=_audit_state(device),
    )


def _ring_records(channel: ServerChannel) -> tuple[RingRecord, RingRecord] | tuple[()]:
    rings = channel.rings
    if rings is None:
        return ()
    try:
        both = [ring.describe() for ring in rings]
    except PeerError:
        return ()
    incoming, outgoing = (
        RingRecord(
            size=one["size"],
            write_index=one["write_index"],
            read_index=one["read_index"],
            interrupt_mask=one["interrupt_mask"],
            pending_send_size=one["pending_send_size"],
        )
        for one in both
    )
    return incoming, outgoing


def _audit_state(device: Device) -> AuditState | None:
    recorder = device.recorder
    if recorder is None:
        return None
    lives = [LifeRecord(*life.key, life.nonce, *life.out, *life.incoming) for life in recorder.saved(device.channels)]
    return AuditState(recorder.uid, recorder.position, lives)


def _resume_record(state: DeviceState, device: Device) -> None:
    """Before the channels come back: the new record goes on where that of the saved device was."""
    if device.recorder is None:
        return
    audit = state.audit or AuditState("", 0, [])
    device.recorder.resume(
        audit.uid,
        audit.position,
        [
            LifePosition(
                (one.instance, one.subchannel),
                one.nonce,
                LanePosition(one.put, one.put_crc),
                LanePosition(one.taken, one.taken_crc),
            )
            for one in audit.lives
        ],
    )


def _offer_record(offer: Offer) -> OfferStateRecord:
    request = offer.request
    return OfferStateRecord(
        interface_type=offer.interface_type.bytes_le,
        instance=offer.instance.bytes_le,
        subchannel=offer.subchannel,
        relid=offer.relid,
        state=offer.state.value,
        open=None
        if request is None
        else OpenState(
            request.open_id,
            request.ring_gpadl,
            request.target_vp,
            request.downstream_page_offset,
            request.user_data,
        ),
        withdrawn=not offer.wanted,
    )


# ---- restore -------------------------------------------------------------------------------------------------------


def check_fits(state: DeviceState, name: str, device: Device, providers: list[Provider]) -> None:
    """Whether the state belongs to this device. Raises StateError naming the first difference; changes nothing."""
    if state.device != name:
        raise StateError(f"the state is of device {state.device!r}, not of {name!r}")
    saved = [(record.kind, record.name, record.instance) for record in state.providers]
    present = [(provider.kind, provider.name, provider.instance.bytes_le) for provider in providers]
    if saved != present:
        raise StateError(
            f"the state has providers {[one[:2] for one in saved]}, this device has {[one[:2] for one in present]} "
            "(or their instance GUIDs differ): restore with the description that the snapshot was taken with"
        )
    keys = [(record.instance, record.subchannel) for record in state.channels]
    if len(set(keys)) != len(keys):
        raise StateError("the state has a channel twice")
    # Sub-channels are not there yet: providers make them again when they get their own state back.
    if [key for key in keys if not key[1]] != [_key(channel) for channel in device.channels]:
        raise StateError("the channels in the state are not those of this device's providers")
    orphans = {key for key in keys if (key[0], 0) not in keys}
    if orphans:
        raise StateError("the state has sub-channels whose primary channel is missing")
    _check_synic(state.synic)
    offers = {(offer.interface_type.bytes_le, offer.instance.bytes_le) for offer in device.bus.offers}
    here = [record for record in state.bus.offers if not _withdrawn(record)]
    primaries = [(record.interface_type, record.instance) for record in here if not record.subchannel]
    known = [(record.instance, record.subchannel) for record in here]
    # One that is missing was disabled when the device was saved; its owner disables it again, or it is offered anew.
    if not set(primaries) <= offers or len(set(known)) != len(known) or not set(known) <= set(keys):
        raise StateError("the offers in the state are not those that this device's providers make")
    _check_bus(state.bus)
    open_ = {(record.instance, record.subchannel) for record in state.bus.offers if record.open is not None}
    for instance, subchannel in open_:
        if subchannel and (instance, 0) not in open_:
            raise StateError(f"sub-channel {subchannel} of an instance is open, and its primary channel is not")
    for number, channel in enumerate(state.channels):
        _check_chunks(number, channel, (channel.instance, channel.subchannel) in open_)


def _key(channel: ServerChannel) -> tuple[bytes, int]:
    return channel.interface_instance.bytes_le, channel.subchannel_index


def _withdrawn(record: OfferStateRecord) -> bool:
    """Whether the offer's owner was gone, and only the guest's release of the relid was awaited."""
    return record.withdrawn and record.state == OfferState.RESCINDED.value


def _check_synic(synic: SynicState) -> None:
    if synic.post_status not in set(PostStatus):
        raise StateError(f"the post status {synic.post_status} does not exist")
    unknown = set(synic.registers) - WRITABLE_REGISTERS
    if unknown:
        raise StateError(f"the state has values for registers {sorted(unknown)}, which cannot be written")


def _check_bus(bus: BusState) -> None:
    if bus.connected and bus.version not in set(m.Version):
        raise StateError(f"the bus was connected with version {bus.version:#x}, which is not served")
    relids = set()
    for offer in bus.offers:
        try:
            known = OfferState(offer.state)
        except ValueError:
            raise StateError(f"an offer has the unknown state {offer.state!r}") from None
        if known in (OfferState.OPENING, OfferState.CLOSING) or (known is OfferState.OPEN) != (offer.open is not None):
            raise StateError(f"an offer is {offer.state} {'with' if offer.open else 'without'} open parameters")
        if (known is OfferState.UNOFFERED) == (offer.relid != 0):
            raise StateError(f"an offer is {offer.state} and has relid {offer.relid}")
        if offer.relid in relids:
            raise StateError(f"two offers have relid {offer.relid}")
        if offer.relid:
            relids.add(offer.relid)
    if not (bus.connected and bus.offers_requested) and relids:
        raise StateError("channels are known to the guest, which has not asked for offers")
    handles = set()
    for gpadl in bus.gpadls:
        name = f"GPADL {gpadl.handle:#x} of relid {gpadl.relid}"
        if gpadl.relid not in relids or (gpadl.relid, gpadl.handle) in handles:
            raise StateError(f"{name} belongs to no channel or is there twice")
        handles.add((gpadl.relid, gpadl.handle))
        if not gpadl.ranges or any(
            one.byte_count == 0 or len(one.pfns) != page_count(one.byte_count, one.byte_offset) for one in gpadl.ranges
        ):
            raise StateError(f"{name} has no ranges, or one whose pages are not as many as its bytes need")
    in_progress = set()
    for partial in bus.partial:
        size = len(partial.data)
        if (
            partial.relid not in relids
            or partial.handle in in_progress
            or partial.range_bytes % 8
            or not 16 <= 16 * partial.range_count <= partial.range_bytes
            or size % 8
            or size >= partial.range_bytes
        ):
            raise StateError(f"GPADL {partial.handle:#x} of relid {partial.relid}, in progress, is not a possible one")
        in_progress.add(partial.handle)
    leaving = {(gpadl.relid, gpadl.handle) for gpadl in bus.gpadls if gpadl.tearing_down}
    for offer in bus.offers:
        if offer.open is None:
            continue
        rings = (offer.relid, offer.open.ring_gpadl)
        if rings not in handles or rings in leaving:
            raise StateError(
                f"relid {offer.relid} is open, and its ring GPADL {offer.open.ring_gpadl:#x} is missing or torn down"
            )


def _check_chunks(number: int, record: ChannelRecord, is_open: bool) -> None:
    chunks = [decode_chunk(data) for data in record.chunks]
    head = chunks[0] if chunks else None
    if not isinstance(head, ChannelChunk) or head.entries != len(chunks) - 1:
        raise StateError(f"the saved state of channel {number} does not start with a channel chunk or is cut")
    if len(chunks) > 1 and not is_open:
        raise StateError(f"packets were saved for channel {number}, which is not open")
    for chunk in chunks[1:]:
        if isinstance(chunk, ChannelChunk):
            raise StateError(f"the saved state of channel {number} has a second channel chunk")
        if isinstance(chunk, PacketChunk):
            decode_lib(chunk.lib)


def restore_device(
    state: DeviceState,
    device: Device,
    providers: list[Provider],
    *,
    files: Mapping[str, Mapping[str, Path]] | None = None,
    before_start: Callable[[], None] | None = None,
) -> Restored:
    """Put a checked state into a fresh device whose guest memory is mapped. Nothing runs yet: `Device.thaw` starts it.

    Order: registers, bus, GPADLs, rings; then each provider's own state, with which it makes its sub-channels again;
    the sub-channels' rings; then the packets through the restore callbacks, and only when all is there the channels are
    started. Channels with `force_new_channel` are rescinded instead, and their packets dropped; they are offered anew
    once the guest has released them. When the guest's driver was dead at the save (`_driver_gone`), the device comes
    back without a connection, and all packets are dropped. `files`: those of each provider, by its name. `before_start`
    is called when the packets are back and no channel is started yet. Raises StateError; the device is then reset.
    """
    try:
        return _restore(state, device, providers, files or {}, before_start or (lambda: None))
    except (PeerError, KmclError, UsageError) as error:
        device.reset()
        raise StateError(f"the state could not be restored: {error}") from error
    except BaseException:
        device.reset()
        raise


def _driver_gone(state: DeviceState, device: Device) -> bool:
    """Whether the guest's driver died before the save, and its memory with it.

    A guest whose driver is killed takes bus mastering away and lets go of its memory, but lazily: the device may be
    saved in between, and then finds none of its pages at the restore. With bus mastering on that is an error.
    """
    if int.from_bytes(state.config[COMMAND : COMMAND + 2], "little") & COMMAND_BUS_MASTER:
        return False
    tables = [GpaRange(r.byte_count, r.byte_offset, tuple(r.pfns)) for gpadl in state.bus.gpadls for r in gpadl.ranges]
    extents = [extent for table in tables for extent in table.extents()]
    if state.synic.enabled:
        extents += page_extents(state.synic.registers)
    try:
        device.memory.grant(extents, writable=False).release()
    except PeerError as error:
        log.warning("the guest's driver was gone when the device was saved (%s): restored without a connection", error)
        return True
    return False


def _without_driver(state: DeviceState) -> DeviceState:
    """The state as after the reset that the driver's end would have led to."""
    synic = SynicState(enabled=False, fault=False, registers={}, post_status=0, outbox=[])
    bus = BusState(connected=False, version=0, offers_requested=False, offers=[], gpadls=[], partial=[])
    return msgspec.structs.replace(state, synic=synic, bus=bus)


def _restore(
    state: DeviceState,
    device: Device,
    providers: list[Provider],
    files: Mapping[str, Mapping[str, Path]],
    before_start: Callable[[], None],
) -> Restored:
    bus = device.bus
    bus.restoring = True
    gone = _driver_gone(state, device)
    lost = {(offer.instance, offer.subchannel) for offer in state.bus.offers if gone and offer.open is not None}
    if gone:
        state = _without_driver(state)
    _resume_record(state, device)
    device.synic.restore(
        state.synic.registers,
        enabled=state.synic.enabled,
        fault=state.synic.fault,
        post_status=state.synic.post_status,
        outbox=state.synic.outbox,
    )
    if state.bus.connected:
        bus.state = ConnectionState.CONNECTED
        bus.version = state.bus.version
        bus.offers_requested = state.bus.offers_requested
    for gpadl in state.bus.gpadls:
        ranges = tuple(GpaRange(r.byte_count, r.byte_offset, tuple(r.pfns)) for r in gpadl.ranges)
        bus.gpadls.add(Gpadl(gpadl.relid, gpadl.handle, ranges))
    for partial in state.bus.partial:
        bus.gpadls.add_partial(
            PartialGpadl(partial.relid, partial.handle, partial.range_bytes, partial.range_count, partial.data)
        )
    adoption = _Adoption(state, device)
    if gone:
        adoption.renewed.update((record.instance, record.subchannel) for record in state.channels)
    adoption.primaries()
    for provider_record, provider in zip(state.providers, providers, strict=True):
        provider.restore_files(files.get(provider.name, {}))
        provider.restore(provider_record.state)
    adoption.subchannels()
    renewed = adoption.renewed
    started: list[ServerChannel] = []
    channels = {_key(channel): channel for channel in device.channels}
    kept = [record for record in state.channels if (record.instance, record.subchannel) not in renewed]
    for channel_record in state.channels:
        key = (channel_record.instance, channel_record.subchannel)
        channel = channels.get(key)
        if channel is None:
            if key in renewed:
                continue
            raise _not_made_again(*key)
        chunks = channel_record.chunks
        if key in renewed:
            head = decode_chunk(chunks[0])
            if isinstance(head, ChannelChunk) and head.started:
                started.append(channel)
            if key in lost:
                channel.lost()
        elif channel.restore(chunks):
            started.append(channel)
    counts = _count(kept)
    queued = sum(channel.packets_queued for channel in device.channels)
    sent = sum(channel.packets_sent for channel in device.channels)
    if (queued, sent) != (counts.queued, counts.sent):
        raise StateError(
            f"{counts.queued} queued and {counts.sent} sent packets were saved, {queued} and {sent} came back"
        )
    if device.recorder is not None:
        device.recorder.restored(device.channels)
    before_start()
    saved_keys = {(record.instance, record.subchannel) for record in state.channels}
    for channel in device.channels:
        if channel.state is ChannelState.DISABLED:
            channel.started = channel in started  # the wish, for when its owner enables it
        elif channel in started:
            channel.start()
        elif _key(channel) in saved_keys:
            channel.begin_pause()
    adoption.end()
    # Whatever may have been pending in either direction is raised once more.
    for offer in bus.offers:
        if offer.state is OfferState.OPEN:
            device.synic.raise_event(offer.relid)
    device.synic.kick()
    dropped = _count(record for record in state.channels if (record.instance, record.subchannel) in renewed)
    return Restored(packets=counts, dropped=dropped, renewed=len(renewed))


class _Adoption:
    """Puts offers back into their saved state, and open channels on their rings.

    Attributes:
        renewed: (instance, sub-channel) of channels that the guest knew and that are made anew.
    """

    def __init__(self, state: DeviceState, device: Device) -> None:
        self._state = state
        self._device = device
        self._adopted: list[Offer] = []
        self._rescinded: list[Offer] = []
        self._torndown = [(gpadl.relid, gpadl.handle) for gpadl in state.bus.gpadls if gpadl.tearing_down]
        self.renewed: set[tuple[bytes, int]] = set()

    def primaries(self) -> None:
        """Offers without an owner, and primary channels."""
        for record in self._state.bus.offers:
            if _withdrawn(record):
                self._adopt_withdrawn(record)
            elif not record.subchannel:
                self._adopt(record)

    def subchannels(self) -> None:
        """Sub-channels, which providers have made again by now. Raises StateError for one that is missing."""
        for record in self._state.bus.offers:
            if record.subchannel and not _withdrawn(record):
                self._adopt(record)

    def _adopt_withdrawn(self, record: OfferStateRecord) -> Offer:
        instance = UUID(bytes_le=record.instance)
        offer = Offer(UUID(bytes_le=record.interface_type), instance, 0, b"", None, record.subchannel)
        self._device.bus.adopt_withdrawn(offer, record.relid)
        self._adopted.append(offer)
        return offer

    def _adopt(self, record: OfferStateRecord) -> None:
        bus = self._device.bus
        key = (record.instance, record.subchannel)
        offer = next((o for o in bus.offers if o.wanted and (o.instance.bytes_le, o.subchannel) == key), None)
        saved_state = OfferState(record.state)
        of_renewed = record.subchannel != 0 and (record.instance, 0) in self.renewed
        if offer is None:
            if not of_renewed:
                raise _not_made_again(*key)
            offer = self._adopt_withdrawn(record)
        renew = of_renewed or (offer.owner is not None and offer.owner.force_new_channel)
        if renew and record.relid:
            # Its rings are left alone: the owner begins with a channel that was never open.
            self.renewed.add(key)
            if saved_state is not OfferState.RESCINDED:
                self._rescinded.append(offer)
            bus.adopt(offer, record.relid, OfferState.RESCINDED, None)
            self._adopted.append(offer)
            return
        request = None if record.open is None else OpenRequest(*_open_fields(record.open))
        bus.adopt(offer, record.relid, saved_state, request)
        # What the guest is about to get back cannot be mapped again.
        offer.teardowns = [handle for relid, handle in self._torndown if relid == record.relid]
        self._adopted.append(offer)
        if request is not None:
            self._device.reattach(offer)

    def end(self) -> None:
        """Everything is back: the guest is told what has changed."""
        bus = self._device.bus
        for offer in bus.offers:
            offer.teardowns = []
        self._put_in_order()
        bus.end_restore(
            torndown=self._torndown,
            rescinded=self._rescinded,
            new=[offer for offer in bus.offers if offer not in self._adopted],
        )

    def _put_in_order(self) -> None:
        """Offers and channels in the order of their creation, as before: guests see offers in that order, and providers
        have made their primary channels before their sub-channels now. What the saved state did not have comes last."""
        state, device = self._state, self._device
        offers = {(one.instance, one.subchannel, _withdrawn(one)): at for at, one in enumerate(state.bus.offers)}
        device.bus.offers.sort(
            key=lambda one: offers.get((one.instance.bytes_le, one.subchannel, not one.wanted), len(offers))
        )
        channels = {(one.instance, one.subchannel): at for at, one in enumerate(state.channels)}
        device.channels.sort(key=lambda one: channels.get(_key(one), len(channels)))


def _not_made_again(instance: bytes, subchannel: int) -> StateError:
    return StateError(
        f"sub-channel {subchannel} of instance {UUID(bytes_le=instance)} was saved, and its provider did not make it "
        "again when it got its state back"
    )


def _open_fields(record: OpenState) -> tuple[Any, ...]:
    return (
        record.open_id,
        record.ring_gpadl,
        record.target_vp,
        record.downstream_page_offset,
        record.user_data,
    )
