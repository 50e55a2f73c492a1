"""Children that die with us and say why they died; run directories that are cleaned up."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from vmbus.errors import EnvironmentProblem, UsageError, WaitTimeout
from vmbus.vm import process
from vmbus.vm.process import Child, Owner, ProcessDied, RunDirectory, clean_stale, log_tail, running_vms, runtime_base

pytestmark = pytest.mark.unit

SHELL = "/bin/sh"


async def spawn(tmp_path: Path, script: str) -> Child:
    return await Child.spawn("the child", [SHELL, "-c", script], tmp_path / "child.log")


async def forever() -> None:
    await asyncio.Event().wait()


def test_a_wait_ends_with_the_child_and_shows_its_last_words(tmp_path: Path) -> None:
    async def body() -> None:
        child = await spawn(tmp_path, "echo first; echo broken pipe of dreams >&2; exit 3")
        with pytest.raises(ProcessDied) as caught:
            await child.guard(forever(), "a sign of life", 30)
        assert "the child ended with status 3 while we waited for a sign of life" in str(caught.value)
        assert "broken pipe of dreams" in str(caught.value)

    asyncio.run(body())


def test_a_wait_is_bounded_and_says_for_what(tmp_path: Path) -> None:
    async def body() -> None:
        child = await spawn(tmp_path, "exec sleep 60")
        with pytest.raises(WaitTimeout, match="a sign of life"):
            await child.guard(forever(), "a sign of life", 0.05)
        await child.stop()
        assert not child.running

    asyncio.run(body())


def test_work_that_ends_gives_its_result_or_its_error(tmp_path: Path) -> None:
    async def fail() -> None:
        raise EnvironmentProblem("of its own")

    async def answer() -> int:
        return 42

    async def body() -> None:
        child = await spawn(tmp_path, "exec sleep 60")
        try:
            assert await child.guard(answer(), "an answer", 5) == 42
            with pytest.raises(EnvironmentProblem, match="of its own"):
                await child.guard(fail(), "a failure", 5)
        finally:
            await child.stop()

    asyncio.run(body())


def test_a_broken_connection_is_explained_by_the_death_behind_it(tmp_path: Path) -> None:
    async def body() -> None:
        child = await spawn(tmp_path, "read x < gate; echo out of luck; kill -SEGV $$")

        async def connection() -> None:
            gate.write_text("\n")
            raise ConnectionResetError

        with pytest.raises(ProcessDied, match=r"was killed by SIGSEGV(.|\n)*out of luck") as caught:
            await child.guard(connection(), "an answer", 30)
        assert isinstance(caught.value.__cause__, ConnectionResetError)

    gate = tmp_path / "gate"
    os.mkfifo(gate)
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        asyncio.run(body())
    finally:
        os.chdir(before)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    async def body() -> None:
        child = await Child.spawn("nothing", ["/no/such/program"], tmp_path / "log")
        with pytest.raises(ProcessDied, match="cannot start /no/such/program: No such file"):
            await child.guard(forever(), "a sign of life", 30)

    asyncio.run(body())


def test_children_die_with_their_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import asyncio, pathlib, sys\n"
            "from vmbus.vm.process import Child\n"
            "async def main():\n"
            "    child = await Child.spawn('x', ['sleep', '1000'], pathlib.Path(sys.argv[1]))\n"
            "    while pathlib.Path(f'/proc/{child.pid}/comm').read_text() != 'sleep\\n': await asyncio.sleep(0.01)\n"
            "    print(child.pid, flush=True)\n"
            "    await asyncio.Event().wait()\n"
            "asyncio.run(main())\n",
            str(tmp_path / "log"),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        descriptor = os.pidfd_open(child)
        parent.send_signal(signal.SIGKILL)  # no chance to clean up
        parent.wait(10)
        os.set_blocking(descriptor, False)
        import select

        assert select.select([descriptor], [], [], 10)[0], "the child outlived its parent"
        os.close(descriptor)
    finally:
        parent.kill()
        parent.wait(10)


def test_logs_are_private(tmp_path: Path) -> None:
    async def body() -> None:
        child = await spawn(tmp_path, "umask")
        assert await child.exited == 0

    asyncio.run(body())
    assert stat.S_IMODE((tmp_path / "child.log").stat().st_mode) == 0o600
    assert (tmp_path / "child.log").read_text() == "0077\n"


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {number}\n" for number in range(5000)))
    assert log_tail(log, 2) == "    line 4998\n    line 4999"
    assert log_tail(tmp_path / "absent") == ""


# --- run directories


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
import sys, msgspec, time
from pathlib import Path
from vmbus.util.lockfile import LockFile
from vmbus.vm.process import Owner, boot_id
lock = LockFile(Path(sys.argv[1]))
lock.append(msgspec.json.encode(Owner(2**22 + 5, 1, boot_id(), locked=True)))  # an id that is nobody's here
print("held", flush=True)
sys.stdin.read()
"""


