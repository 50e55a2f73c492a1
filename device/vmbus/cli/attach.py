"""The command that makes a VM ours to operate whose QEMU somebody else started."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click
from rich.text import Text

from vmbus.cli.migrate import Receiving, Reception, receiving_options
from vmbus.cli.supervisor import Supervisor
from vmbus.cli.terminal import RECEIVE_LABELS, RESTORE_LABELS, Steps, console, run
from vmbus.errors import UsageError
from vmbus.operations.attach import AttachedMachine, Attachment, attach_received, attach_restored
from vmbus.operations.attach import attach as attach_running
from vmbus.operations.migration.listener import listen
from vmbus.places import command, spelled
from vmbus.util.explaining import check_name

_SOCKET = click.Path(path_type=Path, dir_okay=False)
_ATTACH_LABELS = {
    "verify": "QEMU and device server looked at: they fit, and belong together",
    "qemu": "QEMU's monitor",
    "server": "device server",
}


@click.command()
@click.option("--qmp", type=_SOCKET, required=True, help="A QMP socket of QEMU's that nobody else uses.")
@click.option(
    "--control",
    "controls",
    type=_SOCKET,
    multiple=True,
    help="The device server's control socket; one for each device. Default: where scripts/serve puts it.",
)
@click.option(
    "--agent", type=_SOCKET, help="The socket of the agent's port, if there is an agent of ours in the guest."
)
@click.option("--name", help="What the VM is called for other commands. Default: QEMU's own name, or 'attached'.")
@click.option(
    "--restore",
    "snapshot",
    type=click.Path(path_type=Path, file_okay=False),
    help="Put this snapshot into a QEMU that was started with -S -incoming defer; the server awaits a state.",
)
@receiving_options
@click.option(
    "--resume",
    is_flag=True,
    help="Set a VM running first that an operation has left standing when it was killed. It must not run elsewhere.",
)
def attach(
    qmp: Path,
    controls: tuple[Path, ...],
    agent: Path | None,
    name: str | None,
    snapshot: Path | None,
    receiving: Receiving,
    resume: bool,
) -> None:
    """Operate a VM whose QEMU and device server somebody else started, until this ends; QEMU runs on.

    While it runs, save, checkpoint, revert, migrate, inspect and the others know the VM by its NAME. What does not fit
    is said, and nothing is changed then. See docs/plugin.md.
    """
    if name is not None:
        check_name(name)
    if (snapshot is not None) + (receiving.address is not None) + resume > 1:
        raise UsageError("--restore, --receive and --resume do not go together")
    coming = receiving.reception()
    attachment = Attachment(qmp, controls, agent)
    if coming is not None:
        run(_receive(attachment, name, coming))
    elif snapshot is not None:
        run(_restore(attachment, name, snapshot))
    else:
        run(_attach(attachment, name, resume))


async def _attach(attachment: Attachment, name: str | None, resume: bool) -> None:
    with Steps(f"attach to {attachment.qmp}", _ATTACH_LABELS) as steps:
        vm = await attach_running(attachment, name, resume=resume, progress=steps)
    await _serve(vm, "is attached to")


async def _restore(attachment: Attachment, name: str | None, snapshot: Path) -> None:
    with Steps(f"restore of {snapshot} into the QEMU at {attachment.qmp}", RESTORE_LABELS) as steps:
        vm = await attach_restored(attachment, snapshot, name, progress=steps)
    await _serve(vm, "is back")


async def _receive(attachment: Attachment, name: str | None, wanted: Reception) -> None:
    listener = await listen(wanted.address, wanted.secret, wanted.tls)
    console.print(f"waiting for a VM at {listener.address}, for the QEMU at {attachment.qmp}")
    with Steps("arrival", RECEIVE_LABELS) as steps:
        vm = await attach_received(
            attachment, listener, name, progress=steps, stream_port=wanted.stream_port, accept=wanted.accept
        )
    await _serve(vm, "has arrived")


async def _serve(vm: AttachedMachine, what: str) -> None:
    """Serves others' requests until the VM ends, or this command does."""
    try:
        if vm.restored is not None:
            packets = vm.restored.packets
            _notice(
                f"{vm.restored.channels} channels, {packets['queued']} queued and {packets['sent']} sent packets in "
                f"flight{'; it is paused, as it was' if vm.restored.paused else ''}"
            )
        _notice(
            f"VM {vm.name!r} {what}: {command('save')} --vm {vm.name} DIR and the others work until this ends (Ctrl-C)"
        )
        reason = await Supervisor(vm, _notice).run()
    finally:
        await vm.leave()
    _notice(f"VM {vm.name!r}: {reason}")


def _notice(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone, and the VM is none the worse for it
        console.print(Text.assemble(("vmbus:", "bold"), f" {spelled(text)}"), soft_wrap=True)
