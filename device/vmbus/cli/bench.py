"""The command `bench`: measures, shows tables, writes JSON. The measurements are a package of their own."""

from __future__ import annotations

import datetime
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vmbus.cli.outputs import output
from vmbus.cli.results import TO_STANDARD_OUTPUT, file_option
from vmbus.cli.terminal import Steps, run
from vmbus.cli.terminal import console as errors
from vmbus.places import DESCRIPTIONS as CONFIGURATIONS
from vmbus.places import MEASUREMENTS
from vmbus.provision import Provisioned, find_debian, provision
from vmbus.util.screen import screen
from vmbus.vm.command_line import programs_from
from vmbus.vm.description import load_description

if TYPE_CHECKING:
    from vmbus_bench.figures import Part, Report

PARTS = ("guest", "host", "doorbell", "save-restore", "scsi", "network", "debian", "downtime", "audit")


@click.command()
@file_option("Print the figures as JSON; or, with a FILE, write them there too.")
@click.option("--quick", is_flag=True, help="Fewer and shorter rounds: rough figures in about two minutes.")
@click.option(
    "--only",
    "names",
    multiple=True,
    type=click.Choice(PARTS),
    metavar="NAME",
    help=f"Only this part ({', '.join(PARTS)}). May be given more than once.",
)
def bench(json_file: Path | None, quick: bool, names: tuple[str, ...]) -> None:
    """Measure the rings, the device server, and save and restore, each against a baseline of the same run.

    Figures are medians of several rounds; half of the rounds lie within about ± of it. The exit status
    does not depend on the targets: how fast a machine is is no defect.
    """
    with output(json_file) as write:
        report, left_out = _measured(quick, names)
        write(report.to_json())
    console = screen()
    if json_file == TO_STANDARD_OUTPUT:
        click.echo(report.to_json())
    else:
        show(report, console)
    for reason in left_out:
        errors.print(f"left out: {reason}", style="yellow")


def _measured(quick: bool, names: tuple[str, ...]) -> tuple[Report, list[str]]:
    """The report, and what was left out and why."""
    if str(MEASUREMENTS) not in sys.path:
        sys.path.append(str(MEASUREMENTS))
    from vmbus_bench.debian import NotMade
    from vmbus_bench.figures import Report
    from vmbus_bench.network import NotPermitted
    from vmbus_bench.processes import describe_machine

    provisioned = provision()
    left_out: list[str] = []
    started = time.monotonic()
    report = Report(
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        quick=quick,
        machine={**describe_machine(), "load_before": list(os.getloadavg())},
        parts=[],
    )
    with Steps("benchmark") as steps:
        for name in names or PARTS:
            began = time.monotonic()
            try:
                part = _measure(name, provisioned, quick, steps)
            except (NotPermitted, NotMade) as error:
                if names:
                    raise
                left_out.append(f"{name}: {error}")
                continue
            part.seconds = round(time.monotonic() - began, 2)
            report.parts.append(part)
    report.machine["load_after"] = list(os.getloadavg())
    report.seconds = round(time.monotonic() - started, 2)
    return report, left_out


def _measure(name: str, provisioned: Provisioned, quick: bool, steps: Steps) -> Part:
    from vmbus_bench import audit, debian, doorbell, downtime, guest, host, network, save_restore, scsi

    if name == "host":
        return host.measure(provisioned.libvfio_user, quick=quick, step=steps)
    if name == "doorbell":
        return doorbell.measure(provisioned.libvfio_user, host.raw_echo, quick=quick, step=steps)
    if name == "audit":
        return audit.measure(provisioned.libvfio_user, quick=quick, step=steps)
    if name == "save-restore":
        return save_restore.measure(provisioned.libvfio_user, quick=quick, step=steps)
    if name == "scsi":
        linux = load_description(CONFIGURATIONS / "linux.toml")
        return run(scsi.measure(linux, programs_from(provisioned), quick=quick, step=steps))
    if name == "network":
        card = load_description(CONFIGURATIONS / "network.toml")
        return run(network.measure(card, programs_from(provisioned), quick=quick, step=steps))
    if name == "debian":
        machine = load_description(CONFIGURATIONS / "debian.toml")
        found = find_debian()
        template = None if found is None else found.image
        return run(debian.measure(machine, programs_from(provisioned), template, quick=quick, step=steps))
    description = load_description(CONFIGURATIONS / "echo.toml")
    if name == "downtime":
        return run(downtime.measure(description, programs_from(provisioned), quick=quick, step=steps))
    return run(guest.measure(description, programs_from(provisioned), quick=quick, step=steps))


def show(report: Report, console: Console) -> None:
    """Print the report: a table for each part, the targets, and how busy the machine was."""
    from vmbus_bench.figures import readable_sample, readable_target

    for part in report.parts:
        console.print(f"\n{part.title}", style="bold")
        console.print(f"baseline: {part.baseline}", style="dim")
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for heading in ("", "figure", "baseline", "ratio"):
            table.add_column(heading, justify="right" if heading else "left")
        for row in part.rows:
            name = Text(row.name)
            details = ", ".join(f"{key} {readable_sample(sample)}" for key, sample in row.details.items())
            for remark in filter(None, (row.note, details)):
                name.append(f"\n  {remark}", style="dim")
            table.add_row(
                name,
                readable_sample(row.figure),
                "" if row.baseline is None else readable_sample(row.baseline),
                "" if row.ratio is None else readable_sample(row.ratio),
            )
        console.print(table)
    for target in report.targets:
        console.print(readable_target(target), style="green" if target.reached else "yellow")
    machine = report.machine
    before, after = machine["load_before"], machine["load_after"]
    console.print(
        f"{machine['processors']} x {machine['processor']}, Python {machine['python']}; "
        f"load average (1 min) {before[0]:.2f} before, {after[0]:.2f} after; {report.seconds:.0f} s"
        + ("; quick, so rough" if report.quick else "")
    )
