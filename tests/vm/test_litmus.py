"""The guest's fences hold against the host: `tests/support/litmus/litmus.c`, in the guest and on the host at once.

Tried on the machine as it is now, and on the one of old, which had no room for a second CPU: there the same program has
to find that they do not hold. That one comes from a snapshot, as it would today.
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import dataclasses
import mmap
import os
import secrets
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from support import pace
from support.boot import boot
from vmbus.operations.machine import VirtualMachine
from vmbus.provision import provision
from vmbus.provision.libvfio_user import find_compiler
from vmbus.qemu.instance import machine_for
from vmbus.snapshot.manifest import MANIFEST
from vmbus.testkit.moving import move
from vmbus.vm.command_line import Programs, programs_from
from vmbus.vm.description import VmDescription

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="on one core nothing happens at the same time"),
]

FOLDER = Path(__file__).parents[1] / "support" / "litmus"
DRIVER = (FOLDER / "litmus.py").read_text()
FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-shared", "-fPIC", "-nostdlib")
ROUNDS = 200_000
INCREMENTS = 5_000_000
PATIENCE = 90.0
"""Seconds after which both sides are told to stop, whatever they have done by then."""
PAGE = 4096
SECRET = secrets.token_bytes(32)


class Result(ctypes.Structure):
    """As in litmus.c."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("rounds", "neither", "both", "only_guest", "only_host", "guest_added", "host_added", "counter")
    ]

    @property
    def lost(self) -> int:
        return self.guest_added + self.host_added - self.counter

    def __str__(self) -> str:
        return (
            f"{self.rounds} rounds: both saw {self.both}, only the guest {self.only_guest}, only the host "
            f"{self.only_host}, neither (forbidden) {self.neither}; increments: {self.guest_added} of the guest, "
            f"{self.host_added} of the host, lost {self.lost}"
        )


class Library(NamedTuple):
    """litmus.c, compiled: for the guest, in base64, and for us."""

    text: str
    code: ctypes.CDLL


@pytest.fixture(scope="module")
def programs() -> Programs:
    """KVM has the fences of the CPU."""
    return dataclasses.replace(programs_from(provision()), accelerator="tcg")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    path = tmp_path_factory.mktemp("litmus") / "litmus.so"
    subprocess.run([find_compiler(), *FLAGS, "-o", path, FOLDER / "litmus.c"], check=True)
    code = ctypes.CDLL(str(path))
    code.host.argtypes, code.halt.argtypes = (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p), (ctypes.c_void_p,)
    return Library(base64.b64encode(path.read_bytes()).decode(), code)


@contextmanager
def guest_page(vm: VirtualMachine, address: int) -> Iterator[mmap.mmap]:
    """A page of guest memory, shared with the guest."""
    assert vm.qemu is not None
    files = Path(f"/proc/{vm.qemu.process.pid}/fd")
    (memory,) = [path for path in files.iterdir() if str(path.readlink()).startswith("/memfd:memory-backend-memfd")]
    with memory.open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), PAGE, offset=address) as page:
        yield page


async def litmus(vm: VirtualMachine, library: Library) -> Result:
    await vm.call_agent("install", name="litmus", source=DRIVER)
    parameters = {"library": library.text, "rounds": ROUNDS, "increments": INCREMENTS}
    job = (await vm.call_agent("start", driver="litmus", parameters=parameters))["job"]
    async with asyncio.timeout(pace.seconds(60)):
        while (report := await vm.call_agent("poll", job=job))["progress"] is None:
            assert report["state"] == "running", report
            await asyncio.sleep(0.05)
    result = Result()
    with guest_page(vm, report["progress"]["address"]) as page:
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        playing = asyncio.create_task(asyncio.to_thread(library.code.host, address, ROUNDS, ctypes.addressof(result)))
        try:
            await asyncio.wait({playing}, timeout=pace.seconds(PATIENCE))
        finally:
            library.code.halt(address)
            await playing  # or it would go on in memory that is gone
    report = await vm.call_agent("wait", job=job, timeout=60.0)
    assert report["state"] == "finished", report
    return result


def words_of(vm: VirtualMachine) -> list[str]:
    assert vm.qemu is not None
    return Path(f"/proc/{vm.qemu.process.pid}/cmdline").read_text().split("\0")


async def test_litmus_fences_and_locked_instructions_of_the_guest_hold(
    programs: Programs,
    demo_description: VmDescription,
    library: Library,
    note: Callable[..., None],
) -> None:
    async with await boot(demo_description, programs) as vm:
        assert "1,maxcpus=2" in words_of(vm)
        result = await litmus(vm, library)
    note(f"litmus: {result}")
    assert (result.neither, result.lost) == (0, 0), result
    assert (result.rounds, result.guest_added) == (ROUNDS, INCREMENTS), f"not done in {PATIENCE} s: {result}"


async def test_litmus_sabotage_a_machine_without_room_for_a_second_cpu(
    programs: Programs,
    demo_description: VmDescription,
    library: Library,
    tmp_path: Path,
    note: Callable[..., None],
) -> None:
    """The machine of old, from a snapshot as they were then: wherever it goes it stays as it is, faults and all."""
    directory, checkpoints = tmp_path / "old", tmp_path / "checkpoints"

    def is_old(vm: VirtualMachine) -> None:
        words = words_of(vm)
        assert words[words.index("-smp") + 1] == "1"

    new = machine_for(demo_description, programs, None)
    old = msgspec.structs.replace(new, spare_cpus=0, generation_id=False)
    launch = VirtualMachine.launch(demo_description, programs, like=old)  # as booted: it is saved below
    async with await launch as vm:
        await vm.wait_ready()
        await vm.save(directory)
    assert b"spare_cpus" not in (directory / MANIFEST).read_bytes(), "as it was then"
    async with await VirtualMachine.restore(directory, programs) as vm:
        is_old(vm)
        await vm.wait_ready()
        await vm.checkpoint("before", directory=checkpoints)
        moved, _ = await move(vm, programs=programs)
    async with moved as vm:
        is_old(vm)
        await vm.revert("before", directory=checkpoints)
        await vm.wait_ready()
        result = await litmus(vm, library)
    note(f"litmus without maxcpus: {result}")
    assert result.neither > 0 and result.lost > 0, f"the program does not find what is wrong: {result}"
