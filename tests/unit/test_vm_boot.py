"""Guests of VM tests are saved and restored right after their boot, unless a test says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

VM_TESTS = sorted((Path(__file__).parents[1] / "vm").glob("test_*.py"))


@pytest.mark.parametrize("path", VM_TESTS, ids=[path.name for path in VM_TESTS])
def test_guests_are_saved_and_restored_after_boot_unless_a_reason_is_given(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if "VirtualMachine.launch(" in line:
            assert "# as booted: " in line, f"{path.name}:{number}: use support.boot.boot, or say why not"
