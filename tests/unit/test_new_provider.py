"""`new-provider`, and loading providers from outside of the package."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from vmbus.cli import main
from vmbus.cli.new_provider import _FILES
from vmbus.device.description import DeviceDescription, ProviderDescription, load_device
from vmbus.device.device import Device
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.providers import provider_class
from vmbus.providers.loading import ALLOW_VARIABLE, PATH_VARIABLE
from vmbus.server.services import Services
from vmbus.server.session import Session
from vmbus.server.timers import Timers
from vmbus.soak.schedule import check_own, plan_episode
from vmbus.soak.settings import load_settings
from vmbus.testkit import ProviderTest
from vmbus.vm.description import load_description

CHECKOUT = Path(__file__).resolve().parents[2]
INSTANCE = "6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7a01"


def run(*words: str) -> Any:
    return CliRunner().invoke(main, ["new-provider", *words])


@pytest.fixture(autouse=True)
def import_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is imported or put on the path by a test is forgotten after it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    monkeypatch.delenv(ALLOW_VARIABLE, raising=False)


def python(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    roots = os.pathsep.join([str(CHECKOUT / "device"), str(CHECKOUT / "guest")])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": roots},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", ["door_bell", "x"])
def test_what_is_created_passes_its_own_test_and_the_linters_at_once(tmp_path: Path, name: str) -> None:
    result = run(name, str(tmp_path / "mine"))
    assert result.exit_code == 0, result.output
    made = tmp_path / "mine"
    assert sorted(path.name for path in made.iterdir()) == sorted(pattern.format(name) for pattern in _FILES.values())
    for path in made.iterdir():
        assert str(path) in result.output
        assert "$" not in path.read_text()
    tests = python(made, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"test_{name}.py")
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert "8 passed" in tests.stdout
    config = ["--config", str(CHECKOUT / "pyproject.toml"), "--no-cache"]
    for command in (["check", "--extend-ignore", "I,RUF100"], ["format", "--check"]):
        lint = python(made, "-m", "ruff", *command, *config, str(made))
        assert lint.returncode == 0, lint.stdout + lint.stderr


def test_its_machine_is_a_description_that_finds_the_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("door_bell", str(tmp_path)).exit_code == 0
    description = load_description(tmp_path / "door_bell.toml")
    (provider,) = description.device.providers
    assert (description.name, provider.kind) == ("door-bell", "door_bell:DoorBell")
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path))
    # As the server gets it.
    device = tmp_path / "device.json"
    device.write_bytes(description.device.to_json())
    found = provider_class(load_device(device).providers[0].kind)
    assert found.kind == "door_bell"
    with ProviderTest(found, options=provider.options) as kit:
        assert kit.open().request(b"ding").rstrip(b"\0") == b"DING"


def test_its_soak_campaign_runs_its_driver_against_it(tmp_path: Path) -> None:
    assert run("door_bell", str(tmp_path)).exit_code == 0
    settings = load_settings(tmp_path / "door_bell_soak.toml")
    check_own(settings)
    plan = plan_episode(settings, settings.seed, 0)
    mine = next(one for one in plan.workloads if one.own)
    provider = next(one for one in plan.vm.device.providers if one.name == mine.provider)
    assert provider.kind == "door_bell:DoorBell" and 1 <= provider.options["every"] <= 20
    assert mine.source == (tmp_path / "door_bell_driver.py").read_text() and mine.runs == "door-bell-driver"
    assert mine.parameters["instance"] == provider.instance and not mine.alone
    assert plan.path == [str(tmp_path)]


def test_each_creation_is_a_device_of_its_own(tmp_path: Path) -> None:
    for directory in ("a", "b"):
        assert run("door_bell", str(tmp_path / directory)).exit_code == 0
    texts = [(tmp_path / directory / "door_bell.py").read_text() for directory in ("a", "b")]
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Door", "cannot be the name of a provider's module"),
        ("door-bell", "cannot be the name"),
        ("class", "cannot be the name"),
        ("../door", "cannot be the name"),
        ("json", "a module that exists; choose another, for instance my_json"),
        ("vmbus", "a module that exists"),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, name: str, message: str) -> None:
    result = run(name, str(tmp_path))
    assert (result.exit_code, list(tmp_path.iterdir())) == (UsageError.status, [])
    assert result.output.startswith("error: ") and message in result.output and result.output.count("\n") == 1


@pytest.mark.parametrize("existing", [pattern.format("door_bell") for pattern in _FILES.values()])
def test_nothing_is_overwritten(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("mine")
    result = run("door_bell", str(tmp_path))
    assert (
        result.exit_code == EnvironmentProblem.status
        and f"{existing} is there already; nothing was written" in result.output
    )
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert run("door_bell", str(tmp_path / "file" / "below")).exit_code == EnvironmentProblem.status


# ---- loading ---------------------------------------------------------------------------------------------------------

GOOD = """
from vmbus.providers import Provider

