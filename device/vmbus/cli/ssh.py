"""The command that logs in to a guest with a Debian."""

from __future__ import annotations

import os
import shutil
import sys

import click

from vmbus.cli.asking import find_vm
from vmbus.cli.completion import vm_option
from vmbus.cli.terminal import run
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.server.control import ControlClient
from vmbus.vm.guest_socket import proxy_command
from vmbus.vm.run_directory import runtime_base
from vmbus.vm.sockets import Sockets

PORT = 22
STATUS_TIMEOUT = 15.0


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@vm_option
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[SSH OPTION]... [COMMAND]")
def ssh(name: str | None, words: tuple[str, ...]) -> None:
    """Log in to a running VM's Debian as root, or run a COMMAND there.

    The connection goes through the VM's `vsock` provider: no network is needed. What else ssh can do works too, such as
    `-L 8080:localhost:80`.
    """
    name = find_vm(name)
    program = shutil.which("ssh")
    if program is None:
        raise EnvironmentProblem("there is no ssh; run: sudo apt-get install -y openssh-client")
    sockets = run(_sockets(name))
    if not sockets:
        raise UsageError(f"VM {name!r} has no provider of the kind vsock, so there is no way to its ssh")
    # ssh takes options behind the name, too.
    os.execv(program, [program, *proxy_command(sys.executable, sockets[0], PORT), "root@guest", *words])


async def _sockets(name: str) -> list[str]:
    found = []
    for path in Sockets(runtime_base() / name).controls:
        control = ControlClient(path)
        try:
            status = await control.call("status", timeout=STATUS_TIMEOUT)
        finally:
            control.close()
        found += [str(one["socket"]) for one in status["providers"].values() if "socket" in one]
    return found
