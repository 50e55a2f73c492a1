"""The project's commands as processes. They find its packages by PYTHONPATH, which tests/conftest.py sets."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from support import pace

COMMAND = (sys.executable, "-m", "vmbus.cli")


def spawn(*words: str, **more: Any) -> subprocess.Popen[str]:
    """A command that runs on; what it prints and complains of is its output."""
    usual = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*COMMAND, *words], **{**usual, **more})


def perform(*words: str, status: int = 0, seconds: float = 120.0) -> str:
    """A command to its end, which has to be that; what it has printed, and complained of."""
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=pace.seconds(seconds))
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def said_by(process: subprocess.Popen[str], seconds: float = 60.0) -> str:
    """What a command has said that has to end well now."""
    output, _ = process.communicate(timeout=pace.seconds(seconds))
    assert process.returncode == 0, output
    return output
