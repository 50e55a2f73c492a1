"""Pieces that live and saved inspections share: bytes for people, what the registers say, provider's data as plain."""

from __future__ import annotations

import math
from typing import Any
from uuid import UUID

import msgspec

from vmbus.observe.inspection.document import Function, SynicInfo
from vmbus.observe.words import Seen, describe
from vmbus.transport.pci import (
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
from vmbus.wire import messages as m
from vmbus.wire.packet import DESCRIPTOR_SIZE, PacketType
from vmbus.wire.synic import PostStatus, Register

PREVIEW = 32
"""Bytes of a packet or of a state that are shown."""

_MESSAGES_SHOWN = 16
_MOST_ITEMS = 4096  # of plain data, all containers together
_DEEPEST = 16
_LONGEST = 1024  # characters of one text


def preview(data: bytes) -> str:
    """The first bytes in hex."""
    return bytes(data[:PREVIEW]).hex()


def kind_name(kind: int) -> str:
    """A packet type's name."""
    try:
        return PacketType(kind).name.lower().replace("_", "-")
    except ValueError:
        return f"type {kind}"


def queued_words(type_: UUID, kind: int, transaction: int, offset8: int, body: bytes) -> str:
    """What a packet to the guest that waits for room says; `body` is everything behind its descriptor."""
    headers = max(0, offset8 * 8 - DESCRIPTOR_SIZE)
    return describe(type_, Seen(True, kind, transaction, body[:headers], body[headers:]))


def version_name(version: int) -> str:
    """major.minor of a protocol version."""
    return f"{version >> 16}.{version & 0xFFFF}"


def message_name(message: bytes) -> str:
    """The name of a channel message by its type."""
    number = int.from_bytes(message[:4], "little")
    found = m.MESSAGES.get(number)
    return found.message.__name__ if found is not None else f"message {number}"


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


def synic_info(
    *,
    enabled: bool,
    fault: bool,
    registers: dict[int, int],
    post_status: int,
    outbox: list[bytes],
    waiting: int,
    bad_accesses: int | None = None,
) -> SynicInfo:
    """The SynIC. `outbox`: the first of the `waiting` messages."""
    try:
        post = PostStatus(post_status).name
    except ValueError:
        post = str(post_status)
    return SynicInfo(
        enabled=enabled,
        fault=fault,
        registers={_register(offset): value for offset, value in sorted(registers.items())},
        post_status=post,
        messages_waiting=waiting,
        messages=[message_name(message) for message in outbox[:_MESSAGES_SHOWN]],
        bad_accesses=bad_accesses,
    )


def _register(offset: int) -> str:
    try:
        return Register(offset).name
    except ValueError:
        return f"{offset:#05x}"


def plain(value: Any) -> Any:
    """Any data as what JSON can carry, bounded: long lists are cut (and say so), bytes become hex."""
    return _plain(value, _Budget(), 0)


class _Budget:
    def __init__(self) -> None:
        self.left = _MOST_ITEMS


def _plain(value: Any, budget: _Budget, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        text = value.encode(errors="backslashreplace").decode()
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"
    if isinstance(value, int):
        return value if -(1 << 63) <= value < 1 << 64 else hex(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        return data.hex() if len(data) <= PREVIEW else f"{preview(data)}... ({len(data)} bytes)"
    if depth >= _DEEPEST:
        return "..."
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for key, one in value.items():
            if budget.left <= 0:
                found["..."] = f"{len(value) - len(found)} more"
                break
            budget.left -= 1
            found[key if isinstance(key, str) else str(_plain(key, budget, _DEEPEST))] = _plain(one, budget, depth + 1)
        return found
    if isinstance(value, list | tuple | set | frozenset):
        items: list[Any] = []
        for one in value:
            if budget.left <= 0:
                items.append(f"... {len(value) - len(items)} more")
                break
            budget.left -= 1
            items.append(_plain(one, budget, depth + 1))
        return items
    try:
        return _plain(msgspec.to_builtins(value), budget, depth + 1)
    except (TypeError, ValueError):
        return repr(value)[:200]


def decoded(data: bytes) -> tuple[str, Any]:
    """Saved bytes of somebody as data: (format, data), or ("", None) where they are neither MessagePack nor JSON.

    Only a whole map or array counts: any short bytes are some MessagePack number.
    """
    if not data:
        return "", None
    for name, decode in (("MessagePack", msgspec.msgpack.decode), ("JSON", msgspec.json.decode)):
        try:
            value = decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError, TypeError):
            continue
        if isinstance(value, dict | list):
            return name, plain(value)
    return "", None
