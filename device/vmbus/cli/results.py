"""What commands print: results on standard output, for people or (`--json`) as one document for programs; everything
else on standard error. An error is words there, and with `--json` a document, too. See docs/command-line.md."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import click
import msgspec
from rich.console import Console, RenderableType
from rich.table import Table

from vmbus.errors import VmbusError, code_of
from vmbus.util.screen import screen

F = TypeVar("F", bound=Callable[..., Any])

STANDARD_OUTPUT = "-"
"""As the FILE of an option."""
TO_STANDARD_OUTPUT = Path(STANDARD_OUTPUT)
_WIDE = 4000  # columns where there is no terminal: a line stays a line


class Failure(msgspec.Struct):
    """An error as programs have it."""

    message: str
    kind: str
    """See `vmbus.errors`; ``interrupted`` after Ctrl-C."""
    code: str
    """Why, where that makes a difference (`vmbus.errors.Code`); mostly empty."""
    status: int
    """The command's exit status."""

    @classmethod
    def of(cls, error: BaseException, status: int | None = None) -> Self:
        kind = error.kind if isinstance(error, VmbusError) else VmbusError.kind
        found = error.status if isinstance(error, VmbusError) else VmbusError.status
        return cls(str(error), kind, code_of(error), found if status is None else status)


def json_option(command: F) -> F:
    """The option `--json`, as the command's parameter `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON (docs/command-line.md).")(
        command
    )


def always_json(command: F) -> F:
    """The same, of a command that prints nothing but JSON: so it is asked for in the same way everywhere."""
    return click.option("--json", is_flag=True, expose_value=False, help="Does nothing: the result always is JSON.")(
        command
    )


def file_option(help_: str) -> Callable[[F], F]:
    """The option ``--json [FILE]``, as the command's parameter `json_file`: standard output, without a FILE."""
    return click.option(
        "--json",
        "json_file",
        metavar="[FILE]",
        is_flag=False,
        flag_value=STANDARD_OUTPUT,
        type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
        help=help_,
    )


def print_json(document: Any) -> None:
    """The one document of a command."""
    click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2))


def paper() -> Console:
    """Where results for people go."""
    console = screen()
    return console if console.is_terminal else screen(width=_WIDE)


def print_result(document: Any, as_json: bool, shown: RenderableType) -> None:
    """A result, as a program or a person wants it."""
    if as_json:
        print_json(document)
    elif isinstance(shown, str):
        click.echo(shown)
    else:
        paper().print(shown)


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """A table of names and values."""
    table = Table(show_header=False, box=None)
    for name, value in rows:
        table.add_row(name, value)
    return table


def print_failure(failure: Failure, as_json: bool, lead: str = "error: ") -> None:
    """Says what failed, on standard error, and as a document where one is expected."""
    with contextlib.suppress(OSError):  # the terminal is gone: that is no other failure
        click.echo(f"{lead}{failure.message}", err=True)
    if as_json:
        print_json({"error": failure})


class WithDefault(click.Group):
    """A group of commands of which one may go unnamed."""


def wants_json(command: click.Command, words: Sequence[str]) -> bool:
    """Whether these words ask the command for a document on standard output. They need not be right otherwise."""
    words = words[: words.index("--")] if "--" in words else words
    while isinstance(command, click.Group):
        at = next((number for number, word in enumerate(words) if word in command.commands), None)
        if at is None:
            return "--json" in words and isinstance(command, WithDefault)
        command, words = command.commands[words[at]], words[at + 1 :]
    option = next((one for one in command.params if "--json" in one.opts), None)
    if not isinstance(option, click.Option) or "--json" not in words:
        return False
    value = words[words.index("--json") + 1 :][:1]
    return option.is_flag or not value or value[0].startswith("-")
