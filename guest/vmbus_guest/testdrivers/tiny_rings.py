"""Test driver `tiny-rings`: packets of all sizes that fit, to the lab and back, through rings of one page each way, so
that they wrap at every possible place.

Its parameters are those of `echo`, with other defaults.
"""

from __future__ import annotations

from vmbus.wire.lab import LAB_TYPE
from vmbus_guest.testdrivers.echo import EchoDefaults, EchoWorkload
from vmbus_guest.testdrivers.requests import ECHO


class TinyRingsWorkload(EchoWorkload):
    """See the module's text."""

    name = "tiny-rings"
    interface_type = LAB_TYPE
    provider = "lab"
    defaults = EchoDefaults(window=8, size=4000, minimum_size=1, external=0.2)
    default_pages = 1
    head = ECHO


WORKLOAD = TinyRingsWorkload
