"""Commands that start, save and restore VMs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from vmbus.cli import console as guest_console
from vmbus.cli import own_guest
from vmbus.cli.asking import Status
from vmbus.cli.capture import parse_size
from vmbus.cli.completion import descriptions, test_drivers
from vmbus.cli.detach import Owner, detached, serve, this_owner
from vmbus.cli.drivers import Drive, jobs_for, outcome, parse_drive, show_drivers
from vmbus.cli.keys import with_keys
from vmbus.cli.migrate import Receiving, Reception, receiving_options
from vmbus.cli.results import json_option
from vmbus.cli.supervisor import Supervisor
from vmbus.cli.terminal import (
    RECEIVE_LABELS,
    RESTORE_LABELS,
    Steps,
    background,
    console,
)
from vmbus.errors import UsageError, VmbusError
from vmbus.operations.machine import VirtualMachine
from vmbus.operations.migration.listener import listen
from vmbus.places import command, spelled
from vmbus.provision import provision, provision_debian
from vmbus.qemu.agent import AgentError, GuestWentBack
from vmbus.qemu.archive import archive_for
from vmbus.snapshot.checkpoints import Store
from vmbus.snapshot.manifest import Machine
from vmbus.testkit.driver_file import DriverFile, install, read_driver_file
from vmbus.util.explaining import check_name
from vmbus.vm.command_line import Programs, programs_from
from vmbus.vm.description import VmDescription, named_description, with_further
from vmbus.vm.root import missing_root
from vmbus.vm.run_directory import RunDirectory

_SILENT_AFTER = 20.0
"""Seconds without a report after which a test driver may hang: they report twice a second."""

AUDIT_HELP = "Keep audit records in this directory; scripts/audit checks them."
DETACH_HELP = "Return when the VM runs, and let it run on without this terminal (docs/command-line.md)."
CAPTURE_HELP = "Capture all packets from the start on into this new pcapng file (docs/capture.md)."


@click.command("run-vm")
@click.argument("config", required=False, shell_complete=descriptions)
@click.option("--name", help="Name of the running VM (default: the description's, with a number if it is taken).")
@click.option(
    "--drive",
    "drives",
    multiple=True,
    metavar="DRIVER[:KEY=VALUE,... | :JSON]",
    shell_complete=test_drivers,
    help="Start this test driver in the guest once it is up. Several of them run side by side.",
)
@click.option(
    "--driver-file",
    "driver_files",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Put a test driver of your own into the guest; its name is the file's. See docs/test-drivers.md.",
)
@click.option("--list-drivers", is_flag=True, help="Show the test drivers and their parameters, and start nothing.")
@click.option(
    "--device",
    "others",
    multiple=True,
    metavar="CONFIG",
    help="Give the VM the device of this description, too. May be given more often. See docs/several-devices.md.",
)
@click.option("--audit", type=click.Path(path_type=Path, file_okay=False), help=AUDIT_HELP)
@click.option("--capture", type=click.Path(path_type=Path, dir_okay=False), help=CAPTURE_HELP)
@click.option("--external", metavar="BYTES", help="With --capture: how much of each packet's external data (64K).")
@click.option(
    "--like",
    metavar="DIRECTORY",
    type=click.Path(path_type=Path, file_okay=False),
    help="Make the machine as it is in the checkpoints of this directory, to revert to them.",
)
@click.option(
    "--ssh-key",
    "ssh_keys",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A public key that may log in as root, for a guest with a Debian (default: ~/.ssh/*.pub).",
)
@receiving_options
@own_guest.own_guest_options
@click.option("--detach", is_flag=True, help=DETACH_HELP)
@json_option
def run_vm(
    config: str | None,
    name: str | None,
    drives: tuple[str, ...],
    driver_files: tuple[Path, ...],
    list_drivers: bool,
    others: tuple[str, ...],
    audit: Path | None,
    capture: Path | None,
    external: str | None,
    like: Path | None,
    ssh_keys: tuple[Path, ...],
    receiving: Receiving,
    detach: bool,
    as_json: bool,
    **mine: Any,
) -> None:
    """Start a VM, or receive one, and show its console.

    CONFIG is a VM description: a name in qemu_configs/ or a path to a .toml file (default: demo). On a terminal the
    console is interactive; Ctrl-] then q ends the VM. Without one the console is only shown.
    """
    if name is not None:
        check_name(name)
    own = [read_driver_file(path) for path in driver_files]
    if list_drivers:
        show_drivers(own, as_json=as_json)
        return
    _require_document(as_json, detach)
    if detach and detached(as_json=as_json):
        return
    external_bytes = None if external is None else parse_size(external)
    if external is not None and capture is None:
        raise UsageError("--external goes with --capture")
    if receiving.address is not None:
        if config is not None or drives or own or others or ssh_keys or like is not None or own_guest.given(mine):
            named = ", ".join(["CONFIG", "--drive", "--driver-file", "--device", "--ssh-key", *own_guest.given(mine)])
            raise UsageError(f"--receive takes no {named} or --like: the VM brings its own")
        if capture is not None:
            raise UsageError("--capture does not go with --receive: start it with scripts/capture when the VM is there")
    if (coming := receiving.reception()) is not None:
        serve(_receive(coming, programs_from(provision()), name, audit))
        return
    description = own_guest.with_options(named_description(config or "demo"), mine)
    further = [named_description(one) for one in others]
    description = with_further(description, further)
    own_guest.look_at_files(description)
    wanted = jobs_for([parse_drive(text) for text in drives], own)
    notice = ""
    if description.guest.root:
        description, notice = with_keys(description, ssh_keys)
    elif ssh_keys:
        raise UsageError(f"--ssh-key is for a guest with a Debian, and VM {description.name!r} has none (guest.root)")
    programs = programs_from(provision())
    if missing_root(description) is not None:
        programs = dataclasses.replace(programs, debian=provision_debian().image)
    if notice:
        console.print(notice, soft_wrap=True)
    machine = None if like is None else machine_like(like)
    serve(_run_vm(description, programs, name, wanted, own, audit, capture, external_bytes, machine))


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the running VM (default: the saved description's).")
@click.option("--count", default=1, metavar="N", type=click.IntRange(1, 64), help="Bring N clones of it back at once.")
@click.option("--audit", type=click.Path(path_type=Path, file_okay=False), help=AUDIT_HELP)
@click.option("--capture", type=click.Path(path_type=Path, dir_okay=False), help=CAPTURE_HELP)
@own_guest.own_restore_options
@click.option("--detach", is_flag=True, help=DETACH_HELP)
@json_option
def restore(
    directory: Path,
    name: str | None,
    count: int,
    audit: Path | None,
    capture: Path | None,
    detach: bool,
    as_json: bool,
    **mine: Any,
) -> None:
    """Bring the VM in snapshot DIRECTORY back and show its console.

    Of several clones no console is shown; each goes its own way under a name of its own until all have ended.
    """
    if name is not None:
        check_name(name)
    if capture is not None and count != 1:
        raise UsageError("--capture is for one VM: several clones cannot share the file")
    own_guest.check_restore(mine, count)
    _require_document(as_json, detach)
    if detach and detached(as_json=as_json):
        return
    programs = programs_from(provision())
    if count == 1:
        serve(_restore(directory, programs, name, audit, capture, mine))
    else:
        serve(_restore_clones(directory, programs, name, count, audit, trust=mine["trust"]))


def _require_document(as_json: bool, detach: bool) -> None:
    if as_json and not detach:
        raise UsageError("--json goes with --detach: a console is no document")


def machine_like(directory: Path) -> Machine:
    """How the machine is made whose checkpoints are there. Raises `UsageError` if there are none, `StateError`."""
    found = Store(directory, own=False).list()
    if not found:
        raise UsageError(f"there are no checkpoints in {directory}")
    return found[-1].machine


async def _run_vm(
    description: VmDescription,
    programs: Programs,
    name: str | None,
    drives: list[Drive],
    own: list[DriverFile],
    audit: Path | None,
    capture: Path | None,
    external: int | None,
    like: Machine | None,
) -> None:
    directory = RunDirectory.create(name or description.name, exact=name is not None)
    start = time.monotonic()
    with Steps(f"start of VM {directory.name!r} (QEMU {programs.qemu_version}, {programs.accelerator})") as steps:
        vm = await VirtualMachine.launch(
            description, programs, directory, progress=steps, audit=audit, capture=capture, external=external, like=like
        )
    if vm.notice:
        _notice(vm.notice)
    await _attend(vm, start, drives, own, boots=True)


async def _restore(
    directory: Path,
    programs: Programs,
    name: str | None,
    audit: Path | None,
    capture: Path | None,
    mine: Mapping[str, Any],
) -> None:
    start = time.monotonic()
    run_directory = RunDirectory.create(name, exact=True) if name is not None else None
    with Steps(f"restore of {directory}", RESTORE_LABELS) as steps:
        vm = await VirtualMachine.restore(
            directory, programs, run_directory, progress=steps, audit=audit, capture=capture, **mine
        )
    await _attend_restored(vm, start, "is back")


async def _attend_restored(vm: VirtualMachine, start: float, what: str) -> None:
    assert vm.restored is not None
    packets = vm.restored.packets
    console.print(
        f"VM {vm.name!r} {what}: {vm.restored.channels} channels, "
        f"{packets['queued']} queued and {packets['sent']} sent packets in flight"
    )
    if vm.restored.paused:
        _notice(f"VM {vm.name!r} is paused, as it was: 'cont' on its monitor {vm.paths.qmp_tools} lets it run")
    await _attend(vm, start, [])


async def _restore_clones(
    directory: Path, programs: Programs, name: str | None, count: int, audit: Path | None, *, trust: bool
) -> None:
    owner = this_owner()
    serving: list[Status] = []

    def served(status: Status) -> None:
        serving.append(status)
        if owner is not None and len(serving) == count:
            owner.runs(sorted(serving, key=lambda one: one.name))

    async def attend(vm: VirtualMachine) -> None:
        reason = await _supervisor(vm, owner, served, f"VM {vm.name!r}: ").run()
        _notice(f"VM {vm.name!r}: {reason}")

    with Steps(f"restore of {count} clones of {directory}"):
        clones = await VirtualMachine.clones(directory, programs, count, name=name, audit=audit, trust=trust)
    if owner is not None:
        owner.named(min(vm.name for vm in clones))
    try:
        console.print(f"running: {', '.join(sorted(vm.name for vm in clones))}")
        # The end of one is not the end of the others.
        ends = await asyncio.gather(*(attend(vm) for vm in clones), return_exceptions=True)
        for vm, end in zip(clones, ends, strict=True):
            if isinstance(end, VmbusError):
                _notice(f"VM {vm.name!r}: {end}")
        if failures := [end for end in ends if isinstance(end, BaseException)]:
            raise failures[0]
    finally:
        for vm in clones:
            await vm.kill()


async def _receive(wanted: Reception, programs: Programs, name: str | None, audit: Path | None) -> None:
    run_directory = RunDirectory.create(name, exact=True) if name is not None else None
    try:
        listener = await listen(wanted.address, wanted.secret, wanted.tls)
    except BaseException:
        if run_directory is not None:
            run_directory.remove()
        raise
    console.print(f"waiting for a VM at {listener.address} (QEMU {programs.qemu_version}, {programs.accelerator})")
    start = time.monotonic()
    with Steps("arrival", RECEIVE_LABELS) as steps:
        vm = await VirtualMachine.receive(
            listener,
            programs,
            run_directory,
            progress=steps,
            audit=audit,
            stream_port=wanted.stream_port,
            accept=wanted.accept,
        )
    await _attend_restored(vm, start, "has arrived")


async def _boot_sign(shown: asyncio.Event) -> None:
    """A sign of life while the guest boots and its console is blank."""
    console.print("the guest boots: its console is blank until it is up, some 5 to 20 s")
    if not console.is_terminal:
        return
    start = time.monotonic()
    while not shown.is_set():
        console.file.write(f"\r{time.monotonic() - start:3.0f} s ")
        console.file.flush()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(shown.wait(), 1.0)


def _supervisor(
    vm: VirtualMachine, owner: Owner | None, on_serving: Callable[[Status], None] | None, lead: str = ""
) -> Supervisor:
    log = None if owner is None else owner.log
    return Supervisor(vm, lambda text: _notice(lead + text), on_serving=on_serving, log=log)


async def _attend(
    vm: VirtualMachine, start: float, drives: list[Drive], own: Sequence[DriverFile] = (), *, boots: bool = False
) -> None:
    """Shows the console and serves others' requests until the VM ends. `boots`: it has just begun to."""
    if (owner := this_owner()) is not None:
        await _attend_detached(vm, owner, start, drives, own)
        return
    shown = asyncio.Event()

    def show(data: bytes) -> None:
        if not shown.is_set():
            shown.set()
            if boots and console.is_terminal:
                console.file.write("\r\x1b[K")
                console.file.flush()
        guest_console.write_stdout(data)

    serving = asyncio.Event()
    supervisor = _supervisor(vm, None, lambda _: serving.set())

    async def attach() -> None:
        await serving.wait()
        await guest_console.attach(vm.paths.viewers, lambda: supervisor.finish("ended from the console"), show)

    try:
        keys = "shown only" if guest_console.own_terminal() is None else guest_console.HELP
        console.print(f"console of VM {vm.name!r}: {keys}; to save it: {command('save')} --vm {vm.name} DIR")
        async with (
            archive_for(vm, _notice),
            background(
                attach(),
                _drive(vm, start, drives, own),
                *([_boot_sign(shown)] if boots and not vm.description.foreign else []),
            ),
        ):
            reason = await supervisor.run()
    finally:
        await vm.kill()
    _notice(f"VM {vm.name!r}: {reason}")


