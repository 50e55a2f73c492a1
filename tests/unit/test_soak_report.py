"""The report of a campaign: what it says, what it makes of damaged records, and that no text in it can do anything."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
import time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from support.soak_records import Folder, episode, everywhere, operation, whole_campaign
from vmbus.errors import UsageError
from vmbus.soak import html, plots, report, svg
from vmbus.soak.records import (
    CAMPAIGN,
    EventRecord,
    OperationRecord,
    Report,
    Sample,
    WorkloadRecord,
)
from vmbus.soak.text import byte_text, clean, seconds_text

# --- what it says ----------------------------------------------------------------------------------------------------


def test_a_whole_campaign(tmp_path: Path) -> None:
    whole_campaign(tmp_path, operations=60)
    built = report.build(tmp_path)
    assert (built.verdict, built.seed, built.operations, built.failures) == ("passed", 7, 60, [])
    assert len(built.episode_records) == built.episodes_planned == 8
    assert built.packets == sum(sum(one.packets.values()) for one in built.operation_records)
    assert built.transactions == sum(one.transactions for two in built.episode_records for one in two.workloads)
    assert sum(sum(count.values()) for count in built.by_kind.values()) == 60
    assert built.by_kind["migrate"]["done"] > 0 and built.by_kind["sabotaged_migration"]["refused"] > 0
    assert (built.seconds, built.missing) == (1200.0, [])
    assert built.environment.qemu == "11.1.3"
    assert "--seed 7" in built.command


def test_a_failure_says_how_to_see_it_again(tmp_path: Path) -> None:
    whole_campaign(tmp_path, operations=60, failures=2)
    built = report.build(tmp_path)
    assert built.verdict == "failed"
    assert [one.episode for one in built.failures] == [1, 4]
    assert "--episode 4" in built.failures[1].replay and "--seed 7" in built.failures[1].replay
    assert built.failures[0].kept == "failures/00001"
    assert "40213 was lost" in built.failures[0].message
    assert built.operations == 58, "those that failed are not carried out"
    page = html.render(built)
    for text in ("Failed", built.failures[0].message, "failures/00004"):
        assert text in page
    assert page.index("40213 was lost") < page.index("Operations by kind") < page.index("All operations")


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    whole_campaign(tmp_path, operations=20, failures=1)
    written = report.write(tmp_path)
    text = (tmp_path / "report.json").read_bytes()
    assert msgspec.json.decode(text, type=Report) == written
    plain = msgspec.json.decode(text)
    assert {"verdict", "seed", "operations", "packets", "failures"} <= plain.keys()
    assert plain["operation_records"][0]["episode"] == 0
    for name in ("report.json", "report.html"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "report.html").read_text() == html.render(written)


def test_a_report_that_cannot_be_written_leaves_the_last_one(tmp_path: Path) -> None:
    folder = whole_campaign(tmp_path, operations=8)
    report.write(tmp_path)
    before = (tmp_path / "report.json").read_bytes()
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    folder.add(episode(1))
    with pytest.raises(OSError):
        report.write(tmp_path)
    assert len(before) > 0 and msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=Report)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


# --- verdicts --------------------------------------------------------------------------------------------------------


LOST = WorkloadRecord(driver="burst", verdict="failed", transactions=9, lost=3)
UNENDED = WorkloadRecord(driver="burst", verdict="none")


@pytest.mark.parametrize(
    ("state", "records", "verdict", "message"),
    [
        ("finished", [episode(0)], "passed", ""),
        ("running", [episode(0)], "interrupted", ""),
        ("interrupted", [episode(0)], "interrupted", ""),
        ("finished", [], "interrupted", ""),
        ("finished", [episode(0, "interrupted")], "interrupted", ""),
        ("finished", [episode(0), episode(1, "interrupted")], "passed", ""),
        ("finished", [episode(0, "interrupted"), episode(0)], "passed", ""),
        ("running", [episode(0), episode(1, "failed", failure="the guest hung")], "failed", "the guest hung"),
        ("finished", [episode(0, "failed", failure="it broke"), episode(0)], "failed", "it broke"),
        ("finished", [episode(0), episode(0, "failed", failure="it broke")], "failed", "it broke"),
        ("finished", [episode(0, "failed")], "failed", "nothing says why"),
        # An episode that says it passed has to mean it.
        ("finished", [episode(0, audit="broken")], "failed", "the auditor"),
        ("finished", [episode(0, workloads=[LOST])], "failed", "burst: 3 lost"),
        ("finished", [episode(0, workloads=[UNENDED])], "failed", "burst did not come to its end"),
        ("finished", [episode(0), episode(1, "interrupted", workloads=[UNENDED])], "passed", ""),
        ("finished", [episode(0), episode(1, "interrupted", workloads=[LOST])], "failed", "burst: 3 lost"),
        ("finished", [episode(0), operation(0, 0, outcome="failed", message="boom")], "failed", "migrate: boom"),
        ("running", [episode(0), operation(5, 2, outcome="failed", message="boom")], "failed", "operation 2, migrate"),
        ("finished", [episode(0), operation(0, 0, outcome="refused")], "passed", ""),
    ],
)
def test_verdicts(tmp_path: Path, state: str, records: list[Any], verdict: str, message: str) -> None:
    Folder(tmp_path, state).add(*records)
    built = report.build(tmp_path)
    assert built.verdict == verdict
    assert message in (built.failures[0].message if built.failures else "")
    assert bool(built.failures) == (verdict == "failed")


def test_an_episode_that_was_run_again_counts_once(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.add(operation(0, 0, packets={"sent": 1}), operation(0, 1, packets={"sent": 1}))  # cut off here
    folder.add(*(operation(0, number, packets={"sent": 10}) for number in range(3)))
    folder.add(episode(0, operations=3))
    built = report.build(tmp_path)
    assert (built.operations, built.packets, built.missing) == (3, 30, [])


def test_operations_without_an_end_are_not_counted(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "interrupted")
    folder.add(operation(0), operation(1, 0), operation(1, 1), episode(0, operations=1))
    built = report.build(tmp_path)
    assert (built.operations, built.verdict) == (1, "interrupted")
    assert built.missing == [
        "2 operations of 1 episodes without an end (1) are not counted: these episodes will be run again when the "
        "campaign is gone on with"
    ]


# --- damage ----------------------------------------------------------------------------------------------------------


def test_torn_and_foreign_lines_are_left_out_and_named(tmp_path: Path) -> None:
    folder = whole_campaign(tmp_path, operations=24)
    whole = report.build(tmp_path)
    path = folder.path / "operations.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = b"\x00\xff\xfe rubbish\n"
    lines[5] = b'{"episode": "one"}\n'
    path.write_bytes(b"".join(lines)[:-40])
    built = report.build(tmp_path)
    assert len(built.operation_records) == 21
    assert built.verdict == "passed", "the verdict rests on the episodes"
    assert [text.split(";")[0] for text in built.missing] == [
        "operations.jsonl: 3 of 24 lines could not be read",
        "operations.jsonl: the records of 3 operations of 2 episodes",
    ]
    assert built.missing[0].split("; ")[1].startswith("line 4 ")
    assert built.transactions == whole.transactions
    assert built.missing[0] in html.render(built)


@pytest.mark.parametrize("name", ["operations.jsonl", "events.jsonl", "episodes.jsonl", "state.json"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    folder = whole_campaign(tmp_path, operations=8)
    (folder.path / name).unlink()
    built = report.build(tmp_path)
    assert any(text.startswith(name) for text in built.missing)
    assert built.verdict == ("passed" if name in ("operations.jsonl", "events.jsonl") else "interrupted")
    html.render(built)


@given(st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_cut_off_or_spoilt_there_is_a_report(tmp_path: Path, data: st.DataObject) -> None:
    folder = whole_campaign(tmp_path, operations=16)
    name = data.draw(st.sampled_from(["operations.jsonl", "events.jsonl", "episodes.jsonl", "state.json"]))
    contents = (folder.path / name).read_bytes()
    place = data.draw(st.integers(0, len(contents) - 1))
    spoilt = data.draw(st.binary(max_size=30))
    keep = data.draw(st.booleans())
    (folder.path / name).write_bytes(contents[:place] + spoilt + (contents[place + len(spoilt) :] if keep else b""))
    built = report.build(tmp_path)
    html.render(built)
    assert msgspec.json.decode(report.encode(built), type=Report) == built


def test_what_the_campaign_could_not_write_is_said(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.add(episode(0))
    folder.state("finished", missing=["3 records, which found no room on the disk"])
    assert report.build(tmp_path).missing == ["3 records, which found no room on the disk"]


def test_no_campaign_and_one_of_another_version(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder of a campaign"):
        report.build(tmp_path)
    Folder(tmp_path, format=99)
    with pytest.raises(UsageError, match="format 99"):
        report.build(tmp_path)


def test_seconds_without_a_state(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.add(episode(0), episode(2, seconds=40.0))
    (tmp_path / "state.json").unlink()
    assert report.build(tmp_path).seconds == 100.0
    folder.add(episode(3, started="yesterday"))
    assert report.build(tmp_path).seconds == 0.0


def test_many_events_are_bounded_and_the_serious_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAXIMUM_EVENTS", 10)
    folder = Folder(tmp_path)
    folder.add(EventRecord(episode=CAMPAIGN, at=0, text="disk full", serious=True))
    folder.add(*(EventRecord(episode=0, at=number, text=f"number {number}") for number in range(30)))
    built = report.build(tmp_path)
    assert [one.text for one in built.events] == ["disk full", *(f"number {number}" for number in range(21, 30))]
    assert built.missing == ["21 older events, which are in events.jsonl"]


# --- foreign text ----------------------------------------------------------------------------------------------------


class Structure(HTMLParser):
    """The elements of a page with their attributes' names, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, ...]] = []
        self.values: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        # Commands are broken at their options: how many pieces there are follows from the text.
        if tag != "span" or attributes:
            self.elements.append((tag, *(name for name, _ in attributes)))
        self.values += [value or "" for name, value in attributes if name in ("href", "src", "style", "action")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


HOSTILE = [
    "<script>alert(1)</script>",
    "</style></script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "<!-- -->]]><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;script&gt; &amp;",
    "\u202egnp.exe \x00\x07\x1b[31m \ud800",
    "javascript:alert(1) -x --y -- z",
]


