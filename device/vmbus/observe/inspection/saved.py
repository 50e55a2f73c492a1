"""The inspection of what was saved: a snapshot's directory, a checkpoint, or a bare state file.

Nothing is started, and no code that a snapshot names is run: provider kinds of others are only asked about their
packets where the user allows them (see `vmbus.providers.loading`). The manifest and the device's state are verified;
guest memory, which may be large, is not looked at: `vmbus.snapshot.bundle.open_snapshot` verifies all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import msgspec

from vmbus.device import saved as st
from vmbus.device.description import DeviceDescription
from vmbus.errors import StateError, VmbusError
from vmbus.kmcl.saved import CompletionChunk, SavedPacket
from vmbus.observe.inspection.collect import first_address
from vmbus.observe.inspection.document import (
    AuditInfo,
    BusInfo,
    ChannelInfo,
    GpadlInfo,
    InFlight,
    Inspection,
    LifeInfo,
    OfferInfo,
    OpenInfo,
    PacketInfo,
    PartialInfo,
    ProviderInfo,
    RingInfo,
    SavedInfo,
    Source,
)
from vmbus.observe.inspection.plain import (
    decoded,
    function_info,
    kind_name,
    plain,
    preview,
    queued_words,
    synic_info,
    version_name,
)
from vmbus.providers import Provider, provider_class
from vmbus.snapshot.bundle import read_state
from vmbus.snapshot.checkpoints import IMAGE, Checkpoint, Store
from vmbus.snapshot.manifest import INITRAMFS, KERNEL, MANIFEST, RAM, STATE
from vmbus.vm.description import VmDescription
from vmbus.wire import ic
from vmbus.wire.hvsock import peer_port, port_of
from vmbus.wire.packet import PacketType

_COMPLETION = int(PacketType.COMPLETION)


def inspect_path(path: Path) -> Inspection:
    """What is at `path`: a snapshot's directory, a checkpoint (`DIRECTORY/TAG`), or a device state file.

    Raises StateError that says what is wrong with it, or that there is nothing of the kind.
    """
    if path.is_dir():
        if (path / MANIFEST).exists() or not (path / IMAGE).exists():
            return inspect_snapshot(path)
        tags = sorted(Store(path, own=False).tags())
        raise StateError(
            f"{path} is a directory of checkpoints; choose one: "
            + (", ".join(str(path / tag) for tag in tags) or "there is none")
        )
    store = Store(path.parent, own=False)
    tag = path.name.removesuffix(".json").removesuffix(".state")
    if (path.parent / IMAGE).exists() and (path.parent / f"{tag}.json").exists():
        return inspect_checkpoint(store, tag)
    if not os.path.lexists(path):
        raise StateError(f"there is nothing at {path}: neither a snapshot nor a checkpoint nor a device state file")
    data = _read(path)
    return inspect_state(st.decode(data), Source(kind="state", name=str(path)))


def inspect_snapshot(directory: Path) -> Inspection:
    """A snapshot. Raises StateError."""
    manifest, data = read_state(directory)
    document = inspect_state(
        st.decode(data),
        Source(kind="snapshot", name=str(directory), created=manifest.created),
        manifest.vm.device,
    )
    document.saved = SavedInfo(
        description=msgspec.to_builtins(manifest.vm),
        machine=manifest.machine.type,
        accelerator=manifest.machine.accelerator,
        pci_address=manifest.machine.pci_address,
        qemu=manifest.versions.qemu,
        project=manifest.versions.project,
        live=manifest.live,
        incoming_held=manifest.incoming_held,
        state_bytes=len(data),
        files={name: record.size for name, record in manifest.files.items()},
        boot_files={name: manifest.files[name].sha256 for name in (KERNEL, INITRAMFS)},
    )
    return document


def inspect_checkpoint(store: Store, tag: str) -> Inspection:
    """A checkpoint. Raises StateError and UsageError as the store does."""
    record: Checkpoint = store.record(tag)
    data = store.verify_state(record)
    document = inspect_state(
        st.decode(data),
        Source(kind="checkpoint", name=str(store.directory / tag), created=record.created),
        record.vm.device,
    )
    files = {} if record.files is msgspec.UNSET else {name: one.size for name, one in record.files.items()}
    document.saved = SavedInfo(
        description=_builtins(record.vm),
        machine=record.machine.type,
        accelerator=record.machine.accelerator,
        pci_address=record.machine.pci_address,
        qemu=record.qemu,
        project="",
        live=None,
        incoming_held=record.incoming_held,
        state_bytes=len(data),
        files={STATE: len(data), RAM: record.image.vm_state_bytes, **files},
        boot_files={},
    )
    return document


def inspect_state(state: st.DeviceState, source: Source, description: DeviceDescription | None = None) -> Inspection:
    """A decoded device state. Raises StateError for chunks of channels that cannot be decoded."""
    offers = {one.key: one for one in state.bus.offers if not one.withdrawn}
    channels = [_channel(state, record, offers.get(record.key)) for record in state.channels]
    return Inspection(
        source=source,
        device=state.device,
        in_flight=sum((channel.in_flight for channel in channels), InFlight()),
        function=function_info(state.config),
        synic=synic_info(
            enabled=state.synic.enabled,
            fault=state.synic.fault,
            registers=state.synic.registers,
            post_status=state.synic.post_status,
            outbox=state.synic.outbox,
            waiting=len(state.synic.outbox),
        ),
        bus=_bus(state),
        channels=channels,
        providers=[_provider(record) for record in state.providers],
        audit=_audit(state.audit),
        description=None if description is None else _builtins(description),
    )


def _builtins(description: DeviceDescription | VmDescription) -> dict[str, Any]:
    return dict(msgspec.to_builtins(description))


def _read(path: Path) -> bytes:
    """A file that ought to be a device state. Raises StateError."""
    try:
        return st.read_file(path)
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}") from error


# ---- channels --------------------------------------------------------------------------------------------------------


def _text(guid: bytes) -> str:
    return str(UUID(bytes_le=guid))


def _owner_of(
    state: st.DeviceState, record: st.ChannelRecord, offer: st.OfferStateRecord | None
) -> tuple[st.ProviderRecord | None, str]:
    """Whose a channel is, and what it is called: providers offer their own instance, or one derived from it for each
    of their services, or connections of sockets, or are alone."""
    instance = UUID(bytes_le=record.instance)
    subchannel = f".{record.subchannel}" if record.subchannel else ""
    for provider in state.providers:
        if provider.instance == record.instance:
            return provider, provider.name + subchannel
    for provider in state.providers:
        for service in ic.SERVICES:
            if uuid5(UUID(bytes_le=provider.instance), service.name) == instance:
                return provider, f"{provider.name}-{service.name}{subchannel}"
    port = None if offer is None else port_of(UUID(bytes_le=offer.interface_type))
    if port is not None:
        for provider in state.providers:
            if provider.kind == "vsock":
                return provider, f"{provider.name}-{port}-{peer_port(instance)}"
    return (state.providers[0] if len(state.providers) == 1 else None), f"{instance}{subchannel}"


def _channel(state: st.DeviceState, record: st.ChannelRecord, offer: st.OfferStateRecord | None) -> ChannelInfo:
    owner, name = _owner_of(state, record, offer)
    saved = record.decoded
    describer = None if owner is None else _describer(owner.kind)
    type_ = None if offer is None else UUID(bytes_le=offer.interface_type)
    packets = list(_packets([*saved.sent, *saved.queue], describer, type_))
    count = InFlight()
    for packet in packets:
        if packet.state == "queued":
            count.queued += 1
        elif packet.state == "sent":
            count.sent += 1
        else:
            count.completions += 1
    return ChannelInfo(
        name=name,
        provider="" if owner is None else owner.name,
        interface_type="" if offer is None else _text(offer.interface_type),
        instance=_text(record.instance),
        subchannel=record.subchannel,
        relid=0 if offer is None else offer.relid,
        state="not offered" if offer is None else offer.state,
        started=saved.head.started,
        next_transaction=saved.head.next_transaction,
        in_flight=count,
        packets=packets,
        rings=[*_rings(record)],
    )


def _packets(
    entries: list[SavedPacket | CompletionChunk], describer: type[Provider] | None, type_: UUID | None
) -> Iterator[PacketInfo]:
    for chunk in entries:
        if isinstance(chunk, CompletionChunk):
            yield PacketInfo(
                transaction=chunk.transaction,
                state="completion",
                kind="completion",
                size=len(chunk.body),
                body=preview(chunk.body),
                words="" if type_ is None else queued_words(type_, _COMPLETION, chunk.transaction, 2, chunk.body),
            )
            continue
        lib = chunk.lib
        yield PacketInfo(
            transaction=lib.transaction,
            state="queued" if lib.queued else "sent",
            kind=kind_name(lib.kind),
            completion=lib.flags != 0,
            size=len(lib.body) if lib.queued else None,
            body=preview(lib.body),
            words=queued_words(type_, lib.kind, lib.transaction, lib.offset8, lib.body)
            if lib.queued and type_ is not None
            else "",
            lib={"version": lib.version, "offset8": lib.offset8, "flags": lib.flags, "bytes": len(chunk.lib_buf)},
            save_size=len(chunk.save),
            save=preview(chunk.save),
            described=_described(describer, chunk.save),
        )


def _describer(kind: str) -> type[Provider] | None:
    try:
        return provider_class(kind, from_snapshot=True)
    except VmbusError:
        return None  # code that the snapshot's reader has not allowed, or does not have


def _described(describer: type[Provider] | None, save: bytes) -> dict[str, Any]:
    if not save:
        return {}
    if describer is not None:
        try:
            found = plain(dict(describer.describe_packet(save)))
        except Exception as error:  # not what it expected: the bytes are shown anyway
            return {"problem": f"not what {describer.kind!r} saves: {error!r}"}
        if found:
            return dict(found)
    _, value = decoded(save)
    return {} if value is None else value if isinstance(value, dict) else {"values": value}


def _rings(record: st.ChannelRecord) -> Iterator[RingInfo]:
    for direction, ring in (("incoming", record.incoming), ("outgoing", record.outgoing)):
        if ring is None:
            continue
        info = RingInfo(
            direction="incoming" if direction == "incoming" else "outgoing",
            size=ring.size,
            write_index=ring.write_index,
            read_index=ring.read_index,
            interrupt_mask=ring.interrupt_mask,
            pending_send_size=ring.pending_send_size,
        )
        info.judge()
        yield info


# ---- the rest --------------------------------------------------------------------------------------------------------


def _bus(state: st.DeviceState) -> BusInfo:
    bus = state.bus
    rings = {(offer.relid, offer.open.ring_gpadl) for offer in bus.offers if offer.open is not None}
    offers = {offer.key: offer for offer in bus.offers}
    names = {record.key: _owner_of(state, record, offers.get(record.key))[1] for record in state.channels}
    return BusInfo(
        state="connected" if bus.connected else "disconnected",
        version=version_name(bus.version) if bus.version else "",
        offers_requested=bus.offers_requested,
        offers=[_offer(offer, names.get((offer.instance, offer.subchannel), "")) for offer in bus.offers],
        gpadls=[
            GpadlInfo(
                relid=gpadl.relid,
                handle=gpadl.handle,
                bytes=sum(one.byte_count for one in gpadl.ranges),
                pages=sum(len(one.pfns) for one in gpadl.ranges),
                ranges=len(gpadl.ranges),
                address=first_address(gpadl.ranges[0].pfns, gpadl.ranges[0].byte_offset) if gpadl.ranges else 0,
                use="rings" if (gpadl.relid, gpadl.handle) in rings else "",
                tearing_down=gpadl.tearing_down,
            )
            for gpadl in bus.gpadls
        ],
        partial=[
            PartialInfo(
                relid=one.relid,
                handle=one.handle,
                range_bytes=one.range_bytes,
                range_count=one.range_count,
                received=len(one.data),
            )
            for one in bus.partial
        ],
    )


def _offer(offer: st.OfferStateRecord, name: str) -> OfferInfo:
    return OfferInfo(
        relid=offer.relid,
        state=offer.state,
        channel=name,
        interface_type=_text(offer.interface_type),
        instance=_text(offer.instance),
        subchannel=offer.subchannel,
        withdrawn=offer.withdrawn,
        open=None
        if offer.open is None
        else OpenInfo(
            open_id=offer.open.open_id,
            ring_gpadl=offer.open.ring_gpadl,
            target_vp=offer.open.target_vp,
            downstream_page_offset=offer.open.downstream_page_offset,
            user_data=offer.open.user_data.rstrip(b"\0").hex(),
        ),
    )


def _provider(record: st.ProviderRecord) -> ProviderInfo:
    name, value = decoded(record.state)
    return ProviderInfo(
        kind=record.kind,
        name=record.name,
        instance=_text(record.instance),
        state_bytes=len(record.state),
        state_format=name,
        state=value,
        preview="" if name else preview(record.state),
    )


def _audit(audit: st.AuditState | None) -> AuditInfo | None:
    if audit is None:
        return None
    return AuditInfo(
        uid=audit.uid,
        position=audit.position,
        lives=[
            LifeInfo(instance=_text(one.instance), subchannel=one.subchannel, put=one.put, taken=one.taken)
            for one in audit.lives
        ],
    )
