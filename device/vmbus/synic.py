"""The SynIC in a BAR: what a hypervisor's synthetic interrupt controller and two hypercalls do, as registers of BAR0.

The guest gives a message page and an event-flags page. A message to the guest goes into slot 2 of the message page
when that is empty; if more wait, the slot says so and the guest writes EOM after it has emptied it. An event is one
byte in the event-flags page, by relid: the device stores 1, the guest stores 0 and then looks at its rings. A byte
each, so that neither side needs an atomic bit operation. Both raise the same interrupt.

All registers are 32 bits wide and accessed as such; anything else reads as zero and is ignored on write, counted in
`bad_accesses`. The register map is ABI: docs/device-abi.md.
"""

from collections import deque
from enum import IntEnum
from struct import Struct
from typing import Protocol

from vmbus.complaints import bounded_log
from vmbus.errors import PeerError
from vmbus.fence import full_fence
from vmbus.memory import GuestMemory, MemoryFault, Window
from vmbus.wire.gpa import PAGE_SIZE
from vmbus.wire.messages import MAX_MESSAGE_SIZE

log = bounded_log(__name__)

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
MAX_OUTBOX = 4096


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


# Which pages are in use is settled by enabling: until the SynIC is disabled, writes to these are ignored.
_PAGE_REGISTERS = frozenset(
    (Register.MESSAGE_PAGE_LOW, Register.MESSAGE_PAGE_HIGH, Register.EVENT_PAGE_LOW, Register.EVENT_PAGE_HIGH)
)
_POST_REGISTERS = frozenset((Register.POST_ADDRESS_LOW, Register.POST_ADDRESS_HIGH))
WRITABLE_REGISTERS = _PAGE_REGISTERS | _POST_REGISTERS

CONTROL_ENABLE = 1
CONTROL_RESET = 2
STATUS_ENABLED = 1
STATUS_FAULT = 2
PAGE_VALID = 1


class PostStatus(IntEnum):
    """What the last post came to."""

    SUCCESS = 0
    INVALID_PARAMETER = 5
    INVALID_CONNECTION_ID = 18
    INSUFFICIENT_BUFFERS = 19


def page_extents(values: dict[int, int]) -> list[tuple[int, int]]:
    """(I/O address, size) of the message page and the event page. Raises MemoryFault for one without its valid bit."""
    extents = []
    for low in (Register.MESSAGE_PAGE_LOW, Register.EVENT_PAGE_LOW):
        value = values.get(low, 0) | values.get(low + 4, 0) << 32
        if not value & PAGE_VALID:
            raise MemoryFault(f"{low.name} does not have its valid bit set")
        extents.append((value & ~(PAGE_SIZE - 1), PAGE_SIZE))
    return extents


class SynicActions(Protocol):
    """What the registers ask of their surroundings."""

    def posted(self, connection_id: int, message: bytes) -> PostStatus:
        """The guest posted a channel message."""

    def signalled(self, connection_id: int) -> None:
        """The guest signalled a channel."""

    def reset_requested(self) -> None:
        """The guest asked for a reset, or took away the pages that the SynIC needs. Must call `Synic.reset`."""

    def interrupt(self) -> None:
        """Raise the function's interrupt."""


