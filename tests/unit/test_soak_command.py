"""The command `soak`: what it refuses before it begins, its exit statuses, its views, the commands that it prints."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from support.soak_records import Folder, episode, operation
from vmbus.cli import main
from vmbus.cli.soak import CANNOT, FAILED, INTERRUPTED, PASSED
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.soak.progress import Goal, LiveView
from vmbus.soak.records import EpisodeRecord, EventRecord, OperationRecord, Sample, WorkloadRecord
from vmbus.soak.replay import campaign_command, parse_words, replay_command, words
from vmbus.soak.settings import Settings, settings_from


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["soak", *arguments])


def test_the_statuses_are_what_the_docs_say() -> None:
    assert (PASSED, FAILED, CANNOT, INTERRUPTED) == (0, 1, 2, 3)


def test_a_debian_is_made_before_the_first_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its making has minutes, an episode's worker that says nothing has not; and where it cannot be made, the campaign
    does not begin."""

    def none() -> None:
        raise EnvironmentProblem("no Debian here")

    monkeypatch.setattr("vmbus.cli.soak.provision_debian", none)
    monkeypatch.setattr("vmbus.cli.soak.provision", lambda: pytest.fail("the work began"))
    workload = '[{"name": "x", "command": ["/bin/true"]}]'
    words = ("--set", "description=debian", "--set", f"workload={workload}", "--report", str(tmp_path / "out"))
    result = run(*words)
    assert result.exit_code == CANNOT and "no Debian here" in result.output, result.output
    assert not (tmp_path / "out").exists()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("operations = ", "not TOML"),
        ("operations = 0\n", "operations"),
        ("operations = 5\nseconds = 5.0\n", "both given"),
        ("colour = 'red'\n", "colour"),
        ("[weights]\nfly = 1\n", "fly"),
        ("[weights]\npause = -1\n", "'weights[...]': Expected `float` >= 0.0"),
        ("[workloads]\nfly = 1\n", "there is no workload 'fly'"),
        ("[[script]]\nkind = 'fly'\n", "fly"),
        ("\x00", "not TOML"),
    ],
)
def test_a_schedule_with_errors_begins_nothing(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "night.toml"
    file.write_text(text)
    result = run("--schedule", str(file), "--report", str(tmp_path / "out"))
    assert result.exit_code == CANNOT
    assert result.output.startswith(f"error: {file}: ") and message in result.output
    assert result.output.count("\n") == 1 and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "/nowhere.toml"], "cannot read schedule /nowhere.toml: No such file or directory"),
        (["--set", "weights"], "--set 'weights' is not of the form KEY=VALUE"),
        (["--set", "weights..x=1"], "is not of the form KEY=VALUE"),
        (["--set", "colour=red"], "settings: "),
        (["--operations", "5", "--for", "5m"], "exclude each other"),
        (["--operations", "5", "--episode", "1"], "there is no episode 1: the campaign has 1 of them, from 0"),
        (["--report-only"], "which campaign? name its folder with --report DIR"),
        (["--resume"], "which campaign?"),
        (["--resume", "--seed", "5", "--report", "x"], "--resume takes the settings of the folder"),
        (["--resume", "--report", "/nowhere"], "/nowhere is no folder of a campaign"),
        (["--report-only", "--report", "/nowhere"], "/nowhere is no folder of a campaign"),
    ],
)
def test_usage_is_told_in_one_line(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == CANNOT
    assert result.output.startswith("error: ") and message in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize("text", ["5x", "", "-1", "m"])
def test_a_time_that_is_none(text: str) -> None:
    result = run("--for", text)
    assert result.exit_code == CANNOT and "is no time, such as 90, 200ms, 20m or 8h" in result.output


def test_a_folder_of_another_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "campaign.json").write_text('{"format": 7}')
    for arguments in (["--seed", "1"], ["--resume"], ["--report-only"], []):
        result = run("--report", str(tmp_path), *arguments)
        assert result.exit_code == CANNOT
        assert "holds a campaign of format 7, this version reads and writes 1" in result.output
    assert [one.name for one in tmp_path.iterdir() if one.name != "lock"] == ["campaign.json"]


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_the_same_seed_is_the_same_schedule(tmp_path: Path) -> None:
    first = run("--plan", "--seed", "5", "--operations", "30")
    assert first.exit_code == 0
    assert run("--plan", "--seed", "5", "--operations", "30").output == first.output
    assert run("--plan", "--seed", "6", "--operations", "30").output != first.output
    plans = [json.loads(line) for line in first.output.splitlines()]
    assert sum(len(plan["operations"]) for plan in plans) == 30
    alone = run("--plan", "--seed", "5", "--operations", "30", "--episode", "2")
    assert json.loads(alone.output) == plans[2]
    timed = run("--plan", "--seed", "5", "--for", "20m")
    assert len(timed.output.splitlines()) == 10


