"""The steps by which a VM comes into being from a live migration, as its `destination` takes them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmbus.device import saved
from vmbus.device.description import DeviceDescription
from vmbus.device.pci import interrupt_writes, without_interrupts
from vmbus.errors import EnvironmentProblem, StateError
from vmbus.operations.migration.address import Address, TcpAddress, UnixAddress, stream_channel
from vmbus.qemu.device import DeviceInstance, ask_each, each
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


def packets_found(answers: Sequence[dict[str, Any]]) -> Packets:
    """What the servers account for of their states' packets: those that are back, and those that were dropped with a
    channel that is made anew. Others of such a channel were not saved at all, and are not the state's."""

    def count(key: str) -> int:
        back, dropped, unsaved = (
            sum(int(found.get(part, {}).get(key, 0)) for found in answers) for part in ("packets", "dropped", "unsaved")
        )
        return back + dropped - unsaved

    return Packets(queued=count("queued"), sent=count("sent"))


class Arrival:
    """Starts, fills and, if need be, discards one VM. `host`: our address on the source's connection, if it is TCP."""

    def __init__(self, vm: VirtualMachine, host: str | None, stream_port: int = 0) -> None:
        """`stream_port`: where QEMU's stream is to come, if it is TCP; 0: at any port that is free."""
        self.vm = vm
        self._stream_port = stream_port
        self._host = host
        # Copies of what QEMU has in its stream, if it migrates the devices itself: then it puts everything back.
        self._in_stream: list[saved.DeviceState] | None = None
        self._driven = False
        self._ahead = 0  # writes to the PCI function before QEMU loaded its stream

    @property
    def folder(self) -> Path:
        return self.vm.room("arrival")

    async def start(self, phases: Phases, multifd: int) -> int | str:
        """Servers that await their states and a QEMU that awaits its stream: the stream's TCP port or unix path."""
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
        self._driven = await driven_by_client(self.vm.devices)
        return self._driven

    async def replay_ahead(self, configs: Sequence[bytes]) -> None:
        """Puts the PCI functions back as far as they are known before the end of the stream."""
        self._ahead = 0
        for device, config in zip(self.vm.devices, configs if not self._driven else (), strict=not self._driven):
            # Without its interrupt: QEMU's stream brings what that is translated by.
            self._ahead += await device.put_back(without_interrupts(config))

    async def load_states(self, states: Sequence[tuple[Path, str, DeviceDescription]]) -> Packets:
        """Gives the servers their states (file, digest, device), and returns the packets found in them. Raises if one
        is refused."""
        vm = self.vm
        description = vm.description.with_devices([described for _, _, described in states])
        if self._driven:
            self._in_stream = []
            for path, sha256, _ in states:
                data = await asyncio.to_thread(path.read_bytes)
                if hashlib.sha256(data).hexdigest() != sha256:
                    raise StateError(f"the device state in {path} is not the one meant: its digest differs")
                self._in_stream.append(saved.decode(data))
            packets = _packets_in(self._in_stream)
        else:

            async def load(device: DeviceInstance) -> dict[str, Any]:
                path, sha256, described = states[vm.devices.index(device)]
                return await device.load(path, sha256, described, LOAD_TIMEOUT)

            packets = packets_found(await each(vm.devices, load))
        vm.description = description
        return packets

    async def loaded(self) -> None:
        """Waits until QEMU has loaded its stream. Raises with QEMU's reason if it cannot."""
        monitor = self.vm.monitor
        with self.vm.own_migration():
            await monitor.wait_migration({"completed"}, patient(_STREAM_TIMEOUT), "QEMU to load its stream")
        if await monitor.running():
            raise StateError("QEMU runs the guest before its device was put back")

    async def replay(self, configs: Sequence[bytes]) -> int:
        """Makes sure that the PCI functions are back, and writes those that are not; the number of writes, ahead or
        now."""
        if self._in_stream is not None:
            return 0
        writes = self._ahead
        for device, config in zip(self.vm.devices, configs, strict=True):
            if not await device.is_back(without_interrupts(config)):
                writes += await device.put_back(config)
            elif config != without_interrupts(config):
                writes += await device.put_back(config, interrupt_writes(config))
        return writes

    async def rebuild(self) -> tuple[Packets, int]:
        """Rebuilds the channels: the packets, and the number of channels. Providers do nothing yet."""
        if self._in_stream is not None:
            await require_complete(self.vm.devices)
            return _packets_in(self._in_stream), sum(one.bus.open_channels for one in self._in_stream)
        found = await ask_each(self.vm.devices, "restore-finish", LOAD_TIMEOUT, frozen=True)
        return packets_found(found), sum(int(one.get("channels", 0)) for one in found)

    async def release(self) -> None:
        """Lets the devices work. Raises if one is not there any more, as it has to be before the vCPUs run."""
        await ask_each(self.vm.devices, "resume" if self._in_stream is None else "status")

    async def run(self) -> None:
        await self.vm.monitor.execute("cont")  # since `loaded` QEMU stands, and may run
        if self._in_stream is not None:
            await require_running(self.vm.devices)

    async def start_over(self) -> None:
        """Ends servers and QEMU; `start` may be called again."""
        await self.vm.end_processes()

    async def discard(self) -> None:
        """Ends everything and removes the directory."""
        await self.vm.kill()


def _packets_in(states: Sequence[saved.DeviceState]) -> Packets:
    counts = [saved.count_packets(state) for state in states]
    return Packets(queued=sum(one.queued for one in counts), sent=sum(one.sent for one in counts))