async def _attend_detached(
    vm: VirtualMachine, owner: Owner, start: float, drives: list[Drive], own: Sequence[DriverFile]
) -> None:
    """The same without a terminal."""
    owner.named(vm.name)
    supervisor = _supervisor(vm, owner, lambda status: owner.runs([status]))
    try:
        async with archive_for(vm, _notice), background(_drive(vm, start, drives, own)):
            reason = await supervisor.run()
    finally:
        await vm.kill()
    _notice(f"VM {vm.name!r}: {reason}")


async def _drive(vm: VirtualMachine, start: float, drives: list[Drive], own: Sequence[DriverFile]) -> None:
    try:
        for server in await vm.call_servers("status"):
            for name, status in server["providers"].items():
                if "socket" in status:
                    _notice(f"{name}: programs of the host connect to the guest at {status['socket']}")
        if vm.restored is not None and vm.restored.paused:
            return
        for notice in own_guest.sayings(vm, drivers=bool(drives or own)):
            _notice(notice)
        if vm.description.foreign and not drives and not own:
            return  # there may be no agent, and nobody needs one
        await vm.wait_ready()
        _notice(f"the guest's agent is up after {time.monotonic() - start:.1f} s")
        await install(vm, own)
        jobs = []
        for driver, parameters in drives:
            started = await vm.call_agent("start", driver=driver, parameters=parameters)
            _notice(f"test driver {driver!r} runs as job {started['job']}")
            jobs.append((driver, int(started["job"])))
        await asyncio.gather(*(_follow(vm, driver, job) for driver, job in jobs))
    except VmbusError as error:
        if not vm.ended:  # else it is what everybody waits for, and told by whoever ended the VM
            _notice(str(error))


async def _follow(vm: VirtualMachine, driver: str, job: int) -> None:
    reverted = False
    while True:
        try:
            report = await vm.call_agent("wait", timeout=90.0, job=job)
        except GuestWentBack:
            reverted = True  # perhaps it runs at that moment, too
            continue
        except AgentError as error:
            if error.code == "timeout":
                continue
            if reverted and error.code == "unknown-job":
                _notice(f"test driver {driver!r} (job {job}) is undone: it was started after the checkpoint")
                return
            raise
        if report.get("state") != "running":
            _notice(f"test driver {driver!r} (job {job}) {outcome(report)}")
            return
        if report.get("silent", 0) >= _SILENT_AFTER:
            _notice(
                f"test driver {driver!r} (job {job}) has reported nothing for {report['silent']:g} s: does it hang?"
            )


def _notice(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone, and the VM is none the worse for it
        console.print(Text.assemble("\n", ("vmbus:", "bold"), f" {spelled(text)}"), soft_wrap=True)
