"""The command that makes the host's ends of a VM's cards ahead: the only thing about a VM that wants privileges."""

from __future__ import annotations

import os
import pwd
from uuid import UUID

import click
import msgspec

from vmbus.cli.completion import descriptions
from vmbus.cli.results import json_option, print_result
from vmbus.errors import UsageError
from vmbus.providers.network import NetworkProvider
from vmbus.providers.network.card import CardOptions, host_settings
from vmbus.providers.network.interface import Settings, prepare, remove
from vmbus.vm.description import VmDescription, named_description


@click.command()
@click.argument("config", shell_complete=descriptions)
@click.option("--user", help="Who starts the VM (default: who called sudo, or you).")
@click.option("--remove", "away", is_flag=True, help="Take the interfaces away again.")
@json_option
def network(config: str, user: str | None, away: bool, as_json: bool) -> None:
    """Make the host's interfaces for the cards of CONFIG, so that the VM itself needs no rights.

    CONFIG is a VM description: a name in qemu_configs/ or a path to a .toml file. What is made stays until --remove,
    or until this machine is started anew, and only that user can take it.

    \b
    sudo scripts/network debian-network
    scripts/run-vm debian-network
    """
    wanted = interfaces(named_description(config))
    if not wanted:
        raise UsageError(f"{config} describes no card, so there is nothing to be made")
    owner = user_id(user)
    lines = []
    for settings in wanted:
        if away:
            remove(settings)
            lines.append(f"{settings.name} is gone")
        else:
            prepare(settings, owner)
            lines.append(f"{settings.name} is there for user {pwd.getpwuid(owner).pw_name}")
    names = [settings.name for settings in wanted]
    print_result({"interfaces": names, "there": not away, "user": owner}, as_json, "\n".join(lines))


def interfaces(description: VmDescription) -> list[Settings]:
    """The host's interfaces that the VM's cards want. Raises UsageError for one that nobody can make ahead."""
    found = []
    for provider in (one for device in description.all_devices for one in device.providers):
        if provider.kind != NetworkProvider.kind:
            continue
        options = msgspec.convert(provider.options, CardOptions)
        if options.end != "tap" or options.namespace is not None:
            raise UsageError(
                f"card {provider.name!r}: only an interface with end = 'tap', and without a namespace, can be made "
                "ahead: the others want rights each time"
            )
        found.append(host_settings(options, UUID(str(provider.instance))))
    return found


def user_id(name: str | None) -> int:
    """Whose the interfaces shall be. Raises UsageError."""
    if name is None:
        return int(os.environ.get("SUDO_UID", os.getuid()))
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise UsageError(f"this machine has no user {name!r}") from None
