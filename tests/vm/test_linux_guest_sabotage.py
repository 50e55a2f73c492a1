"""Our kernel module without its check of what the host writes: one message ends the guest. So the check is worth it."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import struct
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from support import pace
from support.linux_guest import GuestMemory, described, message_page
from vmbus.operations.machine import VirtualMachine
from vmbus.provision import kernel_module, provision
from vmbus.provision.cache import Cache
from vmbus.provision.guest_files import Kernel, find_kernel, find_userland
from vmbus.provision.report import SilentReporter
from vmbus.vm.command_line import Programs
from vmbus_guest.image import build_image

pytestmark = [pytest.mark.vm, pytest.mark.long]

Run = Callable[[Coroutine[Any, Any, Any]], Any]
TIMER_EXPIRED = 0x80000010
"""The type of a message that a hypervisor's timers send. There are none here."""
ALL_OFFERS_DELIVERED = 4
TAKEN_AWAY = {
    "good = type == TYPE_CHANNEL_MESSAGE && size >=": "good = size >=",
    "synic_fill(to, message, size);": "synic_fill(to, message, size);\n\t\tto->header.message_type = type;",
}


def build_without_the_check(kernel: Kernel, folder: Path) -> Path:
    sources = folder / "sources"
    shutil.copytree(kernel_module.source_folder(), sources)
    text = (sources / "device.c").read_text()
    for there, instead in TAKEN_AWAY.items():
        assert text.count(there) == 1, there
        text = text.replace(there, instead)
    (sources / "device.c").write_text(text)
    (folder / "build").mkdir()
    cache = Cache()
    with cache.lock():
        headers = kernel_module.find_headers(cache, kernel, SilentReporter())
        return kernel_module.build(headers, kernel, sources, folder / "build")


def test_linux_guest_sabotage_without_the_check_of_messages(run: Run, programs: Programs, tmp_path: Path) -> None:
    provisioned = provision()
    kernel, userland = find_kernel(Cache()), find_userland(Cache())
    module = build_without_the_check(kernel, tmp_path)
    cache = Cache(tmp_path / "cache")
    with cache.lock():
        image = build_image(userland, kernel, cache, native_core=provisioned.native_core, kernel_module=module)
    sabotaged = dataclasses.replace(programs, kernel=image.kernel, initramfs=image.initramfs)

    async def story() -> str:
        vm = await VirtualMachine.launch(described(2, "panic=60"), sabotaged)  # as booted: it is to end
        async with vm:
            await vm.wait_ready()
            page = await message_page(vm)
            # Written as a device does it, the type last. The next heartbeat's interrupt finds it.
            GuestMemory(vm).write(page + 516, struct.pack("<BBHQQ", 8, 1, 0, 0, ALL_OFFERS_DELIVERED))
            GuestMemory(vm).write(page + 512, struct.pack("<I", TIMER_EXPIRED))
            deadline = time.monotonic() + pace.seconds(60)
            while "Kernel panic" not in (log := vm.paths.console_log.read_text()):
                assert time.monotonic() < deadline, f"it survived: {log[-2000:]}"
                await asyncio.sleep(0.1)
            return log

    assert "RIP: 0010:0x0" in run(story()), "it called a timer's handler, and there is none"
