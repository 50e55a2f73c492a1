"""Guest memory through the transport: mapping, taking it back, writing through the client."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import pace
from support.transport import ADDRESS, VALUE, ServerThread, serve
from vmbus.errors import EnvironmentProblem, VmbusError
from vmbus.testkit.loopback.client import RemoteError, VfioUserClient
from vmbus.transport import bindings, protocol
from vmbus.transport.context import AddressNotMapped, ClientBusy, ClientGone, ClientRefused, ResetKind, RunResult
from vmbus.transport.library import Generation, Library
from vmbus.transport.protocol import Command

BAR0 = bindings.REGION_BAR0
PAGE = 4096
BASE = 0x1_0000_0000
LOST = ("reset", ResetKind.LOST_CONNECTION)


@pytest.fixture
def server(libvfio_user: Library, tmp_path: Path) -> Iterator[ServerThread]:
    with serve(libvfio_user, tmp_path / "socket", message_timeout=1) as server:
        yield server


@pytest.fixture
def client(server: ServerThread) -> Iterator[VfioUserClient]:
    with VfioUserClient(server.context.socket_path) as client, client.serving():
        yield client


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4 << 20)
    yield fd
    os.close(fd)


def device_writes(client: VfioUserClient, iova: int, data: bytes) -> None:
    client.region_write(BAR0, ADDRESS, iova.to_bytes(8, "little"))
    client.region_write(BAR0, VALUE, data)


def device_reads(client: VfioUserClient, iova: int, size: int) -> bytes:
    client.region_write(BAR0, ADDRESS, iova.to_bytes(8, "little"))
    return client.region_read(BAR0, VALUE, size)


def test_both_sides_see_the_same_bytes_wherever_they_are_in_the_file(client: VfioUserClient, memory: int) -> None:
    order = [7 * PAGE, 0, 3 * PAGE + 100, 5 * PAGE]  # of pages next to each other for the device
    for index, offset in enumerate(order):
        client.dma_map(BASE + index * PAGE, PAGE, memory, offset, readable=index != 3)
        device_writes(client, BASE + index * PAGE, b"page %d" % index)
        device_writes(client, BASE + (index + 1) * PAGE - 4, b"last")
    for index, offset in enumerate(order):
        assert os.pread(memory, 6, offset) == b"page %d" % index
        assert os.pread(memory, 4, offset + PAGE - 4) == b"last"
    os.pwrite(memory, b"guest", PAGE - 5)
    assert device_reads(client, BASE + 2 * PAGE - 5, 5) == b"guest"


def test_read_only_memory(server: ServerThread, client: VfioUserClient, memory: int) -> None:
    os.pwrite(memory, b"guest", 0)
    client.dma_map(BASE, PAGE, memory, writable=False)
    assert server.device.events == [("map", BASE, PAGE, False)]
    assert server.device.views[BASE].readonly
    assert device_reads(client, BASE, 5) == b"guest"
    with pytest.raises(RemoteError):
        device_writes(client, BASE, b"device")
    assert os.pread(memory, 5, 0) == b"guest"


def test_memory_without_a_descriptor(server: ServerThread, client: VfioUserClient, memory: int) -> None:
    client.dma_map(BASE, PAGE, memory, send_fd=False)
    assert server.device.events == [("unreachable", BASE, PAGE)]
    assert server.context.dma_regions == [(BASE, PAGE, False)]
    client.dma_unmap(BASE, PAGE)
    client.dma_map(BASE, 8 << 20, memory)  # more than its file has
    assert server.device.events[1:] == [("unmap", BASE, PAGE), ("unreachable", BASE, 8 << 20)]


def test_overlaps_and_the_number_of_regions(
    server: ServerThread, client: VfioUserClient, memory: int, libvfio_user: Library
) -> None:
    client.dma_map(BASE, 2 * PAGE, memory)
    with pytest.raises(RemoteError):
        client.dma_map(BASE + PAGE, 2 * PAGE, memory)
    limit = bindings.OLD_MAX_DMA_REGIONS if libvfio_user.generation is Generation.OLD else 600
    for index in range(1, limit):
        client.dma_map(BASE + index * 2 * PAGE, PAGE, memory, index % 512 * PAGE)
    if libvfio_user.generation is Generation.OLD:
        with pytest.raises(RemoteError):
            client.dma_map(BASE - PAGE, PAGE, memory)
    assert len(server.context.dma_regions) == limit
    client.dma_unmap_all()
    server.wait_until(lambda: not server.context.dma_regions)
    assert not server.device.views


def test_the_new_generations_limit_is_ours(libvfio_user: Library, tmp_path: Path, memory: int) -> None:
    with (
        serve(libvfio_user, tmp_path / "socket", max_dma_regions=3) as server,
        VfioUserClient(tmp_path / "socket") as client,
    ):
        for index in range(3):
            client.dma_map(BASE + index * PAGE, PAGE, memory)
        if libvfio_user.generation is Generation.NEW:
            with pytest.raises(RemoteError):
                client.dma_map(BASE - PAGE, PAGE, memory)
        assert len(server.context.dma_regions) == 3


@pytest.mark.parametrize("how", ["unmap", "unmap_all", "disconnect"])
def test_stale_views_reach_nothing(server: ServerThread, memory: int, how: str) -> None:
    with VfioUserClient(server.context.socket_path) as client:
        client.dma_map(BASE, 2 << 20, memory)
        stale = server.device.views[BASE]
        words = stale.cast("I")
        stale[PAGE : PAGE + 4] = b"live"
        if how == "unmap":
            client.dma_unmap(BASE, 2 << 20)
        elif how == "unmap_all":
            client.dma_unmap_all()
    server.wait_until(lambda: ("unmap", BASE, 2 << 20) in server.device.events)
    if how == "disconnect":
        server.wait_until(lambda: LOST in server.device.events)
    # The guest uses the pages for something else now.
    os.pwrite(memory, b"other", 3 * PAGE)
    stale[PAGE : PAGE + 4] = b"dead"
    words[0] = 0xFFFFFFFF
    stale[-1] = 1
    assert os.pread(memory, 4, PAGE) == b"live"
    assert os.pread(memory, 4, 0) == bytes(4)
    assert os.pread(memory, 1, (2 << 20) - 1) == b"\0"
    assert bytes(stale[3 * PAGE : 3 * PAGE + 5]) == bytes(5)


def test_a_range_with_several_regions_is_taken_back_at_once(
    server: ServerThread, client: VfioUserClient, memory: int
) -> None:
    """As QEMU does with all that a guest's driver had mapped, when the driver is gone."""
    for number in range(4):
        client.dma_map(BASE + number * 2 * PAGE, PAGE, memory, number * PAGE)
    server.device.events.clear()
    for start, size, gone in (
        (0xFEF0_0000, BASE + 5 * PAGE - 0xFEF0_0000, [0, 1, 2]),
        (0, 1 << 63, [3]),
        (BASE, PAGE, []),
    ):
        if gone:
            client.dma_unmap(start, size)
        else:
            with pytest.raises(RemoteError):  # nothing is there any more
                client.dma_unmap(start, size)
        unmapped = [call for call in server.device.events if call[0] == "unmap"]
        assert unmapped == [("unmap", BASE + number * 2 * PAGE, PAGE) for number in gone]
        server.device.events.clear()
    assert server.context.dma_regions == []
    # The same addresses, other memory: the library has let go of them as well.
    client.dma_map(BASE, PAGE, memory, 9 * PAGE)
    device_writes(client, BASE, b"new")
    assert os.pread(memory, 3, 9 * PAGE) == b"new" and os.pread(memory, 3, 0) == bytes(3)


