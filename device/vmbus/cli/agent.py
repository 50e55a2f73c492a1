"""The command that talks to the agent in a running VM's guest."""

from __future__ import annotations

import json
from typing import Any

import click

from vmbus.cli.asking import ask, find_vm
from vmbus.cli.completion import vm_option
from vmbus.cli.results import always_json
from vmbus.cli.terminal import run
from vmbus.errors import UsageError

_WITH_DRIVER = ("run", "start")
_WITH_JOB = ("wait", "poll", "stop", "kill")


def parse_parameters(words: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Turns ``key=value`` words into a dictionary; a value that is JSON is taken as such, else as text.

    Raises `UsageError` for a word without ``=``.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"{word!r} is not of the form key=value")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def build_request(command: str, words: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of an agent command from the words of the command line. Raises `UsageError`."""
    if command in _WITH_DRIVER:
        if not words:
            raise UsageError(f"agent {command}: name a test driver (agent list shows them)")
        return {"driver": words[0], "parameters": parse_parameters(words[1:])}
    if command in _WITH_JOB:
        if not words or not words[0].isdigit():
            raise UsageError(f"agent {command}: give a job number (agent jobs shows them)")
        return {"job": int(words[0]), **parse_parameters(words[1:])}
    return parse_parameters(words)


@click.command()
@click.argument("command")
@click.argument("words", nargs=-1)
@vm_option
@click.option("--timeout", default=600.0, show_default=True, help="Seconds to wait for the answer.")
@always_json
def agent(command: str, words: tuple[str, ...], name: str | None, timeout: float) -> None:
    """Ask the agent in a running VM's guest.

    \b
    agent list                      which test drivers there are
    agent run DRIVER [KEY=VALUE...] run one to its end and show its report
    agent start DRIVER ...          start one and show its job number
    agent jobs | wait JOB | poll JOB | stop JOB | kill JOB
    agent poweroff
    """
    arguments = build_request(command, words)
    request = {"command": command, "arguments": arguments, "timeout": timeout}
    click.echo(json.dumps(run(ask(find_vm(name), "agent", request, timeout=timeout + 5)), indent=2))
