"""Save at every step: a device and a guest whose every step is a point at which the device can be saved and replaced.

A step of the guest is a register access, a memory fence of its driver or of its rings (those stand exactly where the
order of its accesses matters), or taking an interrupt. A step of the device is a turn of its channels, a call that a
provider asked for, or a timer. Nothing else moves anything, and nothing is random: a script comes to the same points in
every run, until a save is made.

`World` is the device in this process, with the pause, save and restore that the server does around it. Time is
virtual, so a wait that nothing can end is noticed at once (`Stuck`). A save drops an interrupt that the guest has not
taken, which is the worst that can happen to it.

`every_step` runs a script in six ways, which must all come to the same end:

    plain        no saves
    thorough     at every point: saved twice, restored, saved, restored, saved; the states compared
    checkpoint   at every point: saved, and run on
    slow         as thorough, and a turn has room for one piece of what is to be done
    each         one run for each point, saved and restored there alone: later restores hide what an earlier one lost
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock
from uuid import UUID

import msgspec

from support.twins import RingFences
from vmbus.device import saved
from vmbus.device.device import Device
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.saved import ChannelChunk, CompletionChunk, PacketChunk, decode_chunk, decode_lib
from vmbus.kmcl.server import ServerChannel
from vmbus.memory.guest import MemoryRevoked
from vmbus.providers import Provider
from vmbus.ring import HEADER_SIZE, PENDING_SEND_SIZE, READ_INDEX, WRITE_INDEX
from vmbus.testkit.steps import difference
from vmbus.util.backlog import TURN_SECONDS
from vmbus.wire import messages as m
from vmbus.wire.packet import FLAG_COMPLETION_REQUESTED, PacketType, split_packets
from vmbus.wire.synic import SLOT_HEADER, SLOT_OFFSET, Register
from vmbus_guest.driver import VmbusDriver

PAGE = 4096
BASE = 0x1_0000_0000
RAM = 1 << 20
NAME = "vmbus0"
CONFIG = bytes(range(256))
PAUSE_SECONDS = 10.0
TURNS = 2_000
# A restore wakes everybody once. A save at every step of what that causes would never come to an end, so after this
# many points at which nothing has moved there are no further saves until something moves.
IDLE_SAVES = 4
SLOW = "at every step of slow turns"

Tamper = Callable[[Any, saved.DeviceState], saved.DeviceState]
Described = tuple[type[Provider], str, UUID, dict[str, Any]]


class Stuck(AssertionError):
    """Somebody waits, and nothing is left to be done that could end it."""


class Diverged(AssertionError):
    """A run with saves came to another end than the run without, or a state is not what it should be."""


class Buffer:
    """Implements DmaBuffer."""

    def __init__(self, iova: int, view: memoryview) -> None:
        self.iova = iova
        self.view = view
        self.size = len(view)


class _Timer:
    def __init__(self, due: float, call: Callable[[], None]) -> None:
        self.due = due
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Do not call."""
        self.call = None


class Life:
    """One life of the device: what ends with its process. Implements the providers' `Host`, and `vmbus.device.device`'s
    surroundings. A life that has ended must not touch anything any more."""

    def __init__(self, world: World, described: Sequence[Described]) -> None:
        self._world = world
        self.ended = False
        self.soon: deque[Callable[[], None]] = deque()
        self.timers: list[_Timer] = []
        self.scheduled = False
        self.device = Device(self._interrupt, self._schedule, local_schedule=self._schedule, clock=world.clock)
        self.providers: list[Provider] = []
        for one in described:
            self.add_provider(one)

    def add_provider(self, described: Described) -> Provider:
        kind, name, instance, options = described
        provider = kind(self, name, instance, options)
        self.providers.append(provider)
        provider.start()
        return provider

    def _interrupt(self) -> None:
        assert not self.ended, "a device that was replaced has raised an interrupt"
        self._world.interrupted = True

    def _schedule(self) -> None:
        self.scheduled = True

    def add_channel(self, channel: ServerChannel) -> None:
        """See Host."""
        self.device.add_channel(channel)

    def add_client(self, channel: ClientChannel) -> None:
        """See Host."""
        self.device.local_bus.attach(channel)

    def call_soon(self, call: Callable[[], None]) -> None:
        """See Host."""
        self.soon.append(call)

    def call_later(self, seconds: float, call: Callable[[], None]) -> _Timer:
        """See Host; in virtual time."""
        self.timers.append(_Timer(self._world.now + seconds, call))
        return self.timers[-1]

    def work(self) -> bool:
        """One step of what is to be done at this moment. Returns whether there was one."""
        if self.soon:
            self.soon.popleft()()
            return True
        if self.scheduled:
            self.scheduled = False
            self.device.service()
            if self.device.local_bus.busy:
                self.device.local_bus.service()
            return True
        return False

    def next_timer(self, until: float) -> bool:
        """Let the next timer run out. Returns whether there was one before `until`."""
        self.timers = sorted((one for one in self.timers if one.call is not None), key=lambda one: one.due)
        if not self.timers or self.timers[0].due > until:
            return False
        timer = self.timers.pop(0)
        self._world.now = max(self._world.now, timer.due)
        assert timer.call is not None
        timer.call()
        return True