@functools.cache
def harmless() -> Structure:
    return Structure(html.render(everywhere("x")))


def check_harmless(text: str) -> None:
    """A page has the same elements whatever the text, and shows the text as it is."""
    page = html.render(everywhere(text))
    plain, found = harmless(), Structure(page)
    assert (found.elements == plain.elements) is True  # not compared by pytest: they are long
    assert found.values == ["data:,"] == plain.values
    shown = "".join(found.text)
    assert "".join(clean(text, 300).split()) in "".join(shown.split())
    page.encode()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_only_text(text: str) -> None:
    check_harmless(text)


PIECES = st.sampled_from([*HOSTILE, "<", ">", '"', "'", "&", "/", "=", " ", "\n", "x"])


@given(st.text(st.characters(), min_size=1, max_size=60) | st.lists(PIECES, min_size=1, max_size=8).map("".join))
@settings(max_examples=25, deadline=None)
def test_any_text_is_only_text(text: str) -> None:
    check_harmless(text)


def test_a_page_of_harmless_text_has_all_parts() -> None:
    names = {name for name, *_ in harmless().elements}
    assert {"svg", "table", "pre", "details", "dl", "button"} - names == {"button"}
    page = html.render(everywhere("x"))
    parts = "missing failures budgets comparison summary plots operations episodes events replay environment"
    assert all(page.count(f'<section id="{part}"') == 1 for part in parts.split())
    assert msgspec.json.decode(report.encode(everywhere("x")), type=Report) == everywhere("x")


