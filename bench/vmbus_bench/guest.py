"""Transactions of a Linux guest in QEMU, against virtio-serial in the same guest and run.

Virtio-serial is stock QEMU's own way of exchanging small messages with a host program: 64 bytes from a Python program
on the host through the port's socket to a Python program in the guest, and back. One at a time, since that is how it
is used; as a second baseline with as many messages in flight as the rings get, where the guest may take any number of
them with one read (a stream has no packets, so this flatters it).

Over the rings, the guest sends: 64 bytes inline to the echo provider, which checks and transforms them. Round trips
are timed where they begin: virtio-serial's on the host, ours in the guest.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmbus.errors import VmbusError, WaitTimeout
from vmbus.operations.machine import VirtualMachine
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus_bench.figures import Part, Row, Sample, Target, ratio

SIZE = 64
TARGET = 6.0
WINDOW = 256
RING_PAGES = 32
_TIMEOUT = 60.0
_PING_INTERVAL = 1.0


class _SerialEcho:
    """The agent's port as a raw stream: what is sent comes back. Blocking; nothing else may use the port meanwhile."""

    def __init__(self, path: Path, total: int) -> None:
        """Has the agent echo `total` bytes, which must then be sent in full. Raises WaitTimeout or VmbusError."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._rest = b""
        try:
            self._socket.connect(str(path))
            # A request that arrives while the guest still learns that the host's end was opened again may be lost.
            # A ping can be repeated; the request could not: the second one would already be bytes to echo.
            deadline = time.monotonic() + _TIMEOUT
            while not self._ask("ping", {}, _PING_INTERVAL):
                if time.monotonic() > deadline:
                    raise WaitTimeout("the guest's agent to answer on its port", _TIMEOUT)
            if not self._ask("serial-echo", {"bytes": total, "timeout": _TIMEOUT}, _TIMEOUT):
                raise WaitTimeout("the guest's agent to begin its echo", _TIMEOUT)
            self._socket.settimeout(_TIMEOUT)
        except BaseException:
            self._socket.close()
            raise

    def _ask(self, command: str, arguments: dict[str, Any], timeout: float) -> bool:
        """Send a request; whether it was answered in time. Raises VmbusError if it was refused."""
        identity = f"bench-{secrets.token_hex(8)}"
        request = {"id": identity, "command": command, "arguments": arguments}
        self._socket.settimeout(timeout)
        self._socket.sendall(b"\n" + json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            line, found, rest = self._rest.partition(b"\n")
            if not found:
                self._socket.settimeout(left)
                try:
                    data = self._socket.recv(65536)
                except TimeoutError:
                    return False
                if not data:
                    raise VmbusError("QEMU closed the agent's port")
                self._rest += data
                continue
            self._rest = rest
            try:
                answer = json.loads(line)
            except ValueError:
                continue  # the rest of a line that went to the connection before
            if isinstance(answer, dict) and answer.get("id") == identity:
                if "result" not in answer:
                    raise VmbusError(f"the guest's agent refused {command!r}: {answer}")
                return True
        return False

    def close(self) -> None:
        self._socket.close()

    def _receive(self, size: int) -> None:
        while size:
            try:
                data = self._socket.recv(size)
            except TimeoutError:
                raise WaitTimeout("virtio-serial to send bytes back", _TIMEOUT) from None
            if not data:
                raise VmbusError("QEMU closed the agent's port")
            size -= len(data)

    def one_by_one(self, count: int) -> list[float]:
        """Seconds of each of `count` round trips."""
        peer, data = self._socket, secrets.token_bytes(SIZE)
        trips = []
        for _ in range(count):
            start = time.perf_counter()
            peer.sendall(data)
            self._receive(SIZE)
            trips.append(time.perf_counter() - start)
        return trips

    def windowed(self, count: int, window: int) -> float:
        """Messages per second with `window` of them in flight."""
        peer, data = self._socket, secrets.token_bytes(SIZE)
        window = min(window, count)
        start = time.perf_counter()
        for _ in range(window):
            peer.sendall(data)
        left, owed = count - window, 0
        while left:
            try:
                owed += len(peer.recv(1 << 16))
            except TimeoutError:
                raise WaitTimeout("virtio-serial to send bytes back", _TIMEOUT) from None
            while owed >= SIZE and left:
                owed -= SIZE
                left -= 1
                peer.sendall(data)
        self._receive(window * SIZE - owed)
        return count / (time.perf_counter() - start)


def _serial(path: Path, sequential: int, windowed: int, window: int) -> tuple[list[float], float]:
    """(seconds of each round trip, messages per second with a window)."""
    echo = _SerialEcho(path, (sequential + windowed) * SIZE)
    try:
        return echo.one_by_one(sequential), echo.windowed(windowed, window)
    finally:
        echo.close()


async def _raw_echo(vm: VirtualMachine, count: int, window: int, warm_up: int) -> dict[str, Any]:
    parameters = {
        "count": count,
        "window": window,
        "size": SIZE,
        "warm_up": warm_up,
        "ring_pages_in": RING_PAGES,
        "ring_pages_out": RING_PAGES,
    }
    # An own wait, so that a guest that stalls is told from one that is slow.
    report = await vm.call_agent("run", driver="raw-echo", parameters=parameters, timeout=2 * _TIMEOUT)
    result = report.get("result")
    if not isinstance(result, dict) or result.get("verdict") != "passed":
        raise VmbusError(f"the guest's echo transactions went wrong: {report}")
    return result


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


async def measure(description: VmDescription, programs: Programs, *, quick: bool, step: Callable[[str], None]) -> Part:
    """Run this part in a fresh VM. `step` is told what is being done."""
    repeats = 3 if quick else 5
    count, sequential = (5_000, 300) if quick else (20_000, 1_000)
    serial_rates, serial_trips, stream_rates = [], [], []
    ring_rates, ring_trips = [], []
    step("the VM boots")
    vm = await VirtualMachine.launch(description, programs)
    try:
        await vm.wait_ready()
        for repeat in range(repeats):
            step(f"virtio-serial, round {repeat + 1} of {repeats}")
            await vm.agent.close()  # QEMU serves one connection to the port at a time
            trips, stream = await vm.guard(
                asyncio.to_thread(_serial, vm.paths.agent, sequential, count, WINDOW),
                "echoes over virtio-serial",
                2 * _TIMEOUT,
            )
            await vm.agent.connect()
            serial_trips.append(_median(trips))
            serial_rates.append(len(trips) / sum(trips))
            stream_rates.append(stream)
            step(f"pipelined echo over the rings, round {repeat + 1} of {repeats}")
            ring_rates.append(float((await _raw_echo(vm, count, WINDOW, 1000))["per_second"]))
            step(f"round trips over the rings, round {repeat + 1} of {repeats}")
            ring_trips.append(float((await _raw_echo(vm, sequential, 1, 50))["round_trip"]["median"]))
        status = await vm.guard(vm.control.call("status"), "the device server's status", 30.0) if vm.control else {}
        await vm.shutdown()
    finally:
        await vm.kill()
    against_serial = ratio(ring_rates, serial_rates)
    return Part(
        name="guest",
        title=f"transactions of a Linux guest ({programs.accelerator})",
        parameters={
            "size": SIZE,
            "count": count,
            "round_trips": sequential,
            "window": WINDOW,
            "repeats": repeats,
            "ring_pages": RING_PAGES,
            "accelerator": programs.accelerator,
            "qemu_version": programs.qemu_version,
            "libvfio_user": status.get("libvfio_user"),
            "cpus": description.cpus,
            "memory_mib": description.memory_mib,
        },
        baseline="echo of 64 bytes over virtio-serial, host to guest and back",
        rows=[
            Row(
                f"echo over the rings, window {WINDOW}",
                Sample.of(ring_rates, "/s"),
                Sample.of(serial_rates, "/s"),
                against_serial,
                "virtio-serial: one at a time",
            ),
            Row(
                "the same, baseline as a stream",
                Sample.of(ring_rates, "/s"),
                Sample.of(stream_rates, "/s"),
                ratio(ring_rates, stream_rates),
                f"virtio-serial: {WINDOW} in flight, copied many at a time",
            ),
            Row(
                "round trip, window 1",
                Sample.of([1e6 * trip for trip in ring_trips], "us"),
                Sample.of([1e6 * trip for trip in serial_trips], "us"),
                ratio(ring_trips, serial_trips),
            ),
        ],
        targets=[Target.judge("pipelined echo of the guest against virtio-serial", against_serial, "at least", TARGET)],
    )
