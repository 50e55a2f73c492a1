"""Commands that note moments of a running VM, and take it back to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from vmbus.cli.asking import NAME_FIRST, ask, find_vm
from vmbus.cli.completion import tags
from vmbus.cli.results import facts, json_option, print_json, print_result
from vmbus.cli.terminal import CHECKPOINT_LABELS, REVERT_LABELS, Steps, run
from vmbus.errors import UsageError
from vmbus.operations.checkpoint import CheckpointReport
from vmbus.operations.revert import RevertReport
from vmbus.snapshot.checkpoints import Checkpoint

TIMEOUT = 1800.0

_DIRECTORY = click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the checkpoints lie; they stay when the VM ends. Default: with the VM, and gone with it.",
)


@click.command()
@click.argument("words", nargs=-1, metavar="[NAME] TAG", shell_complete=tags)
@_DIRECTORY
@click.option("--list", "listing", is_flag=True, help="List the checkpoints that there are. Takes no TAG.")
@click.option("--delete", is_flag=True, help="Delete checkpoint TAG.")
@json_option
def checkpoint(words: tuple[str, ...], directory: Path | None, listing: bool, delete: bool, as_json: bool) -> None:
    """Note this moment of the running VM NAME as TAG, so that scripts/revert can go back to it; the VM runs on.

    Without NAME, the only running VM is meant.
    """
    if listing:
        if delete or len(words) > 1:
            raise UsageError("give [NAME] alone with --list")
        name = find_vm(words[0] if words else None, NAME_FIRST)
        found = run(ask(name, "checkpoints", _arguments(directory), timeout=TIMEOUT))
        if as_json:
            print_json({"checkpoints": found["checkpoints"]})
        else:
            _list(found["checkpoints"])
        return
    name, tag = _name_and_tag(words)
    if delete:
        run(ask(name, "delete-checkpoint", _arguments(directory, tag), timeout=TIMEOUT))
        print_result({"name": name, "deleted": tag}, as_json, f"checkpoint {tag!r} of VM {name!r} is gone")
        return
    with Steps(f"checkpoint {tag!r} of VM {name!r}", CHECKPOINT_LABELS) as steps:
        result = run(ask(name, "checkpoint", _arguments(directory, tag), timeout=TIMEOUT, progress=steps))
    report = msgspec.convert(result, CheckpointReport)
    rows = (
        ("checkpoint", f"{report.tag} in {report.directory}"),
        ("packets in flight", f"{report.packets['queued']} queued, {report.packets['sent']} sent"),
        ("held by providers", str(report.incoming_held)),
        ("guest memory", f"{report.vm_state_bytes / 2**20:.1f} MiB"),
        ("device state", f"{report.state_bytes / 2**10:.1f} KiB"),
        ("downtime", f"{report.downtime:.3f} s"),
    )
    print_result(report, as_json, facts(rows))


@click.command()
@click.argument("words", nargs=-1, metavar="[NAME] TAG", shell_complete=tags)
@_DIRECTORY
@json_option
def revert(words: tuple[str, ...], directory: Path | None, as_json: bool) -> None:
    """Take the running VM NAME back to checkpoint TAG: what has happened since is undone, in guest and device.

    Without NAME, the only running VM is meant.
    """
    name, tag = _name_and_tag(words)
    with Steps(f"revert of VM {name!r} to {tag!r}", REVERT_LABELS) as steps:
        result = run(ask(name, "revert", _arguments(directory, tag), timeout=TIMEOUT, progress=steps))
    report = msgspec.convert(result, RevertReport)
    rows = [
        ("packets in flight", f"{report.packets['queued']} queued, {report.packets['sent']} sent"),
        ("channels", str(report.channels)),
        ("downtime", f"{report.downtime:.3f} s"),
    ]
    if report.forced:
        rows.append(("note", "a provider did not come to rest, and was ended as it was"))
    print_result(report, as_json, facts(rows))


def _name_and_tag(words: tuple[str, ...]) -> tuple[str, str]:
    if not 1 <= len(words) <= 2:
        raise UsageError("give [NAME] TAG, see --help")
    return find_vm(words[0] if len(words) == 2 else None, NAME_FIRST), words[-1]


def _arguments(directory: Path | None, tag: str | None = None) -> dict[str, Any]:
    arguments: dict[str, Any] = {"directory": None if directory is None else str(directory.absolute())}
    if tag is not None:
        arguments["tag"] = tag
    return arguments


def _list(found: list[dict[str, Any]]) -> None:
    for one in msgspec.convert(found, list[Checkpoint]):
        in_flight = f"{one.packets.queued} queued, {one.packets.sent} sent"
        click.echo(f"{one.tag:<32}  {one.created}  {in_flight}")
