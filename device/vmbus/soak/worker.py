"""One episode as a process of its own: ``python -m vmbus.soak.worker FOLDER``.

FOLDER has the plan, ``plan.json``, and takes what is kept of a failure. Standard output carries JSON lines and nothing
else: ``{"kind": KIND, "record": RECORD}`` with KIND operation, event, sample, phase (RECORD is a text), and at last
episode. Exit status 0 if that one was written, whatever the verdict; 1 if no episode could begin: standard error says
why.

SIGTERM and SIGINT end the episode early, with the verdict "interrupted". Nothing that a worker starts outlives it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from vmbus.errors import VmbusError
from vmbus.soak.episode import run_episode
from vmbus.soak.plan import load_plan
from vmbus.soak.sink import LineSink, encoded

PLAN = "plan.json"


class _Output(LineSink):
    """Writes JSON lines. When nobody reads them any more, the episode ends early."""

    def __init__(self, descriptor: int, stop: asyncio.Event) -> None:
        self._descriptor = descriptor
        self._stop = stop

    def line(self, kind: str, record: object) -> None:
        """One line, whole."""
        data = memoryview(encoded(kind, record) + b"\n")
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except BrokenPipeError:
            self._stop.set()


async def work(folder: Path, output: int) -> None:
    """Run the episode in `folder`, and write its lines to a descriptor. Raises VmbusError if it could not begin."""
    plan = load_plan(folder / PLAN)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    sink = _Output(output, stop)
    sink.line("episode", await run_episode(plan, folder, sink, stop=stop))


def main(arguments: list[str]) -> int:
    """See the module's text."""
    if len(arguments) != 1:
        print("usage: python -m vmbus.soak.worker FOLDER", file=sys.stderr)
        return 2
    # Whatever prints goes to standard error from now on.
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        asyncio.run(work(Path(arguments[0]), output))
    except (VmbusError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
