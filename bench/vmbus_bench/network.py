"""The network card of a Linux guest in QEMU, against QEMU's own virtio-net in the same guest and run.

Both cards end in a TAP interface of the host's, with the kernel's offloads, in a network namespace that is made for the
measurement. TCP streams by the same two programs, which look at every byte. Both have a driver in the guest's kernel;
virtio-net is served by C in QEMU, ours by a Python program.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import vmbus
import vmbus_guest
from vmbus.errors import EnvironmentProblem, VmbusError
from vmbus.operations.machine import VirtualMachine
from vmbus.providers.network.interface import Settings, configure, in_namespace
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.process import Child
from vmbus_bench.figures import Part, Row, Sample, Target, ratio

PINGS = 200
PING = "ping of the guest, round trip"
_CLONE_NEWNET = 0x40000000
_SLOT = 0x11
_TAP = "bench0"
_THEIR_HOST, _THEIR_GUEST = "198.51.100.1", "198.51.100.2"
_PORT = 5001
_libc = ctypes.CDLL(None, use_errno=True)


class NotPermitted(EnvironmentProblem):
    """This machine does not let us make network namespaces."""


class _Card(NamedTuple):
    """Addresses of both ends."""

    host: str
    guest: str


_WHY = "a frame is copied once more than with virtio-net: through the server, and from its buffer by the driver"
LEAST, MOST = 0.8, 2.0
"""TCP is to be at least so many times virtio-net's, and a ping to take at most so many times as long."""
_BRING_UP = "ip link set eth0 up && ip addr add 192.0.2.2/24 dev eth0"
_THEIR_INTERFACE = "eth1"

OURS = _Card("192.0.2.1", "192.0.2.2")
THEIRS = _Card(_THEIR_HOST, _THEIR_GUEST)


class _Case(NamedTuple):
    """One way to use a card. `send`: towards the guest."""

    name: str
    send: bool
    receive: bool
    streams: int


CASES = (
    _Case("TCP to the guest, one stream", True, False, 1),
    _Case("TCP from the guest, one stream", False, True, 1),
    _Case("TCP both ways, four streams", True, True, 4),
)


@contextlib.contextmanager
def _namespace() -> Iterator[None]:
    """A network namespace for this thread and the processes that it starts; gone with the last of them."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.unshare(_CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise NotPermitted(
                f"a network namespace of its own is not permitted: {os.strerror(number)}; measure the network as root"
            )
        try:
            yield
        finally:
            _libc.setns(before, _CLONE_NEWNET)
    finally:
        os.close(before)


async def _program(directory: Path, driver: str, **parameters: Any) -> dict[str, Any]:
    """Run one of the guest's test drivers here, and return what it found."""
    path = os.pathsep.join(str(Path(str(one.__file__)).parents[1]) for one in (vmbus, vmbus_guest))
    log = directory / f"{driver}.log"
    child = await Child.spawn(
        driver,
        [sys.executable, "-m", "vmbus_guest.testdrivers", driver, "--parameters", json.dumps(parameters)],
        log,
        environment={"PYTHONPATH": path},
    )
    try:
        await asyncio.wait_for(asyncio.shield(child.exited), 120.0)
    finally:
        await child.stop()
    for line in log.read_text().splitlines():
        if line.startswith('{"event":"result"'):
            result: dict[str, Any] = json.loads(line)["result"]
            log.unlink()
            return result
    raise VmbusError(f"{driver} found nothing: {log.read_text()[-2000:]}")


async def _transfer(vm: VirtualMachine, directory: Path, card: _Card, case: _Case, count: int) -> float:
    """Bytes per second, both directions together."""
    parameters = {"streams": case.streams, "port": _PORT}
    job = (await vm.call_agent("start", driver="transfer", parameters=parameters))["job"]
    ours = await _program(
        directory,
        "transfer",
        mode="connect",
        host=card.guest,
        send=case.send,
        receive=case.receive,
        bytes=count,
        **parameters,
    )
    report = await vm.call_agent("wait", job=job, timeout=60.0)
    theirs = report.get("result") or {}
    if ours["verdict"] != "passed" or theirs.get("verdict") != "passed":
        raise VmbusError(f"the streams went wrong: {ours}; in the guest: {report}")
    # Whoever sends is done when its kernel has taken the last byte; the receiver knows.
    seconds = max(ours["seconds"], theirs["seconds"]) if case.send and case.receive else ours["seconds"]
    return (int(ours["sent"]) + int(ours["received"])) / float(seconds)


