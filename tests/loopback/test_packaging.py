"""The project as it is given away: an sdist of the checkout, the wheel that it builds, and that wheel installed by pip,
in an empty directory."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import installed
from support.installed import CHECKOUT, command
from vmbus.cli import main
from vmbus.transport.library import ENVIRONMENT_VARIABLE, Library


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed.sdist(tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed.wheel(tmp_path_factory.mktemp("wheel"), source)


@pytest.fixture(scope="module")
def vmbus(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed.environment(tmp_path_factory.mktemp("environment"), wheel)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    (folder := tmp_path / "empty").mkdir()
    yield folder


def test_packaging_an_sdist_has_what_is_needed_and_nothing_that_was_made(source: Path) -> None:
    with tarfile.open(source) as tar:
        members = {member.name.partition("/")[2]: member for member in tar}
    names = set(members)
    made = re.compile(r"__pycache__|\.pyc$|\.so$|_cache/|^\.git/|\.hypothesis|^dist/|^build/")
    assert not [name for name in names if made.search(name)]
    wanted = {"README.md", "LICENSE", "pyproject.toml", "requirements.lock", "Containerfile", "scripts/hatch_build.py"}
    wanted |= {"docs/installing.md", "tests/conftest.py", "tests/unit/test_ring.py", "guest/kernel/Kbuild"}
    assert wanted <= names
    assert all(members[f"scripts/{name}"].mode & 0o100 for name in ("_run", "setup", "demo", "test"))
    assert sum(member.size for member in members.values()) < 20 << 20


def test_packaging_a_wheel_has_the_descriptions_templates_bench_guest_and_core(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
    for folder, inside in (
        ("qemu_configs", "vmbus/descriptions"),
        ("device/vmbus/templates", "vmbus/templates"),
        ("bench/vmbus_bench", "vmbus_bench"),
        ("guest/vmbus_guest", "vmbus_guest"),
        ("guest/kernel", "vmbus_guest/kernel"),
        ("device/vmbus", "vmbus"),
    ):
        for path in (CHECKOUT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".pyc", ".so"):
                name = f"{inside}/{path.relative_to(CHECKOUT / folder)}"
                assert name in names, name
                assert bool(names[name] & 0o100) == bool(path.stat().st_mode & 0o100), name
    assert not [name for name in names if "__pycache__" in name]
    core = "vmbus/native/_core.abi3.so"
    assert (core in names) == wheel.name.endswith("-cp311-abi3-linux_x86_64.whl"), wheel.name


def test_packaging_each_command_of_an_installed_wheel_is_there(vmbus: Path, empty: Path, libvfio_user: Library) -> None:
    """What needs no VM; the demo is in the layer that has some."""

    def run(*words: str, fails: bool = False, **more: str) -> str:
        done = command(vmbus, *words, cwd=empty, **more)
        said = done.stdout + done.stderr
        assert (done.returncode != 0) is fails and "Traceback" not in said and "scripts/" not in said, said
        return said

    assert run("--version").startswith("vmbus 0.")
    help_ = run("--help")
    assert all(re.search(rf"^  {re.escape(name)}\b", help_, re.MULTILINE) for name in main.commands), help_
    assert "there: ddi, debian" in run("run-vm", "no-such-vm", fails=True)
    assert "churn" in run("run-vm", "--list-drivers")
    for words in (["save", "x"], ["inspect"], ["checkpoint", "x"], ["capture", "-o", "f"], ["agent", "ping"]):
        assert "no VM" in run(*words, fails=True), words
    assert run("soak", "--seed", "7", "--operations", "20", "--plan").count("\n") == 2
    assert "against a baseline" in " ".join(run("bench", "--help").split())
    run("new-provider", "door_bell", "mine")
    tests = [str(vmbus.with_name("python")), "-m", "pytest", "-q", "mine/test_door_bell.py"]
    done = command(Path(tests[0]), *tests[1:], cwd=empty, **{ENVIRONMENT_VARIABLE: str(libvfio_user.path)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in empty.iterdir() if path.name[0] != "."] == ["mine"]
