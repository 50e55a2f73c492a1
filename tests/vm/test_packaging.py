"""A machine without apt, compiler and network takes a set-up that another one has made, and runs the demo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.empty_root import HOME, PYTHONS, EmptyRoot, packages
from support.namespace import NotPermitted
from vmbus.provision import environment, prebuilt
from vmbus.provision.cache import Cache
from vmbus.provision.report import SilentReporter
from vmbus.provision.sources import host_suite
from vmbus.vm.command_line import Programs

pytestmark = [pytest.mark.vm, pytest.mark.long]

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def archive(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This machine's set-up, with the packages for the Python of the empty root."""
    file = tmp_path_factory.mktemp("archive") / "setup.tar.gz"
    prebuilt.export(file, Cache(), CHECKOUT, SilentReporter(), [PYTHONS.get(host_suite(), environment.PYTHON)])
    return file


def test_packaging_the_demo_where_nothing_can_be_fetched_or_built(archive: Path, tmp_path: Path) -> None:
    """In a root with Debian's Python alone, as an ordinary user, from the checkout as it is."""
    suite = host_suite()
    mounts = {CHECKOUT: "/checkout", archive.parent: "/archive"}
    machine = EmptyRoot(tmp_path / "root", packages(suite if suite in PYTHONS else "trixie"), mounts)
    script = f"""
        for name in gcc cc make apt-get dpkg-deb git; do if command -v $name; then exit 3; fi; done
        test "$(ls /sys /var 2>/dev/null | wc -l)" -eq 0 && test ! -e /etc/apt || exit 4
        cd /checkout || exit 5
        scripts/setup --check && exit 6
        scripts/setup --import /archive/{archive.name} || exit 7
        scripts/setup --check || exit 8
        scripts/demo --json {HOME}/figures.json || exit 9
    """
    try:
        done = machine.run(script, 200)
    except NotPermitted as error:
        pytest.skip(str(error))
    print(done.stdout[-3000:], done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Debian's programs: apt-get, apt-cache, dpkg-deb not found" in done.stdout
    figures = json.loads((machine.folder / HOME.lstrip("/") / "figures.json").read_bytes())
    assert figures["verdict"] == "pass" and figures["completed"] == figures["transactions"] > 45_000
    assert min(figures["in_flight"].values()) > 0
