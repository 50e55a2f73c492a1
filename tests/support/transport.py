"""A device that records what the transport asks of it, served on a thread or in a process of its own."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from support import pace
from vmbus.device.pci import ConfigSpace
from vmbus.transport.context import Context, DeviceAccessError, ResetKind, RunResult
from vmbus.transport.library import Library

# Registers of the recording device.
STORE = 0x000  # 64 bytes that keep what is written
ADDRESS = 0x100  # 8 bytes: I/O address for the commands below
VALUE = 0x108  # write: store these bytes at ADDRESS in guest memory; read: load them
INTERRUPT = 0x110  # write: raise the interrupt
REFUSED = 0x200  # any access: refused
BROKEN = 0x204  # any access: the device has a defect
SHORT = 0x208  # read: the device gives too little


class RecordingDevice:
    """Implements DeviceHandler; `events` has everything but register accesses."""

    def __init__(self) -> None:
        self.config = ConfigSpace()
        self.events: list[tuple[Any, ...]] = []
        self.config_accesses: list[tuple[str, int, int]] = []
        self.views: dict[int, memoryview] = {}
        self.store = bytearray(64)
        self.address = 0
        self.fail_in: set[str] = set()
        self.context: Context | None = None

    def _view(self, size: int) -> memoryview:
        for iova, view in self.views.items():
            if iova <= self.address and self.address + size <= iova + len(view):
                return view[self.address - iova : self.address - iova + size]
        raise DeviceAccessError(f"no memory at {self.address:#x}")

    def bar0_read(self, offset: int, size: int) -> bytes:
        if offset == REFUSED:
            raise DeviceAccessError("refused register")
        if offset == BROKEN:
            raise RuntimeError("a defect of the device")
        if offset == SHORT:
            return b""
        if offset == VALUE:
            return bytes(self._view(size))
        return bytes(self.store[offset : offset + size])

    def bar0_write(self, offset: int, data: bytes) -> None:
        if offset == REFUSED:
            raise DeviceAccessError("refused register")
        if offset == BROKEN:
            raise RuntimeError("a defect of the device")
        if offset == ADDRESS:
            self.address = int.from_bytes(data, "little")
        elif offset == VALUE:
            self._view(len(data))[:] = data
        elif offset == INTERRUPT:
            assert self.context is not None
            self.events.append(("trigger", self.context.trigger()))
        else:
            self.store[offset : offset + len(data)] = data

    def config_read(self, offset: int, size: int) -> bytes:
        self.config_accesses.append(("read", offset, size))
        return self.config.read(offset, size)

    def config_write(self, offset: int, data: bytes) -> None:
        self.config_accesses.append(("write", offset, len(data)))
        self.config.write(offset, data)

    def dma_map(self, iova: int, view: memoryview, writable: bool) -> None:
        self.events.append(("map", iova, len(view), writable))
        self.views[iova] = view
        self._maybe_fail("dma_map")

    def dma_map_unreachable(self, iova: int, size: int) -> None:
        self.events.append(("unreachable", iova, size))

    def dma_unmap(self, iova: int, size: int) -> None:
        self.events.append(("unmap", iova, size))
        self.views.pop(iova, None)
        self._maybe_fail("dma_unmap")

    def reset(self, kind: ResetKind) -> None:
        self.events.append(("reset", kind))
        self._maybe_fail("reset")

    def _maybe_fail(self, what: str) -> None:
        if what in self.fail_in:
            raise RuntimeError(f"a defect in {what}")


class ServerThread:
    """Runs a Context on a thread; `call` runs a function there, between requests."""

    def __init__(self, library: Library, path: Path, device: RecordingDevice, **options: Any) -> None:
        self.device = device
        self.context = Context(library, path, device, **options)
        device.context = self.context
        self.failure: BaseException | None = None
        self.results: list[RunResult] = []
        self.wakeups = 0
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._stop = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._loop, name="device server", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        try:
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            poll.register(self.context.poll_fd(), select.POLLIN)
            while not self._stop:
                ready = [fd for fd, _ in poll.poll()]
                self.wakeups += 1
                if self._wake in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                    while self._calls:
                        function, future = self._calls.pop(0)
                        try:
                            future.set_result(function())
                        except BaseException as error:
                            future.set_exception(error)
                if self.context.poll_fd() in ready:
                    result = self.context.run()
                    if result is RunResult.DISCONNECTED:
                        self.results.append(result)
        except BaseException as error:
            self.failure = error

    def call(self, function: Callable[[], Any], timeout: float = 10.0) -> Any:
        future: Future[Any] = Future()
        self._calls.append((function, future))
        os.eventfd_write(self._wake, 1)
        return future.result(timeout)

    def wait_until(self, condition: Callable[[], bool], timeout: float = 10.0) -> None:
        """Wait until `condition`, evaluated on the server's thread, is true."""
        pace.until(lambda: self.call(condition), "the condition to become true", timeout)

    def stop(self) -> None:
        self._stop = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(pace.seconds(10))
        assert not self._thread.is_alive(), "the server thread hangs"
        os.close(self._wake)
        self.context.close()
        if self.failure is not None:
            raise self.failure


@contextlib.contextmanager
def serve(library: Library, path: Path, **options: Any) -> Iterator[ServerThread]:
    server = ServerThread(library, path, RecordingDevice(), **options)
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def serve_in_process(library: Path, path: Path) -> Iterator[subprocess.Popen[str]]:
    """The same device in a process of its own; its standard output is one line when it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "support.transport", os.fspath(library), os.fspath(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        yield process
    finally:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # tells it to end
        try:
            process.wait(pace.seconds(10))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def _main() -> None:
    from vmbus.transport.library import load

    device = RecordingDevice()
    with Context(load(Path(sys.argv[1])), Path(sys.argv[2]), device) as context:
        device.context = context
        print("listening", flush=True)
        poll = select.poll()
        poll.register(context.poll_fd(), select.POLLIN)
        poll.register(sys.stdin.fileno(), select.POLLIN)
        while all(fd != sys.stdin.fileno() for fd, _ in poll.poll()):
            context.run()


if __name__ == "__main__":
    _main()
