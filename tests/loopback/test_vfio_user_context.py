"""The device's side of the transport: requests, interrupts, resets, connections that go wrong."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from support import pace
from support.transport import (
    BROKEN,
    INTERRUPT,
    REFUSED,
    SHORT,
    STORE,
    RecordingDevice,
    ServerThread,
    serve,
)
from vmbus.device import pci
from vmbus.errors import UsageError
from vmbus.testkit.loopback.client import Disconnected, RemoteError, VfioUserClient
from vmbus.transport import bindings, protocol
from vmbus.transport.context import Context, ResetKind, RunResult
from vmbus.transport.library import Generation, Library
from vmbus.transport.protocol import Command

BAR0, CONFIG = bindings.REGION_BAR0, bindings.REGION_CONFIG
LOST = ("reset", ResetKind.LOST_CONNECTION)


@pytest.fixture
def server(libvfio_user: Library, tmp_path: Path) -> Iterator[ServerThread]:
    with serve(libvfio_user, tmp_path / "socket", handshake_timeout=0.3, message_timeout=0.3) as server:
        yield server


@pytest.fixture
def client(server: ServerThread) -> Iterator[VfioUserClient]:
    with VfioUserClient(server.context.socket_path) as client:
        yield client


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.ftruncate(fd, 8192)
    yield fd
    os.close(fd)


def raw_connection(server: ServerThread) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(os.fspath(server.context.socket_path))
    return connection


def hung_up(connection: socket.socket) -> bool:
    """Wait for the server to hang up; with data of ours unread it is a reset."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def assert_serves(server: ServerThread) -> None:
    """A new client gets through, and the server's thread is alive."""
    with VfioUserClient(server.context.socket_path) as client:
        client.region_write(BAR0, STORE, b"abcd")
        assert client.region_read(BAR0, STORE, 4) == b"abcd"


# -- requests ---------------------------------------------------------------------------------------------------------


def test_what_the_client_is_told(client: VfioUserClient, libvfio_user: Library) -> None:
    flags, regions, interrupts = client.device_info()
    assert (flags, interrupts) == (3, 5)  # a PCI device that can be reset
    assert regions == (10 if libvfio_user.generation is Generation.OLD else 9)
    sizes = [client.region_info(index).size for index in range(9)]
    assert sizes == [4096, 0, 0, 0, 0, 0, 0, 256, 0]
    assert client.region_info(BAR0).flags == client.region_info(CONFIG).flags == 3  # read and write, not mappable
    assert [client.irq_count(index) for index in range(5)] == [0, 1, 0, 0, 0]
    assert client.capabilities["max_data_xfer_size"] == 1 << 20


def posted(region: int, offset: int, data: bytes, flags: int = protocol.FLAG_NO_REPLY) -> bytes:
    body = protocol.REGION_ACCESS.pack(offset, region, len(data)) + data
    return protocol.encode(0, Command.REGION_WRITE, body, flags=flags)


