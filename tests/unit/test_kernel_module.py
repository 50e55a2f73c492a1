"""The guest's kernel module, as far as no kernel is needed: its ACPI table, and when set-up builds it."""

from __future__ import annotations

import os
import re
import struct
import time
from pathlib import Path

import pytest

from vmbus.errors import EnvironmentProblem
from vmbus.provision import kernel_module
from vmbus.provision.cache import Cache
from vmbus.provision.guest_files import LINUX_DRIVERS, Kernel, vmbus_aliases
from vmbus.provision.kernel_module import KernelModule, find, is_known, module_key, remembered, source_folder, sources
from vmbus.provision.programs import ProgramFailed
from vmbus.provision.report import Reporter, SilentReporter
from vmbus.provision.roots import Root

KERNEL = Kernel(Path("/nonexistent/vmlinuz"), "6.12.117+deb13-cloud-amd64", {}, "6.12.117-1")


def package(body: bytes) -> bytes:
    """AML's length in front of something, which counts itself."""
    assert len(body) < 63
    return bytes([len(body) + 1]) + body


def name(name: bytes, value: bytes) -> bytes:
    return b"\x08" + name + value


def ssdt() -> bytes:
    """The table that acpi.c describes in its first comment."""
    end_tag = b"\x79\x00"
    device = b"".join(
        [
            b"VMBS",
            name(b"_HID", b"\x0dVMBUS\0"),
            name(b"_UID", b"\x00"),
            name(b"_STA", b"\x0a\x0f"),
            name(b"_CRS", b"\x11" + package(b"\x0a" + bytes([len(end_tag)]) + end_tag)),
        ]
    )
    body = b"\x10" + package(b"\\_SB_" + b"\x5b\x82" + package(device))
    rest = struct.pack("<6s8sI4sI", b"VMBUSD", b"VMBUSPCI", 1, b"VMBS", 1) + body
    plain = struct.pack("<4sIBB", b"SSDT", 10 + len(rest), 2, 0) + rest
    return plain[:9] + bytes([-sum(plain) & 255]) + plain[10:]


def test_the_acpi_table_is_what_its_comment_says() -> None:
    text = (source_folder() / "acpi.c").read_text()
    found = re.search(r"static u8 table\[\] __aligned\(8\) = \{(.*?)\n\};", text, re.DOTALL)
    assert found is not None
    items = re.findall(r"'(\\\\|[^'\\])'|0x([0-9a-f]{2})", re.sub(r"/\*.*?\*/", "", found[1]))
    table = bytes(ord(letter[-1]) if letter else int(number, 16) for letter, number in items)
    assert table == ssdt()
    assert sum(table) & 255 == 0 and struct.unpack_from("<I", table, 4) == (len(table),)


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("6.12.117+deb13-cloud-amd64", True),
        ("6.12", True),
        ("6.120.1", False),
        ("6.1.0-30-amd64", False),
        ("7.0.3", False),
        ("16.12.1", False),
    ],
)
def test_kernels_that_it_is_written_for(version: str, known: bool) -> None:
    assert is_known(version) is known


def test_the_key_follows_the_kernel_and_the_sources(tmp_path: Path) -> None:
    folder = tmp_path / "kernel"
    folder.mkdir()
    for path in sources(source_folder()):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "COPYING").write_text("not part of it")
    key = module_key(KERNEL, folder)
    assert key == module_key(KERNEL, source_folder())
    newer = Kernel(KERNEL.image, KERNEL.version, {}, "6.12.117-2")
    other = Kernel(KERNEL.image, "6.12.118", {}, KERNEL.package)
    (folder / "main.c").write_text("changed")
    assert len({key, module_key(newer, folder), module_key(other, folder), module_key(KERNEL, folder)}) == 4