class Points:
    """Counts steps, and says when something has moved since the last one. Base of the two worlds.

    Attributes:
        on_point: called at each point with what has just happened.
        points: points so far. saves: saves among them. refused: those that were not possible, because a provider did
            not complete what it held.
        peak: the most packets that a save found (queued, sent, completions waiting for room).
    """

    def __init__(self) -> None:
        self.on_point: Callable[[Any, str], None] | None = None
        self.points = self.saves = self.refused = 0
        self.peak = (0, 0, 0)
        self.last = "the start"
        self.writes = 0
        self._inside = 0
        self._idle = 0
        self._moved: tuple[Any, ...] = ()

    def point(self, what: str) -> None:
        """A step is done."""
        if self._inside:
            return
        self.points += 1
        self.last = what
        if self.on_point is None:
            return
        with self.device_side():
            moved = self.moved()
            self._idle = 0 if moved != self._moved else self._idle + 1
            self._moved = moved
            if self._idle < IDLE_SAVES:
                self.on_point(self, what)

    @contextlib.contextmanager
    def device_side(self) -> Iterator[None]:
        """What happens in here is the device's, or the harness's: no points."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    @property
    def on_device_side(self) -> bool:
        """Whether it is the device's code that runs."""
        return self._inside > 0

    def moved(self) -> tuple[Any, ...]:
        """What changes whenever something goes on, apart from signals and looking in vain."""
        raise NotImplementedError

    def count(self, state: saved.DeviceState) -> None:
        """For `peak`."""
        counts = saved.count_packets(state)
        found = counts.queued, counts.sent, counts.completions
        self.peak = tuple(map(max, self.peak, found))  # type: ignore[assignment]


def what_moves(device: Device, providers: Sequence[Provider]) -> tuple[Any, ...]:
    """The device's part of `Points.moved`."""
    rings = []
    for offer in device.bus.offers:
        link = device._links.get(id(offer))
        if link is not None:
            for header in (link.reader.header, link.writer.header):
                with contextlib.suppress(MemoryRevoked):  # what else a channel's end needs may have a turn of its own
                    rings += [header.load32(word) for word in (WRITE_INDEX, READ_INDEX, PENDING_SEND_SIZE)]
    status = [value for one in providers for value in one.status().values()]
    books = [len(value) if isinstance(value, list) else value for value in status]
    offers = [(offer.relid, offer.state) for offer in device.bus.offers]
    return len(device.synic.outbox), rings, books, offers


