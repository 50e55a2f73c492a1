"""The guest's block service between a real device server and a client that speaks nbd as the kernel does."""

from __future__ import annotations

import errno
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.disk import Fault, FaultyBackend
from vmbus import providers
from vmbus.errors import WaitTimeout
from vmbus.loopback.harness import LoopbackServer, describe
from vmbus.providers.block import BlockProvider
from vmbus.providers.disk.backend import Backend
from vmbus.providers.disk.image import Image
from vmbus.vfio_user.library import Library
from vmbus.wire.block import Disk, Feature
from vmbus_guest import nbd
from vmbus_guest.services.block import BlockService
from vmbus_guest.testdrivers import CATALOGUE
from vmbus_guest.testdrivers.context import Context

pytestmark = pytest.mark.loopback

MIB = 1 << 20
SIZE = 8 * MIB
OPTIONS: dict[str, Any] = {"image": "disk.img", "size_mib": 8, "create": True}
DESCRIPTION = describe("block", "echo", block=OPTIONS)
OFFER = msgspec.to_builtins(DESCRIPTION.providers[0])


class Kernel:
    """Implements Attached, and is the kernel behind it: asks, and keeps what is answered."""

    path = "/dev/none"

    def __init__(self) -> None:
        self.socket, self._ours = socket.socketpair()
        self._ours.settimeout(20)
        self.answers: dict[int, tuple[int, bytes]] = {}
        self._lengths: dict[int, int] = {}
        self._next = 1
        self._condition = threading.Condition()
        self.closed = False
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        file = self._ours.makefile("rb")
        try:
            while len(head := file.read(nbd.REPLY.size)) == nbd.REPLY.size:
                magic, error, handle = nbd.REPLY.unpack(head)
                assert magic == nbd.REPLY_MAGIC
                data = b"" if error else file.read(self._lengths[handle])
                with self._condition:
                    assert handle not in self.answers, "answered twice"
                    self.answers[handle] = (error, data)
                    self._condition.notify_all()
        except (OSError, ValueError):
            return

    def ask(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"") -> int:
        """Send a request; returns its handle."""
        handle, self._next = self._next, self._next + 1
        self._lengths[handle] = length if kind == nbd.READ else 0
        self._ours.sendall(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, kind, handle, offset, length) + data)
        return handle

    def write(self, offset: int, data: bytes, flags: int = 0) -> int:
        return self.ask(nbd.WRITE | flags, offset, len(data), data)

    def wait(self, *handles: int, seconds: float = 20.0) -> list[tuple[int, bytes]]:
        with self._condition:
            if not self._condition.wait_for(lambda: all(one in self.answers for one in handles), seconds):
                raise WaitTimeout(f"answers to {[one for one in handles if one not in self.answers]}", seconds)
            return [self.answers[one] for one in handles]

    def close(self) -> None:
        self.closed = True
        self.socket.close()
        self._ours.close()


class Run:
    """The service, running on a thread against a server."""

    def __init__(self, server: LoopbackServer, monkeypatch: pytest.MonkeyPatch, **parameters: Any) -> None:
        self.server = server
        self.kernels: list[Kernel] = []
        self.disks: list[Disk] = []

        def attach(number: int, disk: Disk) -> Kernel:
            self.disks.append(disk)
            self.kernels.append(Kernel())
            return self.kernels[-1]

        monkeypatch.setattr(BlockService, "attach", staticmethod(attach))
        self.context = Context({"services": [{"service": "block", **parameters}]}, server.function)
        self.result: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        until(lambda: bool(self.kernels), "the service to attach a device")
        self.kernel = self.kernels[0]

    def _run(self) -> None:
        self.result = CATALOGUE["services"].load()(self.context)

    def stop(self) -> dict[str, Any]:
        self.context.stop_requested = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        for kernel in self.kernels:
            assert kernel.closed
        return dict(self.result["services"][0])


def until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise WaitTimeout(what, seconds)
        time.sleep(0.002)


