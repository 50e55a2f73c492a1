"""Which queue a frame goes to: the hash by its published examples, what of a frame is hashed, what a guest may set."""

from __future__ import annotations

import ipaddress
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.nic import frame, udp
from vmbus.providers.network import oids
from vmbus.providers.network.spread import (
    DEFAULT_KEY,
    FLOWS_KNOWN,
    IPV4,
    IPV6,
    TCP4,
    TCP6,
    UDP4,
    UDP6,
    Spread,
    flow_of,
    toeplitz,
)
from vmbus.wire.ethernet import OFFLOAD_SIZE

ALL = IPV4 | TCP4 | UDP4 | IPV6 | TCP6 | UDP6


def packet(source: str, target: str, ports: tuple[int, int], *, protocol: int = 6, tag: bool = False) -> bytes:
    one, other = ipaddress.ip_address(source), ipaddress.ip_address(target)
    inner = struct.pack("!HH", *ports) + bytes(16)
    if one.version == 4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(inner), 0, 0, 64, protocol, 0)
    else:
        head = struct.pack("!IHBB", 0x6000_0000, len(inner), protocol, 64)
    kind = 0x0800 if one.version == 4 else 0x86DD
    whole = frame(head + one.packed + other.packed + inner, kind=kind)
    at = OFFLOAD_SIZE + 12
    return whole[:at] + b"\x81\0\0\x05" + whole[at:] if tag else whole


# The examples that NDIS documents: addresses and ports of a packet, and its hash without and with the ports.
EXAMPLES = [
    ("66.9.149.187", 2794, "161.142.100.80", 1766, 0x323E8FC2, 0x51CCC178),
    ("199.92.111.2", 14230, "65.69.140.83", 4739, 0xD718262A, 0xC626B0EA),
    ("24.19.198.95", 12898, "12.22.207.184", 38024, 0xD2D0A5DE, 0x5C2B394A),
    ("3ffe:2501:200:1fff::7", 2794, "3ffe:2501:200:3::1", 1766, 0x2CC18CD5, 0x40207D3D),
]


@pytest.mark.parametrize(("source", "from_port", "target", "to_port", "plain", "ports"), EXAMPLES)
def test_the_hash_of_the_documented_examples(
    source: str, from_port: int, target: str, to_port: int, plain: int, ports: int
) -> None:
    for tag in (False, True):
        one = packet(source, target, (from_port, to_port), tag=tag)
        assert toeplitz(DEFAULT_KEY, flow_of(one, IPV4 | IPV6)) == plain
        assert toeplitz(DEFAULT_KEY, flow_of(one, ALL)) == ports


def test_only_what_the_types_name_is_hashed() -> None:
    tcp, other = packet("192.0.2.1", "192.0.2.2", (1, 2)), packet("192.0.2.1", "192.0.2.2", (1, 2), protocol=17)
    assert len(flow_of(tcp, TCP4)) == 12 and flow_of(other, TCP4) == b""
    assert len(flow_of(other, UDP4 | IPV4)) == 12 and len(flow_of(other, TCP4 | IPV4)) == 8
    assert len(flow_of(packet("2001:db8::1", "2001:db8::2", (1, 2)), TCP6)) == 36
    assert len(flow_of(packet("2001:db8::1", "2001:db8::2", (1, 2), protocol=58), ALL)) == 32
    assert flow_of(tcp, IPV6 | TCP6) == b"" and flow_of(frame(b"x"), ALL) == b""
    for offset in (0x2000, 185):  # the first fragment, and a later one: no ports
        whole = bytearray(tcp)
        struct.pack_into("!H", whole, OFFLOAD_SIZE + 14 + 6, offset)
        assert len(flow_of(bytes(whole), ALL)) == 8
    whole = bytearray(tcp)
    struct.pack_into("!H", whole, OFFLOAD_SIZE + 14 + 6, 0x4000)  # "do not fragment" makes no fragment
    assert flow_of(bytes(whole), ALL) == flow_of(tcp, ALL)


