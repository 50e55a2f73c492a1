"""An inspection as a tree for people.

Much of what is shown comes from a guest or out of a file, so nothing of it reaches the terminal as it is: control
characters are shown as escapes, and nothing is taken for markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.text import Text
from rich.tree import Tree

from vmbus.observe.inspection.document import (
    BusInfo,
    ChannelInfo,
    Function,
    GpadlInfo,
    InFlight,
    Inspection,
    OfferInfo,
    PacketInfo,
    ProviderInfo,
    RingInfo,
    SavedInfo,
    ServerInfo,
    SynicInfo,
)

_LONGEST = 160  # characters of one value
_SHORT = 8  # items of a list on one line
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


def clean(text: object) -> str:
    """Any text in printable characters, on one line."""
    shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in str(text))
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


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


def counted(number: int, what: str) -> str:
    """1 packet, 2 packets."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def in_flight_text(count: InFlight) -> str:
    """The four figures in words."""
    return (
        f"{count.queued} queued, {count.sent} sent, {count.completions} completions waiting, "
        f"{count.held} held by providers"
    )


def _line(*parts: object, style: str = "") -> Text:
    return Text(" ".join(clean(part) for part in parts if part != ""), style=style)


def _state(state: str) -> Text:
    style = "green" if state in _GOOD else "red" if state in _BAD else ""
    return Text(clean(state), style=style)


def _titled(title: str, *parts: object, style: str = "bold") -> Text:
    text = Text(clean(title), style=style)
    for part in parts:
        if isinstance(part, Text):
            text.append(" ")
            text.append_text(part)
        elif part != "":
            text.append(f" {clean(part)}", style="not bold")
    return text


def render(document: Inspection, *, channels: Iterable[str] = (), rates: Mapping[str, Rates] | None = None) -> Tree:
    """The whole document. `channels`: show nothing but these, by name. `rates`: per second, by channel and counter."""
    wanted = frozenset(channels)
    source = document.source
    kind = {"server": "VM", "snapshot": "snapshot", "checkpoint": "checkpoint", "state": "device state"}[source.kind]
    tree = Tree(_titled(f"{kind} {source.name}", f"of {source.created}" if source.created else ""))
    shown = [channel for channel in document.channels if not wanted or channel.name in wanted]
    if wanted:
        for channel in shown:
            _channel(tree, channel, (rates or {}).get(channel.name))
        return tree
    if document.server is not None:
        tree.add(_server(document.server, document.seconds))
    if document.saved is not None:
        _saved(tree, document.saved)
    tree.add(_titled("device", document.device))
    tree.add(_titled("in flight", in_flight_text(document.in_flight)))
    _function(tree, document.function)
    _synic(tree, document.synic)
    _bus(tree, document.bus)
    branch = tree.add(_titled("channels", len(document.channels)))
    for channel in shown:
        _channel(branch, channel, (rates or {}).get(channel.name))
    branch = tree.add(_titled("providers", len(document.providers)))
    for provider in document.providers:
        _provider(branch, provider)
    if document.memory is not None:
        memory = document.memory
        where = tree.add(
            _titled("guest memory", f"{counted(memory.regions, 'region')}, {size_text(memory.bytes)} within reach")
        )
        if memory.log is None:
            where.add(_line("dirty log: none runs"))
        else:
            log = memory.log
            broken = f"; broken: {log.broken}" if log.broken else ""
            where.add(_line(f"dirty log: {counted(log.pages, 'page')} ({size_text(log.bytes)}) written by us{broken}"))
    if document.audit is not None:
        audit = document.audit
        where = tree.add(_titled("audit record", f"{audit.uid}, {audit.position} events", audit.path))
        if audit.failed:
            where.add(_line(f"recording has ended: {audit.failed}", style="red"))
        for life in audit.lives:
            name = f"{life.instance}.{life.subchannel}" if life.subchannel else life.instance
            where.add(_line(f"{name}: {life.put} packets put, {life.taken} taken"))
    return tree


def _server(server: ServerInfo, seconds: float | None) -> Text:
    words = [
        f"process {server.pid},",
        f"version {server.version},",
        f"up {age_text(server.uptime)},",
        "connected" if server.connected else "not connected",
    ]
    if server.driven_by_client:
        words.append(f"(migrated by its client: {server.migration.get('state')})")
    if server.resets:
        often = {1: "once", 2: "twice"}.get(server.resets, f"{server.resets} times")
        words.append(f"(reset {often})")
    if server.longest_turn.get("seconds"):
        words.append(f"(longest turn {age_text(server.longest_turn['seconds'])}: {server.longest_turn.get('what')})")
    if server.complaints.get("left_out"):
        words.append(f"({server.complaints['left_out']} complaints left out of its log)")
    text = _titled("device server", _state(server.phase), " ".join(words))
    if seconds is not None:
        text.append(f"; looked at in {seconds * 1000:.1f} ms", style="not bold dim")
    return text


