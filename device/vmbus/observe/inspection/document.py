"""The inspection document: everything that is shown of a device, as plain typed data.

The same structures serve a running server and a saved state. What only one of them knows is None (or empty) in the
other. Memory that the guest writes is read once, and shown as it is: nothing in here has been validated but what says
so. Ages are seconds, sizes bytes.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

from vmbus.errors import StateError

FORMAT = 1
"""Of this document. Fields may be added without a new number."""

DEFAULT_PACKETS = 64
"""Packets of each sort that are listed for each channel, unless asked otherwise."""

MOST_PACKETS = 10_000
"""Packets that one document of a running server lists at most, all channels together: they take time on its loop."""

Part = TypeVar("Part", bound=msgspec.Struct)
SourceKind = Literal["server", "snapshot", "checkpoint", "state"]
PacketStateName = Literal["held", "sent", "queued", "completion"]


class Source(msgspec.Struct, kw_only=True):
    """What was looked at. `name`: of the VM, or the path."""

    kind: SourceKind
    name: str
    created: str = ""
    """Of something saved, UTC."""


class InFlight(msgspec.Struct):
    """Packets. `queued` wait for room in a ring to the guest, `sent` are in it or taken by the guest, `completions` of
    the guest's packets wait for room, `held` packets of the guest are not completed by their provider yet."""

    queued: int = 0
    sent: int = 0
    completions: int = 0
    held: int = 0

    def __add__(self, other: InFlight) -> InFlight:
        return InFlight(
            self.queued + other.queued,
            self.sent + other.sent,
            self.completions + other.completions,
            self.held + other.held,
        )

    @property
    def total(self) -> int:
        return self.queued + self.sent + self.completions + self.held


class ServerInfo(msgspec.Struct, kw_only=True):
    """The process that serves the device. `life`: 1 at its start; each state that it is given later (a revert, a
    migration to it) begins another. `longest_turn`: of the event loop, see `vmbus.server.turns`. `complaints`: what the
    guest made the server log, or was left out, see `vmbus.util.complaints`. `core`: whether rings and packets are in C.
    `requests`: the guest's that are under way, and the bound for all channels, see `vmbus.kmcl.allowance`."""

    pid: int
    version: str
    libvfio_user: str
    phase: str
    connected: bool
    driven_by_client: bool
    migration: dict[str, Any]
    life: int
    resets: int
    uptime: float
    longest_turn: dict[str, Any] = msgspec.field(default_factory=dict)
    complaints: dict[str, Any] = msgspec.field(default_factory=dict)
    core: str = ""
    requests: dict[str, int] = msgspec.field(default_factory=dict)


class SavedInfo(msgspec.Struct, kw_only=True):
    """What a snapshot or checkpoint says about itself. `description`: of the VM. `files`: bytes by name.

    `live`: whether the guest ran while its memory was copied; None for what cannot be.
    """

    description: dict[str, Any]
    machine: str
    accelerator: str
    pci_address: str
    qemu: str
    project: str
    live: bool | None
    incoming_held: int
    state_bytes: int
    files: dict[str, int]
    boot_files: dict[str, str]
    """SHA-256 of kernel and initramfs, by name."""


class Function(msgspec.Struct, kw_only=True):
    """The PCI function. `config`: 256 bytes in hex."""

    memory_enabled: bool
    bus_master: bool
    msi_enabled: bool
    msi_address: int
    msi_data: int
    bar0: int | None
    config: str


class SynicInfo(msgspec.Struct, kw_only=True):
    """Registers of BAR0 that hold a value, by name, and messages that the guest has not taken."""

    enabled: bool
    fault: bool
    registers: dict[str, int]
    post_status: str
    messages_waiting: int
    messages: list[str]
    """Names of the first of them."""
    bad_accesses: int | None = None


class OpenInfo(msgspec.Struct, kw_only=True):
    """The guest's OPENCHANNEL. `user_data`: hex."""

    open_id: int
    ring_gpadl: int
    target_vp: int
    downstream_page_offset: int
    user_data: str


class OfferInfo(msgspec.Struct, kw_only=True):
    """One offer. `withdrawn`: its owner is gone, and the guest has yet to release it."""

    relid: int
    state: str
    channel: str
    interface_type: str
    instance: str
    subchannel: int
    withdrawn: bool
    open: OpenInfo | None
    mapped: list[int] | None = None
    """Handles of GPADLs that its provider has mapped."""
    teardowns: list[int] = []
    """Handles of GPADLs that the guest waits to get back."""


