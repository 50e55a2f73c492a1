"""What all layers share: the library fixture, the tally by layer, and the option that makes CI fail on a gap.

A complete run has several tests at a time; each worker of pytest-xdist is a process. Tests are collected and run
there; the controller hears of them by their reports only. So what the tally has to know goes along with those: a test's
layer is one of its properties, and the lines for the summary are part of what a worker says when it ends.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from support.ending import RunFolder, left_in, tell_workers
from support.fault_rows import keywords
from support.pace import PACE, bounded, seconds
from support.twins import twin as twin

pytest_plugins = ["vmbus.pytest_plugin"]

if TYPE_CHECKING:
    from vmbus.transport.library import Library

# How long an example takes says how busy the machine is, not whether it is right.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

CHECKOUT = Path(__file__).resolve().parents[1]

# Large files of running VMs, and what outlives them, is not put among the user's own.
os.environ.setdefault("VMBUS_STATE", str(CHECKOUT / ".pytest_cache" / "state"))

# Processes that tests start find the project's packages, as those of the scripts do.
os.environ["PYTHONPATH"] = f"{CHECKOUT / 'device'}{os.pathsep}{CHECKOUT / 'guest'}"

LAYERS = ("unit", "loopback", "browser", "vm")

# The one marker whose tests may be left out although everything was asked for, and when: see docs/testing.md.
NEEDS_MIGRATION_V2 = "needs_migration_v2"
NO_MIGRATION_V2 = "the installed libvfio-user has no migration v2"


PATIENCE = "VMBUS_PATIENCE"
"""See `vmbus.util.patience`."""

MATRIX_TEST = "test_failure_matrix.py::test_failure_matrix["
"""One cell of the failure matrix each: see support/failure_matrix.py."""


NEEDS_ROOT = "needs-root"
"""Property of a test that was left out for a user who may not do what it needs; its value says what that is."""

STORY_SECONDS = 200.0

NOTES = pytest.StashKey[list[str]]()
"""Lines for the summary, see `note`."""


FOLDER = pytest.StashKey[RunFolder]()
"""The temporary directory of this process."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-layers",
        action="store_true",
        help=f"fail when a layer ({', '.join(LAYERS)}) passed no test, or when any test was skipped, except for those "
        f"marked {NEEDS_MIGRATION_V2} where {NO_MIGRATION_V2}, and, unless by root, what only root may do here",
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    """A test is of its folder's layer. `-k fault_h1` picks tests by the row of the table of faults that they tell."""
    folder = item.path.parent.name
    if folder in LAYERS and not any(item.get_closest_marker(layer) for layer in LAYERS):
        item.add_marker(folder)
    item.extra_keyword_matches.update(keywords(item.nodeid))


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test may be a coroutine function: it has a loop of its own, and a bound far above what any of them needs."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    test = pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames})

    async def in_time() -> None:
        with bounded(STORY_SECONDS, "a test") as bound:
            await asyncio.wait_for(test, bound)

    asyncio.run(in_time())
    return True


@pytest.hookimpl(optionalhook=True)  # where pytest-xdist is not installed, tests run one after the other
def pytest_xdist_auto_num_workers() -> int:
    """One test at a time for each core. Not more than four: each may have two guests of 512 MiB."""
    return min(4, len(os.sched_getaffinity(0)))


def _layer(report: pytest.TestReport | pytest.CollectReport) -> str:
    """A test's layer. Reports of a worker's death and of a file that cannot be imported have none: by directory."""
    layer = dict(getattr(report, "user_properties", ())).get("layer")
    return str(layer or next((layer for layer in LAYERS if f"/{layer}/" in f"/{report.nodeid}"), LAYERS[-1]))


def _usual_bound(item: pytest.Item) -> float:
    """Seconds that a test may take on a usual machine; 0: any time."""
    marker = item.get_closest_marker("timeout")
    if marker is not None:
        return float(marker.args[0] if marker.args else marker.kwargs["timeout"])
    return float(getattr(item.config, "_env_timeout", None) or 0)  # of pytest-timeout, if that is installed


def _not_permitted(skipped: BaseException) -> bool:
    """Whether a test was skipped because the machine did not let it do something."""
    from support.namespace import NotPermitted
    from vmbus.testbed.hosts import Forbidden

    return isinstance(skipped.__context__, NotPermitted | Forbidden | PermissionError)


