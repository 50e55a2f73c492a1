"""The host's stand-in for the guest's PCI function."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.transport import ADDRESS, INTERRUPT, STORE, VALUE, ServerThread, serve, serve_in_process
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.testkit.loopback.client import RemoteError
from vmbus.testkit.loopback.function import LoopbackBuffer, LoopbackFunction
from vmbus.transport.bindings import OLD_MAX_DMA_REGIONS
from vmbus.transport.context import ResetKind
from vmbus.transport.library import Library

PAGE = 4096


@pytest.fixture
def server(libvfio_user: Library, tmp_path: Path) -> Iterator[ServerThread]:
    with serve(libvfio_user, tmp_path / "socket") as server:
        yield server


@pytest.fixture
def function(server: ServerThread) -> Iterator[LoopbackFunction]:
    with LoopbackFunction(server.context.socket_path) as function:
        yield function


def device_writes(function: LoopbackFunction, iova: int, data: bytes) -> None:
    function.client.region_write(0, ADDRESS, iova.to_bytes(8, "little"))
    function.client.region_write(0, VALUE, data)


def test_the_function_is_set_up(server: ServerThread, function: LoopbackFunction) -> None:
    config = server.device.config
    assert (config.memory_enabled, config.bus_master, config.msi_enabled) == (True, True, True)
    assert config.bar0_address == 0xFE000000


def test_registers_and_interrupts_in_a_process_of_its_own(libvfio_user: Library, tmp_path: Path) -> None:
    with serve_in_process(libvfio_user.path, tmp_path / "socket"), LoopbackFunction(tmp_path / "socket") as function:
        function.write32(STORE + 4, 0xDEADBEEF)
        assert function.read32(STORE + 4) == 0xDEADBEEF
        assert not function.wait_interrupt(0)
        function.write32(INTERRUPT, 1)
        assert function.wait_interrupt(10)
        assert not function.wait_interrupt(0)
        buffer = function.allocate(PAGE)
        device_writes(function, buffer.iova + 8, b"device")
        assert bytes(buffer.view[8:14]) == b"device"


def test_buffers(server: ServerThread, function: LoopbackFunction) -> None:
    buffers: list[LoopbackBuffer] = [function.allocate(size * PAGE) for size in (1, 3, 600, 2)]
    for number, buffer in enumerate(buffers):
        assert buffer.iova % PAGE == 0 and len(buffer.view) == buffer.size and not buffer.view.readonly
        assert buffer.iova >= 1 << 32
        for place in (0, buffer.size - 8):
            device_writes(function, buffer.iova + place, b"buffer %d" % number)
    for number, buffer in enumerate(buffers):
        assert bytes(buffer.view[:8]) == bytes(buffer.view[-8:]) == b"buffer %d" % number
    function.free(buffers[0])
    again = function.allocate(PAGE)
    assert again.iova == buffers[0].iova
    function.free(again)
    with pytest.raises(UsageError, match="freed twice"):
        function.free(again)
    again = function.allocate(100)  # whole pages
    assert again.size == PAGE
    assert bytes(again.view) == bytes(PAGE)


def test_all_guest_memory_fits_the_old_generations_regions(server: ServerThread, function: LoopbackFunction) -> None:
    for _ in range(16):
        function.allocate(2 << 20)
    assert len(function.maps) == OLD_MAX_DMA_REGIONS
    with pytest.raises(EnvironmentProblem, match="no 1 free pages"):
        function.allocate(PAGE)
    with pytest.raises(UsageError):
        function.allocate(0)


def test_permuted_buffers(server: ServerThread, function: LoopbackFunction) -> None:
    function.allocate(PAGE)
    buffer = function.allocate_permuted([2, 0, 1, 3])
    assert [size for iova, size in function.maps.items() if iova >= buffer.iova] == [PAGE, 2 * PAGE, PAGE]
    for page in range(4):
        device_writes(function, buffer.iova + page * PAGE + 5, b"page %d" % page)
    assert [bytes(buffer.view[page * PAGE + 5 :][:6]) for page in range(4)] == [b"page %d" % page for page in range(4)]
    assert os.pread(function.memory_fd, 6, buffer.file_pages[0] * PAGE + 5) == b"page 0"
    with pytest.raises(RemoteError):
        device_writes(function, buffer.iova + 4 * PAGE, b"beyond")
    with pytest.raises(UsageError):
        function.allocate_permuted([0, 2])


def test_taking_memory_back(server: ServerThread, function: LoopbackFunction) -> None:
    first, second = function.allocate(PAGE), function.allocate_permuted([1, 0])
    stale = server.device.views[second.iova]
    function.unmap_buffer(second)
    stale[0] = 1
    assert second.view[0] == 0
    with pytest.raises(RemoteError):
        device_writes(function, second.iova, b"x")
    device_writes(function, first.iova, b"x")
    function.unmap_all()
    assert function.maps == {}
    with pytest.raises(RemoteError):
        device_writes(function, first.iova, b"x")


def test_abandoning(server: ServerThread) -> None:
    function = LoopbackFunction(server.context.socket_path)
    buffer = function.allocate(PAGE)
    for _ in range(100):
        function.write32(STORE, 1)
    function.abandon()
    server.wait_until(lambda: ("reset", ResetKind.LOST_CONNECTION) in server.device.events)
    buffer.view[0] = 1  # still the guest's


def test_nobody_listens(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (procfs)
    with pytest.raises(EnvironmentProblem, match="no device server"):
        LoopbackFunction(tmp_path / "socket")
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # noqa: PTH208 (the mapping keeps a descriptor)
