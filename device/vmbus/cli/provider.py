"""The command that gives commands to a provider of a running VM."""

from __future__ import annotations

import json

import click

from vmbus.cli.agent import parse_parameters
from vmbus.cli.asking import ask, find_vm
from vmbus.cli.completion import providers, vm_option
from vmbus.cli.results import always_json
from vmbus.cli.terminal import run


@click.command()
@click.argument("provider", shell_complete=providers)
@click.argument("command")
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]...")
@vm_option
@click.option("--timeout", default=15.0, show_default=True, help="Seconds to wait for the answer.")
@always_json
def provider(provider: str, command: str, words: tuple[str, ...], name: str | None, timeout: float) -> None:
    """Give PROVIDER (its name in the VM's description) of a running VM a COMMAND of its own.

    \b
    provider services heartbeat                     is the guest alive?
    provider services kvp-set key=role value=web    tell the guest's programs something
    provider services kvp-list pool=auto            what the guest tells about itself
    provider services shutdown                      ask it to power off
    """
    request = {
        "provider": provider,
        "command": command,
        "arguments": parse_parameters(words),
        "seconds": timeout,
    }
    click.echo(json.dumps(run(ask(find_vm(name), "provider", request, timeout=timeout + 5)), indent=2))
