"""A program that stands in for QEMU where QEMU adds nothing: it takes QEMU's command line, and speaks to the real
device server over vfio-user and to its owner over QMP.

It has a guest: a few MiB of memory in which the real driver runs a workload as long as the "vCPUs" run, some packets of
the host always in flight. Its agent knows ``ping``, ``counts``, ``freeze`` (the guest does nothing any more) and
``finish`` (the workload ends; its books).

What it keeps of QEMU: run states; migration with its statuses, events, capabilities and its stream into a file or a
socket, all of memory at the switchover; the way back if that fails; snapshot jobs; configuration ports and BARs on the
human monitor. A destination has the memory, and nobody who works in it.

Each time the vCPUs start or stop it appends a line to the file that FAKE_QEMU_LOG names: ``PID run`` or ``PID stop``;
and ``PID both OTHER`` if it starts while another one runs that lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import sys
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "device"), str(TESTS.parent / "guest")]

from support.processes import alive  # noqa: E402
from support.traffic import Traffic  # noqa: E402
from vmbus.errors import VmbusError  # noqa: E402
from vmbus.testkit.loopback.function import LoopbackFunction  # noqa: E402
from vmbus_guest.driver import VmbusDriver  # noqa: E402

RAM = 4 << 20
PIECE = 2 << 20
PACKETS = 200
"""Packets of the host, all of which the guest keeps until it is told to finish."""
COPY_SECONDS = 0.05
"""How long the copy of memory takes, so that there is a while in which it is under way."""


def words(arguments: list[str], option: str) -> list[str]:
    return [value for name, value in pairwise(arguments) if name == option]


def running(log: str) -> set[int]:
    """Whose vCPUs run, by the log and by who is alive: who is killed does not say that it stops."""
    found: set[int] = set()
    for line in log.splitlines():
        process, what = line.split()[:2]
        if what == "run":
            found.add(int(process))
        elif what == "stop":
            found.discard(int(process))
    return {one for one in found if alive(one)}


def settings(text: str) -> dict[str, str]:
    return dict(part.partition("=")[::2] for part in text.split(",")[1:])


async def requests(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects that come, whether or not there is anything between them."""
    text = ""
    decoder = json.JSONDecoder()
    while data := await reader.read(65536):
        text += data.decode()
        while text := text.lstrip():
            try:
                request, end = decoder.raw_decode(text)
            except ValueError:
                break  # the rest is still to come
            text = text[end:]
            yield request


def write(name: str, data: bytes) -> None:
    Path(name).write_bytes(data)


def read(name: str) -> bytes:
    return Path(name).read_bytes()


class Guest:
    """The machine as the guest has it: memory, the PCI function, and (unless it arrived) a driver at work."""

    def __init__(self, path: Path, *, incoming: bool) -> None:
        self.function = LoopbackFunction(path, ram_size=RAM, map_size=PIECE, timeout=3600.0)
        self.traffic: Traffic | None = None
        self.problem = ""
        self.frozen = False
        self.failed = False
        if incoming:
            self.function.reset()
        else:
            self.traffic = Traffic(
                VmbusDriver(self.function), hold=1 << 30, window=40, ring_pages_in=1, ring_pages_out=1
            )
            self.traffic.start(1 << 60, PACKETS, size=60, window=150)

    def step(self) -> None:
        if self.traffic is None or self.frozen or self.failed:
            return
        try:
            deadline = time.monotonic() + 0.004
            while self.traffic.driver.step(0.0) and time.monotonic() < deadline:
                pass
        except (VmbusError, OSError) as error:  # the device is gone: the guest goes on without it
            self.failed = True
            self.problem = repr(error)

    def counts(self) -> dict[str, Any]:
        assert self.traffic is not None
        return {
            "completed": self.traffic.echo.tally.completed,
            "held": len(self.traffic.burst.held),
            "good": self.traffic.echo.tally.good and self.traffic.burst.tally.good,
            "failed": self.problem,
        }

    def finish(self) -> dict[str, Any]:
        traffic = self.traffic
        assert traffic is not None
        traffic.echo.target = traffic.echo.issued
        traffic.burst.hold = 0
        try:
            traffic.finish()
        except (VmbusError, AssertionError) as error:
            return self.counts() | {"failed": repr(error)}
        return self.counts()


