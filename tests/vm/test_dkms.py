"""Debian's own DKMS builds the guest's kernel module of what `vmbus-guest dkms` writes, for the right kernels."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support import pace
from vmbus.provision import kernel_module, provision
from vmbus.provision.apt import Apt
from vmbus.provision.cache import Cache
from vmbus.provision.guest_files import find_kernel
from vmbus.provision.report import SilentReporter
from vmbus.provision.roots import unpack
from vmbus.provision.sources import SUITE
from vmbus_guest import system


def test_own_guest_dkms_builds_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provision()
    cache, kernel = Cache(), find_kernel(Cache())
    with cache.lock():
        headers = kernel_module.find_headers(cache, kernel, SilentReporter())
        unpack(Apt(cache, (SUITE,)).download(["dkms"]), tmp_path / "dkms", SilentReporter())
    monkeypatch.setattr(system, "version", lambda _: "0.1.0")
    system.dkms(tmp_path / "src", build=False, say=print)

    def build(release: str) -> tuple[int, str]:
        argv = ["bash", tmp_path / "dkms/usr/sbin/dkms", "build", "vmbus_pci/0.1.0", "-k", release]
        for option in ("sourcetree", "dkmstree", "installtree"):
            folder = tmp_path / {"sourcetree": "src"}.get(option, option)
            folder.mkdir(exist_ok=True)
            argv += [f"--{option}", folder]
        argv += ["--kernelsourcedir", headers.path / "usr/src" / f"linux-headers-{kernel.version}"]
        # The host's compiler, as for the image: see vmbus.provision.kernel_module.
        words = " ".join(["--", "CC=gcc", "CONFIG_DEBUG_INFO_BTF_MODULES=", "CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT="])
        done = subprocess.run(
            argv, env={**os.environ, "MAKEFLAGS": words}, capture_output=True, text=True, timeout=pace.seconds(120)
        )
        return done.returncode, done.stdout + done.stderr

    status, said = build(kernel.version)
    assert status == 0, said
    (module,) = (tmp_path / "dkmstree").rglob("vmbus_pci.ko*")
    assert module.stat().st_size > 10_000 and kernel.version.encode() in module.read_bytes()
    status, said = build("6.1.0-99-amd64")
    assert status != 0 and "BUILD_EXCLUSIVE" in said, (status, said)
