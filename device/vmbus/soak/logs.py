"""What is kept of a VM's logs."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from vmbus.vm.run_directory import RunDirectory

LOG_BYTES = 512 << 10
"""Of the end of each log that is kept."""
LOGS = ("server.log", "qemu.log", "console.log")


class KeepingDirectory(RunDirectory):
    """A run directory whose logs are kept when it is removed, whoever ends the VM."""

    keep: Path | None = None

    def remove(self) -> None:
        """Keep the logs' ends, then remove all."""
        if self.keep is not None:
            keep, self.keep = self.keep, None
            with contextlib.suppress(OSError):  # a full disk loses the logs, and nothing else
                keep.mkdir(mode=0o700, parents=True, exist_ok=True)
                for name in LOGS:
                    _keep_end(self / name, keep / name)
        super().remove()


def _keep_end(source: Path, target: Path) -> None:
    if not source.exists():
        return
    with source.open("rb") as file:
        file.seek(max(0, source.stat().st_size - LOG_BYTES))
        data = file.read()
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as kept:
        kept.write(data)
