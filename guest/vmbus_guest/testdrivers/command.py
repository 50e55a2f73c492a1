"""Test driver `command`: a program of the guest's, run again and again; each run has to end with status 0. No device.

Parameters:

    argv        the program and its arguments
    count       runs in all; 0: until it is stopped
    pace        seconds between two runs
    run_seconds how long a run may take

What the program uses is its own affair: a file, an interface, a device of Linux's. When the driver is stopped, the run
that is under way comes to its end.
"""

from __future__ import annotations

import os
import select
import time
from typing import Any

from vmbus.errors import UsageError
from vmbus_guest.programs import Program
from vmbus_guest.testdrivers.context import Context

_LOOK = 0.25  # seconds between two looks whether it is to stop
_END = 500  # characters of a failed run's output that are told


def run(context: Context) -> dict[str, Any]:
    """Run it; the verdict is "passed" if every run has ended with status 0, and there was one."""
    parameters = context.parameters
    argv = parameters.texts("argv")
    count = parameters.get("count", 0, minimum=0)
    pace = parameters.get("pace", 0.0, minimum=0.0, maximum=3600.0)
    run_seconds = parameters.get("run_seconds", 60.0, minimum=0.1)
    parameters.check()
    began = time.monotonic()
    completed = 0
    trouble: list[str] = []
    while not trouble and not context.stop_requested and not 0 < count <= completed:
        report = _once(context, argv, run_seconds, completed)
        if report["expired"]:
            trouble.append(f"run {completed}: {argv[0]} has not ended in {run_seconds:g} s")
        elif report["code"]:
            trouble.append(
                f"run {completed}: {argv[0]} ended with {report['code']}: {report['output'][-_END:].strip()}"
            )
        else:
            completed += 1
        _tell(context, completed)
        left = pace
        while left > 0 and not context.stop_requested:
            time.sleep(min(left, _LOOK))
            left -= _LOOK
            _tell(context, completed)
    return {
        "completed": completed,
        "seconds": round(time.monotonic() - began, 4),
        "trouble": trouble,
        "verdict": "passed" if completed and not trouble else "failed",
    }


def _once(context: Context, argv: list[str], seconds: float, completed: int) -> dict[str, Any]:
    """One run, as `Program.report` tells of it. Time is counted in small steps: the guest's clock may jump."""
    try:
        program = Program(0, argv, 0.0)
    except OSError as error:
        raise UsageError(f"cannot start {argv[0]!r}: {error.strerror}") from error
    try:
        poll = select.poll()
        poll.register(program.pidfd, select.POLLIN)
        left = seconds
        while not poll.poll(int(_LOOK * 1000)):
            program.read()
            _tell(context, completed)
            left -= _LOOK
            if left <= 0 and not program.expired:
                program.expire(0.0)
        program.read()
        _, status = os.waitpid(program.pid, 0)
        return program.report(status)
    finally:
        program.close()


def _tell(context: Context, completed: int) -> None:
    if context.progress_due:
        context.progress(completed=completed)
