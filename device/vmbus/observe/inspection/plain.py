"""Anybody's data as plain data that JSON can carry, bounded; and bytes for people."""

from __future__ import annotations

import math
from typing import Any

import msgspec

PREVIEW = 32
"""Bytes of a packet or of a state that are shown."""

_MOST_ITEMS = 4096  # of plain data, all containers together
_DEEPEST = 16
_LONGEST = 1024  # characters of one text


def preview(data: bytes) -> str:
    """The first bytes in hex."""
    return bytes(data[:PREVIEW]).hex()


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
