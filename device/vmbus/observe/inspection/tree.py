"""An inspection as a tree for people.

Much of what is shown comes from a guest or out of a file, so nothing of it reaches the terminal as it is: control
characters are shown as escapes, and nothing is taken for markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.text import Text
from rich.tree import Tree

from vmbus.observe.inspection.difference import named
from vmbus.observe.inspection.document import (
    AuditInfo,
    BusInfo,
    ChannelInfo,
    Function,
    InFlight,
    Inspection,
    MemoryInfo,
    OfferInfo,
    PacketInfo,
    ProviderInfo,
    RingInfo,
    SavedInfo,
    ServerInfo,
    SynicInfo,
)
from vmbus.observe.words.seen import counted

_LONGEST = 160  # characters of one value
_SHORT = 8  # items of a list on one line
_SOURCES = {"server": "VM", "snapshot": "snapshot", "checkpoint": "checkpoint", "state": "device state"}
_RINGS = {"incoming": "ring from the guest", "outgoing": "ring to the guest"}
_STATES = {
    "held": "held by its provider",
    "sent": "sent",
    "queued": "queued",
    "completion": "completion, waits for room",
}
_GOOD = {"active", "open", "connected", "running"}
_BAD = {"closing", "rescinded"}

Rates = Mapping[str, float]


def clean(text: object, most: int = _LONGEST) -> str:
    """Any text in printable characters, on one line."""
    shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in str(text))
    return shown if len(shown) <= most else f"{shown[:most]}..."


def size_text(size: float) -> str:
    """Bytes for people: exact below 64 KiB."""
    if size < 1 << 16:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024 or unit == "GiB":
            break
    return f"{size:.1f} {unit}"


def age_text(seconds: float) -> str:
    """A time span for people."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def in_flight_text(count: InFlight) -> str:
    """The four figures in words."""
    return (
        f"{count.queued} queued, {count.sent} sent, {count.completions} completions waiting, "
        f"{count.held} held by providers"
    )


def _line(*parts: object, style: str = "") -> Text:
    return Text(" ".join(clean(part) for part in parts if part != ""), style=style)


def _listed(*words: object) -> str:
    """Those that are said, with commas."""
    return ", ".join(str(word) for word in words if word)


def _state(state: str) -> Text:
    return Text(clean(state), style="green" if state in _GOOD else "red" if state in _BAD else "")


def _titled(title: str, *parts: object, style: str = "bold") -> Text:
    text = Text(clean(title), style=style)
    for part in parts:
        if isinstance(part, Text):
            text.append(" ").append_text(part)
        elif part != "":
            text.append(f" {clean(part)}", style="not bold")
    return text


def render(document: Inspection, *, channels: Iterable[str] = (), rates: Mapping[str, Rates] | None = None) -> Tree:
    """The whole document. `channels`: show nothing but these, by name. `rates`: per second, by channel and counter."""
    wanted = frozenset(channels)
    moved = rates or {}
    source = document.source
    tree = Tree(_titled(f"{_SOURCES[source.kind]} {source.name}", f"of {source.created}" if source.created else ""))
    if wanted:
        for channel in document.channels:
            if channel.name in wanted:
                _channel(tree, channel, moved.get(channel.name))
        return tree
    if document.server is not None:
        tree.add(_server(document.server, document.seconds))
    if document.saved is not None:
        _saved(tree, document.saved)
    tree.add(_titled("device", document.device))
    tree.add(_titled("in flight", in_flight_text(document.in_flight)))
    tree.add(_function(document.function))
    _synic(tree, document.synic)
    _bus(tree, document.bus)
    branch = tree.add(_titled("channels", len(document.channels)))
    for channel in document.channels:
        _channel(branch, channel, moved.get(channel.name))
    branch = tree.add(_titled("providers", len(document.providers)))
    for provider in document.providers:
        _provider(branch, provider)
    if document.memory is not None:
        _memory(tree, document.memory)
    if document.audit is not None:
        _audit(tree, document.audit)
    return tree


