"""The short way of READ and WRITE against the long one: the same answers, bytes and counters for every request."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import storvsc
from support.kit_storage import MIB, Guest
from support.storvsc import pattern, result_of
from vmbus.native.choice import core
from vmbus.providers.disk import prompt
from vmbus.providers.disk.disk import Disk
from vmbus.providers.scsi import ScsiProvider, adapter, at_once
from vmbus.testkit import ProviderTest
from vmbus.wire.scsi import Opcode
from vmbus.wire.storvsp import Direction

pytestmark = [pytest.mark.unit]

LUNS: list[dict[str, Any]] = [
    {"lun": 0, "image": "disk.img", "size_mib": 1, "create": True},
    {"lun": 3, "image": "other.img", "size_mib": 2, "create": True, "block_size": 4096},
    {"lun": 4, "image": "kept.img", "size_mib": 1, "read_only": True},
]


class Asked(NamedTuple):
    """One request. `length`: bytes of memory, None: what the command says; `pieces`: ranges that describe it."""

    opcode: int
    flags: int
    first: int
    count: int
    cdb_length: int
    lun: int
    where: tuple[int, int]
    length: int | None
    at: int
    pieces: int

    @property
    def cdb(self) -> bytes:
        if self.opcode in (Opcode.READ_10, Opcode.WRITE_10):
            cdb = bytes([self.opcode, self.flags]) + self.first.to_bytes(4, "big") + b"\0"
            return (cdb + self.count.to_bytes(2, "big") + b"\0").ljust(16, b"\0")[: self.cdb_length]
        return storvsc.long_form(self.opcode, self.first, self.count, self.flags)[: self.cdb_length]

    @property
    def bytes(self) -> int:
        return self.count * (4096 if self.lun == 3 else 512) if self.length is None else self.length

    @property
    def writes(self) -> bool:
        return self.opcode in (Opcode.WRITE_10, Opcode.WRITE_16)


FORMS = [Opcode.READ_10, Opcode.WRITE_10, Opcode.READ_16, Opcode.WRITE_16]
PLAIN = st.builds(
    Asked,
    st.sampled_from(FORMS),
    st.just(0),
    st.integers(0, 200).map(lambda first: 8 * first),
    st.integers(1, 8).map(lambda count: 8 * count),
    st.just(16),
    st.just(0),
    st.just((0, 0)),
    st.none(),
    st.integers(0, 300),
    st.just(1),
)
ANY = st.builds(
    Asked,
    st.sampled_from(FORMS),
    st.sampled_from([0, 0x08, 0x10, 0x18]),
    st.integers(0, 2100) | st.integers(0, 0xFFFF_FFFF),
    st.integers(0, 70) | st.integers(0, 0xFFFF),
    st.sampled_from([10, 16, 6, 12]),
    st.sampled_from([0, 0, 3, 4, 1]),
    st.sampled_from([(0, 0), (0, 0), (0, 1), (1, 0)]),
    st.none() | st.integers(0, 64).map(lambda length: 512 * length),
    st.integers(0, 300),
    st.integers(1, 2),
)


@pytest.fixture(autouse=True)
def _no_slow_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "SLOW_SECONDS", 1000.0)
    monkeypatch.setattr(prompt, "host_has_room", lambda: True)


def story(directory: Path, asked: list[Asked]) -> tuple[list[Any], dict[str, Any]]:
    """What became of these requests on fresh disks, and how things are at the end."""
    directory.mkdir()
    (directory / "kept.img").write_bytes(pattern(MIB, 7))
    seen: list[Any] = []
    with mock.patch.dict("os.environ", {"VMBUS_DISKS": str(directory)}):
        with ProviderTest(ScsiProvider, options={"luns": LUNS}) as kit:
            guest = Guest(kit)
            for number, one in enumerate(asked):
                length = min(one.bytes, MIB)
                guest.memory.put(pattern(2 * MIB if number == 0 else 4096 * 8, number))
                extents = [(address + one.at, size) for address, size in guest.memory.extents(length)] if length else []
                if one.pieces == 2 and length > 512:
                    address, _ = extents[0]
                    extents = [(address, 512), (address + 512, length - 512)]
                payload = storvsc.request(
                    one.cdb,
                    length,
                    lun=one.lun,
                    path=one.where[0],
                    target=one.where[1],
                    direction=Direction.TO_DEVICE if one.writes else Direction.FROM_DEVICE,
                )
                pending = guest.ports[0].send(payload, external=extents or None)
                pending.wait()
                result_of(pending.reply)
                seen.append((pending.reply, guest.memory.get(2 * MIB)))
            state = guest.provider.status()
        files = {path.name: path.read_bytes() for path in directory.iterdir()}
    return seen, {"status": state, "files": files}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(asked=st.lists(ANY | PLAIN, min_size=1, max_size=12))
def test_the_short_way_comes_to_the_same_as_the_long_one(tmp_path: Path, asked: list[Asked]) -> None:
    numbers = itertools.count()
    directory = tmp_path / str(next(n for n in numbers if not (tmp_path / f"{n}").exists()))
    directory.mkdir()
    short = story(directory / "short", asked)
    with mock.patch.object(adapter, "move_at_once", lambda *_: False):
        long = story(directory / "long", asked)
    for number, (ours, theirs) in enumerate(zip(short[0], long[0], strict=True)):
        assert ours == theirs, asked[number]
    assert short[1] == long[1]


PLAINEST = [Asked(form, 0, 8 * n, 8, 16, 0, (0, 0), None, 0, 1) for n, form in enumerate(FORMS)]


@pytest.mark.skipif(core is None, reason="the short way is the native core's")
def test_the_plain_ones_go_the_short_way(tmp_path: Path) -> None:
    with mock.patch.object(adapter.Adapter, "_execute", side_effect=AssertionError("the long way")):
        story(tmp_path / "all", PLAINEST)


@pytest.mark.skipif(core is None, reason="the short way is the native core's")
def test_sabotage_a_short_way_that_forgets_something_is_noticed(tmp_path: Path) -> None:
    """Where the test that compares would not see what one of the conditions is for, it could be left out."""
    with mock.patch.object(adapter, "move_at_once", lambda *_: False):
        right = story(tmp_path / "right", PLAINEST)

    def wrong(self: Disk, memory: Any, offset: int, length: int, *, write: bool) -> bool:
        return whole(self, memory, offset + 4096, length, write=write)

    whole = Disk.move
    with mock.patch.object(Disk, "move", wrong):
        assert story(tmp_path / "offset", PLAINEST)[1] != right[1]
    with (
        mock.patch.object(at_once, "pack_good", lambda payload, length: bytes(payload)),
        pytest.raises(AssertionError),
    ):
        story(tmp_path / "answer", PLAINEST)
