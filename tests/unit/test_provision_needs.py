"""What set-up needs of a machine is said before anything is fetched, and a full disk is called one."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vmbus.errors import EnvironmentProblem, code_in
from vmbus.provision import environment, needs, provision
from vmbus.provision.__main__ import RichReporter
from vmbus.provision.apt import Apt
from vmbus.provision.cache import Cache
from vmbus.provision.programs import ProgramFailed
from vmbus.provision.report import PlainReporter, SilentReporter
from vmbus.provision.roots import RootRecipe, make_root
from vmbus.provision.sources import Source

CHECKOUT = Path(__file__).resolve().parents[2]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system with 50 MB left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 95 * 10**7, 50_000_000))


@pytest.fixture
def nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmbus.provision.apt.run_lines", lambda *_, **__: pytest.fail("something was fetched"))


def test_fault_n9_a_small_disk_is_told_before_the_download(small: None, nothing_is_run: None, tmp_path: Path) -> None:
    with pytest.raises(
        EnvironmentProblem, match=r"the set-up needs about \d{3,4} MB, and .* has 50 MB left: make room"
    ):
        provision(Cache(tmp_path / "cache"), SilentReporter(), {})
    with pytest.raises(EnvironmentProblem, match=r"VMBUS_CACHE"):
        needs.require_room(Cache(tmp_path / "cache"), {}, CHECKOUT)


def test_fault_n9_each_download_is_measured_first(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_lines(argv: list[str], what: str, *_: object, **__: object) -> list[str]:
        assert "--print-uris" in argv or "update" in argv, "it was begun"
        return ["'http://mirror.test/a.deb' a.deb 60000000 SHA256:0"]

    monkeypatch.setattr("vmbus.provision.apt.run_lines", run_lines)
    apt = Apt(Cache(tmp_path), ("trixie",), environment={"VMBUS_DEBIAN_MIRROR": "http://mirror.test/debian"})
    monkeypatch.setattr("vmbus.provision.apt.require_programs", lambda: None)
    with pytest.raises(EnvironmentProblem, match="the download of a needs about 60 MB"):
        apt.download(["a"])


@pytest.mark.parametrize(
    "said", ["E: Write error - write (28: No space left on device)", "You don't have enough free space"]
)
def test_fault_n9_a_disk_that_gets_full_is_not_the_network(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache")

    def fails(argv: list[str], what: str, *_: object, **__: object) -> list[str]:
        raise ProgramFailed(f"{what} failed with status 100:\n  {said}", code=code_in(said))

    monkeypatch.setattr("vmbus.provision.apt.run_lines", fails)
    monkeypatch.setattr("vmbus.provision.apt.require_programs", lambda: None)
    apt = Apt(cache, ("trixie",), environment={"VMBUS_DEBIAN_MIRROR": "http://mirror.test/debian"})
    with pytest.raises(EnvironmentProblem, match=r"cache directory .* is full .*VMBUS_CACHE") as caught:
        apt.update()
    assert "network" not in str(caught.value)

    def pip_fails(argv: list[str], what: str, *_: object, **__: object) -> list[str]:
        return fails(argv, what) if "packages" in what else []

    monkeypatch.setattr(environment, "run_lines", pip_fails)
    with pytest.raises(EnvironmentProblem, match=r"is full") as caught, cache.lock(1):
        environment.make_environment(cache, CHECKOUT, SilentReporter())
    assert "network" not in str(caught.value)


def test_fault_n9_so_it_is_when_we_write_ourselves(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    cache.prepare()
    with pytest.raises(EnvironmentProblem, match=r"is full"), cache.publish_directory(cache.path("a", "b")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(PermissionError), cache.publish_directory(cache.path("a", "b")):
        raise PermissionError(errno.EACCES, "another fault keeps its name")
    assert not list(cache.path("a").iterdir())


def test_fault_n13_what_pip_unpacks_is_in_the_cache_and_reclaimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache")
    places: list[Path] = []

    class Killed(BaseException):
        pass

    def run_lines(argv: list[str], what: str, *_: object, **more: str) -> list[str]:
        if "TMPDIR" in more:
            places.append(Path(more["TMPDIR"]))
            (places[-1] / "pip-unpack-x").write_bytes(bytes(1000))
        if "packages" in what:
            raise Killed
        return []

    monkeypatch.setattr(environment, "run_lines", run_lines)
    monkeypatch.setattr("vmbus.provision.cache.remove", lambda _: None)  # as after SIGKILL
    with pytest.raises(Killed), cache.lock(1):
        environment.make_environment(cache, CHECKOUT, SilentReporter())
    assert places and all(cache.root in place.parents and place.exists() for place in places)
    monkeypatch.undo()
    with cache.lock(1):
        assert not any(place.exists() for place in places)


@pytest.mark.parametrize("width", [60, 80, 110])
def test_fault_n21_the_time_of_a_step_is_whole(width: int) -> None:
    out = io.StringIO()
    with RichReporter(Console(file=out, width=width, force_terminal=True, color_system=None)) as reporter:
        reporter.begin("Download of qemu-system-x86, qemu-system-data, qemu-utils and 42 more (140 files, 70 MB)")
        reporter.progress(7, 140, "qemu-system-x86")
        reporter.end("140 packages [whatever]")
    last = [line for line in re.split(r"[\r\n]|\x1b\[[0-9?]*[A-Za-z]", out.getvalue()) if line.strip()][-1]
    assert re.search(r"140 packages.* \d:\d\d:\d\d$", last.rstrip()), last
    assert len(last.rstrip()) <= width


def test_fault_n21_a_line_of_progress_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    reporter = PlainReporter(out)
    reporter.begin("Download of something with a long name")
    reporter.progress(1, 2, "and another")
    last = out.getvalue().rsplit("\x1b[K", 1)[1]
    assert len(last) < 40


def test_fault_n21_lists_are_fetched_once_for_all_who_want_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache")
    monkeypatch.setattr("vmbus.provision.apt.archive_keyring", lambda: tmp_path / "keys.gpg")
    source = Source("http://mirror.test/debian", ("trixie",), ("main",))
    options = []
    for suites, sources in ((("trixie",), False), (("trixie", "trixie-backports"), False), (("trixie",), True)):
        given = Apt(cache, suites, sources)._configure(source)
        options.append({name: value for name, _, value in (one.partition("=") for one in given)})
    assert {one["Dir::State::Lists"] for one in options} == {str(cache.path("apt", "lists"))}
    assert {one["APT::Get::List-Cleanup"] for one in options} == {"false"}  # else one removes what the other fetched
    assert len({one["Dir::State"] for one in options}) == 3


def test_fault_n22_root_by_sudo_hears_whose_cache_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "root-cache")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    told = needs.own_cache_notice(cache, {"SUDO_USER": "ann"})
    assert str(cache.root) in told and "not that of ann" in told and "fetched once more" in told
    for settings in ({}, {"SUDO_USER": "root"}, {"SUDO_USER": "ann", "VMBUS_CACHE": "/x"}):
        assert needs.own_cache_notice(cache, settings) == ""
    notes: list[str] = []
    monkeypatch.setattr(SilentReporter, "note", lambda _, text: notes.append(text))
    monkeypatch.setattr("vmbus.provision._make", _no_set_up)
    with pytest.raises(_Stopped):
        provision(cache, SilentReporter(), {"SUDO_USER": "ann"})
    assert notes == [told]


class _Stopped(Exception):
    pass


def _no_set_up(*_: object) -> Any:
    raise _Stopped


def test_fault_n27_what_is_needed_is_said_before_anything_is_fetched(
    nothing_is_run: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = Cache(tmp_path / "cache")
    needs.run(["--check"], cache, CHECKOUT)
    told = capsys.readouterr().out
    for what in (
        "cache: ",
        "room: ",
        "Debian's keys: ",
        "compiler: ",
        "Linux's own drivers: ",
        "KVM: ",
        "network card: ",
    ):
        assert what in told, told
    assert not cache.root.exists()
    page = (CHECKOUT / "README.md").read_text()
    for feature in (one.what for one in needs.check(cache) if one.ok is not False):
        if feature not in ("cache", "room"):
            assert f"| {feature} |" in page or feature.startswith(("Debian's", "compiler")), feature


def test_fault_n27_the_cache_is_measured_and_cleaned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = Cache(tmp_path / "cache")
    assert needs.run(["--clean"], cache, None) == 0
    cache.prepare()
    (cache.path("root") / "x").mkdir(parents=True)
    (cache.path("root") / "x" / "file").write_bytes(bytes(5_000_000))
    (cache.path("root") / "x").chmod(0o500)
    assert 5_000_000 <= cache.size() < 5_100_000
    assert needs.run(["--clean"], cache, None) == 0
    assert [path.name for path in cache.root.iterdir()] == ["lock"]
    assert "removed 5 MB" in capsys.readouterr().out
    script = [str(CHECKOUT / "scripts" / "setup"), "--check"]
    done = subprocess.run(
        script, env={**os.environ, "VMBUS_CACHE": str(cache.root)}, capture_output=True, text=True, timeout=60
    )
    assert "room: " in done.stdout and "Python packages, QEMU" in done.stdout, done
    assert [path.name for path in cache.root.iterdir()] == ["lock"]


def test_an_interrupted_root_keeps_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache")

    def damaged(*_: object, **__: object) -> list[str]:
        raise ProgramFailed("a damaged package")

    apt = Apt(cache, ("trixie",))
    monkeypatch.setattr(apt, "install_closure", lambda *_: [tmp_path / "a.deb"])
    monkeypatch.setattr("vmbus.provision.roots.run_lines", damaged)
    with pytest.raises(ProgramFailed, match="a damaged package"), cache.lock(1):
        make_root(cache, RootRecipe("r", ("trixie",), ("a",)), SilentReporter(), apt)
