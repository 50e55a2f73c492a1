"""What a campaign is expected to keep: budgets, an earlier campaign, and how continuous integration reads of them."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from support.soak_records import ENVIRONMENT, Folder, episode, everywhere, operation, whole_campaign
from vmbus.cli import main
from vmbus.soak import expected, report
from vmbus.soak.expected import Budget, Expected, load_baseline
from vmbus.soak.junit import junit_xml
from vmbus.soak.measures import MEASURES, parse, quantile, value_of
from vmbus.soak.records import WorkloadRecord


def run(folder: Path, *arguments: str) -> Any:
    return CliRunner().invoke(main, ["soak", "--report-only", "--report", str(folder), *arguments])


def campaign(path: Path, downtimes: dict[str, list[float]], state: str = "finished", **more: Any) -> Path:
    """Of one episode that passed, with operations of these kinds."""
    folder = Folder(path, state, **more)
    records = [operation(0, 0, kind, downtime=one, seconds=2 * one) for kind, some in downtimes.items() for one in some]
    for number, record in enumerate(records):
        record.number = number
    folder.add(*records, episode(0, operations=len(records)))
    return path


TWO = {"migrate": [0.1] * 19 + [0.3], "kill": [2.0, 4.0]}


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "value", "kept"),
    [
        (["--max-downtime", "4s"], 4.0, True),
        (["--max-downtime", "3999ms"], 4.0, False),
        (["--max-downtime", "migrate=300ms"], 0.3, True),
        (["--max-downtime-p50", "migrate=0.1"], 0.1, True),
        (["--max-downtime-p95", "migrate=105ms"], 0.11, False),
        (["--max-duration-p95", "kill=8"], 7.8, True),
        (["--max-save-p95", "1m"], None, False),  # nothing of it was measured: a check that cannot fail is none
        (["--max-state-p95", "4k"], None, False),
        (["--min-operations", "22"], 22, True),
        (["--min-operations", "kill=3"], 2, False),
        (["--min-throughput", "40"], 40.0, True),
        (["--min-throughput", "41"], 40.0, False),
    ],
)
def test_a_budget_fails_a_campaign_or_not(tmp_path: Path, words: list[str], value: float | None, kept: bool) -> None:
    campaign(tmp_path, TWO)
    result = run(tmp_path, *words)
    (one,) = report.build(tmp_path).budgets
    assert (one.value, one.kept) == (None if value is None else pytest.approx(value), kept), result.output
    assert result.exit_code == (0 if kept else 1)
    assert ("BROKEN  " in result.output) != kept
    assert run(tmp_path).output == result.output, "they stay with the folder, whoever makes its report"


def test_all_budgets_are_judged_and_shown(tmp_path: Path) -> None:
    campaign(tmp_path, TWO)
    result = run(tmp_path, "--max-downtime", "migrate=1s", "--max-downtime", "kill=1s", "--min-operations", "50")
    assert [line for line in result.output.splitlines() if line.startswith("BROKEN")] == [
        "BROKEN  longest downtime of kill: at most 1 s, and it is 4 s",
        "BROKEN  operations that were carried out: at least 50, and it is 22",
    ]
    assert "0 failures, 2 bounds broken\n" in result.output
    page = (tmp_path / "report.html").read_text()
    assert "No packet was lost, but 2 bounds broken." in page
    assert page.count('<tr class="wrong"><th scope="row">') == 2
    run(tmp_path, "--max-downtime", "1m")
    assert report.build(tmp_path).verdict == "passed", "what is said anew replaces all"


def test_an_unfinished_campaign_breaks_none_and_a_failed_one_stays_so(tmp_path: Path) -> None:
    budget = Expected(budgets=[Budget("downtime", 0.001)])
    for state, more, verdict in (("running", {}, "interrupted"), ("finished", {"audit": "broken"}, "failed")):
        folder = Folder(tmp_path / state, state)
        folder.add(operation(downtime=1.0), episode(0, operations=1, **more))
        budget.write(folder.path)
        assert report.build(folder.path).verdict == verdict
    assert report.build(tmp_path / "running").budgets[0].kept is None
    assert len(report.build(tmp_path / "finished").failures) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-downtime", "soon"], "'soon' is no time"),
        (["--max-downtime", "fly=1s"], "there is no operation 'fly'"),
        (["--max-state-p95", "1s"], "'1s' is no size"),
        (["--min-throughput", "kill=1"], "not of a kind of operation"),
        (["--max-growth", "5x", "--compare", "x"], "'5x' is no number"),
        (["--max-growth", "5%"], "needs --compare"),
        (["--compare", "/nowhere"], "cannot read the report to compare with, /nowhere: No such file"),
        (["--compare", __file__], "is no report of a campaign"),
    ],
)
def test_what_is_no_expectation_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    campaign(tmp_path, TWO)
    result = run(tmp_path, *words)
    assert result.exit_code == 2 and message in result.output
    assert not (tmp_path / expected.EXPECTED_FILE).exists()


@pytest.mark.parametrize("content", [b"{", b"\xff", b'{"budgets": [{"measure": "colour", "limit": 1}]}'])
def test_expectations_that_cannot_be_read_are_not_kept(tmp_path: Path, content: bytes) -> None:
    (campaign(tmp_path, TWO) / expected.EXPECTED_FILE).write_bytes(content)
    built = report.build(tmp_path)
    assert built.verdict == "interrupted" and "what the campaign is to keep cannot be read" in built.missing[0]


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=40).map(sorted), st.integers(1, 19))
def test_quantiles_are_those_of_the_library(values: list[float], twentieth: int) -> None:
    assert quantile(values, twentieth / 20) == pytest.approx(
        statistics.quantiles(values, n=20, method="inclusive")[twentieth - 1]
    )


def test_units() -> None:
    assert [parse(text, "time") for text in ("90", "200ms", "1.5s", "20m", "8h", "1d")] == [
        90,
        0.2,
        1.5,
        1200,
        28800,
        86400,
    ]
    assert [parse(text, "size") for text in ("10", "3k", "1.5m", "2g")] == [10, 3 << 10, 3 << 19, 2 << 30]


def test_every_measure_has_a_value_of_a_whole_campaign(tmp_path: Path) -> None:
    whole_campaign(tmp_path, 60)
    built = report.build(tmp_path)
    assert all((value_of(built, name) or 0) > 0 for name in MEASURES)


# --- an earlier campaign ---------------------------------------------------------------------------------------------


def test_a_growth_since_an_earlier_campaign_fails_this_one(tmp_path: Path) -> None:
    before = campaign(tmp_path / "before", {"migrate": [0.1] * 9, "kill": [2.0] * 7, "pause": [0.001] * 9})
    after = campaign(tmp_path / "after", {"migrate": [0.126] * 9, "kill": [9.0] * 9, "pause": [0.005] * 9})
    assert run(before).exit_code == 0  # writes the report that is compared with
    assert run(after, "--compare", str(before)).exit_code == 0, "shown only"
    result = run(after, "--compare", str(before / "report.json"), "--max-growth", "25%")
    assert result.exit_code == 1
    # Neither what was done too rarely to tell, nor what is within the scatter of a clock.
    assert [line for line in result.output.splitlines() if line.startswith("BROKEN")] == [
        "BROKEN  median downtime of migrate: 100 ms before, 126 ms now (+26 %)",
        "BROKEN  median duration of migrate: 200 ms before, 252 ms now (+26 %)",
    ]
    assert run(after, "--compare", str(before), "--max-growth", "27").exit_code == 0
    page = (after / "report.html").read_text()
    assert "100 ms → 126 ms (+26 %)" in page and "Beside an earlier campaign" in page
    (before / "report.json").unlink()
    assert run(after).exit_code == 0, "its figures are kept with the folder"


def test_what_else_is_different_is_said(tmp_path: Path) -> None:
    campaign(tmp_path / "a", TWO)
    run(tmp_path / "a")
    campaign(tmp_path / "b", {"kill": [1.0]}, environment={**ENVIRONMENT, "accelerator": "kvm"})
    run(tmp_path / "b", "--compare", str(tmp_path / "a"))
    comparison = report.build(tmp_path / "b").comparison
    assert comparison is not None and comparison.differences == ["accelerator was tcg, and is kvm"]
    assert {one.kind for one in comparison.changes} == {"kill"}
    assert load_baseline(Path("docs/examples/soak")).seed == 20, (
        "a report of before there was this can be compared with"
    )


# --- JUnit -----------------------------------------------------------------------------------------------------------


def test_continuous_integration_reads_all_of_it(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "interrupted")
    lost = WorkloadRecord(driver="burst", verdict="failed", lost=3)
    folder.add(episode(0), episode(1, "failed", workloads=[lost], kept="failures/00001"), episode(2, "interrupted"))
    folder.add(operation(7, 0, outcome="failed", message="boom"))
    Expected(budgets=[Budget("downtime", 1.0, "kill")]).write(tmp_path)
    report.write(tmp_path)
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()[0]
    cases = {one.get("name"): one for one in suite.findall("testcase")}
    assert list(cases) == [
        *("episode 0", "episode 1", "episode 2", "episode 7"),
        "longest downtime of kill: at most 1 s",
        "the campaign",
    ]
    assert {name: [child.tag for child in one] for name, one in cases.items() if len(one)} == {
        "episode 1": ["failure"],
        "episode 2": ["skipped"],
        "episode 7": ["failure"],
        "longest downtime of kill: at most 1 s": ["skipped"],
    }
    assert [suite.get(name) for name in ("tests", "failures", "skipped", "errors")] == ["6", "2", "2", "0"]
    text = cases["episode 1"][0].text or ""
    assert "--seed 7" in text and "--episode 1" in text and "failures/00001" in text
    assert "without an end" in suite.findtext("system-err", "")


def test_broken_expectations_are_failures_there(tmp_path: Path) -> None:
    before = campaign(tmp_path / "before", {"migrate": [0.1] * 9})
    run(before)
    campaign(tmp_path / "after", {"migrate": [0.9] * 9})
    run(
        tmp_path / "after",
        "--compare",
        str(before),
        "--max-growth",
        "10",
        "--max-downtime",
        "0.5",
        "--min-operations",
        "1",
    )
    cases = ElementTree.parse(tmp_path / "after" / "junit.xml").getroot().iter("testcase")
    assert [one.get("classname") for one in cases if one.find("failure") is not None] == [
        "soak.budgets",
        "soak.comparison",
    ]


@given(st.text(st.characters(), min_size=1, max_size=60))
def test_any_text_is_only_text(text: str) -> None:
    suite = ElementTree.fromstring(junit_xml(everywhere(text)))[0]
    assert [one.tag for one in suite] == ["properties", *["testcase"] * 4, "system-err"]
