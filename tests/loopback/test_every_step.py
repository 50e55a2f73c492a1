"""A save and restore at every step, over the real server, library and socket: each restore is a new server.

The same scripts as in the unit layer, where also each step of the device is a point. The last line that this prints
says how many saves there were.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest

from support.step_provider import GuestEnd, StepProvider
from support.step_scripts import ONE, SCENARIOS
from support.steps import Described, Diverged, Report, Run, Scenario, checkpoint, replace, run_once
from support.steps_loopback import KINDS, TICK, LoopbackWorld
from vmbus import providers
from vmbus.device import saved
from vmbus.errors import VmbusError
from vmbus.server.timers import Timers
from vmbus.testkit.steps import difference
from vmbus.transport.library import Library

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
PLAIN = [one for one in SCENARIOS if "(" not in one.name]  # how a channel is set up is nothing to the transport
EACH = 32  # of the points of a script, one in so many gets a run of its own

Make = Callable[[Sequence[Described]], LoopbackWorld]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for kind, provider in KINDS.items():
        monkeypatch.setitem(providers.PROVIDERS, kind, provider)
    monkeypatch.setattr(StepProvider, "tick", TICK)
    caplog.set_level(logging.CRITICAL + 1, "vmbus")


@pytest.fixture
def make(libvfio_user: Library) -> Make:
    return lambda described: LoopbackWorld(libvfio_user, described)


@pytest.fixture(scope="module")
def total(note: Callable[[str], None]) -> Iterator[Report]:
    total = Report("every step, loopback")
    yield total
    note(str(total))


def in_place(world: LoopbackWorld, what: str) -> None:
    """By turns a checkpoint, and a state loaded in place: a new life of the device in the same server."""
    if world.points % 2:
        checkpoint(world, what)
    elif world.pause():
        world.saves += 1
        world.load(world.save())


@pytest.fixture(autouse=True)
def without_the_belt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest does not look again by the clock: points are what the protocol makes of them, on a slow machine too."""
    monkeypatch.setattr("vmbus_guest.channel_driver.LOOK_AGAIN", 1e9)


@pytest.mark.parametrize("scenario", PLAIN, ids=lambda scenario: scenario.name)
def test_a_save_at_every_step_changes_nothing(scenario: Scenario, make: Make, total: Report) -> None:
    expected, plain, _ = run_once(scenario, None, make=make)
    report = Report(scenario.name, points=plain.points, runs=1)
    modes: list[tuple[str, Callable[[Any, str], None], int | None]] = [
        ("into a new server at every step", replace, None),
        ("at every step, going on in the same server", in_place, None),
    ]
    # Later restores raise every interrupt again, and so hide what an earlier one has lost.
    first = 1 + len(scenario.name) % EACH
    modes += [(f"at step {point} alone", replace, point) for point in range(first, plain.points + 1, EACH)]
    steps = 0  # of the runs with a save at every one: how many there are depends on how fast the server is beside them
    for label, mode, only in modes:
        found, world, _ = run_once(scenario, mode, only=only, make=make)
        steps += 0 if only is not None else world.points
        report.add(Report(runs=1, saves=world.saves, refused=world.refused, peak=world.peak))
        if found != expected:
            raise Diverged(f"{scenario.name}, saved {label}, came to another end: {difference(expected, found)}")
    print(report)
    assert report.saves > steps / 2 > 0
    assert not report.refused
    total.add(report)


# ---- sabotage --------------------------------------------------------------------------------------------------------


def without_message(state: saved.DeviceState) -> saved.DeviceState:
    return msgspec.structs.replace(state, synic=msgspec.structs.replace(state.synic, outbox=state.synic.outbox[:-1]))


def without_partial(state: saved.DeviceState) -> saved.DeviceState:
    return msgspec.structs.replace(state, bus=msgspec.structs.replace(state.bus, partial=[]))


@pytest.mark.parametrize(
    ("name", "change"),
    [("messages_not_taken", without_message), ("gpadls", without_partial)],
    ids=["a message", "a half-received GPADL"],
)
def test_every_step_notices_what_is_missing(name: str, change: Any, libvfio_user: Library) -> None:
    def make(described: Sequence[Described]) -> LoopbackWorld:
        return LoopbackWorld(libvfio_user, described, patience=1.0, tamper=lambda _, state: change(state))

    expected, _, _ = run_once(BY_NAME[name], None, make=make)
    with pytest.raises((AssertionError, VmbusError)):
        found, _, _ = run_once(BY_NAME[name], replace, make=make)
        assert found == expected


# ---- what the harness has found --------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
def test_every_step_of_a_paused_server_is_none(frozen: bool, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timers of providers do not run out between the save and the end of the server: what they did to guest memory
    would be there twice, from the old server and from the restored one. Without that, an offer comes twice."""
    if not frozen:
        monkeypatch.setattr(Timers, "freeze", lambda self: None)
    monkeypatch.setattr(StepProvider, "tick", 0.15)  # three of them: the save is over by then
    world = make(BY_NAME["disabled_and_enabled"].providers)
    try:
        run = Run(world)
        driver = run.connect()
        end = GuestEnd(driver, instance=ONE).enable()
        end.send(b"away")
        driver.run_until(lambda: bool(driver.rescinded), 5, "the rescind")
        world.function.barrier()
        assert world.pause()
        data = world.save()
        before = bytes(world.function.ram)
        server = world.server.server
        over = server.loop.time() + 4 * StepProvider.tick
        while world.server.on_loop(lambda: server.loop.time()) < over:
            pass
        same = bytes(world.function.ram) == before
        assert same == frozen
        world.restore(data)
        run.settle()
        offers = [text for text in run.heard if text.startswith("OfferChannel")]
        assert len(offers) == (2 if frozen else 3)
        end.enable()
        assert end.ask(b"ask_")
        assert world.pause()
        world.resume()
        end.send(b"away")
        driver.run_until(lambda: len(driver.rescinded) == 2, 5, "the rescind")
        assert world.pause()
        world.resume()
        run.settle()
        assert driver.bus.offers, "after a pause, timers run out as always"
    finally:
        world.end()
