"""A VM that outlives its terminal, and what terminals do to one that does not; all with the real commands on a real
terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import pace
from support.owners import held_by_a_terminal, until
from support.owners import nothing_runs_on as nothing_runs_on
from support.processes import command_lines
from vmbus.cli.running import status_of
from vmbus.qemu.ends import GuestPanicked
from vmbus.util.directories import state_directory
from vmbus.vm.run_directory import running_vms, runtime_base
from vmbus.vm.sockets import Sockets

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("nothing_runs_on")]

CHECKOUT = Path(__file__).resolve().parents[2]


def words(*line: str) -> list[str]:
    return [sys.executable, "-m", "vmbus", *line]


def vmbus_command(*line: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words(*line), capture_output=True, text=True, timeout=pace.seconds(120))
    assert done.returncode == status, (line, done)
    return done


class Terminal:
    """A terminal with a login's shell: closing it is a hang-up for what runs in its foreground."""

    def __init__(self, *line: str) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.execv(line[0], list(line))
        self.shown = b""
        self.status: int | None = None

    def expect(self, text: bytes, seconds: float = 60.0) -> bytes:
        """What is shown up to there. A guest's shell echoes what is typed: expect what that does not contain."""
        deadline = time.monotonic() + pace.seconds(seconds)
        os.set_blocking(self.master, False)
        while text not in self.shown:
            assert time.monotonic() < deadline, (text, self.shown)
            with contextlib.suppress(BlockingIOError):
                try:
                    data = os.read(self.master, 65536)
                except OSError as error:
                    if isinstance(error, BlockingIOError):
                        raise
                    data = b""
                assert data, (text, self.shown)
                self.shown += data
                continue
            time.sleep(0.01)
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def prompt(self) -> None:
        """Waits for the guest's shell, which answers what it has worked out."""
        for attempt in range(100):
            self.type(b"echo ready-$((%d+7))\r" % attempt)
            with contextlib.suppress(AssertionError):
                self.expect(b"ready-%d\r" % (attempt + 7), 1 / pace.seconds(1))
                return
        raise AssertionError(self.shown)

    def ends(self, seconds: float = 30.0) -> int:
        """Its exit status, as a shell has it."""

        def over() -> bool:
            with contextlib.suppress(OSError):
                os.read(self.master, 65536)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            return bool(pid)

        with contextlib.suppress(OSError):
            os.set_blocking(self.master, False)
        until(over, f"{self.pid} to end", seconds)
        assert self.status is not None
        return self.status

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.master)
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextlib.contextmanager
def terminal(*line: str) -> Iterator[Terminal]:
    one = Terminal(*line)
    try:
        yield one
    finally:
        one.close()


def listed() -> list[dict[str, Any]]:
    return [
        {"name": name, "state": one.state, "pid": one.pid, "detached": one.detached, "log": one.log}
        for name in running_vms()
        for one in [asyncio.run(status_of(name))]
    ]


def log() -> str:
    return (state_directory() / "logs" / "demo.log").read_text()


async def qmp(command: str) -> None:
    reader, writer = await asyncio.open_unix_connection(str(Sockets(runtime_base() / "demo").qmp_tools))
    try:
        for one in ("qmp_capabilities", command):
            await reader.readline()
            writer.write(json.dumps({"execute": one}).encode() + b"\n")
        await reader.readline()
    finally:
        writer.close()


def of_the_vm() -> list[str]:
    return [line for line in command_lines().values() if str(runtime_base() / "demo") in line]


def test_a_detached_vm_outlives_its_terminal(tmp_path: Path) -> None:
    """Started on a terminal that is closed then; looked at by two, paused, saved, and brought back paused."""
    begun, snapshot = time.monotonic(), tmp_path / "snapshot"
    with terminal(
        "/bin/sh", "-c", 'exec 3>&1; "$@"; echo "status $?"; read gone', "sh", *words("run-vm", "--detach")
    ) as login:
        login.expect(b"VM 'demo' runs detached")
        login.expect(b"status 0")
        login.close()  # the shell, and all that belongs to the terminal, gets a SIGHUP
    (one,) = listed()
    assert (one["name"], one["state"], one["detached"]) == ("demo", "running", True)
    assert held_by_a_terminal(one["pid"]) == []
    with terminal(*words("console")) as first, terminal(*words("console", "demo", "--read-only")) as second:
        first.prompt()
        second.expect(b"ready-")
        second.type(b"echo not-$((1+1))\r")
        first.type(b"echo seen-$((6*7))\r")
        first.expect(b"seen-42\r")
        second.expect(b"seen-42\r")
        for viewer in (first, second):
            viewer.type(b"\x1dq")
            viewer.expect(b"left the console of VM 'demo'")
            assert viewer.ends() == 0
        assert b"not-2" not in first.shown + second.shown
    until(lambda: "the guest's agent is up" in log(), "the owner's notice")
    assert "error" not in log()
    asyncio.run(qmp("stop"))
    assert [each["state"] for each in listed()] == ["paused"]
    refused = vmbus_command("stop", status=2)
    assert "is paused: its guest hears nothing; scripts/stop --kill demo" in refused.stderr
    vmbus_command("save", str(snapshot))
    until(lambda: not running_vms(), "the VM to be gone")
    assert f"saved to {snapshot}" in log()

    vmbus_command("restore", "--detach", str(snapshot))
    (back,) = listed()
    assert back["state"] == "paused" and "is paused, as it was" in log()
    asyncio.run(qmp("cont"))
    # A reboot is one.
    with terminal(*words("console")) as viewer:
        viewer.prompt()
        viewer.type(b"reboot -f\r")
        until(lambda: "the guest boots again" in log(), "the guest to boot again")
        viewer.prompt()
        # The polite end, seen from the console.
        assert "has powered off" in vmbus_command("stop").stdout
        viewer.expect(b"VM 'demo' has ended")
        assert viewer.ends() == 0
    assert listed() == [] and of_the_vm() == [] and "the guest powered off" in log()
    # The owner's end is everybody's.
    vmbus_command("restore", "--detach", str(snapshot))
    (last,) = listed()
    os.kill(last["pid"], signal.SIGKILL)
    until(lambda: not of_the_vm(), "QEMU and the server to end with their owner")
    what_other_programs_do(snapshot)
    print(
        f"detached: started, looked at, paused, restored twice, rebooted, stopped in {time.monotonic() - begun:.1f} s"
    )


def what_other_programs_do(snapshot: Path) -> None:
    """A VM that is not detached: a hang-up ends it, a panic has its status, it is a job of its shell's, and so on."""
    restore = words("restore", str(snapshot))

    def gone() -> None:
        until(lambda: not of_the_vm() and not running_vms(), "the VM to be gone")

    with terminal(*restore) as login:  # a hang-up
        login.expect(b"is paused, as it was")
        asyncio.run(qmp("cont"))
        login.prompt()
        os.close(login.master)
        assert login.ends() == 130
        gone()
    with terminal(*restore) as login:  # a panic has a status of its own
        login.expect(b"is paused, as it was")
        asyncio.run(qmp("cont"))
        login.prompt()
        login.type(b"\x1dz")  # no shell is there that could let it go on: it is not stopped, and goes on
        login.prompt()
        login.type(b"echo c > /proc/sysrq-trigger\r")
        assert login.ends() == GuestPanicked.status
        gone()
    # Without standard input, and ended by `timeout` while it runs.
    script = 'timeout "$0" "$@" <&-; exit $?'
    with terminal("/bin/sh", "-c", script, f"{pace.seconds(6):.0f}", *restore) as login:
        login.expect(b"shown only")
        assert login.ends(60) == 124
        gone()
