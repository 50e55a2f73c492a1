"""The steps by which a VM comes into being from a live migration, as its `destination` takes them."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vmbus.device import saved
from vmbus.device.description import DeviceDescription
from vmbus.device.pci import interrupt_writes, without_interrupts
from vmbus.errors import EnvironmentProblem, StateError
from vmbus.operations.migration.address import Address, TcpAddress, UnixAddress, stream_channel
from vmbus.qemu.probe import driven_by_client, require_complete, require_running
from vmbus.qemu.qmp import capabilities
from vmbus.snapshot.manifest import Packets
from vmbus.util.patience import patient
from vmbus.vm.timing import Phases

if TYPE_CHECKING:
    from vmbus.operations.machine import VirtualMachine

LOAD_TIMEOUT = 60.0
"""Seconds that the server may take to check the state, and to rebuild from it."""
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
        """A directory of its own."""
        return self.vm.room("arrival")

    async def start(self, phases: Phases, multifd: int) -> int | str:
        """A server that awaits its state and a QEMU that awaits its stream: the stream's TCP port or unix path."""
        vm, monitor = self.vm, self.vm.monitor
        await vm.start(phases, incoming=True)
        with phases("listen"):
            # Both sides must agree on these; the source sets its own.
            await monitor.execute("migrate-set-capabilities", capabilities(events=True, multifd=multifd > 0))
            if multifd:
                await monitor.execute("migrate-set-parameters", {"multifd-channels": multifd})
            path = str(vm.paths.stream)
            address: Address = UnixAddress(path) if self._host is None else TcpAddress(self._host, self._stream_port)
            with vm.own_migration():
                await monitor.execute("migrate-incoming", {"channels": stream_channel(address), "exit-on-error": False})
            if isinstance(address, UnixAddress):
                return address.path
            listening = (await monitor.execute("query-migrate")).get("socket-address", [])
            for one in listening:
                if one.get("type") == "inet":
                    return int(one["port"])
            raise EnvironmentProblem(f"QEMU does not say on which port it waits for its stream: {listening}")

    async def driven(self) -> bool:
        """Whether QEMU migrates the device itself here."""
        self._driven = await driven_by_client(self.vm.control)
        return self._driven

    async def replay_ahead(self, config: bytes) -> None:
        """Puts the PCI function back as far as it is known before the end of the stream."""
        # Without its interrupt: QEMU's stream brings what that is translated by.
        self._ahead = 0 if self._driven else await self.vm.put_back(without_interrupts(config))

    async def load_state(self, path: Path, sha256: str, device: DeviceDescription) -> Packets:
        """Gives the server its state; the packets found in it. Raises if it is refused."""
        vm = self.vm
        if self._driven:
            data = await asyncio.to_thread(path.read_bytes)
            if hashlib.sha256(data).hexdigest() != sha256:
                raise StateError(f"the device state in {path} is not the one meant: its digest differs")
            self._in_stream = saved.decode(data)
            packets = _packets_in(self._in_stream)
        else:
            described = msgspec.to_builtins(device)
            packets = packets_found(
                await vm.control.call("load", LOAD_TIMEOUT, path=str(path), sha256=sha256, description=described)
            )
        vm.description = msgspec.structs.replace(vm.description, device=device)
        return packets

    async def loaded(self) -> None:
        """Waits until QEMU has loaded its stream. Raises with QEMU's reason if it cannot."""
        monitor = self.vm.monitor
        with self.vm.own_migration():
            await monitor.wait_migration({"completed"}, patient(_STREAM_TIMEOUT), "QEMU to load its stream")
        if await monitor.running():
            raise StateError("QEMU runs the guest before its device was put back")

    async def replay(self, config: bytes) -> int:
        """Makes sure that the PCI function is back, and writes it if it is not; the number of writes, ahead or now."""
        if self._in_stream is not None:
            return 0
        if await self.vm.is_back(without_interrupts(config)):
            only = interrupt_writes(config) if config != without_interrupts(config) else []
            return self._ahead + (await self.vm.put_back(config, only) if only else 0)
        return self._ahead + await self.vm.put_back(config)

    async def rebuild(self) -> tuple[Packets, int]:
        """Rebuilds the channels: the packets, and the number of channels. Providers do nothing yet."""
        if self._in_stream is not None:
            await require_complete(self.vm.control)
            return _packets_in(self._in_stream), self._in_stream.bus.open_channels
        found = await self.vm.control.call("restore-finish", LOAD_TIMEOUT, frozen=True)
        return packets_found(found), int(found.get("channels", 0))

    async def release(self) -> None:
        """Lets the device work. Raises if it is not there any more, as it has to be before the vCPUs run."""
        await self.vm.control.call("resume" if self._in_stream is None else "status")

    async def run(self) -> None:
        """Lets the vCPUs run."""
        await self.vm.monitor.execute("cont")  # since `loaded` QEMU stands, and may run
        if self._in_stream is not None:
            await require_running(self.vm.control)

    async def start_over(self) -> None:
        """Ends server and QEMU; `start` may be called again."""
        await self.vm.end_processes()

    async def discard(self) -> None:
        """Ends everything and removes the directory."""
        await self.vm.kill()


def _packets_in(state: saved.DeviceState) -> Packets:
    counts = saved.count_packets(state)
    return Packets(queued=counts.queued, sent=counts.sent)
