"""The test run's own promise: with `--all-layers` nothing is left out unnoticed, and one thing only is excused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
TESTS = """
import pytest
from conftest import NO_MIGRATION_V2

@pytest.mark.unit
def test_one(): pass

@pytest.mark.browser
def test_in_a_browser(): pass

@pytest.mark.vm
def test_two(): pass

@pytest.mark.loopback
def test_three(): pass

@pytest.fixture
def libvfio_user():
    from types import SimpleNamespace
    return SimpleNamespace(generation=None, description="a library for this test")

"""
EXCUSED = """
@pytest.mark.loopback
@pytest.mark.needs_migration_v2
def test_migration(): raise AssertionError("it was not to run")
"""
OTHER_REASON = """
@pytest.mark.loopback
@pytest.mark.needs_migration_v2
@pytest.mark.skip("no time")
def test_migration(): pass
"""
WITHOUT_THE_MARKER = """
@pytest.mark.loopback
def test_migration(): pytest.skip(NO_MIGRATION_V2)
"""


SEVERAL = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--max-worker-restart", "0")
"""As scripts/test has it for complete runs."""


def outcome(folder: Path, tests: str, *options: str) -> tuple[int, str]:
    (folder / "conftest.py").write_bytes(CONFTEST.read_bytes())
    (folder / "test_it.py").write_text(TESTS + tests)
    markers = "\n".join(
        f"    {name}: x" for name in ("unit", "loopback", "browser", "vm", "long", "needs_migration_v2")
    )
    (folder / "pytest.ini").write_text(f"[pytest]\nmarkers =\n{markers}\naddopts = --strict-markers\n")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--all-layers", "-q", *options, str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
        cwd=folder,
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("options", [(), SEVERAL], ids=["one", "several"])
def test_a_library_without_migration_v2_is_excused_and_said(tmp_path: Path, options: tuple[str, ...]) -> None:
    code, text = outcome(tmp_path, EXCUSED, *options)
    assert code == 0, text
    assert "1 tests left out: the installed libvfio-user has no migration v2 (it is a library for this test)" in text
    assert "NOT COMPLETE" not in text


@pytest.mark.parametrize(
    ("tests", "options"),
    [
        (OTHER_REASON, SEVERAL),
        (WITHOUT_THE_MARKER, ()),
        (EXCUSED + WITHOUT_THE_MARKER.replace("test_m", "test_n"), SEVERAL),
    ],
    ids=["another reason", "no marker", "beside one that is excused"],
)
def test_every_other_skip_makes_the_run_fail(tmp_path: Path, tests: str, options: tuple[str, ...]) -> None:
    code, text = outcome(tmp_path, tests, *options)
    assert code == 1, text
    assert "NOT COMPLETE: 1 tests of layer loopback were skipped" in text


def test_with_several_at_a_time_all_is_told(tmp_path: Path) -> None:
    """Lines for the summary come from the workers, and failures are said at once."""
    (tmp_path / "test_another.py").write_text(
        "import pytest\n"
        "@pytest.mark.unit\ndef test_note(note): note('this was noted')\n"
        "@pytest.mark.loopback\ndef test_wrong(): assert 1 == 2\n"
    )
    code, text = outcome(tmp_path, "", *SEVERAL)
    assert code == 1, text
    assert "this was noted" in text
    assert "FAILED test_another.py::test_wrong (call): assert 1 == 2" in text.partition("= FAILURES =")[0], text
    assert _counts(text) == {"unit": (2, 0), "loopback": (1, 1), "vm": (1, 0)}, text


def test_a_worker_that_dies_ends_the_run_with_a_failure(tmp_path: Path) -> None:
    (tmp_path / "loopback").mkdir()
    (tmp_path / "loopback" / "test_dies.py").write_text(
        "import os, pytest\n@pytest.mark.loopback\ndef test_dies(): os.kill(os.getpid(), 9)\n"
    )
    code, text = outcome(tmp_path, "", *SEVERAL)
    assert code == 1, text
    assert "FAILED loopback/test_dies.py::test_dies" in text and "crashed while running" in text


def test_what_breaks_pytest_itself_in_a_worker_makes_the_run_fail(tmp_path: Path) -> None:
    """xdist alone ends such a run with status 0."""
    hook = "def pytest_runtest_makereport(item): assert item.name != 'test_alone'\n"
    (tmp_path / "breaks.py").write_text(hook)
    (tmp_path / "test_alone.py").write_text("import pytest\n@pytest.mark.unit\ndef test_alone(): pass\n")
    code, text = outcome(tmp_path, "", *SEVERAL, "-p", "breaks")
    assert code == pytest.ExitCode.INTERNAL_ERROR and "INTERNALERROR" in text, text


def test_a_failure_is_told_whatever_is_collected_meanwhile(tmp_path: Path) -> None:
    """Garbage whose end formats a traceback and leaves more of it, and a collector that runs all the time."""
    (tmp_path / "test_garbage.py").write_text(
        "import gc, traceback, pytest\n"
        "class Garbage:\n"
        "    def __init__(self): self.itself = self\n"
        "    def __del__(self):\n"
        "        try: [1][0] + {'x': 'y'}['x']\n"
        "        except TypeError as problem: traceback.format_exception(problem)\n"
        "        Garbage()\n"
        "@pytest.mark.unit\n"
        "def test_wrong():\n"
        "    gc.set_threshold(100)\n"
        "    Garbage()\n"
        "    assert 1 == 2\n" + "OTHER = [(1, 2), (3, 4)]\n" * 1000
    )
    code, text = outcome(tmp_path, "", *SEVERAL)
    assert code == 1, text
    assert "FAILED test_garbage.py::test_wrong (call): assert 1 == 2" in text, text
    assert "INTERNALERROR" not in text, text


FOR_ROOT = """
import pytest
from support.namespace import NotPermitted

