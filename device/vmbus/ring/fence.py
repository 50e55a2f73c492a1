"""A full memory fence, which Python does not offer.

x86 lets a load overtake an earlier store to another address; three places of the ring protocol must forbid that
(see `vmbus.ring`). The native core has C11's fence. Without it: taking and releasing an uncontended lock performs
locked read-modify-write instructions, and on x86 each of those is a full fence for normal memory, in about 50 ns.

Other architectures order more weakly in ways that a lock does not mend, so importing this there is refused.
"""

import os
import threading

from vmbus.native.choice import core

if os.uname().machine not in ("x86_64", "AMD64"):  # pragma: no cover
    raise ImportError(f"the memory ordering of the rings is only implemented for x86-64, not {os.uname().machine}")

_lock = threading.Lock()
_acquire = _lock.acquire
_release = _lock.release


def pure_fence() -> None:
    """Every load and store before this call is performed before any load or store after it."""
    _acquire()
    _release()


full_fence = pure_fence if core is None else core.full_fence