def test_the_key_counts_and_flows_are_forgotten_not_kept() -> None:
    frames = [packet("192.0.2.1", "192.0.2.2", (port, 80)) for port in range(FLOWS_KNOWN + 50)]
    table = [0, 1, 2, 3]
    one, other = Spread(table, types=ALL), Spread(table, key=bytes(range(40)), types=ALL)
    found = [one.queue_of(each) for each in frames]
    assert found == [toeplitz(DEFAULT_KEY, flow_of(each, ALL)) % 4 for each in frames] and set(found) == {0, 1, 2, 3}
    assert len(one._known) <= FLOWS_KNOWN
    assert [other.queue_of(each) for each in frames] != found
    assert {Spread(table, key=b"", types=ALL).queue_of(each) for each in frames[:50]} == {0}
    assert Spread().queue_of(frames[0]) == 0 and one.queue_of(frame(b"x")) == 0


@given(st.binary(max_size=120), st.integers(0, 0x1FFFF))
def test_noise_goes_somewhere(data: bytes, types: int) -> None:
    assert Spread([1], types=types).queue_of(data) in (0, 1)
    choose = random.Random(data)
    at = OFFLOAD_SIZE + 14
    damaged = udp(1, 1)[:at] + choose.randbytes(choose.randrange(60))
    assert Spread([1], types=types).queue_of(damaged) in (0, 1)


def parameters(flags: int = 0, info: int = 0x1701, table: bytes = b"", key: bytes = b"", size: int = 40) -> bytes:
    places = (len(table), 40, len(key), 40 + len(table))
    return struct.pack("<BBHHHIHxxIHxxIIII", 0x89, 2, size, flags, 0, info, *places, 0, 0, 0) + table + key


TABLE = struct.pack("<4I", 0, 1, 2, 1)


def test_what_a_guest_sets_of_it_and_what_it_leaves() -> None:
    start = Spread()
    whole = oids.rss_parameters(parameters(table=TABLE, key=b"k" * 40), 3, start)
    assert whole is not None and (whole.table, whole.key, whole.types) == ((0, 1, 2, 1), b"k" * 40, 0x1700)
    for flags, info, table, key, expected in (
        (0x2 | 0x4, 0, b"", b"n" * 40, ((0, 1, 2, 1), b"n" * 40, 0x1700)),
        (0x2 | 0x8, 0, TABLE[4:], b"x" * 40, ((1, 2, 1), b"k" * 40, 0x1700)),
        (0x4 | 0x8, 0x101, b"", b"", ((0, 1, 2, 1), b"k" * 40, 0x100)),
        (0x10, 0x1701, TABLE, b"n" * 40, ((), b"k" * 40, 0x1700)),
        (0, 0, TABLE, b"", ((), b"k" * 40, 0x1700)),
        (0, 0x1701, TABLE, b"", ((0, 1, 2, 1), b"k" * 40, 0x1700)),
    ):
        found = oids.rss_parameters(parameters(flags, info, table, key), 3, whole)
        assert found is not None and (found.table, found.key, found.types) == expected, hex(flags)
    for bad in (
        b"",
        parameters(table=TABLE, key=b"k" * 41),
        parameters(table=TABLE, key=b"k" * 40)[:-1],
        parameters(table=TABLE, info=0x1702),
        parameters(table=TABLE[:-1]),
        parameters(table=bytes(4 * 129)),
        parameters(),
        parameters(table=struct.pack("<I", 3)),
        parameters(flags=0x4),
        parameters(table=TABLE, size=200),
        parameters(table=TABLE, size=20),
    ):
        assert oids.rss_parameters(bad, 3, start) is None, bad.hex()


@given(st.binary(max_size=120), st.integers(1, 16))
def test_no_parameters_do_worse_than_none(data: bytes, queues: int) -> None:
    for noise in (data, b"\x89\2\x28\0" + data, parameters()[:24] + data):
        found = oids.rss_parameters(noise, queues, Spread())
        assert found is None or all(one < queues for one in found.table)
    oids.config_parameter(data)
