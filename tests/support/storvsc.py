"""A storage driver as Linux's: it speaks StorVSP, and takes of an answer what Linux takes of it.

Whatever Linux would not know, or would ask again for ever, is an AssertionError here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vmbus.testkit import Guest, Memory, Request
from vmbus.wire import scsi, storvsp
from vmbus.wire.scsi import Opcode, Sense
from vmbus.wire.storvsp import Direction, Operation, Properties, Srb

MIB = 1 << 20
Extents = Sequence[tuple[int, int]]

KNOWN = frozenset({0x02, 0x04, 0x06, 0x09, 0x0A, 0x0E, 0x12, 0x20, 0x30})
"""SRB statuses that Linux takes for what they are, beside success."""
NO_SUCH_UNIT = 0x20
HANDSHAKE = (
    storvsp.pack_request(Operation.BEGIN_INITIALIZATION),
    storvsp.pack_request(Operation.QUERY_PROTOCOL_VERSION, storvsp.VERSIONS[0].to_bytes(4, "little")),
    storvsp.pack_request(Operation.QUERY_PROPERTIES),
    storvsp.pack_request(Operation.END_INITIALIZATION),
)
"""Its steps, for a driver that does not look at the answers."""


class Data:
    """Guest memory for data."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def put(self, data: bytes, at: int = 0) -> None:
        self.memory.write(at, data)

    def get(self, length: int, at: int = 0) -> bytes:
        return self.memory.read(at, length)

    def extents(self, length: int, at: int = 0) -> list[tuple[int, int]]:
        return self.memory.part(at, length)


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes that are not repeated."""
    return random.Random(seed).randbytes(length)


class Result(NamedTuple):
    """How a command ended. `moved`: bytes, as the driver counts them. `sense`: None without sense data."""

    srb: int
    status: int
    moved: int
    sense: Sense | None

    @property
    def good(self) -> bool:
        return self.srb == storvsp.SrbStatus.SUCCESS

    @property
    def gone(self) -> bool:
        return self.srb == NO_SUCH_UNIT


GOOD = 0x01


def result_of(reply: bytes) -> Result:
    """What Linux takes of a completion."""
    assert len(reply) == storvsp.PACKET_SIZE, f"{len(reply)} bytes: the ring would be out of step, or the wait endless"
    operation, flags, _ = storvsp.parse_head(reply)
    assert (operation, flags) == (Operation.COMPLETE_IO, 0)
    srb = storvsp.parse_srb(reply)
    status = srb.srb_status & 0x3F
    assert srb.srb_status == GOOD or status in KNOWN, f"SRB status {srb.srb_status:#x} would be asked again for ever"
    sense = None
    if srb.srb_status & storvsp.SENSE_VALID:
        assert srb.scsi_status == storvsp.ScsiStatus.CHECK_CONDITION and 14 <= srb.sense_length <= 20
        assert srb.cdb[0] == 0x70
        sense = Sense(srb.cdb[2], srb.cdb[12], srb.cdb[13])
    if srb.srb_status != GOOD:
        assert srb.data_length == 0, "a failed command moves nothing: the middle layer would keep what is in the buffer"
    return Result(status, srb.scsi_status, srb.data_length, sense)


def request(
    cdb: bytes, length: int = 0, *, lun: int = 0, path: int = 0, target: int = 0, direction: int | None = None
) -> bytes:
    """An EXECUTE_SRB as Linux sends it."""
    if direction is None:
        direction = Direction.NONE if not length else Direction.FROM_DEVICE
    srb = Srb(
        52,
        0,
        0,
        0,
        path,
        target,
        lun,
        len(cdb),
        20,
        direction,
        0,
        length,
        cdb.ljust(20, b"\0"),
        0,
        0xFF,
        0x20,
        0x8,
        60,
        0,
    )
    return storvsp.pack_request(Operation.EXECUTE_SRB, srb.pack())


def read_10(first: int, blocks: int) -> bytes:
    return bytes([Opcode.READ_10, 0]) + first.to_bytes(4, "big") + b"\0" + blocks.to_bytes(2, "big") + b"\0"


def write_10(first: int, blocks: int, *, fua: bool = False) -> bytes:
    flags = scsi.FUA if fua else 0
    return bytes([Opcode.WRITE_10, flags]) + first.to_bytes(4, "big") + b"\0" + blocks.to_bytes(2, "big") + b"\0"


def long_form(opcode: int, first: int, blocks: int, flags: int = 0) -> bytes:
    """READ(16), WRITE(16) and WRITE SAME(16)."""
    return bytes([opcode, flags]) + first.to_bytes(8, "big") + blocks.to_bytes(4, "big") + b"\0\0"


SYNCHRONIZE = bytes([Opcode.SYNCHRONIZE_CACHE_10]).ljust(10, b"\0")
READY = bytes(6)


def inquiry(length: int, page: int | None = None) -> bytes:
    return bytes([Opcode.INQUIRY, page is not None, page or 0]) + length.to_bytes(2, "big") + b"\0"


def unmap_cdb(length: int) -> bytes:
    return bytes([Opcode.UNMAP, 0, 0, 0, 0, 0, 0]) + length.to_bytes(2, "big") + b"\0"


class Found(NamedTuple):
    """What a scan finds of a logical unit."""

    lun: int
    blocks: int
    block_size: int
    read_only: bool
    thin: bool
    write_cache: bool
    fua: bool
    vendor: bytes
    identity: bytes


class Driver:
    """The driver. `ports`: its channels, the primary one first; more are added by hand. `memory`: for data."""

    def __init__(self, port: Guest, memory: int = 2 * MIB) -> None:
        self.ports = [port]
        self.memory = Data(port.memory(memory))
        self.properties: Properties | None = None
        self.version = 0

    def notices(self) -> list[int]:
        """Operations of the packets that have come unasked since the last time. They want no answer."""
        port = self.ports[0]
        found = port.packets[port.received :]
        port.received = len(port.packets)
        assert all(packet.transaction == 0 and not packet.wanted for packet in found)
        return [storvsp.parse_head(packet.payload)[0] for packet in found]

    # ---- the handshake -------------------------------------------------------------------------------------------

    def step(self, operation: int, body: bytes = b"") -> tuple[int, bytes]:
        """Status and answer of a step."""
        reply = self.ports[0].request(storvsp.pack_request(operation, body))
        assert len(reply) == storvsp.PACKET_SIZE
        answer, flags, status = storvsp.parse_head(reply)
        assert (answer, flags) == (Operation.COMPLETE_IO, 0)
        return status, reply

    def connect(self, *, sub_channels: int = 0) -> None:
        """As Linux does it; `sub_channels`: what it asks for."""
        assert self.step(Operation.BEGIN_INITIALIZATION)[0] == 0
        for version in storvsp.VERSIONS:
            if self.step(Operation.QUERY_PROTOCOL_VERSION, version.to_bytes(2, "little") + b"\0\0")[0] == 0:
                self.version = version
                break
        assert self.version
        status, reply = self.step(Operation.QUERY_PROPERTIES)
        assert status == 0
        self.properties = storvsp.parse_properties(reply)
        assert self.properties.maximum_transfer >= 4096
        assert self.step(Operation.END_INITIALIZATION)[0] == 0
        if sub_channels:
            assert self.properties.flags & storvsp.ChannelFlag.MULTI_CHANNEL
            count = min(sub_channels, self.properties.sub_channels)
            assert self.step(Operation.CREATE_SUB_CHANNELS, count.to_bytes(2, "little"))[0] == 0

    # ---- commands ------------------------------------------------------------------------------------------------

    def send(
        self, cdb: bytes, length: int = 0, *, channel: int = 0, external: Extents | None = None, **more: Any
    ) -> Request:
        """A command whose data is the memory's first `length` bytes."""
        if external is None and length:
            external = self.memory.extents(length)
        return self.ports[channel].send(request(cdb, length, **more), external=external)

    def ask(self, cdb: bytes, length: int = 0, **more: Any) -> Result:
        return result_of(self.send(cdb, length, **more).wait())

    def fetch(self, cdb: bytes, length: int, **more: Any) -> bytes:
        """Data of a command that must succeed."""
        result = self.ask(cdb, length, **more)
        assert result.good, (cdb.hex(), result)
        return self.memory.get(result.moved)

    def write(self, first: int, data: bytes, *, block_size: int = 512, fua: bool = False, **more: Any) -> Result:
        self.memory.put(data)
        cdb = write_10(first, len(data) // block_size, fua=fua)
        result = self.ask(cdb, len(data), direction=Direction.TO_DEVICE, **more)
        assert not result.good or result.moved == len(data)
        return result

    def read(self, first: int, length: int, *, block_size: int = 512, **more: Any) -> bytes:
        return self.fetch(read_10(first, length // block_size), length, **more)

    def unmap(self, *extents: tuple[int, int], lun: int = 0) -> Result:
        data = scsi.pack_unmap([scsi.Extent(*one) for one in extents])
        self.memory.put(data)
        return self.ask(unmap_cdb(len(data)), len(data), direction=Direction.TO_DEVICE, lun=lun)

    # ---- scanning ------------------------------------------------------------------------------------------------

    def scan(self) -> list[Found]:
        """All paths and targets, as after a connect or ENUMERATE_BUS."""
        found: list[Found] = []
        for path in range(8):
            for target in range(2):
                where = {"path": path, "target": target}
                first = self.fetch(inquiry(36), 36, **where)
                assert len(first) == 36 and first[2] == 5
                report = self.fetch(
                    bytes([Opcode.REPORT_LUNS, 0, 0, 0, 0, 0]) + (4096).to_bytes(4, "big") + b"\0\0", 4096, **where
                )
                luns = [report[at + 1] for at in range(8, 8 + int.from_bytes(report[:4], "big"), 8)]
                assert (path, target) == (0, 0) or not luns
                for lun in luns:
                    data = self.fetch(inquiry(36), 36, lun=lun, **where)
                    assert data[0] == 0, "a logical unit that is reported is not there"
                    found.append(self.look(lun))
                if 0 not in luns:
                    assert first[0] == scsi.ABSENT, "Linux would add a disk that does not exist"
        return found

    def look(self, lun: int) -> Found:
        """What sd asks of a disk."""
        while not (ready := self.ask(READY, lun=lun)).good:
            assert ready.sense == scsi.CAPACITY_HAS_CHANGED, ready
        head = self.fetch(inquiry(36), 36, lun=lun)
        capacity = self.fetch(
            bytes([Opcode.SERVICE_ACTION_IN_16, 0x10]).ljust(10, b"\0") + (32).to_bytes(4, "big") + b"\0\0", 32, lun=lun
        )
        blocks, block_size = int.from_bytes(capacity[:8], "big") + 1, int.from_bytes(capacity[8:12], "big")
        short = self.fetch(bytes([Opcode.READ_CAPACITY_10]).ljust(10, b"\0"), 8, lun=lun)
        assert short == min(blocks - 1, 0xFFFFFFFF).to_bytes(4, "big") + capacity[8:12]
        mode = self.fetch(bytes([Opcode.MODE_SENSE_6, 0, 0x3F, 0, 4, 0]), 4, lun=lun)
        caching = self.fetch(bytes([Opcode.MODE_SENSE_6, 0, 0x08, 0, 64, 0]), 64, lun=lun)
        assert caching[0] == len(caching) - 1 and caching[4] == 8 and caching[5] == 18
        pages = self.fetch(inquiry(255, 0), 255, lun=lun)[4:]
        bodies = {page: self.fetch(inquiry(255, page), 255, lun=lun) for page in pages}
        assert list(pages) == sorted(pages)
        for page, body in bodies.items():
            assert body[1] == page and int.from_bytes(body[2:4], "big") == len(body) - 4
        assert len(bodies[0xB0]) == len(bodies[0xB1]) == 64
        return Found(
            lun=lun,
            blocks=blocks,
            block_size=block_size,
            read_only=bool(mode[2] & 0x80),
            thin=bool(capacity[14] & 0x80) and bool(bodies[0xB2][5] & 0x80),
            write_cache=bool(caching[6] & 4),
            fua=bool(mode[2] & 0x10),
            vendor=head[8:16],
            identity=bodies[0x83][4:],
        )


def until_good(ask: Callable[[], Result]) -> Result:
    """Again, as Linux does when it is told that something has changed."""
    while (result := ask()).sense == scsi.CAPACITY_HAS_CHANGED:
        pass
    return result
