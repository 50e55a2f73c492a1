"""Programs that the set-up runs. Standard library only: its first stage imports this."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from vmbus.errors import EnvironmentProblem, VmbusError, WaitTimeout, code_in
from vmbus.util.launcher import tied


class ProgramFailed(VmbusError):
    """apt, dpkg, pip or the like failed; the message ends with what it said."""


def run_lines(
    argv: Sequence[str | Path],
    what: str,
    timeout: float,
    on_line: Callable[[str], None] | None = None,
    cwd: Path | None = None,
    **more: str,
) -> list[str]:
    """Run a program and return the lines it printed (standard output and error), telling `on_line` of each at once.
    `more` is added to its environment.

    Raises ProgramFailed if it fails, WaitTimeout if it is still running after `timeout` seconds (it is killed then).
    """
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **more}
    process = subprocess.Popen(
        tied([str(part) for part in argv]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=cwd,
        text=True,
        errors="replace",
        process_group=0,  # some of these programs (ensurepip, apt) start others, which have to end with them
    )
    expired = threading.Event()

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def expire() -> None:
        expired.set()
        kill()

    timer = threading.Timer(timeout, expire)
    timer.daemon = True
    timer.start()
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if on_line is not None:
                on_line(lines[-1])
        status = process.wait()
    except BaseException:
        kill()
        process.wait()
        raise
    finally:
        timer.cancel()
        if process.stdout is not None:
            process.stdout.close()
    if expired.is_set():
        raise WaitTimeout(what, timeout)
    if status != 0:
        tail = "\n  ".join([line for line in lines if line.strip()][-8:])
        raise ProgramFailed(f"{what} failed with status {status}:\n  {tail}", code=code_in(tail))
    return lines


def ask(argv: Sequence[str], name: str, timeout: float, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever that is; `more` is added to its environment. Raises EnvironmentProblem, which
    calls it `name`, if it cannot be started, or has not ended after `timeout` seconds."""
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env={**os.environ, **more},
        )
    except OSError as error:
        raise EnvironmentProblem(f"{name} cannot be started: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise EnvironmentProblem(f"{name} did not answer within {timeout:g} s") from error


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The end of what a program has said."""
    return (done.stderr or done.stdout).strip()[-500:]


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """Why a program has failed: the last line that it has complained with."""
    return (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
