"""A test driver of a user's, in one file: the example of the docs, and files that are wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmbus.cli.drivers import Drive, jobs_for, outcome, parse_drive
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.providers.echo import EchoProvider
from vmbus.testkit.driver_file import DriverFile, read_driver_file
from vmbus.testkit.loopback.harness import describe
from vmbus.testkit.loopback.restoring import Servers, run_driver
from vmbus.transport.library import Library
from vmbus_guest.testdrivers import CATALOGUE, DIRECTORY_VARIABLE, drivers
from vmbus_guest.testdrivers.context import Context
from vmbus_guest.testdrivers.describe import describe as describe_driver

PAGE = Path(__file__).resolve().parents[2] / "docs" / "test-drivers.md"


EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def example() -> str:
    return str(EXAMPLES[0])


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of a user's drivers, with the example in it."""
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    (tmp_path / "ping-pong.py").write_text(example())
    yield tmp_path


def test_the_example_passes_survives_restores_and_runs_beside_others(installed: Path, libvfio_user: Library) -> None:
    with Servers(describe("echo"), libvfio_user, [5, 20, 50, 90, 130]) as servers:
        result = drivers()["ping-pong"].load()(Context({"count": 300}, servers.function))
        assert servers.restores == 5
    assert result["verdict"] == "passed" and result["completed"] == 300
    workloads = [{"driver": "ping-pong", "count": 50}, {"driver": "burst", "count": 500}]
    with Servers(describe("echo", "burst"), libvfio_user, [30]) as servers:
        result = CATALOGUE["mixed"].load()(Context({"workloads": workloads}, servers.function))
    assert result["verdict"] == "passed", result
    assert [part["name"] for part in result["workloads"]] == ["ping-pong", "burst"]


def test_the_pages_test_of_a_driver_passes(
    tmp_path: Path, libvfio_user: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ping_pong.py").write_text(example())
    monkeypatch.chdir(tmp_path)
    page: dict[str, Any] = {}
    exec(EXAMPLES[2], page)
    page["test_my_driver"](libvfio_user)
    with pytest.raises(UsageError, match="has ended after 0 of 1 restores"):
        run_driver(tmp_path / "ping_pong.py", describe("echo"), libvfio_user, saves=[10**6], count=3)


def test_fault_t7_the_pages_example_with_memory_passes_and_survives_restores(
    tmp_path: Path, libvfio_user: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    first, second, _ = EXAMPLES
    (tmp_path / "fills.py").write_text(f"{first}\n\n{second}\n\nWORKLOAD = Fills\n")
    with Servers(describe("echo"), libvfio_user, [5, 20, 50]) as servers:
        result = drivers()["fills"].load()(Context({"count": 200}, servers.function))
        assert servers.restores == 3
    assert result["verdict"] == "passed" and result["completed"] == 200, result


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("writing-a-provider.md", "Sub-channels: make them with"),
        ("writing-a-provider.md", "Clones of one snapshot that run side by side have the"),
        ("writing-a-provider.md", "`done` of `run_blocking`"),
        ("writing-a-provider.md", "When `stop()` is called"),
        ("test-drivers.md", "## One of your own"),
        ("test-drivers.md", "### Memory that a request describes"),
        ("checkpoints.md", "Clones (`--count N`"),
        ("capture.md", "`--external BYTES`"),
        ("limits.md", "BAR0 where something else answers"),
    ],
)
def test_fault_t7_the_pages_say_what_authors_looked_for(page: str, words: str) -> None:
    assert words in (PAGE.parent / page).read_text()