def test_the_command_line_goes_over_the_schedule_file(tmp_path: Path) -> None:
    file = tmp_path / "night.json"
    file.write_text(json.dumps({"seed": 4, "seconds": 60, "per_episode": 3, "weights": {"pause": 5}}))
    plans = run("--plan", "--schedule", str(file), "--operations", "7", "--set", "weights.clone=0").output.splitlines()
    assert [len(json.loads(plan)["operations"]) for plan in plans] == [3, 3, 1]
    wanted = run("--plan", "--seed", "4", "--operations", "7", "--set", "per_episode=3", "--set", "weights.pause=5",
                 "--set", "weights.clone=0").output.splitlines()  # fmt: skip
    assert plans == wanted


# --- the commands that replay -----------------------------------------------------------------------------------------

KEYS = st.sampled_from(["pause", "clone", "migrate", "kill"])
TEXT = st.text(max_size=8)
SETTINGS = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**63 - 1)},
    optional={
        "operations": st.none() | st.integers(1, 10_000_000),
        "weights": st.dictionaries(KEYS, st.floats(0, 1e6), max_size=3),
        "workloads": st.dictionaries(st.just("bulk"), st.floats(0, 1)),
        "audit": st.booleans(),
        "packets": st.integers(1, 4096),
        "linux": st.floats(0, 1),
        "sabotage": st.sampled_from(["", "lose-one-in-a-thousand", "disk-loses-a-block"]),
        "script": st.lists(
            st.fixed_dictionaries(
                {"kind": KEYS},
                optional={"parameters": st.dictionaries(TEXT, TEXT | st.integers(-5, 5) | st.booleans(), max_size=2)},
            ),
            max_size=2,
        ),
    },
)


@given(SETTINGS, st.integers(0, 10**6))
def test_the_printed_command_says_the_same_settings(values: dict[str, Any], episode: int) -> None:
    settings = settings_from(values, "drawn")
    command = shlex.split(replay_command(msgspec.to_builtins(settings), episode, Path("/x/soak-1")))
    assert command[0] == "scripts/soak"
    assert command[-4:] == ["--episode", str(episode), "--report", f"soak-1-episode-{episode}"]
    said: dict[str, Any] = {}
    assignments = []
    for option, value in zip(command[1:-4:2], command[2:-4:2], strict=True):
        if option == "--set":
            assignments.append(value)
        else:
            said[option.removeprefix("--")] = json.loads(value)
    assert settings_from(parse_words(said, assignments), "said") == settings


def test_the_command_is_short_when_nothing_is_special() -> None:
    plain = msgspec.to_builtins(Settings(seed=7, operations=500, weights={"clone": 0.0}, audit=False))
    assert replay_command(plain, 17, Path("night")) == (
        "scripts/soak --seed 7 --operations 500 --set weights.clone=0.0 --set audit=false --episode 17 "
        "--report night-episode-17"
    )
    assert campaign_command(msgspec.to_builtins(Settings(seed=7)), Path("night")) == (
        "scripts/soak --seed 7 --report night-again"
    )
    assert words(msgspec.to_builtins(Settings(seconds=60.0))) == ["--seed", "1", "--seconds", "60.0"]


def test_words_lead_into_tables() -> None:
    assert parse_words({"a": 1}, ["b.c=2", "b.d=x", 'e="5"', "a=[1]"]) == {
        "a": [1],
        "b": {"c": 2, "d": "x"},
        "e": "5",
    }
    with pytest.raises(UsageError):
        parse_words({}, ["=5"])


