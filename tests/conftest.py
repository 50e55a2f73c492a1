"""What all layers share: the library fixture, the tally by layer, and the option that makes CI fail on a gap."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

LAYERS = ("unit", "loopback", "browser", "vm")

# The one marker whose tests may be left out although everything was asked for, and when: see docs/testing.md.
NEEDS_MIGRATION_V2 = "needs_migration_v2"
NO_MIGRATION_V2 = "the installed libvfio-user has no migration v2"


MATRIX_TEST = "test_failure_matrix.py::test_failure_matrix["
"""One cell of the failure matrix each: see support/failure_matrix.py."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-layers",
        action="store_true",
        help=f"fail when a layer ({', '.join(LAYERS)}) passed no test, or when any test was skipped, except for those "
        f"marked {NEEDS_MIGRATION_V2} where {NO_MIGRATION_V2}",
    )


class _Tally:
    """Outcomes by layer."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {layer: Counter() for layer in LAYERS}
        self.seconds: Counter[str] = Counter()
        self.layer_of: dict[str, str] = {}
        self.excused: Counter[str] = Counter()
        self.excuse = ""
        self.matrix: Counter[str] = Counter()  # cells of the failure matrix that hold, by layer

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            marked = [layer for layer in LAYERS if item.get_closest_marker(layer)]
            if len(marked) != 1:
                raise pytest.UsageError(f"{item.nodeid} must be marked with exactly one of {LAYERS}, not {marked}")
            self.layer_of[item.nodeid] = marked[0]
        # The cheap layers first: what they find needs no virtual machine.
        items.sort(key=lambda item: LAYERS.index(self.layer_of[item.nodeid]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        layer = self.layer_of[report.nodeid]
        self.seconds[layer] += report.duration
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

    @property
    def gaps(self) -> list[str]:
        gaps = [f"layer {layer} passed no test" for layer in LAYERS if not self.counts[layer]["passed"]]
        return gaps + [
            f"{skipped} tests of layer {layer} were skipped"
            for layer in LAYERS
            if (skipped := self.counts[layer]["skipped"] - self.excused[layer])
        ]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if session.config.option.all_layers and exitstatus == pytest.ExitCode.OK and self.gaps:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter, exitstatus: int, config: pytest.Config) -> None:
        terminalreporter.section("layers")
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
        if self.excused:
            terminalreporter.line(f"{self.excused.total()} tests left out: {self.excuse}", yellow=True)
        if config.option.all_layers:
            for gap in self.gaps:
                terminalreporter.line(f"NOT COMPLETE: {gap}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Tally(), "layer-tally")


@pytest.fixture(autouse=True)
def _migration_v2(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker(NEEDS_MIGRATION_V2):
        from vmbus.vfio_user.library import ENVIRONMENT_VARIABLE, Generation

        library = request.getfixturevalue("libvfio_user")
        if library.generation is not Generation.NEW:
            pytest.skip(f"{NO_MIGRATION_V2} (it is {library.description}); name one that has in {ENVIRONMENT_VARIABLE}")


@pytest.fixture(scope="session")
def libvfio_user():
    """The library that VMBUS_LIBVFIO_USER names, else the one that set-up has found or built."""
    from vmbus.provision.libvfio_user import find_library
    from vmbus.vfio_user.library import ENVIRONMENT_VARIABLE, load

    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return load(Path(named) if named else find_library())
