"""The SynIC in a BAR: registers, the slot handshake with its race, event flags, posting, pages that go away."""

import struct
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbus.bus.synic import MAX_OUTBOX, Synic
from vmbus.memory.guest import GuestMemory
from vmbus.wire.synic import (
    ABI_VERSION,
    BAR_SIZE,
    CONTROL_ENABLE,
    CONTROL_RESET,
    PAGE_VALID,
    POST_HEADER,
    SLOT_FLAG_PENDING,
    SLOT_OFFSET,
    STATUS_ENABLED,
    STATUS_FAULT,
    PostStatus,
    Register,
)

PAGE = 4096
BASE = 0x1_0000_0000
MESSAGES, EVENTS, POSTS = BASE, BASE + PAGE, BASE + 2 * PAGE


class Rig:
    """A SynIC over three pages of guest memory; `read`, `write` and `take` are what a guest's driver does."""

    def __init__(self) -> None:
        self.memory = GuestMemory()
        self.ram = bytearray(3 * PAGE)
        for page in range(3):
            self.memory.map(BASE + page * PAGE, memoryview(self.ram)[page * PAGE : (page + 1) * PAGE], True)
        self.synic = Synic(self.memory, self)
        self.posts: list[tuple[int, bytes]] = []
        self.signals: list[int] = []
        self.interrupts = 0
        self.resets = 0
        self.answer = PostStatus.SUCCESS

    # SynicActions

    def posted(self, connection_id: int, message: bytes) -> PostStatus:
        self.posts.append((connection_id, message))
        return self.answer

    def signalled(self, connection_id: int) -> None:
        self.signals.append(connection_id)

    def reset_requested(self) -> None:
        self.resets += 1
        self.synic.reset()

    def interrupt(self) -> None:
        self.interrupts += 1

    # the guest

    def read(self, register: int) -> int:
        return int.from_bytes(self.synic.read(register, 4), "little")

    def write(self, register: int, value: int) -> None:
        self.synic.write(register, value.to_bytes(4, "little"))

    def write64(self, register: int, value: int) -> None:
        self.write(register, value & 0xFFFFFFFF)
        self.write(register + 4, value >> 32)

    def enable(self, messages: int = MESSAGES | PAGE_VALID, events: int = EVENTS | PAGE_VALID) -> None:
        self.write64(Register.MESSAGE_PAGE_LOW, messages)
        self.write64(Register.EVENT_PAGE_LOW, events)
        self.write(Register.CONTROL, CONTROL_ENABLE)

    @property
    def slot(self) -> tuple[int, int, int]:
        """Type, size and flags in the slot."""
        return struct.unpack_from("<IBB", self.ram, SLOT_OFFSET)

    def take(self) -> bytes | None:
        """Empty the slot as the driver does it."""
        kind, size, _ = self.slot
        if not kind:
            return None
        message = bytes(self.ram[SLOT_OFFSET + 16 : SLOT_OFFSET + 16 + size])
        struct.pack_into("<I", self.ram, SLOT_OFFSET, 0)
        if self.slot[2] & SLOT_FLAG_PENDING:
            self.ram[SLOT_OFFSET + 5] = 0
            self.write(Register.EOM, 1)
        return message

    def post(self, message: bytes, connection_id: int = 4, *, size: int | None = None, kind: int = 1) -> int:
        block = POST_HEADER.pack(connection_id, 0, kind, len(message) if size is None else size) + message
        self.ram[2 * PAGE : 2 * PAGE + len(block)] = block
        self.write64(Register.POST_ADDRESS_LOW, POSTS)
        self.write(Register.POST_MESSAGE, 1)
        return self.read(Register.POST_STATUS)


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def on(rig: Rig) -> Rig:
    rig.enable()
    assert rig.read(Register.STATUS) == STATUS_ENABLED
    return rig


# ---- registers -------------------------------------------------------------------------------------------------------


def test_what_a_guest_can_probe(rig: Rig) -> None:
    assert rig.synic.read(Register.MAGIC, 4) == b"VMBS"
    assert rig.read(Register.ABI_VERSION) == ABI_VERSION
    assert (rig.read(Register.FEATURES), rig.read(Register.EVENT_FLAGS)) == (0, 2048)
    assert (rig.read(Register.CONTROL), rig.read(Register.STATUS), rig.read(Register.POST_STATUS)) == (0, 0, 0)