class Qemu:
    """See the module."""

    def __init__(self, arguments: list[str]) -> None:
        chardevs = {settings(text)["id"]: settings(text) for text in words(arguments, "-chardev")}
        self.chardevs = chardevs
        incoming = "-incoming" in arguments
        (device,) = (json.loads(text) for text in words(arguments, "-device") if text.startswith("{"))
        self.guest = Guest(Path(device["socket"]["path"]), incoming=incoming)
        self.function = self.guest.function
        self.state = "inmigrate" if incoming else "paused"
        self.latch = 0
        self.capabilities = dict.fromkeys(("events", "pause-before-switchover", "multifd", "postcopy-ram"), False)
        self.migration = "none"
        self.reason = ""
        self.address: dict[str, Any] | None = None
        self.ran = False
        self.task: asyncio.Task[None] | None = None
        self.go_on = asyncio.Event()
        self.jobs: dict[str, dict[str, Any]] = {}
        self.nodes: dict[str, str] = {}
        self.active = True  # whether it has its images: not from the end of a migration until it runs, or is told to
        self.snapshots: dict[str, dict[str, Any]] = {}
        self.monitors: set[asyncio.StreamWriter] = set()
        if not incoming and "-S" not in arguments:
            self.run_on()

    # --- the vCPUs

    def tell(self, event: str, data: dict[str, Any] | None = None) -> None:
        now = time.time()
        stamp = {"seconds": int(now), "microseconds": int(now % 1 * 1e6)}
        line = json.dumps({"event": event, "data": data or {}, "timestamp": stamp}).encode() + b"\r\n"
        for writer in self.monitors:
            writer.write(line)

    def note(self, what: str) -> None:
        if what == "run" and (others := running(Path(os.environ["FAKE_QEMU_LOG"]).read_text()) - {os.getpid()}):
            what += f"\n{os.getpid()} both {others}"
        with open(os.environ["FAKE_QEMU_LOG"], "a") as log:  # noqa: PTH123 - one line, whole
            log.write(f"{os.getpid()} {what}\n")

    def run_on(self) -> None:
        self.active = True
        if self.state != "running":
            self.state = "running"
            self.note("run")
            self.tell("RESUME")

    def halt(self, state: str = "paused") -> None:
        if self.state == "running":
            self.note("stop")
            self.tell("STOP")
        self.state = state

    async def pump(self) -> None:
        while True:
            if self.state == "running":
                self.guest.step()
            await asyncio.sleep(0.002)

    # --- migration

    def become(self, status: str, reason: str = "") -> None:
        self.migration, self.reason = status, reason
        if self.capabilities["events"]:
            self.tell("MIGRATION", {"status": status})

    def stream(self) -> bytes:
        maps = [[iova, size, self.function.place_of(iova)] for iova, size in self.function.maps.items()]
        head = json.dumps({"maps": maps, "latch": self.latch}).encode()
        return head + b"\n" + bytes(self.function.ram)

    async def outgoing(self, address: dict[str, Any]) -> None:
        writer: asyncio.StreamWriter | None = None
        watch: asyncio.Task[bytes] | None = None
        try:
            if address["transport"] == "file":
                write(address["filename"], b"")
            else:
                reader, writer = await self._connect(address)
                watch = asyncio.create_task(reader.read(1))
            await asyncio.sleep(COPY_SECONDS)
            if address["transport"] == "file":
                write(address["filename"], self.stream())  # what is written first fails first
            if self.ran:
                self.halt()
            if self.capabilities["pause-before-switchover"]:
                self.become("pre-switchover")
                await self.go_on.wait()
            if watch is not None and watch.done():
                raise ConnectionResetError(104, "Connection reset by peer")
            data = self.stream()
            if writer is None:
                write(address["filename"], data)
            else:
                writer.write(data)
                writer.write_eof()
                await writer.drain()
                assert watch is not None
                if await watch != b"k":  # so that success means that it has arrived
                    raise ConnectionResetError(104, "Connection reset by peer")
            self.state = "postmigrate"
            self.active = False
            self.become("completed")
        except OSError as error:
            self.become("failed", f"Unable to write: {error.strerror}")
            if self.ran:
                self.run_on()
        finally:
            if watch is not None:
                watch.cancel()
            if writer is not None:
                writer.close()

    async def _connect(self, address: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if address["type"] == "unix":
            return await asyncio.open_unix_connection(address["path"])
        return await asyncio.open_connection(address["host"], int(address["port"]))

    async def incoming(self, address: dict[str, Any]) -> None:
        self.become("active")
        arrived: asyncio.Queue[tuple[bytes, asyncio.StreamWriter]] = asyncio.Queue()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            arrived.put_nowait((await reader.read(-1), writer))

        if address["transport"] == "file":
            self.load(read(address["filename"]))
            return
        if address["type"] == "unix":
            server = await asyncio.start_unix_server(accept, address["path"])
            self.address = address
        else:
            server = await asyncio.start_server(accept, address["host"], int(address["port"]))
            self.address = address | {"port": str(server.sockets[0].getsockname()[1])}
        async with server:
            data, writer = await arrived.get()
            self.load(data)
            if self.migration == "completed":
                writer.write(b"k")
            writer.close()

    def load(self, data: bytes) -> None:
        head, _, ram = data.partition(b"\n")
        if len(ram) != RAM:
            self.become("failed", "the stream ends too early")
            return
        found = json.loads(head)
        self.function.ram[:] = ram
        for iova, size, offset in found["maps"]:
            self.function.map(iova, size, offset)
        self.latch = found["latch"]
        self.state = "paused"
        self.become("completed")

    # --- commands

    async def execute(self, command: str, given: dict[str, Any]) -> Any:
        name = "do_" + command.replace("-", "_")
        handler = getattr(self, name, None)
        if handler is None:
            raise LookupError(f"The command {command} has not been found")
        return await handler(**{key.replace("-", "_"): value for key, value in given.items()})

    async def do_qmp_capabilities(self, **_: Any) -> Any:
        return {}

    async def do_query_status(self) -> Any:
        return {"status": self.state, "running": self.state == "running"}

    async def do_query_migrate(self) -> Any:
        found: dict[str, Any] = {"status": self.migration, "ram": {"transferred": RAM}}
        if self.reason:
            found["error-desc"] = self.reason
        if self.address is not None:
            found["socket-address"] = [self.address]
        return found

    async def do_query_migrate_capabilities(self) -> Any:
        return [{"capability": name, "state": state} for name, state in self.capabilities.items()]

    async def do_query_migrate_parameters(self) -> Any:
        return {"mode": "normal"}

    async def do_migrate_set_capabilities(self, capabilities: Any) -> Any:
        self.capabilities |= {one["capability"]: one["state"] for one in capabilities}
        return {}

    async def do_migrate_set_parameters(self, **_: Any) -> Any:
        return {}

    async def do_migrate(self, channels: Any) -> Any:
        if self.state == "postmigrate":
            raise LookupError("Can't migrate the vm that was paused due to previous migration")
        self.ran = self.state == "running"
        self.go_on.clear()
        self.become("active")
        self.task = asyncio.create_task(self.outgoing(channels[0]["addr"]))
        return {}

    async def do_migrate_continue(self, state: str) -> Any:
        assert state == self.migration == "pre-switchover"
        self.become("device")
        self.go_on.set()
        return {}

    async def do_migrate_cancel(self) -> Any:
        if self.task is not None and not self.task.done():
            self.task.cancel()
            await asyncio.wait({self.task})
            self.become("cancelled")
            if self.ran:
                self.run_on()
        return {}

    async def do_migrate_incoming(self, channels: Any, exit_on_error: bool) -> Any:
        assert self.state == "inmigrate" and not exit_on_error
        address = channels[0]["addr"]
        self.task = asyncio.create_task(self.incoming(address))
        while self.migration == "none" or (address["transport"] == "socket" and self.address is None):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        return {}

    async def do_stop(self) -> Any:
        if self.state != "postmigrate":  # it stands already, and stays what it is
            self.halt()
        return {}

    async def do_cont(self) -> Any:
        assert self.state in ("paused", "postmigrate", "running")
        self.run_on()
        return {}

    async def do_query_jobs(self) -> Any:
        return [{"id": name, **job} for name, job in self.jobs.items()]

    async def do_job_dismiss(self, id: str) -> Any:
        del self.jobs[id]
        return {}

    async def do_blockdev_add(self, driver: str, node_name: str, **more: Any) -> Any:
        self.nodes[node_name] = more.get("filename") or self.nodes[more["file"]]
        return {}

    async def do_blockdev_del(self, node_name: str) -> Any:
        del self.nodes[node_name]
        return {}

    async def do_blockdev_set_active(self, active: bool) -> Any:
        self.active = active
        return {}

    async def do_block_resize(self, node_name: str, size: int) -> Any:
        assert node_name in self.nodes and size > 0
        return {}

    async def do_query_named_block_nodes(self, flat: bool) -> Any:
        listed = [
            {"id": "1", "name": name, "vm-state-size": RAM, "date-sec": one["made"], "date-nsec": 0}
            for name, one in self.snapshots.items()
        ]
        return [{"node-name": node, "image": {"snapshots": listed}} for node in self.nodes]

    async def job(self, name: str, kind: str, work: Any) -> Any:
        self.jobs[name] = {"type": kind, "status": "running"}

        async def perform() -> None:
            await asyncio.sleep(COPY_SECONDS)
            try:
                if kind.startswith("snapshot-") and not self.active:
                    raise OSError(95, "Device is writable but does not support snapshots")
                work()
            except OSError as error:
                self.jobs[name]["error"] = f"Error: {error.strerror}"
            self.jobs[name]["status"] = "concluded"
            self.tell("JOB_STATUS_CHANGE", {"id": name, "status": "concluded"})

        self.task = asyncio.create_task(perform())
        return {}

    async def do_blockdev_create(self, job_id: str, options: Any) -> Any:
        return await self.job(job_id, "create", lambda: None)

    async def do_snapshot_save(self, job_id: str, tag: str, vmstate: str, devices: Any) -> Any:
        def work() -> None:
            with open(self.nodes[vmstate], "ab") as image:  # noqa: PTH123
                image.write(self.stream())
            self.snapshots[tag] = {"stream": self.stream(), "made": len(self.snapshots) + 1}

        assert self.state != "running"
        return await self.job(job_id, "snapshot-save", work)

    async def do_snapshot_load(self, job_id: str, tag: str, vmstate: str, devices: Any) -> Any:
        def work() -> None:
            try:
                self.function.reset()
            except VmbusError as error:
                raise OSError(5, str(error)) from error
            head, _, ram = self.snapshots[tag]["stream"].partition(b"\n")
            self.function.ram[:] = ram
            self.latch = json.loads(head)["latch"]

        assert self.state != "running"
        return await self.job(job_id, "snapshot-load", work)

    async def do_snapshot_delete(self, job_id: str, tag: str, devices: Any) -> Any:
        return await self.job(job_id, "snapshot-delete", lambda: self.snapshots.pop(tag))

    async def do_human_monitor_command(self, command_line: str) -> Any:
        try:
            return await self.human(command_line.split())
        except VmbusError as error:
            return f"error: {error}\r\n"

    async def human(self, line: list[str]) -> str:
        match line:
            case ["xp", "/1xw", address]:
                return f"{int(address, 16):016x}: {self.function.read32(0):#010x}\r\n"
            case ["i", "/w", "0xcf8"]:
                return f"portw[0x0cf8] = {self.latch:#x}\r\n"
            case ["o", "/w", "0xcf8", value]:
                self.latch = int(value, 16)
                return ""
            case ["o", size, port, value]:
                count = {"/b": 1, "/h": 2, "/w": 4}[size]
                offset = (self.latch & 0xFC) + int(port, 16) - 0xCFC
                self.function.config_write(offset, int(value, 16).to_bytes(count, "little"))
                return ""
            case ["i", size, port]:
                count = {"/b": 1, "/h": 2, "/w": 4}[size]
                offset = (self.latch & 0xFC) + int(port, 16) - 0xCFC
                return f"port[{port}] = {int.from_bytes(self.function.config_read(offset, count), 'little'):#x}\r\n"
        raise LookupError(f"unknown command: {line}")

    # --- sockets

    async def monitor(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        version = {"qemu": {"major": 11, "minor": 1, "micro": 3}, "package": ""}
        writer.write(json.dumps({"QMP": {"version": version, "capabilities": []}}).encode() + b"\r\n")
        self.monitors.add(writer)
        try:
            async for request in requests(reader):
                try:
                    answer = {"return": await self.execute(request["execute"], request.get("arguments") or {})}
                except (LookupError, AssertionError, TypeError, OSError) as error:
                    answer = {"error": {"class": "GenericError", "desc": f"{type(error).__name__} {error}"}}
                if "id" in request:
                    answer["id"] = request["id"]
                writer.write(json.dumps(answer).encode() + b"\r\n")
                await writer.drain()
        except OSError:
            pass
        finally:
            self.monitors.discard(writer)
            writer.close()

    async def agent(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                if not line.strip() or self.guest.traffic is None:
                    continue
                request = json.loads(line)
                result: dict[str, Any] = {}
                match request["command"]:
                    case "counts":
                        result = self.guest.counts()
                    case "freeze":
                        self.guest.frozen = True
                    case "finish":
                        result = self.guest.finish()
                writer.write(json.dumps({"id": request["id"], "result": result}).encode() + b"\n")
                await writer.drain()


async def main(arguments: list[str]) -> None:
    qemu = Qemu(arguments)
    servers = [
        await asyncio.start_server(qemu.monitor, sock=socket.socket(fileno=int(qemu.chardevs["qmp"]["fd"]))),
        await asyncio.start_unix_server(qemu.monitor, path=qemu.chardevs["qmp-tools"]["path"]),
        await asyncio.start_unix_server(qemu.agent, path=qemu.chardevs["agent"]["path"]),
    ]
    pump = asyncio.create_task(qemu.pump())
    await asyncio.gather(pump, *(server.serve_forever() for server in servers))


if __name__ == "__main__":
    random.seed(0)
    asyncio.run(main(sys.argv[1:]))
