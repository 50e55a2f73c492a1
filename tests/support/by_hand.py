"""A VM whose QEMU and device server are started by hand, as somebody else would, for tests of `vmbus attach`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from support import pace

TESTS = Path(__file__).resolve().parents[1]
PYTHONPATH = os.pathsep.join([str(TESTS), *(path for path in sys.path if path)])


def listens(path: Path) -> bool:
    """Whether somebody listens on a unix socket, without a connection to him: a monitor has room for one."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(words[-1] == str(path) and int(words[3], 16) & 0x10000 for words in lines[1:])


class ByHand:
    """One QEMU and its server in a directory; both end with the block."""

    def __init__(self, folder: Path, *, answers: dict[str, Any] | None = None, device: Path | None = None) -> None:
        """`answers`: of the stand-in for QEMU, see `hand_qemu`. `device`: a JSON file with the device."""
        folder.mkdir(mode=0o700)
        self.folder = folder
        self.vfio, self.qmp, self.agent = (folder / name for name in ("v.sock", "q.sock", "a.sock"))
        self.control = folder / "v.sock.control"
        self.server: subprocess.Popen[str] | None = None
        self.qemu: subprocess.Popen[bytes] | None = None
        self._answers = answers
        self._device = device

    def serve(self, description: str, *more: str) -> None:
        """`vmbus serve`, without what the other commands import."""
        command = [sys.executable, "-m", "vmbus.cli.serve", description, "--socket", str(self.vfio), *more]
        with (self.folder / "server.log").open("ab") as log:
            self.server = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | {"PYTHONPATH": PYTHONPATH}
            )
        assert self.server.stdout is not None
        assert self.server.stdout.readline(), (self.folder / "server.log").read_text()

    def start(self, argv: Sequence[str], **environment: str) -> None:
        """QEMU, or what stands in for it, when its monitor is there."""
        with (self.folder / "qemu.log").open("ab") as log:
            self.qemu = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | {"PYTHONPATH": PYTHONPATH} | environment,
            )  # fmt: skip
        pace.until(lambda: listens(self.qmp) or self._over(self.qemu), "QEMU's monitor")
        assert not self._over(self.qemu), (self.folder / "qemu.log").read_text()

    def stand_in(self, *more: str) -> None:
        """The stand-in of `hand_qemu`."""
        device = {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(self.vfio)}, "addr": "5"}
        environment = {"FAKE_QEMU_LOG": str(self.folder / "vcpus.log")}
        (self.folder / "vcpus.log").touch()
        if self._answers is not None:
            (self.folder / "answers").write_text(json.dumps(self._answers))
            environment["FAKE_QEMU_ANSWERS"] = str(self.folder / "answers")
        arguments = ["-qmp", f"unix:{self.qmp},server=on,wait=off", "-device", json.dumps(device)]
        arguments += ["-chardev", f"socket,id=agent,path={self.agent}", *more]
        self.start([sys.executable, "-m", "support.hand_qemu", *arguments], **environment)

    def _over(self, process: subprocess.Popen[Any] | None) -> bool:
        return process is None or process.poll() is not None

    @property
    def running(self) -> bool:
        """Whether QEMU is there."""
        return not self._over(self.qemu)

    def qemu_ends(self) -> int:
        """Waits for it; its status."""
        assert self.qemu is not None
        return self.qemu.wait(pace.seconds(20))

    def __enter__(self) -> ByHand:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        for process in (self.qemu, self.server):
            if process is not None:
                if process.poll() is None:
                    process.kill()
                process.wait()
                for stream in (process.stdout, process.stdin):
                    if stream is not None:
                        stream.close()


class Attached:
    """`vmbus attach` as a command, with its output."""

    def __init__(self, hand: ByHand, *arguments: str, until: str = "work until this ends") -> None:
        self.log = hand.folder / f"attach-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "vmbus", "attach", "--qmp", str(hand.qmp), *arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": PYTHONPATH}
            )
        if until:
            pace.until(lambda: until in self.text or self.process.poll() is not None, f"{until!r} of attach")
            assert self.process.poll() is None, self.text

    @property
    def text(self) -> str:
        """All that it has said, without line breaks."""
        return " ".join(self.log.read_text().split())

    def end(self) -> int:
        """Waits for its end; its status."""
        return self.process.wait(pace.seconds(30))

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of `vmbus`."""
    return subprocess.run(
        [sys.executable, "-m", "vmbus", *arguments],
        env=os.environ | {"PYTHONPATH": PYTHONPATH}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=pace.seconds(60),
    )  # fmt: skip
