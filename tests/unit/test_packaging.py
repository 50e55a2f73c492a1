"""Versions, and what the pages say of installing."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from click.testing import CliRunner

import vmbus
from vmbus.cli import main
from vmbus.cli.versions import formats

CHECKOUT = Path(__file__).resolve().parents[2]


def test_packaging_the_version_names_every_format() -> None:
    """As the page does, which says what becomes of each."""
    said = CliRunner().invoke(main, ["--version"])
    assert said.exit_code == 0 and said.output.startswith(f"vmbus {vmbus.__version__}\n")
    for name, written, read in formats():
        assert re.search(rf"^{name} +{re.escape(written)} +reads {re.escape(read)}$", said.output, re.MULTILINE)
    page = (CHECKOUT / "docs/compatibility.md").read_text()
    rows = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in page.splitlines() if line[:2] == "| "]
    assert rows[2:] == [tuple(one) for one in formats()]


def test_packaging_the_version_is_told_once() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert project["version"] == vmbus.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", vmbus.__version__), "semantic versioning"
