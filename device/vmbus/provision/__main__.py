"""`python -m vmbus.provision [--json] [--quiet]`: the second stage of the set-up, with progress and a summary.

Progress goes to standard error, the summary to standard output. Exit status 0: everything is there; 10: something is
missing, and the message says what to do; 130: interrupted, to be continued by the next run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from vmbus.errors import VmbusError
from vmbus.places import CHECKOUT
from vmbus.provision import Provisioned, needs, prebuilt, provision, provision_debian
from vmbus.provision.cache import Cache
from vmbus.provision.debian_system import DebianSystem
from vmbus.provision.report import PlainReporter, Reporter, SilentReporter
from vmbus.util.screen import screen


class RichReporter:
    """Progress on a terminal: a line per step, the running one with a bar."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text=Text("✓", style="green"), table_column=Column(width=1)),
            # What a step is called gives way to what it says; the time is always whole.
            TextColumn("{task.description}", markup=False, table_column=Column(ratio=3, no_wrap=True)),
            BarColumn(bar_width=10, table_column=Column(width=10)),
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(ratio=2, no_wrap=True)),
            TimeElapsedColumn(table_column=Column(width=7, no_wrap=True)),
            console=console,
            expand=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> RichReporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._progress.stop_task(self._task)
        self._progress.stop()

    def begin(self, text: str) -> None:
        self._task = self._progress.add_task(text, total=None, text="")

    def progress(self, done: int, total: int, text: str = "") -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total, text=f"{done}/{total} {text}")

    def end(self, text: str = "") -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=1, total=1, text=text or "done")
            self._task = None

    def note(self, text: str) -> None:
        self._progress.console.print(text, soft_wrap=True)


def facts(result: Provisioned) -> dict[str, object]:
    return {
        "qemu": list(result.qemu.argv),
        "qemu_version": result.qemu.version_text,
        "qemu_source": result.qemu.source,
        "qemu_img": list(result.qemu.image_argv),
        "libvfio_user": str(result.libvfio_user),
        "libvfio_user_source": result.libvfio_user_source,
        "kernel": str(result.kernel),
        "kernel_version": result.kernel_version,
        "image": str(result.image),
        "image_key": result.image_key,
        "native_core": str(result.native_core) if result.native_core else None,
        "kernel_module_problem": result.kernel_module_problem or None,
        "accelerator": result.accelerator.name,
        "accelerator_reason": result.accelerator.reason,
    }


def summary(result: Provisioned) -> Table:
    table = Table(title="Set-up", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    megabytes = result.image.stat().st_size / 1e6
    table.add_row("QEMU", f"{result.qemu.version_text} ({result.qemu.source})")
    table.add_row("libvfio-user", f"{result.libvfio_user} ({result.libvfio_user_source})")
    table.add_row("guest kernel", f"{result.kernel_version}")
    table.add_row("guest image", f"{result.image} ({megabytes:.1f} MB)")
    table.add_row("native core", str(result.native_core or "none: rings and packets are served by Python alone"))
    table.add_row(
        "guest's drivers",
        "userspace only: " + problem if (problem := result.kernel_module_problem) else "userspace, Linux's own",
    )
    table.add_row("accelerator", f"{result.accelerator.name}: {result.accelerator.reason}")
    return table


EXPORT = "Write the finished set-up to this file, for machines without apt, compiler or network, and its SHA-256."
PYTHON = "With --export, of a checkout: packages for this Python, too, as 3.13; may be given several times."
IMPORT = "Take the set-up from a file that --export has written; programs are run from it."


@click.command(help="Find or fetch everything that virtual machines with our devices need.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
@click.option("--quiet", is_flag=True, help="Print no summary, and progress only if there is something to do.")
@click.option("--check", is_flag=True, help="Only say what is there, what is needed, and for what; fetch nothing.")
@click.option(
    "--clean", is_flag=True, help="Only remove everything that was fetched and made, and say how much it was."
)
@click.option("--debian", is_flag=True, help="Make the Debian for guests too, which run-vm debian does by itself.")
@click.option("--export", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help=EXPORT)
@click.option("--python", "pythons", multiple=True, metavar="VERSION", help=PYTHON)
@click.option("--import", "import_", type=click.Path(path_type=Path), metavar="FILE", help=IMPORT)
def main(
    as_json: bool,
    quiet: bool,
    check: bool,
    clean: bool,
    debian: bool,
    export: Path | None,
    pythons: tuple[str, ...],
    import_: Path | None,
) -> None:
    """Run the set-up's second stage."""
    if check or clean:
        words = [*(["--check"] if check else []), *(["--clean"] if clean else []), *(["--json"] if as_json else [])]
        sys.exit(needs.run(words, Cache(), None))
    errors = screen(stderr=True)

    def work(reporter: Reporter) -> tuple[Provisioned, DebianSystem | None, str]:
        cache = Cache()
        if import_ is not None:
            prebuilt.bring(import_, cache, CHECKOUT, reporter)
        result = provision(cache, reporter)
        system = provision_debian(cache, reporter) if debian else None
        return result, system, prebuilt.export(export, cache, CHECKOUT, reporter, pythons) if export is not None else ""

    try:
        if errors.is_terminal and not as_json:
            with RichReporter(errors) as reporter:
                result, system, digest = work(reporter)
        else:
            plain: Reporter = SilentReporter() if as_json and not errors.is_terminal else PlainReporter()
            result, system, digest = work(plain)
    except (VmbusError, OSError) as error:
        sys.exit(needs.failure(error, ["--json"] if as_json else []))
    except KeyboardInterrupt:
        errors.print("set-up interrupted; the next run continues with what is missing", soft_wrap=True)
        sys.exit(130)
    if as_json:
        more = ({"debian": str(system.image)} if system else {}) | ({"sha256": digest} if digest else {})
        click.echo(json.dumps(facts(result) | more, indent=1))
    elif digest:
        click.echo(f"{digest}  {export}")  # as sha256sum has it
    elif not quiet:
        table = summary(result)
        if system is not None:
            megabytes = system.image.stat().st_blocks * 512 / 1e6
            table.add_row("Debian", f"{system.image} ({len(system.packages)} packages, {megabytes:.0f} MB)")
        screen().print(table)


if __name__ == "__main__":
    main()
