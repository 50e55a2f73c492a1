"""A Chromium for tests: found on the machine, or fetched the first time that a test wants it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.browser import Browser
from vmbus.provision.chromium import ChromiumProgram, find_chromium
from vmbus.provision.report import PlainReporter


@pytest.fixture(scope="session")
def chromium(request: pytest.FixtureRequest) -> ChromiumProgram:
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():  # a download should be seen
        return find_chromium(reporter=PlainReporter())


@pytest.fixture(scope="session")
def browser(chromium: ChromiumProgram, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(chromium, Path(tmp_path_factory.mktemp("browser"))) as browser:
        yield browser
