"""The command that saves a running VM."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
from rich.table import Table

from vmbus.cli.asking import ask, find_vm
from vmbus.cli.completion import vm_option
from vmbus.cli.results import facts, json_option, print_result
from vmbus.cli.terminal import SAVE_LABELS, Steps, console, run
from vmbus.operations.save import SaveReport

SAVE_TIMEOUT = 1800.0


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@vm_option
@click.option("--live", is_flag=True, help="Let the guest run on while its memory is copied.")
@click.option("--keep", is_flag=True, help="Let the VM run on afterwards; else it ends with the save.")
@json_option
def save(directory: Path, name: str | None, live: bool, keep: bool, as_json: bool) -> None:
    """Save a running VM into the new snapshot DIRECTORY."""
    name = find_vm(name)
    arguments = {"directory": str(directory.absolute()), "live": live, "keep": keep}
    with Steps(f"save of VM {name!r}", SAVE_LABELS) as steps:
        result = run(ask(name, "save", arguments, timeout=SAVE_TIMEOUT, progress=steps))
    report = msgspec.convert(result, SaveReport)
    print_result(report, as_json, _shown(report))
    for notice in report.notices:
        console.print(notice, soft_wrap=True)


def _shown(report: SaveReport) -> Table:
    rows = [
        ("snapshot", report.directory),
        ("packets in flight", f"{report.packets['queued']} queued, {report.packets['sent']} sent"),
        ("held by providers", str(report.incoming_held)),
        ("guest memory", f"{report.ram_bytes / 2**20:.1f} MiB"),
        ("device state", f"{report.state_bytes / 2**10:.1f} KiB"),
    ]
    if report.live:
        rows.append(("flushed at the switchover", f"{report.flushed_pages} pages"))
    if report.downtime is not None:
        rows.append(("downtime", f"{report.downtime:.3f} s"))
    return facts(rows)