def _saved(tree: Tree, saved: SavedInfo) -> None:
    vm = saved.description
    how = "" if saved.live is None else " live" if saved.live else " stopped"
    branch = tree.add(
        _titled(
            "saved" + how,
            f"VM {vm.get('name')}, {vm.get('memory_mib')} MiB, {counted(int(vm.get('cpus') or 0), 'CPU')}; "
            f"{saved.machine} under {saved.accelerator}, QEMU {saved.qemu}"
            + (f"; by version {saved.project}" if saved.project else ""),
        )
    )
    branch.add(_line(f"{saved.incoming_held} packets of the guest were held when the save began"))
    branch.add(_line("files: " + ", ".join(f"{name} {size_text(size)}" for name, size in saved.files.items())))


def _function(tree: Tree, function: Function) -> None:
    bar = "BAR0 off" if function.bar0 is None else f"BAR0 at {function.bar0:#x}"
    msi = f"MSI to {function.msi_address:#x}, data {function.msi_data:#x}" if function.msi_enabled else "MSI off"
    master = "bus master" if function.bus_master else "no bus master"
    tree.add(_titled("PCI function", f"{bar}, {master}, {msi}"))


def _synic(tree: Tree, synic: SynicInfo) -> None:
    words = "enabled" if synic.enabled else "disabled"
    if synic.fault:
        words += ", fault"
    if synic.bad_accesses:
        words += f", {synic.bad_accesses} bad accesses"
    words += f"; {synic.messages_waiting} messages wait for the guest"
    if synic.messages:
        words += f" ({', '.join(synic.messages)}{', ...' if synic.messages_waiting > len(synic.messages) else ''})"
    branch = tree.add(_titled("SynIC", words))
    if synic.registers:
        branch.add(_line(", ".join(f"{name} {value:#x}" for name, value in synic.registers.items())))


def _bus(tree: Tree, bus: BusInfo) -> None:
    words = f"version {bus.version}" if bus.version else ""
    if bus.state == "connected" and not bus.offers_requested:
        words += ", offers not requested"
    if bus.rejected:
        words += f", {bus.rejected} messages of the guest rejected"
    branch = tree.add(_titled("bus", _state(bus.state), words))
    offers = branch.add(_titled("offers", len(bus.offers)))
    for offer in bus.offers:
        _offer(offers, offer)
    total = len(bus.gpadls) + bus.gpadls_omitted
    gpadls = branch.add(_titled("GPADLs", total))
    for gpadl in bus.gpadls:
        gpadls.add(_gpadl(gpadl))
    if bus.gpadls_omitted:
        gpadls.add(_line(f"... {bus.gpadls_omitted} more", style="dim"))
    for partial in bus.partial:
        gpadls.add(
            _line(
                f"{partial.handle:#x} of relid {partial.relid} in progress: {partial.received} of "
                f"{partial.range_bytes} bytes of {partial.range_count} ranges"
            )
        )


def _offer(branch: Tree, offer: OfferInfo) -> None:
    text = _titled(offer.channel or offer.instance, _state(offer.state), f"relid {offer.relid}", style="")
    if offer.withdrawn:
        text.append(" withdrawn", style="yellow")
    if offer.open is not None:
        text.append(
            f", rings in GPADL {offer.open.ring_gpadl:#x} split at page {offer.open.downstream_page_offset}, "
            f"open id {offer.open.open_id}, CPU {offer.open.target_vp}"
        )
        if offer.open.user_data:
            text.append(f", user data {clean(offer.open.user_data)}")
    for title, handles in (("mapped", offer.mapped), ("to be given back", offer.teardowns)):
        if handles:
            text.append(f"; {title}: {clean(', '.join(hex(handle) for handle in handles))}")
    node = branch.add(text)
    node.add(
        _line(f"type {offer.interface_type}, instance {offer.instance}, sub-channel {offer.subchannel}", style="dim")
    )


def _gpadl(gpadl: GpadlInfo) -> Text:
    text = _line(
        f"{gpadl.handle:#x} of relid {gpadl.relid}: {size_text(gpadl.bytes)} in {gpadl.pages} pages,",
        f"{counted(gpadl.ranges, 'range')}, from {gpadl.address:#x}",
    )
    if gpadl.use:
        text.append(f", {clean(gpadl.use)}")
    if gpadl.tearing_down:
        text.append(", the guest wants it back", style="yellow")
    return text