@pytest.mark.loopback
def test_namespace():
    try: raise NotPermitted("no namespaces for you")
    except NotPermitted as error: pytest.skip(str(error))

@pytest.mark.vm
def test_mount():
    try: raise PermissionError(1, "cannot mount")
    except OSError as error: pytest.skip(str(error))
"""
OTHERS = """
import os
os.geteuid = lambda: {uid}
"""


def test_fault_n4_what_needs_root_is_excused_for_others_and_said(tmp_path: Path) -> None:
    (tmp_path / "who.py").write_text(OTHERS.format(uid=1000))
    code, text = outcome(tmp_path, FOR_ROOT, *SEVERAL, "-p", "who")
    assert code == 0, text
    assert "root would run 1 tests more: no namespaces for you" in text and "NOT COMPLETE" not in text, text
    assert "root would run 1 tests more: [Errno 1] cannot mount" in text, text


@pytest.mark.parametrize("uid", [0, 1000])
def test_fault_n4_root_leaves_nothing_out_and_others_nothing_else(tmp_path: Path, uid: int) -> None:
    (tmp_path / "who.py").write_text(OTHERS.format(uid=uid))
    code, text = outcome(tmp_path, WITHOUT_THE_MARKER + (FOR_ROOT if uid == 0 else ""), "-p", "who")
    assert code == 1, text
    assert f"NOT COMPLETE: {2 if uid == 0 else 1} tests of layer loopback were skipped" in text, text
    assert "root would run" not in text


def test_bounds_follow_the_machine_and_who_came_close_is_said(tmp_path: Path) -> None:
    """On a machine of half the speed a test may take twice as long; whole tests and single waits are looked at."""
    (tmp_path / "half_speed.py").write_text(
        "from support.pace import PACE\ndef measured(): PACE.factor = 2.0\nPACE.start = PACE.look = measured\n"
    )
    (tmp_path / "test_slow.py").write_text(
        "import time, pytest\nfrom support.pace import until\n"
        "pytestmark = pytest.mark.vm\n"
        "@pytest.mark.timeout(1)\ndef test_whole(): time.sleep(1.2)\n"
        "@pytest.mark.timeout(100)\ndef test_wait():\n"
        "    begun = time.monotonic()\n"
        "    until(lambda: time.monotonic() > begun + 0.6, 'a moment to pass', 0.5)\n"
        "def test_quick(): pass\n"
    )
    code, text = outcome(tmp_path, "", *SEVERAL, "-p", "half_speed")
    assert code == 0, text
    assert "a slow or busy machine: bounds were 2.0 times as long as usual" in text
    said = [line.removeprefix("more than half of a bound: ") for line in text.splitlines() if "half of a" in line]
    assert len(said) == 2, text
    assert any(line.startswith("test_slow.py::test_whole: 1.") and "of 2 s for all of it" in line for line in said)
    assert any(line.startswith("test_slow.py::test_wait: 0.") and "for a moment to pass" in line for line in said)


def _counts(text: str) -> dict[str, tuple[int, int]]:
    """Passed and failed, by layer, as the summary has them."""
    rows = [line.split() for line in text.splitlines() if line.startswith(("unit ", "loopback ", "vm "))]
    return {row[0]: (int(row[1]), int(row[3])) for row in rows}


def test_a_layer_without_a_test_makes_the_run_fail_with_several_at_a_time_too(tmp_path: Path) -> None:
    code, text = outcome(tmp_path, "", *SEVERAL, "-m", "unit or loopback")
    assert code == 1 and "NOT COMPLETE: layer vm passed no test" in text, text


def test_the_long_files_of_a_layer_come_first_but_no_layer_before_a_cheaper_one(tmp_path: Path) -> None:
    for name, marks in {"b": "vm", "c": "vm, pytest.mark.long", "d": "loopback", "e": "unit, pytest.mark.long"}.items():
        (tmp_path / f"test_{name}.py").write_text(
            f"import pytest\npytestmark = [pytest.mark.{marks}]\ndef test(): pass\n"
        )
    code, text = outcome(tmp_path, "", *SEVERAL[:1], "1", *SEVERAL[2:], "-vv")
    assert code == 0, text
    ran = [line.split()[-1].partition("::")[0] for line in text.splitlines() if " PASSED " in line]
    assert list(dict.fromkeys(ran)) == [f"test_{name}.py" for name in ("e", "it", "d", "c", "b")], text
