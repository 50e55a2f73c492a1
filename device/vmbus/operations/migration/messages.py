"""What source and destination say to each other: one MessagePack object per frame, decoded strictly.

In the order in which a migration uses them (S from the source, D from the destination):

    S Hello        which migration this is, and whether it begins or is asked about
    D Fate         (when asked) what became of it
    S Prepare      the VM, and what it needs
    D Wanted       boot files that the destination lacks, and who it is
    S Chunk ...    their bytes
    D Prepared     the server and QEMU wait; where QEMU's stream goes
    S Again        the pass was given up: a new server and a new QEMU, please; Prepared follows
    S State        the devices' states, their bytes in Chunks behind it, in the same order
    D Accepted     the server has checked it and holds it
    S Sent         QEMU has sent its last page
    D Restored     memory is loaded, the PCI function is back, every packet is rebuilt; the vCPUs stand
    S Go           the point of no return: the VM is the destination's
    D Running      the vCPUs run
    S Released     the source has ended its VM; nobody will ask any more

Either side may say Failed instead, and both say Ping all the time.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from vmbus.device.description import DeviceDescription
from vmbus.operations.migration.channel import NotAuthentic
from vmbus.snapshot.manifest import FileRecord, Machine, Packets, Versions
from vmbus.util.explaining import explain
from vmbus.vm.description import MOST_DEVICES, VmDescription
from vmbus.vm.own_disks import DiskState

CHUNK = 256 << 10
"""Bytes of a file in one Chunk."""

MigrationId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
DestinationId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
"""Tells the destination that a source has begun with from any other that knows the same secret."""
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Text = Annotated[str, msgspec.Meta(max_length=65536)]


class _Message(msgspec.Struct, forbid_unknown_fields=True, tag=True, kw_only=True):
    pass


class Ping(_Message):
    """Nothing but a sign of life."""


class Hello(_Message):
    """The first message of a connection."""

    migration: MigrationId
    purpose: Literal["migrate", "ask"]


class Fate(_Message):
    """What became of a migration, as its destination knows it: see `vmbus.operations.migration.ownership`."""

    fate: Literal["running", "gone", "undecided", "unknown"]
    destination: DestinationId | None = None
    """Whose word it is, as in `Wanted`; None if it knows nothing."""
    reason: _Text = ""
    running_for: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Seconds for which the VM has been running there (the time, not the clock: clocks of two hosts differ)."""
    seconds: dict[str, float] = {}
    """As in `Running`."""


class Prepare(_Message):
    vm: VmDescription
    machine: Machine
    versions: Versions
    kernel: FileRecord | None
    initramfs: FileRecord | None
    """None: QEMU boots nothing of the kind."""
    driven: bool
    """QEMU migrates the device itself: see `vmbus.qemu.probe`. Both sides have to do it in the same way."""
    multifd: Annotated[int, msgspec.Meta(ge=0, le=16)]
    disks: Annotated[list[DiskState], msgspec.Meta(max_length=8)] = []
    """Disks of one's own, which both hosts have to reach under the same names."""


class Wanted(_Message):
    """Boot files that the destination lacks: ``kernel``, ``initramfs``."""

    files: Annotated[list[Literal["kernel", "initramfs"]], msgspec.Meta(max_length=2)]
    destination: DestinationId
    """Who says what became of this migration, and nobody else does."""


class Chunk(_Message):
    """The next bytes of the file that is being sent."""

    data: Annotated[bytes, msgspec.Meta(max_length=CHUNK)]


class Prepared(_Message, omit_defaults=True):
    """Where QEMU waits for its stream: a TCP port of the host that this connection goes to, or a unix socket's path."""

    stream: (
        Annotated[int, msgspec.Meta(ge=1, le=65535)] | Annotated[str, msgspec.Meta(min_length=1, max_length=256)] | None
    ) = None
    key: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)] | None = None
    """With TLS, instead: what opens the way to it through the port that this connection goes to; for this pass alone
    (see `vmbus.operations.migration.tunnel`)."""


class Again(_Message):
    """The pass was given up, for this reason."""

    reason: _Text


class FurtherState(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """That of a further device."""

    file: FileRecord
    device: DeviceDescription
    pci_config: Annotated[bytes, msgspec.Meta(min_length=256, max_length=256)]


class State(_Message):
    """The state of the devices at the switchover; the bytes follow."""

    file: FileRecord
    device: DeviceDescription
    """The device with the providers that it has now."""
    pci_config: Annotated[bytes, msgspec.Meta(min_length=256, max_length=256)]
    packets: Packets
    """Of all devices together."""
    run: bool
    """Whether the vCPUs are to run at the destination: they ran at the source."""
    further: Annotated[list[FurtherState], msgspec.Meta(max_length=MOST_DEVICES - 1)] | msgspec.UnsetType = (
        msgspec.UNSET
    )
    """Of a VM with several devices; absent otherwise."""

    @property
    def states(self) -> list[State | FurtherState]:
        """All of them, the first device's first."""
        return [self, *([] if self.further is msgspec.UNSET else self.further)]


class Accepted(_Message):
    """The state fits. Packets found in it."""

    packets: Packets


class Sent(_Message):
    """QEMU has sent everything."""


class Restored(_Message):
    """Everything is back, and the vCPUs stand. Durations in seconds by step."""

    packets: Packets
    channels: _Count
    pci_writes: _Count
    seconds: dict[str, float]


class Go(_Message):
    """The VM is yours."""


class Running(_Message):
    """The vCPUs run. Durations in seconds by step."""

    seconds: dict[str, float]


class Released(_Message):
    """The source has ended its VM."""


class Failed(_Message):
    """This side gives the migration up."""

    reason: _Text


Message = (
    Ping
    | Hello
    | Fate
    | Prepare
    | Wanted
    | Chunk
    | Prepared
    | Again
    | State
    | Accepted
    | Sent
    | Restored
    | Go
    | Running
    | Released
    | Failed
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes, peer: str) -> Message:
    """The message in a frame's bytes. Raises `NotAuthentic` that names the peer: it speaks another dialect."""
    try:
        message: Message = _decoder.decode(data)
    except msgspec.ValidationError as error:
        raise NotAuthentic(f"{peer} sent a message that is not understood: {explain(error)}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotAuthentic(f"{peer} sent something that is no message: {error}") from error
    return message


def short(text: object) -> str:
    """A text for a message's reason, cut to what is allowed there."""
    return str(text)[:16384]
