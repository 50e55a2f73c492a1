"""The device's saved state: one documented, versioned, checksummed file.

Layout: 8 bytes of magic `VMBSTATE`, u32 format version, u32 reserved 0, u64 length of the body, 32 bytes SHA-256 of the
body, then the body: a MessagePack map (docs/state-format.md). Decoding trusts nothing: magic, version, length, digest,
then every field's type and range, then whether the rooms fit together, then whether all that fits the device it is to
be restored into. Until then nothing has changed, and StateError is the only thing that is raised.

SynIC, bus and channels save and restore themselves, next to their live state; here they are put together.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from struct import Struct
from typing import Annotated, Protocol
from uuid import UUID

import msgspec

from vmbus.bus import saved as bus
from vmbus.bus import synic
from vmbus.bus.adoption import Adoption
from vmbus.bus.gpadl import ring_extents
from vmbus.bus.offers import OfferState
from vmbus.bus.replacing import Restored, key_of, put_back, save_channels
from vmbus.bus.saved import BusState, decode_bus
from vmbus.bus.synic import SynicState, page_extents
from vmbus.device.device import Device
from vmbus.device.observing import MOST_CHANNELS, RecordState
from vmbus.device.pci import COMMAND, COMMAND_BUS_MASTER
from vmbus.errors import EnvironmentProblem, PeerError, StateError, UsageError
from vmbus.kmcl.saved import MAX_ENTRIES, ChannelRecord, Counts
from vmbus.kmcl.status import KmclError
from vmbus.util.complaints import bounded_log
from vmbus.util.pieces import Pieces, whole
from vmbus.util.records import (
    Guid,
    StructVersion,
)
from vmbus.util.records import decode as decode_record
from vmbus.wire.packet import largest_packet

log = bounded_log(__name__)

MAGIC = b"VMBSTATE"
FORMAT_VERSION = 1
# The oldest format that can still be restored; apart from what we write.
OLDEST_VERSION = 1
MAX_BODY = 1 << 30

_HEAD = Struct("<8sIIQ32s")
HEAD_SIZE = _HEAD.size


class ProviderRecord(msgspec.Struct, frozen=True):
    kind: str
    name: str
    instance: Guid
    state: bytes
    structure_version: StructVersion = 1


class Owner(Protocol):
    """What this asks of a provider, which is none of ours: see `vmbus.providers.Provider`."""

    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def instance(self) -> UUID: ...

    def save(self) -> bytes: ...
    def check(self, state: bytes) -> None: ...
    def restore(self, state: bytes) -> None: ...
    def restore_files(self, files: Mapping[str, Path]) -> None: ...


class DeviceState(msgspec.Struct, frozen=True):
    """Everything the server holds about one device. `config` is the 256-byte PCI configuration space."""

    device: str
    config: Annotated[bytes, msgspec.Meta(min_length=256, max_length=256)]
    synic: SynicState
    bus: BusState
    channels: list[ChannelRecord]
    providers: Annotated[list[ProviderRecord], msgspec.Meta(max_length=MOST_CHANNELS)]
    audit: RecordState | None = None


class _Pieces(DeviceState, frozen=True):
    """Decoded one at a time, under limits that they share."""

    bus: msgspec.Raw  # type: ignore[assignment]
    channels: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MOST_CHANNELS)]  # type: ignore[assignment]


_decoder = msgspec.msgpack.Decoder(_Pieces)
_channel_decoder = msgspec.msgpack.Decoder(ChannelRecord)


def encode(state: DeviceState) -> bytes:
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
    body = memoryview(data)[_HEAD.size :]
    if length != len(body) or length > MAX_BODY:
        raise StateError(f"device state has a body of {len(body)} bytes where its head says {length}")
    if hashlib.sha256(body).digest() != digest:
        raise StateError("device state is damaged: its SHA-256 does not match")
    pieces = decode_record(_decoder, body, "device state")
    entries = 0
    channels = []
    for piece in pieces.channels:
        channels.append(decode_record(_channel_decoder, piece, "a channel in the device state"))
        entries += len(channels[-1].chunks)
        if entries > MAX_ENTRIES + MOST_CHANNELS:
            raise StateError(f"the device state has more than {MAX_ENTRIES} packets, which cannot be restored")
    return DeviceState(
        pieces.device,
        pieces.config,
        pieces.synic,
        decode_bus(pieces.bus),
        channels,
        pieces.providers,
        pieces.audit,
    )


def read_file(path: Path) -> bytes:
    """The bytes of a file that ought to be a device state. Raises StateError for what is not a plain file (without
    waiting for whoever might write into it), or too large; OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise StateError(f"{path} is not a plain file")
        if status.st_size > MAX_BODY + HEAD_SIZE:
            raise StateError(f"{path} has {status.st_size} bytes: no device state is that large")
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)