def test_doorbells_go_past_the_library_and_all_else_through_it(libvfio_user: Library, tmp_path: Path) -> None:
    device = RecordingDevice()
    with (
        Context(libvfio_user, tmp_path / "socket", device) as context,
        socket.socket(socket.AF_UNIX) as connection,
    ):
        connection.connect(os.fspath(tmp_path / "socket"))
        connection.send(protocol.encode(0, Command.VERSION, protocol.version_body({})))
        while not context.attached:
            context.run()
        through: list[str] = []
        library = context._requests.library
        context._requests.library = lambda: through.append("a request") or library()  # type: ignore[method-assign,func-returns-value]
        written: list[tuple[int, bytes]] = []  # past the library, which has the device's own method
        write = device.bar0_write
        device.bar0_write = lambda offset, data: written.append((offset, data)) or write(offset, data)  # type: ignore[method-assign,func-returns-value]
        for number in range(100):
            connection.send(posted(BAR0, STORE, number.to_bytes(4, "little")))
        while context.run(max_requests=7) is not RunResult.IDLE:
            assert len(written) % 7 == 0 or len(written) == 100
        assert [data for _, data in written] == [number.to_bytes(4, "little") for number in range(100)]
        assert not through
        written.clear()
        others = [
            posted(BAR0, STORE, b"12345678"),  # other sizes
            posted(BAR0, STORE, b"1"),
            posted(CONFIG, 4, b"\0\0\0\0"),  # another region
            posted(BAR0, STORE, b"abcd", flags=0),  # one that is answered
        ]
        for other in others:
            through.clear()
            connection.send(posted(BAR0, STORE, bytes(4)) + other + posted(BAR0, STORE, b"last"))
            while context.run() is not RunResult.IDLE:
                pass
            assert through and bytes(device.store[STORE : STORE + 4]) == b"last"
        # Outside of the BAR: nobody hears of it, and the stream goes on. In pieces, too.
        before = len(written)
        for offset in (4096, 4094, 1 << 63, (1 << 64) - 1):
            connection.send(posted(BAR0, offset, b"away"))
        for piece in (posted(BAR0, STORE, b"torn")[:20], posted(BAR0, STORE, b"torn")[20:]):
            connection.send(piece)
            while context.run() is not RunResult.IDLE:
                pass
        assert written[before:] == [(STORE, b"torn")] and context.attached


def test_a_doorbell_that_fails_in_the_device_is_logged_and_the_next_one_is_heard(
    server: ServerThread, client: VfioUserClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "vmbus"):
        for register in (BROKEN, REFUSED, STORE):
            client.region_write(BAR0, register, b"next", posted=True)
        assert client.region_read(BAR0, STORE, 4) == b"next"
    assert "a defect of the device" in caplog.text and "refused register" in caplog.text


def test_configuration_accesses_arrive_unsplit(server: ServerThread, client: VfioUserClient) -> None:
    assert client.region_read(CONFIG, 0, 256) == pci.ConfigSpace().snapshot()
    client.region_write(CONFIG, 0x3F, b"\xff" * 16)  # from the header into the capability
    client.region_write(CONFIG, 0x05, b"\x04")
    assert server.device.config_accesses == [("read", 0, 256), ("write", 0x3F, 16), ("write", 0x05, 1)]
    assert client.region_read(CONFIG, pci.MSI_CONTROL, 2) == b"\x81\x00"
    assert client.region_read(CONFIG, pci.COMMAND, 2) == b"\x00\x04"
    with pytest.raises(RemoteError):
        client.region_read(CONFIG, 250, 10)


