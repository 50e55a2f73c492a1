"""Random choices that are the same everywhere: with any version of Python, on any machine."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

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
