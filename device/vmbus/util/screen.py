"""Consoles on which a text is what it is.

Rich takes brackets for markup and words between colons for pictures; what we show are paths, names and messages of
users, guests and programs. So none of our consoles does that, and what is to have a style says so as a
`rich.text.Text`.
"""

from __future__ import annotations

from rich.console import Console


def screen(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console on standard output, or standard error; `width` in columns, None: the terminal's."""
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)