def _server(server: ServerInfo, seconds: float | None) -> Text:
    often = {1: "once", 2: "twice"}.get(server.resets, f"{server.resets} times")
    turn, left_out = server.longest_turn, server.complaints.get("left_out")
    words = [
        f"process {server.pid}, version {server.version}, up {age_text(server.uptime)},",
        "connected" if server.connected else "not connected",
        f"(migrated by its client: {server.migration.get('state')})" if server.driven_by_client else "",
        f"(reset {often})" if server.resets else "",
        f"(longest turn {age_text(turn['seconds'])}: {turn.get('what')})" if turn.get("seconds") else "",
        f"({left_out} complaints left out of its log)" if left_out else "",
    ]
    text = _titled("device server", _state(server.phase), *words)
    if seconds is not None:
        text.append(f"; looked at in {seconds * 1000:.1f} ms", style="not bold dim")
    return text


def _saved(tree: Tree, saved: SavedInfo) -> None:
    vm = saved.description
    how = {None: "", True: " live", False: " stopped"}[saved.live]
    words = (
        f"VM {vm.get('name')}, {vm.get('memory_mib')} MiB, {counted(int(vm.get('cpus') or 0), 'CPU')}; "
        f"{saved.machine} under {saved.accelerator}, QEMU {saved.qemu}"
        + (f"; by version {saved.project}" if saved.project else "")
    )
    branch = tree.add(_titled(f"saved{how}", words))
    branch.add(_line(f"{saved.incoming_held} packets of the guest were held when the save began"))
    branch.add(_line("files: " + ", ".join(f"{name} {size_text(size)}" for name, size in saved.files.items())))


def _function(function: Function) -> Text:
    words = _listed(
        "BAR0 off" if function.bar0 is None else f"BAR0 at {function.bar0:#x}",
        "bus master" if function.bus_master else "no bus master",
        f"MSI to {function.msi_address:#x}, data {function.msi_data:#x}" if function.msi_enabled else "MSI off",
    )
    return _titled("PCI function", words)


def _synic(tree: Tree, synic: SynicInfo) -> None:
    words = _listed(
        "enabled" if synic.enabled else "disabled",
        synic.fault and "fault",
        synic.bad_accesses and f"{synic.bad_accesses} bad accesses",
    )
    words += f"; {synic.messages_waiting} messages wait for the guest"
    if synic.messages:
        words += f" ({_listed(*synic.messages, synic.messages_waiting > len(synic.messages) and '...')})"
    branch = tree.add(_titled("SynIC", words))
    if synic.registers:
        branch.add(_line(", ".join(f"{name} {value:#x}" for name, value in synic.registers.items())))


def _bus(tree: Tree, bus: BusInfo) -> None:
    words = _listed(
        bus.version and f"version {bus.version}",
        bus.state == "connected" and not bus.offers_requested and "offers not requested",
        bus.rejected and f"{bus.rejected} messages of the guest rejected",
    )
    branch = tree.add(_titled("bus", _state(bus.state), words))
    offers = branch.add(_titled("offers", len(bus.offers)))
    for offer in bus.offers:
        _offer(offers, offer)
    gpadls = branch.add(_titled("GPADLs", len(bus.gpadls) + bus.gpadls_omitted))
    for gpadl in bus.gpadls:
        text = _line(
            f"{gpadl.handle:#x} of relid {gpadl.relid}: {size_text(gpadl.bytes)} in {gpadl.pages} pages,",
            _listed(counted(gpadl.ranges, "range"), f"from {gpadl.address:#x}", gpadl.use),
        )
        if gpadl.tearing_down:
            text.append(", the guest wants it back", style="yellow")
        gpadls.add(text)
    if bus.gpadls_omitted:
        gpadls.add(_line(f"... {bus.gpadls_omitted} more", style="dim"))
    for one in bus.partial:
        received = f"{one.received} of {one.range_bytes} bytes of {one.range_count} ranges"
        gpadls.add(_line(f"{one.handle:#x} of relid {one.relid} in progress: {received}"))


