"""A campaign's report as JUnit XML, as continuous integration reads it.

A test case for each episode, each budget, and the medians of each kind of operation that are compared with an earlier
campaign; and one for the campaign as a whole, which is skipped where nothing has failed up to now and it is not
finished. What a report of a failed
episode needs to be seen again, the command and where its files are, stands in its failure.
"""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement, tostring

from vmbus.soak.expected import broken_text, budget_text, change_text
from vmbus.soak.records import Report
from vmbus.soak.text import clean

LONGEST = 4000
"""Characters of a text; what is longer is cut."""


def junit_xml(report: Report) -> bytes:
    """The report as a JUnit document, UTF-8."""
    name = f"soak, seed {report.seed}"
    suite = Element("testsuite", name=name, timestamp=_text(report.started), time=f"{report.seconds:.3f}")
    properties = SubElement(suite, "properties")
    for key, value in (("verdict", report.verdict), ("command", report.command), ("operations", report.operations)):
        SubElement(properties, "property", name=key, value=_text(str(value)))
    failures = {one.episode: one for one in report.failures}
    records = {one.episode: one for one in report.episode_records}
    for episode in sorted({*records, *failures}):
        record = records.get(episode)
        case = _case(suite, "episodes", f"episode {episode}", record.seconds if record else 0.0)
        if failure := failures.get(episode):
            kept = f"\nkept: {failure.kept}" if failure.kept else ""
            _fail(case, failure.message, f"{failure.message}\nreplay: {failure.replay}{kept}")
        elif record is not None and record.verdict == "interrupted":
            _skip(case, record.failure or "ended early")
    for budget in report.budgets:
        case = _case(suite, "budgets", budget_text(budget))
        if budget.kept is None:
            _skip(case, "the campaign is not finished")
        elif not budget.kept:
            _fail(case, broken_text(budget))
    changes = report.comparison.changes if report.comparison else []
    for kind in dict.fromkeys(one.kind for one in changes):
        case = _case(suite, "comparison", f"{kind} beside seed {report.comparison.seed if report.comparison else 0}")
        some = [one for one in changes if one.kind == kind]
        if grown := [change_text(one) for one in some if one.grown]:
            _fail(case, "; ".join(grown))
        SubElement(case, "system-out").text = _text("\n".join(change_text(one) for one in some))
    whole = _case(suite, "campaign", "the campaign")
    if report.verdict == "interrupted":
        _skip(whole, "it is not finished")
    if report.missing:
        SubElement(suite, "system-err").text = _text(
            "\n".join(f"not in this report: {text}" for text in report.missing)
        )
    for attribute, tag in (("tests", "testcase"), ("failures", "testcase/failure"), ("skipped", "testcase/skipped")):
        suite.set(attribute, str(len(suite.findall(tag))))
    suite.set("errors", "0")
    suites = Element("testsuites")
    suites.append(suite)
    document: bytes = tostring(suites, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _case(suite: Element, group: str, name: str, seconds: float = 0.0) -> Element:
    return SubElement(suite, "testcase", classname=f"soak.{group}", name=_text(name), time=f"{seconds:.3f}")


def _fail(case: Element, message: str, text: str | None = None) -> None:
    SubElement(case, "failure", message=_text(message)).text = _text(text or message)


def _skip(case: Element, message: str) -> None:
    SubElement(case, "skipped", message=_text(message))


def _text(text: str) -> str:
    """Without what XML forbids, and shortened."""
    return clean(text, LONGEST)
