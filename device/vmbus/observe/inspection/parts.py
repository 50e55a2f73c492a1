"""The parts of the document, made of what a running device and a saved one have in the same form: records of offers,
GPADLs, rings and registers, and packets of ours."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import Any
from uuid import UUID

from vmbus.bus.gpadl import Gpadl, GpadlState, PartialGpadl, PartialState
from vmbus.bus.offers import OfferStateRecord
from vmbus.bus.synic import SynicState
from vmbus.device.pci import (
    COMMAND,
    COMMAND_BUS_MASTER,
    COMMAND_MEMORY,
    MSI_ADDRESS_HIGH,
    MSI_ADDRESS_LOW,
    MSI_CONTROL,
    MSI_DATA,
    MSI_ENABLE,
    bar0_address,
)
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.saved import LibBuf
from vmbus.observe.inspection.document import (
    BusInfo,
    Function,
    GpadlInfo,
    OfferInfo,
    OpenInfo,
    PacketInfo,
    PartialInfo,
    SynicInfo,
    part_of,
)
from vmbus.observe.inspection.plain import preview
from vmbus.observe.words import Seen, describe
from vmbus.wire import messages as m
from vmbus.wire.packet import DESCRIPTOR_SIZE, PacketType
from vmbus.wire.synic import PostStatus, Register

_MESSAGES_SHOWN = 16
_COMPLETION = int(PacketType.COMPLETION)


# ---- packets ---------------------------------------------------------------------------------------------------------


def words_of(type_: UUID | None, kind: int, transaction: int, offset8: int, body: bytes) -> str:
    """What a packet to the guest that waits for room says; `body` is everything behind its descriptor."""
    if type_ is None:
        return ""
    headers = max(0, offset8 * 8 - DESCRIPTOR_SIZE)
    return describe(type_, Seen(True, kind, transaction, body[:headers], body[headers:]))


def packet_info(type_: UUID | None, packet: Packet | LibBuf, *, queued: bool) -> PacketInfo:
    """A packet of ours on a channel of this type. The body of one that was sent is in the ring."""
    kind = packet.kind
    info = PacketInfo(
        transaction=packet.transaction,
        state="queued" if queued else "sent",
        kind=PacketType(kind).name.lower().replace("_", "-"),
        completion=packet.flags != 0,
    )
    if queued:
        info.size, info.body = len(packet.body), preview(packet.body)
        info.words = words_of(type_, kind, packet.transaction, packet.offset8, packet.body)
    return info


def completion_info(type_: UUID | None, transaction: int, body: bytes) -> PacketInfo:
    """A completion of ours that waits for room."""
    return PacketInfo(
        transaction=transaction,
        state="completion",
        kind="completion",
        size=len(body),
        body=preview(body),
        words=words_of(type_, _COMPLETION, transaction, 2, body),
    )


# ---- the bus ---------------------------------------------------------------------------------------------------------


def bus_info(
    state: str,
    version: int,
    offers: list[OfferInfo],
    gpadls: Collection[Gpadl | GpadlState],
    partial: Iterable[PartialGpadl | PartialState],
    *,
    offers_requested: bool,
    most: tuple[int, int] | None = None,
) -> BusInfo:
    """The bus. `most`: how many GPADLs are listed, and of how many ranges all together; None: all of them."""
    uses = {(offer.relid, handle): "mapped" for offer in offers for handle in offer.mapped or ()}
    uses |= {(offer.relid, offer.open.ring_gpadl): "rings" for offer in offers if offer.open is not None}
    leaving = {(offer.relid, handle) for offer in offers for handle in offer.teardowns}
    shown: list[GpadlInfo] = []
    ranges = 0
    for gpadl in gpadls:
        ranges += len(gpadl.ranges)
        if most is not None and (len(shown) >= most[0] or ranges > most[1]):
            break
        key = gpadl.relid, gpadl.handle
        shown.append(_gpadl(gpadl, uses.get(key, ""), getattr(gpadl, "tearing_down", key in leaving)))
    return BusInfo(
        state=state,
        version=f"{version >> 16}.{version & 0xFFFF}" if version else "",
        offers_requested=offers_requested,
        offers=offers,
        gpadls=shown,
        gpadls_omitted=len(gpadls) - len(shown),
        partial=[part_of(PartialInfo, one, received=len(one.data)) for one in partial],
    )


def _gpadl(gpadl: Gpadl | GpadlState, use: str, tearing_down: bool) -> GpadlInfo:
    ranges: Sequence[Any] = gpadl.ranges
    address = ranges[0].pfns[0] * 4096 + ranges[0].byte_offset if ranges and ranges[0].pfns else 0
    return part_of(
        GpadlInfo,
        gpadl,
        bytes=sum(one.byte_count for one in ranges),
        pages=sum(len(one.pfns) for one in ranges),
        ranges=len(ranges),
        address=address,
        use=use,
        tearing_down=tearing_down,
    )


def offer_info(
    record: OfferStateRecord, channel: str, mapped: list[int] | None = None, teardowns: Iterable[int] = ()
) -> OfferInfo:
    """One offer. `channel`: its name."""
    open_ = record.open
    return OfferInfo(
        relid=record.relid,
        state=record.state,
        channel=channel,
        subchannel=record.subchannel,
        withdrawn=record.withdrawn,
        interface_type=guid_text(record.interface_type),
        instance=guid_text(record.instance),
        open=None if open_ is None else part_of(OpenInfo, open_, user_data=open_.user_data.rstrip(b"\0").hex()),
        mapped=mapped,
        teardowns=list(teardowns),
    )


@lru_cache(maxsize=8192)
def guid_text(guid: bytes) -> str:
    """A GUID as it is written. Kept: a device that is looked at again has the same ones."""
    return str(UUID(bytes_le=guid))


# ---- registers -------------------------------------------------------------------------------------------------------


def function_info(config: bytes) -> Function:
    """The PCI function, by its configuration space, which is decoded as it is."""

    def number(at: int, size: int) -> int:
        return int.from_bytes(config[at : at + size], "little")

    command = number(COMMAND, 2)
    return Function(
        memory_enabled=bool(command & COMMAND_MEMORY),
        bus_master=bool(command & COMMAND_BUS_MASTER),
        msi_enabled=bool(number(MSI_CONTROL, 2) & MSI_ENABLE),
        msi_address=number(MSI_ADDRESS_HIGH, 4) << 32 | number(MSI_ADDRESS_LOW, 4),
        msi_data=number(MSI_DATA, 2),
        bar0=bar0_address(config),
        config=config.hex(),
    )


def synic_info(state: SynicState, bad_accesses: int | None = None) -> SynicInfo:
    return part_of(
        SynicInfo,
        state,
        registers={_name(Register, offset, "#05x"): value for offset, value in sorted(state.registers.items())},
        post_status=_name(PostStatus, state.post_status),
        messages_waiting=len(state.outbox),
        messages=[_message_name(message) for message in state.outbox[:_MESSAGES_SHOWN]],
        bad_accesses=bad_accesses,
    )


def _name(names: type[Register | PostStatus], value: int, form: str = "") -> str:
    try:
        return names(value).name
    except ValueError:
        return format(value, form)


def _message_name(message: bytes) -> str:
    number = int.from_bytes(message[:4], "little")
    found = m.MESSAGES.get(number)
    return found.message.__name__ if found is not None else f"message {number}"
