"""KMCL over both cores: its tests run with the one that this process has; here the same files run with the other one,
in a process of its own. And a random history must leave the same trace with both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmbus.native.choice import CORE
from vmbus.provision.cache import Cache
from vmbus.provision.native import find

pytestmark = [pytest.mark.unit, pytest.mark.long]

TESTS = Path(__file__).resolve().parents[1]
FILES = (
    "test_kmcl.py",
    "test_kmcl_calls.py",
    "test_kmcl_machine.py",
    "test_exactly_once.py",
    "test_backpressure.py",
    "test_from_any_thread.py",
    "test_look_again.py",
    "test_device.py",
    "test_device_channels.py",
)


@pytest.fixture(scope="module", autouse=True)
def native_core() -> None:
    """The native core is there, built if need be: a machine with a compiler has both."""
    cache = Cache()
    with cache.lock():
        assert find(cache, environment={}) is not None, "no C compiler: the two cores cannot be compared"


def run(core: str, *arguments: str, timeout: float) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "VMBUS_CORE": core, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_pure_and_native_the_tests_of_kmcl_pass_over_the_other_core_too() -> None:
    other = "pure" if CORE == "native" else "native"
    files = [str(TESTS / "unit" / name) for name in FILES]
    said = run(other, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, timeout=280)
    assert " passed" in said


@pytest.mark.parametrize("seed", range(3))
def test_pure_and_native_leave_the_same_trace(seed: int) -> None:
    """Everything that two ends see of a random history: callbacks with their bytes, counters, and the rings' memory."""
    script = str(TESTS / "support" / "trace_of_history.py")
    pure, native = (run(core, script, str(seed), timeout=120) for core in ("pure", "native"))
    assert pure == native and len(pure) > 1000
    assert pure != run("native", script, str(seed + 100), timeout=120), "the trace tells histories apart"
