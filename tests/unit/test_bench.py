"""The benchmark's figures: samples, ratios, targets, JSON and tables, from made-up measurements."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.operations.migration.report import MigrationReport
from vmbus.testkit.loopback.harness import describe
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription, load_description
from vmbus_bench import debian, doorbell, downtime, host
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


def test_a_sample_keeps_its_values_in_order() -> None:
    sample = Sample.of([30.0, 10.0, 20.0], "/s")
    assert (sample.values, sample.unit) == ([30.0, 10.0, 20.0], "/s")
    assert (sample.minimum, sample.median, sample.maximum, sample.spread) == (10.0, 20.0, 30.0, 0.5)


def test_one_value_astray_does_not_hide_how_close_the_others_are() -> None:
    sample = Sample.of([10.0, 10.0, 11.0, 9.0, 1000.0], "us")
    assert (sample.median, sample.maximum, sample.spread) == (10.0, 1000.0, 0.1)


def test_without_a_debian_its_boot_is_not_measured() -> None:
    machine = load_description(Path(__file__).resolve().parents[2] / "qemu_configs" / "debian.toml")
    programs = Programs(("qemu",), "11.0.0", Path("k"), Path("i"), "tcg")
    with pytest.raises(debian.NotMade, match="setup --debian makes one"):
        asyncio.run(debian.measure(machine, programs, None, quick=True, step=print))
    theirs, with_disk = debian._with_their_disk(machine, programs, Path("/d/debian.img"))
    assert "virtio-blk-pci,drive=base,addr=0x10" in with_disk.extra and theirs.guest == machine.guest
    (controller,) = [one for one in theirs.device.providers if one.kind == "scsi"]
    assert controller.options["luns"] == []


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
    show(_report(), Console(file=output, width=160, markup=False, emoji=False))
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


def _downtime(plain: list[float], without: list[float], with_many: list[float]) -> Part:
    description = VmDescription(name="bench", device=describe("burst"))
    programs = Programs(("qemu",), "11.1.3", "tcg", Path("kernel"), Path("initramfs"))
    reports = {0: [_migration(one) for one in without], 1000: [_migration(one) for one in with_many]}
    return downtime.summary(plain, reports, description, programs)


def test_downtime_is_compared_pair_by_pair() -> None:
    row, _ = _downtime([0.100, 0.200], [0.120, 0.300], [0.1, 0.2]).rows
    assert (row.figure.values, row.baseline and row.baseline.values) == ([120.0, 300.0], [100.0, 200.0])
    assert row.ratio is not None and row.ratio.values == [1.2, 1.5]
    assert row.details["added"].values == [20.0, 100.0]
    assert row.details["QEMU's share"].values == [90.0, 225.0]
    assert row.details["the device's"].values == row.details["save"].values == [30.0, 75.0]


@pytest.mark.parametrize(
    ("without", "with_many", "value", "reached"),
    [
        (0.120, 0.126, 1.3, (True, True)),
        (0.121, 0.121, 1.0, (False, True)),
        (0.110, 0.114, 1.4, (True, False)),
        (0.100, 0.101, 10.0, (True, False)),  # against next to nothing
    ],
)
def test_what_the_device_may_add(without: float, with_many: float, value: float, reached: tuple[bool, bool]) -> None:
    least, times = _downtime([0.100], [without], [with_many]).targets
    assert (least.target, least.direction, times.target, times.direction) == (20.0, "at most", 1.3, "at most")
    assert times.value == pytest.approx(value)
    assert (least.reached, times.reached) == reached
    assert all(bool(target.why) != target.reached for target in (least, times))


def _compared(native: float, pure: float, base: float, nothing: float) -> Part:
    part = Part("host", "", {}, "", rows=[], targets=[])
    costs = {
        ("native", "echo"): [native],
        ("pure", "echo"): [pure],
        ("native", "answering"): [nothing],
        ("pure", "answering"): [nothing + pure - native],
    }
    host.compare(part, costs, [base])
    return part


def test_cores_and_the_socket_are_compared_by_cpu_time() -> None:
    part = _compared(2e-6, 6e-6, 4e-6, 1e-6)
    assert [target.reached for target in part.targets] == [True, False, True, True]
    assert [target.value for target in part.targets] == pytest.approx([3.0, 2.0, 5.0, 4.0])
    assert part.rows[0].figure.values == [2.0] and part.rows[-1].figure.values == [1.0]


def test_the_stages_of_a_doorbell_follow_each_other() -> None:
    for (_, after, _), (before, _, _) in itertools.pairwise(doorbell.STAGES):
        assert after == before
    stamps = doorbell._Stamps()
    waits = stamps.select(lambda timeout: [])
    waits(0.0)
    for name in ("look", "looked", "register", "registered", "turn", "provider", "provided", "event", "interrupt"):
        stamps.stamp(name)
    waits(0.0)  # no interrupt: that was no doorbell
    assert stamps.stages[0] == []
    for name in ("look", "looked", "register", "registered", "turn", "provider", "provided", "event", "interrupt"):
        stamps.stamp(name)
    stamps.stamp("interrupted")
    stamps.stamp("look")  # the next one
    waits(0.0)
    assert [len(stage) for stage in stamps.stages] == [1] * 10 + [0]


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


def test_fault_n12_how_long_a_quick_run_takes_is_said_as_it_is() -> None:
    """134 s on a quiet machine of two processors: half a minute it is not."""
    from vmbus.cli import main

    help_text = " ".join(CliRunner().invoke(main, ["bench", "--help"]).output.split())
    assert "rough figures in about two minutes" in help_text
    checkout = Path(__file__).resolve().parents[2]
    pages = [checkout / "README.md", *(checkout / "docs").glob("*.md")]
    told = [line for page in pages for line in page.read_text().splitlines() if "--quick" in line and "minute" in line]
    assert told and all("two minutes" in line for line in told)
