"""The command line: ``python -m vmbus.cli COMMAND``, or ``vmbus COMMAND`` where the package is installed; each script
in ``scripts/`` is one of its commands.

Every error that we raise on purpose becomes one readable message and the exit status of its kind, without a traceback;
so does Ctrl-C, with 130.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from vmbus.cli.agent import agent
from vmbus.cli.attach import attach
from vmbus.cli.audit import audit
from vmbus.cli.bench import bench
from vmbus.cli.capture import capture
from vmbus.cli.certificates import certificates
from vmbus.cli.checkpoint import checkpoint, revert
from vmbus.cli.completion import completion, from_a_script
from vmbus.cli.demo import demo
from vmbus.cli.detach import this_owner
from vmbus.cli.examples import add_examples
from vmbus.cli.inspect import inspect
from vmbus.cli.migrate import migrate
from vmbus.cli.network import network
from vmbus.cli.new_provider import new_provider
from vmbus.cli.provider import provider
from vmbus.cli.results import Failure, print_failure, print_json, wants_json
from vmbus.cli.running import list_vms, show_console, stop
from vmbus.cli.save import save
from vmbus.cli.serve import main as serve
from vmbus.cli.soak import soak
from vmbus.cli.ssh import ssh
from vmbus.cli.versions import show
from vmbus.cli.vm import restore, run_vm
from vmbus.cli.words import WORDS, words_of
from vmbus.errors import UsageError, VmbusError
from vmbus.places import spelled
from vmbus.provision.__main__ import main as setup

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


class _Group(click.Group):
    def main(self, *args: Any, **extra: Any) -> Any:
        _open_standard_files()
        from_a_script(os.environ, sys.argv[1:])
        return super().main(*args, **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[WORDS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        as_json = wants_json(self, words_of(ctx))
        try:
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


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
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


main.add_command(bench)
main.add_command(demo)
main.add_command(run_vm)
main.add_command(save)
main.add_command(restore)
main.add_command(migrate)
main.add_command(certificates)
main.add_command(checkpoint)
main.add_command(revert)
main.add_command(list_vms)
main.add_command(show_console)
main.add_command(stop)
main.add_command(agent)
main.add_command(audit)
main.add_command(inspect)
main.add_command(capture)
main.add_command(completion)
main.add_command(network)
main.add_command(new_provider)
main.add_command(provider)
main.add_command(serve, "serve")
main.add_command(attach)
main.add_command(soak)
main.add_command(ssh)
main.add_command(setup, "setup")

add_examples(main)
for _command in main.commands.values():
    _command.help = spelled(_command.help or "")
    for _option in _command.params:
        if isinstance(_option, click.Option):
            _option.help = spelled(_option.help or "")
