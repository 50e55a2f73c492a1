"""The command line: ``python -m vmbus.cli COMMAND``, or ``vmbus COMMAND`` where the package is installed; each script
in ``scripts/`` is one of its commands.

Every error that we raise on purpose becomes one readable message and the exit status of its kind, without a traceback;
so does Ctrl-C, with 130.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections import UserDict
from typing import Any

import click

from vmbus.cli.detach import this_owner
from vmbus.cli.examples import add_examples
from vmbus.cli.results import Failure, print_failure, print_json, wants_json
from vmbus.cli.versions import show
from vmbus.cli.words import WORDS, from_a_script, words_of
from vmbus.errors import UsageError, VmbusError
from vmbus.places import spelled

COMMANDS = {
    "agent": "vmbus.cli.agent:agent",
    "attach": "vmbus.cli.attach:attach",
    "audit": "vmbus.cli.audit:audit",
    "bench": "vmbus.cli.bench:bench",
    "capture": "vmbus.cli.capture:capture",
    "certificates": "vmbus.cli.certificates:certificates",
    "checkpoint": "vmbus.cli.checkpoint:checkpoint",
    "completion": "vmbus.cli.completion:completion",
    "console": "vmbus.cli.running:show_console",
    "demo": "vmbus.cli.demo:demo",
    "inspect": "vmbus.cli.inspect:inspect",
    "list": "vmbus.cli.running:list_vms",
    "migrate": "vmbus.cli.migrate:migrate",
    "network": "vmbus.cli.network:network",
    "new-provider": "vmbus.cli.new_provider:new_provider",
    "provider": "vmbus.cli.provider:provider",
    "restore": "vmbus.cli.vm:restore",
    "revert": "vmbus.cli.checkpoint:revert",
    "run-vm": "vmbus.cli.vm:run_vm",
    "save": "vmbus.cli.save:save",
    "serve": "vmbus.cli.serve:main",
    "setup": "vmbus.provision.__main__:main",
    "soak": "vmbus.cli.soak:soak",
    "ssh": "vmbus.cli.ssh:ssh",
    "stop": "vmbus.cli.running:stop",
}
"""Where each one is. It is loaded when it is called, or asked for its help: all of them take half a second."""

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it."""


def _open_standard_files() -> None:
    """Opens standard input, output and error where they are closed: else whatever is opened next would be one."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - as long as the process


class _Commands(UserDict[str, Any]):
    """The commands by name; each is a reference until it is wanted."""

    def __getitem__(self, name: str) -> click.Command:
        found = super().__getitem__(name)
        if isinstance(found, str):
            module, _, attribute = found.partition(":")
            found = self.data[name] = _finished(name, getattr(importlib.import_module(module), attribute))
        assert isinstance(found, click.Command)
        return found


def _finished(name: str, command: click.Command) -> click.Command:
    """With the examples of its help, and the names of our commands as they are called here."""
    add_examples(command, name)
    command.help = spelled(command.help or "")
    for option in command.params:
        if isinstance(option, click.Option):
            option.help = spelled(option.help or "")
    return command


class _Group(click.Group):
    def main(self, *args: Any, **extra: Any) -> Any:
        _open_standard_files()
        from_a_script(os.environ, sys.argv[1:])
        return super().main(*args, **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[WORDS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        as_json = False
        try:
            as_json = wants_json(self, words_of(ctx))
            return super().invoke(ctx)
        except VmbusError as error:
            if (owner := this_owner()) is not None and owner.awaited:
                owner.failed(error)  # whoever started us says it
            else:
                print_failure(Failure.of(error), as_json)
            ctx.exit(error.status)
        except click.ClickException as error:
            if as_json:
                kind = UsageError.kind if isinstance(error, click.UsageError) else VmbusError.kind
                print_json({"error": Failure(error.format_message(), kind, "", error.exit_code)})
            raise
        except (KeyboardInterrupt, click.Abort):
            if (owner := this_owner()) is None or not owner.awaited:
                print_failure(Failure("interrupted", "interrupted", "", INTERRUPTED), as_json, lead="")
            ctx.exit(INTERRUPTED)


@click.group(cls=_Group, commands=_Commands(COMMANDS), context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    *("--version", "-V"),
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show,
    help="Versions of all formats.",
)
def main() -> None:
    """VMBus-like synthetic devices for Linux guests in stock QEMU."""