def _offer(branch: Tree, offer: OfferInfo) -> None:
    text = _titled(offer.channel or offer.instance, _state(offer.state), f"relid {offer.relid}", style="")
    if offer.withdrawn:
        text.append(" withdrawn", style="yellow")
    if (one := offer.open) is not None:
        text.append(
            f", rings in GPADL {one.ring_gpadl:#x} split at page {one.downstream_page_offset}, open id {one.open_id}, "
            f"CPU {one.target_vp}" + (f", user data {clean(one.user_data)}" if one.user_data else "")
        )
    for title, handles in (("mapped", offer.mapped), ("to be given back", offer.teardowns)):
        if handles:
            text.append(f"; {title}: {clean(', '.join(hex(handle) for handle in handles))}")
    guids = f"type {offer.interface_type}, instance {offer.instance}, sub-channel {offer.subchannel}"
    branch.add(text).add(_line(guids, style="dim"))


def _channel(branch: Tree, channel: ChannelInfo, rates: Rates | None) -> None:
    words = _listed(
        channel.relid and f"relid {channel.relid}",
        channel.provider != channel.name and channel.provider and f"of {channel.provider}",
        channel.local and f"{channel.end}'s end of a local channel",
        channel.pipe and "pipe",
        not channel.started and "paused by its owner",
        channel.quiescing and "stopped for a save",
        channel.blocked and f"not read on: as many requests are under way as may be ({channel.request_bytes:,} bytes)",
        f"next transaction {channel.next_transaction}",
    )
    node = branch.add(_titled(channel.name, _state(channel.state), words))
    if channel.rings_problem:
        node.add(_line(f"rings: {channel.rings_problem}", style="yellow"))
    for ring in channel.rings:
        node.add(_ring(ring))
    if channel.counters is not None:
        node.add(_line("counters: " + _inline(channel.counters)))
    if rates:
        moved = ", ".join(f"{name} {value:,.0f}" for name, value in rates.items())
        node.add(_line(f"per second: {moved}", style="cyan"))
    packets = node.add(_titled("packets", in_flight_text(channel.in_flight), style=""))
    for packet in channel.packets:
        packets.add(packet_text(packet))
    if channel.omitted:
        packets.add(_line(f"... {channel.omitted} more (--packets N, --channel {channel.name})", style="dim"))


def _ring(ring: RingInfo) -> Text:
    text = _line(
        f"{_RINGS[ring.direction]}: {size_text(ring.size)}, write {ring.write_index:#x}, read {ring.read_index:#x},"
    )
    if ring.used is not None and ring.free is not None:
        text.append(f" {ring.used} used, {ring.free} free,")
    text.append(f" mask {ring.interrupt_mask}, pending send size {ring.pending_send_size}")
    if ring.signals is not None:
        text.append(f"; signals {ring.signals} sent, {ring.suppressed} suppressed")
    if ring.problem:
        text.append(f"; {clean(ring.problem)}", style="red")
    return text


def packet_text(packet: PacketInfo) -> Text:
    words = _listed(
        _STATES[packet.state],
        packet.kind != "completion" and packet.kind,
        packet.external and "with external data",
        packet.completion and packet.state == "held" and "completion wanted",
        not packet.completion and packet.state in ("sent", "queued") and "no completion wanted",
        packet.age is not None and f"for {age_text(packet.age)}" + (" since the restore" if packet.restored else ""),
    )
    text = _titled(str(packet.transaction), words)
    if packet.words:
        text.append(f"; {clean(packet.words)}", style="not bold cyan")
    if packet.size is not None:
        text.append(f"; {packet.size} B", style="not bold").append_text(_first(packet.body, packet.size))
    if packet.lib:
        text.append(f"; lib {_inline(packet.lib)}", style="not bold dim")
    if packet.save_size is not None:
        text.append(f"; saved by its provider: {packet.save_size} B", style="not bold")
        if packet.described:
            text.append(f" {clean(_inline(packet.described))}", style="not bold cyan")
        else:
            text.append_text(_first(packet.save, packet.save_size))
    return text