def test_regions_that_lie_only_partly_in_a_range_stay(
    server: ServerThread, client: VfioUserClient, memory: int
) -> None:
    for number in range(3):
        client.dma_map(BASE + number * 2 * PAGE, 2 * PAGE, memory, number * 2 * PAGE)
    client.dma_unmap(BASE + PAGE, 4 * PAGE)
    assert [iova for iova, _, _ in server.context.dma_regions] == [BASE, BASE + 4 * PAGE]
    device_writes(client, BASE, b"still there")


def test_taking_memory_back_under_a_thread_that_uses_it(
    server: ServerThread, client: VfioUserClient, memory: int
) -> None:
    current: list[memoryview] = []
    done = threading.Event()
    rounds = 0

    def use() -> None:
        nonlocal rounds
        while not done.is_set():
            for view in current:
                view[:PAGE] = bytes((rounds & 0xFF,)) * PAGE
                rounds += 1

    worker = threading.Thread(target=use)
    worker.start()
    try:
        for _ in range(25):
            client.dma_map(BASE, 64 * PAGE, memory)
            current[:] = [server.device.views[BASE]]
            client.dma_unmap(BASE, 64 * PAGE)
            # The worker still writes, into nothing.
            os.pwrite(memory, b"guest", 0)
            before = rounds
            server.wait_until(lambda before=before: rounds > before)  # type: ignore[misc]
            assert os.pread(memory, 5, 0) == b"guest"
    finally:
        done.set()
        worker.join()


