"""The report of a campaign in a real browser: what a reader sees, in any window, light and dark, without network."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from support.browser import Browser, Page
from support.soak_records import Folder, episode, operation, whole_campaign
from vmbus.errors import EnvironmentProblem
from vmbus.provision.chromium import ChromiumProgram
from vmbus.soak import html, report
from vmbus.soak.expected import Budget, Expected, load_baseline
from vmbus.soak.records import EventRecord

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]  # the first test may have to fetch the browser

WINDOWS = {"wide": (1440, 900), "narrow": (360, 640)}

LOOK = """(() => {
  const box = (one) => { const r = one.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const verdict = document.getElementById("verdict");
  const style = (one) => getComputedStyle(one);
  return {
    verdict: box(verdict), said: verdict.innerText, dataset: verdict.dataset.verdict,
    colour: style(verdict).color, behind: style(verdict.closest("header")).backgroundColor,
    ink: style(document.body).color, paper: style(document.body).backgroundColor,
    window: [innerWidth, innerHeight], page: document.documentElement.scrollWidth,
    plots: [...document.querySelectorAll("svg.plot")].map((one) => [one.getAttribute("aria-label"), ...box(one),
      Math.min(...[...one.querySelectorAll("text")].map((text) => text.getBoundingClientRect().height))]),
    drawn: [...document.querySelectorAll("svg.plot")].map((one) =>
      [...one.querySelectorAll("circle, path")].filter((mark) => {
        const r = mark.getBoundingClientRect(); return r.width > 0 || r.height > 0; }).length),
    outside: [...document.querySelectorAll("svg.plot text")].filter((text) => {
      const r = text.getBoundingClientRect(); return r.left < -1 || r.right > innerWidth + 1; }).length,
    sections: [...document.querySelectorAll("main section")].map((one) => one.id),
    rows: document.querySelectorAll("#table tbody tr").length,
    shownRows: [...document.querySelectorAll("#table tbody tr")].filter((row) => row.offsetHeight > 0).length,
    controls: document.querySelector(".controls")?.offsetHeight,
    buttons: document.querySelectorAll("pre.command button").length,
    commands: [...document.querySelectorAll("pre.command code")].map((one) => one.innerText),
  };
})()"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page for each verdict."""
    found = {}
    baseline = load_baseline(Path(__file__).parents[2] / "docs" / "examples" / "soak")
    budgets = [Budget("downtime-p95", 60.0), Budget("operations", 5, "migrate")]
    for verdict in ("passed", "failed", "interrupted"):
        folder = whole_campaign(tmp_path_factory.mktemp(verdict), 120, failures=2 if verdict == "failed" else 0)
        Expected(budgets=budgets, baseline=baseline).write(folder.path)
        if verdict == "interrupted":
            folder.state("interrupted")
        assert report.write(folder.path).verdict == verdict
        found[verdict] = folder.path / report.HTML_NAME
    return found


def luminance(colour: str) -> float:
    """Of `rgb(r, g, b)`, as WCAG defines it."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    lower, higher = sorted((luminance(one), luminance(other)))
    return (higher + 0.05) / (lower + 0.05)


def quiet(page: Page) -> None:
    """It has nothing to complain about and has asked for nothing."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    assert page.console == []
    assert page.requests == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("verdict", ["passed", "failed", "interrupted"])
def test_what_a_reader_sees(
    browser: Browser, pages: dict[str, Path], verdict: str, window: str, dark: bool, tmp_path: Path
) -> None:
    width, height = WINDOWS[window]
    page = browser.page(width, height, dark=dark)
    page.open(pages[verdict])
    seen = page.evaluate(LOOK)
    quiet(page)
    # The verdict first: without scrolling, and legible.
    left, top, right, bottom = seen["verdict"]
    assert verdict.capitalize() in seen["said"] and seen["dataset"] == verdict
    assert 0 <= left < right <= width and 0 <= top < bottom <= height / 3
    assert contrast(seen["colour"], seen["behind"]) >= 4.5
    assert contrast(seen["ink"], seen["paper"]) >= 7
    assert (luminance(seen["paper"]) < 0.2) == dark
    # Nothing sticks out to the side; wide tables scroll in their own frames.
    assert seen["page"] <= width and seen["outside"] == 0
    # The plots are there, with marks in them, and their text can be read.
    names = [name for name, *_ in seen["plots"]]
    assert len(names) >= 6 + 8 and len(set(names)) == len(names)
    for name, left, top, right, bottom, text_height in seen["plots"]:
        assert 200 < right - left <= width and bottom - top > 90, name
        assert text_height >= 7, f"{name}: text {text_height} pixels high"
    assert all(marks > 0 for marks in seen["drawn"]), dict(zip(names, seen["drawn"], strict=True))
    assert seen["rows"] == 120 and {"budgets", "comparison"} <= set(seen["sections"])
    if verdict == "failed":
        assert [one.count("--episode") for one in seen["commands"]] == [1, 1, 0]
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_without_javascript_everything_can_be_read(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.page(1280, 800, scripts=False)
    page.open(pages["failed"])
    # With scripts forbidden the page cannot be asked; what is laid out can.
    root = page.call("DOM.getDocument", depth=-1)["root"]["nodeId"]

    def found(selector: str) -> list[int]:
        nodes: list[int] = page.call("DOM.querySelectorAll", nodeId=root, selector=selector)["nodeIds"]
        return nodes

    def height(node: int) -> float:
        try:
            return float(page.call("DOM.getBoxModel", nodeId=node)["model"]["height"])
        except EnvironmentProblem:  # it has no box: it is not shown
            return 0.0

    assert len(rows := found("#table tbody tr")) == 120
    assert all(height(row) > 10 for row in rows)
    assert height(found("#verdict")[0]) > 30
    assert height(found(".controls")[0]) == 0, "what needs a script is not shown without"
    assert found("pre.command button") == []
    assert all(height(plot) > 90 for plot in found("svg.plot"))
    assert page.console == [] and page.requests == []


def test_the_table_can_be_sorted_and_filtered(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.page(1280, 800)
    page.open(pages["failed"])
    column = "[...document.querySelectorAll('#table tbody tr')].map((row) => Number(row.cells[6].dataset.v ?? -1))"
    click = "document.querySelector('#table thead th:nth-child(7)').click()"
    unsorted = page.evaluate(column)
    page.evaluate(click)
    down = page.evaluate(column)
    page.evaluate(click)
    up = page.evaluate(column)
    known = sorted(value for value in unsorted if value >= 0)
    unknown = [-1] * (len(unsorted) - len(known))
    assert unsorted != down
    assert (down, up) == (known[::-1] + unknown, known + unknown)

    def filtered(text: str) -> tuple[list[str], str]:
        page.evaluate(
            f"(() => {{ const one = document.getElementById('filter'); one.value = {text!r}; "
            "one.dispatchEvent(new Event('input')); })()"
        )
        rows = page.evaluate(
            "[...document.querySelectorAll('#table tbody tr')].filter((row) => row.offsetHeight > 0)"
            ".map((row) => row.innerText)"
        )
        return rows, page.evaluate("document.getElementById('shown').textContent")

    rows, said = filtered("failed")
    assert len(rows) == 2 and all("40213" in row for row in rows) and said == "2 of 120 operations"
    rows, _ = filtered("episode 1 failed")
    assert len(rows) == 1
    assert len(filtered("episode 1")[0]) == 8, "and not episode 10"
    assert filtered("nothing like this") == ([], "0 of 120 operations")
    assert filtered("")[1] == "" and len(filtered("")[0]) == 120
    quiet(page)


def test_a_command_is_copied_as_it_is(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.page(360, 640)
    page.open(pages["failed"])
    assert page.evaluate("document.querySelector('#failures pre.command code').textContent") == (
        report.build(pages["failed"].parent).failures[0].replay
    )
    assert page.evaluate(
        "(() => { const one = document.querySelector('pre.command button'); one.click(); return one.innerText; })()"
    )
    quiet(page)


def test_hostile_records_do_nothing(browser: Browser, tmp_path: Path) -> None:
    attack = "</style></script><script>window.hit = 1</script><img src=x onerror='window.hit = 1'><svg onload=hit()>"
    folder = Folder(tmp_path)
    folder.add(operation(0, 0, attack, message=attack, packets={attack: 3}, parameters={attack: attack}))
    folder.add(episode(0, "failed", failure=attack, kept=attack, operations=1))
    folder.add(EventRecord(episode=0, at=1.0, text=attack, serious=True))
    report.write(tmp_path)
    page = browser.page(1280, 800)
    page.open(tmp_path / report.HTML_NAME)
    assert page.evaluate("window.hit ?? null") is None
    assert page.evaluate("document.querySelector('.failure .message').innerText") == attack
    assert page.evaluate("document.images.length") == 0
    quiet(page)


# --- sabotage: that the alarms above ring ----------------------------------------------------------------------------


def changed(source: Path, target: Path, *changes: tuple[str, str]) -> Path:
    text = source.read_text()
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    target.write_text(text)
    return target


PICTURE = ("</main>", '<img src="https://example.invalid/picture.png"></main>')
SCRIPT = ("</main>", "<script>window.hit = 1</script></main>")


def test_sabotage_the_policy_stops_what_got_past_the_escaping(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    page = browser.page(1280, 800)
    page.open(changed(pages["passed"], tmp_path / "page.html", SCRIPT, PICTURE))
    assert page.evaluate("window.hit ?? null") is None
    with pytest.raises(AssertionError):
        quiet(page)
    assert any("Content Security Policy" in text for text in page.console)


def test_sabotage_without_the_policy_it_would_have(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    policy = ('http-equiv="Content-Security-Policy"', 'name="nothing"')
    page = browser.page(1280, 800)
    page.open(changed(pages["passed"], tmp_path / "page.html", policy, SCRIPT, PICTURE))
    assert page.evaluate("window.hit ?? null") == 1
    assert page.requests == ["https://example.invalid/picture.png"]


@pytest.mark.parametrize(
    "changes",
    [
        [("</style>", "svg.plot { height: 0 !important; }</style>")],
        [("</style>", ".tiles { min-width: 3000px; }</style>")],
        [("</style>", "header { margin-top: 900px; }</style>")],
        [("</style>", "h1 { color: var(--tone-paper) !important; }</style>")],
        [("<script>", "<script>undefined.anything; ")],
    ],
    ids=["no plots", "too wide", "verdict below", "invisible verdict", "a script that fails"],
)
def test_sabotage_of_the_page_is_noticed(
    browser: Browser, pages: dict[str, Path], tmp_path: Path, changes: list[tuple[str, str]]
) -> None:
    policy = ('http-equiv="Content-Security-Policy"', 'name="nothing"')  # which would forbid some of these changes
    sound = changed(pages["passed"], tmp_path / "sound.html", policy)
    test_what_a_reader_sees(browser, {"passed": sound}, "passed", "wide", False, tmp_path)
    spoilt = changed(pages["passed"], tmp_path / "page.html", policy, *changes)
    with pytest.raises(AssertionError):
        test_what_a_reader_sees(browser, {"passed": spoilt}, "passed", "wide", False, tmp_path)


# --- the browser itself ----------------------------------------------------------------------------------------------


def members(group: int) -> list[str]:
    """Living processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, its_group = (entry / "stat").read_text().rsplit(") ", 1)[1].split()[:3]
            except OSError:
                continue
            if int(its_group) == group and state != "Z":
                found.append(entry.name)
    return found


def test_nothing_of_a_browser_is_left(chromium: ChromiumProgram, tmp_path: Path) -> None:
    with Browser(chromium, tmp_path) as browser:
        group = browser._process.pid
        browser.page(300, 300)
        assert members(group)
    assert members(group) == []
    assert list(tmp_path.iterdir()) == []


def test_a_browser_that_dies_is_told_of(chromium: ChromiumProgram, tmp_path: Path) -> None:
    with Browser(chromium, tmp_path) as browser:
        page: Any = browser.page(300, 300)
        os.killpg(browser._process.pid, signal.SIGKILL)
        with pytest.raises(EnvironmentProblem, match="Chromium ended while"):
            page.evaluate("1")


def test_a_page_of_thousands_of_operations_opens(browser: Browser, tmp_path: Path) -> None:
    whole_campaign(tmp_path, 3500, failures=3)
    report.write(tmp_path)
    page = browser.page(1440, 900)
    page.open(tmp_path / report.HTML_NAME)
    seen = page.evaluate(LOOK)
    assert seen["rows"] == html.MAXIMUM_OPERATIONS
    assert len(seen["plots"]) > 10
    quiet(page)
