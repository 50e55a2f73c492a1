"""A delay line for network frames: ``python -I -S line.py IN OUT LATENCY LOSS``.

IN is a descriptor of a tap device, OUT one of a packet socket; both with a virtio-net header before each frame, so that
frames of any length pass unchanged. Each frame that comes in goes out LATENCY seconds later, in order, or never: with
the probability LOSS (0 to 1). Standard library only; runs until it is killed.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import sys
import time
from collections import deque

LIMIT = 64 << 20
"""Bytes that the line holds at most; more is lost, as in any network that is asked for too much."""

_FRAME = 1 << 17
_BATCH = 64  # frames that are read before the clock is looked at again


def run(source: int, sink: int, latency: float, loss: float) -> None:
    """Moves frames for ever. Raises OSError if `source` fails."""
    chance = random.Random(0)  # the same packets are lost in each run: a failing test can be repeated
    waiting: deque[tuple[float, bytes]] = deque()
    held = 0
    os.set_blocking(source, False)
    poll = select.poll()
    poll.register(source, select.POLLIN)
    while True:
        timeout = None if not waiting else max(0.0, waiting[0][0] - time.monotonic())
        poll.poll(None if timeout is None else timeout * 1000)
        for _ in range(_BATCH):
            try:
                frame = os.read(source, _FRAME)
            except BlockingIOError:
                break
            if (loss and chance.random() < loss) or held + len(frame) > LIMIT:
                continue
            waiting.append((time.monotonic() + latency, frame))
            held += len(frame)
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, frame = waiting.popleft()
            held -= len(frame)
            with contextlib.suppress(OSError):  # an interface that is down or full loses frames
                os.write(sink, frame)


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
