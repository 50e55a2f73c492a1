"""The disk of the SCSI provider, behind Linux's hv_storvsc, against QEMU's own virtio-blk in the same guest and run.

Both disks are raw files of the same size beside each other, read and written past the guest's page cache by the same
program in the guest; on the host both go through the page cache (virtio-blk with cache=writeback and threads).
Virtio-blk is served by C in QEMU, ours by one Python program; both have a driver in the guest's kernel.

They take turns in short slices, now one first and now the other, so that what else the machine does meanwhile hits
both; a ratio is that of two slices side by side.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from vmbus.errors import VmbusError
from vmbus.operations.machine import VirtualMachine
from vmbus.providers.disk.image import DIRECTORY_VARIABLE
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus_bench.figures import Part, Row, Sample, Target, ratio
from vmbus_bench.processes import cpu_seconds

SIZE_MIB = 64
_OURS, _THEIRS = "/dev/sda", "/dev/vda"
_SLOT = 0x10


class _Case(NamedTuple):
    """One way to use a disk. `size` in bytes; `depth` requests in flight; `target`: wanted, as a part of theirs."""

    name: str
    write: bool
    random: bool
    size: int
    depth: int
    requests: int
    target: float = 0.0


CASES = (
    _Case("random reads of 4 KiB, one at a time", False, True, 4096, 1, 400, 0.5),
    _Case("random reads of 4 KiB, 16 in flight", False, True, 4096, 16, 800, 0.8),
    _Case("random writes of 4 KiB, 16 in flight", True, True, 4096, 16, 800, 0.8),
    _Case("reads of 256 KiB in order, 4 in flight", False, False, 256 << 10, 4, 160, 0.9),
    _Case("writes of 256 KiB in order, 4 in flight", True, False, 256 << 10, 4, 160, 0.9),
    _Case("reads of 1 MiB in order, 4 in flight", False, False, 1 << 20, 4, 64, 0.9),
    _Case("writes of 1 MiB in order, 4 in flight", True, False, 1 << 20, 4, 64, 0.9),
)


_CPU_TARGET = 80.0
"""At most so many microseconds of the server's CPU time for a read of 4 KiB."""


def _cpu(vm: VirtualMachine) -> float:
    """Seconds of CPU time of the device server so far."""
    assert vm.server is not None
    return cpu_seconds(vm.server.process.pid)


def _with_size(description: VmDescription) -> VmDescription:
    """With an image of the size that is measured."""
    plain = msgspec.to_builtins(description)
    for provider in plain["device"]["providers"]:
        if provider["kind"] == "scsi":
            provider["options"]["luns"][0]["size_mib"] = SIZE_MIB
    return msgspec.convert(plain, VmDescription)


@contextmanager
def _disks() -> Iterator[Path]:
    """A disk directory for as long as the block runs, with the baseline's image in it."""
    before = os.environ.get(DIRECTORY_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="vmbus-bench-disks-") as directory:
        os.environ[DIRECTORY_VARIABLE] = directory
        try:
            yield Path(directory)
        finally:
            if before is None:
                del os.environ[DIRECTORY_VARIABLE]
            else:
                os.environ[DIRECTORY_VARIABLE] = before


async def _measure(vm: VirtualMachine, device: str, case: _Case, count: int) -> float:
    """Requests per second."""
    parameters: dict[str, Any] = {
        "device": device,
        "module": "virtio_blk" if device == _THEIRS else "",
        "write": case.write,
        "random": case.random,
        "size": case.size,
        "depth": case.depth,
        "count": count,
        "span_mib": SIZE_MIB // 2,
    }
    report = await vm.call_agent("run", driver="disk-speed", parameters=parameters, timeout=120.0)
    result = report.get("result")
    if not isinstance(result, dict) or result.get("verdict") != "passed":
        raise VmbusError(f"the guest could not use {device}: {report}")
    return float(result["per_second"])


async def measure(description: VmDescription, programs: Programs, *, quick: bool, step: Callable[[str], None]) -> Part:
    """Run this part in a fresh VM. `step` is told what is being done."""
    repeats = 3 if quick else 5
    rates: dict[_Case, list[float]] = {case: [] for case in CASES}
    base: dict[_Case, list[float]] = {case: [] for case in CASES}
    cpu: dict[_Case, list[float]] = {case: [] for case in CASES}
    load: list[float] = []
    with _disks() as disks:
        image = disks / "virtio.img"
        with image.open("wb") as file:
            file.truncate(SIZE_MIB << 20)
        programs = dataclasses.replace(
            programs,
            extra=(
                *("-blockdev", f"driver=raw,node-name=base,file.driver=file,file.aio=threads,file.filename={image}"),
                *("-device", f"virtio-blk-pci,drive=base,addr={_SLOT:#x}"),
            ),
        )
        step("the VM boots")
        vm = await VirtualMachine.launch(_with_size(description), programs)
        try:
            await vm.wait_ready()
            for device in (_OURS, _THEIRS):  # both images get their blocks
                fill = _Case("", True, False, 1 << 20, 2, 0)
                await _measure(vm, device, fill, SIZE_MIB // 2)
            for repeat in range(repeats):
                for case in CASES:
                    count = case.requests // (2 if quick else 1)
                    step(f"{case.name}, round {repeat + 1} of {repeats}")
                    for device in (_OURS, _THEIRS) if repeat % 2 else (_THEIRS, _OURS):
                        before = _cpu(vm)
                        rate = await _measure(vm, device, case, count)
                        (rates if device == _OURS else base)[case].append(rate)
                        if device == _OURS:
                            cpu[case].append((_cpu(vm) - before) / count * 1e6)
                load.append(round(os.getloadavg()[0], 2))
            await vm.shutdown()
        finally:
            await vm.kill()
    rows = []
    targets = []
    for case in CASES:
        unit, factor = ("/s", 1.0) if case.size == 4096 else ("MiB/s", case.size / (1 << 20))
        times = ratio(rates[case], base[case])
        rows.append(
            Row(
                case.name,
                Sample.of([factor * rate for rate in rates[case]], unit),
                Sample.of([factor * rate for rate in base[case]], unit),
                times,
                details={"the server's CPU time for each": Sample.of(cpu[case], "us")},
            )
        )
        busy, each = Sample.of(cpu[case], "us").median, 1e6 / Sample.of(rates[case], "/s").median
        why = (
            f"of {each:.0f} us from one request to the next the server's processor is busy for {busy:.0f}; the guest's "
            "driver costs more than virtio-blk's (docs/performance.md)"
        )
        targets.append(Target.judge(f"{case.name}, against virtio-blk", times, "at least", case.target, why))
    used = Sample.of(cpu[CASES[0]], "us")
    targets.append(Target.judge("the server's CPU time for a read of 4 KiB", used, "at most", _CPU_TARGET))
    return Part(
        name="scsi",
        title=f"the disk of hv_storvsc in a Linux guest ({programs.accelerator})",
        parameters={
            "size_mib": SIZE_MIB,
            "repeats": repeats,
            "accelerator": programs.accelerator,
            "qemu_version": programs.qemu_version,
            "cpus": description.cpus,
            "load_after_each_round": load,
        },
        baseline="QEMU's virtio-blk in the same guest",
        rows=rows,
        targets=targets,
    )