def count_packets(state: DeviceState) -> Counts:
    """How many packets a state holds. Raises StateError."""
    return Counts.total(record.decoded.counts for record in state.channels)


# ---- save ----------------------------------------------------------------------------------------------------------


def saving(name: str, config: bytes, device: Device, providers: Sequence[Owner]) -> Pieces[DeviceState]:
    """The state of a device whose channels are all quiescent. Between two pieces nothing may happen to it.

    Changes nothing, but for a channel whose rings the guest has overwritten: that fails, and is saved as rescinded.
    Raises StateError for a bus that is in the middle of closing a channel, and what channels and providers raise.
    """
    with device.synic.unsent():
        for channel in device.channels:
            channel.check_rings()
            yield
    of_bus = device.bus.save()
    channels = yield from save_channels(device.channels)
    records = []
    for provider in providers:
        records.append(ProviderRecord(provider.kind, provider.name, provider.instance.bytes_le, provider.save()))
        yield
    records_of_observers = [observer.saved(device.channels) for observer in device.observers]
    return DeviceState(
        device=name,
        config=config,
        synic=device.synic.save(),
        bus=of_bus,
        channels=channels,
        providers=records,
        audit=next((one for one in records_of_observers if one is not None), None),
    )


save_device = whole(saving)


def verifying(data: bytes, providers: Sequence[Owner]) -> Pieces[DeviceState]:
    """What `data`, just written of the device with these providers, says. Raises StateError for a state that could not
    be restored: then nothing was saved."""
    state = decode(data)
    yield
    yield from checking(state)
    yield from _check_providers(state, providers)
    return state


verify = whole(verifying)


# ---- checks --------------------------------------------------------------------------------------------------------


def fitting(state: DeviceState, name: str, device: Device, providers: Sequence[Owner]) -> Pieces[None]:
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
    # Sub-channels are not there yet: providers make them again when they get their own state back.
    channels = [key_of(channel) for channel in device.channels]
    passing = {record.key for record in state.channels if record.decoded.head.force_new} - set(channels)
    primaries = [record.key for record in state.channels if not record.subchannel and record.key not in passing]
    if primaries != channels:
        raise StateError("the channels in the state are not those of this device's providers")
    # One that is missing was disabled when the device was saved; its owner disables it again, or it is offered anew.
    offers = {(offer.interface_type.bytes_le, offer.instance.bytes_le) for offer in device.bus.offers}
    here = [
        record
        for record in state.bus.offers
        if not record.abandoned and not record.subchannel and record.key not in passing
    ]
    if not {(record.interface_type, record.instance) for record in here} <= offers:
        raise StateError("the offers in the state are not those that this device's providers make")
    yield
    yield from checking(state)
    yield from _check_providers(state, providers)


check_fits = whole(fitting)


def checking(state: DeviceState) -> Pieces[None]:
    """Whether its rooms fit together. Raises StateError."""
    keys = {record.key for record in state.channels}
    if len(keys) != len(state.channels):
        raise StateError("the state has a channel twice")
    if any((instance, 0) not in keys for instance, _ in keys):
        raise StateError("the state has sub-channels whose primary channel is missing")
    known = [record.key for record in state.bus.offers if not record.abandoned]
    if len(set(known)) != len(known) or not set(known) <= keys:
        raise StateError("the offers in the state are not those of its channels")
    synic.check(state.synic)
    yield from bus.check(state.bus)
    largest = yield from _largest_packets(state.bus)
    for record in state.channels:
        yield
        saved = record.decoded
        ring = largest.get(record.key)
        if ring is not None:
            saved.check_fits(str(record.key), ring)
        elif saved.sent or saved.queue:
            raise StateError("packets were saved for a channel which is not open")


def _largest_packets(state: BusState) -> Pieces[dict[tuple[bytes, int], int]]:
    """Of every open channel, how many ring bytes the largest packet that we can send may take."""
    gpadls = {(gpadl.relid, gpadl.handle): gpadl for gpadl in state.gpadls}
    largest = {}
    for offer in state.offers:
        yield
        if offer.open is not None:
            rings = gpadls[offer.relid, offer.open.ring_gpadl].live
            data = ring_extents(rings, offer.open.downstream_page_offset)[3]
            largest[offer.key] = largest_packet(sum(length for _, length in data))
    return largest


