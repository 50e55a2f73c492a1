"""The workflow file of docs/soak.md: it is YAML, its shell is right, and what it calls exists."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from vmbus.cli import main
from vmbus.soak import report

CHECKOUT = Path(__file__).resolve().parents[2]
WORKFLOW = CHECKOUT / "docs" / "examples" / "soak" / "soak.yml"


def steps(text: str | None = None) -> list[dict[str, Any]]:
    document = yaml.safe_load(text or WORKFLOW.read_text())
    found: list[dict[str, Any]] = document["jobs"]["soak"]["steps"]
    assert all(("run" in one) != ("uses" in one) for one in found)
    return found


def words_of(script: str, folder: Path, **environment: str) -> list[str]:
    """What the campaign's step would run: the shell is asked, with a program in the place of scripts/soak."""
    (folder / "scripts").mkdir(exist_ok=True)
    say = folder / "scripts" / "soak"
    say.write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done\n')
    say.chmod(0o755)
    run = subprocess.run(
        ["bash", "-e", "-c", script], cwd=folder, env={**os.environ, **environment}, capture_output=True, check=True
    )
    assert (folder / "soak.log").read_bytes() == run.stdout
    return run.stdout.decode().splitlines()


@pytest.mark.parametrize(("schedule", "baseline"), [(False, False), (True, True)])
def test_the_campaign_of_the_workflow_is_one(tmp_path: Path, schedule: bool, baseline: bool) -> None:
    (step,) = (one for one in steps() if one.get("name") == "campaign")
    file = tmp_path / "mine.toml"
    file.write_text("per_episode = 3\n")
    if baseline:
        (tmp_path / "baseline").mkdir()
        (tmp_path / "baseline" / "report.json").write_bytes((WORKFLOW.parent / "report.json").read_bytes())
    words = words_of(step["run"], tmp_path, TIME="20m", SCHEDULE=str(file) if schedule else "")
    assert ("--compare" in words) == baseline and ("--schedule" in words) == schedule
    words = [str(tmp_path / word) if word.startswith("baseline/") else word for word in words]
    result = CliRunner().invoke(main, ["soak", *words, "--plan", "--set", "linux=0"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output.splitlines()[0])
    assert len(plan["operations"]) == (3 if schedule else 12)


def test_what_it_names_exists() -> None:
    text = WORKFLOW.read_text()
    names = re.findall(r"scripts/([\w-]+)", text)
    assert {"setup", "soak"} <= set(names)
    assert all(os.access(CHECKOUT / "scripts" / name, os.X_OK) for name in names)
    for one in steps():
        subprocess.run(["bash", "-n", "-c", one.get("run", "")], check=True)
    folders = re.findall(r"'([^'*]+?)(?:/\*\*)?'", re.findall(r"hashFiles\((.*)\)", text)[0])
    assert folders and all((CHECKOUT / name).exists() for name in folders)
    assert f"soak/{report.JSON_NAME}" in text
    # Actions are those of GitHub, images have no host: it works wherever the project is copied to.
    assert all(re.fullmatch(r"actions/[\w/-]+@v\d+", one["uses"]) for one in steps() if "uses" in one)
    assert "://" not in text


@pytest.mark.parametrize(
    ("before", "after"), [("--for", "--fro"), ("-p95 20s", "-p95 pauses=20s"), ("  steps:", "   steps:")]
)
def test_sabotage_a_workflow_that_is_wrong_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    changed = tmp_path / "soak.yml"
    changed.write_text(WORKFLOW.read_text().replace(before, after, 1))
    monkeypatch.setattr(f"{__name__}.WORKFLOW", changed)
    with pytest.raises((AssertionError, yaml.YAMLError)):
        test_the_campaign_of_the_workflow_is_one(tmp_path, False, False)
