"""Both cores in one process: the pure rings and the native ones, and tests that run over both.

A file of tests runs over both with `pytestmark = [..., *both()]`: each of its tests then runs once with every ring of
ours pure, and once with every ring native. `-k pure_and_native` picks these tests: `tests/conftest.py` marks everything
that has a `twin`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from vmbus import native
from vmbus.native import build
from vmbus.provision.cache import Cache
from vmbus.provision.native import find
from vmbus.ring import pure as ring_pure
from vmbus.ring.pure import RingReader, RingWriter
from vmbus.wire.packet import pure_split_packets


class Twin:
    """One core: its two classes of ring ends, and its way of splitting packets."""

    def __init__(self, name: str, module: Any, split_packets: Callable[..., Any]) -> None:
        self.name = name
        self.RingReader: type[RingReader] = module.RingReader
        self.RingWriter: type[RingWriter] = module.RingWriter
        self.split_packets = split_packets


def _native() -> ModuleType | None:
    """The native core, built if need be; None: there is no compiler."""
    try:
        return native.load()
    except ImportError:
        cache = Cache()
        with cache.lock():
            file = find(cache, environment={})
        return None if file is None else native.load(file)


core: Any = _native()

PURE = Twin("pure", ring_pure, pure_split_packets)
NATIVE = PURE if core is None else Twin("native", core, core.split_packets)

_PARAMETERS = [
    pytest.param(PURE, id="pure"),
    pytest.param(
        NATIVE, id="native", marks=[pytest.mark.skip(f"no C compiler for {build.FILE_NAME}")] if core is None else []
    ),
]

OVER_BOTH = pytest.mark.parametrize("twin", _PARAMETERS)
"""For one test, which is given the `twin` and takes rings and packets from it."""


def both() -> list[pytest.MarkDecorator]:
    """Marks that make a test run over both twins."""
    return [pytest.mark.usefixtures("twin")]


@pytest.fixture(params=_PARAMETERS)
def twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Twin:
    """Every module that is loaded gets its rings and packets from this twin, for the time of one test."""
    chosen: Twin = request.param
    kinds = {
        name: {getattr(PURE, name), getattr(NATIVE, name)} for name in ("RingReader", "RingWriter", "split_packets")
    }
    ours = ("vmbus", "support.")
    for module in [request.module, *(module for name, module in list(sys.modules.items()) if name.startswith(ours))]:
        if module in (ring_pure, core):
            continue
        for name, known in kinds.items():
            found = vars(module).get(name)
            if callable(found) and found in known:
                monkeypatch.setattr(module, name, getattr(chosen, name))
    return chosen


class RingFences:
    """`call` is called at each fence of a ring of either core; of the pure one, in its place. A patch as mock's are."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._pure = mock.patch("vmbus.ring.pure.full_fence", call)
        self._before: Callable[[], None] | None = None

    def start(self) -> None:
        self._pure.start()
        if core is not None:
            self._before = core.watch_fences(self._call)

    def stop(self) -> None:
        self._pure.stop()
        if core is not None:
            core.watch_fences(self._before)

    def __enter__(self) -> RingFences:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
