"""How a card takes leave of its guest before it is withdrawn.

Linux takes no answers any more once a channel is rescinded, and waits for them for ever, with all of its networking. So
first it loses the link, which ends its sending, and everything that is under way is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from vmbus.providers.base import Host
from vmbus.providers.network.queue import Queue

LINK_SECONDS = 2.5
"""From one change of the link to when Linux has surely followed the next: it waits for two seconds between them."""
DEPARTURE_SECONDS = 4.5
"""For which a guest that does not come to rest is waited for."""
_CALM_SECONDS = 0.5  # without a packet of the guest's: it has stopped
_LOOK_EVERY = 0.05


def answers_read(queues: Sequence[Queue]) -> bool:
    """Whether the guest has taken all that was put into its rings."""
    words = [rings[1].describe() for queue in queues if (rings := queue.channel.rings) is not None]
    return all(ring["read_index"] == ring["write_index"] for ring in words)


def calm(host: Host, queues: Sequence[Queue], heard: Callable[[], int], settled: bool) -> Future[None]:
    """Done when the guest has nothing more to say, and has taken and completed everything; or it is not to be waited
    for any longer, or has closed the card. `heard`: packets that have come from it; `settled`: the link has not changed
    lately."""
    found: Future[None] = Future()
    needed = _CALM_SECONDS if settled else LINK_SECONDS
    looks = quiet = 0
    seen = heard()

    def look() -> None:
        nonlocal looks, quiet, seen
        if found.done():
            return
        looks += 1
        before, seen = seen, heard()
        at_rest = seen == before and not any(queue.in_flight for queue in queues) and answers_read(queues)
        quiet = quiet + 1 if at_rest else 0
        if quiet * _LOOK_EVERY >= needed or looks * _LOOK_EVERY >= DEPARTURE_SECONDS or not queues[0].open:
            found.set_result(None)
        else:
            host.call_later(_LOOK_EVERY, look)

    look()
    return found