class Synic:
    """The register block. `values` holds the plain read/write registers by offset."""

    def __init__(self, memory: GuestMemory, actions: SynicActions) -> None:
        self._memory = memory
        self._actions = actions
        self.values: dict[int, int] = {}
        self.enabled = False
        self.fault = False
        self.post_status = PostStatus.SUCCESS
        self.outbox: deque[bytes] = deque()
        self.bad_accesses = 0
        self._message_page: Window | None = None
        self._event_page: Window | None = None

    def reset(self) -> None:
        """Power-on state, except that a fault stays visible until the SynIC is enabled again."""
        self.values.clear()
        self.enabled = False
        self.post_status = PostStatus.SUCCESS
        self.outbox.clear()
        self._close_pages()

    def _close_pages(self) -> None:
        for page in (self._message_page, self._event_page):
            if page is not None:
                page.close()
        self._message_page = self._event_page = None

    # ---- registers -----------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> bytes:
        """A read of BAR0; always `size` bytes."""
        if size != 4 or offset % 4:
            self.bad_accesses += 1
            return bytes(size)
        if offset == Register.MAGIC:
            value = MAGIC
        elif offset == Register.ABI_VERSION:
            value = ABI_VERSION
        elif offset == Register.EVENT_FLAGS:
            value = EVENT_FLAG_COUNT
        elif offset == Register.CONTROL:
            value = CONTROL_ENABLE if self.enabled else 0
        elif offset == Register.STATUS:
            value = (STATUS_ENABLED if self.enabled else 0) | (STATUS_FAULT if self.fault else 0)
        elif offset == Register.POST_STATUS:
            value = self.post_status
        else:
            value = self.values.get(offset, 0)
        return value.to_bytes(4, "little")

    def write(self, offset: int, data: bytes) -> None:
        """A write to BAR0. Nothing that a guest writes raises."""
        if len(data) != 4 or offset % 4:
            self.bad_accesses += 1
            return
        value = int.from_bytes(data, "little")
        if offset == Register.SIGNAL_EVENT:
            if self.enabled:
                self._actions.signalled(value)
        elif offset == Register.EOM:
            self.deliver()
        elif offset == Register.POST_MESSAGE:
            self.post_status = self._post_from_guest()
        elif offset == Register.CONTROL:
            self._control(value)
        elif offset in _POST_REGISTERS or (offset in _PAGE_REGISTERS and not self.enabled):
            self.values[offset] = value
        else:
            self.bad_accesses += 1

    def _control(self, value: int) -> None:
        if value & CONTROL_RESET:
            self.fault = False
            self._actions.reset_requested()
        if value & CONTROL_ENABLE and not self.enabled:
            self.fault = False
            try:
                self._open_pages()
            except MemoryFault as error:
                log.warning("SynIC not enabled: %s", error)
                self.fault = True
                self._close_pages()
                return
            self.enabled = True
            self.deliver()
        elif not value & CONTROL_ENABLE and self.enabled:
            self.enabled = False
            self._close_pages()

    def _open_pages(self) -> None:
        message, event = page_extents(self.values)
        self._message_page = self._memory.window([message])
        self._event_page = self._memory.window([event])
        self._message_page.on_revoke = self._event_page.on_revoke = self._pages_gone

    def _pages_gone(self) -> None:
        if self.enabled:
            log.warning("the guest unmapped the SynIC's pages: the function is reset")
            self._actions.reset_requested()
            self.fault = True

    def _post_from_guest(self) -> PostStatus:
        address = self.values.get(Register.POST_ADDRESS_LOW, 0) | self.values.get(Register.POST_ADDRESS_HIGH, 0) << 32
        if not self.enabled or address % 8:
            return PostStatus.INVALID_PARAMETER
        if len(self.outbox) >= MAX_OUTBOX:
            return PostStatus.INSUFFICIENT_BUFFERS
        try:
            block = self._memory.read(address, POST_SIZE)
        except MemoryFault as error:
            log.warning("a post-message block out of reach: %s", error)
            return PostStatus.INVALID_PARAMETER
        connection_id, _, message_type, size = POST_HEADER.unpack_from(block)
        if message_type != MESSAGE_TYPE or size > MAX_MESSAGE_SIZE:
            return PostStatus.INVALID_PARAMETER
        return self._actions.posted(connection_id, block[POST_HEADER.size : POST_HEADER.size + size])

    # ---- to the guest ----------------------------------------------------------------------------------------------

    def post(self, message: bytes) -> None:
        """Send a channel message to the guest, after those before it."""
        self.outbox.append(message)
        self.deliver()

    def deliver(self) -> None:
        """Put the next message into the slot if that is empty; else see to it that the guest asks again."""
        page = self._message_page
        if not self.outbox or page is None or not self.enabled:
            return
        try:
            if page.load32(SLOT_OFFSET):
                page.write(SLOT_OFFSET + 5, bytes([SLOT_FLAG_PENDING]))
                # The guest may have emptied the slot before it could see the flag.
                full_fence()
                if page.load32(SLOT_OFFSET):
                    return
            message = self.outbox.popleft()
            flags = SLOT_FLAG_PENDING if self.outbox else 0
            filled = SLOT_HEADER.pack(MESSAGE_TYPE, len(message), flags, 0, 0) + message
            page.write(SLOT_OFFSET + 4, filled[4:])
            page.store32(SLOT_OFFSET, MESSAGE_TYPE)
            full_fence()
        except PeerError:
            return
        self._actions.interrupt()

    def raise_event(self, relid: int) -> None:
        """Set the event flag of a channel and interrupt the guest."""
        page = self._event_page
        if page is None:
            return
        page.write(relid, b"\x01")
        self._actions.interrupt()

    def kick(self) -> None:
        """Interrupt the guest, which may have missed something: after a restore.

        Also while the SynIC is disabled: what was raised before that was still on its way.
        """
        self.deliver()
        self._actions.interrupt()

    # ---- restore -----------------------------------------------------------------------------------------------------

    def restore(
        self, values: dict[int, int], *, enabled: bool, fault: bool, post_status: int, outbox: list[bytes]
    ) -> None:
        """Put the saved registers back; the pages must be mapped again. Raises MemoryFault."""
        self.reset()
        self.values.update(values)
        self.fault = fault
        self.post_status = PostStatus(post_status)
        self.outbox.extend(outbox)
        if enabled:
            self._open_pages()
            self.enabled = True
