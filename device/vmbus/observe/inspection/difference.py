"""What is different between two inspections: packets, channels, rings, registers, providers, description.

One walk over both documents, ruled by the tables below. Only what both know is compared, so a running VM can be
compared with a snapshot too. Left out is what must differ: when and where each was made, ages, process ids, the digests
of guest memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import msgspec

from vmbus.observe.inspection.document import (
    AuditInfo,
    BusInfo,
    ChannelInfo,
    GpadlInfo,
    Inspection,
    LifeInfo,
    OfferInfo,
    PacketInfo,
    PartialInfo,
    ProviderInfo,
    RingInfo,
    SavedInfo,
    Source,
)

Kind = Literal["added", "removed", "changed"]

_MOST = 100_000  # changes; two snapshots of different VMs may have nothing in common

# The fields that are compared, of others all. Those behind "~": not between a running device and a saved one, of which
# they are unknown, or mean something else.
_FIELDS: dict[type[msgspec.Struct], str] = {
    Inspection: "device saved description function synic bus channels providers audit",
    SavedInfo: "description machine accelerator pci_address qemu project boot_files",
    BusInfo: "state version offers_requested offers gpadls partial",
    OfferInfo: "relid state interface_type instance subchannel withdrawn open mapped ~ teardowns",
    GpadlInfo: "relid handle bytes pages ranges address tearing_down ~ use",
    ChannelInfo: "relid started next_transaction in_flight rings packets counters ~ interface_type state quiescing",
    PacketInfo: "transaction state kind completion external size body ~ words lib save_size save described",
    ProviderInfo: "kind instance ~ status problem state_bytes state preview",
    AuditInfo: "~ lives",
}
# What members of a list are called.
_KEYS: dict[type[msgspec.Struct], Callable[[Any], str]] = {
    OfferInfo: lambda one: named(one) + (" (withdrawn)" if one.withdrawn else ""),
    GpadlInfo: lambda one: f"{one.handle:#x} of relid {one.relid}",
    PartialInfo: lambda one: f"{one.handle:#x}",
    ChannelInfo: lambda one: named(one),
    RingInfo: lambda one: f"{one.direction} ring",
    # Ids of the guest's packets and of ours are counted apart.
    PacketInfo: lambda one: f"{one.state} " * (one.state in ("held", "completion")) + str(one.transaction),
    ProviderInfo: lambda one: one.name,
    LifeInfo: lambda one: named(one),
}
# The list that says how many of another's members it lacks: then they are only counted.
_OMITTED = {"packets": "omitted", "gpadls": "gpadls_omitted"}
_NAMES = {"in_flight": "in flight", "boot_files": "boot files"}
_NO_PLACE = frozenset(("saved", "rings", "lives"))  # what is in them stands where they do


def named(one: OfferInfo | ChannelInfo | LifeInfo) -> str:
    return f"{one.instance}.{one.subchannel}" if one.subchannel else one.instance


class Change(msgspec.Struct, kw_only=True):
    """One difference. `where`: the path to it, for people and programs alike. `before` and `after` are plain data;
    None for what is not there."""

    where: list[str]
    kind: Kind
    before: Any = None
    after: Any = None


class Difference(msgspec.Struct, kw_only=True):
    """Two inspections compared. `truncated`: not everything was; a channel of which not every packet was listed has
    its packets only counted."""

    a: Source
    b: Source
    same: bool
    changes: list[Change]
    truncated: bool = False


def compare(a: Inspection, b: Inspection) -> Difference:
    """What `b` has that `a` has not, and the other way round."""
    changes: list[Change] = []
    truncated = any(channel.omitted for one in (a, b) for channel in one.channels)
    alike = (a.server is None) is (b.server is None)
    for change in _Walk(alike).values([], a, b):
        if len(changes) >= _MOST:
            truncated = True
            break
        changes.append(change)
    return Difference(a=a.source, b=b.source, same=not changes, changes=changes, truncated=truncated)


class _Walk:
    """`alike`: both are of running devices, or both were saved."""

    def __init__(self, alike: bool) -> None:
        self._alike = alike

    def _fields(self, one: msgspec.Struct) -> list[str]:
        always, _, alike = _FIELDS.get(type(one), " ".join(one.__struct_fields__)).partition("~")
        return [*always.split(), *(alike.split() if self._alike else ())]

    def values(self, where: list[str], before: Any, after: Any) -> Iterator[Change]:
        """Anything, compared to its leaves."""
        if before == after and type(before) is type(after):
            return
        if isinstance(before, PacketInfo) and isinstance(after, PacketInfo):
            yield from self._keyed(where, self._whole(before), self._whole(after))  # what one has not is omitted
        elif isinstance(before, msgspec.Struct) and isinstance(after, msgspec.Struct):
            yield from self._struct(where, before, after)
        elif isinstance(before, dict) and isinstance(after, dict):
            yield from self._keyed(where, before, after)
        elif isinstance(before, list) and isinstance(after, list):
            yield from self._list(where, before, after)
        elif before != after:
            kept = msgspec.to_builtins(before), msgspec.to_builtins(after)
            yield Change(where=where, kind="changed", before=kept[0], after=kept[1])

    def _struct(self, where: list[str], a: Any, b: Any) -> Iterator[Change]:
        for field in self._fields(a):
            before, after = getattr(a, field), getattr(b, field)
            omitted = _OMITTED.get(field, "")
            if getattr(a, omitted, 0) or getattr(b, omitted, 0):
                continue
            if (before is None or after is None) and field != "open":
                continue  # nobody knows, but of an offer, which is not open then
            if field == "boot_files" and not (before and after):
                continue  # a checkpoint has none
            if field == "description" and getattr(a, "saved", None) and getattr(b, "saved", None):
                continue  # that of the VM says more
            place = where if field in _NO_PLACE else [*where, _NAMES.get(field, field)]
            yield from self.values(place, before, after)

    def _list(self, where: list[str], before: list[Any], after: list[Any]) -> Iterator[Change]:
        keyed = [_by_name(one) for one in (before, after)]
        if keyed[0] is not None and keyed[1] is not None:
            yield from self._keyed(where, keyed[0], keyed[1])
            if any(isinstance(one, PacketInfo) for one in before):
                yield from _order(where, keyed[0], keyed[1])
            return
        for index in range(max(len(before), len(after))):
            place = [*where, str(index)]
            if index >= len(before):
                yield Change(where=place, kind="added", after=after[index])
            elif index >= len(after):
                yield Change(where=place, kind="removed", before=before[index])
            else:
                yield from self.values(place, before[index], after[index])

    def _keyed(self, where: list[str], before: dict[Any, Any], after: dict[Any, Any]) -> Iterator[Change]:
        for key, one in before.items():
            if key in after:
                yield from self.values([*where, _label(key, one)], one, after[key])
            elif not isinstance(one, RingInfo):
                yield Change(where=[*where, _label(key, one)], kind="removed", before=self._whole(one))
        for key, one in after.items():
            if key not in before and not isinstance(one, RingInfo):
                yield Change(where=[*where, _label(key, one)], kind="added", after=self._whole(one))

    def _whole(self, one: Any) -> Any:
        """What is told of something that is there on one side alone."""
        if isinstance(one, ChannelInfo):
            told = {"instance": one.instance, "relid": one.relid, "state": one.state}
            return {**told, "packets": one.in_flight.total}
        if isinstance(one, ProviderInfo):
            return {"kind": one.kind}
        plain = msgspec.to_builtins(one)
        return (
            {name: plain[name] for name in self._fields(one) if name in plain}
            if isinstance(one, msgspec.Struct)
            else plain
        )


def _by_name(items: list[Any]) -> dict[str, Any] | None:
    """A list of things with names of their own, by these; of channels those that the guest knows."""
    if items and type(items[0]) in _KEYS:
        key = _KEYS[type(items[0])]
        return {key(one): one for one in items if not (isinstance(one, ChannelInfo) and one.local)}
    if not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in items):
        return None
    named = {one["name"]: one for one in items}
    return named if len(named) == len(items) else None


def _label(key: Any, one: Any) -> str:
    return one.name if isinstance(one, ChannelInfo) else str(key)


def _order(where: list[str], before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    common = before.keys() & after.keys()
    ordered = [[key for key in one if key in common] for one in (before, after)]
    first = next(((x, y) for x, y in zip(*ordered, strict=True) if x != y), None)
    if first is not None:
        yield Change(where=[*where, "order"], kind="changed", before=first[0], after=first[1])


def lines(changes: Iterable[Change]) -> Iterator[tuple[str, str, Change]]:
    """For showing: (place, name of what changed, change), those of one place together."""
    for change in changes:
        depth = 2 if change.where[0] in ("channels", "providers", "bus") else 1
        depth = min(depth, len(change.where) - 1)
        yield " ".join(change.where[:depth]), ".".join(change.where[depth:]), change
