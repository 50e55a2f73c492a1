"""What is different between two inspections: packets, channels, rings, registers, providers, description.

Only what both know is compared, so a running VM can be compared with a snapshot too. Left out is what must differ:
when and where each was made, ages, process ids, the digests of guest memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import msgspec

from vmbus.observe.inspection.document import ChannelInfo, Inspection, PacketInfo, Source

Kind = Literal["added", "removed", "changed"]

# Of a packet: what says nothing about the packet itself.
_VOLATILE = ("age", "restored")
_PROVIDER = ("kind", "instance", "status", "problem", "state_bytes", "state", "preview")
_MOST = 100_000  # changes; two snapshots of different VMs may have nothing in common


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
    for change in _changes(a, b):
        if len(changes) >= _MOST:
            truncated = True
            break
        changes.append(change)
    return Difference(a=a.source, b=b.source, same=not changes, changes=changes, truncated=truncated)


def _changes(a: Inspection, b: Inspection) -> Iterator[Change]:
    yield from _values(["device"], a.device, b.device)
    if a.saved is not None and b.saved is not None:
        yield from _values(["description"], a.saved.description, b.saved.description)
        for field in ("machine", "accelerator", "pci_address", "qemu", "project"):
            yield from _values([field], getattr(a.saved, field), getattr(b.saved, field))
        if a.saved.boot_files and b.saved.boot_files:
            yield from _values(["boot files"], a.saved.boot_files, b.saved.boot_files)
    else:
        yield from _known(["description"], a.description, b.description)
    yield from _known(["function"], _builtins(a.function), _builtins(b.function))
    yield from _known(["synic"], _builtins(a.synic), _builtins(b.synic))
    yield from _bus(a, b)
    yield from _channels(a, b)
    yield from _providers(a, b)
    if a.audit is not None and b.audit is not None and a.audit.lives and b.audit.lives:
        yield from _keyed(
            ["audit"],
            {_name(one.instance, one.subchannel): _builtins(one) for one in a.audit.lives},
            {_name(one.instance, one.subchannel): _builtins(one) for one in b.audit.lives},
        )


def _builtins(value: Any) -> dict[str, Any]:
    return dict(msgspec.to_builtins(value))


def _name(instance: str, subchannel: int) -> str:
    return f"{instance}.{subchannel}" if subchannel else instance


def _values(where: list[str], before: Any, after: Any) -> Iterator[Change]:
    """Plain data, compared to its leaves."""
    if before == after and type(before) is type(after):
        return
    if isinstance(before, dict) and isinstance(after, dict):
        yield from _keyed(where, before, after)
    elif isinstance(before, list) and isinstance(after, list):
        keys_before, keys_after = _by_name(before), _by_name(after)
        if keys_before is not None and keys_after is not None:
            yield from _keyed(where, keys_before, keys_after)
            return
        for index in range(max(len(before), len(after))):
            place = [*where, str(index)]
            if index >= len(before):
                yield Change(where=place, kind="added", after=after[index])
            elif index >= len(after):
                yield Change(where=place, kind="removed", before=before[index])
            else:
                yield from _values(place, before[index], after[index])
    elif before != after:
        yield Change(where=where, kind="changed", before=before, after=after)


def _by_name(items: list[Any]) -> dict[str, Any] | None:
    """A list of things with names of their own (providers of a description), by these."""
    if not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in items):
        return None
    named = {one["name"]: one for one in items}
    return named if len(named) == len(items) else None


def _keyed(where: list[str], before: dict[Any, Any], after: dict[Any, Any]) -> Iterator[Change]:
    for key, one in before.items():
        place = [*where, str(key)]
        if key not in after:
            yield Change(where=place, kind="removed", before=one)
        else:
            yield from _values(place, one, after[key])
    for key, one in after.items():
        if key not in before:
            yield Change(where=[*where, str(key)], kind="added", after=one)


def _known(where: list[str], before: dict[str, Any] | None, after: dict[str, Any] | None) -> Iterator[Change]:
    """Fields of which both have something."""
    if before is None or after is None:
        return
    common = [name for name in before if before[name] is not None and after.get(name) is not None]
    yield from _keyed(where, {name: before[name] for name in common}, {name: after[name] for name in common})


def _bus(a: Inspection, b: Inspection) -> Iterator[Change]:
    for field in ("state", "version", "offers_requested"):
        yield from _values(["bus", field], getattr(a.bus, field), getattr(b.bus, field))
    mapped = all(offer.mapped is not None for one in (a, b) for offer in one.bus.offers)
    offers = []
    for one in (a, b):
        offers.append(
            {
                f"{_name(offer.instance, offer.subchannel)}{' (withdrawn)' if offer.withdrawn else ''}": {
                    name: value
                    for name, value in _builtins(offer).items()
                    if name != "channel" and (mapped or name not in ("mapped", "teardowns"))
                }
                for offer in one.bus.offers
            }
        )
    yield from _keyed(["bus", "offers"], *offers)
    saved = a.server is None and b.server is None
    if not (a.bus.gpadls_omitted or b.bus.gpadls_omitted):
        yield from _keyed(
            ["bus", "gpadls"],
            *(
                {
                    f"{gpadl.handle:#x} of relid {gpadl.relid}": {
                        name: value for name, value in _builtins(gpadl).items() if saved or name != "use"
                    }
                    for gpadl in one.bus.gpadls
                }
                for one in (a, b)
            ),
        )
    yield from _keyed(
        ["bus", "partial"], *({f"{one.handle:#x}": _builtins(one) for one in both.bus.partial} for both in (a, b))
    )


def _channels(a: Inspection, b: Inspection) -> Iterator[Change]:
    """Channels by what they are offered as. Between a running VM and a saved one, their names and states mean
    different things."""
    kept = [
        {
            _name(channel.instance, channel.subchannel): channel
            for channel in one.channels
            if not channel.local and channel.end == "server"
        }
        for one in (a, b)
    ]
    alike = (a.server is None) is (b.server is None)
    before, after = kept
    for key, channel in before.items():
        where = ["channels", channel.name]
        if key not in after:
            yield Change(where=where, kind="removed", before=_summary(channel))
            continue
        yield from _channel(where, channel, after[key], alike=alike)
    for key, channel in after.items():
        if key not in before:
            yield Change(where=["channels", channel.name], kind="added", after=_summary(channel))


def _summary(channel: ChannelInfo) -> dict[str, Any]:
    return {
        "instance": channel.instance,
        "relid": channel.relid,
        "state": channel.state,
        "packets": channel.in_flight.total,
    }


def _channel(where: list[str], a: ChannelInfo, b: ChannelInfo, *, alike: bool) -> Iterator[Change]:
    fields = ["relid", "started", "next_transaction"]
    if alike:
        fields += ["interface_type", "state", "quiescing"]
    for field in fields:
        yield from _values([*where, field], getattr(a, field), getattr(b, field))
    yield from _values([*where, "in flight"], _builtins(a.in_flight), _builtins(b.in_flight))
    rings = [{ring.direction: ring for ring in one.rings} for one in (a, b)]
    for direction in ("incoming", "outgoing"):
        ring_a, ring_b = (one.get(direction) for one in rings)
        place = [*where, f"{direction} ring"]
        if ring_a is not None and ring_b is not None:
            plain_a, plain_b = _builtins(ring_a), _builtins(ring_b)
            yield from _known(place, plain_a, plain_b)
    yield from _packets([*where, "packets"], a, b, alike=alike)
    if a.counters is not None and b.counters is not None:
        yield from _values([*where, "counters"], a.counters, b.counters)


def _packets(where: list[str], a: ChannelInfo, b: ChannelInfo, *, alike: bool) -> Iterator[Change]:
    if a.omitted or b.omitted:
        return
    before, after = ({_packet_key(one): one for one in channel.packets} for channel in (a, b))
    for key, packet in before.items():
        if key not in after:
            yield Change(where=[*where, key], kind="removed", before=_packet(packet, alike))
        else:
            yield from _values([*where, key], _packet(packet, alike), _packet(after[key], alike))
    for key, packet in after.items():
        if key not in before:
            yield Change(where=[*where, key], kind="added", after=_packet(packet, alike))
    order = [list(one) for one in (before, after)]
    common = set(before) & set(after)
    ordered = [[key for key in one if key in common] for one in order]
    if ordered[0] != ordered[1]:
        first = next(index for index, (x, y) in enumerate(zip(*ordered, strict=True)) if x != y)
        yield Change(where=[*where, "order"], kind="changed", before=ordered[0][first], after=ordered[1][first])


def _packet_key(packet: PacketInfo) -> str:
    """Ids of the guest's packets and of ours are counted apart."""
    if packet.state in ("held", "completion"):
        return f"{packet.state} {packet.transaction}"
    return str(packet.transaction)


