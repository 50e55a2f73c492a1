"""The newc format, and which of our files get into the guest's image under which key."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbus.errors import EnvironmentProblem
from vmbus.provision.cache import Cache, prune
from vmbus.provision.digests import damaged, write_digests
from vmbus.provision.guest_files import Kernel
from vmbus.provision.roots import Root
from vmbus_guest import image, newc

CHECKOUT = Path(__file__).parents[2]

PART = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda text: text not in (".", "..", newc.TRAILER)
)


def test_header_is_the_kernels() -> None:
    """Field by field as the kernel's documentation has it, for one small file."""
    data = newc.write([newc.file("init", b"hello", 0o755)])
    assert data[:6] == b"070701"
    assert [int(data[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)] == [1, 0o100755, 0, 0, 1, 0, 5, 0, 0, 0, 0, 5, 0]
    assert data[110:116] == b"init\0\0"[:6]
    assert data[116:124] == b"hello\0\0\0"
    assert data[124:130] == b"070701"
    assert b"TRAILER!!!\0" in data[124:]
    assert len(data) % 4 == 0


@given(st.dictionaries(st.lists(PART, min_size=1, max_size=3).map("/".join), st.binary(max_size=40), max_size=8))
def test_files_come_back(files: dict[str, bytes]) -> None:
    # A path cannot be both a file and a folder.
    files = {name: data for name, data in files.items() if not any(other.startswith(name + "/") for other in files)}
    data = newc.write([newc.file(name, contents) for name, contents in files.items()])
    back = list(newc.read(data))
    assert {entry.name: entry.data for entry in back if stat.S_ISREG(entry.mode)} == files
    seen: set[str] = set()
    for entry in back:
        parent = entry.name.rpartition("/")[0]
        assert not parent or parent in seen  # the kernel makes no folder on its own
        seen.add(entry.name)


def test_order_of_entries_does_not_matter() -> None:
    entries = [newc.file("b/x", b"1"), newc.file("a", b"2"), newc.file("b-c", b"3")]
    assert newc.write(entries) == newc.write(reversed(entries))


def test_two_archives_in_a_row() -> None:
    data = newc.write([newc.file("a", b"1")]) + bytes(8) + newc.write([newc.file("a", b"2")])
    assert [entry.data for entry in newc.read(data)] == [b"1", b"2"]


@pytest.mark.parametrize("name", ["", "/etc", "a//b", "a/../b", "./a", "a/", "TRAILER!!!", "TRAILER!!!/a", "a\0b"])
def test_paths_that_the_kernel_would_misread_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a path"):
        newc.write([newc.file(name, b"")])


def test_duplicates_are_refused() -> None:
    with pytest.raises(ValueError, match="two entries for a"):
        newc.write([newc.file("a", b""), newc.symlink("a", "b")])


def test_damage_is_noticed() -> None:
    data = newc.write([newc.file("a", b"12345678")])
    for broken in (data[:60], data[:118], data[:130], b"x" + data[1:], data[: -len(data) // 2]):
        with pytest.raises(ValueError):
            list(newc.read(broken))


# --- what is in the image --------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Root, Kernel, list[Path], Path]:
    """A userland record, a kernel, two packages and a tree, as far as the key needs them."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "packages.json").write_text("{}")
    for name in ("vmbus/__init__.py", "vmbus/errors.py", "vmbus/bus/core.py", "vmbus/server/main.py", "vmbus/vm/x.py"):
        path = tmp_path / "p" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a = 1\n")
    (tmp_path / "p/vmbus/notes.txt").write_text("not code")
    rootfs = tmp_path / "rootfs"
    (rootfs / "bin").mkdir(parents=True)
    (rootfs / "init").write_text("#!/bin/sh\n")
    (rootfs / "init").chmod(0o755)
    (rootfs / "bin/tool").write_text("")
    kernel = Kernel(tmp_path / "vmlinuz", "6.12", {"vfio": ()}, "1")
    return Root(root, {}), kernel, [tmp_path / "p/vmbus"], rootfs


def test_guest_gets_its_part_only(parts: tuple[Root, Kernel, list[Path], Path]) -> None:
    _, _, packages, rootfs = parts
    names = [name for name, _ in image._sources(packages, rootfs)]
    assert names == [
        "init",
        "usr/bin",
        "usr/bin/tool",
        "usr/lib/vmbus/vmbus/__init__.py",
        "usr/lib/vmbus/vmbus/bus/core.py",
        "usr/lib/vmbus/vmbus/errors.py",
    ]


def test_this_checkouts_part() -> None:
    names = {name for name, _ in image._sources(None, None)}
    assert {
        "init",
        "usr/lib/vmbus/vmbus/ring/pure.py",
        "usr/lib/vmbus/vmbus/errors.py",
        "usr/lib/vmbus/vmbus_guest/__init__.py",
    } <= names
    for host in ("vmbus/provision/", "vmbus/server/", "vmbus/cli/", "vmbus_guest/image.py", "vmbus_guest/rootfs"):
        assert not any(name.startswith(f"usr/lib/vmbus/{host}") for name in names), host


def test_kernel_can_start_init() -> None:
    (init,) = [path for name, path in image._sources(None, None) if name == "init"]
    assert image._mode(init) == 0o755


def test_key_follows_everything_that_goes_in(parts: tuple[Root, Kernel, list[Path], Path]) -> None:
    userland, kernel, packages, rootfs = parts
    keys = [image.image_key(userland, kernel, packages, rootfs)]
    assert image.image_key(userland, kernel, packages, rootfs) == keys[0]

    def changed() -> None:
        keys.append(image.image_key(userland, kernel, packages, rootfs))
        assert len(set(keys)) == len(keys)

    (packages[0] / "errors.py").write_text("a = 2\n")
    changed()
    (packages[0] / "bus" / "new.py").write_text("")
    changed()
    (rootfs / "bin/tool").chmod(0o755)
    changed()
    (rootfs / "bin/tool").unlink()
    (rootfs / "bin/tool").symlink_to("busybox")
    changed()
    (rootfs / "bin/tool").unlink()
    (rootfs / "bin/tool").symlink_to("python3")
    changed()
    (userland.path / "packages.json").write_text("{1}")
    changed()
    kernel = Kernel(kernel.image, "6.13", kernel.modules, kernel.package)
    changed()
    for contents in ("a core", "another core"):
        (core := packages[0] / "core.so").write_text(contents)
        keys.append(image.image_key(userland, kernel, packages, rootfs, core))
    assert len(set(keys)) == len(keys)


def test_fault_h10_an_image_that_was_damaged_in_the_cache_is_made_anew(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    folder = cache.path("image", "key")
    folder.mkdir(parents=True)
    (folder / "vmlinuz").write_bytes(b"kernel")
    (folder / "initramfs.cpio").write_bytes(b"initramfs")
    write_digests(folder)
    assert image.find_image(cache, "key") is not None
    with (folder / "vmlinuz").open("r+b") as file:
        file.write(b"K")
    assert damaged(folder) == "vmlinuz"
    assert image.find_image(cache, "key") is None, "it is built again, in its place"


@pytest.mark.parametrize("how", ["more", "less", "record", "rubbish"])
def test_fault_h10_whatever_was_changed_is_named(tmp_path: Path, how: str) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "a.ko").write_bytes(b"a")
    assert damaged(tmp_path) == "", "an older folder has no digests"
    write_digests(tmp_path)
    assert damaged(tmp_path) == ""
    if how == "more":
        (tmp_path / "new").touch()
    elif how == "less":
        (tmp_path / "modules" / "a.ko").unlink()
    else:
        (tmp_path / "digests.json").write_bytes(b"{}" if how == "record" else b"[" * 100_000)
    expected = {"more": "new", "less": "modules/a.ko", "record": "modules/a.ko", "rubbish": "digests.json"}
    assert damaged(tmp_path) == expected[how]


def test_fault_h10_a_damaged_kernel_is_not_built_in(
    tmp_path: Path, parts: tuple[Root, Kernel, list[Path], Path]
) -> None:
    userland, kernel, packages, rootfs = parts
    folder = tmp_path / "kernel"
    folder.mkdir()
    (folder / "vmlinuz").write_bytes(b"kernel")
    write_digests(folder)
    (folder / "vmlinuz").write_bytes(b"Kernel")
    kernel = Kernel(folder / "vmlinuz", "6.12", {}, "1")
    with pytest.raises(EnvironmentProblem, match=r"vmlinuz was damaged: remove .*/kernel, and the next set-up"):
        image.build_image(userland, kernel, Cache(tmp_path / "cache"), packages=packages, rootfs=rootfs)


def test_key_ignores_what_stays_at_home(parts: tuple[Root, Kernel, list[Path], Path]) -> None:
    userland, kernel, packages, rootfs = parts
    key = image.image_key(userland, kernel, packages, rootfs)
    (packages[0] / "server/main.py").write_text("a = 2\n")
    (packages[0] / "notes.txt").write_text("changed")
    (packages[0] / "__pycache__").mkdir()
    (packages[0] / "__pycache__/ring.cpython-311.pyc").write_bytes(b"")
    assert image.image_key(userland, kernel, packages, rootfs) == key


@pytest.mark.parametrize(
    ("relative", "unused"),
    [
        ("test/support/__init__.pyc", True),
        ("encodings/cp1252.pyc", True),
        ("encodings/utf_8.pyc", False),
        ("lib-dynload/_hashlib.cpython-313-x86_64-linux-gnu.so", True),
        ("lib-dynload/_ctypes.cpython-313-x86_64-linux-gnu.so", False),
        ("lib-dynload/_ctypes_test.cpython-313-x86_64-linux-gnu.so", True),
        ("asyncio/base_events.pyc", False),
        ("os.pyc", False),
    ],
)
def test_pruning(relative: str, unused: bool) -> None:
    assert image._unused(relative) is unused


def test_older_images_are_removed(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for number in range(image.KEPT_IMAGES + 3):
        path = cache.path("image", f"k{number}")
        path.mkdir(parents=True)
        os.utime(path, (number, number))
    prune(cache.path("image", "k0"), image.KEPT_IMAGES, image.RECENT)
    left = {path.name for path in cache.path("image").iterdir()}
    assert len(left) == image.KEPT_IMAGES
    assert "k0" in left  # the current one, although it is the oldest
    assert "k1" not in left
    for path in cache.path("image").iterdir():  # all in use
        os.utime(path)
    for number in range(3):
        cache.path("image", f"new{number}").mkdir()
    prune(cache.path("image", "k0"), image.KEPT_IMAGES, image.RECENT)
    assert len(list(cache.path("image").iterdir())) == image.KEPT_IMAGES + 3
