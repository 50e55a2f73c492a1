"""All offers of one bus, found in as much time whether there are two of them or 2,047."""

from collections.abc import Callable, Iterator
from typing import Any

from vmbus.bus.offers import Offer

_Key = tuple[bytes, int]


class OfferTable:
    """In the order of their creation, which is the order in which the guest sees them."""

    def __init__(self) -> None:
        self._offers: dict[Offer, None] = {}
        self._same: dict[_Key, dict[Offer, None]] = {}
        self._subchannels: dict[bytes, dict[Offer, None]] = {}

    def __iter__(self) -> Iterator[Offer]:
        return iter(self._offers)

    def __len__(self) -> int:
        return len(self._offers)

    def add(self, offer: Offer) -> None:
        """A new one."""
        self._offers[offer] = None
        self._same.setdefault(offer.key, {})[offer] = None
        if offer.subchannel:
            self._subchannels.setdefault(offer.key[0], {})[offer] = None

    def remove(self, offer: Offer) -> None:
        """One that is there; whoever waited for that is told."""
        del self._offers[offer]
        for index, key in ((self._same, offer.key), (self._subchannels, offer.key[0])):
            _drop(index, key, offer)
        gone, offer.on_gone = offer.on_gone, None
        if gone is not None:
            gone()

    def sort(self, key: Callable[[Offer], int]) -> None:
        """Put them into another order."""
        offers = sorted(self._offers, key=key)
        self.__init__()  # type: ignore[misc]
        for offer in offers:
            self.add(offer)

    def same(self, offer: Offer) -> list[Offer]:
        """Those of the same channel: one that its owner wants, and others that the guest has not released yet."""
        return list(self._same.get(offer.key, ()))

    def primary(self, sub: Offer) -> Offer | None:
        """The offer of a sub-channel's primary channel, unless it was withdrawn."""
        return next((one for one in self._same.get((sub.key[0], 0), ()) if one.wanted), None)

    def subchannels(self, primary: Offer) -> list[Offer]:
        """Those of a primary channel; none of a sub-channel."""
        return [] if primary.subchannel else list(self._subchannels.get(primary.key[0], ()))


def _drop(index: dict[Any, dict[Offer, None]], key: Any, offer: Offer) -> None:
    of_key = index.get(key, {})
    of_key.pop(offer, None)
    if not of_key:
        index.pop(key, None)


def still_in_use(offers: list[Offer]) -> bool:
    """Whether any is; those at the end that are not are taken out, so that asking again costs nothing."""
    while offers and not offers[-1].in_use:
        offers.pop()
    return bool(offers)