class GpadlInfo(msgspec.Struct, kw_only=True):
    """One complete GPADL. `address`: I/O address of its first page. `use`: rings, mapped, or empty."""

    relid: int
    handle: int
    bytes: int
    pages: int
    ranges: int
    address: int
    use: str
    tearing_down: bool


class PartialInfo(msgspec.Struct, kw_only=True):
    """A GPADL of which messages are still to come."""

    relid: int
    handle: int
    range_bytes: int
    range_count: int
    received: int


class BusInfo(msgspec.Struct, kw_only=True):
    """The connection. `version`: major.minor, empty without a connection."""

    state: str
    version: str
    offers_requested: bool
    rejected: int | None = None
    offers: list[OfferInfo]
    gpadls: list[GpadlInfo]
    gpadls_omitted: int = 0
    partial: list[PartialInfo]


class RingInfo(msgspec.Struct, kw_only=True):
    """One ring. The words that both ends share are as found, also where they are impossible: `problem` says so then,
    and `used` and `free` are None.

    Attributes:
        direction: `incoming` is from the guest, `outgoing` to it.
        own_index: what we published ourselves (incoming: as read index, outgoing: as write index).
        batches: how often we published packets, or gave space back; each time the guest may have to be signalled.
        signals: how often it was. suppressed: how often that was not needed. Since the channel was opened or restored.
    """

    direction: Literal["incoming", "outgoing"]
    size: int
    write_index: int
    read_index: int
    interrupt_mask: int
    pending_send_size: int
    feature_bits: int | None = None
    used: int | None = None
    free: int | None = None
    own_index: int | None = None
    batches: int | None = None
    signals: int | None = None
    suppressed: int | None = None
    problem: str = ""

    def judge(self) -> None:
        """Fill in `used`, `free` and `problem` from the other fields."""
        problems = []
        for name, value in (("write index", self.write_index), ("read index", self.read_index)):
            if value >= self.size or value & 7:
                problems.append(f"the {name} {value:#x} is impossible")
        mine = self.read_index if self.direction == "incoming" else self.write_index
        if self.own_index is not None and mine != self.own_index:
            problems.append(f"the guest has overwritten our index, which is {self.own_index:#x}")
        if not problems:
            self.used = (self.write_index - self.read_index) % self.size
            self.free = self.size - 8 - self.used
        self.problem = "; ".join(problems)


