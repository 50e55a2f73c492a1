"""The cache: products appear whole or not at all, and two set-ups never make the same one at once."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import pace
from support.pace import until
from support.processes import alive
from vmbus.errors import EnvironmentProblem, WaitTimeout
from vmbus.provision import provision
from vmbus.provision.cache import Cache, digest, publish_bytes, remove
from vmbus.provision.environment import environment_python
from vmbus.util.directories import cache_directory

HOLDER = """
import sys, time
from pathlib import Path
from vmbus.provision.cache import Cache
with Cache(Path(sys.argv[1])).lock(5):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_location() -> None:
    assert cache_directory({"VMBUS_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}) == Path("/a/b")
    assert cache_directory({"XDG_CACHE_HOME": "/c"}) == Path("/c/vmbus-device")
    assert cache_directory({"XDG_CACHE_HOME": "relative"}) == Path("~/.cache/vmbus-device").expanduser()
    assert cache_directory({}) == Path("~/.cache/vmbus-device").expanduser()


def test_directory_is_the_owners_alone_and_an_unusable_place_is_named(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "deep/cache")
    cache.prepare()
    assert stat.S_IMODE(cache.root.stat().st_mode) == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="VMBUS_CACHE"):
        Cache(tmp_path / "file" / "cache").prepare()


def test_fault_p4_a_cache_that_somebody_else_owns_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache")
    cache.require_own()  # nobody's yet
    cache.prepare()
    (tmp_path / "requirements.lock").write_text("")
    assert environment_python(cache, tmp_path) is None
    us = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: us + 1)
    for use in (
        cache.prepare,
        lambda: cache.lock().__enter__(),
        lambda: environment_python(cache, tmp_path),
        lambda: provision(cache),
    ):
        with pytest.raises(EnvironmentProblem, match=rf"belongs to user {us}, .*set VMBUS_CACHE"):
            use()


def test_interrupted_publish_is_started_again(tmp_path: Path) -> None:
    """A set-up that was killed leaves its temporary folder; nothing of that may get into the product."""
    cache = Cache(tmp_path)
    final = cache.path("kind", "key")
    program = """
import os, sys
from pathlib import Path
from vmbus.provision.cache import Cache
cache = Cache(Path(sys.argv[1]))
with cache.publish_directory(cache.path("kind", "key")) as partial:
    (partial / "half").write_text("done")
    (partial / "locked").mkdir(0o500)
    os.kill(os.getpid(), 9)
"""
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=30)
    assert result.returncode == -signal.SIGKILL
    assert not final.exists()
    assert len(list(final.parent.iterdir())) == 1
    with cache.lock(5), cache.publish_directory(final) as partial:
        assert list(partial.iterdir()) == []
        (partial / "whole").write_text("")
    assert [path.name for path in final.iterdir()] == ["whole"]
    assert [path.name for path in final.parent.iterdir()] == ["key"]


def test_file_is_published_whole(tmp_path: Path) -> None:
    final = tmp_path / "x/file"
    publish_bytes(final, b"one")
    publish_bytes(final, b"two")
    assert final.read_bytes() == b"two"
    assert stat.S_IMODE(final.stat().st_mode) == 0o600
    assert [path.name for path in final.parent.iterdir()] == ["file"]


def test_file_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "file"
    publish_bytes(final, b"one")

    def fail(self: Path, target: Path) -> Path:
        raise OSError("no space")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        publish_bytes(final, b"two")
    assert final.read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_remove_copes_with_modes(tmp_path: Path) -> None:
    locked = tmp_path / "tree/locked"
    locked.mkdir(parents=True)
    (locked / "file").write_text("")
    locked.chmod(0o500)
    remove(tmp_path / "tree")
    remove(tmp_path / "tree")
    assert list(tmp_path.iterdir()) == []


def test_lock_excludes_and_names_its_holder(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    notes: list[str] = []
    with _holder(tmp_path) as process:
        start = time.monotonic()
        with pytest.raises(WaitTimeout, match=f"process {process.pid}"), cache.lock(0.3, notes.append):
            pass
        assert time.monotonic() - start < pace.seconds(5)
    assert len(notes) == 1
    with cache.lock(5):
        pass


def test_lock_of_a_dead_holder_is_free(tmp_path: Path) -> None:
    with _holder(tmp_path) as process:
        process.kill()
        process.wait(10)
        with Cache(tmp_path).lock(5):
            pass


def test_orphan_cannot_spoil_the_next_attempt(tmp_path: Path) -> None:
    """What a program started by a killed set-up goes on writing stays out of the product."""
    cache = Cache(tmp_path)
    final = cache.path("kind", "key")
    with pytest.raises(KeyboardInterrupt), cache.publish_directory(final) as first:
        raise KeyboardInterrupt
    with cache.publish_directory(final) as second:
        first.mkdir()
        (first / "late").write_text("")
    assert first != second
    assert list(final.iterdir()) == []
    with cache.lock(5):
        assert not first.exists()


def test_scratch_of_a_killed_set_up_is_removed(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    left = cache.scratch()
    (Path(left.name) / "file").write_text("")
    with cache.lock(5):
        assert not Path(left.name).exists()
        with cache.scratch() as scratch:
            assert Path(scratch).is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_started_programs_die_with_their_parent(tmp_path: Path) -> None:
    program = """
import sys
from vmbus.provision.programs import run_lines
run_lines(["sh", "-c", "echo $$; exec tail -f /dev/null"], "the job", 60, lambda line: print(line, flush=True))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.communicate(timeout=10)
    until(lambda: not alive(child), "the child to end")


def test_digest_depends_on_every_part() -> None:
    assert digest(1, ["a"]) == digest(1, ["a"])
    assert digest(1, ["a"]) != digest(1, ["b"])
    assert digest("ab", "c") != digest("a", "bc")


class _holder:
    """A process that holds the lock until the block is left."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __enter__(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(self._root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "held\n"
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate(timeout=10)
