"""Which test drivers run in the guest of an episode, with which parameters, and which providers they need.

All of them run side by side in one process of the guest, the test driver `mixed`, until they are stopped; each checks
its own data and keeps its own books.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vmbus.soak.draw import Draw

Parameters = dict[str, Any]

LAB = "lab"
_PACKET_BYTES = 48  # what a burst packet takes of the ring besides its data: header, descriptor, trailer


@dataclass(frozen=True)
class Recipe:
    """How to run one test driver.

    `provider`: the kind it needs, one for itself; a lab is shared, since it has a station for each. `options`,
    `parameters`: drawn for each episode; `packets` is how many shall be in flight. `share`: of the episodes in which it
    runs. `sends`: it makes the host send more than fits into the ring, so that packets are queued and sent at every
    moment. `each_run`: the provider's books begin at 0 with each run.
    """

    provider: str
    parameters: Callable[[Draw, int], Parameters]
    share: float
    options: Callable[[Draw], Parameters] = field(default=lambda _: {})
    sends: bool = False
    each_run: bool = False


def _echo(draw: Draw, packets: int) -> Parameters:
    return {
        "count": 0,
        "window": draw.between(32, 160),
        "size": draw.between(16, 512),
        "minimum_size": draw.between(1, 16),
        "external": draw.one_of((0.0, 0.25, 0.5)),
        "seed": draw.between(1, 1 << 30),
    }


def _echo_options(draw: Draw) -> Parameters:
    return {"hold": draw.between(4, 32), "hold_seconds": 0.5}


def _burst(draw: Draw, packets: int) -> Parameters:
    size = draw.between(16, 256)
    hold = draw.between(16, 64)
    # Room in the ring for half as many packets again as must be in it; twice as many as that must be queued.
    pages = max(1, -(-packets * 3 * (size + _PACKET_BYTES) // (2 * 4096)))
    return {
        "count": 0,
        "size": size,
        "window": pages * 4096 // (size + _PACKET_BYTES) + hold + 2 * packets,
        "hold": hold,
        "ring_pages_in": pages,
    }


def _bulk(draw: Draw, packets: int) -> Parameters:
    return {
        "count": 0,
        "window": draw.between(2, 8),
        "size": draw.between(4096, 60000),
        "minimum_size": 1024,
        "seed": draw.between(1, 1 << 30),
        "pace": 0.01,
    }


def _remap(draw: Draw, packets: int) -> Parameters:
    # Seldom: a live save that loses a page to it three times in a row gives up.
    return {"count": 0, "window": draw.between(4, 32), "size": draw.between(64, 4096), "pace": 3.0}


def _many(draw: Draw, packets: int) -> Parameters:
    return {"count": 0, "channels": draw.between(2, 12), "window": draw.between(1, 4), "push": draw.between(0, 4)}


def _churn(draw: Draw, packets: int) -> Parameters:
    return {"count": 0, "requests": draw.between(20, 100), "window": draw.between(1, 16)}


def _gpadl(draw: Draw, packets: int) -> Parameters:
    return {"count": 0, "live": draw.between(1, 4), "size": draw.between(4096, 65536), "keep": draw.number(0.0, 0.8)}


def _hotplug(draw: Draw, packets: int) -> Parameters:
    return {"count": 0, "subchannels": draw.between(1, 3), "stations": draw.between(0, 1), "window": 4}


def _ring_full(draw: Draw, packets: int) -> Parameters:
    return {"count": 0, "pause_every": draw.between(100, 400), "pause_seconds": 0.05, "push": draw.between(0, 64)}


def _sized(draw: Draw, packets: int) -> Parameters:
    return {"count": 0, "window": draw.between(1, 16)}


def _maximum(draw: Draw, packets: int) -> Parameters:
    return {"count": 0, "external_size": draw.between(4096, 1 << 20), "pieces": draw.between(2, 64)}


def _pipe(draw: Draw, packets: int) -> Parameters:
    return {"count": 0, "mode": draw.one_of(("message", "byte", "both")), "window": draw.between(1, 8)}


def _sync(draw: Draw, packets: int) -> Parameters:
    return {"count": 0, "external": draw.one_of((0.0, 0.3)), "nested_every": draw.between(0, 20)}


def _storm(draw: Draw, packets: int) -> Parameters:
    return {"count": 0, "needless": draw.between(0, 4), "doorbells": draw.between(0, 4)}


def _idle(draw: Draw, packets: int) -> Parameters:
    return {"seconds": 0.0, "interval": draw.number(0.2, 2.0)}


LAB_OPTIONS: Parameters = {"stations": 14, "pipes": 1}
"""Of the lab that all workloads together need."""

RECIPES: dict[str, Recipe] = {
    "echo": Recipe("echo", _echo, 1.0, options=_echo_options),
    "burst": Recipe("burst", _burst, 1.0, sends=True, each_run=True),
    "bulk": Recipe("echo", _bulk, 0.3, options=lambda draw: {"hold": draw.between(0, 4)}),
    "remap": Recipe("echo", _remap, 0.15),
    "many": Recipe(LAB, _many, 0.15),
    "churn": Recipe(LAB, _churn, 0.15),
    "gpadl": Recipe(LAB, _gpadl, 0.15),
    "hotplug": Recipe(LAB, _hotplug, 0.15),
    "ring-full": Recipe(LAB, _ring_full, 0.15),
    "tiny-rings": Recipe(LAB, _sized, 0.15),
    "maximum": Recipe(LAB, _maximum, 0.1),
    "pipe": Recipe(LAB, _pipe, 0.15),
    "sync": Recipe(LAB, _sync, 0.15),
    "storm": Recipe("burst", _storm, 0.1, each_run=True),
    "idle": Recipe(LAB, _idle, 0.15),
}
"""By the test driver's name."""