def test_sabotage_a_page_without_escaping_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = jinja2.Environment

    def careless(**more: Any) -> jinja2.Environment:
        return original(**{**more, "autoescape": False})

    monkeypatch.setattr(jinja2, "Environment", careless)
    html._page.cache_clear()
    try:
        with pytest.raises(AssertionError):
            check_harmless(HOSTILE[0])
    finally:
        html._page.cache_clear()


def test_sabotage_a_plot_without_escaping_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svg, "escape", Markup)
    with pytest.raises(AssertionError):
        check_harmless(HOSTILE[0])


def test_the_policy_names_what_the_page_runs() -> None:
    page = html.render(everywhere("x"))
    assert page.count("<script>") == page.count("<style>") == 1
    (policy,) = re.findall('http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    directives = dict(part.strip().split(" ", 1) for part in unescape(policy).split(";"))
    assert directives["default-src"] == "'none'" and "unsafe" not in policy
    for name in ("style", "script"):
        contents = page.split(f"<{name}>")[1].split(f"</{name}>")[0]
        digest = base64.b64encode(hashlib.sha256(contents.encode()).digest()).decode()
        assert directives[f"{name}-src"] == f"'sha256-{digest}'"
    assert re.findall(r"https?://|url\(|@import", page) == []


# --- size and time ---------------------------------------------------------------------------------------------------


def test_thousands_of_operations_stay_small_and_quick(tmp_path: Path) -> None:
    whole_campaign(tmp_path, operations=4_000, failures=40)
    began = time.process_time()
    built = report.build(tmp_path)
    page = html.render(built)
    spent = time.process_time() - began
    assert len(built.operation_records) == 4_000
    assert len(page) < 2_500_000, len(page)
    assert spent < 15, spent  # one second or so; the bound is for a busy machine
    body = page.split('id="table"')[1].split("</table>")[0]
    assert body.count("<tr") == html.MAXIMUM_OPERATIONS + 1
    assert body.count('<tr class="wrong"') == 40, "what failed is among the rows that are shown"
    assert "All are in report.json" in page


def test_texts_without_end_are_cut() -> None:
    assert len(html.render(everywhere("long " * 100_000))) < 600_000


def test_a_campaign_that_has_not_begun(tmp_path: Path) -> None:
    Folder(tmp_path, "running")
    page = html.render(report.build(tmp_path))
    assert "Interrupted" in page and "No operation has been recorded." in page and "<svg" not in page


# --- plots and figures -----------------------------------------------------------------------------------------------


def test_points_are_thinned_and_what_stands_out_stays() -> None:
    points = [plots.Point(place, 1.0 + (place % 7) / 100, 0, "") for place in range(20_000)]
    points[777] = plots.Point(777, 900.0, 0, "the greatest")
    points[5000] = plots.Point(5000, 0.001, 0, "the least")
    points[9999] = plots.Point(9999, 1.03, 0, "failed", failed=True)
    kept = plots.thinned(points)
    assert len(kept) <= plots.MAXIMUM_POINTS + 2
    assert {"the greatest", "the least", "failed"} <= {point.title for point in kept}
    assert plots.thinned(points[:50]) == points[:50]


@given(st.floats(1e-6, 1e9), st.floats(1.0, 1e6))
def test_ticks_are_within_the_scale_and_few(low: float, factor: float) -> None:
    for logarithmic in (False, True):
        scale = svg.Scale(low, low * factor * 1.7, 0, 100, logarithmic)
        ticks = scale.ticks(5)
        assert len(ticks) <= 11
        assert ticks == sorted(ticks)
        assert all(-1e-6 <= scale(tick) <= 100 + 1e-6 for tick in ticks)


def test_throughput_leaves_out_what_belongs_to_other_operations() -> None:
    samples = [Sample(at=at / 2, transactions=50 * at) for at in range(80)]  # 100 a second
    samples = [one if one.at < 20 else Sample(at=one.at, transactions=one.transactions - 900) for one in samples]
    records = [operation(0, 0, "migrate", at=15.0, seconds=1.0), operation(0, 1, "revert", at=19.0, seconds=1.5)]
    operations = plots.Operations.of(records, [episode(0, samples=samples)])
    curves = {curve.kind: curve for curve in plots.throughput_curves(operations, [episode(0, samples=samples)])}
    migrate = curves["migrate"].points
    assert max(at for at, *_ in migrate) < 4, "the revert at +4 s is none of its business"
    revert = curves["revert"].points
    steady = {(100.0, 100.0, 100.0)}
    assert {point[1:] for point in migrate} == steady
    assert {point[1:] for point in revert} == steady, "going back is no negative throughput, and then there is no leap"
    assert len(plots._runs(revert)) == 2, "nothing is drawn where nothing is known"


@pytest.mark.parametrize(
    "record",
    [
        operation(downtime=0.0, save_seconds=-1.0, memory_bytes=0, state_bytes=-5, packets={"sent": -3}),
        operation(downtime=1e300, save_seconds=1e-300, memory_bytes=1 << 62, packets={"sent": 1 << 60}),
        operation(at=-5.0, seconds=0.0, downtime=0.5, packets={}),
    ],
)
def test_odd_figures_are_drawn_or_left_out(record: OperationRecord) -> None:
    built = everywhere("x")
    built.operation_records = [record]
    page = html.render(built)
    assert "nan" not in page.lower() and "inf " not in page


def test_operations_are_in_the_order_of_time() -> None:
    episodes = [episode(0), episode(1)]  # the second begins 30 s later
    records = [operation(0, 0, at=5), operation(0, 1, at=40), operation(1, 0, at=2)]
    ordered = plots.Operations.of(records, episodes).ordered
    assert [(one.episode, one.number) for one in ordered] == [(0, 0), (1, 0), (0, 1)]


DURATIONS = [(None, "–"), (0, "0 s"), (0.00085, "850 µs"), (0.0125, "12.5 ms"), (0.8304, "830 ms"), (0.9999, "1 s")]
LONGER = [
    (1.234, "1.23 s"),
    (99.96, "100 s"),
    (150, "2 min 30 s"),
    (1200, "20 min"),
    (30_000, "8 h 20 min"),
    (-2, "-2 s"),
]
SIZES = [(None, "–"), (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (155 * 1024, "155 KiB"), (3 << 40, "3 TiB")]


def test_figures_for_people() -> None:
    for show, cases in ((seconds_text, DURATIONS + LONGER), (byte_text, SIZES)):
        assert [(value, show(value)) for value, _ in cases] == cases