def _first(data: str, size: int) -> Text:
    """The first of so many bytes, in hex."""
    return Text(f" {data}{'...' if size > len(data) // 2 else ''}" if data else "", style="not bold dim")


def _provider(branch: Tree, provider: ProviderInfo) -> None:
    node = branch.add(_titled(provider.name, provider.kind if provider.kind != provider.name else ""))
    if provider.problem:
        node.add(_line(provider.problem, style="red"))
    if provider.errors:
        where = node.add(_line(f"its callbacks have raised {counted(provider.errors, 'error')}", style="red"))
        for fault in provider.faults:
            where.add(_line(_listed(f"{fault.callback}: {fault.error}", fault.times > 1 and f"{fault.times} times")))
    for name, bound in provider.bounds.items():
        if bound.reached:
            most = "" if bound.most is None else f" of {bound.most}"
            node.add(_line(f"bound reached: {name}, {bound.now}{most} now, {counted(bound.reached, 'time')} so far"))
    if provider.status is not None:
        _data(node, provider.status)
    if provider.state_bytes is not None:
        how = f" of {provider.state_format}" if provider.state_format else f", begins with {provider.preview}"
        where = node.add(_line(f"state: {provider.state_bytes} B{how}" if provider.state_bytes else "state: none"))
        if provider.state_format:
            _data(where, provider.state)


def _memory(tree: Tree, memory: MemoryInfo) -> None:
    words = f"{counted(memory.regions, 'region')}, {size_text(memory.bytes)} within reach"
    where = tree.add(_titled("guest memory", words))
    said = "none runs"
    if (log := memory.log) is not None:
        said = f"{counted(log.pages, 'page')} ({size_text(log.bytes)}) written by us"
        said += f"; broken: {log.broken}" if log.broken else ""
    where.add(_line(f"dirty log: {said}"))


def _audit(tree: Tree, audit: AuditInfo) -> None:
    where = tree.add(_titled("audit record", f"{audit.uid}, {audit.position} events", audit.path))
    if audit.failed:
        where.add(_line(f"recording has ended: {audit.failed}", style="red"))
    for life in audit.lives:
        where.add(_line(f"{named(life)}: {life.put} packets put, {life.taken} taken"))


def _flat(value: Any) -> bool:
    """Whether it goes on a line with others: no map, and a list only if it is short and of simple things."""
    if isinstance(value, list):
        return len(value) <= _SHORT and not any(isinstance(one, dict | list) for one in value)
    return not isinstance(value, dict) or not value


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_inline(one)}" for name, one in value.items())
    if isinstance(value, list):
        return f"[{', '.join(_inline(one) for one in value)}]"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _data(node: Tree, value: Any) -> None:
    """Plain data: short things on one line, the rest as branches."""
    if _short(value) and not isinstance(value, dict | list):
        node.add(_line(_inline(value)))
        return
    if isinstance(value, dict):
        flat = {name: one for name, one in value.items() if _flat(one)}
        if flat:
            node.add(_line(_inline(flat)))
        rest = [(f"{name}:", one) for name, one in value.items() if name not in flat]
    else:
        rest = [("", one) for one in value]
    for title, one in rest:
        if _short(one):
            node.add(_line(title, _inline(one)))
        else:
            _data(node.add(_line(title or "-")), one)


def _short(value: Any) -> bool:
    """Whether it goes on a line of its own."""
    return _flat(value) or (isinstance(value, dict) and all(_flat(part) for part in value.values()))
