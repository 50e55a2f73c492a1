"""What `new-provider` makes, in a real server: its own test passes, and a restore has to be allowed by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import pace
from vmbus.cli.new_provider import create
from vmbus.errors import UsageError
from vmbus.providers.loading import ALLOW_VARIABLE, PATH_VARIABLE
from vmbus.testkit.loopback.restoring import run_driver
from vmbus.transport.library import ENVIRONMENT_VARIABLE, Library
from vmbus.vm.description import load_description

KIND = "door_bell:DoorBell"


def test_the_test_that_is_made_passes(libvfio_user: Library, tmp_path: Path) -> None:
    create("door_bell", tmp_path)
    test = tmp_path / "test_door_bell_device.py"
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "vmbus.pytest_plugin", "-p", "no:cacheprovider"),
            *("-W", "error", "-k", "without_a_vm or kit or vmbus_loopback", str(test)),
        ],
        env={**os.environ, "PYTHONPATH": path, ENVIRONMENT_VARIABLE: str(libvfio_user.path)},
        capture_output=True,
        text=True,
        timeout=pace.seconds(60),
    )
    assert done.returncode == 0 and "3 passed, 2 deselected" in done.stdout, done.stdout + done.stderr


def test_a_restore_imports_what_the_owner_has_named(
    libvfio_user: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create("door_bell", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path))
    monkeypatch.delenv(ALLOW_VARIABLE, raising=False)
    device = load_description(tmp_path / "door_bell.toml").device
    driver = tmp_path / "door_bell_driver.py"
    with pytest.raises(UsageError, match=f"a snapshot may not choose the code that runs.*{ALLOW_VARIABLE}={KIND}"):
        run_driver(driver, device, libvfio_user, saves=[10])
    monkeypatch.setenv(ALLOW_VARIABLE, KIND)
    assert run_driver(driver, device, libvfio_user, saves=[10])["verdict"] == "passed"
