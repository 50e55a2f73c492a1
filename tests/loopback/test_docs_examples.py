"""The examples in docs/testing.md are run as they stand there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmbus.transport.library import Library

PAGE = Path(__file__).resolve().parents[2] / "docs" / "testing.md"


def examples() -> dict[str, Callable[[Library], None]]:
    found: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(PAGE), "exec"), found)
    return {name: value for name, value in found.items() if name.startswith("test_")}


@pytest.mark.parametrize("name", ["test_one_request_is_answered", "test_a_request_goes_over_a_restore"])
def test_example(name: str, libvfio_user: Library) -> None:
    examples()[name](libvfio_user)


def test_every_example_is_run() -> None:
    assert sorted(examples()) == sorted(["test_one_request_is_answered", "test_a_request_goes_over_a_restore"])
