"""Which boot of the host this is."""

from pathlib import Path


def boot_id() -> str:
    """The kernel's random id of this boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"
