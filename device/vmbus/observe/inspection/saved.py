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

from vmbus.bus.offers import OfferStateRecord
from vmbus.bus.saved import BusState
from vmbus.device import saved as st
from vmbus.device.description import DeviceDescription
from vmbus.device.observing import RecordState
from vmbus.errors import StateError, VmbusError, os_error
from vmbus.kmcl.saved import ChannelRecord, CompletionChunk, SavedPacket
from vmbus.observe.inspection.document import (
    AuditInfo,
    BusInfo,
    ChannelInfo,
    InFlight,
    Inspection,
    LifeInfo,
    PacketInfo,
    ProviderInfo,
    RingInfo,
    SavedInfo,
    Source,
    part_of,
)
from vmbus.observe.inspection.parts import (
    bus_info,
    completion_info,
    function_info,
    guid_text,
    offer_info,
    packet_info,
    synic_info,
)
from vmbus.observe.inspection.plain import decoded, plain, preview
from vmbus.providers import Provider, provider_class
from vmbus.snapshot.bundle import read_state
from vmbus.snapshot.checkpoints import IMAGE, Checkpoint, Store
from vmbus.snapshot.manifest import INITRAMFS, KERNEL, MANIFEST, RAM, STATE, Manifest
from vmbus.wire import ic
from vmbus.wire.hvsock import peer_port, port_of


def saved_devices(path: Path) -> list[str]:
    """The names of the devices in it; of a bare state file an empty one. Raises as `inspect_path`."""
    if path.is_dir() and (path / MANIFEST).exists():
        return [one.name for one in read_state(path)[0].vm.all_devices]
    if (found := _checkpoint_at(path)) is not None:
        return [one.name for one in found[0].record(found[1]).vm.all_devices]
    return [""]


def _checkpoint_at(path: Path) -> tuple[Store, str] | None:
    tag = path.name.removesuffix(".json").removesuffix(".state")
    there = (path.parent / IMAGE).exists() and (path.parent / f"{tag}.json").exists()
    return (Store(path.parent, own=False), tag) if there else None


def inspect_path(path: Path, device: int = 0) -> Inspection:
    """What is at `path`: a snapshot's directory, a checkpoint (`DIRECTORY/TAG`), or a device state file. `device`:
    which one of several.

    Raises StateError that says what is wrong with it, or that there is nothing of the kind.
    """
    if path.is_dir():
        if (path / MANIFEST).exists() or not (path / IMAGE).exists():
            return inspect_snapshot(path, device)
        tags = sorted(Store(path, own=False).tags())
        raise StateError(
            f"{path} is a directory of checkpoints; choose one: "
            + (", ".join(str(path / tag) for tag in tags) or "there is none")
        )
    if (found := _checkpoint_at(path)) is not None:
        return inspect_checkpoint(*found, device)
    if not os.path.lexists(path):
        raise StateError(f"there is nothing at {path}: neither a snapshot nor a checkpoint nor a device state file")
    data = _read(path)
    return inspect_state(st.decode(data), Source(kind="state", name=str(path)))


def inspect_snapshot(directory: Path, device: int = 0) -> Inspection:
    """A snapshot. Raises StateError."""
    manifest, data = read_state(directory, device)
    return _inspect(
        data,
        device,
        Source(kind="snapshot", name=str(directory), created=manifest.created),
        manifest,
        qemu=manifest.versions.qemu,
        project=manifest.versions.project,
        live=manifest.live,
        files={name: record.size for name, record in manifest.files.items()},
        boot_files={name: manifest.files[name].sha256 for name in (KERNEL, INITRAMFS) if name in manifest.files},
    )


def inspect_checkpoint(store: Store, tag: str, device: int = 0) -> Inspection:
    """A checkpoint. Raises StateError and UsageError as the store does."""
    record = store.record(tag)
    data = store.verify_state(record, device)
    files = {} if record.files is msgspec.UNSET else {name: one.size for name, one in record.files.items()}
    return _inspect(
        data,
        device,
        Source(kind="checkpoint", name=str(store.directory / tag), created=record.created),
        record,
        qemu=record.qemu,
        project="",
        live=None,
        files={STATE: len(data), RAM: record.image.vm_state_bytes, **files},
        boot_files={},
    )


