"""The words of a command line as they were typed, for a command that starts itself once more or has to guess."""

from __future__ import annotations

import click

WORDS = "vmbus.words"
"""Where the group of all commands keeps them, in its context."""


def words_of(context: click.Context) -> list[str]:
    """All words, the command's name first; none if it was not called through the group."""
    return list(context.meta.get(WORDS, ()))
