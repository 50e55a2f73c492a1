"""Tests of an author's own, where the project was installed from a wheel, without a checkout."""

from __future__ import annotations

import re
from pathlib import Path

from support.installed import CHECKOUT, install, run
from vmbus.transport.library import ENVIRONMENT_VARIABLE, Library


def test_fault_n5_the_pages_pytest_example_runs_from_a_wheel(libvfio_user: Library, tmp_path: Path) -> None:
    modules = install(tmp_path / "site-packages")
    page = (CHECKOUT / "docs" / "pytest.md").read_text()
    (example,) = (
        one for one in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE) if "save_restore()" in one
    )
    (tmp_path / "test_mine.py").write_text(example)
    environment = {ENVIRONMENT_VARIABLE: str(libvfio_user.path)}
    done = run(modules, "-m", "pytest", "-q", "-p", "vmbus.pytest_plugin", "test_mine.py", cwd=tmp_path, **environment)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
