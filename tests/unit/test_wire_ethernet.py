"""Ethernet frames: their offload headers, flows, and addresses."""

from __future__ import annotations

import random
import struct

import pytest

from support.nic import GUEST, PEER, frame, number_of, udp
from vmbus.wire.ethernet import OFFLOAD_SIZE, announcement, check_frame, flow_hash, format_mac, parse_mac

pytestmark = pytest.mark.unit


def test_noise_raises_nothing() -> None:
    choose = random.Random(2)
    for _ in range(3000):
        one = choose.randbytes(choose.randrange(100))
        check_frame(one, 1500, choose.randrange(2))
        flow_hash(one)


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


def test_a_flow_has_one_hash_in_both_directions() -> None:
    flows = {flow_hash(udp(0, port)) for port in range(1000, 1200)}
    assert len(flows) > 190
    assert len({value % 4 for value in flows}) == 4
    for port in (1000, 1001):
        same = {flow_hash(udp(number, port, size=number)) for number in range(20)}
        assert same == {flow_hash(udp(0, port, to_guest=False))}
    tagged = udp(1, 1000)
    tagged = tagged[: OFFLOAD_SIZE + 12] + b"\x81\0\0\x05" + tagged[OFFLOAD_SIZE + 12 :]
    assert flow_hash(tagged) == flow_hash(udp(2, 1000))


def test_fragments_and_other_protocols_have_their_addresses_hash() -> None:
    def fragment(port: int, offset: int, more: bool) -> bytes:
        whole = bytearray(udp(1, port))
        struct.pack_into("!H", whole, OFFLOAD_SIZE + 14 + 6, offset | (0x2000 if more else 0))
        return bytes(whole)

    parts = {flow_hash(fragment(port, *how)) for port in (1, 2) for how in ((0, True), (185, True), (370, False))}
    assert len(parts) == 1
    whole = bytearray(udp(1, 5))
    struct.pack_into("!H", whole, OFFLOAD_SIZE + 14 + 6, 0x4000)  # "do not fragment" makes no fragment
    assert flow_hash(bytes(whole)) == flow_hash(udp(9, 5))
    assert flow_hash(frame(b"a")) == flow_hash(frame(b"b", source=GUEST, target=PEER))
    assert flow_hash(frame(b"a")) != flow_hash(frame(b"a", source=bytes(6)))

    def six(port: int, swap: bool = False) -> bytes:
        one, other = b"\x20\x01" + bytes(13) + b"\1", b"\x20\x01" + bytes(13) + b"\2"
        ports = (port, 80)
        if swap:
            one, other, ports = other, one, (80, port)
        head = struct.pack("!IHBB", 0x6000_0000, 20, 6, 64) + one + other
        return frame(head + struct.pack("!HH", *ports) + bytes(16), kind=0x86DD)

    assert flow_hash(six(1)) == flow_hash(six(1, swap=True)) != flow_hash(six(2))
    assert number_of(udp(77, 1)) == 77


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