@given(
    st.lists(
        st.tuples(st.integers(0, BAR_SIZE - 1), st.sampled_from([0, 1, 2, 3, 4, 8, 16]), st.binary(max_size=8)),
        max_size=30,
    )
)
def test_no_access_raises_and_reads_have_the_size_asked_for(accesses: list[tuple[int, int, bytes]]) -> None:
    rig = Rig()
    for offset, size, data in accesses:
        assert len(rig.synic.read(offset, size)) == size
        rig.synic.write(offset, data)


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0x4D, 4)])
def test_accesses_of_other_sizes_are_ignored_and_counted(rig: Rig, offset: int, size: int) -> None:
    assert rig.synic.read(offset, size) == bytes(size)
    rig.synic.write(Register.CONTROL | offset & 3, b"\x01" * size)
    assert rig.synic.bad_accesses == 2 and rig.read(Register.CONTROL) == 0


def test_read_only_and_unknown_registers_keep_their_values(rig: Rig) -> None:
    for offset in (Register.MAGIC, Register.STATUS, Register.POST_STATUS, 0x100, BAR_SIZE - 4):
        before = rig.read(offset)
        rig.write(offset, 0xFFFFFFFF)
        assert rig.read(offset) == before
    assert rig.synic.bad_accesses == 5


def test_enabling_with_bad_pages_is_a_fault_and_can_be_mended(rig: Rig) -> None:
    for messages, events in (
        (MESSAGES, EVENTS | 1),
        (MESSAGES | 1, EVENTS),
        (MESSAGES | 1, 0xDEAD_0000 | 1),
        (BASE + 3 * PAGE | 1, EVENTS | 1),
        ((1 << 64) - 1, EVENTS | 1),
    ):
        rig.enable(messages, events)
        assert (rig.read(Register.CONTROL), rig.read(Register.STATUS)) == (0, STATUS_FAULT)
    assert not any(region.windows for region in rig.memory._regions), "nothing stays open"
    rig.enable()
    assert rig.read(Register.STATUS) == STATUS_ENABLED


def test_pages_in_read_only_memory_are_a_fault(rig: Rig) -> None:
    rig.memory.map(MESSAGES, memoryview(bytearray(PAGE)), False)
    rig.enable()
    assert rig.read(Register.STATUS) == STATUS_FAULT


# ---- posting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "kind"), [(241, 1), (0xFFFFFFFF, 1), (8, 0), (8, 2)])
def test_a_bad_block_is_an_invalid_parameter(on: Rig, size: int, kind: int) -> None:
    assert on.post(b"12345678", size=size, kind=kind) == PostStatus.INVALID_PARAMETER
    assert on.posts == []


@pytest.mark.parametrize("address", [POSTS + 4, POSTS + 1, BASE + 3 * PAGE - 248, 0, (1 << 64) - 8])
def test_a_block_out_of_reach_is_an_invalid_parameter(on: Rig, address: int) -> None:
    on.write64(Register.POST_ADDRESS_LOW, address)
    on.write(Register.POST_MESSAGE, 1)
    assert on.read(Register.POST_STATUS) == PostStatus.INVALID_PARAMETER


def test_a_block_may_cross_regions(on: Rig) -> None:
    start = 2 * PAGE - 128
    on.ram[start : start + 16 + 240] = POST_HEADER.pack(4, 0, 1, 240) + bytes(range(240))
    on.write64(Register.POST_ADDRESS_LOW, BASE + start)
    on.write(Register.POST_MESSAGE, 1)
    assert on.posts == [(4, bytes(range(240)))]


def test_a_guest_that_takes_no_messages_cannot_post_more(on: Rig) -> None:
    for number in range(MAX_OUTBOX + 1):
        on.synic.post(number.to_bytes(8, "little"))
    assert len(on.synic.outbox) == MAX_OUTBOX
    assert on.post(b"12345678") == PostStatus.INSUFFICIENT_BUFFERS
    assert on.posts == []
    on.take()
    assert on.post(b"12345678") == PostStatus.SUCCESS


# ---- messages to the guest -------------------------------------------------------------------------------------------


def race(rig: Rig, monkeypatch: pytest.MonkeyPatch, guest: Callable[[], None]) -> None:
    """Have the guest act between the device's look at the slot and its second look, after the flag was set."""
    monkeypatch.setattr("vmbus.bus.synic.full_fence", lambda: guest() or monkeypatch.undo())


