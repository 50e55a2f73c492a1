"""The command line (`vmbus.cli.commands`), and the processes that it starts, each of which imports no more than it
needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmbus.cli.commands import main

__all__ = ["main"]


def __getattr__(name: str) -> Any:
    if name != "main":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vmbus.cli.commands import main

    return main
