"""A guest that writes to its console without end does not fill the run directory, and its last words can be read."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

import pytest

from support import pace
from support.boot import boot
from vmbus.vm import logs, process
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.process import log_tail

FLOOD = 500_000  # bytes
LIMIT = 128 << 10  # so that the flood need not take minutes
LOOK_EVERY = 0.05  # seconds


async def test_a_console_that_is_flooded_stays_bounded(
    programs: Programs,
    demo_description: VmDescription,
    monkeypatch: pytest.MonkeyPatch,
    note: Callable[[str], None],
) -> None:
    monkeypatch.setattr(process, "LOOK_EVERY", LOOK_EVERY)
    monkeypatch.setattr(logs, "LOG_LIMIT", LIMIT)
    monkeypatch.setattr(logs, "LOG_HEAD", 16 << 10)
    monkeypatch.setattr(logs, "LOG_TAIL", 32 << 10)

    vm = await boot(demo_description, programs)
    async with vm:
        reader, writer = await asyncio.open_unix_connection(str(vm.paths.console))
        # What is typed is echoed: the quotes keep it from being taken for the answer.
        writer.write(f"yes flood | head -c {FLOOD} > /dev/ttyS0; echo 'last'' words'\n".encode())
        began, most, tail = time.monotonic(), 0, b""
        while b"last words" not in tail:
            data = await asyncio.wait_for(reader.read(65536), pace.seconds(60))
            assert data, "the console is gone"
            tail = (tail + data)[-100:]
            most = max(most, vm.paths.console_log.stat().st_size)
        rate = FLOOD / (time.monotonic() - began)
        writer.close()
        deadline = time.monotonic() + pace.seconds(30)
        # What the console's reader has seen to its end, the file may not have yet.
        while vm.paths.console_log.stat().st_size > LIMIT or "last words" not in log_tail(vm.paths.console_log):
            assert time.monotonic() < deadline
            await asyncio.sleep(LOOK_EVERY)
        assert "flood" in log_tail(vm.paths.console_log)
        assert b"bytes left out" in vm.paths.console_log.read_bytes()
        # Several looks' worth, because the machine may be busy with other tests.
        assert most < LIMIT + 10 * LOOK_EVERY * rate + 65536 and most < FLOOD / 2, (most, rate)
        note(f"a flooded console wrote {rate / 1e3:.0f} kB/s; its log had {most >> 10} KiB at most")
        assert vm.qemu is not None and vm.qemu.running
        os.kill(vm.qemu.pid, 9)
        await vm.qemu.exited
        assert "last words" in log_tail(vm.paths.console_log)