def _check_providers(state: DeviceState, providers: Sequence[Owner]) -> Pieces[None]:
    for record, provider in zip(state.providers, providers, strict=True):
        _ask(provider, "check", provider.check, record.state)
        yield


def _ask(provider: Owner, what: str, call: Callable[[bytes], None], state: bytes) -> None:
    """Whatever a provider raises about a state is a reason not to take it: StateError that names the provider."""
    try:
        call(state)
    except (StateError, EnvironmentProblem):
        raise
    except Exception as error:
        log.exception("provider %s raised in %s()", provider.name, what)
        raise StateError(f"provider {provider.name!r} ({provider.kind}) raised {error!r} in {what}()") from error


# ---- restore -------------------------------------------------------------------------------------------------------


def restoring(
    state: DeviceState,
    device: Device,
    providers: Sequence[Owner],
    *,
    files: Mapping[str, Mapping[str, Path]] | None = None,
    before_start: Callable[[], None] | None = None,
) -> Pieces[Restored]:
    """Put a checked state into a fresh device whose guest memory is mapped. Nothing runs yet: `Device.thaw` starts it.

    Between two pieces nothing may happen to the device: no request of a client's, no turn.
    Order: registers, bus, GPADLs, rings; then each provider's own state, with which it makes its sub-channels again;
    the sub-channels' rings; then the packets through the restore callbacks, and only when all is there the channels are
    started. Channels with `force_new_channel` are rescinded instead, and their packets dropped; they are offered anew
    once the guest has released them, if their owner makes them again. So are those whose rings the guest has
    overwritten. When the guest's driver was dead at the save (`_driver_gone`), the device comes back without a
    connection, and all packets are dropped. `files`: those of each provider, by its name. `before_start` is called when
    the packets are back and no channel is started yet. Raises StateError, and EnvironmentProblem of providers; the
    device is then reset.
    """
    try:
        return (yield from _restore(state, device, providers, files or {}, before_start or (lambda: None)))
    except (PeerError, KmclError, UsageError) as error:
        device.reset()
        raise StateError(f"the state could not be restored: {error}") from error
    except BaseException:
        device.reset()
        raise


restore_device = whole(restoring)


def _driver_gone(state: DeviceState, device: Device) -> bool:
    """Whether the guest's driver died before the save, and its memory with it.

    A guest whose driver is killed takes bus mastering away and lets go of its memory, but lazily: the device may be
    saved in between, and then finds none of its pages at the restore. With bus mastering on that is an error.
    """
    if int.from_bytes(state.config[COMMAND : COMMAND + 2], "little") & COMMAND_BUS_MASTER:
        return False
    extents = [extent for gpadl in state.bus.gpadls for extent in gpadl.live.extents()]
    if state.synic.enabled:
        extents += page_extents(state.synic.registers)
    try:
        device.memory.grant(extents, writable=False).release()
    except PeerError as error:
        log.warning("the guest's driver was gone when the device was saved (%s): restored without a connection", error)
        return True
    return False


def _restore(
    state: DeviceState,
    device: Device,
    providers: Sequence[Owner],
    files: Mapping[str, Mapping[str, Path]],
    before_start: Callable[[], None],
) -> Pieces[Restored]:
    gone = _driver_gone(state, device)
    open_ = {offer.key for offer in state.bus.offers if offer.open is not None}
    if gone:  # as after the reset that the driver's end would have led to
        state = msgspec.structs.replace(state, synic=synic.NOTHING, bus=bus.NOTHING)
    for observer in device.observers:
        observer.resume(state.audit)
    yield from device.bus.restore(state.bus)
    device.synic.restore(state.synic)
    adoption = Adoption(device.bus, state.bus, state.channels, device.channels, device.reattach)
    if gone:
        adoption.renewed.update(record.key for record in state.channels)
        adoption.lost.update(open_)

    def owners() -> Pieces[None]:
        for record, provider in zip(state.providers, providers, strict=True):
            provider.restore_files(files.get(provider.name, {}))
            _ask(provider, "restore", provider.restore, record.state)
            yield

    def packets_are_back() -> None:
        for observer in device.observers:
            observer.restored(device.channels, adoption.broken)
        before_start()

    channels = {one.key: one.decoded for one in state.channels}
    restored = yield from put_back(adoption, channels, owners(), packets_are_back)
    adoption.end()
    # Whatever may have been pending in either direction is raised once more.
    for offer in list(device.bus.offers):
        yield
        if offer.state is OfferState.OPEN:
            device.synic.raise_event(offer.relid)
    device.synic.kick()
    return restored
