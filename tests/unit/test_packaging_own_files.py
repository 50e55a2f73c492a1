"""The guest's kernel and user space by setting."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from support.debs import script
from support.prebuilt import put
from vmbus import provision as provisioning
from vmbus.errors import EnvironmentProblem
from vmbus.provision import accel, libvfio_user, native, needs, own_files, provision, provision_debian, qemu
from vmbus.provision.cache import Cache
from vmbus.provision.libvfio_user import VfioUserLibrary
from vmbus.provision.qemu import QemuProgram
from vmbus.provision.report import SilentReporter


def bzimage(path: Path, version: str = "6.18.3-arch1-1") -> Path:
    """The head of a kernel image."""
    data = bytearray(4096)
    data[0x202:0x206] = b"HdrS"
    data[0x20E:0x210] = (0x300).to_bytes(2, "little")
    text = f"{version} (somebody@host) #1 SMP".encode()
    data[0x500 : 0x500 + len(text)] = text
    put(path, bytes(data))
    return path


def module(*needed: str) -> bytes:
    return b"\x7fELF" + bytes(12) + b"\0license=GPL\0depends=" + ",".join(needed).encode() + b"\0name=x\0"


def settings(folder: Path, *names: str) -> dict[str, str]:
    paths = {"VMBUS_KERNEL": "vmlinuz", "VMBUS_MODULES": "modules", "VMBUS_INITRAMFS": "initramfs"}
    return {name: str(folder / paths[name]) for name in names}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Another distribution's: some modules built in, some compressed in its own way."""
    bzimage(tmp_path / "vmlinuz")
    put(tmp_path / "initramfs", b"070701 and so on")
    kernel = tmp_path / "modules/kernel"
    put(kernel / "virt/irqbypass.ko", module())
    put(kernel / "vfio/vfio.ko.xz", lzma.compress(module()))
    put(kernel / "vfio/vfio_iommu_type1.ko.gz", gzip.compress(module("vfio")))
    put(kernel / "vfio/vfio-pci-core.ko.xz", lzma.compress(module("irqbypass", "vfio")))
    put(kernel / "vfio/vfio-pci.ko", module("vfio-pci-core"))
    put(kernel / "char/virtio_console.ko", module())
    put(tmp_path / "modules/modules.builtin", b"kernel/drivers/virtio/virtio_pci.ko\nkernel/fs/ext4/ext4.ko\n")
    return tmp_path


def test_packaging_settings_that_do_not_fit_are_told(files: Path) -> None:
    assert own_files.wanted({}) is None and own_files.wanted({"VMBUS_KERNEL": " "}) is None
    for names, said in {
        ("VMBUS_MODULES",): "VMBUS_MODULES without VMBUS_KERNEL",
        ("VMBUS_INITRAMFS",): "VMBUS_INITRAMFS without VMBUS_KERNEL",
        ("VMBUS_KERNEL",): "wants one of two more",
        ("VMBUS_KERNEL", "VMBUS_MODULES", "VMBUS_INITRAMFS"): "wants one of two more",
    }.items():
        with pytest.raises(EnvironmentProblem, match=said):
            own_files.wanted(settings(files, *names))
    for name in own_files.SETTINGS:
        values = settings(files, "VMBUS_KERNEL", "VMBUS_INITRAMFS" if name == "VMBUS_INITRAMFS" else "VMBUS_MODULES")
        with pytest.raises(EnvironmentProblem, match=f"{name} is .*/gone, and there is no such (file|folder)"):
            own_files.wanted(values | {name: str(files / "gone")})


def test_packaging_the_kernels_version_is_in_its_header(tmp_path: Path) -> None:
    assert own_files.kernel_version(bzimage(tmp_path / "k")) == "6.18.3-arch1-1"
    for data in (b"", b"\x7fELF" + bytes(4096), bytes(4096)):
        put(tmp_path / "k", data)
        with pytest.raises(EnvironmentProblem, match="no bzImage"):
            own_files.kernel_version(tmp_path / "k")
    with pytest.raises(EnvironmentProblem, match="tells no version"):
        own_files.kernel_version(bzimage(tmp_path / "k", ""))


def find(files: Path, cache: Cache) -> Any:
    own = own_files.wanted(settings(files, "VMBUS_KERNEL", "VMBUS_MODULES"))
    assert own is not None
    return own_files.find_kernel(cache, own, SilentReporter())


