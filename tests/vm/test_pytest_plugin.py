"""The pytest plugin with VMs, as a user has it; see tests/loopback/test_pytest_plugin.py for the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from loopback.test_pytest_plugin import PLUGIN, example, properties, run
from support import pace
from support.processes import alive
from vmbus.pytest_plugin import _clear_abandoned
from vmbus.vm.command_line import Programs

pytestmark = [pytest.mark.vm, pytest.mark.long]


CAPTURED = """

from vmbus.testkit.replay import replay
from vmbus.testkit.replay_report import ReplayOptions


def test_what_a_vm_did_is_played_again_without_one(vmbus_vms, vmbus_library, tmp_path):
    path = tmp_path / "vm.pcapng"
    vm = vmbus_vms(audit=True, capture=path)
    vm.run("echo", count=1000, size=2000, external=0.5)
    vm.save_restore()
    report = replay([path], "echo", vmbus_library, options=ReplayOptions(channels=("echo",)))
    assert report.same and report.answers == 1000, str(report)


def test_whose_vm_dies(vmbus_vm):
    vmbus_vm.call(vmbus_vm.machine.qemu.stop())
    vmbus_vm.run("echo", count=10)
"""


def test_fault_t8_the_migration_example_passes_and_its_report_has_the_figures(
    programs: Programs, tmp_path: Path
) -> None:
    assert len(example("vmbus_vm.migrate").splitlines()) <= 10
    # All audited, so that one boot does for them.
    text = "import pytest\n\npytestmark = pytest.mark.vmbus(audit=True)\n\n\n" + example("vmbus_vm.migrate")
    assert "sum(report.packets.values()) > 0" in text
    text += "\n\n" + example("check_audit") + CAPTURED
    done = run(tmp_path, text, "-p", PLUGIN, "--strict-markers", "--durations=6")
    print(done.stdout)
    assert "1 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    assert "was killed by SIGKILL while we waited for the agent's answer to 'start'" in done.stdout
    assert "--- device server of VM 'demo" in done.stdout, "a failure comes with the logs"
    found = properties(tmp_path)
    migration = found["test_packets_survive_a_migration"]
    assert migration["vmbus_operations_migrate"] == "1" and int(migration["vmbus_transactions"]) > 0
    assert 0 < float(migration["vmbus_downtime_max_s"]) < 5
    both = found["test_everything_at_once"]
    assert (both["vmbus_operations"], both["vmbus_transactions"], both["vmbus_vms"]) == ("2", "12000", "1")
    assert int(both["vmbus_in_flight_sent"]) > 0


def descendants(pid: int) -> dict[int, str]:
    """Processes below one, and what they are."""
    found: dict[int, str] = {}
    for child in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((child / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                found[int(child.name)] = (child / "cmdline").read_text().replace("\0", " ")
                found |= descendants(int(child.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


def test_a_run_that_is_killed_leaves_no_process_and_the_next_one_removes_its_files(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_mine.py").write_text("def test_mine(vmbus_vm):\n    pass\n")
    # Short, since sockets are below it.
    with tempfile.TemporaryDirectory(prefix="vmbus-k-") as temporary:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        environment |= {"TMPDIR": temporary}
        child = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", PLUGIN, "test_mine.py"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + pace.seconds(60)
            started: dict[int, str] = {}
            while not any("qemu-system" in command for command in started.values()):
                assert child.poll() is None and time.monotonic() < deadline, "no QEMU was started"
                started = descendants(child.pid)
            assert len(started) >= 2
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait(pace.seconds(30))
        deadline = time.monotonic() + pace.seconds(10)
        while left := [pid for pid in started if Path(f"/proc/{pid}/cmdline").exists() and alive(pid)]:
            assert time.monotonic() < deadline, f"processes outlive the run: {[started[pid] for pid in left]}"
        folder = Path(temporary)
        assert list(folder.glob("vmbus-pytest-*"))
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        _clear_abandoned()
        assert not list(folder.glob("vmbus-pytest-*"))
