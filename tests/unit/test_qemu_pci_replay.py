"""The PCI replay, against a host bridge and a function made of a few lines of Python."""

from __future__ import annotations

import asyncio

import pytest

from vmbus.errors import EnvironmentProblem, StateError
from vmbus.qemu.pci_replay import PciAddress, Write, parse_port, replay, write_lines

ADDRESS = PciAddress(0, 5)


class Bridge:
    """Ports 0xcf8 and 0xcfc of a machine with one function, behind the monitor's `o` and `i`."""

    def __init__(self, latched: int = 0x80001898, read_only: tuple[int, ...] = ()) -> None:
        self.latched = latched
        self.config = bytearray(256)
        self.read_only = read_only
        self.written: list[int] = []
        self.dead = False

    async def human(self, line: str) -> str:
        if self.dead:
            raise EnvironmentProblem("gone")
        verb, size_text, port_text, *value_text = line.split()
        size = {"/b": 1, "/h": 2, "/w": 4}[size_text]
        port = int(port_text, 16)
        if port == 0xCF8:
            assert size == 4
            if verb == "o":
                self.latched = int(value_text[0], 16)
                return ""
            return f"portl[0x0cf8] = 0x{self.latched:08x}"
        assert 0xCFC <= port <= 0xCFF
        assert self.latched >> 11 & 0x1F == ADDRESS.device and self.latched >> 31
        register = (self.latched & 0xFC) + port - 0xCFC
        if verb == "o":
            self.written.append(register)
            if register not in self.read_only:
                self.config[register : register + size] = int(value_text[0], 16).to_bytes(size, "little")
            return ""
        value = int.from_bytes(self.config[register : register + size], "little")
        return f"port{'bw?l'[size - 1]}[0x{port:04x}] = 0x{value:x}"


WRITES = [(0x10, 4, 0xFEBF1000), (0x3C, 1, 11), (0x44, 4, 0xFEE00000), (0x4C, 2, 0x4021), (0x42, 2, 0x81), (4, 2, 6)]


def test_everything_is_written_in_order_and_the_latch_is_put_back() -> None:
    bridge = Bridge()
    assert asyncio.run(replay(bridge.human, ADDRESS, WRITES)) == len(WRITES)
    assert bridge.written == [0x10, 0x3C, 0x44, 0x4C, 0x42, 0x04]
    assert bridge.config[0x10:0x14] == bytes.fromhex("0010bffe")
    assert bridge.config[0x42:0x44] == b"\x81\x00"
    assert bridge.latched == 0x80001898


def test_a_register_that_does_not_keep_its_value_is_named() -> None:
    bridge = Bridge(read_only=(0x42,))
    with pytest.raises(EnvironmentProblem, match=r"00:05\.0 .*register 0x42 is 0x0 after writing 0x81"):
        asyncio.run(replay(bridge.human, ADDRESS, WRITES))
    assert bridge.latched == 0x80001898  # also then


def test_a_monitor_that_complains_is_heard() -> None:
    async def human(line: str) -> str:
        return "portl[0x0cf8] = 0x0" if line.startswith("i") else "unknown command: 'o'"

    with pytest.raises(EnvironmentProblem, match="unknown command"):
        asyncio.run(replay(human, ADDRESS, WRITES))


def test_nothing_is_sent_for_an_illegal_write() -> None:
    bridge = Bridge()
    for write in [(0x42, 4, 0), (0x100, 1, 0), (4, 3, 0), (4, 1, 256), (-4, 4, 0)]:
        with pytest.raises(StateError, match="not a legal access"):
            asyncio.run(replay(bridge.human, ADDRESS, [(0x10, 4, 1), write]))
    assert bridge.written == []


def test_lines() -> None:
    assert list(write_lines(PciAddress(1, 31, 7), Write(0x42, 2, 0x81))) == [
        "o /w 0xcf8 0x8001ff40",
        "o /h 0xcfe 0x81",
    ]


def test_output_without_a_value() -> None:
    with pytest.raises(EnvironmentProblem, match="answered a port read"):
        parse_port("unknown command: 'i'")
