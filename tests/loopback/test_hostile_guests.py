"""Guests that are slow, that read nothing, that overwrite what is the host's, or that end with everything in flight:
another channel is as quick as usual meanwhile, tools are answered at once, and the device can be saved and restored."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support import pace, storvsc
from support.hostile import PAGE, WORDS, Raw, Scene
from support.slow_disk import SlowScsiProvider
from vmbus import providers
from vmbus.kmcl.incoming import MOST_REQUEST_BYTES, MOST_REQUESTS
from vmbus.kmcl.server import ServerChannel
from vmbus.transport.library import Library
from vmbus.wire.gpa import pack_ranges, range_for
from vmbus.wire.lab import HANDLE, KEEP, LAB_TYPE, SIZE, Op, request
from vmbus.wire.storvsp import STORVSP_TYPE, Direction
from vmbus.wire.synic import CONTROL_RESET, Register
from vmbus.wire.workload import BURST_TYPE, ECHO_TYPE, BurstStart, echo_request
from vmbus_guest.driver import VmbusDriver

SLOW = 0.02
"""Seconds for which a slow guest thinks about each packet."""


@pytest.fixture
def make(libvfio_user: Library) -> Iterator[Callable[..., Scene]]:
    scenes = []

    def scene(*kinds: str, **options: Any) -> Scene:
        scenes.append(Scene(libvfio_user, *kinds, **options))
        return scenes[-1]

    yield scene
    for one in scenes:
        one.close()


def held(scene: Scene, interface_type: Any) -> tuple[int, int]:
    """Requests and bytes that the server holds for a channel."""

    def look() -> tuple[int, int]:
        channel = next(one for one in scene.server.server.device.channels if one.interface_type == interface_type)
        return channel.flow.requests, channel.flow.held_bytes

    found: tuple[int, int] = scene.server.on_loop(look)
    return found


# ---- guests that do not read -----------------------------------------------------------------------------------------

ASKS: dict[str, tuple[Any, str, bytes]] = {
    "long echoes": (ECHO_TYPE, "echo", echo_request(0, bytes(60000), inline=True)),
    "short echoes": (ECHO_TYPE, "echo", echo_request(0, b"x", inline=True)),
    "pushes": (LAB_TYPE, "lab", request(Op.PUSH, 4096, SIZE.pack(4000))),
    "bursts": (BURST_TYPE, "burst", BurstStart(60000, 0xFFFF_FFFF, 1 << 20).pack()),
    "sub-channels": (LAB_TYPE, "lab", request(Op.SUBCHANNELS, 256)),
}


@pytest.mark.parametrize("name", ASKS)
def test_backpressure_on_a_guest_that_reads_nothing(make: Callable[..., Scene], name: str) -> None:
    interface_type, kind, payload = ASKS[name]
    scene = make(kind)
    raw = Raw(scene.driver, interface_type, pages_in=32, pages_out=32)
    usual, meanwhile = scene.bears(lambda: raw.fill(payload))
    deadline = time.monotonic() + pace.seconds(20)
    while raw.fill(payload):
        assert time.monotonic() < deadline, "it is read on and on"
        scene.trip()
    requests, size = held(scene, interface_type)
    assert requests <= MOST_REQUESTS and size <= MOST_REQUEST_BYTES + 64 * PAGE
    print(f"{raw.transaction} asked, {requests} held, {size} bytes; trips {usual * 1e6:.0f}, {meanwhile * 1e6:.0f} us")
    scene.good_to_save()


@pytest.mark.parametrize("name", ["long echoes", "bursts", "pushes"])
def test_answers_that_can_never_fit_are_no_error_of_the_provider(make: Callable[..., Scene], name: str) -> None:
    """The guest chooses the size of its rings: what would not fit into them is refused."""
    interface_type, kind, payload = ASKS[name]
    scene = make(kind)
    raw = Raw(scene.driver, interface_type, pages_out=32)
    if name == "pushes":
        payload = request(Op.PUSH, 10, SIZE.pack(10_000))
    raw.put(payload)
    while not raw.take_one():
        scene.trip()
    assert not scene.driver.rescinded
    assert not any(scene.good_to_save()["faults"].values())


@pytest.mark.parametrize("name", ["long echoes", "short echoes", "pushes", "bursts"])
def test_backpressure_on_a_slow_guest(make: Callable[..., Scene], name: str) -> None:
    """It asks all the time and takes one answer in 20 ms: that is the pace at which it is served."""
    interface_type, kind, payload = ASKS[name]
    scene = make(kind)
    raw = Raw(scene.driver, interface_type, pages_in=32, pages_out=32)
    last = time.monotonic()

    def act() -> None:
        nonlocal last
        raw.fill(payload)
        if time.monotonic() - last >= SLOW:
            last = time.monotonic()
            raw.take_one()

    deadline = time.monotonic() + pace.seconds(10)
    while raw.taken < 10:
        assert time.monotonic() < deadline, "a slow guest gets no answers"
        scene.bears(act, trips=200)
    scene.good_to_save()
    # It goes on where it was, at the same pace.
    before = raw.taken
    while raw.taken < before + 3:
        assert time.monotonic() < deadline + 20, "a slow guest gets no answers after a restore"
        act()
        scene.trip()


# ---- guests that write over what is the host's -----------------------------------------------------------------------


def scribble(raw: Raw, payload: bytes, choose: random.Random) -> None:
    """Something sound, and perhaps a word of a header."""
    for _ in range(choose.randrange(4)):
        raw.put(payload)
    if choose.random() < 0.5:
        raw.take_one()
    if choose.random() < 0.3:
        at = choose.choice([0, raw.down]) + choose.choice([*WORDS.values()])
        raw.word(at, choose.choice([0, 8, 10, 1000, 4096, 8192, 0xFFFF_FFF8, choose.randrange(1 << 32)]))
    raw.signal()


@pytest.mark.parametrize("seed", range(3))
def test_overwritten_index_at_any_moment(make: Callable[..., Scene], seed: int) -> None:
    """Any word of both headers, with anything: that channel alone may fail, and is offered anew."""
    choose = random.Random(seed)
    scene = make("echo", "burst")
    lost = 0
    for _ in range(25):
        interface_type, payload = choose.choice(
            [
                (ECHO_TYPE, echo_request(0, bytes(choose.choice([1, 500])), inline=True)),
                (BURST_TYPE, BurstStart(choose.choice([10, 900]), 1000, 200).pack()),
            ]
        )
        raw = Raw(scene.driver, interface_type, pages_in=2, pages_out=2)
        relid = raw.link.offer.relid
        scene.median(choose.randrange(2, 12), partial(scribble, raw, payload, choose))
        if choose.random() < 0.2:
            scene.server.save()
            scene.server.command("resume")
        scene.trip()
        if scene.driver.bus.offers.get(relid) is raw.link.offer:
            scene.driver.bus.close_channel(relid)
            scene.driver.function.barrier()
            while scene.driver.step(0.0):
                scene.driver.function.barrier()
            scene.driver.bus.teardown_gpadl(relid, raw.link.gpadl)
        else:
            lost += 1
        scene.driver.free(raw.link.rings)
    print(f"{lost} of 25 channels failed")
    assert lost, "nothing that was written did any harm"
    raw = Raw(scene.driver, ECHO_TYPE)
    scene.bears(lambda: raw.put(ASKS["short echoes"][2]))
    raw.word(WORDS["read index"], 10)
    scene.good_to_save()


# ---- guests that end with everything in flight -----------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMBUS_DISKS", str(tmp_path))
    monkeypatch.setitem(providers.PROVIDERS, "slow", SlowScsiProvider)


class Busy:
    """Everything in flight: requests held by an owner, work on threads, GPADLs mapped, external data lent, packets of
    the host's without an answer, completions that wait for room, and packets that do."""

    def __init__(self, scene: Scene) -> None:
        driver = self.driver = scene.driver
        self.echo = Raw(driver, ECHO_TYPE, pages_out=4)
        self.echo.fill(echo_request(0, bytes(300), inline=True))
        self.burst = Raw(driver, BURST_TYPE)
        self.burst.put(BurstStart(100, 5000, 300).pack())
        self.lab = Raw(driver, LAB_TYPE, pages_out=4)
        self.memory = driver.allocate(8 * PAGE)
        whole = range_for(self.memory.iova, self.memory.size)
        handle = driver.bus.create_gpadl(self.lab.link.offer.relid, [whole])
        self.handle = handle
        self.lab.put(request(Op.GPADL, KEEP, HANDLE.pack(handle, 0) + echo_request(0, bytes(1000), inline=False)))
        self.lab.put(request(Op.SUBCHANNELS, 5))
        self.lab.put(request(Op.PUSH, 500, SIZE.pack(100)))
        self.disk = Raw(driver, STORVSP_TYPE, pages_out=4)
        ranges = pack_ranges([whole])
        for step in storvsc.HANDSHAKE:
            self.disk.put(step)
        blocks = self.memory.size // 512
        for number in range(30):
            write = storvsc.write_10(number * blocks, blocks)
            message = storvsc.request(write, self.memory.size, direction=Direction.TO_DEVICE)
            self.disk.put(bytes(4) + (1).to_bytes(4, "little") + ranges + message, kind=9, offset8=3 + len(ranges) // 8)
        self.all = [self.echo, self.burst, self.lab, self.disk]

    def is_busy(self, scene: Scene) -> bool:
        """Whether it has come so far."""

        def look() -> bool:
            channels: list[ServerChannel] = scene.server.server.device.channels
            queued = sum(one.packets_queued for one in channels)
            waiting = sum(one.flow.waiting for one in channels)
            offers = scene.server.server.device.bus.offers
            return bool(queued and waiting and any(one.mapped for one in offers) and scene.server.server.services.busy)

        busy: bool = scene.server.on_loop(look)
        return busy


def close(busy: Busy) -> None:
    bus = busy.driver.bus
    for raw in busy.all:
        bus.close_channel(raw.link.offer.relid)
    for raw in busy.all:
        bus.teardown_gpadl(raw.link.offer.relid, raw.link.gpadl)
    bus.teardown_gpadl(busy.lab.link.offer.relid, busy.handle)
    handles = {busy.handle, *(raw.link.gpadl for raw in busy.all)}
    busy.driver.run_until(lambda: bus.torndown >= handles, 10, "all memory to be given back")


def unload(busy: Busy) -> None:
    busy.driver.bus.unload()
    busy.driver.run_until(lambda: busy.driver.bus.unloaded, 10, "the answer to UNLOAD")


def contact(busy: Busy) -> None:
    bus = busy.driver.bus
    bus.initiate_contact(bus.version)
    busy.driver.run_until(lambda: bus.version_response is not None, 10, "the answer to INITIATE_CONTACT")


def half_closed(busy: Busy) -> None:
    """Closes, and does not wait for what it asked before it unloads, and resets before that is answered."""
    for raw in busy.all[:2]:
        busy.driver.bus.close_channel(raw.link.offer.relid)
    busy.driver.bus.unload()
    reset(busy)


def reset(busy: Busy) -> None:
    busy.driver.function.write32(Register.CONTROL, CONTROL_RESET)


def function_reset(busy: Busy) -> None:
    function: Any = busy.driver.function
    function.client.reset()
    function._set_up(0xFE00_0000)


def killed(busy: Busy) -> None:
    function: Any = busy.driver.function
    function.unmap_all()


ENDS = {one.__name__: one for one in (close, unload, contact, half_closed, reset, function_reset, killed)}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.usefixtures("disk")
def test_teardown_with_everything_in_flight(make: Callable[..., Scene], name: str) -> None:
    scene = make(
        "echo",
        "burst",
        "lab",
        "slow",
        echo={"hold": 20, "hold_seconds": 0.05},
        slow={"luns": [{"image": "disk.img", "size_mib": 8, "create": True, "snapshot": "shared"}]},
    )
    for _ in range(4):
        busy = Busy(scene)
        scene.driver.run_until(lambda: busy.is_busy(scene), 10, "everything to be in flight")  # noqa: B023
        scene.status()
        ENDS[name](busy)
        if name == "close":
            scene.trip()  # the good channel is still there
        else:
            scene.function.barrier()
            deadline = time.monotonic() + pace.seconds(10)
            while any(scene.server.on_loop(lambda: [one.link for one in scene.server.server.device.channels])):
                assert time.monotonic() < deadline, "channels stay open"
            inspected: Any = scene.server.command("inspect")["in_flight"]
            assert inspected.total == 0
            scene.begin()
        while held(scene, STORVSP_TYPE) != (0, 0):
            scene.trip()
    status = scene.good_to_save()
    assert not status["faults"] or not any(status["faults"].values()), status["faults"]
    raw = Raw(scene.driver, ECHO_TYPE)
    scene.bears(lambda: raw.put(ASKS["short echoes"][2]) and raw.take_one())


def test_teardown_is_seen_to_be_incomplete(make: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: a channel that is not closed at the end of the connection keeps UNLOAD from being answered."""
    scene = make("echo")
    Raw(scene.driver, ECHO_TYPE)
    monkeypatch.setattr(ServerChannel, "close", lambda *_, **__: None)
    scene.driver.bus.unload()
    for _ in range(50):
        scene.driver.function.barrier()
        scene.driver.step(0.0)
    assert not scene.driver.bus.unloaded
    monkeypatch.undo()
    scene.driver.function.write32(Register.CONTROL, CONTROL_RESET)
    scene.driver = VmbusDriver(scene.function)