class _Tally:
    """Outcomes by layer."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.counts: dict[str, Counter[str]] = {layer: Counter() for layer in LAYERS}
        self.seconds: Counter[str] = Counter()
        self.excused: Counter[str] = Counter()
        self.excuse = ""
        self.for_root: Counter[tuple[str, str]] = Counter()  # tests left out, by layer and by what only root may do
        self.matrix: Counter[str] = Counter()  # cells of the failure matrix that hold, by layer
        self.notes: list[str] = []
        self.took: Counter[str] = Counter()  # seconds, by test
        self.tight: dict[str, tuple[float, str]] = {}  # tests that used more than half of a bound: its share, in words
        self.broken = False  # pytest itself, here or in a worker; of the latter xdist's exit status says nothing

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        layer_of: dict[str, str] = {}
        for item in items:
            marked = [layer for layer in LAYERS if item.get_closest_marker(layer)]
            if len(marked) != 1:
                raise pytest.UsageError(f"{item.nodeid} must be marked with exactly one of {LAYERS}, not {marked}")
            layer_of[item.nodeid] = marked[0]
            if "twin" in getattr(item, "fixturenames", ()):
                item.add_marker("pure_and_native")
            item.user_properties.append(("layer", marked[0]))
        # The cheap layers first: what they find needs no virtual machine.
        items.sort(key=lambda item: LAYERS.index(layer_of[item.nodeid]))
        if is_worker(config):
            # Files go to the workers in this order. In a layer the long ones first, so that in the end no worker is
            # left alone with one.
            long = {item.path for item in items if item.get_closest_marker("long")}
            items.sort(key=lambda item: (LAYERS.index(layer_of[item.nodeid]), item.path not in long))

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-timeout, which looks for the marker
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """The bound of a whole test follows the machine's speed, as those of its waits do."""
        if item.get_closest_marker("vm"):
            PACE.look()
            os.environ[PATIENCE] = f"{PACE.factor:.2f}"  # so what the product waits for a VM follows it, too
        else:
            os.environ.pop(PATIENCE, None)
        PACE.begin()
        usual = _usual_bound(item)
        if usual:
            item.add_marker(pytest.mark.timeout(seconds(usual)), append=False)
            item.user_properties.append(("bound", seconds(usual)))
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        try:
            return (yield)
        finally:
            item.user_properties.append(("fullest", PACE.fullest))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        layer = _layer(report)
        self.seconds[layer] += report.duration
        self.took[report.nodeid] += report.duration
        if report.when == "teardown":
            self._note_bounds(report)
        if self.config.pluginmanager.hasplugin("dsession"):
            self._tell(report)
        if report.when == "call" or report.outcome != "passed":
            self.counts[layer][report.outcome] += 1
        if report.when == "call" and report.passed and MATRIX_TEST in report.nodeid:
            self.matrix[layer] += 1
        if report.skipped and NEEDS_MIGRATION_V2 in report.keywords:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            reason = reason.removeprefix("Skipped: ")
            if reason.startswith(NO_MIGRATION_V2):
                self.excused[layer] += 1
                self.excuse = reason

        for reason in (value for key, value in report.user_properties if key == NEEDS_ROOT):
            self.for_root[layer, str(reason)] += 1

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
        """An ordinary user may leave out what this machine only lets root do; root may not."""
        report = yield
        if report.skipped and os.geteuid() != 0 and call.excinfo is not None and _not_permitted(call.excinfo.value):
            report.user_properties.append((NEEDS_ROOT, str(call.excinfo.value)))
        return report

    def pytest_internalerror(self) -> None:
        self.broken = True

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.notes += getattr(node, "workeroutput", {}).get("notes", [])

    def pytest_report_teststatus(self, report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
        """With several at a time files come in no order: a VM test has a line of its own (`_tell`), no dot."""
        if config.pluginmanager.hasplugin("dsession") and _layer(report) == "vm" and report.passed:
            return ("passed" if report.when == "call" else "", "", "PASSED" if report.when == "call" else "")
        return None

    def _tell(self, report: pytest.TestReport) -> None:
        """Progress of a run with several tests at a time: VM tests that have ended, and what has failed at once."""
        reporter = self.config.pluginmanager.getplugin("terminalreporter")
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = (crash.message if crash else str(report.longrepr)).partition("\n")[0]
            reporter.write_line(f"FAILED {report.nodeid} ({report.when}): {why[:300]}", red=True)
        elif report.when == "teardown" and _layer(report) == "vm":
            reporter.write_line(f"{self.took[report.nodeid]:6.1f} s  {report.nodeid}")

    def _note_bounds(self, report: pytest.TestReport) -> None:
        said = dict(report.user_properties)
        share, words = said.get("fullest", (0.0, ""))
        took, bound = self.took[report.nodeid], said.get("bound")
        if bound and took / bound > share:
            share, words = took / bound, f"{took:.1f} of {bound:.0f} s for all of it"
        if share > 0.5:
            self.tight[report.nodeid] = (share, words)

    def _for_root(self, layer: str) -> int:
        return sum(count for (of, _), count in self.for_root.items() if of == layer)

    @property
    def gaps(self) -> list[str]:
        gaps = [f"layer {layer} passed no test" for layer in LAYERS if not self.counts[layer]["passed"]]
        return gaps + [
            f"{skipped} tests of layer {layer} were skipped"
            for layer in LAYERS
            if (skipped := self.counts[layer]["skipped"] - self.excused[layer] - self._for_root(layer))
        ]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if is_worker(session.config):
            session.config.workeroutput["notes"] = session.config.stash[NOTES]
            return  # the controller has all the reports, and judges
        if exitstatus == pytest.ExitCode.OK and self.broken:
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
        elif session.config.option.all_layers and exitstatus == pytest.ExitCode.OK and self.gaps:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter, exitstatus: int, config: pytest.Config) -> None:
        terminalreporter.section("layers")
        for note in [*self.notes, *config.stash[NOTES]]:
            terminalreporter.line(note)
        for layer in LAYERS:
            count = self.counts[layer]
            terminalreporter.line(
                f"{layer:9} {count['passed']:5} passed {count['failed']:3} failed {count['skipped']:3} skipped "
                f"{self.seconds[layer]:7.1f} s"
            )
        if self.matrix:
            from support.failure_matrix import CELLS, GAPS, IN_QEMU

            terminalreporter.line(
                f"failure matrix: {self.matrix['loopback']} of {len(CELLS)} cells hold, {self.matrix['vm']} of "
                f"{len(IN_QEMU)} in QEMU; {len(GAPS)} combinations are left out with a reason"
            )
        for nodeid, (_, words) in sorted(self.tight.items(), key=lambda one: -one[1][0]):
            terminalreporter.line(f"more than half of a bound: {nodeid}: {words}", yellow=True)
        if self.excused:
            terminalreporter.line(f"{self.excused.total()} tests left out: {self.excuse}", yellow=True)
        by_reason: Counter[str] = Counter()
        for (_, reason), count in self.for_root.items():
            by_reason[reason] += count
        for reason, count in by_reason.items():
            terminalreporter.line(f"root would run {count} tests more: {reason}", yellow=True)
        if config.option.all_layers:
            for gap in self.gaps:
                terminalreporter.line(f"NOT COMPLETE: {gap}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOTES] = []
    config.stash[FOLDER] = (
        RunFolder.of_a_worker(config.workerinput["workerid"]) if is_worker(config) else RunFolder.of_the_run()
    )
    if is_worker(config) or not config.getoption("numprocesses", None):
        PACE.start()
        if PACE.factor > 1.5:
            config.stash[NOTES].append(f"a slow or busy machine: bounds were {PACE.factor:.1f} times as long as usual")
    if threading.current_thread() is threading.main_thread():
        # Whoever ends the run (`timeout` in CI) gets what a Ctrl-C gets: tests clean up, and what has failed is told.

        def terminated(number: int, frame: Any) -> None:
            if config.pluginmanager.hasplugin("dsession"):
                tell_workers(number)
            signal.default_int_handler(number, frame)

        signal.signal(signal.SIGTERM, terminated)
    config.pluginmanager.register(_Tally(config), "layer-tally")


def pytest_unconfigure(config: pytest.Config) -> None:
    folder = config.stash.get(FOLDER, None)
    if folder is not None:
        folder.remove()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_keyboard_interrupt() -> Iterator[None]:
    """Whoever ends the run is told where it was: see `pytest_runtest_makereport`."""
    return (yield from pytest_runtest_makereport())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Reports are made while nothing is collected.

    For a failure pytest parses sources. What the collector ends meanwhile (a task nobody waited for) may format a
    traceback, which parses too; in Python before 3.11.8 and 3.12.2 the outer parse then raises SystemError, which ends
    the whole run, and the failure is never told.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return (yield)
    finally:
        if collecting:
            gc.enable()


@pytest.fixture(scope="session")
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Puts a line into the summary of the test run."""
    return request.config.stash[NOTES].append


@pytest.fixture(autouse=True)
def _complaints_from_the_start() -> None:
    """What earlier tests made the devices of this process log must not keep a later one from being heard."""
    from vmbus.util.complaints import COMPLAINTS

    COMPLAINTS.refill()


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing stays in the directory for temporary files."""
    folder = request.config.stash[FOLDER].path
    before = left_in(folder)
    yield
    if request.node.get_closest_marker("loopback"):
        left = left_in(folder) - before
        assert not left, f"left in the directory for temporary files: {sorted(left)}"


@pytest.fixture(autouse=True)
def _migration_v2(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker(NEEDS_MIGRATION_V2):
        from vmbus.transport.library import ENVIRONMENT_VARIABLE, Generation

        library = request.getfixturevalue("libvfio_user")
        if library.generation is not Generation.NEW:
            pytest.skip(f"{NO_MIGRATION_V2} (it is {library.description}); name one that has in {ENVIRONMENT_VARIABLE}")


@pytest.fixture(scope="session")
def libvfio_user(vmbus_library: Library) -> Library:
    """Its short name here."""
    return vmbus_library
