"""The registers in BAR0, and the layout of the message page: what both ends agree on. See docs/device-abi.md."""

from enum import IntEnum
from struct import Struct

from vmbus.wire.messages import MAX_MESSAGE_SIZE

MAGIC = int.from_bytes(b"VMBS", "little")
ABI_VERSION = 0x0001_0000
EVENT_FLAG_COUNT = 2048
BAR_SIZE = 4096

SLOT_SIZE = 256
SINT = 2
SLOT_OFFSET = SINT * SLOT_SIZE
MESSAGE_TYPE = 1
SLOT_FLAG_PENDING = 1
# The slot: u32 type, u8 payload size, u8 flags, u16 0, u64 sender, 240 bytes of payload.
SLOT_HEADER = Struct("<IBBHQ")
# The post-message block: u32 connection id, u32 0, u32 message type, u32 payload size, 240 bytes of payload.
POST_HEADER = Struct("<IIII")
POST_SIZE = POST_HEADER.size + MAX_MESSAGE_SIZE


class Register(IntEnum):
    """Offsets in BAR0."""

    MAGIC = 0x000
    ABI_VERSION = 0x004
    FEATURES = 0x008
    EVENT_FLAGS = 0x00C
    CONTROL = 0x010
    STATUS = 0x014
    MESSAGE_PAGE_LOW = 0x020
    MESSAGE_PAGE_HIGH = 0x024
    EVENT_PAGE_LOW = 0x028
    EVENT_PAGE_HIGH = 0x02C
    EOM = 0x030
    SIGNAL_EVENT = 0x034
    POST_ADDRESS_LOW = 0x040
    POST_ADDRESS_HIGH = 0x044
    POST_MESSAGE = 0x048
    POST_STATUS = 0x04C


CONTROL_ENABLE = 1
CONTROL_RESET = 2
STATUS_ENABLED = 1
STATUS_FAULT = 2
PAGE_VALID = 1


class PostStatus(IntEnum):
    SUCCESS = 0
    INVALID_PARAMETER = 5
    INVALID_CONNECTION_ID = 18
    INSUFFICIENT_BUFFERS = 19
