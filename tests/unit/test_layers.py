"""The test run's own promise: with `--all-layers` nothing is left out unnoticed, and one thing only is excused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

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


def outcome(folder: Path, tests: str) -> tuple[int, str]:
    (folder / "conftest.py").write_bytes(CONFTEST.read_bytes())
    (folder / "test_it.py").write_text(TESTS + tests)
    markers = "\n".join(f"    {name}: x" for name in ("unit", "loopback", "browser", "vm", "needs_migration_v2"))
    (folder / "pytest.ini").write_text(f"[pytest]\nmarkers =\n{markers}\naddopts = --strict-markers\n")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--all-layers", "-q", str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
        cwd=folder,
    )
    return result.returncode, result.stdout + result.stderr


def test_a_library_without_migration_v2_is_excused_and_said(tmp_path: Path) -> None:
    code, text = outcome(tmp_path, EXCUSED)
    assert code == 0, text
    assert "1 tests left out: the installed libvfio-user has no migration v2 (it is a library for this test)" in text
    assert "NOT COMPLETE" not in text


@pytest.mark.parametrize(
    "tests", [OTHER_REASON, WITHOUT_THE_MARKER, EXCUSED + WITHOUT_THE_MARKER.replace("test_m", "test_n")]
)
def test_every_other_skip_makes_the_run_fail(tmp_path: Path, tests: str) -> None:
    code, text = outcome(tmp_path, tests)
    assert code == 1, text
    assert "NOT COMPLETE: 1 tests of layer loopback were skipped" in text
