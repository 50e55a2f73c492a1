"""Test driver `bulk`: large buffers at full speed. As `echo`, with all data in external memory that the device
transforms in place, and as much of it as a request may have.

Its parameters are those of `echo`, with other defaults. Beside `echo` it needs a provider of its own.
"""

from __future__ import annotations

from typing import Any

from vmbus_guest.testdrivers.echo import LARGEST, EchoDefaults, EchoWorkload


class BulkWorkload(EchoWorkload):
    """See the module's text."""

    name = "bulk"
    defaults = EchoDefaults(window=32, size=LARGEST, external=1.0)

    def result(self) -> dict[str, Any]:
        """The final counts, and bytes per second, there and back."""
        found = super().result()
        seconds = self.seconds
        return {**found, "bytes_per_second": round(2 * self.bytes / seconds) if seconds > 0 else 0}


WORKLOAD = BulkWorkload