class PacketInfo(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One packet in flight, or one saved.

    Attributes:
        state: held, sent, queued; completion: our answer to a packet of the guest, waiting for room.
        age: seconds since it was sent or came in; None for something saved.
        restored: it came back with a restore, and `age` counts from there.
        kind: inband or gpa-direct; empty for packets of the guest, of which it is not kept.
        completion: whether its sender waits for a completion.
        size: bytes behind the descriptor; None where they are not here: a sent packet lies in guest memory.
        body: the first of them in hex.
        external: a packet of the guest describes memory.
        words: what it says, for channels of Linux's own drivers (`vmbus.observe.words`).
        lib: what else the library saved (LibBuf).
        save_size, save: what the provider saved (SaveBuf): bytes, and the first of them in hex.
        described: the same in the provider's own words.
    """

    transaction: int
    state: PacketStateName
    age: float | None = None
    restored: bool = False
    kind: str = ""
    completion: bool = False
    external: bool = False
    words: str = ""
    size: int | None = None
    body: str = ""
    lib: dict[str, int] = {}
    save_size: int | None = None
    save: str = ""
    described: dict[str, Any] = {}


class ChannelInfo(msgspec.Struct, kw_only=True):
    """One channel.

    Attributes:
        provider: whose it is, as far as that is known.
        end: ours is the server's, but for channels within the device server (`local`).
        state: of something saved: of its offer.
        started: whether its owner wants packets to move. quiescing: stopped for a save.
        blocked: not read on, since its guest has as many requests under way as it may.
        request_bytes: what requests under way, and answers that wait for room, hold.
        packets: oldest first: held ones, sent ones, then what waits for room in the order in which it will leave.
        omitted: how many more there are.
        rings_problem: why there are none to be seen.
    """

    name: str
    provider: str
    end: Literal["server", "client"] = "server"
    local: bool = msgspec.field(default=False, name="loopback")
    interface_type: str
    instance: str
    subchannel: int
    relid: int = 0
    state: str
    started: bool
    quiescing: bool = msgspec.field(default=False, name="held")
    blocked: bool = False
    request_bytes: int = 0
    pipe: bool | None = None
    next_transaction: int
    in_flight: InFlight
    packets: list[PacketInfo] = []
    omitted: int = 0
    counters: dict[str, int] | None = None
    rings: list[RingInfo] = []
    rings_problem: str = ""


class FaultInfo(msgspec.Struct, kw_only=True):
    """What a callback of a provider has raised: so many times, the last time at (seconds since the epoch)."""

    callback: str
    error: str
    times: int
    last: float


class BoundInfo(msgspec.Struct, kw_only=True):
    """Something bounded. `most` None: a budget for a turn, which `reached` counts."""

    now: int
    most: int | None
    reached: int


class ProviderInfo(msgspec.Struct, kw_only=True):
    """One provider.

    Attributes:
        status: of a running one, its own words. problem: why there is none.
        errors: of a running one, how many its callbacks have raised; faults: the latest kinds of them.
        bounds: of a running one, what is bounded, by name.
        state_bytes: of a saved one. state: its saved state where that is MessagePack or JSON, as `state_format` says.
        preview: else its first bytes in hex.
    """

    kind: str
    name: str
    instance: str
    status: dict[str, Any] | None = None
    problem: str = ""
    errors: int = 0
    faults: list[FaultInfo] = []
    bounds: dict[str, BoundInfo] = {}
    state_bytes: int | None = None
    state_format: str = ""
    state: Any = None
    preview: str = ""


class DirtyLogInfo(msgspec.Struct, kw_only=True):
    """Pages that we have written since the log was started. `broken`: why it cannot be used."""

    pages: int
    bytes: int
    broken: str


class MemoryInfo(msgspec.Struct, kw_only=True):
    """Guest memory that we can reach. `log`: None while none runs."""

    regions: int
    bytes: int
    log: DirtyLogInfo | None


class LifeInfo(msgspec.Struct, kw_only=True):
    """Of an audit record: how far an open channel is, in packets."""

    instance: str
    subchannel: int
    put: int
    taken: int


class AuditInfo(msgspec.Struct, kw_only=True):
    """The audit record that is kept. `position`: events in it."""

    uid: str
    position: int
    path: str = ""
    failed: str = ""
    lives: list[LifeInfo] = []


class Inspection(msgspec.Struct, kw_only=True):
    """A device, at one moment.

    `server` is there for a running one, `saved` for a snapshot or checkpoint, neither for a bare state file. `seconds`:
    for how long the device server did nothing else while this was put together (its coding as JSON not included).
    """

    format: int = FORMAT
    source: Source
    device: str
    in_flight: InFlight
    server: ServerInfo | None = None
    saved: SavedInfo | None = None
    function: Function
    synic: SynicInfo
    bus: BusInfo
    channels: list[ChannelInfo]
    providers: list[ProviderInfo]
    memory: MemoryInfo | None = None
    audit: AuditInfo | None = None
    description: dict[str, Any] | None = None
    """Of the device, where it is known."""
    seconds: float | None = None


_SAME: dict[tuple[type[Any], type[Any]], list[str]] = {}


def part_of(part: type[Part], source: object, **more: Any) -> Part:
    """A part of the document that has what `source` has under the same names (of its class), and `more`."""
    same = _SAME.get((part, type(source)))
    if same is None:
        same = [name for name in part.__struct_fields__ if hasattr(type(source), name)]
        _SAME[part, type(source)] = same
    for name in same:
        if name not in more:
            more[name] = getattr(source, name)
    return part(**more)


def from_answer(answer: dict[str, Any], name: str) -> Inspection:
    """The document in a device server's answer to `inspect`; `name` is what the VM is called.

    Raises StateError when the server is of a version with another document.
    """
    version = answer.get("format")
    if version != FORMAT:
        raise StateError(
            f"the device server of {name} gives its inspection in format {version}; this program reads {FORMAT}: use "
            "the version of the tools that started it"
        )
    try:
        found = msgspec.convert(answer, Inspection)
    except msgspec.ValidationError as error:
        raise StateError(f"the device server of {name} gave an inspection that cannot be read: {error}") from error
    found.source.name = name
    return found


def as_answer(document: Inspection) -> dict[str, Any]:
    """The document as a device server's answer: its fields by name; the rest is coded when it is sent."""
    return {name: getattr(document, name) for name in Inspection.__struct_fields__}
