"""Log files that stay bounded while somebody writes them."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import pytest

from vmbus.vm import logs
from vmbus.vm.logs import LOG_HEAD, LOG_LIMIT, LOG_TAIL, shorten
from vmbus.vm.process import Child, log_tail

MARK = re.compile(rb"\[\.\.\. (\d+) bytes left out \.\.\.\]\n")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def numbered(first: int, last: int) -> bytes:
    return b"".join(b"line %d\n" % number for number in range(first, last))


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_the_beginning_and_the_end_stay_whole_lines_each(path: Path) -> None:
    everything = numbered(0, 200_000)
    append(path, everything)
    gone = shorten(path)
    head, count, tail = MARK.split(path.read_bytes())
    assert everything.startswith(head) and everything.endswith(tail)
    assert head.endswith(b"\n") and tail.startswith(b"line ")
    assert int(count) == gone == len(everything) - len(head) - len(tail)
    assert LOG_HEAD - 20 < len(head) <= LOG_HEAD and LOG_TAIL - 20 < len(tail) <= LOG_TAIL


def test_what_is_left_out_is_counted_over_all_times(path: Path) -> None:
    everything = b""
    for start in range(0, 1_000_000, 100_000):
        piece = numbered(start, start + 100_000)
        append(path, piece)
        everything += piece
        gone = shorten(path)
    head, count, tail = MARK.split(path.read_bytes())
    assert everything.startswith(head) and everything.endswith(tail)
    assert int(count) == gone == len(everything) - len(head) - len(tail)


@pytest.mark.parametrize("byte", [b"y", b"\n", b"\0"])
def test_one_endless_line_and_many_empty_ones(path: Path, byte: bytes) -> None:
    for _ in range(5):
        append(path, byte * LOG_LIMIT)
        shorten(path)
        assert path.stat().st_size <= LOG_LIMIT
    assert len(MARK.findall(path.read_bytes())) == 1


def test_a_short_log_and_none_are_left_alone(path: Path) -> None:
    assert shorten(path) == 0 and not path.exists()
    append(path, b"x" * LOG_LIMIT)
    assert shorten(path) == 0 and path.stat().st_size == LOG_LIMIT


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    append(tmp_path / "precious", b"x" * (LOG_LIMIT + 1))
    path.symlink_to("precious")
    assert shorten(path) == 0 and (tmp_path / "precious").stat().st_size == LOG_LIMIT + 1


async def test_the_logs_of_a_child_are_bounded_while_it_writes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of some 20 MB, in the child's own log and in the file of its witness; the last words are there."""
    monkeypatch.setattr("vmbus.vm.process.LOOK_EVERY", 0.01)
    witness = path.with_name("witness")

    flood = "i=0; while [ $i -lt 300 ]; do cat chunk >&2; cat chunk >>witness; i=$((i+1)); done"
    (path.parent / "chunk").write_bytes(numbered(0, 6000))
    script = f"cd {path.parent}; {flood}; echo last words >&2; echo of the guest >>witness; exit 0"
    child = await Child.spawn("the child", ["/bin/sh", "-c", script], path)
    child.witness = ("the guest's console", witness)
    most = 0
    while child.running:
        most = max(most, *(one.stat().st_size for one in (path, witness) if one.exists()))
        await asyncio.sleep(0.005)
    await child.stop()
    assert "last words" in str(child.death()) and "of the guest" in str(child.death())
    most = most
    written = 300 * len(numbered(0, 6000))
    assert most < written / 2, "it is bounded while it grows, not only at the end"
    for one in (path, witness):
        assert one.stat().st_size <= LOG_LIMIT
        assert "left out" in one.read_text() and "line 5999" in log_tail(one)
        assert one.read_text().startswith("line 0\n")


async def test_sabotage_without_the_bound_it_grows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmbus.vm.process.shorten", lambda path: 0)

    child = await Child.spawn("the child", ["/bin/sh", "-c", f"head -c {4 * LOG_LIMIT} /dev/zero >&2"], path)
    await child.exited
    await child.stop()
    assert path.stat().st_size == 4 * LOG_LIMIT  # noqa: ASYNC240 - quick


def test_shortening_is_quick(path: Path) -> None:
    append(path, b"x" * (64 << 20))
    began = time.thread_time()
    assert logs.shorten(path) > 0
    assert time.thread_time() - began < 0.5
