"""A machine without apt, compiler and network takes a set-up that another one has made, and runs the demo; so does a
container."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support import container_file, installed
from support.empty_root import HOME, PYTHONS, EmptyRoot, packages
from support.namespace import NotPermitted
from vmbus.provision import environment, prebuilt, provision_debian
from vmbus.provision.cache import Cache, remove
from vmbus.provision.report import SilentReporter
from vmbus.provision.sources import host_suite
from vmbus.vm.command_line import Programs

pytestmark = [pytest.mark.vm, pytest.mark.long]

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def archive(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This machine's set-up, with the packages for the Python of the empty root."""
    file = tmp_path_factory.mktemp("archive") / "setup.tar.gz"
    file.parent.chmod(0o755)  # it is read by another user, where it is seen
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


@pytest.mark.timeout(1500)  # with making the Debian, where it is not
def test_packaging_the_container_file_is_carried_out(
    archive: Path, tmp_path: Path, note: Callable[[str], None]
) -> None:
    """As the page says, from a wheel and an archive; then its demo is run, without network, as its user."""
    try:
        container_file.require_root()
    except PermissionError as error:
        pytest.skip(str(error))
    (context := tmp_path / "context").mkdir()
    shutil.copy(CHECKOUT / "Containerfile", context)
    (context / "dist").mkdir()
    (context / "dist/setup.tar.gz").hardlink_to(archive)
    for name in ("sdist", "wheel"):
        (tmp_path / name).mkdir()
    built = installed.wheel(tmp_path / "wheel", installed.sdist(tmp_path / "sdist"))
    shutil.copy(built, context / "dist")
    base = container_file.debian_root(provision_debian(), tmp_path / "root")
    name = container_file.engine()
    machine: container_file.Image | container_file.Root
    if name:
        machine = container_file.Image(name)
        machine.build(context / "Containerfile", base)
    else:
        machine = container_file.Root(base)
        machine.build(context / "Containerfile")
    try:
        done = machine.run()
        print(done.stdout[-3000:], done.stderr)
        assert done.returncode == 0 and "PASS" in done.stdout, done.stdout + done.stderr
        who = machine.run("setup", "--check")
        assert who.returncode == 0 and "everything is there" in who.stdout, who.stdout + who.stderr
    finally:
        machine.close()
        remove(base)
    note(f"the container file was carried out by {name or 'its instructions, in a fresh root: there is no engine'}")
