"""Ethernet frames: their offload headers, flows, and addresses."""

from __future__ import annotations

import random
import struct

import pytest

from support.nic import frame
from vmbus.wire.ethernet import OFFLOAD_SIZE, announcement, check_frame, format_mac, parse_mac


def test_noise_raises_nothing() -> None:
    choose = random.Random(2)
    for _ in range(3000):
        one = choose.randbytes(choose.randrange(100))
        check_frame(one, 1500, choose.randrange(2))


def offload(flags: int, kind: int, header: int, segment: int, start: int, at: int, size: int) -> bytes:
    return struct.pack("<BBHHHH", flags, kind, header, segment, start, at) + frame(bytes(size))[OFFLOAD_SIZE:]


def test_frames_are_checked_against_what_was_agreed() -> None:
    whole = True
    assert check_frame(frame(b""), 1500, 0) == ""
    assert check_frame(frame(bytes(1500)), 1500, 0) == ""
    assert check_frame(frame(bytes(1508)), 1500, 0) == "", "two VLAN tags"
    assert "MTU" in check_frame(frame(bytes(1509)), 1500, 0)
    assert "MTU" in check_frame(frame(bytes(1509)), 1500, whole)
    for short in (b"", bytes(9), frame()[:-1]):
        assert "at least" in check_frame(short, 1500, whole)
    good = offload(1, 1, 54, 1448, 34, 16, 60000)
    assert check_frame(good, 1500, whole) == ""
    assert "not agreed" in check_frame(good, 1500, 0)
    assert check_frame(offload(1, 0x84, 74, 8900, 54, 16, 60000), 9000, whole) == ""
    assert check_frame(offload(1, 0, 0, 0, 34, 16, 100), 1500, whole) == "", "a checksum alone"
    for bad, why in (
        (offload(1, 1, 54, 1501, 34, 16, 60000), "cut"),
        (offload(1, 1, 54, 0, 34, 16, 60000), "cut"),
        (offload(1, 1, 54, 1448, 34, 16, 65600), "cut"),
        (offload(0, 1, 54, 1448, 34, 16, 60000), "kind"),
        (offload(1, 3, 54, 1448, 34, 16, 60000), "kind"),
        (offload(1, 5, 54, 1448, 34, 16, 60000), "kind"),
        (offload(1, 1, 54, 1448, 34, 16, 20), "beyond"),
        (offload(1, 0, 0, 0, 65535, 65535, 100), "beyond"),
        (offload(1, 0, 0, 0, 34, 16, 1600), "MTU"),
    ):
        assert why in check_frame(bad, 1500, whole), (bad[:10], why)


def test_addresses() -> None:
    mac = parse_mac("52:54:00:aB:34:56")
    assert format_mac(mac) == "52:54:00:ab:34:56"
    for bad in ("", "52:54:00:12:34", "52:54:00:12:34:5", "52:54:00:12:34:zz", "01:00:5e:00:00:01", "0" * 17):
        with pytest.raises(ValueError):
            parse_mac(bad)
    with pytest.raises(ValueError, match="single station"):
        parse_mac("00:00:00:00:00:00")
    told = announcement(mac)
    assert len(told) == OFFLOAD_SIZE + 60
    assert told[OFFLOAD_SIZE : OFFLOAD_SIZE + 14] == b"\xff" * 6 + mac + b"\x80\x35"
    assert told.count(mac) == 3 and check_frame(told, 68, 0) == ""
