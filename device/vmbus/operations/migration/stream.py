"""Where the capture of a VM goes that moves: QEMU's stream to a port of the destination, the state over the link."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from vmbus.errors import EnvironmentProblem, StateError, VmbusError
from vmbus.operations.migration.address import Address, TcpAddress, UnixAddress, stream_channel
from vmbus.operations.migration.channel import NotAuthentic, connect_stream
from vmbus.operations.migration.files import send_file
from vmbus.operations.migration.link import Link
from vmbus.operations.migration.messages import Accepted, Again, FurtherState, Prepared, State
from vmbus.operations.migration.tls import Tls
from vmbus.operations.migration.tunnel import Tunnel
from vmbus.operations.target import Captured
from vmbus.snapshot.manifest import Packets
from vmbus.vm.description import MOST_DEVICES
from vmbus.vm.sockets import numbered

STATE_FILE = "migration.state"
PREPARE_TIMEOUT = 180.0
"""Seconds for the destination to start a server and a QEMU."""
ACCEPT_TIMEOUT = 120.0
"""Seconds for the destination's server to check the state."""


@dataclass(frozen=True)
class Through:
    """How QEMU's stream goes through the destination's one port: by TLS, from a unix socket at `path`, over as many as
    `most` connections, and while the guest runs at most `bandwidth` bytes per second (None: as many as go)."""

    address: Address
    tls: Tls
    path: Path
    most: int
    bandwidth: int | None


class StreamTarget:
    """The target of a capture that goes to another host: see `vmbus.operations.target.Target`."""

    def __init__(self, folder: Path, link: Link, first: Prepared, through: Through | None = None) -> None:
        self._link = link
        self._through = through
        self._tunnel: Tunnel | None = None
        self._prepared: Prepared | None = first
        self.durable = False  # whatever ends this host ends the VM, and the file is of no use then
        self._folder = folder
        self.files = None
        self.way: str | None = None
        self.sent_at = 0.0

    def state(self, index: int) -> Path:
        return self._folder / numbered(STATE_FILE, index)

    async def again(self) -> None:
        await self._link.send(Again(reason="the guest took memory back that the device had written"))

    async def begin(self) -> list[dict[str, object]]:
        prepared = self._prepared
        self._prepared = None
        if prepared is None:
            prepared = await self._link.expect(Prepared, timeout=PREPARE_TIMEOUT, what="a new server and a new QEMU")
        place = self._place(prepared) if self._through is None else await self._entrance(prepared, self._through)
        self.way = str(place) if isinstance(place, TcpAddress) else None
        return stream_channel(place)

    @property
    def problem(self) -> VmbusError | None:
        """Why QEMU's stream did not get to the destination, if that is known better than by QEMU."""
        return None if self._tunnel is None else self._tunnel.problem

    async def _entrance(self, prepared: Prepared, through: Through) -> Address:
        peer = self._link.channel.peer
        if prepared.key is None or peer is None:
            raise NotAuthentic(f"{self._link.name} takes memory without TLS only; both sides need --tls")
        if self._tunnel is not None:
            self._tunnel.close()
        dial = functools.partial(connect_stream, through.address, prepared.key, through.tls, peer)
        self._tunnel = Tunnel(through.path, dial, through.most, through.bandwidth)
        await self._tunnel.open()
        return UnixAddress(str(through.path))

    def _place(self, prepared: Prepared) -> Address:
        if isinstance(prepared.stream, str):
            return UnixAddress(prepared.stream)
        host = self._link.channel.remote_host
        if host is None or prepared.stream is None:
            raise EnvironmentProblem(f"{self._link.name} offers a TCP port over a unix socket")
        return TcpAddress(host, prepared.stream)

    async def saved(self, captured: Captured) -> None:
        if self._tunnel is not None:
            self._tunnel.rate.lift()
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
        if self._tunnel is not None:
            self._tunnel.close()
        for index in range(MOST_DEVICES):
            self.state(index).unlink(missing_ok=True)
