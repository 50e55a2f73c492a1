"""How long a wait may be: bounds are written for a machine of usual speed, and a slower one gets more of it.

`VMBUS_PATIENCE` is a factor for every bound on what another process of a VM's has to do: QEMU, the device server, the
guest's agent. No bound goes away by it. 1 is the default; a test run sets it to what it has measured.
"""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable
from typing import Any

from vmbus.errors import EnvironmentProblem

VARIABLE = "VMBUS_PATIENCE"
LARGEST = 100.0

Guard = Callable[[Awaitable[Any], str, float], Awaitable[Any]]
"""Waits for work, named by a text, for at most so many seconds, and only as long as whoever does it lives."""


def factor() -> float:
    """What bounds are multiplied by: 1 to `LARGEST`. Raises EnvironmentProblem if the variable is no such number."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return 1.0
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 1.0 <= found <= LARGEST:
        raise EnvironmentProblem(f"{VARIABLE} is {text!r}; it can be a number from 1 to {LARGEST:g}")
    return found


def patient(seconds: float) -> float:
    """A bound of so many seconds, on this machine."""
    return seconds * factor()
