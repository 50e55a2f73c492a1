"""A migration driven through the vfio-user protocol alone, step by step: what a VMM does to a device and to memory.

The guest stands still while a `ProtocolMigration` exists (its driver is not stepped); the device works on as long as
it is in PRE_COPY. Guest memory at the destination is really another: what the source's client copied, and copied again
where the source's server reported that it had written. Whatever it did not report is old there.
"""

from __future__ import annotations

from pathlib import Path

from vmbus.testkit.loopback.client import VfioUserClient
from vmbus.testkit.loopback.function import PAGE_SIZE, LoopbackFunction
from vmbus.transport.protocol import DeviceState


class ProtocolMigration:
    """From the server that `function` is connected to, to another.

    The whole of it: `begin`, any number of `copy_again`, `stop`, `copy_again`, `read`, `release`; then `load`, `run`.
    After `load`, or instead of it, `cancel` lets the source run on.

    Attributes:
        source: the client's connection to the source. memory: the copy. copied: pages copied again, in all.
    """

    def __init__(self, function: LoopbackFunction) -> None:
        self._function = function
        self.source: VfioUserClient = function.client
        self.copied = 0
        self.memory = bytearray()

    # -- the source's side ----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The log starts, then all of guest memory is copied. The device works on."""
        self.source.logging_start()
        self.source.set_migration_state(DeviceState.PRE_COPY)
        self.memory = bytearray(self._function.ram)

    def copy_again(self) -> list[int]:
        """Copy the pages that the server has written meanwhile; returns their I/O addresses."""
        written: list[int] = []
        for iova, size in self._function.maps.items():
            for page in self.source.dirty_pages(iova, size):
                written.append(page)
                place = self._function.place_of(page)
                self.memory[place : place + PAGE_SIZE] = self._function.ram[place : place + PAGE_SIZE]
        self.copied += len(written)
        return written

    def stop(self) -> None:
        """The device comes to rest, and its state can be read."""
        self.source.set_migration_state(DeviceState.STOP_COPY)

    def read(self, chunk: int) -> bytes:
        """The state, in pieces of `chunk` bytes."""
        data = bytearray()
        while piece := self.source.read_migration_data(chunk):
            data += piece
        return bytes(data)

    def release(self) -> None:
        """The source is not needed any more; it stands still."""
        self.source.set_migration_state(DeviceState.STOP)

    def cancel(self) -> None:
        """The source runs on."""
        self.source.set_migration_state(DeviceState.RUNNING)
        self.source.logging_stop()  # harmless without a log

    # -- the destination's side -----------------------------------------------------------------------------------

    def load(self, socket_path: Path, data: bytes, chunk: int) -> VfioUserClient:
        """Connect to the destination, give it memory and interrupt, and write the state in pieces of `chunk` bytes.

        The caller closes the connection, or hands it to `run`. Raises what the destination refuses.
        """
        client = self._function.another_client(socket_path, bytes(self.memory))
        try:
            client.set_migration_state(DeviceState.RESUMING)
            for start in range(0, len(data), chunk):
                client.write_migration_data(data[start : start + chunk])
        except BaseException:
            client.close()
            raise
        return client

    def run(self, client: VfioUserClient) -> None:
        """The device runs at the destination, and the guest's driver finds itself there. Raises what is refused;
        the guest is at the source then."""
        client.set_migration_state(DeviceState.RUNNING)
        self._function.move_to(client)
