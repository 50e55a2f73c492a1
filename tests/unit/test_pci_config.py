"""The model of configuration space, and the writes that put it back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbus.device import pci
from vmbus.device.pci import ConfigSpace, bar0_address, replay_writes
from vmbus.errors import StateError, UsageError


@st.composite
def accesses(draw: st.DrawFn) -> tuple[int, bytes]:
    offset = draw(st.integers(0, pci.SIZE - 1))
    data = draw(st.binary(min_size=0, max_size=min(80, pci.SIZE - offset)))
    return offset, data


def u16(space: ConfigSpace, offset: int) -> int:
    return int.from_bytes(space.read(offset, 2), "little")


def u32(space: ConfigSpace, offset: int) -> int:
    return int.from_bytes(space.read(offset, 4), "little")


def test_identity_and_capability() -> None:
    space = ConfigSpace()
    assert space.read(0, 4) == bytes.fromhex("4256564d")
    assert space.read(0x08, 4) == bytes.fromhex("010000ff")  # revision, programming interface, subclass, class
    assert u16(space, pci.STATUS) == 0x0010
    assert space.read(0x0E, 1) == b"\0"  # an ordinary function of one
    assert space.read(pci.CAPABILITIES, 1) == b"\x40"
    assert space.read(0x40, 4) == bytes.fromhex("05008000")  # MSI, last in the list, 64-bit, one vector
    assert space.read(pci.INTERRUPT_PIN, 1) == b"\0"
    assert (space.memory_enabled, space.bus_master, space.msi_enabled, space.bar0_address) == (
        False,
        False,
        False,
        None,
    )


def test_sizing_bar0() -> None:
    space = ConfigSpace()
    space.write(pci.BAR0, b"\xff\xff\xff\xff")
    assert u32(space, pci.BAR0) == 0xFFFFF000
    for bar in range(0x14, 0x28, 4):
        space.write(bar, b"\xff\xff\xff\xff")
        assert u32(space, bar) == 0
    space.write(0x30, b"\xff\xff\xff\xff")  # no ROM
    assert u32(space, 0x30) == 0


def test_bar0_answers_only_with_memory_enabled() -> None:
    space = ConfigSpace()
    space.write(pci.BAR0, (0xFE001000).to_bytes(4, "little"))
    assert space.bar0_address is None
    space.write(pci.COMMAND, b"\x02")
    assert space.memory_enabled and not space.bus_master
    assert space.bar0_address == 0xFE001000
    assert bar0_address(space.snapshot()) == 0xFE001000


def test_command_and_msi_bits() -> None:
    space = ConfigSpace()
    space.write(pci.COMMAND, b"\xff\xff")
    assert u16(space, pci.COMMAND) == 0x0546
    assert space.memory_enabled and space.bus_master
    space.write(pci.MSI, b"\xff" * 14)
    assert space.msi_enabled
    assert space.read(pci.MSI, 14).hex() == "0500" + "8100" + "fcffffff" + "ffffffff" + "ffff"
    assert space.read(pci.MSI + 14, 2) == b"\0\0"


def test_error_bits_are_cleared_by_ones_only() -> None:
    space = ConfigSpace()
    space.report_errors(0xF900)
    space.write(pci.STATUS, b"\x00\x00")
    assert u16(space, pci.STATUS) == 0xF910
    space.write(pci.STATUS, b"\xff\x80")
    assert u16(space, pci.STATUS) == 0x7910
    # A 32-bit write of the command register writes the status, too.
    space.write(pci.COMMAND, b"\x06\x00\x00\x79")
    assert u16(space, pci.STATUS) == 0x0010
    with pytest.raises(UsageError):
        space.report_errors(0x0001)


def test_ranges() -> None:
    space = ConfigSpace()
    assert space.read(256, 0) == b""
    for offset, size in ((-1, 1), (255, 2), (0, 257), (300, 0)):
        with pytest.raises(UsageError):
            space.read(offset, size)
    with pytest.raises(UsageError):
        space.write(255, b"xx")


@given(accesses())
def test_read_only_bytes_stay(access: tuple[int, bytes]) -> None:
    space = ConfigSpace()
    before = space.snapshot()
    space.write(*access)
    changeable = {*range(0x04, 0x08), *range(0x10, 0x14), 0x3C, *range(0x42, 0x4E)}
    for index, (old, new) in enumerate(zip(before, space.snapshot(), strict=True)):
        assert old == new or index in changeable


@given(st.lists(accesses(), max_size=20), st.integers(0, pci.SIZE), st.integers(0, pci.SIZE))
def test_any_split_of_an_access_gives_the_same(writes: list[tuple[int, bytes]], offset: int, size: int) -> None:
    whole, split = ConfigSpace(), ConfigSpace()
    for start, data in writes:
        whole.write(start, data)
        for index, byte in enumerate(data, start):
            split.write(index, bytes((byte,)))
    assert whole.snapshot() == split.snapshot()
    size = min(size, pci.SIZE - offset)
    assert whole.read(offset, size) == b"".join(split.read(index, 1) for index in range(offset, offset + size))


@given(st.lists(accesses(), max_size=20))
def test_replay_puts_a_reset_function_back(writes: list[tuple[int, bytes]]) -> None:
    source, target = ConfigSpace(), ConfigSpace()
    for offset, data in writes:
        source.write(offset, data)
    for offset, size, value in replay_writes(source.snapshot()):
        assert size in (1, 2, 4) and offset % size == 0
        target.write(offset, value.to_bytes(size, "little"))
    assert target.snapshot() == source.snapshot()


@given(st.lists(accesses(), max_size=20))
def test_replay_enables_last(writes: list[tuple[int, bytes]]) -> None:
    source, target = ConfigSpace(), ConfigSpace()
    for offset, data in writes:
        source.write(offset, data)
    replay = replay_writes(source.snapshot())
    assert replay[-1][0] == pci.COMMAND
    for offset, size, value in replay[:-1]:
        assert not target.memory_enabled and not target.bus_master
        if offset == pci.MSI_CONTROL:
            assert target.read(pci.MSI_ADDRESS_LOW, 10) == source.read(pci.MSI_ADDRESS_LOW, 10)
        target.write(offset, value.to_bytes(size, "little"))


@given(st.lists(accesses(), max_size=20))
def test_load_takes_what_snapshot_gives(writes: list[tuple[int, bytes]]) -> None:
    source, target = ConfigSpace(), ConfigSpace()
    for offset, data in writes:
        source.write(offset, data)
    source.report_errors(0x8000)
    target.load(source.snapshot())
    assert target.snapshot() == source.snapshot()
    target.reset()
    assert target.snapshot() == ConfigSpace().snapshot()


@given(st.integers(0, pci.SIZE * 8 - 1))
def test_a_foreign_configuration_is_refused_and_changes_nothing(bit: int) -> None:
    config = bytearray(ConfigSpace().snapshot())
    config[bit // 8] ^= 1 << bit % 8
    space = ConfigSpace()
    probe = ConfigSpace()
    probe.write(0, b"\xff" * pci.SIZE)
    probe.report_errors(0xF900)
    legal = probe.snapshot()[bit // 8] & ~ConfigSpace().snapshot()[bit // 8] & 1 << bit % 8
    if legal:
        space.load(bytes(config))
        return
    with pytest.raises(StateError, match="not this function's"):
        space.load(bytes(config))
    with pytest.raises(StateError):
        replay_writes(bytes(config))
    assert space.snapshot() == ConfigSpace().snapshot()


def test_a_short_configuration_is_refused() -> None:
    with pytest.raises(StateError, match="255 bytes"):
        replay_writes(bytes(255))