# ---- with Linux's own drivers ----------------------------------------------------------------------------------------

IMAGE = "soak.img"


def _disk(draw: Draw, packets: int) -> Parameters:
    return {
        "device": "/dev/sda",
        "count": 0,
        "slots": draw.between(300, 600),
        "batch": draw.between(4, 32),
        "verify_every": draw.between(4, 12),
        "pace": draw.one_of((0.0, 0.0, 0.02)),
        "seed": draw.between(1, 1 << 30),
    }


def _disk_options(draw: Draw) -> Parameters:
    return {"luns": [{"lun": 0, "image": IMAGE, "size_mib": 64, "create": True}]}


def _vsock(draw: Draw, packets: int) -> Parameters:
    return {
        "size": draw.between(64, 32768),
        "window": draw.between(1, 16),
        "pace": draw.number(0.005, 0.05),
        "seed": draw.between(1, 1 << 30),
    }


def _card(draw: Draw, packets: int) -> Parameters:
    return {
        "pairs": draw.between(1, 3),
        "size": draw.between(1024, 61440),
        "window": draw.between(2, 16),
        "pace": draw.one_of((0.0, 0.005, 0.02)),
        "seed": draw.between(1, 1 << 30),
    }


def _card_options(draw: Draw) -> Parameters:
    return {"queues": draw.one_of((1, 4)), "offload": draw.chance(0.7)}


STOCK_RECIPES: dict[str, Recipe] = {
    "heartbeat": Recipe(
        "integration", lambda draw, packets: {}, 1.0, options=lambda draw: {"heartbeat_seconds": draw.number(0.2, 1.0)}
    ),
    "disk": Recipe("scsi", _disk, 1.0, options=_disk_options),
    "vsock": Recipe("vsock", _vsock, 1.0),
    "card": Recipe("network", _card, 1.0, options=_card_options),
}
"""Workloads of an episode whose guest has Linux's own drivers; `vmbus.soak.stock` runs them."""

ALL_RECIPES = RECIPES | STOCK_RECIPES
