"""The real image: equal inputs give equal bytes, it holds what the guest needs, and it runs."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmbus.provision import guest_files, provision
from vmbus.provision.accel import boot_trial, try_accelerator
from vmbus.provision.cache import Cache
from vmbus.provision.guest_files import Kernel
from vmbus.provision.roots import Root
from vmbus_guest import newc
from vmbus_guest.image import GuestImage, build_image


@pytest.fixture(scope="module")
def parts() -> tuple[Root, Kernel]:
    provision()
    cache = Cache()
    with cache.lock():
        return guest_files.find_userland(cache), guest_files.find_kernel(cache)


@pytest.fixture(scope="module")
def built(parts: tuple[Root, Kernel], tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestImage]:
    cache = Cache(tmp_path_factory.mktemp("image"))
    with cache.lock():
        yield build_image(*parts, cache, native_core=provision().native_core)


def test_equal_inputs_give_equal_bytes(parts: tuple[Root, Kernel], built: GuestImage, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with cache.lock():
        again = build_image(*parts, cache, native_core=provision().native_core)
    assert again.key == built.key
    assert again.initramfs.read_bytes() == built.initramfs.read_bytes()


def test_image_holds_what_the_guest_needs(parts: tuple[Root, Kernel], built: GuestImage) -> None:
    # Later entries replace earlier ones, as they do in the kernel.
    entries = {entry.name: entry for entry in newc.read(built.initramfs.read_bytes())}
    for name in (
        "init",
        "usr/bin/busybox",
        "usr/bin/sh",
        "usr/bin/python3.13",
        "usr/lib/python3.13/os.pyc",
        "usr/sbin/mke2fs",
        "usr/sbin/e2fsck",
        "usr/lib/x86_64-linux-gnu/libffi.so.8",
        "usr/lib/x86_64-linux-gnu/libext2fs.so.2",
        "usr/lib64/ld-linux-x86-64.so.2",
        "usr/lib/modules/vfio_pci.ko",
        "usr/lib/vmbus/vmbus/ring/__init__.py",
        "usr/lib/vmbus/vmbus/ring/__pycache__/__init__.cpython-313.pyc",
        "usr/lib/vmbus/vmbus_guest/__init__.py",
        *(["usr/lib/vmbus/vmbus/native/_core.abi3.so"] if provision().native_core else []),
    ):
        assert name in entries, name
    assert stat.S_ISCHR(entries["dev/console"].mode)
    assert entries["init"].mode & 0o100
    order = entries["usr/lib/modules/order"].data.decode().splitlines()
    loaded: set[str] = set()
    for line in order:
        module, *needed = line.split()
        assert set(needed) <= loaded, line
        assert f"usr/lib/modules/{module}.ko" in entries
        loaded.add(module)
    assert built.initramfs.stat().st_size < 32e6


def test_trial_of_an_accelerator_succeeds_where_it_can(parts: tuple[Root, Kernel], tmp_path: Path) -> None:
    """Under TCG, which always works: a trial that fails for its own reasons would forbid KVM for ever."""
    userland, kernel = parts
    cache = Cache(tmp_path)
    assert try_accelerator("tcg", provision().qemu, kernel, userland, cache, 60) is None
    assert list(tmp_path.iterdir()) == []


def test_guests_python_runs_with_ctypes_and_the_native_core(parts: tuple[Root, Kernel], tmp_path: Path) -> None:
    core = provision().native_core
    rootfs = tmp_path / "rootfs"
    rootfs.mkdir()
    init = rootfs / "init"
    program = (
        "import asyncio, ctypes, dataclasses, fcntl, hashlib, json, mmap, select, struct, typing, uuid, vmbus.errors; "
        "assert ctypes.CDLL(None).getpid() > 1; "
        "assert vmbus.errors.__spec__.cached.endswith('.pyc'); "
        "from vmbus.native.choice import CORE; "
        f"assert CORE.startswith('{'native' if core else 'pure'}'), CORE; "
        "from vmbus.memory.guest import GuestMemory; from vmbus.ring import RingReader, RingWriter; "
        "memory = GuestMemory(); memory.map(0, memoryview(mmap.mmap(-1, 8192)), True); "
        "pages = memory.window([(0, 4096)]), memory.window([(4096, 4096)]); "
        "writer, reader = RingWriter(*pages), RingReader(*pages); "
        "writer.put(6, 0, 7, b'x' * 8); assert writer.commit(); "
        "assert reader.fetch()[0][0].payload == b'x' * 8; "
        "print('vmbus-' + 'guest-runs')"
    )
    init.write_text(
        "#!/bin/sh\nmount -t devtmpfs dev /dev\nmount -t proc proc /proc\n"
        "while read -r name needed; do\n"
        # Without a VMBus, hv_vmbus and what stands on it are not taken.
        'case "$name $needed" in *hv_vmbus*) continue ;; esac\n'
        "insmod /lib/modules/$name.ko || exec poweroff -f; done < /lib/modules/order\n"
        f'PYTHONPATH=/usr/lib/vmbus python3 -c "{program}"\npoweroff -f\n'
    )
    init.chmod(0o755)
    cache = Cache(tmp_path / "cache")
    with cache.lock():
        image = build_image(*parts, cache, rootfs=rootfs, native_core=core)
    outcome = boot_trial(
        [
            *provision().qemu.argv,
            *("-accel", "tcg", "-cpu", "qemu64,+rdrand", "-machine", "q35", "-m", "256"),
            *("-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initramfs)),
            *("-append", "console=ttyS0 rdinit=/init panic=-1 quiet"),
        ],
        60,
    )
    assert outcome is None
