"""The benchmark's figures: samples, ratios, targets, JSON and tables, from made-up measurements."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.loopback.harness import describe
from vmbus.migration.source import MigrationReport
from vmbus.qemu.command_line import Programs
from vmbus.qemu.description import VmDescription
from vmbus_bench import downtime
from vmbus_bench.figures import (
    Part,
    Report,
    Row,
    Sample,
    Target,
    ratio,
    readable,
    readable_sample,
    readable_target,
)
from vmbus_bench.processes import cpu_seconds

pytestmark = pytest.mark.unit


def test_a_sample_keeps_its_values_in_order() -> None:
    sample = Sample.of([30.0, 10.0, 20.0], "/s")
    assert (sample.values, sample.unit) == ([30.0, 10.0, 20.0], "/s")
    assert (sample.minimum, sample.median, sample.maximum, sample.spread) == (10.0, 20.0, 30.0, 0.5)


def test_the_median_of_an_even_number_lies_between() -> None:
    assert Sample.of([1.0, 2.0, 4.0, 100.0], "us").median == 3.0


def test_one_value_astray_does_not_hide_how_close_the_others_are() -> None:
    sample = Sample.of([10.0, 10.0, 11.0, 9.0, 1000.0], "us")
    assert (sample.median, sample.maximum, sample.spread) == (10.0, 1000.0, 0.1)


def test_six_digits_are_kept() -> None:
    assert Sample.of([123456789.0], "/s").values == [123457000.0]


def test_no_values_make_no_sample() -> None:
    with pytest.raises(UsageError, match="no value"):
        Sample.of([], "/s")


def test_a_ratio_is_taken_pair_by_pair() -> None:
    # The quotient of the medians would be 1.0.
    assert ratio([10.0, 20.0, 90.0], [20.0, 10.0, 30.0]).values == [0.5, 2.0, 3.0]


@pytest.mark.parametrize(("values", "baseline"), [([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_a_ratio_needs_pairs_and_a_baseline(values: list[float], baseline: list[float]) -> None:
    with pytest.raises(UsageError):
        ratio(values, baseline)


def test_targets_are_judged_by_the_median_in_their_direction() -> None:
    sample = Sample.of([1.0, 3.0, 50.0], "x")
    assert Target.judge("a", sample, "at least", 3.0).reached
    assert not Target.judge("a", sample, "at least", 3.01).reached
    assert Target.judge("a", sample, "at most", 3.0).reached
    assert not Target.judge("a", sample, "at most", 2.99).reached


def test_figures_for_people() -> None:
    assert readable(3.14159, "x") == "3.14x"
    assert readable(123456.7, "/s") == "123,457 /s"
    assert readable(0.0123456, "ms") == "0.0123 ms"
    assert readable_sample(Sample.of([5.0], "us")) == "5 us"
    assert readable_sample(Sample.of([8.0, 10.0, 12.0], "us")) == "10 us ± 10 %"
    missed = Target.judge("it", Sample.of([2.0], "x"), "at least", 3.0)
    assert readable_target(missed) == "missed: it is 2.00x (at least 3.00x)"


def _report() -> Report:
    figures, base = [40.0, 44.0], [10.0, 11.0]
    sample = Sample.of(figures, "/s")
    times = ratio(figures, base)
    part = Part(
        name="host",
        title="title [with brackets]",
        parameters={"size": 64},
        baseline="something plain",
        rows=[Row("echo", sample, Sample.of(base, "/s"), times, "note"), Row("alone", sample)],
        targets=[Target.judge("echo against the plain thing", times, "at least", 3.0)],
    )
    machine = {
        "processor": "P",
        "processors": 2,
        "python": "3",
        "load_before": [0.1, 0.1, 0.1],
        "load_after": [2.5, 1.0, 0.3],
    }
    return Report(started="2026-01-01T00:00:00+00:00", quick=True, machine=machine, parts=[part])


def test_the_json_has_everything_and_the_verdicts_at_the_top() -> None:
    content = json.loads(_report().to_json())
    assert content["schema"] == 1
    assert content["targets"] == content["parts"][0]["targets"]
    assert content["targets"][0]["reached"] is True
    row = content["parts"][0]["rows"][0]
    assert row["figure"]["values"] == [40.0, 44.0]
    assert (row["ratio"]["median"], row["ratio"]["unit"]) == (4.0, "x")
    assert content["parts"][0]["rows"][1]["baseline"] is None
    assert content["machine"]["load_after"] == [2.5, 1.0, 0.3]


def test_the_table_shows_the_same_figures() -> None:
    from vmbus.cli.bench import show

    output = io.StringIO()
    show(_report(), Console(file=output, width=160))
    text = output.getvalue()
    assert "title [with brackets]" in text
    assert "42 /s ± 2 %" in text
    assert "4.00x" in text
    assert "reached: echo against the plain thing" in text
    assert "2.50 after" in text


def _migration(downtime: float) -> MigrationReport:
    return MigrationReport(
        migration="m",
        address="unix:/x",
        phases={},
        downtime=downtime,
        downtime_qemu=0.75 * downtime,
        downtime_device=0.25 * downtime,
        spans={"save": 0.25 * downtime, "load": 0.75 * downtime},
        packets={"queued": 1, "sent": 2},
        incoming_held=0,
        channels=1,
        ram_bytes=1,
        state_bytes=2,
        flushed_pages=3,
        flushed_bytes=4,
        attempts=1,
        multifd=0,
        asked=False,
    )


def _downtime(plain: list[float], with_device: list[float]) -> Part:
    description = VmDescription(name="bench", device=describe("burst"))
    programs = Programs(("qemu",), "11.1.3", "tcg", Path("kernel"), Path("initramfs"))
    return downtime.summary(plain, {100: [_migration(one) for one in with_device]}, description, programs)


def test_downtime_is_compared_pair_by_pair() -> None:
    part = _downtime([0.100, 0.200], [0.120, 0.300])
    (row,) = part.rows
    assert (row.figure.values, row.baseline and row.baseline.values) == ([120.0, 300.0], [100.0, 200.0])
    assert row.ratio is not None and row.ratio.values == [1.2, 1.5]
    assert row.details["added"].values == [20.0, 100.0]
    assert row.details["QEMU's share"].values == [90.0, 225.0]
    assert row.details["the device's"].values == row.details["save"].values == [30.0, 75.0]


@pytest.mark.parametrize(
    ("plain", "with_device", "allowed", "reached"),
    [(0.100, 0.150, 50.0, True), (0.100, 0.151, 50.0, False), (1.0, 1.1, 100.0, True), (1.0, 1.11, 100.0, False)],
)
def test_the_device_may_add_ten_percent_or_fifty_milliseconds(
    plain: float, with_device: float, allowed: float, reached: bool
) -> None:
    (target,) = _downtime([plain], [with_device]).targets
    assert (target.target, target.direction, target.reached) == (allowed, "at most", reached)


def test_cpu_time_of_a_process() -> None:
    before, mine = cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() < mine + 0.02:
        pass
    assert 0.02 <= cpu_seconds(os.getpid()) - before < 5


def test_cpu_time_of_a_process_that_is_gone() -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    with pytest.raises(EnvironmentProblem, match="ended"):
        cpu_seconds(pid)
