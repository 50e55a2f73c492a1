"""The command that makes certificates for migrations by TLS."""

from __future__ import annotations

from pathlib import Path

import click

from vmbus.cli.results import json_option, print_result
from vmbus.operations.migration.certificates import DAYS, make_authority, make_host


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.argument("hosts", nargs=-1, required=True, metavar="HOST[,NAME...]...")
@click.option("--days", default=DAYS, type=click.IntRange(1, 36500), help=f"How long they are good ({DAYS}).")
@json_option
def certificates(directory: Path, hosts: tuple[str, ...], days: int, as_json: bool) -> None:
    """Make certificates for migrations by TLS: a set of each HOST, in DIRECTORY/HOST.

    Names and addresses by which others reach the host follow its name after commas: a,192.0.2.1,a.example. The CA is in
    DIRECTORY, and made if there is none; for further hosts later, give the same one. Copy DIRECTORY/HOST to that host,
    and keep ca-key.pem where it is.
    """
    if not (directory / "ca-key.pem").exists():
        make_authority(directory, days=days)
    made = []
    for host in hosts:
        name, *names = host.split(",")
        made.append({"directory": str(make_host(directory, name, names, days=days)), "names": [name, *names]})
    lines = [f"{one['directory']}: for {', '.join(one['names'])}" for one in made]
    print_result({"certificates": made}, as_json, "\n".join(lines))
