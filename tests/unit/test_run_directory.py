"""Run directories: who owns them, and what becomes of those of the dead."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.pace import until
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.util.lockfile import LockFile
from vmbus.vm.run_directory import RunDirectory, clean_stale, own, running_vms, runtime_base


def stale(base: Path, name: str) -> None:
    """What an owner that was killed leaves."""
    (base / name).mkdir()
    own(base / name).close()


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return runtime_base()


def test_the_base_is_private(base: Path, tmp_path: Path) -> None:
    assert base == tmp_path / "vmbus"
    assert stat.S_IMODE(base.stat().st_mode) == 0o700
    base.chmod(0o755)
    with pytest.raises(EnvironmentProblem, match="nobody else may enter"):
        runtime_base()


def test_a_base_that_is_a_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "vmbus").symlink_to("elsewhere")
    with pytest.raises(EnvironmentProblem, match="must be a directory"):
        runtime_base()


def test_names_are_claimed_once(base: Path) -> None:
    first = RunDirectory.create("demo")
    second = RunDirectory.create("demo")
    assert (first.name, second.name) == ("demo", "demo-2")
    assert running_vms() == ["demo", "demo-2"]
    with pytest.raises(UsageError, match=rf"'demo' is running already \(process {os.getpid()}\)"):
        RunDirectory.create("demo", exact=True)
    first.remove()
    first.remove()  # twice is fine
    assert RunDirectory.create("demo", exact=True).name == "demo"
    assert sorted(path.name for path in base.iterdir()) == ["demo", "demo-2"]  # nothing temporary is left
    assert stat.S_IMODE((base / "demo").stat().st_mode) == 0o700


HOLD = """
import os, sys
from pathlib import Path
from vmbus.vm.run_directory import RunDirectory, clean_stale, running_vms
assert os.getpid() < 10, "a container of its own"
mine = RunDirectory.create("theirs", exact=True)
for line in sys.stdin:
    print(running_vms(), clean_stale(mine.path.parent), flush=True)
"""


def another_container() -> subprocess.Popen[str]:
    """A process with a VM's directory, in a process namespace of its own: ids there and here say nothing to each other.
    It is killed with what we started, and nothing of it is left."""
    command = ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--pid", "--fork", "--kill-child"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        try:
            raise PermissionError("unshare")
        except PermissionError as error:
            pytest.skip(f"this machine lets us make no process namespaces: {error}")
    return subprocess.Popen(
        [*command, sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_fault_m6_two_containers_that_share_the_directory_leave_each_others_vms_alone(base: Path) -> None:
    ours = RunDirectory.create("ours")
    with another_container() as other:
        assert other.stdin is not None and other.stdout is not None

        def ask() -> str:
            print("look", file=other.stdin, flush=True)
            return other.stdout.readline()

        assert ask() == "['ours', 'theirs'] []\n"
        assert running_vms() == ["ours", "theirs"]
        assert clean_stale(base) == [] and (base / "theirs").is_dir()
        with pytest.raises(UsageError, match="'theirs' is running already"):
            RunDirectory.create("theirs", exact=True)
        ours.remove()
        assert ask() == "['theirs'] []\n"
        other.kill()
        other.wait()
        until(lambda: running_vms() == [], "the other container's end")
    assert RunDirectory.create("theirs", exact=True).path == base / "theirs"


def test_fault_m6_sabotage_without_the_lock_it_would_be_deleted(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmbus.util.lockfile.fcntl.flock", lambda *_: None)
    RunDirectory.create("theirs")
    assert running_vms() == [] and clean_stale(base) == ["theirs"]


def test_a_name_that_has_a_new_owner_meanwhile_is_left_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clean up; the slower one has opened the record of the dead, and the faster one's VM has taken the name."""
    stale(base, "demo")
    new: list[RunDirectory] = []
    original = LockFile.is_at

    def is_at(lock: LockFile, path: Path) -> bool:
        if not new:
            (base / "demo").rename(base / ".gone")
            new.append(RunDirectory.create("demo", exact=True))
        return original(lock, path)

    monkeypatch.setattr(LockFile, "is_at", is_at)
    assert clean_stale(base) == [] and running_vms() == ["demo"]


def test_fault_m5_what_is_large_is_in_the_state_directory(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMBUS_STATE", str(tmp_path / "state"))
    mine = RunDirectory.create("demo")
    room = mine.room("checkpoints")
    assert room == mine.path / "checkpoints" and room == mine.room("checkpoints")
    (room / "large").write_bytes(bytes(4096))
    (mine.room("disks") / "large").write_bytes(bytes(4096))
    state = tmp_path / "state" / "run" / "demo"
    assert sorted(path.name for path in state.iterdir()) == ["checkpoints", "disks", "owner.json"]
    assert (state / "checkpoints" / "large").stat().st_size == 4096 and stat.S_IMODE(state.stat().st_mode) == 0o700
    size = sum(path.lstat().st_size for path in mine.path.iterdir())
    assert size < 1024, "the run directory has names and no bulk"
    mine.remove()
    assert list(state.parent.iterdir()) == [] and list(base.iterdir()) == []


def test_fault_m5_large_files_of_a_killed_owner_are_removed_by_the_next_start(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMBUS_STATE", str(tmp_path / "state"))
    kill = "import os; from vmbus.vm.run_directory import RunDirectory as R; R.create('x').room('disks'); os._exit(0)"
    subprocess.run([sys.executable, "-c", kill], check=True)
    assert (tmp_path / "state" / "run" / "x").is_dir() and running_vms() == []
    RunDirectory.create("another").remove()
    assert list((tmp_path / "state" / "run").iterdir()) == [] and list(base.iterdir()) == []


def test_fault_m5_a_state_directory_that_cannot_be_made_says_which_setting_helps(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMBUS_STATE", "/proc/nope")
    with pytest.raises(EnvironmentProblem, match="VMBUS_STATE names another place"):
        RunDirectory.create("demo").room("disks")


def test_directories_of_the_dead_are_cleared(base: Path) -> None:
    stale(base, "dead")
    (base / "old").mkdir()
    (base / "old" / "owner.json").write_bytes(b'{"pid":1,"start_time":2,"boot":"x"}')  # of an earlier version
    (base / "young").mkdir()  # somebody is just making it
    (base / "abandoned").mkdir()
    hour_ago = time.time() - 3600
    os.utime(base / "abandoned", (hour_ago, hour_ago))
    assert running_vms() == []
    assert RunDirectory.create("dead", exact=True).name == "dead", "the name is free again"
    assert sorted(path.name for path in base.iterdir()) == ["dead", "young"]


def test_too_long_socket_paths_are_refused_at_once(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    with pytest.raises(EnvironmentProblem, match="shorter XDG_RUNTIME_DIR"):
        RunDirectory.create("demo", base=deep)
    assert list(deep.iterdir()) == []