def test_packaging_modules_of_another_kernel_are_taken(files: Path) -> None:
    cache = Cache(files / "cache")
    kernel = find(files, cache)
    assert kernel.version == "6.18.3-arch1-1" and not kernel.package
    order = ["virtio_console", "irqbypass", "vfio", "vfio_iommu_type1", "vfio_pci_core", "vfio_pci"]
    assert list(kernel.modules) == order and kernel.modules["vfio_pci_core"] == ("irqbypass", "vfio")
    assert all(kernel.module_path(name).read_bytes().startswith(b"\x7fELF") for name in order)
    assert kernel.image.read_bytes() == (files / "vmlinuz").read_bytes()
    problem = own_files.kernel_module(kernel)
    assert problem.path is None and "has no vmbus_pci.ko for 6.18.3-arch1-1" in problem.problem
    put(files / "modules/updates/dkms/vmbus_pci.ko.xz", lzma.compress(module("hv_vmbus")))
    newer = find(files, cache)
    assert newer.image != kernel.image, "what is taken follows what is there"
    found = own_files.kernel_module(newer)
    assert found.path is not None and found.path.read_bytes() == module("hv_vmbus")


def test_packaging_a_module_that_guests_need_is_missed(files: Path) -> None:
    (files / "modules/kernel/vfio/vfio-pci.ko").unlink()
    with pytest.raises(EnvironmentProblem, match=r"VMBUS_MODULES is .*no module vfio_pci, which guests need"):
        find(files, Cache(files / "cache"))
    put(files / "modules/kernel/vfio/vfio-pci.ko.gz", b"\x1f\x8bdamaged")
    with pytest.raises(EnvironmentProblem, match="damaged gzip data"):
        find(files, Cache(files / "cache"))


def test_packaging_a_whole_user_space_needs_no_debian(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No apt is asked, and no compiler; the snapshot's image is what was named, also after the file is replaced."""
    monkeypatch.setattr("vmbus.provision.apt.run_lines", lambda *_, **__: pytest.fail("something was fetched"))
    program = script(files / "qemu", "exit 0")
    monkeypatch.setattr(qemu, "query", lambda argv, source, image=(): QemuProgram(argv, (11, 1, 0), source))
    monkeypatch.setattr(libvfio_user, "find", lambda *_: VfioUserLibrary(program, "own"))
    monkeypatch.setattr(libvfio_user, "check_prerequisites", lambda *_: None)
    monkeypatch.setattr(native, "find", lambda *_: None)
    monkeypatch.setattr(native, "settled", lambda *_: True)
    monkeypatch.setattr(needs, "require_room", lambda *_: None)
    cache = Cache(files / "cache")
    values = {**settings(files, "VMBUS_KERNEL", "VMBUS_INITRAMFS"), "VMBUS_QEMU": str(program)}
    first = provision(cache, SilentReporter(), values)
    assert first.image.read_bytes() == (files / "initramfs").read_bytes() and first.kernel_version == "6.18.3-arch1-1"
    assert first.accelerator.name == "tcg"
    monkeypatch.setattr(provisioning, "_make", lambda *_: pytest.fail("it was made again"))
    assert provision(cache, SilentReporter(), values) == first
    monkeypatch.undo()
    with pytest.raises(EnvironmentProblem, match="unset VMBUS_KERNEL"):
        provision_debian(cache, SilentReporter(), values)


def test_packaging_kvm_is_taken_untried_where_there_is_nothing_to_try_it_with(files: Path) -> None:
    kernel = own_files.Kernel(files / "vmlinuz", "6.18", {}, "")
    program = QemuProgram(("/bin/false",), (11, 1, 0), "test")
    for value, name in (("kvm", "kvm"), ("tcg", "tcg"), ("", "tcg")):
        found = accel.choose_accelerator(program, kernel, None, environment={"VMBUS_ACCELERATOR": value})
        assert found.name == name


def test_packaging_set_up_follows_the_settings_files(files: Path) -> None:
    """Another kernel under the same name is another set-up."""
    values = settings(files, "VMBUS_KERNEL", "VMBUS_MODULES")
    before = json.dumps(own_files.identity(own_files.wanted(values)))
    put(files / "modules/kernel/fs/veth.ko", module())
    assert json.dumps(own_files.identity(own_files.wanted(values))) != before
