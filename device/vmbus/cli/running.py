"""Commands for VMs that run: which there are, their consoles, their end."""

from __future__ import annotations

import asyncio
import datetime
import time
from pathlib import Path

import click
import msgspec
from rich.table import Table

from vmbus.cli import console as guest_console
from vmbus.cli.asking import NAME_FIRST, Status, ask, find_vm
from vmbus.cli.completion import vms
from vmbus.cli.results import json_option, paper, print_json, print_result
from vmbus.cli.terminal import console, run
from vmbus.errors import EnvironmentProblem, ReportedError, UsageError, WaitTimeout
from vmbus.util.patience import patient
from vmbus.vm.run_directory import read_owner, running_vms, runtime_base
from vmbus.vm.sockets import Sockets

ANSWER_SECONDS = 5.0
"""Seconds that each owner has for saying how its VM is."""
GONE_SECONDS = 30.0
"""Seconds that an owner has for clearing away a VM that has ended."""


@click.command("list")
@json_option
def list_vms(as_json: bool) -> None:
    """List the running VMs."""
    found = run(statuses())
    if as_json:
        print_json({"vms": found})
    if as_json or not found:
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("NAME", "STATE", "SINCE", "PID", "DEVICE", "ACCELERATOR", "DETACHED"):
        table.add_column(heading, no_wrap=True, overflow="ignore")
    for one in found:
        since = "" if one.since is None else _clock(one.since)
        pid = "" if one.pid is None else str(one.pid)
        table.add_row(one.name, one.state, since, pid, one.device, one.accelerator, "yes" if one.detached else "no")
    paper().print(table)


def _clock(at: float) -> str:
    return datetime.datetime.fromtimestamp(at).isoformat(" ", "seconds")


async def statuses() -> list[Status]:
    """What their owners say of all VMs that run, in the order of their names."""
    return list(await asyncio.gather(*(status_of(name) for name in running_vms())))


async def status_of(name: str) -> Status:
    """What a VM's owner says of it."""
    path = runtime_base() / name
    nothing = Status(name=name, state="silent", pid=read_owner(path))
    try:
        found = await ask(name, "status", timeout=patient(ANSWER_SECONDS))
        return msgspec.convert(found, Status)
    except (EnvironmentProblem, WaitTimeout, ReportedError, msgspec.ValidationError):
        return nothing if Sockets(path).supervisor.exists() else msgspec.structs.replace(nothing, state="starting")


@click.command("console")
@click.argument("name", required=False, shell_complete=vms)
@click.option("--read-only", is_flag=True, help="Show the console, and send nothing of what is typed to the guest.")
def show_console(name: str | None, read_only: bool) -> None:
    """Look at the serial console of the running VM NAME, and type there; Ctrl-] then q leaves it again.

    Several may do so at once. The VM runs on when they leave. Without NAME, the only running VM is meant.
    """
    name = find_vm(name, NAME_FIRST)
    path = Sockets(runtime_base() / name).viewers
    keys = "shown only" if guest_console.own_terminal() is None else "Ctrl-] then q leaves, z suspends"
    console.print(f"console of VM {name!r}: {keys}")
    left = run(_attached(path, read_only))
    console.print(f"\nleft the console of VM {name!r}" if left else f"\nVM {name!r} has ended")


async def _attached(path: Path, read_only: bool) -> bool:
    """Whether it was left; else it has ended."""
    left = asyncio.Event()
    looking = asyncio.create_task(guest_console.attach(path, left.set, read_only=read_only))
    leaving = asyncio.create_task(left.wait())
    try:
        await asyncio.wait({looking, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if looking.done():
            looking.result()
        return left.is_set()
    finally:
        for task in (looking, leaving):
            task.cancel()
        await asyncio.gather(looking, leaving, return_exceptions=True)


@click.command()
@click.argument("name", required=False, shell_complete=vms)
@click.option("--kill", is_flag=True, help="End the VM at once, as it is: what its guest has not written is lost.")
@click.option("--timeout", type=click.FloatRange(min=0), help="Seconds that the guest may take (default: 60).")
@json_option
def stop(name: str | None, kill: bool, timeout: float | None, as_json: bool) -> None:
    """Ask the guest of the running VM NAME to power off, by its agent or the power button, and wait until it has.

    If it does not, the VM runs on. Without NAME, the only running VM is meant.
    """
    if kill and timeout is not None:
        raise UsageError("--timeout is for the guest, which --kill does not ask")
    name = find_vm(name, NAME_FIRST)
    within = patient(60.0) if timeout is None else timeout
    result = run(_stop(name, {"kill": kill, "timeout": within}, within))
    said = f"VM {name!r} {'has powered off' if result['powered_off'] else 'has ended'}"
    print_result({"name": name, **result}, as_json, said)


async def _stop(name: str, arguments: dict[str, object], within: float) -> dict[str, object]:
    result = await ask(name, "stop", arguments, timeout=within + patient(60.0))
    deadline = time.monotonic() + patient(GONE_SECONDS)
    while name in running_vms():
        if time.monotonic() > deadline:
            raise WaitTimeout(f"the owner of VM {name!r} to end", patient(GONE_SECONDS))
        await asyncio.sleep(0.02)
    return result
