"""A run of tests that is killed leaves no process for more than a moment and no directory; one that ends, nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.ending import MOMENT, PREFIX, left_in
from support.pace import until
from support.processes import alive, children, command_lines

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
SEVERAL = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--max-worker-restart", "0")
"""As scripts/test has it for complete runs."""
BUSY = """
import os, pathlib, subprocess, tempfile, time
import pytest

pytestmark = pytest.mark.loopback
HERE = pathlib.Path(__file__)

def test_busy():
    with tempfile.TemporaryDirectory(prefix="busy-") as folder:
        os.mkfifo(f"{folder}/fifo")
        HERE.with_suffix(".pid.new").write_text(str(os.getpid()))
        HERE.with_suffix(".pid.new").rename(HERE.with_suffix(".pid"))
        time.sleep(120)
"""
STUBBORN = BUSY.replace(
    "        time.sleep(120)\n",
    "        while True:\n            try: time.sleep(120)\n            except KeyboardInterrupt: pass\n",
)


def start(folder: Path, *options: str, **tests: str) -> tuple[subprocess.Popen[bytes], Path]:
    """A run of tests, and its directory for temporary files."""
    temporary = folder / "t"
    temporary.mkdir(exist_ok=True)
    (folder / "conftest.py").write_bytes(CONFTEST.read_bytes())
    for name, text in tests.items():
        (folder / f"test_{name}.py").write_text(text)
    markers = "\n".join(f"    {name}: x" for name in ("unit", "loopback", "browser", "vm", "long"))
    (folder / "pytest.ini").write_text(f"[pytest]\nmarkers =\n{markers}\naddopts = --strict-markers\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
        "TMPDIR": str(temporary),
        "PYTEST_DEBUG_TEMPROOT": str(folder),
    }
    run = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *options, str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=folder,
    )  # fmt: skip
    return run, temporary


def under_way(folder: Path, *names: str) -> list[int]:
    """The processes that perform these tests, once they do."""
    files = [folder / f"test_{name}.pid" for name in names]
    until(lambda: all(file.exists() for file in files), "the tests to begin", 60)
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize(
    ("number", "second"),
    [(signal.SIGKILL, STUBBORN), (signal.SIGTERM, BUSY), (signal.SIGTERM, STUBBORN), (signal.SIGINT, BUSY)],
    ids=["SIGKILL-stubborn", "SIGTERM-willing", "SIGTERM-stubborn", "SIGINT-willing"],
)
def test_fault_h18_a_killed_run_leaves_no_worker_and_no_directory(
    tmp_path: Path, number: signal.Signals, second: str
) -> None:
    """Also where a test will not end; then whoever is told has to be killed, as `timeout --kill-after` does."""
    run, temporary = start(tmp_path, *SEVERAL, one=BUSY, two=second)
    try:
        workers = under_way(tmp_path, "one", "two")
        assert run.pid not in workers and len(set(workers)) == 2
        run.send_signal(number)
        if number is not signal.SIGKILL and second is STUBBORN:
            until(lambda: not alive(workers[0]), "the willing one to end")
            run.kill()
        # After SIGINT the workers are told by a pipe, and execnet gives the test 5 s.
        bound = MOMENT + (20 if number is signal.SIGINT else 6)
        until(lambda: not any(map(alive, workers)), "the workers to end", bound)
        run.communicate(timeout=60)
        until(lambda: not list(temporary.iterdir()), f"{list(temporary.rglob('*'))} to go")
    finally:
        run.kill()
        run.communicate()


def test_fault_h18_what_is_killed_all_at_once_is_cleared_away_by_the_next_run(tmp_path: Path) -> None:
    """And what belongs to a run that lives stays."""
    runs = []
    try:
        run, temporary = start(tmp_path, one=BUSY)
        runs.append(run)
        assert under_way(tmp_path, "one") == [run.pid]
        (killed,) = temporary.iterdir()
        (heir,) = [pid for pid, line in command_lines().items() if str(killed) in line]
        for pid in (heir, run.pid):
            os.kill(pid, signal.SIGKILL)
        run.wait()
        assert killed.name.startswith(PREFIX) and list(killed.rglob("fifo"))
        (tmp_path / "test_one.pid").unlink()
        run, _ = start(tmp_path, one=BUSY)
        runs.append(run)
        under_way(tmp_path, "one")
        assert not killed.exists()
        (living,) = temporary.iterdir()
        other = tmp_path / "other"
        other.mkdir()
        (other / "t").symlink_to(temporary)
        brief, _ = start(other, quick="import pytest\n@pytest.mark.unit\ndef test_quick(): pass\n")
        output, _ = brief.communicate(timeout=120)
        assert brief.returncode == 0, output
        assert list(temporary.iterdir()) == [living] and list(living.rglob("fifo"))
    finally:
        for one in runs:
            one.kill()
            one.wait()


LEAVES = """
import os, tempfile
import pytest

@pytest.mark.loopback
def test_leaves():
    os.mkfifo(os.path.join(tempfile.mkdtemp(prefix="mine-"), "fifo"))

@pytest.mark.loopback
def test_takes_along():
    with tempfile.TemporaryDirectory(): pass
"""


def test_fault_n20_a_loopback_test_that_leaves_something_fails(tmp_path: Path) -> None:
    run, temporary = start(tmp_path, *SEVERAL, leaves=LEAVES)
    output = run.communicate(timeout=120)[0].decode()
    assert run.returncode == 1 and "1 error" in output and "2 passed" in output, output
    assert "left in the directory for temporary files: ['mine-" in output
    assert list(temporary.iterdir()) == []


def test_fault_n20_the_bases_of_run_directories_may_stay(tmp_path: Path) -> None:
    base = tmp_path / f"vmbus-{os.getuid()}"
    (base / "empty").mkdir(parents=True)
    assert left_in(tmp_path) == set()
    (base / "empty" / "file").touch()
    assert left_in(tmp_path) == {base.name}


def test_fault_n19_a_zombie_is_dead() -> None:
    """Nobody has reaped it: it is there, and it is no process that lives."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    try:
        state = Path(f"/proc/{child.pid}/stat")
        until(lambda: state.read_text().rpartition(") ")[2].startswith("Z"), "the child to end")
        assert not alive(child.pid) and child.pid not in children()
    finally:
        child.wait()
    assert not alive(child.pid)
    assert alive(os.getpid())