def pattern(length: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(length)


@pytest.fixture(autouse=True)
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMBUS_DISKS", str(tmp_path / "disks"))
    return tmp_path / "disks"


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[Fault]:
    faults: list[Fault] = []

    class Faulty(BlockProvider):
        def make_backend(self, image: Image) -> Backend:
            return FaultyBackend(image.backend, faults)

    monkeypatch.setitem(providers.PROVIDERS, "block", Faulty)
    return faults


@pytest.fixture
def server(libvfio_user: Library, faults: list[Fault]) -> Iterator[LoopbackServer]:
    with LoopbackServer(DESCRIPTION, libvfio_user) as server:
        yield server


def test_what_the_kernel_asks_for_is_done(server: LoopbackServer, monkeypatch: pytest.MonkeyPatch, disks: Path) -> None:
    run = Run(server, monkeypatch)
    kernel = run.kernel
    data = pattern(300_032, 1)
    assert kernel.wait(kernel.write(4096, data, nbd.COMMAND_FLAG_FUA)) == [(0, b"")]
    (error, found), *_ = kernel.wait(kernel.ask(nbd.READ, 4096, len(data)))
    same = found == data
    assert not error and same
    assert kernel.wait(kernel.ask(nbd.FLUSH)) == [(0, b"")]
    assert kernel.wait(kernel.ask(nbd.TRIM, 4 * MIB, MIB)) == [(0, b"")]
    zeroes = [
        kernel.ask(nbd.WRITE_ZEROES, 4096, 8192),
        kernel.ask(nbd.WRITE_ZEROES | nbd.COMMAND_FLAG_NO_HOLE | nbd.COMMAND_FLAG_FUA, 20480, 4096),
    ]
    assert kernel.wait(*zeroes) == [(0, b""), (0, b"")]
    expected = bytearray(data)
    expected[0:8192] = bytes(8192)
    expected[16384:20480] = bytes(4096)
    same = (disks / "disk.img").read_bytes()[4096 : 4096 + len(data)] == bytes(expected)
    assert same
    # What makes no sense is refused, and hurts nobody.
    assert kernel.wait(kernel.ask(9))[0][0] == errno.EOPNOTSUPP
    assert kernel.wait(kernel.ask(nbd.READ, SIZE, 4096))[0][0] == errno.EIO
    assert kernel.wait(kernel.write(SIZE - 512, bytes(1024)))[0][0] == errno.EIO
    assert kernel.wait(kernel.ask(nbd.READ, 0, 0))[0][0] == errno.EINVAL
    assert kernel.wait(kernel.ask(nbd.READ, 0, 64 * MIB))[0][0] == errno.ENOMEM
    result = run.stop()
    assert result["verdict"] == "passed" and result["errors"] == 5, result


@pytest.mark.parametrize("buffer_mib", [1, 4])
def test_large_requests_and_many_of_them(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch, buffer_mib: int
) -> None:
    """Longer than one packet may be, more than there is memory for, written while others are read."""
    run = Run(server, monkeypatch, buffer_mib=buffer_mib)
    kernel = run.kernel
    model = pattern(SIZE, 2)
    for offset in range(0, SIZE, 2 * MIB):
        assert kernel.wait(kernel.write(offset, model[offset : offset + 2 * MIB])) == [(0, b"")]
    choose = random.Random(3)
    asked: list[tuple[int, int, int]] = []

    def reads() -> None:
        for _ in range(150):
            length = 4096 * choose.choice([1, 1, 4, 64, 256])
            offset = 4096 * choose.randrange((SIZE // 2 - length) // 4096)
            asked.append((kernel.ask(nbd.READ, offset, length), offset, length))
            if choose.random() < 0.3:
                at = SIZE // 2 + 4096 * choose.randrange(100)
                asked.append((kernel.write(at, model[at : at + 300_032]), 0, 0))

    reads()
    for handle, offset, length in asked:
        ((error, data),) = kernel.wait(handle)
        same = data == model[offset : offset + length]
        assert not error and same
    result = run.stop()
    assert result["errors"] == 0 and result["in_flight"] == 0


def test_errors_reach_the_kernel(server: LoopbackServer, monkeypatch: pytest.MonkeyPatch, faults: list[Fault]) -> None:
    run = Run(server, monkeypatch)
    kernel = run.kernel
    faults += [Fault("write", errno.ENOSPC), Fault("read", errno.EIO)]
    assert kernel.wait(kernel.write(0, bytes(4096))) == [(errno.ENOSPC, b"")]
    assert kernel.wait(kernel.ask(nbd.READ, 0, 4096)) == [(errno.EIO, b"")]
    # One piece of a long request fails: all of it does.
    faults.append(Fault("write", errno.EIO))
    assert kernel.wait(kernel.write(0, bytes(3 * MIB))) == [(errno.EIO, b"")]
    assert kernel.wait(kernel.write(0, bytes(3 * MIB))) == [(0, b"")]
    assert run.stop()["errors"] == 3


def test_a_read_only_disk(libvfio_user: Library, monkeypatch: pytest.MonkeyPatch, disks: Path) -> None:
    disks.mkdir()
    content = pattern(MIB, 4)
    (disks / "disk.img").write_bytes(content)
    description = describe("block", "echo", block={"image": "disk.img", "read_only": True})
    # Two VMs may read one image.
    with LoopbackServer(description, libvfio_user), LoopbackServer(description, libvfio_user) as server:
        run = Run(server, monkeypatch)
        assert run.disks[0].features & Feature.READ_ONLY and run.disks[0].size == MIB
        kernel = run.kernel
        assert kernel.wait(kernel.ask(nbd.READ, 4096, 4096)) == [(0, content[4096:8192])]
        for asked in (
            kernel.write(0, bytes(4096)),
            kernel.ask(nbd.TRIM, 0, 4096),
            kernel.ask(nbd.WRITE_ZEROES, 0, 4096),
        ):
            assert kernel.wait(asked)[0][0]
        run.stop()
    same = (disks / "disk.img").read_bytes() == content
    assert same, "a read-only disk was written to"


def test_requests_wait_for_a_disk_that_was_withdrawn_and_are_sent_again(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch, faults: list[Fault]
) -> None:
    run = Run(server, monkeypatch)
    kernel = run.kernel
    model = bytearray(SIZE)
    for number in range(4):
        hung = Fault("write", hang=True)
        faults.append(hung)
        data = pattern(8192, number)
        model[number * 8192 : number * 8192 + 8192] = data
        first = kernel.write(number * 8192, data)
        assert hung.begun.wait(10)
        rescind = threading.Thread(target=lambda: server.command("rescind", name="block"))
        rescind.start()
        time.sleep(0.02)
        hung.go.set()
        rescind.join(10)
        waiting = []
        for part in range(20):
            at = MIB + part * 4096
            data = pattern(4096, number * 100 + part)
            model[at : at + 4096] = data
            waiting.append(kernel.write(at, data))
        waiting.append(kernel.ask(nbd.FLUSH))
        time.sleep(0.05)
        assert not any(one in kernel.answers for one in waiting)
        server.command("offer", provider=OFFER)
        assert kernel.wait(first, *waiting) == [(0, b"")] * 22
    for offset in range(0, SIZE, MIB):
        ((_, data),) = kernel.wait(kernel.ask(nbd.READ, offset, MIB))
        same = data == bytes(model[offset : offset + MIB])
        assert same
    result = run.stop()
    assert result["reopened"] == 4 and result["resent"] >= 80 and result["errors"] == 0, result
    assert len(run.kernels) == 1


def test_a_disk_that_stays_away_makes_requests_fail_until_it_is_back(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(server, monkeypatch, wait_seconds=0.3)
    kernel = run.kernel
    server.command("rescind", name="block")
    waiting = [kernel.write(0, bytes(4096)), kernel.ask(nbd.READ, 0, 4096), kernel.ask(nbd.FLUSH)]
    started = time.monotonic()
    assert kernel.wait(*waiting) == [(errno.EIO, b"")] * 3
    assert time.monotonic() - started > 0.2
    assert kernel.wait(kernel.write(0, bytes(3 * MIB))) == [(errno.EIO, b"")]
    server.command("offer", provider=OFFER)
    deadline = time.monotonic() + 10
    while kernel.wait(kernel.ask(nbd.READ, 0, 4096))[0][0]:
        assert time.monotonic() < deadline
    assert kernel.wait(kernel.write(0, bytes(4096))) == [(0, b"")]
    run.stop()


def test_another_disk_in_its_place_is_not_touched(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch, disks: Path
) -> None:
    run = Run(server, monkeypatch)
    kernel = run.kernel
    server.command("rescind", name="block")
    waiting = kernel.write(0, b"mine" * 1024)
    other = OFFER | {"options": OPTIONS | {"image": "other.img", "size_mib": 4}}
    server.command("offer", provider=other)
    assert kernel.wait(waiting) == [(errno.EIO, b"")]
    assert kernel.wait(kernel.write(0, b"mine" * 1024)) == [(errno.EIO, b"")]
    assert not any((disks / "other.img").read_bytes())
    result = run.stop()
    assert result["verdict"] == "failed" and "its size was 8388608 and is 4194304" in result["foreign"]


def test_a_kernel_that_talks_nonsense_is_left(server: LoopbackServer, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(server, monkeypatch)
    run.kernel._ours.sendall(bytes(nbd.REQUEST.size))
    time.sleep(0.05)
    result = run.stop()
    assert result["verdict"] == "failed" and "begins with 0x0" in result["trouble"][0]


def test_a_stop_serves_what_was_asked_for(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch, faults: list[Fault]
) -> None:
    run = Run(server, monkeypatch)
    hung = Fault("write", hang=True)
    faults.append(hung)
    handle = run.kernel.write(0, pattern(4096, 1))
    assert hung.begun.wait(10)
    timer = threading.Timer(0.3, hung.go.set)
    timer.start()
    answers = run.kernel.answers
    result = run.stop()
    timer.join()
    until(lambda: handle in answers, "the last answer")
    assert answers[handle] == (0, b"") and result["verdict"] == "passed"