def test_the_guest_empties_the_slot_before_it_can_see_the_flag(on: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    on.synic.post(b"a" * 8)
    # The guest's look at the flag came before the device set it: it will not write EOM.
    race(on, monkeypatch, lambda: struct.pack_into("<I", on.ram, SLOT_OFFSET, 0))
    on.synic.post(b"b" * 8)
    assert on.slot == (1, 8, 0), "the second look finds the slot empty, and the message is not left waiting"
    assert on.take() == b"b" * 8 and on.interrupts == 2


def test_the_guest_empties_the_slot_and_sees_the_flag(on: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    on.synic.post(b"a" * 8)

    def empty_and_clear_the_flag() -> None:
        struct.pack_into("<I", on.ram, SLOT_OFFSET, 0)
        assert on.slot[2] == SLOT_FLAG_PENDING
        on.ram[SLOT_OFFSET + 5] = 0

    race(on, monkeypatch, empty_and_clear_the_flag)
    on.synic.post(b"b" * 8)
    assert on.slot == (1, 8, 0)
    on.write(Register.EOM, 1)  # what the guest wrote after it had seen the flag arrives only now
    assert on.take() == b"b" * 8 and on.take() is None
    assert not on.synic.outbox


def test_without_the_second_look_a_message_would_wait_for_ever(on: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The race above can fail: a device that looks only once leaves the message in its outbox."""
    on.synic.post(b"a" * 8)
    page = on.synic._message_page
    assert page is not None
    real = page.load32
    seen: list[int] = []

    class Once:
        def __getattr__(self, name: str) -> object:
            return getattr(page, name)

        def load32(self, offset: int) -> int:
            seen.append(seen[0] if seen else real(offset))
            return seen[0]

    race(on, monkeypatch, lambda: struct.pack_into("<I", on.ram, SLOT_OFFSET, 0))
    monkeypatch.setattr(on.synic, "_message_page", Once())
    on.synic.post(b"b" * 8)
    assert on.slot[0] == 0 and list(on.synic.outbox) == [b"b" * 8]


# ---- events ----------------------------------------------------------------------------------------------------------


def test_events_of_a_disabled_synic_go_nowhere(rig: Rig) -> None:
    rig.synic.raise_event(1)
    assert not any(rig.ram) and rig.interrupts == 0


# ---- pages that go away ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("iova", "size"), [(MESSAGES, PAGE), (EVENTS, PAGE), (BASE, 3 * PAGE)])
def test_unmapping_a_page_resets_the_device_and_says_so(on: Rig, iova: int, size: int) -> None:
    on.synic.post(b"a" * 8)
    on.synic.post(b"b" * 8)
    on.memory.unmap(iova, size)
    assert on.resets == 1
    assert on.read(Register.STATUS) == STATUS_FAULT and on.read(Register.CONTROL) == 0
    on.synic.raise_event(3)
    on.synic.post(b"c" * 8)
    on.write(Register.EOM, 1)
    on.write(Register.CONTROL, CONTROL_RESET)
    assert on.read(Register.STATUS) == 0, "a reset by the guest clears the fault"


# ---- restore ---------------------------------------------------------------------------------------------------------


def test_restore_puts_everything_back(on: Rig) -> None:
    for text in (b"a", b"b", b"c"):
        on.synic.post(text * 8)
    on.write64(Register.POST_ADDRESS_LOW, POSTS)
    saved = msgspec.structs.replace(on.synic.save(), post_status=19)
    again = Rig()
    again.ram[:] = on.ram
    again.synic.restore(saved)
    assert again.read(Register.STATUS) == STATUS_ENABLED and again.read(Register.POST_STATUS) == 19
    assert again.interrupts == 0
    again.synic.kick()
    assert again.interrupts == 1
    assert [again.take() for _ in range(4)] == [b"a" * 8, b"b" * 8, b"c" * 8, None]


def test_everything_written_is_in_the_dirty_log(on: Rig) -> None:
    on.memory.start_log()
    on.synic.raise_event(5)
    assert on.memory.dirty_runs() == [(EVENTS, PAGE)]
    on.synic.post(b"a" * 8)
    assert on.memory.dirty_runs() == [(BASE, 2 * PAGE)]