def _inspect(data: bytes, device: int, source: Source, record: Manifest | Checkpoint, **more: Any) -> Inspection:
    machine = record.machine
    document = inspect_state(st.decode(data), source, record.vm.all_devices[device])
    document.saved = SavedInfo(
        description=msgspec.to_builtins(record.vm),
        machine=machine.type,
        accelerator=machine.accelerator,
        pci_address=[machine.pci_address, *(one.pci_address for one in machine.further)][device],
        incoming_held=record.incoming_held,
        state_bytes=len(data),
        **more,
    )
    return document


def inspect_state(state: st.DeviceState, source: Source, description: DeviceDescription | None = None) -> Inspection:
    """A decoded device state. Raises StateError for chunks of channels that cannot be decoded."""
    offers = {one.key: one for one in state.bus.offers if not one.withdrawn}
    channels = [_channel(state, record, offers.get(record.key)) for record in state.channels]
    names = {record.key: channel.name for record, channel in zip(state.channels, channels, strict=True)}
    return Inspection(
        source=source,
        device=state.device,
        in_flight=sum((channel.in_flight for channel in channels), InFlight()),
        function=function_info(state.config),
        synic=synic_info(state.synic),
        bus=_bus(state.bus, names),
        channels=channels,
        providers=[_provider(record) for record in state.providers],
        audit=_audit(state.audit),
        description=None if description is None else msgspec.to_builtins(description),
    )


def _read(path: Path) -> bytes:
    """A file that ought to be a device state. Raises StateError."""
    with os_error(f"cannot read {path}", StateError):
        return st.read_file(path)


# ---- channels --------------------------------------------------------------------------------------------------------


def _owner_of(
    state: st.DeviceState, record: ChannelRecord, offer: OfferStateRecord | None
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


def _channel(state: st.DeviceState, record: ChannelRecord, offer: OfferStateRecord | None) -> ChannelInfo:
    owner, name = _owner_of(state, record, offer)
    saved = record.decoded
    describer = None if owner is None else _describer(owner.kind)
    type_ = None if offer is None else UUID(bytes_le=offer.interface_type)
    return ChannelInfo(
        name=name,
        provider="" if owner is None else owner.name,
        interface_type="" if type_ is None else str(type_),
        instance=guid_text(record.instance),
        subchannel=record.subchannel,
        relid=0 if offer is None else offer.relid,
        state="not offered" if offer is None else offer.state,
        started=saved.head.started,
        next_transaction=saved.head.next_transaction,
        in_flight=InFlight(*saved.counts),
        packets=list(_packets([*saved.sent, *saved.queue], describer, type_)),
        rings=list(_rings(record)),
    )


def _packets(
    entries: list[SavedPacket | CompletionChunk], describer: type[Provider] | None, type_: UUID | None
) -> Iterator[PacketInfo]:
    for entry in entries:
        if isinstance(entry, CompletionChunk):
            yield completion_info(type_, entry.transaction, entry.body)
            continue
        lib = entry.lib
        info = packet_info(type_, lib, queued=lib.queued)
        info.lib = {"version": lib.version, "offset8": lib.offset8, "flags": lib.flags, "bytes": len(entry.lib_buf)}
        info.save_size, info.save = len(entry.save), preview(entry.save)
        info.described = _described(describer, entry.save)
        yield info


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


def _rings(record: ChannelRecord) -> Iterator[RingInfo]:
    for direction, ring in (("incoming", record.incoming), ("outgoing", record.outgoing)):
        if ring is not None:
            info = part_of(RingInfo, ring, direction=direction)
            info.judge()
            yield info


# ---- the rest --------------------------------------------------------------------------------------------------------


def _bus(bus: BusState, names: dict[tuple[bytes, int], str]) -> BusInfo:
    return bus_info(
        "connected" if bus.connected else "disconnected",
        bus.version,
        [offer_info(one, names.get(one.key, "")) for one in bus.offers],
        bus.gpadls,
        bus.partial,
        offers_requested=bus.offers_requested,
    )


def _provider(record: st.ProviderRecord) -> ProviderInfo:
    name, value = decoded(record.state)
    return ProviderInfo(
        kind=record.kind,
        name=record.name,
        instance=guid_text(record.instance),
        state_bytes=len(record.state),
        state_format=name,
        state=value,
        preview="" if name else preview(record.state),
    )


def _audit(audit: RecordState | None) -> AuditInfo | None:
    if audit is None:
        return None
    lives = [part_of(LifeInfo, one, instance=guid_text(one.instance)) for one in audit.lives]
    return part_of(AuditInfo, audit, lives=lives)
