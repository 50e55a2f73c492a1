"""The command `audit`: is every transaction of a VM's life there exactly once and in order?"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from vmbus.cli.asking import ask, find_vm
from vmbus.cli.completion import vms
from vmbus.cli.terminal import run
from vmbus.errors import UsageError
from vmbus.observe.audit.checker import check_paths

COLLECT_TIMEOUT = 300.0
STATUS = {"clean": 0, "broken": 1, "incomplete": 3}
"""The exit status of each verdict. (2 is a wrong command line.)"""


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--vm",
    "name",
    shell_complete=vms,
    help="Fetch the records of this running VM first, and check its audit directory.",
)
@click.option("--leaf", metavar="UID", help="Beginning of the uid of the server's record with which the life ends.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def audit(paths: tuple[Path, ...], name: str | None, leaf: str | None, as_json: bool) -> None:
    """Check audit records: prove that each packet was there exactly once and in order.

    PATHS are records and directories with records, of both ends and of all servers of a VM's life. Without any, the
    records of the running VM are fetched and checked. The exit status is 0 only if everything is proven, 1 if something
    is broken (the first transaction is named), 3 if nothing is, but records are missing.
    """
    places, leaves = list(paths), [leaf] if leaf is not None else []
    if name is not None or not paths:
        if leaf is not None:
            raise UsageError("--leaf goes with records on disk: a running VM is checked up to now")
        answer = run(ask(find_vm(name), "audit", timeout=COLLECT_TIMEOUT))
        places.append(Path(str(answer["directory"])))
        leaves = list(map(str, answer["uids"]))
    report = check_paths(places, leaf=leaves or None)
    click.echo(report.to_json() if as_json else str(report), nl=not as_json)
    sys.exit(STATUS[report.verdict])
