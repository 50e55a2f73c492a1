"""Where the capture of a VM goes that moves: QEMU's stream to a port of the destination, the state over the link."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from vmbus.errors import EnvironmentProblem, StateError
from vmbus.operations.migration.address import Address, TcpAddress, UnixAddress, stream_channel
from vmbus.operations.migration.files import send_file
from vmbus.operations.migration.link import Link
from vmbus.operations.migration.messages import Accepted, Again, FurtherState, Prepared, State
from vmbus.operations.target import Captured
from vmbus.snapshot.manifest import Packets
from vmbus.vm.command_line import numbered
from vmbus.vm.description import MOST_DEVICES

STATE_FILE = "migration.state"
PREPARE_TIMEOUT = 180.0
"""Seconds for the destination to start a server and a QEMU."""
ACCEPT_TIMEOUT = 120.0
"""Seconds for the destination's server to check the state."""


class StreamTarget:
    """The target of a capture that goes to another host: see `vmbus.operations.target.Target`."""

    def __init__(self, folder: Path, link: Link, first: Prepared) -> None:
        self._link = link
        self._prepared: Prepared | None = first
        self.durable = False  # whatever ends this host ends the VM, and the file is of no use then
        self._folder = folder
        self.files = None
        self.way: str | None = None
        self.sent_at = 0.0

    def state(self, index: int) -> Path:
        return self._folder / numbered(STATE_FILE, index)

    async def begin(self) -> list[dict[str, object]]:
        prepared = self._prepared
        self._prepared = None
        if prepared is None:
            await self._link.send(Again(reason="the guest took memory back that the device had written"))
            prepared = await self._link.expect(Prepared, timeout=PREPARE_TIMEOUT, what="a new server and a new QEMU")
        place = self._place(prepared)
        self.way = str(place) if isinstance(place, TcpAddress) else None
        return stream_channel(place)

    def _place(self, prepared: Prepared) -> Address:
        if isinstance(prepared.stream, str):
            return UnixAddress(prepared.stream)
        host = self._link.channel.remote_host
        if host is None:
            raise EnvironmentProblem(f"{self._link.name} offers a TCP port over a unix socket")
        return TcpAddress(host, prepared.stream)

    async def saved(self, captured: Captured) -> None:
        packets = Packets(**captured.packets)
        first, *further = captured.devices
        rest = [FurtherState(file=one.state, device=one.description, pci_config=one.pci_config) for one in further]
        announced = State(
            file=first.state,
            device=first.description,
            pci_config=first.pci_config,
            packets=packets,
            run=captured.was_running,
            further=rest or msgspec.UNSET,
        )
        await self._link.send(announced)
        for index in range(len(captured.devices)):
            await send_file(self._link, self.state(index))
        accepted = await self._link.expect(Accepted, timeout=ACCEPT_TIMEOUT, what="its server to take the state")
        if accepted.packets != packets:
            raise StateError(f"{self._link.name} found {accepted.packets} in the state that has {packets}")
        self.sent_at = time.monotonic()

    def discard(self) -> None:
        for index in range(MOST_DEVICES):
            self.state(index).unlink(missing_ok=True)
