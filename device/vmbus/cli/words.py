"""The words of a command line as they were typed, for a command that starts itself once more or has to guess; and those
that a shell asks about (see `vmbus.cli.completion`)."""

from __future__ import annotations

import re
from collections.abc import MutableMapping, Sequence

import click

WORDS = "vmbus.words"
"""Where the group of all commands keeps them, in its context."""
VARIABLE = "_VMBUS_COMPLETE"
PROGRAM = "vmbus"


def words_of(context: click.Context) -> list[str]:
    """All words, the command's name first; none if it was not called through the group."""
    return list(context.meta.get(WORDS, ()))


def from_a_script(environment: MutableMapping[str, str], arguments: Sequence[str]) -> None:
    """Makes a line about a script one about `vmbus`: a script is called with its command's name."""
    instruction = environment.get(VARIABLE, "")
    if not instruction.endswith("_complete") or not arguments:
        return
    _, *rest = re.split(r"\s", environment.get("COMP_WORDS", ""), maxsplit=1)
    environment["COMP_WORDS"] = " ".join([PROGRAM, arguments[0], *rest])
    if not instruction.startswith("fish"):  # which gives the word itself
        environment["COMP_CWORD"] = str(int(environment.get("COMP_CWORD", "0")) + 1)