def _packet(packet: PacketInfo, alike: bool) -> dict[str, Any]:
    keep = {name: value for name, value in _builtins(packet).items() if name not in _VOLATILE and value is not None}
    if not alike:
        for name in ("lib", "save", "save_size", "described", "words"):
            keep.pop(name, None)
    return keep


def _providers(a: Inspection, b: Inspection) -> Iterator[Change]:
    live = [one.server is not None for one in (a, b)]
    named = [{provider.name: _builtins(provider) for provider in one.providers} for one in (a, b)]
    for name, one in named[0].items():
        other = named[1].get(name)
        if other is None:
            yield Change(where=["providers", name], kind="removed", before={"kind": one["kind"]})
        else:
            fields = _PROVIDER if live[0] is live[1] else ("kind", "instance")
            yield from _known(["providers", name], *({field: both[field] for field in fields} for both in (one, other)))
    for name, one in named[1].items():
        if name not in named[0]:
            yield Change(where=["providers", name], kind="added", after={"kind": one["kind"]})


def lines(changes: Iterable[Change]) -> Iterator[tuple[str, str, Change]]:
    """For showing: (place, name of what changed, change), those of one place together."""
    for change in changes:
        depth = 2 if change.where[0] in ("channels", "providers", "bus") else 1
        depth = min(depth, len(change.where) - 1)
        yield " ".join(change.where[:depth]), ".".join(change.where[depth:]), change
