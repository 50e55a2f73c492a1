"""What the commands show: progress with times on standard error, and signals that end a command in good order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from rich.text import Text

from vmbus.util.screen import screen

T = TypeVar("T")

console = screen(stderr=True)


class Steps:
    """Shows one line per phase with the time it took; the running phase with a moving sign on a terminal.

    Call it with each phase's name as it begins (a `vmbus.vm.timing.Progress`); use it as a context manager.
    """

    def __init__(self, title: str, labels: dict[str, str] | None = None) -> None:
        self._title = title
        self._labels = _LABELS | (labels or {})
        self._status = console.status(Text(title))
        self._phase: str | None = None
        self._start = self._begin = time.monotonic()

    def __enter__(self) -> Steps:
        self._start = time.monotonic()
        if console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._finish()
        self._status.stop()
        if kind is None:
            console.print(f"{self._title}: {time.monotonic() - self._start:.2f} s")

    def __call__(self, phase: str) -> None:
        self._finish()
        self._phase = self._labels.get(phase, phase)
        self._begin = time.monotonic()
        self._status.update(Text(f"{self._title}: {self._phase}"))

    def _finish(self) -> None:
        if self._phase is not None:
            with contextlib.suppress(OSError):
                console.print(f"  {time.monotonic() - self._begin:6.2f} s  {self._phase}")
            self._phase = None


_LABELS = {
    "cont": "vCPUs running",
    "device": "device at rest, its state written",
    "pci": "PCI function put back",
    "qemu": "QEMU",
    "ram": "guest memory written",
    "resume": "VM goes on as before",
    "server": "device server",
    "stop": "vCPUs stopped",
}
"""What phases are called, where a command has no other words for them."""

SAVE_LABELS = {
    "boot files": "kernel and initramfs into the snapshot",
    "flush": "pages written by the device flushed",
    "switchover": "last pages and machine state written",
    "seal": "files flushed to disk, digests, manifest",
}

CHECKPOINT_LABELS = {"ram": "guest memory and machine state written", "seal": "record written"}

REVERT_LABELS = {
    "verify": "checkpoint verified",
    "device": "device at rest",
    "ram": "guest memory and machine state loaded",
    "load": "device state taken",
    "channels": "channels and packets rebuilt",
}

MIGRATE_LABELS = {
    "prepare": "destination ready",
    "ram": "guest memory copied while the VM runs",
    "flush": "device state at the destination, pages written by the device flushed",
    "switchover": "last pages and machine state sent",
    "restore": "everything rebuilt at the destination",
    "go": "VM handed over",
}

RECEIVE_LABELS = {
    "prepare": "a source has come",
    "listen": "QEMU waits for its stream",
    "pci ahead": "PCI function put back as far as it is known",
    "ram": "guest memory copied while the VM runs at the source",
    "state": "device state taken",
    "load": "guest memory loaded",
    "device": "channels and packets rebuilt",
    "go": "VM handed over",
}

RESTORE_LABELS = {
    "verify": "snapshot verified",
    "server": "device server with the saved state",
    "ram": "guest memory loaded",
    "device": "channels and packets rebuilt",
}


def heeded(*numbers: signal.Signals) -> list[signal.Signals]:
    """Those of them that we were not started to ignore."""
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs a command's coroutine; SIGTERM and SIGHUP cancel it as Ctrl-C does, so that it cleans up. Whoever started us
    may have us ignore them, as nohup does."""

    async def body() -> T:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        for number in heeded(signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, task.cancel)
        return await work

    try:
        return asyncio.run(body())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


@contextlib.asynccontextmanager
async def background(*coroutines: Coroutine[Any, Any, Any]) -> Any:
    """Runs coroutines beside the block and cancels them when it ends."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