def _channel(branch: Tree, channel: ChannelInfo, rates: Rates | None) -> None:
    words = [] if channel.relid == 0 else [f"relid {channel.relid}"]
    if channel.provider and channel.provider != channel.name:
        words.append(f"of {channel.provider}")
    if channel.local:
        words.append(f"{channel.end}'s end of a local channel")
    if channel.pipe:
        words.append("pipe")
    if not channel.started:
        words.append("paused by its owner")
    if channel.quiescing:
        words.append("stopped for a save")
    if channel.blocked:
        words.append(f"not read on: as many requests are under way as may be ({channel.request_bytes:,} bytes)")
    words.append(f"next transaction {channel.next_transaction}")
    node = branch.add(_titled(channel.name, _state(channel.state), ", ".join(words)))
    if channel.rings_problem:
        node.add(_line(f"rings: {channel.rings_problem}", style="yellow"))
    for ring in channel.rings:
        node.add(_ring(ring))
    if channel.counters is not None:
        node.add(_line("counters: " + ", ".join(f"{name} {value}" for name, value in channel.counters.items())))
    if rates:
        node.add(
            _line("per second: " + ", ".join(f"{name} {value:,.0f}" for name, value in rates.items()), style="cyan")
        )
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
    """One packet on one line."""
    words = [_STATES[packet.state]]
    if packet.kind not in ("", "completion"):
        words.append(packet.kind)
    if packet.external:
        words.append("with external data")
    if packet.completion and packet.state == "held":
        words.append("completion wanted")
    elif not packet.completion and packet.state in ("sent", "queued"):
        words.append("no completion wanted")
    if packet.age is not None:
        words.append(f"for {age_text(packet.age)}" + (" since the restore" if packet.restored else ""))
    text = _titled(str(packet.transaction), ", ".join(words))
    if packet.words:
        text.append(f"; {clean(packet.words)}", style="not bold cyan")
    if packet.size is not None:
        text.append(f"; {packet.size} B", style="not bold")
        if packet.body:
            text.append(f" {packet.body}{'...' if packet.size > len(packet.body) // 2 else ''}", style="not bold dim")
    if packet.lib:
        text.append(f"; lib {', '.join(f'{k} {v}' for k, v in packet.lib.items())}", style="not bold dim")
    if packet.save_size is not None:
        text.append(f"; saved by its provider: {packet.save_size} B", style="not bold")
        if packet.described:
            text.append(" ", style="not bold")
            text.append_text(Text(clean(_inline(packet.described)), style="not bold cyan"))
        elif packet.save:
            text.append(
                f" {packet.save}{'...' if packet.save_size > len(packet.save) // 2 else ''}", style="not bold dim"
            )
    return text


def _provider(branch: Tree, provider: ProviderInfo) -> None:
    node = branch.add(_titled(provider.name, provider.kind if provider.kind != provider.name else ""))
    if provider.problem:
        node.add(_line(provider.problem, style="red"))
    if provider.errors:
        where = node.add(_line(f"its callbacks have raised {counted(provider.errors, 'error')}", style="red"))
        for fault in provider.faults:
            where.add(_line(f"{fault.callback}: {fault.error}" + (f", {fault.times} times" if fault.times > 1 else "")))
    for name, bound in provider.bounds.items():
        if bound.reached:
            most = "" if bound.most is None else f" of {bound.most}"
            node.add(_line(f"bound reached: {name}, {bound.now}{most} now, {counted(bound.reached, 'time')} so far"))
    if provider.status is not None:
        _data(node, provider.status)
    if provider.state_bytes is not None:
        if provider.state_format:
            _data(node.add(_line(f"state: {provider.state_bytes} B of {provider.state_format}")), provider.state)
        elif provider.state_bytes:
            node.add(_line(f"state: {provider.state_bytes} B, begins with {provider.preview}"))
        else:
            node.add(_line("state: none"))


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
    if isinstance(value, dict):
        flat = {name: one for name, one in value.items() if _flat(one)}
        if flat:
            node.add(_line(_inline(flat)))
        for name, one in value.items():
            if name in flat:
                continue
            if isinstance(one, dict) and all(_flat(part) for part in one.values()):
                node.add(_line(f"{name}:", _inline(one)))
            else:
                _data(node.add(_line(f"{name}:")), one)
    elif isinstance(value, list):
        for one in value:
            if _flat(one) or (isinstance(one, dict) and all(_flat(part) for part in one.values())):
                node.add(_line(_inline(one)))
            else:
                _data(node.add(_line("-")), one)
    else:
        node.add(_line(_inline(value)))