class World(Points):
    """A device and the memory of its guest, whose `PciFunction` it is too.

    Args:
        described: the providers, (class, name, instance, options).
        eager: the device works at every register write of the guest; else only when the guest waits.
        tamper: for sabotage: is given each state before it is restored, and returns the one to restore instead.
        slow: a piece of what a turn does takes most of its time, so that a turn has room for one; else no time passes
            in a turn, and it does all that there is.
    """

    interrupt_fd = -1

    def __init__(
        self,
        described: Sequence[Described],
        *,
        eager: bool = False,
        tamper: Tamper | None = None,
        slow: bool = False,
    ) -> None:
        super().__init__()
        self.slow = slow
        self._time = 0.0
        self.described = list(described)
        self.eager = eager
        self.tamper = tamper
        self.ram = bytearray(RAM)
        self.used = bytearray(RAM // PAGE)
        self.now = 0.0
        self.interrupted = False
        with self.device_side():
            self.life = Life(self, self.described)
            self._map_all()

    def _map_all(self) -> None:
        # Two pieces, so that some rings and buffers lie in both.
        for start in (0, RAM // 4):
            end = RAM // 4 if not start else RAM
            self.life.device.memory.map(BASE + start, memoryview(self.ram)[start:end], True)

    @property
    def device(self) -> Device:
        """The device of the present life."""
        return self.life.device

    def provider(self, name: str) -> Any:
        """A provider of the present life."""
        return next(one for one in self.life.providers if one.name == name)

    def clock(self) -> float:
        """Seconds, as the device sees them pass in its turns."""
        if self.slow:
            self._time += 0.75 * TURN_SECONDS
        return self._time

    # ---- points ------------------------------------------------------------------------------------------------------

    def moved(self) -> tuple[Any, ...]:
        """See Points."""
        return self.writes, what_moves(self.device, self.life.providers), len(self.life.timers), self.now

    def fence(self) -> None:
        """Takes the place of the memory fence, of both ends."""
        self.point("a fence of the guest")

    # ---- the device works --------------------------------------------------------------------------------------------

    def work(self) -> bool:
        """The device does what is to be done at this moment, step by step. Returns whether it did anything."""
        done = False
        for _ in range(TURNS):
            with self.device_side():
                more = self.life.work()
            if not more:
                return done
            done = True
            self.point("a turn of the device")
        raise Stuck(f"the device never becomes idle ({TURNS} steps were not enough)")

    def pass_time(self) -> bool:
        """The next timer of a provider runs out, and the device works. Returns whether there was one."""
        with self.device_side():
            fired = self.life.next_timer(float("inf"))
        if fired:
            self.point("a timer of a provider")
            self.work()
        return fired

    def offer(self, described: Described) -> None:
        """A provider is added while the device runs."""
        with self.device_side():
            self.life.add_provider(described)
            self.described.append(described)
        self.point("a hot offer")

    def withdraw(self, name: str) -> None:
        """A provider is taken away while the device runs; its channels must be quiet."""
        with self.device_side():
            provider = self.provider(name)
            device = self.device
            mine = [one for one in device.channels if one.interface_instance == provider.instance]
            for channel in sorted(mine, key=lambda one: -one.subchannel_index):
                channel.quiesce()
                assert channel.quiescent
                device.remove_channel(channel)
            provider.stop()
            self.life.providers.remove(provider)
            self.described = [one for one in self.described if one[1] != name]
        self.point("a provider withdrawn")

    # ---- PciFunction -------------------------------------------------------------------------------------------------

    def read32(self, offset: int) -> int:
        """A register."""
        with self.device_side():
            value = self.device.bar_read(offset, 4)
        return int.from_bytes(value, "little")

    def write32(self, offset: int, value: int) -> None:
        """A register."""
        self.writes += 1
        with self.device_side():
            self.device.bar_write(offset, value.to_bytes(4, "little"))
        self.point(f"a write to {Register(offset).name}")
        if self.eager:
            self.work()

    def allocate(self, size: int) -> Buffer:
        """Guest memory."""
        pages = -(-size // PAGE)
        first = self.used.find(bytes(pages))
        assert first >= 0, "out of guest memory"
        self.used[first : first + pages] = b"\1" * pages
        start = first * PAGE
        self.ram[start : start + pages * PAGE] = bytes(pages * PAGE)
        return Buffer(BASE + start, memoryview(self.ram)[start : start + pages * PAGE])

    def free(self, buffer: Buffer) -> None:
        """Guest memory."""
        first = (buffer.iova - BASE) // PAGE
        self.used[first : first + buffer.size // PAGE] = bytes(buffer.size // PAGE)

    def wait_interrupt(self, timeout: float) -> bool:
        """Whether one came; with a timeout the device works, and time passes, until one does."""
        if timeout or self.eager:
            self.work()
        while timeout and not self.interrupted:
            if not self.pass_time():
                raise Stuck(f"the guest waits for an interrupt, and none can come; the last step was {self.last}")
        taken, self.interrupted = self.interrupted, False
        if taken:
            self.point("the interrupt taken")
        return taken

    def close(self) -> None:
        """The driver has done with the function."""

    # ---- saves -------------------------------------------------------------------------------------------------------

    def pause(self) -> bool:
        """As the server's `pause`: False when a provider does not complete what it holds; the device runs on then."""
        life = self.life
        life.device.freeze()
        for channel in life.device.channels:
            channel.quiesce()
        deadline = self.now + PAUSE_SECONDS
        while not all(channel.quiescent for channel in life.device.channels):
            if not life.work() and not life.next_timer(deadline):
                self.refused += 1
                self.resume()
                return False
        return True

    def resume(self) -> None:
        """As the server's `resume`."""
        for channel in self.device.channels:
            channel.unquiesce()
        self.device.thaw()

    def save(self) -> bytes:
        """The state of the paused device, as its file."""
        state = saved.save_device(NAME, CONFIG, self.device, self.life.providers)
        self.count(state)
        return saved.encode(state)

    def restore(self, data: bytes) -> None:
        """A new device takes the place of the old one, in a new process."""
        state = saved.decode(data)
        if self.tamper is not None:
            state = self.tamper(self, state)
        self.life.ended = True
        for provider in self.life.providers:
            provider.stop()
        self.interrupted = False
        self.life = Life(self, self.described)
        device = self.device
        saved.check_fits(state, NAME, device, self.life.providers)
        device.freeze()
        self._map_all()
        device.reset()  # as QEMU does when it attaches
        counts = saved.count_packets(state)
        restored = saved.restore_device(state, device, self.life.providers)
        left_out = sum(record.decoded.left_out.queued for record in state.channels)
        assert restored.packets.queued + restored.dropped.queued == counts.queued + left_out
        device.thaw()

    # ---- what a state means ------------------------------------------------------------------------------------------

    def canonical(self, data: bytes) -> dict[str, Any]:
        """A state together with guest memory, so that what may move by itself makes no difference: messages are those
        in the slot and those behind it, and what a channel sends is what is unread in its ring and what is queued."""
        state = saved.decode(data)
        bus = state.bus
        gpadls = {(g.relid, g.handle): g for g in bus.gpadls}
        leaving = [g for g in bus.gpadls if g.tearing_down]
        channels = {}
        for record in state.channels:
            offer = next(
                (
                    o
                    for o in bus.offers
                    if (o.instance, o.subchannel) == (record.instance, record.subchannel) and not o.withdrawn
                ),
                None,
            )
            unread: list[Any] = []
            if offer is not None and offer.open is not None:
                pfns = gpadls[offer.relid, offer.open.ring_gpadl].ranges[0].pfns[offer.open.downstream_page_offset :]
                unread = self._unread(pfns)
            channels[record.instance.hex(), record.subchannel] = self._channel(record, unread)
        offers = [msgspec.to_builtins(one) for one in bus.offers]
        return {
            "synic": msgspec.to_builtins(msgspec.structs.replace(state.synic, outbox=[])),
            "messages": self._slot(state.synic.registers)
            + [one.hex() for one in state.synic.outbox]
            + [m.encode(m.GpadlTorndown(g.handle)).hex() for g in leaving],
            "connection": (bus.connected, bus.version, bus.offers_requested),
            "offers": offers,
            "gpadls": [msgspec.to_builtins(g) for g in bus.gpadls if not g.tearing_down],
            "partial": [msgspec.to_builtins(one) for one in bus.partial],
            "channels": channels,
            "providers": [msgspec.to_builtins(one) for one in state.providers],
        }

    def _slot(self, registers: dict[int, int]) -> list[str]:
        low, high = registers.get(Register.MESSAGE_PAGE_LOW, 0), registers.get(Register.MESSAGE_PAGE_HIGH, 0)
        start = (low & ~1 | high << 32) - BASE + SLOT_OFFSET
        if start < 0:
            return []
        kind, size, _, _, _ = SLOT_HEADER.unpack_from(self.ram, start)
        return [self.ram[start + SLOT_HEADER.size :][:size].hex()] if kind else []

    def _unread(self, pfns: Sequence[int]) -> list[Any]:
        pages = [self.ram[pfn * PAGE - BASE :][:PAGE] for pfn in pfns]
        header, ring = pages[0], b"".join(pages[1:])
        write, read = (int.from_bytes(header[at : at + 4], "little") for at in (WRITE_INDEX, READ_INDEX))
        assert len(header) == HEADER_SIZE
        data = ring[read:write] if read <= write else ring[read:] + ring[:write]
        packets, error = split_packets(data)
        assert error is None and (not packets or packets[-1].end == len(data)), error
        return [(p.kind, p.flags, p.transaction, (p.body + p.payload).hex()) for p in packets]

    def _channel(self, record: saved.ChannelRecord, unread: list[Any]) -> dict[str, Any]:
        chunks = [decode_chunk(data) for data in record.chunks]
        head = chunks[0]
        assert isinstance(head, ChannelChunk)
        stream = list(unread)
        in_use = []
        for chunk in chunks[1:]:
            if isinstance(chunk, CompletionChunk):
                stream.append((int(PacketType.COMPLETION), 0, chunk.transaction, _padded(chunk.body)))
            elif isinstance(chunk, PacketChunk):
                lib = decode_lib(chunk.lib)
                if lib.queued:
                    stream.append((lib.kind, lib.flags, lib.transaction, _padded(lib.body)))
                if lib.flags & FLAG_COMPLETION_REQUESTED:
                    in_use.append((lib.transaction, chunk.save.hex()))
        return {"started": head.started, "next": head.next_transaction, "stream": stream, "in use": in_use}

    def settle(self, driver: VmbusDriver) -> None:
        """Until neither end has anything left to do, and no timer is left."""
        for _ in range(TURNS):
            if not (driver.step(0.0) or self.work() or self.interrupted or self.pass_time()):
                return
        raise Stuck("the two ends never become quiet")

    def ending(self) -> dict[str, Any]:
        """What the device has come to."""
        return describe(self.device, self.life.providers)

    def end(self) -> None:
        """The world is needed no more."""


def describe(device: Device, providers: Sequence[Provider]) -> dict[str, Any]:
    """A device as it is, without what belongs to one life of it (counters, mappings), and its providers' books."""
    text = device.describe()
    text.pop("resets")
    text["synic"].pop("bad_accesses")
    text["bus"].pop("messages_rejected")
    text["memory"].pop("dirty_log")
    for offer in text["bus"]["offers"]:
        offer.pop("gpadls_mapped")
    text["channels"] = [one for one in text["channels"] if one["state"] != "disabled"]
    for channel in text["channels"]:
        channel.pop("counters")
        if channel["rings"] and not channel["started"]:
            # A channel at rest takes no signals; whether its ring says so does not matter.
            channel["rings"]["incoming"].pop("interrupt_mask")
    return {
        "device": text,
        "messages left": [message.hex() for message in device.synic.outbox],
        "providers": {one.name: one.status() for one in providers},
    }


def _padded(body: bytes) -> str:
    return (body + bytes(-len(body) % 8)).hex()


# ---- runs ------------------------------------------------------------------------------------------------------------


class Run:
    """What a script is given.

    Attributes:
        world: the device and the guest's memory.
        drivers: all drivers so far, the last one is the one in use.
        books: what the script wants to be compared, by name: called at the end.
    """

    def __init__(self, world: Any) -> None:
        self.world = world
        self.heard: list[str] = []
        self.books: dict[str, Callable[[], Any]] = {}
        self.drivers: list[VmbusDriver] = []

    def connect(self, versions: tuple[int, ...] = (m.Version.V5_3,)) -> VmbusDriver:
        """A driver; every message that it gets is in the books."""
        run = self

        class Driver(VmbusDriver):
            def __init__(self) -> None:
                super().__init__(run.world, versions=versions)  # type: ignore[arg-type]

            def _reset(self) -> None:
                receive = self.bus.receive

                def listen(data: bytes) -> None:
                    run.heard.append(repr(m.decode(data, m.Direction.HOST)))
                    receive(data)

                self.bus.receive = listen  # type: ignore[method-assign]
                super()._reset()

        driver = Driver()
        self.drivers.append(driver)
        return driver

    @property
    def driver(self) -> VmbusDriver:
        """The driver in use."""
        return self.drivers[-1]

    def settle(self) -> None:
        """Until neither end has anything left to do, and no timer is left."""
        self.world.settle(self.driver)

    def outcome(self) -> dict[str, Any]:
        """Everything that anybody could tell."""
        return {
            "messages": self.heard,
            "failures": self.driver.failures,
            "books": {name: books() for name, books in self.books.items()},
        } | self.world.ending()


Script = Callable[[Run], None]


@dataclass(frozen=True)
class Scenario:
    """A script and the device that it is for."""

    script: Script
    providers: Sequence[Described]
    variant: str = ""

    @property
    def name(self) -> str:
        """The script's, and what is special about the device."""
        return self.script.__name__ + (f" ({self.variant})" if self.variant else "")


@dataclass
class Report:
    """What `every_step` did: `points` of the script, runs, and saves in all of them."""

    scenario: str = ""
    points: int = 0
    runs: int = 0
    saves: int = 0
    refused: int = 0
    peak: tuple[int, int, int] = (0, 0, 0)
    kinds: set[str] = field(default_factory=set)

    def add(self, other: Report) -> None:
        """The sum of both."""
        self.points += other.points
        self.runs += other.runs
        self.saves += other.saves
        self.refused += other.refused
        self.peak = tuple(map(max, self.peak, other.peak))  # type: ignore[assignment]
        self.kinds |= other.kinds

    def __str__(self) -> str:
        return (
            f"{self.scenario:24} {self.points:5} points, {self.runs:5} runs, {self.saves:6} saves "
            f"({self.refused} refused), at most {self.peak} packets queued, sent, completions"
        )


Mode = Callable[[Any, str], None]


def replace(world: World, _: str = "") -> None:
    """Save, and go on with a new device."""
    if world.pause():
        world.saves += 1
        world.restore(world.save())


def checkpoint(world: World, _: str = "") -> None:
    """Save, and run on."""
    if world.pause():
        world.saves += 1
        world.save()
        world.resume()


def thorough(world: World, _: str = "") -> None:
    """Save twice, restore, save, restore, save: the same bytes in a row, and the same state after the trip."""
    if not world.pause():
        return
    world.saves += 1
    first = world.save()
    if first != world.save():
        raise Diverged("two saves in a row gave different bytes")
    before = world.canonical(first)
    world.restore(first)
    assert world.pause(), "after a restore no provider can hold anything"
    second = world.save()
    after = world.canonical(second)
    if before != after:
        raise Diverged(f"the state changed on its trip: {difference(before, after)}")
    world.restore(second)
    assert world.pause()
    third = world.save()
    if second != third:
        raise Diverged(
            "save, restore, save is no fixpoint: "
            + difference(*(msgspec.to_builtins(saved.decode(one)) for one in (second, third)))
        )
    world.resume()


def run_once(
    scenario: Scenario,
    mode: Mode | None,
    *,
    eager: bool = False,
    only: int | None = None,
    tamper: Tamper | None = None,
    slow: bool = False,
    make: Callable[[Sequence[Described]], Any] | None = None,
) -> tuple[dict[str, Any], Any, set[str]]:
    """One run of a script; with `only`, the mode applies at that point alone. `make`: another world than `World`.

    Returns its outcome, the world, and the kinds of steps that there were.
    """
    providers = scenario.providers
    world = World(providers, eager=eager, tamper=tamper, slow=slow) if make is None else make(providers)
    kinds: set[str] = set()

    def at(world: Any, what: str) -> None:
        kinds.add(what)
        if mode is not None and only in (None, world.points):
            mode(world, what)

    world.on_point = at
    run = Run(world)
    with RingFences(world.fence), mock.patch("vmbus_guest.driver.full_fence", world.fence):
        try:
            scenario.script(run)
            run.settle()
            world.on_point = None
            return run.outcome(), world, kinds
        except Exception as error:
            error.add_note(f"script {scenario.name}, point {world.points}, after {world.last}")
            raise
        finally:
            world.on_point = None
            world.end()


def every_step(scenario: Scenario, *, eager: bool = False, each: int = 1, tamper: Tamper | None = None) -> Report:
    """All the ways of the module's text; of the runs with a save at one point alone every `each`th, 0 for none.

    Returns what was tested. Raises Diverged, or what a run raised with a note that says where.
    """
    expected, plain, kinds = run_once(scenario, None, eager=eager)
    report = Report(scenario.name, points=plain.points, runs=1, kinds=kinds)
    modes: list[tuple[str, Mode, int | None]] = [
        ("at every step", thorough, None),
        ("with a checkpoint at every step", checkpoint, None),
        (SLOW, thorough, None),
    ]
    if each:
        modes += [(f"at step {point} alone", replace, point) for point in range(1, plain.points + 1, each)]
    for label, mode, only in modes:
        place: list[str] = []

        def placed(world: World, what: str, mode: Mode = mode, place: list[str] = place) -> None:
            place[:] = [what]
            mode(world, what)

        try:
            found, world, _ = run_once(scenario, placed, eager=eager, only=only, tamper=tamper, slow=label == SLOW)
        except Exception as error:
            error.add_note(f"saved {label}, after {place}")
            raise
        report.runs += 1
        report.saves += world.saves
        report.refused += world.refused
        report.peak = tuple(map(max, report.peak, world.peak))  # type: ignore[assignment]
        if found != expected:
            raise Diverged(
                f"{scenario.name}, saved {label} (after {place}), came to another end: {difference(expected, found)}"
            )
    return report
