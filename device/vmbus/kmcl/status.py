"""NTSTATUS values that KMCL returns, and the exceptions that carry them."""

from enum import IntEnum

from vmbus.errors import UsageError, VmbusError


class Status(IntEnum):
    """The NTSTATUS codes of the KMCL contract."""

    SUCCESS = 0x00000000
    PENDING = 0x00000103
    BUFFER_OVERFLOW = 0x80000005
    UNSUCCESSFUL = 0xC0000001
    INVALID_PARAMETER = 0xC000000D
    INVALID_DEVICE_REQUEST = 0xC0000010
    MORE_PROCESSING_REQUIRED = 0xC0000016
    BUFFER_TOO_SMALL = 0xC0000023
    DATA_ERROR = 0xC000003E
    REVISION_MISMATCH = 0xC0000059
    INSUFFICIENT_RESOURCES = 0xC000009A
    INVALID_PARAMETER_1 = 0xC00000EF
    INVALID_PARAMETER_2 = 0xC00000F0
    INVALID_PARAMETER_3 = 0xC00000F1
    CANCELLED = 0xC0000120
    INVALID_DEVICE_STATE = 0xC0000184
    DEVICE_REMOVED = 0xC00002B6


class KmclError(VmbusError):
    """A KMCL call failed; `status` is the NTSTATUS that the DDI would have returned."""

    def __init__(self, message: str, status: Status) -> None:
        super().__init__(f"{message} [{status.name} {status.value:#010x}]")
        self.status = status


class ChannelStateError(KmclError, UsageError):
    """A call that the channel's (or packet's) present state does not allow."""

    def __init__(self, message: str, status: Status = Status.INVALID_DEVICE_STATE) -> None:
        KmclError.__init__(self, message, status)
