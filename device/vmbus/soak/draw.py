"""Random choices that are the same everywhere: with any version of Python, on any machine."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from vmbus.errors import UsageError

T = TypeVar("T")


def seed_of(seed: int, index: int) -> int:
    """The seed of episode `index` of the campaign with `seed`: 48 bits, so that JSON readers keep it whole."""
    return int.from_bytes(hashlib.sha256(f"episode {index} of {seed}".encode()).digest()[:6], "big")


class Draw:
    """A stream of choices. Of Python's generator only `random()` is used: the one that is promised never to change."""

    def __init__(self, seed: int) -> None:
        self._next = random.Random(seed).random

    def between(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + int(self._next() * (high - low + 1))

    def number(self, low: float, high: float) -> float:
        """A number with three digits after the point."""
        return round(low + self._next() * (high - low), 3)

    def chance(self, share: float) -> bool:
        """True in this share of cases. Always takes one number, so that what follows does not depend on `share`."""
        return self._next() < share

    def one_of(self, values: Sequence[T]) -> T:
        """One of some, all alike."""
        return values[int(self._next() * len(values))]

    def weighted(self, weights: Mapping[T, float]) -> T:
        """One of some, each as often as its weight says; at least one is above 0."""
        left = self._next() * sum(weights.values())
        chosen = None
        for value, weight in weights.items():
            if weight <= 0:
                continue
            chosen = value
            left -= weight
            if left < 0:
                break
        assert chosen is not None, "no weight above 0"
        return chosen


def drawn(values: Mapping[str, Any], draw: Draw) -> dict[str, Any]:
    """The values, with those drawn that are tables of the forms `{between = [LOW, HIGH]}` (whole numbers, if both are),
    `{one_of = [...]}` and `{chance = SHARE}` (true or false). Raises UsageError."""
    return {name: _value(name, value, draw) for name, value in values.items()}


def _value(name: str, value: Any, draw: Draw) -> Any:
    match value:
        case {"between": [int() | float() as low, int() | float() as high], **rest} if not rest and low <= high:
            whole = isinstance(low, int) and isinstance(high, int)
            return draw.between(int(low), int(high)) if whole else draw.number(low, high)
        case {"one_of": [_, *_] as choices, **rest} if not rest:
            return draw.one_of(choices)
        case {"chance": float() | int() as share, **rest} if not rest:
            return draw.chance(share)
        case {"between": _} | {"one_of": _} | {"chance": _}:
            forms = "{between = [LOW, HIGH]}, {one_of = [...]}, {chance = SHARE}"
            raise UsageError(f"{name!r} is {value}; allowed: a value, {forms}")
    return value