class Good(Provider):
    kind = "good"
    def start(self): pass

class NoStart(Provider):
    kind = "bad"

class NoKind(Provider):
    def start(self): pass

value = 3
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "author").mkdir()
    (tmp_path / "author" / "__init__.py").write_text("")
    (tmp_path / "author" / "good.py").write_text(GOOD)
    (tmp_path / "author" / "needs.py").write_text("import no_such_library_at_all")
    (tmp_path / "author" / "raises.py").write_text("1 / 0")
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("block", "no provider of kind 'block' any more: use 'scsi'"),
        ("no-such", r"no provider of kind 'no-such'; known kinds: .*echo.*'package\.module:Class'"),
        ("netvsc", "no provider of kind 'netvsc' any more: use 'network'"),
        ("author.absent:Good", rf"no module 'author\.absent' on the import path; .*{PATH_VARIABLE}"),
        ("absent:Good", rf"no module 'absent' on the import path; .*{PATH_VARIABLE}"),
        ("author.needs:Good", "its module imports 'no_such_library_at_all', which is not there"),
        ("author.raises:Good", "importing its module raised ZeroDivisionError"),
        ("author.good:Bad", r"module author\.good \(.*good\.py\) has no class 'Bad'"),
        ("author.good:value", r"value is not a subclass of vmbus\.providers\.Provider"),
        ("author.good:NoStart", r"NoStart has no start\(\)"),
        ("author.good:NoKind", "NoKind has no class attribute kind"),
        ("author.good:", "no provider of kind"),
        ("author/good:Good", "no provider of kind"),
    ],
)
def test_what_is_wrong_with_a_module_is_said(modules: Path, kind: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        provider_class(kind)


def test_a_snapshot_does_not_choose_code(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=rf"may not choose the code .*{ALLOW_VARIABLE}=author\.good:Good"):
        provider_class("author.good:Good", from_snapshot=True)
    assert "author" not in sys.modules and str(modules) not in sys.path, "nothing was imported"
    monkeypatch.setenv(ALLOW_VARIABLE, "other:Thing")
    with pytest.raises(UsageError, match="may not choose"):
        provider_class("author.good:Good", from_snapshot=True)
    monkeypatch.setenv(ALLOW_VARIABLE, "other:Thing, author.good:Good")
    assert provider_class("author.good:Good", from_snapshot=True).kind == "good"


def test_the_server_knows_a_restore_from_a_start(modules: Path) -> None:
    kind = "author.good:Good"
    one = {"kind": kind, "name": "x", "instance": INSTANCE}
    description = msgspec.convert({"name": "vmbus0", "providers": [one]}, DeviceDescription)
    loop = asyncio.new_event_loop()

    def build(*, from_snapshot: bool, trusted: tuple[str, ...] = ()) -> Session:
        life = Session(description, Device(lambda: None, lambda: None), Timers(loop), Services(loop))
        life.build(from_snapshot=from_snapshot, trusted=trusted)
        return life

    with pytest.raises(UsageError, match="may not choose"):
        build(from_snapshot=True)
    for life in (build(from_snapshot=False), build(from_snapshot=True, trusted=(kind,))):
        assert [provider.kind for provider in life.providers] == ["good"]
        life.end()
    loop.close()


@pytest.mark.parametrize("kind", ["Echo", "a b", "a:", ":B", "a.b:c.d", "../x:Y", "a/b:C", "", "a:b:c", "x" * 300])
def test_kinds_that_descriptions_refuse(tmp_path: Path, kind: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"kind": kind, "name": "x", "instance": INSTANCE}, ProviderDescription)
    path = tmp_path / "device.json"
    path.write_bytes(
        msgspec.json.encode({"name": "d", "providers": [{"kind": kind, "name": "x", "instance": INSTANCE}]})
    )
    with pytest.raises(
        UsageError, match=r"field 'providers\[0\]\.kind': (not a kind of provider; allowed: .*package|.*256)"
    ):
        load_device(path)
