"""What the commands do where the project was installed from a wheel, without a checkout."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from support.installed import CHECKOUT, install, run
from vmbus import places
from vmbus.cli import main


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("site-packages"))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    (tmp_path / "runtime").mkdir(mode=0o700)
    return tmp_path


def vmbus(modules: Path, cwd: Path, *words: str, fails: bool = False) -> str:
    done = run(modules, "-m", "vmbus.cli", *words, cwd=cwd, XDG_RUNTIME_DIR=str(cwd / "runtime"))
    assert (done.returncode != 0) is fails, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "scripts/" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr


HELP = """
import click
from vmbus.cli import main
print(__import__("vmbus").__file__)
for name, command in main.commands.items():
    print(name, command.get_help(click.Context(command, info_name=name)))
"""


def test_fault_n5_every_command_is_there_and_helps_without_scripts(modules: Path, elsewhere: Path) -> None:
    done = run(modules, "-c", HELP, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(modules)) and "scripts/" not in done.stdout
    assert "vmbus audit checks them" in " ".join(done.stdout.split())
    assert {path.name for path in (CHECKOUT / "scripts").iterdir() if path.suffix == "" and path.is_file()} - {
        "_run",
        "test",
    } <= main.commands.keys()


def test_fault_p5_what_scripts_do_is_done_from_a_wheel(modules: Path, elsewhere: Path) -> None:
    """What needs no set-up; the others are in the layers that have one."""
    assert "churn" in vmbus(modules, elsewhere, "run-vm", "--list-drivers")
    shipped = sorted(path.stem for path in (CHECKOUT / "qemu_configs").glob("*.toml"))
    assert f"there: {', '.join(shipped)};" in vmbus(modules, elsewhere, "run-vm", "no-such-vm", fails=True)
    assert vmbus(modules, elsewhere, "list") == ""
    assert vmbus(modules, elsewhere, "save", "x", fails=True) == "error: no VM is running; vmbus run-vm starts one\n"
    plan = vmbus(modules, elsewhere, "soak", "--seed", "7", "--operations", "20", "--plan")
    assert plan.count("\n") == 2
    assert "--debian" in vmbus(modules, elsewhere, "setup", "--help")
    made = vmbus(modules, elsewhere, "new-provider", "door_bell", "mine")
    assert f"  pytest {elsewhere}/mine/test_door_bell.py" in made and "vmbus run-vm" in made
    done = run(modules, "-m", "pytest", "-q", "mine/test_door_bell.py", cwd=elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr


def test_fault_p5_what_set_up_and_the_guests_image_are_made_of_is_there(modules: Path, elsewhere: Path) -> None:
    program = (
        "import json\n"
        "from vmbus.provision.kernel_module import source_folder, sources\n"
        "from vmbus.native.build import sources as native\n"
        "from vmbus_guest.image import _sources\n"
        "print(json.dumps([sorted(p.name for p in sources(source_folder())), sorted(p.name for p in native()),\n"
        "                  [name for name, _ in _sources(None, None)]]))\n"
    )
    found = run(modules, "-c", program, cwd=elsewhere)
    assert found.returncode == 0, found.stderr
    here = run(CHECKOUT / "device", "-c", program, cwd=elsewhere, PYTHONPATH=f"{CHECKOUT}/device:{CHECKOUT}/guest")
    assert json.loads(found.stdout) == json.loads(here.stdout)


def test_fault_n5_hints_name_the_commands_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "use scripts/save, (scripts/run-vm NAME) or scripts/test x.py; scripts/mod/modpost, my-scripts/x, scripts/x.py"
    )
    assert places.spelled(text) == text and places.IN_CHECKOUT
    monkeypatch.setattr(places, "IN_CHECKOUT", False)
    assert places.spelled(text) == (
        "use vmbus save, (vmbus run-vm NAME) or pytest x.py; scripts/mod/modpost, my-scripts/x, scripts/x.py"
    )
    assert places.spelled("scripts/_run -m distributed.cli.dask_worker A") == "python -m distributed.cli.dask_worker A"
    assert places.command("soak") == "vmbus soak"


def test_fault_p5_the_measurements_are_there(modules: Path, elsewhere: Path) -> None:
    program = (
        "import pkgutil, importlib, vmbus_bench\n"
        "for one in pkgutil.iter_modules(vmbus_bench.__path__):\n"
        "    importlib.import_module(f'vmbus_bench.{one.name}')\n"
        "    print(one.name)\n"
    )
    done = run(modules, "-c", program, cwd=elsewhere)
    assert done.returncode == 0 and "doorbell" in done.stdout.split(), done.stderr


def test_fault_n14_paths_given_to_the_tests_command_are_the_callers(elsewhere: Path) -> None:
    """Those of the checkout are found from everywhere, too."""
    (elsewhere / "mine").mkdir()
    test = "@pytest.mark.unit\ndef test_{}():\n    pass\n"
    (elsewhere / "mine" / "test_it.py").write_text("import pytest\n\n" + test.format("mine") + test.format("no"))
    for named in (
        "mine/test_it.py::test_mine",
        "./mine/test_it.py::test_mine",
        "tests/unit/test_ring.py::test_nothing",
    ):
        script = [str(CHECKOUT / "scripts" / "test"), "-q", "-k", "mine", named]
        done = subprocess.run(script, cwd=elsewhere, capture_output=True, text=True, timeout=120)
        if named.startswith("tests"):
            assert "not found: " + str(CHECKOUT / named) in done.stdout + done.stderr, done.stdout
        else:
            assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
