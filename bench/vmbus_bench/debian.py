"""A boot of Debian from a disk of ours, against one from QEMU's virtio-blk: the same machine, image and run.

Both machines have our device, with all its drivers, and a fresh copy of the image; they differ in the disk that the
copy is on. What is measured is the time from the start of the machine until systemd says that all of it runs. On the
host both disks go through the page cache (virtio-blk with cache=writeback and threads).
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from vmbus.errors import EnvironmentProblem, VmbusError
from vmbus.operations.machine import VirtualMachine
from vmbus.providers.disk.image import DIRECTORY_VARIABLE
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.root import copy_image
from vmbus_bench.figures import Part, Row, Sample, Target, ratio

TARGET = 1.5
_SLOT = 0x10
_BOOT_TIMEOUT = 300.0


class NotMade(EnvironmentProblem):
    """There is no Debian in the cache."""


def _with_their_disk(description: VmDescription, programs: Programs, image: Path) -> tuple[VmDescription, Programs]:
    """The machine with the image on virtio-blk. Our controller stays, without a disk."""
    plain = msgspec.to_builtins(description)
    for provider in plain["device"]["providers"]:
        if provider["kind"] == "scsi":
            provider["options"]["luns"] = []
    extra = (
        *("-blockdev", f"driver=raw,node-name=base,file.driver=file,file.aio=threads,file.filename={image}"),
        *("-device", f"virtio-blk-pci,drive=base,addr={_SLOT:#x}"),
    )
    return msgspec.convert(plain, VmDescription), dataclasses.replace(programs, extra=extra)


async def _boot(description: VmDescription, programs: Programs, disk: str) -> tuple[float, float]:
    """Seconds until the agent answers, which runs from the disk, and until all runs. `disk`: what it has to be on."""
    start = time.monotonic()
    vm = await VirtualMachine.launch(description, programs)
    try:
        await vm.wait_ready(_BOOT_TIMEOUT)
        agent = time.monotonic() - start
        command = ["/bin/sh", "-c", "systemctl is-system-running --wait; findmnt -no SOURCE /"]
        done = await vm.run_in_guest(command, timeout=_BOOT_TIMEOUT)
        running = time.monotonic() - start
        if done.output.split() != ["running", disk]:
            raise VmbusError(f"Debian came up as {done.output.split()}, not running from {disk}")
        await vm.shutdown(60.0)
    finally:
        await vm.kill()
    return agent, running


async def measure(
    description: VmDescription, programs: Programs, template: Path | None, *, quick: bool, step: Callable[[str], None]
) -> Part:
    """Run this part; `template` is the image, None if it is not made. Raises NotMade."""
    if template is None:
        raise NotMade("there is no Debian to boot: scripts/setup --debian makes one")
    name = str(description.guest.root)
    repeats = 1 if quick else 3
    agent: tuple[list[float], list[float]] = ([], [])
    running: tuple[list[float], list[float]] = ([], [])
    before = os.environ.get(DIRECTORY_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="vmbus-bench-debian-") as directory:
        os.environ[DIRECTORY_VARIABLE] = directory
        image = Path(directory) / name
        theirs = _with_their_disk(description, programs, image)
        machines = (("ours", description, programs, "/dev/sda"), ("virtio-blk", *theirs, "/dev/vda"))
        try:
            for repeat in range(repeats):
                order = (0, 1) if repeat % 2 else (1, 0)
                for which in order:
                    title, machine, with_programs, disk = machines[which]
                    step(f"a boot from {title}, round {repeat + 1} of {repeats}")
                    copy_image(template, image)
                    try:
                        seconds = await _boot(machine, with_programs, disk)
                    finally:
                        image.unlink()
                    agent[which].append(seconds[0])
                    running[which].append(seconds[1])
        finally:
            if before is None:
                del os.environ[DIRECTORY_VARIABLE]
            else:
                os.environ[DIRECTORY_VARIABLE] = before
    times = ratio(*running)
    return Part(
        name="debian",
        title=f"a boot of Debian ({programs.accelerator})",
        parameters={
            "repeats": repeats,
            "accelerator": programs.accelerator,
            "qemu_version": programs.qemu_version,
            "cpus": description.cpus,
            "memory_mib": description.memory_mib,
        },
        baseline="the same from QEMU's virtio-blk",
        rows=[
            Row("until all of it runs", Sample.of(running[0], "s"), Sample.of(running[1], "s"), times),
            Row("until its first service answers", *_compared(agent)),
        ],
        targets=[Target.judge("a boot from our disk, against virtio-blk", times, "at most", TARGET)],
    )


def _compared(pair: tuple[list[float], list[float]]) -> tuple[Sample, Sample, Sample]:
    return Sample.of(pair[0], "s"), Sample.of(pair[1], "s"), ratio(*pair)