def test_what_fails_in_the_device_is_an_error_for_the_client_alone(
    server: ServerThread, client: VfioUserClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Defects are logged, and refusals only for debugging."""
    for register in (REFUSED, BROKEN):
        with pytest.raises(RemoteError) as caught:
            client.region_read(BAR0, register, 4)
        assert caught.value.errno == errno.EINVAL and client.region_read(BAR0, STORE, 4) == bytes(4)
    ours = [record for record in caplog.records if record.name == "vmbus.transport.callbacks"]
    assert [r.getMessage() for r in ours if r.levelno == logging.ERROR] == [
        "BAR0 access of 4 bytes at 0x204 failed in the device"
    ]
    assert "a defect of the device" in caplog.text
    with pytest.raises(RemoteError):
        client.region_read(BAR0, SHORT, 4)
    for register in (REFUSED, BROKEN):
        with pytest.raises(RemoteError):
            client.region_write(BAR0, register, bytes(4))
    assert client.region_read(BAR0, STORE, 4) == bytes(4) and server.context.attached


def test_what_is_no_exception_leaves_run(libvfio_user: Library, tmp_path: Path) -> None:
    class Interrupted(RecordingDevice):
        def bar0_read(self, offset: int, size: int) -> bytes:
            raise KeyboardInterrupt

    with Context(libvfio_user, tmp_path / "socket", Interrupted()) as context:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(os.fspath(tmp_path / "socket"))
        connection.send(protocol.encode(0, Command.VERSION, protocol.version_body({})))
        assert context.attach()
        connection.send(protocol.encode(1, Command.REGION_READ, protocol.REGION_ACCESS.pack(0, BAR0, 4)))
        with pytest.raises(KeyboardInterrupt):
            context.run()
        assert context.run() is RunResult.IDLE
        connection.close()
        assert context.run() is RunResult.DISCONNECTED


def test_the_batch_is_bounded(libvfio_user: Library, tmp_path: Path) -> None:
    with (
        Context(libvfio_user, tmp_path / "socket", RecordingDevice()) as context,
        socket.socket(socket.AF_UNIX) as connection,
    ):
        connection.connect(os.fspath(tmp_path / "socket"))
        # The whole conversation is there before the server looks for the first time.
        read = protocol.REGION_ACCESS.pack(0, BAR0, 4)
        connection.send(protocol.encode(0, Command.VERSION, protocol.version_body({})))
        for number in range(10):
            connection.send(protocol.encode(number, Command.REGION_READ, read))
        assert context.run() is RunResult.MORE
        assert context.attached
        assert context.run(max_requests=4) is RunResult.MORE
        assert context.run(max_requests=6) is RunResult.MORE
        assert context.run(max_requests=6) is RunResult.IDLE
        version = connection.recv(8, socket.MSG_PEEK)
        connection.recv(int.from_bytes(version[4:8], "little"))
        assert len(connection.recv(4096)) == 10 * (16 + 16 + 4)


# -- interrupts and resets --------------------------------------------------------------------------------------------


def test_interrupts(server: ServerThread, client: VfioUserClient) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    assert server.call(server.context.trigger) is False  # nobody has asked for it yet
    client.set_eventfds(bindings.IRQ_MSI, [fd])
    assert server.call(server.context.trigger) is True
    assert os.eventfd_read(fd) == 1
    client.region_write(BAR0, INTERRUPT, b"\1\0\0\0")  # from within a callback
    assert os.eventfd_read(fd) == 1
    client.disable_irqs(bindings.IRQ_MSI)
    assert server.call(server.context.trigger) is False
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd)
    with pytest.raises(UsageError):
        server.call(lambda: server.context.trigger(1))
    os.close(fd)


@pytest.mark.parametrize("kind", [bindings.IRQ_INTX, bindings.IRQ_MSIX, bindings.IRQ_ERR, bindings.IRQ_REQ])
def test_other_interrupts_cannot_take_the_vectors_place(
    server: ServerThread, client: VfioUserClient, kind: int
) -> None:
    ours, other = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    client.set_eventfds(bindings.IRQ_MSI, [ours])
    with pytest.raises(RemoteError):
        client.set_eventfds(kind, [other])
    assert server.call(server.context.trigger) is True
    assert os.eventfd_read(ours) == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(other)
    os.close(ours)
    os.close(other)


def test_a_device_reset_leaves_memory_and_interrupts(server: ServerThread, client: VfioUserClient, memory: int) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    client.set_eventfds(bindings.IRQ_MSI, [fd])
    client.dma_map(0x10000, 4096, memory)
    client.reset()
    assert server.device.events == [("map", 0x10000, 4096, True), ("reset", ResetKind.DEVICE)]
    assert server.call(server.context.trigger) is True
    assert list(server.device.views) == [0x10000]
    os.close(fd)


def test_a_failing_reset_is_an_error_for_the_client(server: ServerThread, client: VfioUserClient) -> None:
    server.device.fail_in = {"reset"}
    with pytest.raises(RemoteError):
        client.reset()
    assert client.region_read(BAR0, STORE, 4) == bytes(4)
    server.device.fail_in = set()
    client.reset()


def test_driving_the_transport_from_a_callback_is_refused(libvfio_user: Library, tmp_path: Path) -> None:
    refused: list[str] = []

    class Nesting(RecordingDevice):
        def bar0_read(self, offset: int, size: int) -> bytes:
            assert self.context is not None
            for call in (
                self.context.run,
                self.context.attach,
                self.context.close,
                partial(self.context.write_through_client, 0, b"x"),
            ):
                try:
                    call()
                except UsageError as error:
                    refused.append(str(error))
            return bytes(size)

    server = ServerThread(libvfio_user, tmp_path / "socket", Nesting())
    with VfioUserClient(tmp_path / "socket") as client:
        assert client.region_read(BAR0, 0, 4) == bytes(4)
    assert len(refused) == 4
    server.stop()


# -- connections ------------------------------------------------------------------------------------------------------


def test_losing_the_client(server: ServerThread, memory: int) -> None:
    with VfioUserClient(server.context.socket_path) as client:
        client.dma_map(0x20000, 4096, memory)
        client.dma_map(0x10000, 4096, memory, 4096)
    server.wait_until(lambda: LOST in server.device.events)
    events = server.device.events[2:]
    assert sorted(events[:2]) == [("unmap", 0x10000, 4096), ("unmap", 0x20000, 4096)]
    assert events[2:] == [LOST]
    assert not server.context.attached
    assert_serves(server)
    server.wait_until(lambda: not server.context.attached)
    assert server.device.events[5:] == [LOST]
    assert server.results == [RunResult.DISCONNECTED] * 2


def test_closing_under_a_client(libvfio_user: Library, tmp_path: Path, memory: int) -> None:
    with serve(libvfio_user, tmp_path / "socket") as server:
        client = VfioUserClient(tmp_path / "socket")
        client.dma_map(0x10000, 4096, memory)
        view = server.device.views[0x10000]
    assert server.device.events[1:] == [("unmap", 0x10000, 4096), LOST]
    view[0] = 1
    assert os.pread(memory, 1, 0) == b"\0"
    assert not (tmp_path / "socket").exists()
    with pytest.raises(Disconnected):
        client.device_info()
    server.context.close()
    with pytest.raises(UsageError, match="closed"):
        server.context.run()
    client.close()


def test_defects_in_memory_callbacks_change_nothing_for_the_client(
    server: ServerThread, client: VfioUserClient, memory: int
) -> None:
    server.device.fail_in = {"dma_map", "dma_unmap", "reset"}
    client.dma_map(0x10000, 4096, memory)
    stale = server.device.views[0x10000]
    client.dma_unmap(0x10000, 4096)
    stale[0] = 1  # revoked although the device's callback failed
    assert os.pread(memory, 1, 0) == b"\0"
    client.close()
    server.wait_until(lambda: LOST in server.device.events)
    assert_serves(server)


def test_a_second_client_waits_for_the_first_to_leave(server: ServerThread) -> None:
    first = VfioUserClient(server.context.socket_path)
    second = raw_connection(server)
    second.send(protocol.encode(0, Command.VERSION, protocol.version_body({})))
    assert first.region_read(BAR0, STORE, 4) == bytes(4)
    second.settimeout(0.05)
    before = server.wakeups
    with pytest.raises(TimeoutError):
        second.recv(16)
    assert server.wakeups - before < 5  # the one in the queue does not keep the event loop busy
    first.close()
    second.settimeout(10)
    assert second.recv(16)[:4] == struct.pack("<HH", 0, Command.VERSION)
    second.close()


def test_a_silent_client_delays_nobody_and_is_dropped(server: ServerThread, caplog: pytest.LogCaptureFixture) -> None:
    silent = raw_connection(server)
    server.wait_until(lambda: len(server.context._doorway.pending) == 1)
    assert_serves(server)  # it attaches while the other one stays silent, who is then dropped
    silent.close()
    silent = raw_connection(server)
    server.wait_until(lambda: len(server.context._doorway.pending) == 1)
    before, started = server.wakeups, time.monotonic()
    assert hung_up(silent)
    assert 0.1 < time.monotonic() - started < pace.seconds(5)
    assert server.wakeups - before < 10
    assert "no complete VERSION message within 0.3 s" in caplog.text
    assert_serves(server)
    silent.close()


@pytest.mark.parametrize("length", [1, 15, 16, 20])
def test_half_a_version_message(server: ServerThread, length: int, caplog: pytest.LogCaptureFixture) -> None:
    message = protocol.encode(0, Command.VERSION, protocol.version_body({}))
    with contextlib.closing(raw_connection(server)) as half:
        half.send(message[:length])
        assert hung_up(half)
    assert "no complete VERSION message" in caplog.text
    assert_serves(server)


@pytest.mark.parametrize(
    "message",
    [
        b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n",
        bytes(16),
        protocol.encode(0, Command.VERSION, bytes(1 << 17)),
        protocol.encode(0, Command.RESET, b""),
        protocol.encode(0, Command.VERSION, b""),
        protocol.encode(0, Command.VERSION, protocol.VERSION_PREFIX.pack(0, 0) + b"{]\0"),
        protocol.encode(0, Command.VERSION, protocol.VERSION_PREFIX.pack(0, 0) + b"{}"),
    ],
)
def test_nonsense_for_a_version_message(server: ServerThread, message: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(raw_connection(server)) as connection, contextlib.suppress(OSError):
        connection.sendall(message)
        while connection.recv(4096):
            pass
    server.wait_until(lambda: "dropped" in caplog.text)
    assert_serves(server)


def test_a_refused_version_is_answered(server: ServerThread) -> None:
    with contextlib.closing(raw_connection(server)) as connection:
        connection.send(protocol.encode(7, Command.VERSION, protocol.version_body({}, major=1)))
        message_id, command, _, flags, error = protocol.HEADER.unpack(connection.recv(16))
        assert (message_id, command, flags, error) == (7, Command.VERSION, 0x21, errno.EINVAL)
        assert hung_up(connection)
    assert_serves(server)


def test_leaving_before_the_version_message(server: ServerThread, caplog: pytest.LogCaptureFixture) -> None:
    raw_connection(server).close()
    server.wait_until(lambda: "left before" in caplog.text)
    assert_serves(server)
    assert server.device.events in ([], [LOST])  # a client that never attached is nothing to the device


def test_a_message_in_pieces(server: ServerThread, client: VfioUserClient) -> None:
    body = protocol.REGION_ACCESS.pack(STORE, BAR0, 4) + b"abcd"
    message = protocol.encode(99, Command.REGION_WRITE, body, flags=protocol.FLAG_NO_REPLY)
    for index in range(len(message)):
        client.send_raw(message[index : index + 1])
        server.call(lambda: None)
    assert client.region_read(BAR0, STORE, 4) == b"abcd"
    assert server.context.attached


@pytest.mark.parametrize("length", [3, 16, 30])
def test_a_message_whose_rest_does_not_come(
    server: ServerThread, client: VfioUserClient, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    body = protocol.REGION_ACCESS.pack(STORE, BAR0, 4) + b"abcd"
    client.send_raw(protocol.encode(99, Command.REGION_WRITE, body)[:length])
    server.call(lambda: None)
    before = server.wakeups
    server.call(lambda: None)  # the server is not blocked
    with pytest.raises(Disconnected):
        client._read(1, "the end")
    assert server.wakeups - before < 10
    assert "the rest of a message did not come within 0.3 s" in caplog.text
    server.wait_until(lambda: server.device.events == [LOST])
    assert_serves(server)


@pytest.mark.parametrize(
    "message",
    [
        b"\xff" * 64,
        bytes(64),
        protocol.encode(5, Command.DMA_WRITE, bytes(16), flags=protocol.TYPE_REPLY),
        struct.pack("<HHIII", 5, Command.REGION_WRITE, (1 << 20) + 33, 0, 0),
    ],
)
def test_nonsense_ends_the_connection_and_not_the_server(
    server: ServerThread, client: VfioUserClient, message: bytes
) -> None:
    client.send_raw(message)
    with pytest.raises(Disconnected):
        client._read(1, "the end")
    server.wait_until(lambda: server.device.events == [LOST])
    assert_serves(server)


def test_unknown_and_empty_commands_are_refused_and_the_stream_goes_on(client: VfioUserClient) -> None:
    for command in (Command.VERSION, 14 + 1, 200, Command.DMA_READ):
        with pytest.raises(RemoteError):
            client.request(command, bytes(64))
        with pytest.raises(RemoteError):
            client.request(command)
    assert client.region_read(BAR0, STORE, 4) == bytes(4)


def test_nothing_leaks_over_many_connections(server: ServerThread, memory: int) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (procfs)

    counts = []
    for number in range(12):
        with VfioUserClient(server.context.socket_path) as client:
            client.dma_map(0x10000, 4096, memory)
            client.set_eventfds(bindings.IRQ_MSI, [memory])
        server.wait_until(lambda number=number: len(server.results) == number + 1)  # type: ignore[misc]
        counts.append(descriptors())
    assert len(set(counts[2:])) == 1


def test_unmapping_what_is_not_mapped_is_only_for_debugging(
    client: VfioUserClient, caplog: pytest.LogCaptureFixture
) -> None:
    # QEMU does this whenever the guest switches its IOMMU address space.
    with pytest.raises(RemoteError) as caught:
        client.dma_unmap(0x12345000, 4096)
    assert caught.value.errno == errno.ENOENT
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    with pytest.raises(RemoteError):
        client.request(200, bytes(4))
    assert [r.name for r in caplog.records if r.levelno == logging.ERROR][:1] == [
        "vmbus.transport.library_context.library"
    ]


def _connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(os.fspath(path))
    return client


def test_a_crowd_keeps_nobody_busy(libvfio_user: Library, tmp_path: Path) -> None:
    """More silent clients than may wait: the rest stays in the socket's queue, and wakes nobody."""
    with serve(libvfio_user, tmp_path / "socket", handshake_timeout=30) as server:
        crowd = [_connect(tmp_path / "socket") for _ in range(11)]
        server.wait_until(lambda: len(server.context._doorway.pending) == 8)
        before = server.wakeups
        for _ in range(100):
            server.call(lambda: None)
        assert server.wakeups - before < 150, "woken by nothing but the calls"
        for client in crowd:
            client.close()
        with VfioUserClient(tmp_path / "socket") as client:
            client.device_info()


def test_clients_that_fail_are_let_in_at_a_bounded_rate(libvfio_user: Library, tmp_path: Path) -> None:
    with serve(libvfio_user, tmp_path / "socket") as server:
        accepted: list[float] = []
        accept = server.context._listener.accept

        def counted() -> socket.socket | None:
            client = accept()
            if client is not None:
                accepted.append(time.monotonic())
            return client

        server.call(lambda: setattr(server.context._listener, "accept", counted))
        for _ in range(40):
            _connect(tmp_path / "socket").close()
        server.wait_until(lambda: len(accepted) == 40)
        assert all(later - earlier > 0.09 for earlier, later in zip(accepted, accepted[8:], strict=False))
        with VfioUserClient(tmp_path / "socket") as client:
            client.device_info()


@pytest.mark.parametrize("where", ["accept", "create"])
def test_without_a_descriptor_left_the_server_lives(
    libvfio_user: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with serve(libvfio_user, tmp_path / "socket") as server:
        failures = 0

        def fail() -> NoReturn:
            nonlocal failures
            failures += 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        owner, name = (server.context._listener, "accept") if where == "accept" else (server.context, "_create")
        if where == "create":
            with VfioUserClient(tmp_path / "socket") as client:
                client.device_info()
                monkeypatch.setattr(owner, name, fail)
        else:
            server.call(lambda: monkeypatch.setattr(owner, name, fail))
        waiting = _connect(tmp_path / "socket")
        waiting.sendall(b"\0" * 4)
        server.wait_until(lambda: failures >= 1)
        waiting.close()
        server.call(monkeypatch.undo)
        with VfioUserClient(tmp_path / "socket") as client:
            client.device_info()
