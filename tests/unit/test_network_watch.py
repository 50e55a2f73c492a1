"""What the kernel says about the host's interface: rtnetlink messages, good, foreign, and damaged."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from vmbus.providers.network.watch import News, Trouble

NEW, GONE, ERROR = 16, 17, 2


def message(kind: int, body: bytes) -> bytes:
    return (struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body).ljust(16 + (len(body) + 3) // 4 * 4, b"\0")


def link(kind: int, *, index: int = 7, up: bool = True, master: int = 0, family: int = 0) -> bytes:
    body = struct.pack("=BxHiII", family, 1, index, int(up), 0) + struct.pack("=HH", 9, 3) + b"tap0\0\0\0\0"
    return message(kind, body + (struct.pack("=HHI", 8, 10, master) if master else b""))


def test_what_becomes_of_an_interface() -> None:
    news = News(7, bridged=False)
    for data, expected in (
        (link(NEW), None),
        (link(NEW, up=False), Trouble.DOWN),
        (link(NEW, index=8), Trouble.DOWN),
        (link(NEW) + link(NEW, up=False) + link(NEW), None),
        (link(GONE, family=7), None),
        (link(GONE, index=8), None),
        (link(GONE), Trouble.GONE),
        (link(NEW), None),
        (message(ERROR, struct.pack("=i", -19)), Trouble.GONE),
    ):
        news.take(data)
        assert news.trouble is expected, data
    assert News(7, bridged=False).request()[16:] == struct.pack("=BxHiII", 0, 0, 7, 0, 0)


def test_what_becomes_of_a_port_of_a_bridge() -> None:
    news = News(7, bridged=True)
    for data, expected in (
        (link(NEW, master=3), None),
        (link(NEW), Trouble.NO_BRIDGE),
        (link(NEW, up=False), Trouble.DOWN),
        (link(NEW, master=3), None),
    ):
        news.take(data)
        assert news.trouble is expected, data


@given(st.lists(st.one_of(st.binary(max_size=60), st.builds(link, st.sampled_from([NEW, GONE]))), max_size=4))
def test_noise_raises_nothing_and_ends(parts: list[bytes]) -> None:
    News(7, bridged=True).take(b"".join(parts))
    for cut in range(0, 60, 7):
        News(7, bridged=True).take(b"".join(parts)[cut:])
