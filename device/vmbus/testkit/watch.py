"""What a provider does that no channel shows: state outside of it, descriptors that it forgets, memory that it uses too
late, turns that take too long, and containers that only grow."""

import collections
import itertools
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from vmbus.errors import UsageError
from vmbus.memory.guest import Grant, GuestMemory
from vmbus.providers import Provider
from vmbus.testkit.contract import ContractViolation

SLOW = 0.05
"""Seconds of a turn, or of the provider's part of a save, beyond which it is reported: all channels wait meanwhile."""
MANY = 5000
"""Entries of one of the provider's containers beyond which it is reported: a channel holds less (docs/limits.md)."""
OF_A_TEST = "of_a_test"
"""A class that has this attribute is made for its test: what it keeps outside and leaves open is the test's."""
_SHOWN = 200
_NOT_AUTHORS = ("vmbus", "builtins", "abc", "typing", "typing_extensions")
_PLAIN = (int, float, str, bytes, bytearray, bool, type(None), tuple, list, dict, set, frozenset)
_GROWING = (list, dict, set, collections.deque, bytearray)


class ProviderWarning(UserWarning):
    """A provider does what is no breach of its contract, and will hurt with many requests, or a hostile guest."""


class KitMemory(GuestMemory):
    """Guest memory whose views cannot be used any more when their packet was completed: the guest has it back then."""

    def end_grant(self, grant: Grant, *, completed: bool = False) -> None:
        super().end_grant(grant)
        if completed:
            for view in grant.views:
                try:
                    view.release()
                except BufferError:  # something still looks into it
                    raise UsageError(
                        "a packet was completed while something still uses a view of its external data; expected: a "
                        "copy (bytes(view)), or the end of that use before complete()"
                    ) from None


_LISTING = "/proc/self/fd"


class Watch:
    """Looks at one provider class while it is under test."""

    def __init__(self, class_: type[Provider], name: str) -> None:
        self._class = class_
        self._name = name
        self._of_a_test = bool(getattr(class_, OF_A_TEST, False))
        self._is_authors = not self._of_a_test and class_.__module__.partition(".")[0] not in _NOT_AUTHORS
        self._outside = _outside(class_)
        self._opened: dict[int, str] = {}
        self._told: set[str] = set()
        self._depth = 0

    @contextmanager
    def turn(self, what: str) -> Iterator[None]:
        """Code of the provider's runs."""
        if self._depth:
            yield
            return
        before, waited, begin = _descriptors(), _waited(), time.monotonic()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            seconds = time.monotonic() - begin
            after = _descriptors()
            self._opened |= {fd: target for fd in after - before if (target := _target(fd))}
            # What others took of the processor is not the provider's.
            if self._is_authors and seconds > SLOW and (seconds := seconds - (_waited() - waited)) > SLOW:
                self._tell(
                    f"{what} of provider {self._name} took {seconds * 1000:.0f} ms: no channel moves meanwhile; "
                    "expected: host.run_blocking for what blocks, vmbus.providers.slices for what takes long"
                )

    def saved(self, provider: Provider) -> None:
        """A save is taken: nothing that counts is anywhere but in the provider. Raises ContractViolation."""
        self.grown(provider)
        if self._of_a_test:
            return
        now = _outside(self._class)
        for key, (identity, shown) in now.items():
            before = self._outside.get(key)
            if before is None or before == (identity, shown):
                continue
            raise ContractViolation(
                f"provider {self._name} keeps state in {key}, which was {before[1][:_SHOWN]} and is {shown[:_SHOWN]}: "
                "a restore in another process does not find it there; expected: an attribute of the provider, in what "
                "save() returns if it counts"
            )
        self._outside = now

    def stopped(self) -> None:
        """The provider was stopped: what it opened is closed. Raises ContractViolation."""
        left = {fd: target for fd, target in self._opened.items() if _target(fd) == target}
        self._opened.clear()
        if left and not self._of_a_test:
            shown = ", ".join(f"{fd} ({target})" for fd, target in sorted(left.items()))
            raise ContractViolation(
                f"stop() of provider {self._name} leaves descriptors open: {shown}; expected: os.close(), or close() "
                "of what owns them, in deactivate() or stop()"
            )

    def grown(self, provider: Provider) -> None:
        """Tell of containers that have become large."""
        for name, value in vars(provider).items():
            if isinstance(value, _GROWING) and len(value) > MANY:
                self._tell(
                    f"{name} of provider {self._name} has {len(value)} entries: what bounds it? A guest sends as many "
                    "requests as it likes; see bounds() in docs/writing-a-provider.md"
                )

    def _tell(self, text: str) -> None:
        key = text.partition(" ")[0] + text.partition(" of ")[2].partition(" ")[0]
        if key not in self._told:
            self._told.add(key)
            warnings.warn(text, ProviderWarning, stacklevel=3)


def _descriptors() -> set[int]:
    """Those that are open. It is done twice in each turn: nothing is asked of each of them."""
    try:
        # The listing has its own, which is closed then: the lowest free number, as this one.
        own = os.open(_LISTING, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        os.close(own)
        return set(map(int, os.listdir(_LISTING))) - {own}  # noqa: PTH208
    except OSError:
        return set()


def _target(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
    except OSError:
        return ""


def _waited() -> float:
    """Seconds that this thread waited for a processor."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _outside(class_: type[Provider]) -> dict[str, tuple[int, str]]:
    """What the class and its author's module hold besides the provider's own attributes: by name, which object it is,
    and what is in it."""
    found: dict[str, tuple[int, str]] = {}
    for one in class_.__mro__:
        module = sys.modules.get(one.__module__)
        if module is None or _of_tests(module) or one.__module__.partition(".")[0] in _NOT_AUTHORS:
            continue
        for name, value in vars(one).items():
            _note(found, f"{one.__qualname__}.{name}", value)
        for name, value in vars(module).items():
            _note(found, f"{one.__module__}.{name}", value)
    return found


def _of_tests(module: ModuleType) -> bool:
    """A test may remember what it saw."""
    file = Path(getattr(module, "__file__", None) or "test_")
    return file.name.startswith(("test_", "conftest"))


def _note(found: dict[str, tuple[int, str]], name: str, value: Any) -> None:
    last = name.rpartition(".")[2]
    if (
        last.startswith("__")
        or callable(value)
        or isinstance(value, ModuleType | property | classmethod | staticmethod)
    ):
        return
    plain = isinstance(value, (*_PLAIN, collections.deque, itertools.count))
    found[name] = (0 if isinstance(value, _PLAIN[:7]) else id(value), repr(value) if plain else type(value).__name__)
