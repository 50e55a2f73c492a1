"""Bounds that follow the machine's speed: of the product by `VMBUS_PATIENCE`, of tests by what a run has measured."""

from __future__ import annotations

import asyncio

import pytest

from support import pace
from support.pace import PACE, Pace, until
from vmbus.errors import EnvironmentProblem, WaitTimeout
from vmbus.util import patience
from vmbus.vm.process import guard_all


@pytest.mark.parametrize(("text", "factor"), [("", 1.0), ("1", 1.0), (" 2.5 ", 2.5), ("100", 100.0)])
def test_the_factor_of_a_users(monkeypatch: pytest.MonkeyPatch, text: str, factor: float) -> None:
    monkeypatch.setenv(patience.VARIABLE, text)
    assert patience.patient(10.0) == 10.0 * factor


@pytest.mark.parametrize("text", ["fast", "0.5", "-1", "nan", "inf", "101"])
def test_what_is_no_factor_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(patience.VARIABLE, text)
    with pytest.raises(EnvironmentProblem, match=r"VMBUS_PATIENCE is .*; it can be a number from 1 to 100"):
        patience.patient(1.0)


def test_a_wait_for_a_vm_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.VARIABLE, "3")
    with pytest.raises(WaitTimeout, match=r"waited 0\.03 s in vain for nothing at all"):
        asyncio.run(guard_all([], asyncio.sleep(20), "nothing at all", 0.01))


@pytest.mark.parametrize(
    ("start", "later", "factor"), [(0.3, 0.3, 1.0), (0.3, 2.0, 2.0), (3.0, 2.0, 3.0), (3.0, 900.0, pace.LARGEST)]
)
@pytest.mark.parametrize("slow", ["measure", "measure_disk"])
def test_bounds_never_shrink_below_the_start_and_never_end(
    monkeypatch: pytest.MonkeyPatch, start: float, later: float, factor: float, slow: str
) -> None:
    one = Pace()
    for name in ("measure", "measure_disk"):
        monkeypatch.setattr(pace, name, lambda *_: 0.1)
    monkeypatch.setattr(pace, slow, lambda *_: start)
    one.start()
    monkeypatch.setattr(pace, slow, lambda *_: later)
    one.look()
    assert one.factor == factor


def test_the_wait_that_used_most_of_its_bound_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PACE, "factor", 2.0)
    PACE.begin()
    until(lambda: True, "what is there", 10)
    with pytest.raises(WaitTimeout, match=r"waited 0\.02 s in vain for the impossible"):
        until(lambda: False, "the impossible", 0.01)
    assert PACE.fullest[0] >= 1.0 and "for the impossible" in PACE.fullest[1]
    PACE.begin()  # it is not this test's
