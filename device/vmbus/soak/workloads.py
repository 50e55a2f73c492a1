"""Which test drivers run in the guest of an episode, with which parameters, and which providers they need.

All of them run side by side in one process of the guest, the test driver `mixed`, until they are stopped; each checks
its own data and keeps its own books.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vmbus.soak.draw import Draw, drawn

Parameters = Mapping[str, Any]

LAB = "lab"
IMAGE = "soak.img"
_PACKET_BYTES = 48  # what a burst packet takes of the ring besides its data: header, descriptor, trailer
_SEED = {"between": [1, 1 << 30]}


@dataclass(frozen=True)
class Recipe:
    """How to run one test driver.

    `provider`: the kind it needs, one for itself; a lab is shared, since it has a station for each. `parameters`,
    `options` (the provider's): as `vmbus.soak.draw.drawn` takes them, drawn for each episode, or a function of how many
    packets shall be in flight. `share`: of the episodes in which it runs. `sends`: it makes the host send more than
    fits into the ring, so that packets are queued and sent at every moment. `each_run`: the provider's books begin at 0
    with each run.
    """

    provider: str
    values: Parameters | Callable[[Draw, int], Parameters]
    share: float
    choices: Parameters = field(default_factory=dict)
    sends: bool = False
    each_run: bool = False

    def options(self, draw: Draw) -> dict[str, Any]:
        return drawn(self.choices, draw)

    def parameters(self, draw: Draw, packets: int) -> dict[str, Any]:
        return dict(self.values(draw, packets)) if callable(self.values) else drawn(self.values, draw)


def _between(low: float, high: float) -> dict[str, Any]:
    return {"between": [low, high]}


def _one_of(*values: Any) -> dict[str, Any]:
    return {"one_of": list(values)}


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


_ECHO = {
    "count": 0,
    "window": _between(32, 160),
    "size": _between(16, 512),
    "minimum_size": _between(1, 16),
    "external": _one_of(0.0, 0.25, 0.5),
    "seed": _SEED,
}
_BULK = {
    "count": 0,
    "window": _between(2, 8),
    "size": _between(4096, 60000),
    "minimum_size": 1024,
    "seed": _SEED,
    "pace": 0.01,
}
# Seldom: a live save that loses a page to it three times in a row gives up.
_REMAP = {"count": 0, "window": _between(4, 32), "size": _between(64, 4096), "pace": 3.0}
_MANY = {"count": 0, "channels": _between(2, 12), "window": _between(1, 4), "push": _between(0, 4)}
_GPADL = {"count": 0, "live": _between(1, 4), "size": _between(4096, 65536), "keep": _between(0.0, 0.8)}
_HOTPLUG = {"count": 0, "subchannels": _between(1, 3), "stations": _between(0, 1), "window": 4}
_RING_FULL = {"count": 0, "pause_every": _between(100, 400), "pause_seconds": 0.05, "push": _between(0, 64)}
_MAXIMUM = {"count": 0, "external_size": _between(4096, 1 << 20), "pieces": _between(2, 64)}
_PIPE = {"count": 0, "mode": _one_of("message", "byte", "both"), "window": _between(1, 8)}
_SYNC = {"count": 0, "external": _one_of(0.0, 0.3), "nested_every": _between(0, 20)}
_STORM = {"count": 0, "needless": _between(0, 4), "doorbells": _between(0, 4)}

LAB_OPTIONS: dict[str, Any] = {"stations": 14, "pipes": 1}
"""Of the lab that all workloads together need."""

RECIPES: dict[str, Recipe] = {
    "echo": Recipe("echo", _ECHO, 1.0, {"hold": _between(4, 32), "hold_seconds": 0.5}),
    "burst": Recipe("burst", _burst, 1.0, sends=True, each_run=True),
    "bulk": Recipe("echo", _BULK, 0.3, {"hold": _between(0, 4)}),
    "remap": Recipe("echo", _REMAP, 0.15),
    "many": Recipe(LAB, _MANY, 0.15),
    "churn": Recipe(LAB, {"count": 0, "requests": _between(20, 100), "window": _between(1, 16)}, 0.15),
    "gpadl": Recipe(LAB, _GPADL, 0.15),
    "hotplug": Recipe(LAB, _HOTPLUG, 0.15),
    "ring-full": Recipe(LAB, _RING_FULL, 0.15),
    "tiny-rings": Recipe(LAB, {"count": 0, "window": _between(1, 16)}, 0.15),
    "maximum": Recipe(LAB, _MAXIMUM, 0.1),
    "pipe": Recipe(LAB, _PIPE, 0.15),
    "sync": Recipe(LAB, _SYNC, 0.15),
    "storm": Recipe("burst", _STORM, 0.1, each_run=True),
    "idle": Recipe(LAB, {"seconds": 0.0, "interval": _between(0.2, 2.0)}, 0.15),
}
"""By the test driver's name."""

# ---- with Linux's own drivers ----------------------------------------------------------------------------------------

_DISK = {
    "device": "/dev/sda",
    "count": 0,
    "slots": _between(300, 600),
    "batch": _between(4, 32),
    "verify_every": _between(4, 12),
    "pace": _one_of(0.0, 0.0, 0.02),
    "seed": _SEED,
}
_VSOCK = {"size": _between(64, 32768), "window": _between(1, 16), "pace": _between(0.005, 0.05), "seed": _SEED}
_CARD = {
    "pairs": _between(1, 3),
    "size": _between(1024, 61440),
    "window": _between(2, 16),
    "pace": _one_of(0.0, 0.005, 0.02),
    "seed": _SEED,
}

STOCK_RECIPES: dict[str, Recipe] = {
    "heartbeat": Recipe("integration", {}, 1.0, {"heartbeat_seconds": _between(0.2, 1.0)}),
    "disk": Recipe("scsi", _DISK, 1.0, {"luns": [{"lun": 0, "image": IMAGE, "size_mib": 64, "create": True}]}),
    "vsock": Recipe("vsock", _VSOCK, 1.0),
    "card": Recipe("network", _CARD, 1.0, {"queues": _one_of(1, 4), "offload": {"chance": 0.7}}),
}
"""Workloads of an episode whose guest has Linux's own drivers; `vmbus.soak.stock` runs them."""

ALL_RECIPES = RECIPES | STOCK_RECIPES
