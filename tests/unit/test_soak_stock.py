"""A soak's books of what runs over Linux's own drivers: each fault shows, and what is right is no fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmbus.soak.books import Fault, Session
from vmbus.soak.schedule import plan_episode
from vmbus.soak.settings import settings_from
from vmbus.soak.sink import NoSink
from vmbus.soak.stage import Subject
from vmbus.soak.stock import BAD_WORDS, StockStage, lose_a_block, with_card, without_card
from vmbus.vm.command_line import Programs
from vmbus_guest.testdrivers.disk_writer import Books
from vmbus_guest.testdrivers.frames import GUEST_END, HOST_END, Frames, WrongBytes


def planned(**more: Any) -> Any:
    return plan_episode(settings_from({"linux": 1.0, "script": [{"kind": "migrate"}], **more}, "x"), 1, 0)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(0, 30), st.data())
def test_frames_come_through_in_pieces_of_any_size(size: int, count: int, data: st.DataObject) -> None:
    guest, host = Frames(3, GUEST_END, size), Frames(3, HOST_END, size)
    stream = b"".join(guest.frame() for _ in range(count)) + guest.last()
    got = 0
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        got += host.feed(stream[:cut])
        stream = stream[cut:]
    assert got == host.received == guest.sent == count and host.ended


@given(st.integers(1, 8), st.data())
def test_whatever_is_changed_on_the_way_is_noticed(count: int, data: st.DataObject) -> None:
    guest, host = Frames(3, GUEST_END, 100), Frames(3, HOST_END, 100)
    frames = [guest.frame() for _ in range(count)]
    fault = data.draw(st.sampled_from(("byte", "lost", "twice", "behind")))
    at = data.draw(st.integers(0, count - 1))
    if fault == "byte":
        place = data.draw(st.integers(0, len(frames[at]) - 1))
        frames[at] = frames[at][:place] + bytes([frames[at][place] ^ 1]) + frames[at][place + 1 :]
    elif fault == "lost":
        del frames[at]
    elif fault == "twice":
        frames.insert(at, frames[at])
    stream = b"".join(frames) + guest.last() + (b"x" if fault == "behind" else b"")
    try:
        host.feed(stream)
    except WrongBytes:
        return
    assert not host.ended, "a length that has become longer is missed when the stream ends: it does not"


def status(stage: StockStage, **changes: Any) -> dict[str, Any]:
    """What server and guest say when all is well, but for the changes."""
    reports = {
        name: {"state": "running", "progress": {"wrong": 0, "ends": 2, "received": 9}}
        for name in ("disk", "vsock", "card", "copies")
    }
    providers: dict[str, dict[str, Any]] = {
        "heartbeat": {"heartbeat": {"beats": 3, "wrong": 0}},
        "disk": {"luns": [{"errors": 0}]},
        "vsock": {"wrong": 0},
        "card": {"refused": 0, "queues": [{"lost": 0}]},
    }
    for path, value in changes.items():
        place: dict[str, Any] = {"reports": reports, "providers": providers}
        *way, last = path.split("__")
        for step in way:
            place = place[step]
        place[last] = value
    return {"reports": reports, "providers": providers}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reports__disk__progress__wrong": 1}, "workload disk, as the guest counts"),
        ({"reports__vsock__progress__wrong": 1}, "workload vsock, as the guest counts"),
        ({"reports__vsock__progress__ends": 3}, "3 connections ended in the guest, 2 at most"),
        ({"reports__card__progress__ends": 9}, "workload card: 9 connections ended in the guest, 8 at most"),
        ({"reports__disk__state": "finished"}, "workload disk has finished by itself"),
        ({"providers__heartbeat__heartbeat__wrong": 1}, "1 heartbeats were answered wrongly"),
        ({"providers__disk__luns": [{"errors": 1}]}, "the disk had errors"),
        ({"providers__vsock__wrong": 1}, "the books of provider 'vsock' are wrong"),
        ({"providers__card__refused": 1}, "the card refused 1 messages"),
        ({"providers__card__queues": [{"lost": 1}]}, "the card refused 0 messages"),
    ],
)
def test_each_book_that_is_wrong_is_told(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    nothing: Any = None
    programs: Programs = nothing
    plan = planned(workload=[{"name": "copies", "command": ["/bin/true"]}])  # which has no provider
    stage = StockStage(plan, tmp_path, tmp_path, programs, NoSink())
    subject = Subject(nothing, Session({}, {}).moved(back=True))
    stage.check_books(subject, status(stage))
    with pytest.raises(Fault, match=message):
        stage.check_books(subject, status(stage, **changes))
    with pytest.raises(Fault, match="2 connections ended in the guest, 0 at most"):
        stage.check_books(Subject(nothing, Session({}, {})), status(stage))
    with pytest.raises(Fault, match="workload card: 2 connections ended in the guest, 0 at most"):
        stage.check_books(Subject(nothing, Session({}, {}).moved()), status(stage))


def test_the_card_gets_a_namespace_or_is_left_out() -> None:
    plan = planned()
    card = next(one for one in with_card(plan, "there").vm.device.providers if one.kind == "network")
    assert card.options["namespace"] == "there" and card.options["queues"] >= 1
    without = without_card(plan)
    assert not [one for one in without.vm.device.providers if one.kind == "network"]
    assert [one.driver for one in without.workloads] == ["heartbeat", "disk", "vsock"]
    assert msgspec.structs.asdict(without)["operations"] == plan.operations


def test_the_sabotage_loses_a_write_that_was_acknowledged(tmp_path: Path) -> None:
    books, image = Books(200, 5), tmp_path / "image"
    image.write_bytes(bytes(3072) + b"".join(books.record(number) for number in range(100)))
    lose_a_block(image)
    found = image.read_bytes()[3072:]
    lost = [number for number in range(100) if found[4096 * number :][:4096] != books.record(number)]
    assert lost == [67]
    assert "write 67 was acknowledged" in str(books.judge(books.slot(67), bytes(4096), 100, 100))


def test_the_guests_log_says_what_is_wrong_with_it() -> None:
    for line in (
        "INFO: task jbd2/sda-8:99 blocked for more than 30 seconds.",
        "blk_update_request: I/O error, dev sda, sector 8",
        "EXT4-fs error (device sda): ext4_lookup",
    ):
        assert BAD_WORDS.search(line)
    assert not BAD_WORDS.search("EXT4-fs (sda): mounted filesystem 5 r/w with ordered data mode")
    assert not BAD_WORDS.search("hv_utils: Heartbeat IC version 3.0")
