"""`vmbus --version`: the program's, and those of everything that another version may have to read.

What may change with which version: docs/compatibility.md.
"""

from __future__ import annotations

from typing import NamedTuple

import click

from vmbus import __version__


class Format(NamedTuple):
    """Something that is written by one version and read by another."""

    name: str
    written: str
    read: str
    """Versions that this program reads."""


def formats() -> list[Format]:
    """All there are, in the order of docs/compatibility.md."""
    # Imported here: a command that shows no versions need not load them.
    from vmbus.device import saved as device_state
    from vmbus.kmcl import saved as packets
    from vmbus.observe.audit import format as audit
    from vmbus.observe.capture import record as capture
    from vmbus.observe.inspection import document as inspection
    from vmbus.operations.migration import channel as migration
    from vmbus.provision import prebuilt
    from vmbus.snapshot import checkpoints, manifest
    from vmbus.soak import records as soak
    from vmbus.wire import synic

    def one(name: str, version: int, oldest: int | None = None) -> Format:
        oldest = version if oldest is None else oldest
        return Format(name, str(version), str(version) if oldest == version else f"{oldest} to {version}")

    major, minor = synic.ABI_VERSION >> 16, synic.ABI_VERSION & 0xFFFF
    return [
        one("device state", device_state.FORMAT_VERSION, device_state.OLDEST_VERSION),
        one("packets in it", packets.VERSION, packets.OLDEST_VERSION),
        one("snapshot", manifest.VERSION),
        one("checkpoint", checkpoints.VERSION),
        one("migration", migration.VERSION),
        one("capture", capture.VERSION),
        one("audit record", audit.VERSION),
        one("inspection", inspection.FORMAT),
        one("soak campaign", soak.FORMAT),
        one("set-up archive", prebuilt.FORMAT),
        Format("device ABI", f"{major}.{minor}", f"{major}.x"),
    ]


def show(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """What `--version` prints; the command ends."""
    if not wanted or context.resilient_parsing:
        return
    click.echo(f"vmbus {__version__}")
    for name, written, read in formats():
        click.echo(f"{name:16}{written:6}reads {read}")
    context.exit()
