"""The SynIC in a BAR: what a hypervisor's synthetic interrupt controller and two hypercalls do, as registers of BAR0.

The guest gives a message page and an event-flags page. A message to the guest goes into slot 2 of the message page
when that is empty; if more wait, the slot says so and the guest writes EOM after it has emptied it. An event is one
byte in the event-flags page, by relid: the device stores 1, the guest stores 0 and then looks at its rings. A byte
each, so that neither side needs an atomic bit operation. Both raise the same interrupt.

All registers are 32 bits wide and accessed as such; anything else reads as zero and is ignored on write, counted in
`bad_accesses`. The register map is ABI: docs/device-abi.md.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Protocol

import msgspec

from vmbus.errors import PeerError, StateError
from vmbus.memory.guest import GuestMemory, MemoryFault, Window
from vmbus.ring.fence import full_fence
from vmbus.util.complaints import bounded_log
from vmbus.util.records import U16, U32, StructVersion
from vmbus.wire.gpa import PAGE_SIZE
from vmbus.wire.messages import MAX_MESSAGE_SIZE
from vmbus.wire.synic import (
    ABI_VERSION,
    CONTROL_ENABLE,
    CONTROL_RESET,
    EVENT_FLAG_COUNT,
    MAGIC,
    MESSAGE_TYPE,
    PAGE_VALID,
    POST_HEADER,
    POST_SIZE,
    SLOT_FLAG_PENDING,
    SLOT_HEADER,
    SLOT_OFFSET,
    STATUS_ENABLED,
    STATUS_FAULT,
    PostStatus,
    Register,
)

log = bounded_log(__name__)

MAX_OUTBOX = 4096
# The guest's posts are refused when MAX_OUTBOX messages wait, but one post can have many consequences: an offer for
# each relid, an answer for each GPADL.
MAX_SAVED_OUTBOX = 4 * MAX_OUTBOX

# Which pages are in use is settled by enabling: until the SynIC is disabled, writes to these are ignored.
_PAGE_REGISTERS = frozenset(
    (Register.MESSAGE_PAGE_LOW, Register.MESSAGE_PAGE_HIGH, Register.EVENT_PAGE_LOW, Register.EVENT_PAGE_HIGH)
)
_POST_REGISTERS = frozenset((Register.POST_ADDRESS_LOW, Register.POST_ADDRESS_HIGH))
WRITABLE_REGISTERS = _PAGE_REGISTERS | _POST_REGISTERS


class SynicState(msgspec.Struct, frozen=True):
    """What is saved: registers, and messages that the guest has not taken."""

    enabled: bool
    fault: bool
    registers: Annotated[dict[U16, U32], msgspec.Meta(max_length=16)]
    post_status: U32
    outbox: Annotated[
        list[Annotated[bytes, msgspec.Meta(min_length=8, max_length=MAX_MESSAGE_SIZE)]],
        msgspec.Meta(max_length=MAX_SAVED_OUTBOX),
    ]
    structure_version: StructVersion = 1


NOTHING = SynicState(enabled=False, fault=False, registers={}, post_status=0, outbox=[])
"""After a reset."""


def check(state: SynicState) -> None:
    """Raises StateError for a state that no SynIC can be in."""
    if state.post_status not in set(PostStatus):
        raise StateError(f"the post status {state.post_status} does not exist")
    unknown = set(state.registers) - WRITABLE_REGISTERS
    if unknown:
        raise StateError(f"the state has values for registers {sorted(unknown)}, which cannot be written")


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
        self._unsent = False

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
        if not self.outbox or page is None or not self.enabled or self._unsent:
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

    # ---- save and restore --------------------------------------------------------------------------------------------

    @contextmanager
    def unsent(self) -> Iterator[None]:
        """For a save: messages of the block stay in the outbox, since guest memory may have been saved already. Who
        lets the guest go on delivers them."""
        before, self._unsent = self._unsent, True
        try:
            yield
        finally:
            self._unsent = before

    def save(self) -> SynicState:
        """Everything but the pages, which are guest memory."""
        return SynicState(
            enabled=self.enabled,
            fault=self.fault,
            registers=dict(self.values),
            post_status=int(self.post_status),
            outbox=list(self.outbox),
        )

    def restore(self, state: SynicState) -> None:
        """Put what `check` has passed back; the pages must be mapped again. Raises MemoryFault."""
        self.reset()
        self.values.update(state.registers)
        self.fault = state.fault
        self.post_status = PostStatus(state.post_status)
        self.outbox.extend(state.outbox)
        if state.enabled:
            self._open_pages()
            self.enabled = True
