"""The handshake between a guest's driver and the controller: which step may come when. No I/O."""

from enum import Enum

from vmbus.wire.storvsp import (
    VERSIONS,
    Operation,
    Status,
    pack_packet,
    pack_properties,
    parse_u16,
)


class Phase(Enum):
    """How far the guest has come on the open primary channel."""

    START = "start"
    BEGUN = "begun"
    AGREED = "agreed"
    DESCRIBED = "described"
    READY = "ready"


_STEPS = {
    (Phase.START, Operation.BEGIN_INITIALIZATION): Phase.BEGUN,
    (Phase.BEGUN, Operation.QUERY_PROTOCOL_VERSION): Phase.AGREED,
    (Phase.AGREED, Operation.QUERY_PROPERTIES): Phase.DESCRIBED,
    (Phase.DESCRIBED, Operation.CREATE_SUB_CHANNELS): Phase.DESCRIBED,
    (Phase.DESCRIBED, Operation.END_INITIALIZATION): Phase.READY,
    (Phase.READY, Operation.CREATE_SUB_CHANNELS): Phase.READY,
}
STEPS = frozenset(operation for _, operation in _STEPS)
"""Operations that are part of it."""


class Handshake:
    """Of one controller.

    Attributes:
        phase: see `Phase`. version: what was agreed on, 0 before. sub_channels: what the guest has asked for and got.
    """

    def __init__(self, sub_channels: int, maximum_transfer: int) -> None:
        """`sub_channels`: most that a guest gets; `maximum_transfer`: bytes of one request."""
        self._most = sub_channels
        self._maximum_transfer = maximum_transfer
        self.phase = Phase.START
        self.version = 0
        self.sub_channels = 0

    def reset(self) -> None:
        """The primary channel was opened, or closed."""
        self.phase = Phase.START
        self.version = self.sub_channels = 0

    def step(self, operation: int, payload: bytes) -> bytes:
        """The answer to one of `STEPS`, out of a packet of 64 bytes. What does not fit changes nothing."""
        then = _STEPS.get((self.phase, Operation(operation)))
        if then is None:
            return pack_packet(Operation.COMPLETE_IO, Status.INVALID_DEVICE_STATE)
        if operation == Operation.QUERY_PROTOCOL_VERSION:
            version = parse_u16(payload)
            if version not in VERSIONS:
                return pack_packet(Operation.COMPLETE_IO, Status.REVISION_MISMATCH)
            self.version = version
        elif operation == Operation.CREATE_SUB_CHANNELS:
            count = parse_u16(payload)
            if self.sub_channels or not 0 < count <= self._most:
                return pack_packet(Operation.COMPLETE_IO, Status.INVALID_PARAMETER)
            self.sub_channels = count
        self.phase = then
        if operation == Operation.QUERY_PROPERTIES:
            return pack_properties(self._most, self._maximum_transfer)
        return pack_packet(Operation.COMPLETE_IO)