async def measure(description: VmDescription, programs: Programs, *, quick: bool, step: Callable[[str], None]) -> Part:
    """Run this part in a fresh VM. `step` is told what is being done. Raises NotPermitted."""
    with _namespace(), tempfile.TemporaryDirectory(prefix="vmbus-bench-network-") as directory:
        return await _measure(Path(directory), description, programs, quick, step)


async def _bring_up(vm: VirtualMachine) -> None:
    """Both cards have their addresses."""
    done = await vm.run_in_guest(["/bin/sh", "-c", _BRING_UP])
    if done.code:
        raise VmbusError(f"the guest has no card: {done.output}")
    tap = Settings(_TAP, b"\xfe\0\0\0\0\2", 1500, address=f"{_THEIR_HOST}/24")
    in_namespace(None, lambda: configure(tap))
    parameters = {
        "modules": "failover,net_failover,virtio_net",
        "interface": _THEIR_INTERFACE,
        "address": f"{_THEIR_GUEST}/24",
    }
    report = await vm.call_agent("run", driver="interface", parameters=parameters, timeout=60.0)
    if (report.get("result") or {}).get("verdict") != "passed":
        raise VmbusError(f"the guest has no virtio-net: {report}")


async def _measure(
    directory: Path, description: VmDescription, programs: Programs, quick: bool, step: Callable[[str], None]
) -> Part:
    repeats = 3 if quick else 5
    count = (4 if quick else 16) << 20
    rates: dict[_Case, list[float]] = {case: [] for case in CASES}
    base: dict[_Case, list[float]] = {case: [] for case in CASES}
    trips: dict[_Card, list[float]] = {OURS: [], THEIRS: []}
    programs = dataclasses.replace(
        programs,
        extra=(
            *("-netdev", f"tap,id=bench,ifname={_TAP},script=no,downscript=no,vhost=off"),
            *("-device", f"virtio-net-pci,netdev=bench,addr={_SLOT:#x},mac=52:54:00:00:00:02,romfile="),
        ),
    )
    step("the VM boots")
    vm = await VirtualMachine.launch(description, programs)
    try:
        await vm.wait_ready()
        await _bring_up(vm)
        for repeat in range(repeats):
            for card in (THEIRS, OURS):
                step(f"ping, round {repeat + 1} of {repeats}")
                ping = await _program(
                    directory, "ping", host=card.guest, count=PINGS // (4 if quick else 1), interval=0.005
                )
                trips[card].append(1000 * ping["median_ms"])
            for case in CASES:
                step(f"{case.name}, round {repeat + 1} of {repeats}")
                size = count // case.streams
                base[case].append(await _transfer(vm, directory, THEIRS, case, size))
                rates[case].append(await _transfer(vm, directory, OURS, case, size))
        await vm.shutdown()
    finally:
        await vm.kill()
    mebibyte = 1 << 20
    rows = [
        Row(
            case.name,
            Sample.of([rate / mebibyte for rate in rates[case]], "MiB/s"),
            Sample.of([rate / mebibyte for rate in base[case]], "MiB/s"),
            ratio(rates[case], base[case]),
        )
        for case in CASES
    ]
    rows.append(
        Row(
            PING,
            Sample.of(trips[OURS], "us"),
            Sample.of(trips[THEIRS], "us"),
            ratio(trips[OURS], trips[THEIRS]),
        )
    )
    targets = []
    for row in rows:
        least = row.name != PING
        if row.ratio is not None:
            name = f"{row.name}, against virtio-net"
            direction: Literal["at least", "at most"] = "at least" if least else "at most"
            targets.append(Target.judge(name, row.ratio, direction, LEAST if least else MOST, _WHY if least else ""))
    return Part(
        name="network",
        title=f"the network card of hv_netvsc in a Linux guest ({programs.accelerator})",
        parameters={
            "bytes": count,
            "mtu": 1500,
            "repeats": repeats,
            "accelerator": programs.accelerator,
            "qemu_version": programs.qemu_version,
            "cpus": description.cpus,
        },
        baseline="virtio-net of QEMU on a TAP interface, in the same guest",
        rows=rows,
        targets=targets,
    )
