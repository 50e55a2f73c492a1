"""A named network namespace for a test, and programs that run in it.

Its name says who owns it; what an owner that was killed left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from vmbus.errors import EnvironmentProblem
from vmbus.providers.network.interface import NAMESPACES, in_namespace
from vmbus.util.launcher import tied

CHECKOUT = Path(__file__).resolve().parents[2]
PREFIX = "vmbus-test-"
TUN = Path("/dev/net/tun")

_LAUNCHER = """
import ctypes, os, runpy, sys
libc = ctypes.CDLL(None, use_errno=True)
descriptor = os.open(sys.argv[1], os.O_RDONLY)
if libc.setns(descriptor, 0x40000000):
    sys.exit(os.strerror(ctypes.get_errno()))
os.close(descriptor)
module = sys.argv[2]
sys.argv = [module, *sys.argv[3:]]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
"""Joins the namespace argv[1] and runs the module argv[2] with the other arguments."""


class NotPermitted(Exception):
    """This machine does not let us make network namespaces, or interfaces in them."""


def _started(pid: int) -> str:
    """When a process was started, in the kernel's ticks; "" if there is none."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(") ", 1)[1].split()[19]
    except OSError:
        return ""


def remove_stale() -> None:
    """Remove the namespaces of owners that are no more."""
    from pyroute2 import netns  # type: ignore[import-untyped]

    for path in NAMESPACES.glob(f"{PREFIX}*"):
        parts = path.name[len(PREFIX) :].split("-")
        if len(parts) == 3 and parts[0].isdigit() and _started(int(parts[0])) != parts[1]:
            with contextlib.suppress(OSError):
                netns.remove(path.name)


class Namespace:
    """One namespace. `name` is what the provider's option `namespace` takes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.programs: list[Program] = []

    def start(self, driver: str, **parameters: Any) -> Program:
        """A test driver of the guest's, here."""
        program = Program(self, driver, parameters)
        self.programs.append(program)
        return program

    def serve_files(self, directory: Path, port: int) -> subprocess.Popen[bytes]:
        """A web server for a directory, here; the caller ends it."""
        arguments = [str(port), "--bind", "0.0.0.0", "--directory", str(directory)]
        return subprocess.Popen(
            tied([sys.executable, "-c", _LAUNCHER, str(NAMESPACES / self.name), "http.server", *arguments]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def interfaces(self) -> list[str]:
        """Names of what is in it, `lo` excepted."""

        def work() -> list[str]:
            from pyroute2 import IPRoute

            with IPRoute() as netlink:
                return sorted(str(link.get_attr("IFLA_IFNAME")) for link in netlink.get_links())

        return [name for name in in_namespace(self.name, work) if name != "lo"]

    def configure(self, work: Any) -> Any:
        """`work(IPRoute)` in it."""

        def run() -> Any:
            from pyroute2 import IPRoute

            with IPRoute() as netlink:
                return work(netlink)

        return in_namespace(self.name, run)


class Program:
    """A test driver that runs in a namespace."""

    def __init__(self, namespace: Namespace, driver: str, parameters: Mapping[str, Any]) -> None:
        arguments = [str(NAMESPACES / namespace.name), "vmbus_guest.testdrivers", driver]
        arguments += ["--parameters", json.dumps(parameters)]
        self.process = subprocess.Popen(
            tied([sys.executable, "-c", _LAUNCHER, *arguments]),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._lines = b""
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)

    def progress(self) -> dict[str, Any]:
        """The last report so far; {} before the first."""
        assert self.process.stdout is not None
        self._lines += self.process.stdout.read() or b""
        *lines, self._lines = self._lines.split(b"\n")
        for line in reversed(lines):
            report = json.loads(line)
            if report["event"] == "progress":
                self._last = report
                break
        return getattr(self, "_last", {})

    def stop(self) -> None:
        """Ask it to end early."""
        self.process.terminate()

    def result(self, timeout: float = 60.0) -> dict[str, Any]:
        """Wait for its end; what it found."""
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), True)
        output, errors = self.process.communicate(timeout=timeout)
        lines = [json.loads(line) for line in (self._lines + output).split(b"\n") if line]
        results = [line["result"] for line in lines if line["event"] == "result"]
        assert results, (lines[-1:], errors.decode()[-2000:])
        return dict(results[0])

    def end(self) -> None:
        """Whatever it does."""
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    """A namespace for a test. Raises NotPermitted with the reason."""
    from pyroute2 import netns

    if not os.access(TUN, os.R_OK | os.W_OK):
        raise NotPermitted(f"TAP interfaces need {TUN}, readable and writable")
    remove_stale()
    name = f"{PREFIX}{os.getpid()}-{_started(os.getpid())}-{os.urandom(2).hex()}"
    try:
        netns.create(name)
    except OSError as error:
        with contextlib.suppress(OSError):
            (NAMESPACES / name).unlink()
        raise NotPermitted(f"a named network namespace needs root's rights: {error.strerror}") from error
    found = Namespace(name)
    try:
        try:
            found.configure(lambda netlink: netlink.link("set", index=1, state="up"))
        except (EnvironmentProblem, OSError) as error:
            raise NotPermitted(f"network namespaces cannot be entered: {error}") from error
        yield found
    finally:
        for program in found.programs:
            program.end()
        netns.remove(name)


@pytest.fixture
def outside() -> Iterator[Namespace]:
    """The host's side."""
    try:
        with namespace() as found:
            yield found
    except NotPermitted as error:
        pytest.skip(str(error))
