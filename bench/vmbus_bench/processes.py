"""Processes under measurement."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import select
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import vmbus
from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.errors import EnvironmentProblem, WaitTimeout
from vmbus.providers.loading import PATH_VARIABLE
from vmbus.server.control import ControlClient
from vmbus.util.launcher import tied

MEASUREMENTS = str(Path(__file__).resolve().parent.parent)
IMPORT_ROOT = str(Path(vmbus.__file__).resolve().parent.parent)
START_TIMEOUT = 20.0


def cpu_seconds(pid: int) -> float:
    """CPU time that all threads of another process have used, in seconds. Raises EnvironmentProblem if it is gone."""
    # Linux makes a process's clock id from its complemented number (what clock_getcpuclockid() returns).
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError as error:
        raise EnvironmentProblem(f"no CPU time of process {pid}: {error.strerror}; it has ended") from error


def describe_machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = "unknown"
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    return {
        "processor": model,
        "processors": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "project": vmbus.__version__,
    }


def describe_own(kind: str, name: str) -> DeviceDescription:
    """A device with one provider, which may be one of the benchmark's own (`package.module:Class`)."""
    instance = str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name}.bench.test"))
    return DeviceDescription(name="vmbus0", providers=[ProviderDescription(kind=kind, name=name, instance=instance)])


def spawn(arguments: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a program that cannot outlive us. Call it from the main thread."""
    return subprocess.Popen(tied(arguments), **options)


class ServerProcess:
    """A device server in a process of its own; a context manager.

    Attributes: `pid`, `socket_path` (vfio-user), `directory` (its own, removed at the end).
    """

    def __init__(
        self,
        description: DeviceDescription,
        library: Path,
        *,
        restore: Path | None = None,
        audit: Path | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Returns when it listens. `settings`: further environment variables.

        Raises EnvironmentProblem with what it printed, or WaitTimeout."""
        with contextlib.ExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmbus-bench-")))
            self.socket_path = self.directory / "vfio.sock"
            file = self.directory / "device.json"
            file.write_bytes(description.to_json())
            control = self.directory / "control.sock"
            arguments = [sys.executable, "-m", "vmbus.cli.serve", str(file), "--libvfio-user", str(library)]
            arguments += ["--socket", str(self.socket_path), "--control", str(control)]
            if restore is not None:
                arguments += ["--restore", str(restore)]
            if audit is not None:
                arguments += ["--audit", str(audit)]
            log = stack.enter_context((self.directory / "server.log").open("w+b"))
            self._process = spawn(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={
                    **os.environ,
                    "PYTHONPATH": IMPORT_ROOT,
                    PATH_VARIABLE: MEASUREMENTS,
                    **(settings or {}),
                },
            )
            stack.callback(self._end)
            self.pid = self._process.pid
            assert self._process.stdout is not None
            ready, _, _ = select.select([self._process.stdout], [], [], START_TIMEOUT)
            line = self._process.stdout.readline() if ready else b""
            if not line:
                log.seek(0)
                said = log.read().decode(errors="replace").strip()
                if not ready:
                    raise WaitTimeout(f"the device server to listen ({said})", START_TIMEOUT)
                raise EnvironmentProblem(f"the device server ended before it listened: {said}")
            assert json.loads(line)["event"] == "listening"
            self._runner = stack.enter_context(asyncio.Runner())
            self._control = ControlClient(control)
            stack.callback(self._control.close)
            self._cleanup = stack.pop_all()

    def call(self, command: str, /, timeout: float = 60.0, **arguments: Any) -> dict[str, Any]:
        return self._runner.run(self._control.call(command, timeout=timeout, **arguments))

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10.0)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()
