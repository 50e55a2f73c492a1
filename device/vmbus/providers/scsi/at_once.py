"""The short way of READ and WRITE, which are nearly all requests, from the packet to its answer.

It takes those with nothing special about them, and whose bytes the kernel can move straight between the image and the
guest's memory without waiting. Whatever has anything special, or needs a thread, goes the long way
(`Adapter._execute`), which comes to the same for these, too.
"""

from collections.abc import Callable, Mapping
from struct import Struct
from typing import NamedTuple

from vmbus.kmcl.completion import Completion
from vmbus.providers.disk.disk import MAXIMUM_DATA
from vmbus.providers.scsi.unit import Unit
from vmbus.wire import scsi
from vmbus.wire.scsi import Opcode
from vmbus.wire.storvsp import CDB_SIZE, pack_good

_CDB = 28  # where it is in the packet (`storvsp.Srb`)


class _Shape(NamedTuple):
    """How a command block is read: `unpack` gives its byte 1, the first block, and how many. `least`: its bytes."""

    write: bool
    least: int
    unpack: Callable[[bytes, int], tuple[int, ...]]


_TEN, _SIXTEEN = Struct(">xBIxH").unpack_from, Struct(">xBQI").unpack_from
_SHAPES: dict[int, _Shape] = {
    int(Opcode.READ_10): _Shape(False, 10, _TEN),
    int(Opcode.WRITE_10): _Shape(True, 10, _TEN),
    int(Opcode.READ_16): _Shape(False, 16, _SIXTEEN),
    int(Opcode.WRITE_16): _Shape(True, 16, _SIXTEEN),
}


def move_at_once(units: Mapping[int, Unit], completion: Completion, payload: bytes) -> bool:
    """Do what an EXECUTE_SRB packet of at least 64 bytes asks for, and answer it; whether that was possible. If not,
    nothing was done. `units`: the logical units that are there for the guest, which has ended the handshake."""
    shape = _SHAPES.get(payload[_CDB])
    unit = units.get(payload[19])
    if shape is None or unit is None or payload[17] or payload[18]:
        return False
    core = unit.disk.core
    if core is None or unit.grown or not unit.disk.active or not shape.least <= payload[20] <= CDB_SIZE:
        return False
    flags, first, count = shape.unpack(payload, _CDB)
    geometry = core.geometry
    if shape.write and (flags & scsi.FUA or geometry.read_only):
        return False
    offset, length = first * geometry.block_size, count * geometry.block_size
    if not 0 < length <= MAXIMUM_DATA or offset + length > geometry.size:
        return False
    if length != int.from_bytes(payload[24:28], "little"):
        return False
    if not unit.disk.move(completion, offset, length, write=shape.write):
        return False
    completion.complete(pack_good(payload, length))
    return True
