"""The verifying writer's books: which write belongs where, and what a slot may hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbus_guest.testdrivers import disk_writer
from vmbus_guest.testdrivers.disk_writer import RECORD, STRIDE, Books


@given(st.integers(1, STRIDE - 1), st.integers(0, 3000), st.data())
def test_the_newest_write_of_a_slot(slots: int, count: int, data: st.DataObject) -> None:
    books = Books(slots, 1)
    slot = data.draw(st.integers(0, slots - 1))
    there = [number for number in range(count) if books.slot(number) == slot]
    assert books.newest(slot, count) == (there[-1] if there else None)


def test_what_a_slot_may_hold() -> None:
    books = Books(10, 1)
    slot = books.slot(3)  # writes 3, 13, 23, ... go there
    assert [books.slot(number) for number in (13, 23)] == [slot, slot]

    def judge(data: bytes, acknowledged: int, written: int | None = 100) -> str | None:
        return books.judge(slot, data, acknowledged, written)

    assert judge(b"", 3) is judge(bytes(RECORD), 3) is None
    assert "is empty; write 3" in str(judge(b"", 4))
    assert judge(books.record(3), 4) is judge(books.record(13), 4) is judge(books.record(93), 4) is None
    assert judge(books.record(13), 23) is None
    assert "holds write 13; write 23 was acknowledged" in str(judge(books.record(13), 24))
    assert "not been made yet" in str(judge(books.record(103), 24))
    assert judge(books.record(103), 24, None) is None
    assert "never written" in str(judge(books.record(4), 0))
    whole = books.record(13)
    for damaged in (whole[:-1] + b"\0", b"\0" + whole[1:], whole[:2048] + books.record(23)[2048:]):
        assert "never written" in str(judge(damaged, 4))
    assert "never written" in str(judge(Books(10, 2).record(13), 4))


def test_nothing_stays_open_on_a_disk_that_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It could not be unmounted, and a controller that is withdrawn would not be let go of."""

    def gone(_: int) -> None:
        raise OSError("Input/output error")

    monkeypatch.setattr(disk_writer, "MOUNT_POINT", str(tmp_path))
    files = disk_writer._Files(Books(10, 1))
    files.write()
    monkeypatch.setattr(os, "fsync", gone)
    with pytest.raises(OSError, match="Input"):
        files.sync(0)
    files.close()
    assert not [one for one in Path("/proc/self/fd").iterdir() if os.path.realpath(one).startswith(str(tmp_path))]
