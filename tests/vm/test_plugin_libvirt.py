"""The device in a domain of libvirt's, as docs/plugin.md has it: the domain and the hook that come with the project, as
`qemu:///session` and as `qemu:///system`.

libvirt is Debian's, fetched when this first wants it; libvirtd is one of the test's own, in namespaces (root).
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import pace
from support.by_hand import PYTHONPATH
from support.libvirt_host import LibvirtHost
from vmbus.provision.libvirt import find_libvirt
from vmbus.vm.command_line import Programs

pytestmark = [pytest.mark.vm, pytest.mark.long]

CHECKOUT = Path(__file__).resolve().parents[2]
FILES = CHECKOUT / "share" / "vmbus-device" / "libvirt"


def program(path: Path, argv: list[str], **environment: str) -> Path:
    """A script that starts a program: libvirtd hands down no environment, and an emulator has no arguments."""
    said = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
    path.write_text(f'#!/bin/sh\n{said}exec {shlex.join(argv)} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def own(record_property: Callable[[str, object], None]) -> Iterator[Path]:
    if os.getuid() != 0 or shutil.which("unshare") is None or shutil.which("nsenter") is None:
        record_property("needs-root", "namespaces for a libvirtd of the test's own")
        pytest.skip("a libvirtd of the test's own takes root")
    with tempfile.TemporaryDirectory(prefix="lv-") as name:
        yield Path(name)


@pytest.fixture
def host(own: Path, programs: Programs, request: pytest.FixtureRequest) -> Iterator[LibvirtHost]:
    """libvirt with the project's hook, and a domain that is defined and not started."""
    session = request.param == "session"
    environment = {"PYTHONPATH": PYTHONPATH, "VMBUS_LIBVFIO_USER": str(programs.libvfio_user)}
    vmbus = program(own / "vmbus", [sys.executable, "-m", "vmbus"], **environment)
    emulator = program(own / "emulator", list(programs.qemu))
    hook = (FILES / "qemu").read_text()
    for old, new in (("vmbus=vmbus ", f"vmbus={vmbus} "), ("user=libvirt-qemu ", "user=root ")):
        assert old in hook
        hook = hook.replace(old, new)
    descriptions = {"vmbus": (CHECKOUT / "qemu_configs" / "demo.toml").read_text()}
    with LibvirtHost(find_libvirt(), own, hook, descriptions, session=session) as host:
        domain = (FILES / "domain.xml").read_text()
        for old, new in (
            ("type='kvm'", "type='qemu'"),
            ("/run/vmbus-device", f"{host.run}/vmbus-device"),
            ("<devices>", f"<devices><emulator>{emulator}</emulator>"),
            ("<memory unit='MiB'>1024<", "<memory unit='MiB'>256<"),
        ):
            assert old in domain
            domain = domain.replace(old, new)
        (own / "domain.xml").write_text(domain)
        host.virsh("define", str(own / "domain.xml"))
        yield host


class Owner:
    """`vmbus attach` where libvirtd's files are."""

    def __init__(self, host: LibvirtHost, *arguments: str) -> None:
        self.log = host.own / "attach.log"
        self._place = host.run / "vmbus-device" / "vmbus"
        with self.log.open("wb") as log:
            self.process = host.spawn(
                sys.executable, "-m", "vmbus", "attach", "--qmp", str(self._place / "qmp.sock"), *arguments, output=log
            )
        pace.until(lambda: "work until" in self.text or self.process.poll() is not None, "attach")
        assert self.process.poll() is None, self.text

    @property
    def text(self) -> str:
        return " ".join(self.log.read_text().split())

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(pace.seconds(20))


def come_back(host: LibvirtHost) -> None:
    """The snapshot, in a domain that awaits it."""
    domain = (host.own / "domain.xml").read_text()
    more = "".join(f"<qemu:arg value='{word}'/>" for word in ("-incoming", "defer"))
    awaiting = host.own / "awaiting.xml"
    awaiting.write_text(domain.replace("</qemu:commandline>", f"{more}</qemu:commandline>"))
    hook = host.own / "etc" / "libvirt" / "hooks" / "qemu"
    told = hook.read_text()
    hook.write_text(told.replace("--once", "--once --await-state"))
    host.virsh("undefine", "vmbus")
    host.virsh("create", "--paused", str(awaiting))
    with Owner(host, "--restore", str(host.own / "snapshot")) as owner:
        assert "it is paused, as it was" in owner.text
    host.virsh("destroy", "vmbus")
    hook.write_text(told)
    host.virsh("define", str(host.own / "domain.xml"))


@pytest.mark.parametrize("host", ["session", "system"], indirect=True)
def test_plugin_libvirt_domain_with_hook_attach_and_no_managed_save(
    host: LibvirtHost, note: Callable[[str], None]
) -> None:
    """The domain stands: no guest is needed for this."""
    found = host.virsh("domxml-to-native", "qemu-argv", str(host.own / "domain.xml")).stdout
    assert "vfio-user-pci" in found and '"share":true' in found and "qmp.sock" in found
    host.virsh("start", "--paused", "vmbus")
    with Owner(host, "--name", "vmbus") as owner:
        refused = host.virsh("managedsave", "vmbus", check=False)
        assert refused.returncode != 0 and "canceled" in refused.stderr
        assert host.state("vmbus") == "paused" and "QEMU leaves the VMBus device out" in owner.text
        saved = host.inside(sys.executable, "-m", "vmbus", "save", "--vm", "vmbus", str(host.own / "snapshot"))
        assert saved.returncode == 0
        owner.process.wait(pace.seconds(20))
        assert owner.process.returncode == 0, owner.text
    pace.until(lambda: host.state("vmbus") == "shut off", "libvirt to notice")
    pace.until(lambda: not (host.inside("sh", "-c", f"ls {host.run}/vmbus-device").stdout.split()), "the hook's end")
    if host.session:
        come_back(host)
    # Without attach nobody can stop libvirt from saving it; the hook does not let it be brought back.
    host.virsh("start", "--paused", "vmbus")
    host.virsh("managedsave", "vmbus")
    host.virsh("start", "vmbus", check=False)
    assert host.state("vmbus") == "shut off" and "without its VMBus device" in host.log
    note(f"libvirt, {host.uri}: a domain with hook and attach, saved by vmbus, its managed save refused")
