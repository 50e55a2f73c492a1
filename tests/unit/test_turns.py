"""The longest turn of the event loop: what it was, since the start and lately."""

from __future__ import annotations

import asyncio

import pytest

from vmbus.server.timers import Timers
from vmbus.server.turns import RECENT, Turns


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def turns(clock: Clock) -> Turns:
    return Turns(clock)


def spend(clock: Clock, seconds: float) -> None:
    clock.now += seconds


def test_the_longest_is_remembered_and_the_recent_one_forgotten(turns: Turns, clock: Clock) -> None:
    for what, seconds in (("short", 0.25), ("long", 2.0), ("short", 0.5)):
        turns.run(what, lambda seconds=seconds: spend(clock, seconds))
    long = {"seconds": 2.0, "what": "long"}
    assert turns.summary() == {**long, "last_minute": long}
    clock.now += RECENT / 2
    turns.run("later", lambda: spend(clock, 1.0))
    assert turns.summary()["last_minute"] == long
    clock.now += RECENT / 2 + 5
    assert turns.summary() == {**long, "last_minute": {"seconds": 1.0, "what": "later"}}
    clock.now += RECENT
    assert turns.summary() == {**long, "last_minute": {"seconds": 0.0, "what": ""}}


def test_what_is_remembered_is_bounded(turns: Turns, clock: Clock) -> None:
    for _ in range(10_000):
        turns.run("x", lambda: spend(clock, 0.125))
    assert len(turns._recent) <= RECENT / 5 + 1


def test_a_turn_that_raises_counts(turns: Turns, clock: Clock) -> None:
    def bad() -> None:
        clock.now += 3.0
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        turns.run("bad", bad)
    assert turns.summary()["what"] == "bad"


async def test_the_steps_of_a_command_are_turns_of_their_own(turns: Turns, clock: Clock) -> None:
    async def work(caught: list[str]) -> str:
        clock.now += 1.0
        await asyncio.sleep(0)
        clock.now += 2.0
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            caught.append("cancelled")
            clock.now += 0.5
        return "done"

    caught: list[str] = []
    task = asyncio.create_task(turns.steps("command save", work(caught)))
    for _ in range(5):
        await asyncio.sleep(0)
    clock.now += 100.0  # it waits: that is no turn
    task.cancel()
    assert await task == "done" and caught == ["cancelled"]
    assert turns.summary()["seconds"] == 2.0 and turns.summary()["what"] == "command save"


def test_a_command_that_raises(turns: Turns) -> None:
    async def work() -> None:
        await asyncio.sleep(0)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(turns.steps("command", work()))


async def test_a_timer_is_named(turns: Turns, clock: Clock) -> None:
    def slow_call() -> None:
        clock.now += 4.0

    timers = Timers(asyncio.get_running_loop(), turns)
    timers.call_later(0, slow_call)
    assert timers.run_due()
    longest = turns.summary()
    assert longest["seconds"] == 4.0 and longest["what"].startswith("timer ") and "slow_call" in longest["what"]
