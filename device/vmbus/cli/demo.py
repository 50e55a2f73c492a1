"""The demo: a VM saved in mid-traffic and restored in fresh processes, with a table and a verdict."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click
import msgspec
from rich.table import Table
from rich.text import Text

from vmbus.cli.outputs import output
from vmbus.cli.results import TO_STANDARD_OUTPUT, file_option, print_json
from vmbus.cli.terminal import Steps, console, run
from vmbus.provision import provision
from vmbus.testkit.story import Figures, Story, run_story
from vmbus.util.screen import screen
from vmbus.vm.command_line import programs_from
from vmbus.vm.description import named_description

LABELS = {
    "boot": "Linux guest booted, its agent answers",
    "traffic": "traffic both ways until enough packets are in flight",
    "save": "saved while the traffic runs; then every process is killed",
    "restore": "restored in new processes",
    "end": "the traffic runs to its end, both sides' books are compared",
}


@click.command()
@click.option("--packets", default=256, show_default=True, type=click.IntRange(16, 20_000), help="least in flight")
@file_option("Print the figures as JSON; or, with a FILE, write them there too.")
@click.option("--stopped", is_flag=True, help="Stop the guest before the save instead of saving it live.")
def demo(packets: int, json_file: Path | None, stopped: bool) -> None:
    """Save a VM in mid-traffic, restore it in fresh processes, and prove that no packet was lost or doubled."""
    with output(json_file) as write:
        figures = _told(packets, stopped)
        write(msgspec.json.format(msgspec.json.encode(figures), indent=2) + b"\n")
    if json_file == TO_STANDARD_OUTPUT:
        print_json(figures)
    else:
        show(figures)
    sys.exit(0 if figures.verdict == "pass" else 1)


def _told(packets: int, stopped: bool) -> Figures:
    """The story, with its steps shown."""
    provisioned = provision()
    programs = programs_from(provisioned)
    description = named_description("demo")
    console.print(
        f"QEMU {programs.qemu_version}, accelerator {provisioned.accelerator.name} "
        f"({provisioned.accelerator.reason}), guest kernel {provisioned.kernel_version}"
    )
    # A faster guest gets through more packets while its memory is copied.
    scale = 10 if programs.accelerator == "kvm" else 1
    story = Story(packets=packets, live=not stopped, echo_count=15_000 * scale, burst_count=30_000 * scale)
    with tempfile.TemporaryDirectory(prefix="vmbus-demo-") as directory, Steps("demo", LABELS) as steps:
        return run(
            run_story(
                story,
                description,
                programs,
                Path(directory) / "snapshot",
                progress=steps,
                say=lambda text: console.print(f"           {text}", soft_wrap=True),
            )
        )


def show(figures: Figures) -> None:
    """The one table, and the verdict."""
    out = screen()
    table = Table(title="Save and restore in mid-traffic", title_justify="left")
    table.add_column("")
    table.add_column("at the save", justify="right")
    table.add_column("restored", justify="right")
    back = figures.restored_by_state
    table.add_row("host packets queued (ring full)", str(figures.in_flight["queued"]), str(back["queued"]))
    table.add_row("host packets sent, not completed", str(figures.in_flight["sent"]), str(back["sent"]))
    table.add_row("guest requests held by the provider", str(figures.in_flight["incoming_held"]), "finished first")
    table.add_section()
    table.add_row("transactions, both directions", "", str(figures.transactions))
    table.add_row("completed exactly once", "", str(figures.completed))
    counts = f"{figures.lost} / {figures.duplicated} / {figures.reordered} / {figures.corrupted}"
    table.add_row("lost / duplicated / reordered / corrupted", "", counts)
    table.add_section()
    ram, state = figures.bytes["ram"] / 2**20, figures.bytes["device_state"] / 2**10
    table.add_row("guest memory, device state", f"{ram:.0f} MiB", f"{state:.0f} KiB")
    table.add_row("pages flushed through QEMU at the switchover", str(figures.flushed_pages), "")
    seconds = figures.seconds
    table.add_row(
        "boot, save, restore", f"{seconds['boot']:.1f} / {seconds['save']:.2f} s", f"{seconds['restore']:.2f} s"
    )
    table.add_row("downtime (guest stopped to guest running)", "", f"{seconds['downtime']:.2f} s")
    out.print(table)
    for reason in figures.reasons:
        out.print(Text.assemble(("wrong:", "red"), f" {reason}"), soft_wrap=True)
    if figures.verdict == "pass":
        verdict = Text.assemble(("PASS", "bold green"), "  every transaction completed exactly once, in order, intact")
        out.print(verdict)
    else:
        out.print("FAIL", style="bold red")