class Heard(SilentReporter):
    """A reporter that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_another_kernel_goes_without_and_nothing_is_tried(tmp_path: Path) -> None:
    kernel = Kernel(KERNEL.image, "6.1.0-30-cloud-amd64", {}, "6.1")
    found = find(Cache(tmp_path), kernel)
    assert found.path is None and "6.1.0-30" in found.problem and "6.12" in found.problem
    assert not list(tmp_path.iterdir())


def test_a_machine_without_a_compiler_goes_without_and_is_asked_again_a_day_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, heard = Cache(tmp_path), Heard()
    assert remembered(cache, KERNEL) is None
    with cache.lock():
        found = find(cache, KERNEL, heard, {"PATH": str(tmp_path)})
    assert found.path is None and "apt-get install -y gcc make" in found.problem
    assert len(heard.notes) == 1 and "userspace driver" in heard.notes[0]
    without = {"PATH": str(tmp_path)}
    assert remembered(cache, KERNEL, without) == found
    assert remembered(cache, KERNEL, os.environ) is None, "now there is one"
    record = cache.path("module", module_key(KERNEL, source_folder()), "build.json")
    yesterday = time.time() - kernel_module.PROBLEM_LASTS - 10
    os.utime(record, (yesterday, yesterday))
    assert remembered(cache, KERNEL, without) is None


def test_what_was_built_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, tries = Cache(tmp_path), []

    def build(headers: Root, kernel: Kernel, folder: Path, scratch: Path) -> Path:
        tries.append(kernel.version)
        (scratch / "vmbus_pci.ko").write_bytes(b"\x7fELF")
        return scratch / "vmbus_pci.ko"

    def headers(cache: Cache, kernel: Kernel, reporter: Reporter, environment: object) -> Root:
        return Root(tmp_path, {})

    monkeypatch.setattr(kernel_module, "build", build)
    monkeypatch.setattr(kernel_module, "find_headers", headers)
    with cache.lock():
        found = find(cache, KERNEL)
        assert found == find(cache, KERNEL) == remembered(cache, KERNEL)
    assert found.path is not None and found.path.read_bytes() == b"\x7fELF" and len(tries) == 1
    found.path.unlink()
    with cache.lock():
        assert find(cache, KERNEL) == found and len(tries) == 2
    newer = Kernel(KERNEL.image, KERNEL.version, {}, "6.12.117-2")
    assert remembered(cache, newer) is None, "a new kernel package has a module of its own"


def test_what_cannot_be_built_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def headers(cache: Cache, kernel: Kernel, reporter: Reporter, environment: object) -> Root:
        raise EnvironmentProblem("no network")

    monkeypatch.setattr(kernel_module, "find_headers", headers)
    cache = Cache(tmp_path)
    with cache.lock():
        assert find(cache, KERNEL) == KernelModule(None, "no network")


def test_a_kernel_whose_headers_are_gone_is_named_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mirror:
        def __init__(self, *_: object, **__: object) -> None: ...

        def depends(self, package: str) -> list[str]:
            raise ProgramFailed(f"no package {package}")

    monkeypatch.setattr(kernel_module, "Apt", Mirror)
    cache = Cache(tmp_path)
    with cache.lock():
        problem = find(cache, KERNEL).problem
    assert f"no headers of {KERNEL.version} any more" in problem and str(tmp_path / "kernel") in problem


def test_what_modules_bind_to() -> None:
    data = b"\x7fELF\0alias=vmbus:394f16571591784eab55382f3bd5422d\0alias=vmbus:31600b0e13523449818b38d90ced39db\0x\0"
    assert vmbus_aliases(data) == ["0e0b6031-5213-4934-818b-38d90ced39db", "57164f39-9115-4e78-ab55-382f3bd5422d"]
    assert vmbus_aliases(b"\x7fELF\0alias=pci:v00005642d00004D56*\0") == []


def test_modules_are_loaded_behind_what_they_depend_on() -> None:
    kernel = Kernel(
        Path("/x"),
        "6.12",
        {"hv_vmbus": (), "scsi_transport_fc": ("scsi_mod",), "hv_storvsc": ("hv_vmbus", "scsi_transport_fc")},
        "1",
    )
    assert kernel.closure(LINUX_DRIVERS) == ["hv_vmbus", "scsi_transport_fc", "hv_storvsc"]


def test_the_page_has_every_redirect_and_every_counter() -> None:
    page = (Path(__file__).parents[2] / "docs/linux-guest.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    redirected = set(re.findall(r"\.from = (\w+)", (source_folder() / "redirect.c").read_text()))
    assert len(redirected) == 5 and redirected <= named
    counted = set(re.findall(r"X\((\w+)\)\t", (source_folder() / "vmbus_pci.h").read_text())) - {"name"}
    counted |= set(re.findall(r"\tX\((\w+)\)$", (source_folder() / "vmbus_pci.h").read_text(), re.MULTILINE))
    table = page.partition("## Counters")[2].partition("## ")[0]
    assert counted == set(re.findall(r"`(\w+)`", table))
    assert {"hv_utils", "hv_storvsc"} <= set(LINUX_DRIVERS) & named


def test_the_sources_say_their_licence() -> None:
    for path in sources(source_folder()):
        assert "SPDX-License-Identifier: GPL-2.0-only" in path.read_text().partition("\n")[0], path
    assert "GNU GENERAL PUBLIC LICENSE" in (source_folder() / "COPYING").read_text()
