"""The agent in a guest with a system of its own, as pip installs it: files, what is missing, sources for DKMS."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from vmbus.cli.network import interfaces, user_id
from vmbus.errors import UsageError
from vmbus.vm.description import load_description
from vmbus_guest import system
from vmbus_guest.port import PORT_NAME

CHECKOUT = Path(__file__).resolve().parents[2]


def test_own_guest_install_writes_what_uninstall_removes(tmp_path: Path) -> None:
    said: list[str] = []
    system.install(tmp_path, 8, said.append)
    written = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert set(written) == {system.UNIT, system.RULE, system.MODULES, system.SETTINGS} and len(said) == 4
    assert f"PYTHONPATH={CHECKOUT / 'guest'} " in written[system.UNIT]
    assert PORT_NAME in written[system.RULE] and f"\\x2dports-{PORT_NAME}.device" in written[system.UNIT]
    system.uninstall(tmp_path, said.append)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    system.uninstall(tmp_path, said.append)


def test_own_guest_without_huge_pages_vfio_is_left_alone(tmp_path: Path) -> None:
    system.install(tmp_path, 0, lambda _: None)
    assert not (tmp_path / system.MODULES).exists() and not (tmp_path / system.SETTINGS).exists()


def test_own_guest_check_names_each_thing_that_is_missing(tmp_path: Path) -> None:
    sysfs, memory = tmp_path / "sys", tmp_path / "nr_hugepages"
    function = sysfs / "bus/pci/devices/0000:00:05.0"

    def write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def lacks() -> list[str]:
        return system.missing(str(sysfs), str(memory))

    (sysfs / "bus/pci/devices").mkdir(parents=True)
    write(memory, "0\n")
    assert [
        bool(re.search(pattern, text)) for pattern, text in zip(["virtserialport", "no device"], lacks(), strict=True)
    ]
    write(sysfs / "class/virtio-ports/vport0p1/name", f"{PORT_NAME}\n")
    write(function / "vendor", "0x5642\n")
    write(function / "device", "0x4d56\n")
    missing = lacks()
    assert len(missing) == 3 and "intel_iommu=on" in missing[0] and "modprobe" in missing[1] and "huge" in missing[2]
    (function / "iommu_group").symlink_to("../../../../kernel/iommu_groups/3")
    (sysfs / "bus/pci/drivers/vfio-pci").mkdir(parents=True)
    write(memory, "8\n")
    assert lacks() == []
    write(memory, "0\n")
    assert len(lacks()) == 1
    (function / "driver").symlink_to("../../drivers/vmbus_pci")  # Linux's own drivers have it
    assert lacks() == []


def test_own_guest_dkms_has_the_projects_version_and_all_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    monkeypatch.setattr(system, "version", lambda _: project["version"])
    system.dkms(tmp_path, build=False, say=lambda _: None)
    (folder,) = tmp_path.iterdir()
    settings = dict(re.findall(r'^(\w+)(?:\[0\])?="(.*)"$', (folder / "dkms.conf").read_text(), re.MULTILINE))
    assert (
        folder.name == f"{settings['PACKAGE_NAME']}-{settings['PACKAGE_VERSION']}" == f"vmbus_pci-{project['version']}"
    )
    assert {path.name for path in folder.iterdir()} == {path.name for path in (CHECKOUT / "guest/kernel").iterdir()}
    for kernel, known in (("6.12.117+deb13-amd64", True), ("6.1.0-9-amd64", False), ("6.120.1", False)):
        assert bool(re.match(settings["BUILD_EXCLUSIVE_KERNEL"], kernel)) is known


def test_own_guest_interfaces_to_be_made_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (CHECKOUT / "qemu_configs/network.toml").read_text()
    (found,) = interfaces(load_description(CHECKOUT / "qemu_configs/network.toml"))
    assert (found.name, found.mtu, found.address) == ("vmnet0", 9000, "192.0.2.1/24")
    other = tmp_path / "other.toml"
    other.write_text(text.replace('{ interface = "vmnet0"', '{ end = "veth"'))
    with pytest.raises(UsageError, match="end = 'tap'"):
        interfaces(load_description(other))
    with pytest.raises(UsageError, match="no user 'nobody-of-that-name'"):
        user_id("nobody-of-that-name")
    monkeypatch.setenv("SUDO_UID", "1234")
    assert user_id(None) == 1234