# --- reports ----------------------------------------------------------------------------------------------------------


def test_the_report_alone_and_its_status(tmp_path: Path) -> None:
    named: dict[str, Any] = {"seed": 9, "settings": {"seed": 9, "operations": 24}}
    good = [operation(0), episode(0, operations=1), operation(1), episode(1, operations=1)]
    Folder(tmp_path / "good", **named).add(*good)
    result = run("--report-only", "--report", str(tmp_path / "good"))
    assert result.exit_code == PASSED, result.output
    assert result.output.startswith("PASSED  seed 9: 2 operations in ")
    assert result.output.splitlines()[-1] == f"report: {tmp_path}/good/report.html"
    report = json.loads((tmp_path / "good" / "report.json").read_bytes())
    assert (report["verdict"], report["seed"], report["operations"], report["packets"]) == ("passed", 9, 2, 240)
    assert report["failures"] == []

    bad = episode(1, "failed", failure="a packet was lost", kept="failures/00001")
    Folder(tmp_path / "bad", **named).add(*good[:2], bad)
    result = run("--report-only", "--report", str(tmp_path / "bad"))
    assert result.exit_code == FAILED
    assert result.output.splitlines()[:3] == [
        "FAILED  episode 1: a packet was lost",
        f"        kept:   {tmp_path}/bad/failures/00001",
        "        replay: scripts/soak --seed 9 --operations 24 --episode 1 --report bad-episode-1",
    ]
    Folder(tmp_path / "killed", "running").add(*good)
    assert run("--report-only", "--report", str(tmp_path / "killed")).exit_code == INTERRUPTED


# --- the views --------------------------------------------------------------------------------------------------------


def test_the_live_view() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=110, markup=False, emoji=False)
    with LiveView(console, "soak: seed 1", "dir", Goal(100)) as view:
        view.started(4)
        view.phase(4, "[bold]migrate")
        view.sample(4, Sample(at=1.0, transactions=5000, in_flight={"queued": 512, "held": 32}))
        for downtime in (0.5, 1.5):
            view.operation(
                OperationRecord(
                    episode=4, number=0, kind="migrate", outcome="done", at=1.0, seconds=3.0, downtime=downtime,
                    packets={"queued": 500},
                )
            )  # fmt: skip
        view.event(EventRecord(episode=4, at=1.0, text="the VM is up"))
        shown = Console(file=io.StringIO(), width=110, markup=False, emoji=False)
        shown.print(view.render())
        text = shown.file.getvalue()  # type: ignore[attr-defined]
        failed = EpisodeRecord(
            episode=4, seed=1, verdict="failed", started="", seconds=9.0, failure="lost [one]", kept="failures/00004",
            workloads=[WorkloadRecord(driver="echo", verdict="failed")],
        )  # fmt: skip
        view.ended(failed, "scripts/soak --episode 4")
    for part in (
        "operations done  2 of 100",
        "packets in flight  512 queued, 32 held",
        "downtime so far  1.00 s on average, 1.50 s at most, 2.0 s in all",
        "[bold]migrate",
        "episode 4: the VM is up",
        "Ctrl-C ends it",
    ):
        assert part in text, text
    assert "FAILED  episode 4: lost [one]" in output.getvalue()
    assert "replay: scripts/soak --episode 4" in output.getvalue()
    assert view.failed == 1 and not view.running


def test_fault_t9_an_authors_provider_is_in_a_campaigns_machine(tmp_path: Path) -> None:
    """Its kind as in a description of the author's; a plan imports nothing of it."""
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\n[device]\nname = "vmbus0"\n[[device.providers]]\nkind = "door_bell:DoorBell"\nname = "bell"\n'
        'instance = "0d5c1c0e-8f3f-4f0e-9a57-1f5f6a8f2b01"\n'
    )
    result = run("--plan", "--seed", "3", "--operations", "5", "--set", f"description={tmp_path / 'mine.toml'}")
    assert result.exit_code == 0, result.output
    kinds = [one["kind"] for one in json.loads(result.output.splitlines()[0])["vm"]["device"]["providers"]]
    assert "door_bell:DoorBell" in kinds and {"echo", "burst"} <= set(kinds)