def test_fault_m6_a_vm_of_another_container_is_left_alone(base: Path) -> None:
    """Two containers share the run directory and not the process ids: the lock tells who lives, and when it is over."""
    theirs = base / "theirs"
    theirs.mkdir()
    argv = [sys.executable, "-c", HOLD, str(theirs / "owner.json")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        assert running_vms() == ["theirs"]
        assert clean_stale(base) == [] and theirs.is_dir()
        with pytest.raises(UsageError, match="'theirs' is running already"):
            RunDirectory.create("theirs", exact=True)
        other.kill()
        other.wait()
    assert running_vms() == []
    assert RunDirectory.create("theirs", exact=True).path == theirs


def test_fault_m6_sabotage_without_the_lock_it_would_be_deleted(base: Path) -> None:
    stale(base, "theirs", Owner(2**22 + 5, 1, process.boot_id(), locked=True))
    assert clean_stale(base) == ["theirs"]


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
    kill = "import os; from vmbus.vm.process import RunDirectory as R; R.create('x').room('disks'); os._exit(0)"
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


def stale(base: Path, name: str, owner: Owner) -> None:
    (base / name).mkdir()
    (base / name / "owner.json").write_bytes(msgspec.json.encode(owner))


def test_directories_of_the_dead_are_cleared(base: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    own = Owner(os.getpid(), Owner.current().start_time, process.boot_id())  # as older ones were, without a lock
    stale(base, "dead", Owner(ended.pid, 1, own.boot))
    stale(base, "reused", Owner(own.pid, own.start_time + 1, own.boot))  # our id, another process
    stale(base, "before-reboot", Owner(own.pid, own.start_time, "another boot"))
    stale(base, "alive", own)
    (base / "young").mkdir()  # somebody is just making it
    (base / "abandoned").mkdir()
    hour_ago = time.time() - 3600
    os.utime(base / "abandoned", (hour_ago, hour_ago))
    assert running_vms() == ["alive"]
    assert sorted(clean_stale(base)) == ["abandoned", "before-reboot", "dead", "reused"]
    assert sorted(path.name for path in base.iterdir()) == ["alive", "young"]


def test_a_stale_name_is_free_again(base: Path) -> None:
    stale(base, "demo", Owner(2**22 + 5, 1, Owner.current().boot))
    assert RunDirectory.create("demo", exact=True).name == "demo"


def test_too_long_socket_paths_are_refused_at_once(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    with pytest.raises(EnvironmentProblem, match="shorter XDG_RUNTIME_DIR"):
        RunDirectory.create("demo", base=deep)
    assert list(deep.iterdir()) == []


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen(["true"])
    try:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert process._start_time(child.pid) is None
    finally:
        child.wait()


def test_a_death_without_a_reason_of_its_own_is_explained_by_the_witness(tmp_path: Path) -> None:
    async def body() -> None:
        console = tmp_path / "console.log"
        console.write_text("Kernel panic - not syncing: out of tea\n")
        child = await spawn(tmp_path, "exit 0")
        child.witness = ("the guest's console", console)
        await child.exited
        assert re.search(r"ended with status 0(.|\n)*the guest's console:\n.*out of tea", str(child.death()))
        console.write_text("")
        assert "the guest's console is empty" in str(child.death())

    asyncio.run(body())