# -- a client that asks for too much ----------------------------------------------------------------------------------


def descriptors() -> int:
    gc.collect()  # garbage of other tests has some, and may go at any moment
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (procfs)


def test_a_mapping_that_is_asked_for_again_keeps_no_descriptor(
    server: ServerThread, client: VfioUserClient, memory: int
) -> None:
    client.dma_map(BASE, PAGE, memory)
    device_writes(client, BASE, b"before")
    before = descriptors()
    other = os.memfd_create("other", os.MFD_CLOEXEC)
    os.ftruncate(other, PAGE)
    try:
        for _ in range(20):
            client.dma_map(BASE, PAGE, memory)
            for fd, offset, writable in ((memory, PAGE, True), (memory, 0, False), (other, 0, True)):
                with pytest.raises(RemoteError):
                    client.dma_map(BASE, PAGE, fd, offset, writable=writable)
        assert descriptors() == before + 1
    finally:
        os.close(other)
    assert device_reads(client, BASE, 6) == b"before"
    client.dma_unmap(BASE, PAGE)
    assert server.device.events == [("map", BASE, PAGE, True), ("unmap", BASE, PAGE)]


def test_what_cannot_be_mapped_never_reaches_the_library(
    server: ServerThread, client: VfioUserClient, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 2022 library closes such a descriptor twice, and by then the number may be somebody else's."""
    read_end, write_end = os.pipe()
    read_only = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
    asked: list[int] = []
    requests = server.context._requests
    library = requests.library
    monkeypatch.setattr(requests, "library", lambda: asked.append(library()))
    try:
        for fd in (read_end, read_only):
            with pytest.raises(RemoteError):
                client.dma_map(BASE, PAGE, fd)
        with pytest.raises(RemoteError):
            client.dma_map((1 << 64) - PAGE, 2 * PAGE, memory)
        # Nearly all descriptors are in use: the rest is for the device.
        monkeypatch.setattr("resource.getrlimit", lambda _: (4, 4))
        with pytest.raises(RemoteError):
            client.dma_map(BASE, PAGE, memory)
    finally:
        for fd in (read_end, write_end, read_only):
            os.close(fd)
    assert not asked and not server.device.events


def test_memory_whose_file_is_made_shorter_costs_the_client_its_connection(server: ServerThread, memory: int) -> None:
    with VfioUserClient(server.context.socket_path) as client:
        client.dma_map(BASE, 4 * PAGE, memory)
        client.dma_map(BASE + 8 * PAGE, PAGE, memory)
        view, words = server.device.views[BASE], server.device.views[BASE].cast("I")
        view[0] = 1
        os.ftruncate(memory, PAGE)
        assert bytes(view[PAGE : PAGE + 4]) == bytes(4), "without a cure this is SIGBUS"
        words[-1] = 1
        view[PAGE - 2 : PAGE + 2] = b"both"
        assert os.pread(memory, PAGE, 0) == b"\1" + bytes(PAGE - 1), "and the rest of the region is cut off"
        with pytest.raises(VmbusError):
            client.device_info()
    server.wait_until(lambda: LOST in server.device.events)
    del view, words
    server.device.views.clear()
    os.ftruncate(memory, 4 * PAGE)
    with VfioUserClient(server.context.socket_path) as client:
        client.dma_map(BASE, 4 * PAGE, memory)
        device_writes(client, BASE, b"again")
        assert os.pread(memory, 5, 0) == b"again"


def test_a_bus_error_elsewhere_ends_the_process_as_ever() -> None:
    program = """
import mmap, os
from vmbus.transport import mapping
mapping._guard.install()
fd = os.memfd_create("x")
os.ftruncate(fd, 4096)
memory = mmap.mmap(fd, 4096)
os.ftruncate(fd, 0)
print(memory[0])
"""
    result = subprocess.run([sys.executable, "-c", program], timeout=pace.seconds(60))
    assert result.returncode == -signal.SIGBUS


@pytest.mark.parametrize("how", ["a range", "all", "hang up"])
def test_much_memory_is_taken_back_in_turns(server: ServerThread, memory: int, how: str) -> None:
    results: list[tuple[RunResult, int]] = []
    run = server.context.run

    def few() -> RunResult:
        result = run(max_requests=4)
        results.append((result, len(server.context.dma_regions)))
        return result

    with VfioUserClient(server.context.socket_path) as client:
        for number in range(11):
            client.dma_map(BASE + number * 2 * PAGE, PAGE, memory, number * PAGE)
        server.call(lambda: setattr(server.context, "run", few))
        if how == "a range":
            client.dma_unmap(0, 1 << 63)
        elif how == "all":
            client.dma_unmap_all()
        if how != "hang up":
            gone = sum(event[0] == "unmap" for event in server.device.events)
            assert gone == 11, "answered before the last was gone"
    server.wait_until(lambda: LOST in server.device.events)
    assert [left for result, left in results if result is RunResult.MORE][:2] == [7, 3]
    assert [event[1] for event in server.device.events if event[0] == "unmap"] == [
        BASE + number * 2 * PAGE for number in range(11)
    ]


# -- writing through the client ---------------------------------------------------------------------------------------


def write(server: ServerThread, iova: int, data: bytes) -> None:
    server.call(lambda: server.context.write_through_client(iova, data))


def test_writing_across_regions_in_pieces(server: ServerThread, memory: int) -> None:
    with VfioUserClient(server.context.socket_path, max_data_transfer=1000) as client, client.serving():
        client.dma_map(BASE, PAGE, memory, 2 * PAGE)
        client.dma_map(BASE + PAGE, PAGE, memory)
        data = os.urandom(5000)
        write(server, BASE + 3000, data)
        write(server, BASE + 7, b"")
        assert [(access.iova - BASE, access.size) for access in client.dma_accesses] == [
            (3000, 1000),
            (4000, 96),
            (4096, 1000),
            (5096, 1000),
            (6096, 1000),
            (7096, 904),
        ]
        assert os.pread(memory, 1096, 2 * PAGE + 3000) + os.pread(memory, 3904, 0) == data


def test_writing_memory_that_only_messages_reach(server: ServerThread, client: VfioUserClient, memory: int) -> None:
    client.dma_map(BASE, PAGE, memory, PAGE, send_fd=False)
    write(server, BASE + 8, b"there")
    assert os.pread(memory, 5, PAGE + 8) == b"there"


def test_writing_where_nothing_is(server: ServerThread, client: VfioUserClient, memory: int) -> None:
    client.dma_map(BASE, PAGE, memory)
    client.dma_map(BASE + 2 * PAGE, PAGE, memory, writable=False)
    with pytest.raises(AddressNotMapped, match="0x100001000"):
        write(server, BASE + PAGE - 4, b"too long")
    assert os.pread(memory, 4, PAGE - 4) == b"too "
    for iova in (BASE - 1, BASE + PAGE, 0):
        with pytest.raises(AddressNotMapped, match="no memory"):
            write(server, iova, b"x")
    with pytest.raises(AddressNotMapped, match="read-only"):
        write(server, BASE + 2 * PAGE, b"x")
    assert client.region_read(BAR0, 0, 4) == bytes(4)


def test_writing_while_the_client_has_a_request_in_flight(
    server: ServerThread, client: VfioUserClient, memory: int
) -> None:
    client.dma_map(BASE, PAGE, memory)

    def attempt() -> None:
        # On the server's thread, so that nothing takes the request meanwhile.
        client.region_write(BAR0, 0, b"post", posted=True)
        with pytest.raises(ClientBusy, match="in flight"):
            server.context.write_through_client(BASE, b"x")
        server.context.run()
        server.context.write_through_client(BASE, b"x")

    server.call(attempt)
    assert os.pread(memory, 1, 0) == b"x"
    assert client.region_read(BAR0, 0, 4) == b"post"


def test_writing_without_a_client(server: ServerThread) -> None:
    with pytest.raises(ClientGone, match="no client"):
        write(server, BASE, b"x")


def test_a_client_that_takes_no_data(server: ServerThread, memory: int) -> None:
    with VfioUserClient(server.context.socket_path, max_data_transfer=0) as client:
        client.dma_map(BASE, PAGE, memory)
        with pytest.raises(EnvironmentProblem, match="max_data_xfer_size 0"):
            write(server, BASE, b"x")


def test_a_client_that_refuses(server: ServerThread, client: VfioUserClient, memory: int) -> None:
    client.dma_map(BASE, PAGE, memory)
    write(server, BASE, b"one")
    client.refuse_dma = errno.ENODEV
    with pytest.raises(ClientRefused, match="bus mastering"):
        write(server, BASE, b"two")
    client.refuse_dma = 0
    write(server, BASE, b"three")
    assert os.pread(memory, 5, 0) == b"three"
    assert server.context.attached


@pytest.mark.parametrize("answer", ["none", "another request", "doubtful refusal", "hang up"])
def test_a_client_that_does_not_answer_properly(server: ServerThread, memory: int, answer: str) -> None:
    with VfioUserClient(server.context.socket_path) as client:
        client.dma_map(BASE, PAGE, memory)
        stale = server.device.views[BASE]

        def respond() -> None:
            if answer == "another request":
                access = protocol.REGION_ACCESS.pack(0, BAR0, 4) + b"late"
                client.send_raw(protocol.encode(9, Command.REGION_WRITE, access))
            elif answer == "doubtful refusal":  # the library gives the same errno for a lost stream
                client.refuse_dma = errno.EINVAL
                client.serve(5)
            elif answer == "hang up":
                client.close()

        def wait_and_respond() -> None:
            if client._readable(5):
                respond()

        waiter = threading.Thread(target=wait_and_respond)
        waiter.start()
        with pytest.raises(ClientGone):
            write(server, BASE, b"x")
        waiter.join()
    assert server.device.events[1:] == [("unmap", BASE, PAGE), LOST]
    stale[0] = 1
    assert os.pread(memory, 1, 0) == b"\0"
    assert not server.context.attached
    with VfioUserClient(server.context.socket_path) as client, client.serving():
        client.dma_map(BASE, PAGE, memory)
        write(server, BASE, b"again")
    assert os.pread(memory, 5, 0) == b"again"


def test_guest_memory_stays_mapped_when_the_file_is_gone(server: ServerThread, client: VfioUserClient) -> None:
    fd = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGE)
    ours = mmap.mmap(fd, PAGE)
    client.dma_map(BASE, PAGE, fd)
    os.close(fd)
    device_writes(client, BASE, b"device")
    assert ours[:6] == b"device"