def test_the_example_notices(installed: Path, libvfio_user: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    real = EchoProvider._answer

    def answer(self: EchoProvider, completion: Any, payload: bytes, waited: bool = False) -> None:
        if self.tally.started == 20:
            payload = payload[:16] + b"x" + payload[17:]
        real(self, completion, payload, waited)

    monkeypatch.setattr(EchoProvider, "_answer", answer)
    with Servers(describe("echo"), libvfio_user) as servers:
        result = drivers()["ping-pong"].load()(Context({}, servers.function))
    assert result["verdict"] == "failed" and result["corrupted"] == 1


def test_what_a_users_driver_does_wrong_is_its_own_trouble(installed: Path, libvfio_user: Library) -> None:
    broken = example().replace("self.tally.completed += 1", "self.tally.completed += 1; self.nothing.there")
    (installed / "broken.py").write_text(broken)
    tick = "    def tick(self, now):\n        1 / 0\n\n    def stop(self)"
    (installed / "tick.py").write_text(example().replace("    def stop(self)", tick))
    workloads = [{"driver": "tick"}, {"driver": "burst", "count": 500}]
    with Servers(describe("echo", "burst"), libvfio_user) as servers:
        result = CATALOGUE["mixed"].load()(Context({"workloads": workloads}, servers.function))
        assert [part["verdict"] for part in result["workloads"]] == ["failed", "passed"]
        assert result["workloads"][0]["trouble"] == ["ZeroDivisionError: division by zero"]
    with Servers(describe("echo"), libvfio_user) as servers:
        result = drivers()["broken"].load()(Context({}, servers.function))
        assert result["verdict"] == "failed" and "no attribute 'nothing'" in result["trouble"][0]


def test_the_example_is_described_like_the_others(installed: Path) -> None:
    found = describe_driver(drivers()["ping-pong"])
    assert found["workload"]
    assert found["parameters"]["longest"] == {
        "text": "most bytes of data in a request",
        "default": 500,
        "minimum": 1,
        "maximum": 10_000,
    }
    (installed / "bad.py").write_text("import nothing_of_the_kind\n")
    result = CATALOGUE["catalogue"].load()(Context({}, lambda: None))  # type: ignore[arg-type, return-value]
    assert "ping-pong" in result["drivers"] and "line 1: ModuleNotFoundError" in result["drivers"]["bad"]["error"]
    with pytest.raises(UsageError, match=r"bad.py: line 1: ModuleNotFoundError"):
        CATALOGUE["catalogue"].load()(Context({"driver": "bad"}, lambda: None))  # type: ignore[arg-type, return-value]


def test_a_file_is_read_without_being_run(tmp_path: Path) -> None:
    path = tmp_path / "my_driver.py"
    path.write_text("raise SystemExit\n" + example())
    assert read_driver_file(path)[::2] == ("my-driver", True)
    path.write_text("def run(context): return {'verdict': 'passed'}\n")
    assert read_driver_file(path).workload is False


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("my_driver.txt", "", "the file's name is that of the driver"),
        ("My.py", "", "the file's name is that of the driver"),
        ("echo.py", "", "there is a test driver 'echo' already"),
        ("x.py", "def (:\n", "x.py, line 1: invalid syntax"),
        ("x.py", "a = 1\n", "defines neither WORKLOAD nor run"),
        ("x.py", "#" * 600_000, "at most 524288 can be installed"),
        ("x.py", b"\xff\xfe", "is not text in UTF-8"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, name: str, source: str | bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(source if isinstance(source, bytes) else source.encode())
    with pytest.raises(UsageError, match=complaint):
        read_driver_file(tmp_path / name)
    with pytest.raises(EnvironmentProblem, match="cannot read driver file"):
        read_driver_file(tmp_path / "missing.py")


def test_what_the_command_line_asks_for() -> None:
    assert parse_drive("echo") == Drive("echo", {})
    assert parse_drive("echo:count=3,external=0.5") == Drive("echo", {"count": 3, "external": 0.5})
    assert parse_drive('echo:{"count": 3}') == Drive("echo", {"count": 3})
    for text, complaint in ((":x", "name a test driver"), ("echo:{", "not JSON"), ("echo:x", "not of the form")):
        with pytest.raises(UsageError, match=complaint):
            parse_drive(text)
    own = [DriverFile("mine", "", True), DriverFile("alone", "", False)]
    assert jobs_for([Drive("echo", {"count": 1})], []) == [Drive("echo", {"count": 1})]
    wanted = [Drive("echo", {"count": 1}), Drive("alone", {}), Drive("mine", {}), Drive("disk-writer", {"count": 2})]
    assert jobs_for(wanted, own) == [
        Drive("alone", {}),
        Drive("disk-writer", {"count": 2}),
        Drive("mixed", {"workloads": [{"driver": "echo", "count": 1}, {"driver": "mine"}]}),
    ]
    with pytest.raises(UsageError, match="--drive nothing: no such test driver; there are"):
        jobs_for([Drive("nothing", {})], own)


def test_how_a_job_ended_is_said_in_a_line() -> None:
    assert (
        outcome({"state": "finished", "result": {"verdict": "passed"}})
        == f"finished, passed: {json.dumps({'verdict': 'passed'})}"
    )
    died = {"state": "failed", "error": {"kind": "died", "message": "the test driver was killed by signal SIGSEGV"}}
    assert outcome(died) == "failed: the test driver was killed by signal SIGSEGV"
    rubbish = {"state": "finished", "result": {}, "rubbish": {"lines": 3, "first": "b'x'"}}
    assert "without a verdict" in outcome(rubbish) and "3 lines that are no reports, the first of them b'x'" in outcome(
        rubbish
    )


def test_every_parameter_of_the_catalogue_has_a_text_and_every_driver_a_row_in_the_docs() -> None:
    page = PAGE.read_text()
    for name, entry in CATALOGUE.items():
        found = describe_driver(entry)
        assert all(about["text"] for about in found["parameters"].values()), (name, found)
        kind = entry.workload()
        if kind is not None:
            assert re.search(rf"^\| `{name}` \| `{kind.provider}`", page, re.MULTILINE), name
