"""A VM of this machine that comes into being from a live migration: the real `Arriving` of the destination."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vmbus.device import saved
from vmbus.device.description import DeviceDescription
from vmbus.errors import EnvironmentProblem, StateError
from vmbus.operations.migration.address import Address, TcpAddress, UnixAddress, stream_channel
from vmbus.qemu.probe import driven_by_client, require_complete, require_running
from vmbus.snapshot.manifest import Packets
from vmbus.transport.pci import interrupt_writes, without_interrupts
from vmbus.util.patience import patient
from vmbus.vm.timing import Phases

if TYPE_CHECKING:
    from vmbus.qemu.machine import VirtualMachine

STREAM_SOCKET = "stream.sock"
LOAD_TIMEOUT = 60.0
"""Seconds that the server may take to check the state, and to rebuild from it."""
_STATUS_TIMEOUT = 30.0
_STREAM_TIMEOUT = 3600.0  # the source bounds it


def packets_found(found: dict[str, Any]) -> Packets:
    """What the server accounts for of a state's packets: those that are back, and those of it that were dropped with a
    channel that is made anew. Others of such a channel were not saved at all, and are not the state's."""

    def count(key: str) -> int:
        back, dropped, unsaved = (int(found.get(part, {}).get(key, 0)) for part in ("packets", "dropped", "unsaved"))
        return back + dropped - unsaved

    return Packets(queued=count("queued"), sent=count("sent"))


class Arrival:
    """Starts, fills and, if need be, discards one VM. `host`: our address on the source's connection, if it is TCP."""

    def __init__(self, vm: VirtualMachine, host: str | None, stream_port: int = 0) -> None:
        """`stream_port`: where QEMU's stream is to come, if it is TCP; 0: at any port that is free."""
        self.vm = vm
        self._stream_port = stream_port
        self._host = host
        # A copy of what QEMU has in its stream, if it migrates the device itself: then it puts everything back.
        self._in_stream: saved.DeviceState | None = None
        self._driven = False
        self._ahead = 0  # writes to the PCI function before QEMU loaded its stream

    @property
    def folder(self) -> Path:
        return self.vm.run_directory.room("arrival")

    async def start(self, phases: Phases, multifd: int) -> int | str:
        vm = self.vm
        await vm.start_incoming(phases)
        with phases("listen"):
            # Both sides must agree on these; the source sets its own.
            await vm.execute(
                "migrate-set-capabilities",
                {
                    "capabilities": [
                        {"capability": "events", "state": True},
                        {"capability": "multifd", "state": multifd > 0},
                    ]
                },
            )
            if multifd:
                await vm.execute("migrate-set-parameters", {"multifd-channels": multifd})
            path = vm.run_directory / STREAM_SOCKET
            address: Address = (
                UnixAddress(str(path)) if self._host is None else TcpAddress(self._host, self._stream_port)
            )
            with vm.own_migration():
                await vm.execute("migrate-incoming", {"channels": stream_channel(address), "exit-on-error": False})
            if isinstance(address, UnixAddress):
                return address.path
            listening = (await vm.execute("query-migrate")).get("socket-address", [])
            for one in listening:
                if one.get("type") == "inet":
                    return int(one["port"])
            raise EnvironmentProblem(f"QEMU does not say on which port it waits for its stream: {listening}")

    async def driven(self) -> bool:
        assert self.vm.control is not None
        self._driven = await driven_by_client(self.vm.control)
        return self._driven

    async def replay_ahead(self, config: bytes) -> None:
        # Without its interrupt: QEMU's stream brings what that is translated by.
        self._ahead = 0 if self._driven else await self.vm.put_back(without_interrupts(config))

    async def load_state(self, path: Path, sha256: str, device: DeviceDescription) -> Packets:
        vm = self.vm
        assert vm.control is not None
        if self._driven:
            data = await asyncio.to_thread(path.read_bytes)
            if hashlib.sha256(data).hexdigest() != sha256:
                raise StateError(f"the device state in {path} is not the one meant: its digest differs")
            self._in_stream = saved.decode(data)
            vm.description = msgspec.structs.replace(vm.description, device=device)
            counts = saved.count_packets(self._in_stream)
            return Packets(queued=counts.queued, sent=counts.sent)
        work = vm.control.call(
            "load",
            timeout=LOAD_TIMEOUT,
            path=str(path),
            sha256=sha256,
            description=msgspec.to_builtins(device),
        )
        found = await vm.guard(work, "the device server to take the state", LOAD_TIMEOUT + 1)
        vm.description = msgspec.structs.replace(vm.description, device=device)
        return packets_found(found)

    async def loaded(self) -> None:
        what = "QEMU to load its stream"
        with self.vm.own_migration():
            await self.vm.guard(
                self.vm.monitor.wait_migration({"completed"}, patient(_STREAM_TIMEOUT), what), what, _STREAM_TIMEOUT + 1
            )
        if await self.vm.guard(self.vm.monitor.running(), "QEMU's run state", _STATUS_TIMEOUT):
            raise StateError("QEMU runs the guest before its device was put back")

    async def replay(self, config: bytes) -> int:
        if self._in_stream is not None:
            return 0
        if await self.vm.is_back(without_interrupts(config)):
            only = interrupt_writes(config) if config != without_interrupts(config) else []
            return self._ahead + (await self.vm.put_back(config, only) if only else 0)
        return self._ahead + await self.vm.put_back(config)

    async def rebuild(self) -> tuple[Packets, int]:
        vm = self.vm
        assert vm.control is not None
        if self._in_stream is not None:
            await vm.guard(require_complete(vm.control), "the device server's status", LOAD_TIMEOUT)
            counts = saved.count_packets(self._in_stream)
            channels = sum(offer.open is not None for offer in self._in_stream.bus.offers)
            return Packets(queued=counts.queued, sent=counts.sent), channels
        work = vm.control.call("restore-finish", timeout=LOAD_TIMEOUT, frozen=True)
        found = await vm.guard(work, "the device server to rebuild its channels", LOAD_TIMEOUT + 1)
        return packets_found(found), int(found.get("channels", 0))

    async def release(self) -> None:
        if self._in_stream is None:
            await self.vm.call_server("resume")
        else:
            await self.vm.require_device()

    async def run(self) -> None:
        await self.vm.execute("cont")  # since `loaded` QEMU stands, and may run
        if self._in_stream is not None:
            assert self.vm.control is not None
            await require_running(self.vm.control)

    async def start_over(self) -> None:
        await self.vm.end_processes()

    async def discard(self) -> None:
        await self.vm.kill()
