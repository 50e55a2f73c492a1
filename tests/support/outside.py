"""A provider with outside resources: a file that it locks while it is active, a socket that it listens on, and work on
other threads."""

import fcntl
import os
import shutil
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import msgspec

from vmbus.errors import UsageError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.server import ServerChannel
from vmbus.providers import Provider

OUTSIDE_TYPE = UUID("3d2f4f5e-52b8-4b86-9a2d-0c0f6d6f9d01")


class OutsideOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`path`: the file; `snapshot`: whether a snapshot has a copy of it."""

    path: str = ""
    snapshot: bool = True


class OutsideProvider(Provider):
    """Requests: b"read" answers with the file's content, read by another thread; b"stay" is answered once `go` is set;
    anything else is echoed."""

    of_a_test: ClassVar[bool] = True  # `alive` is its test's
    kind = "outside"
    Options = OutsideOptions
    alive: "list[OutsideProvider]" = []  # noqa: RUF012 - all that were made, for tests
    fail: "set[str]" = set()  # noqa: RUF012 - of which calls shall raise

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.calls: list[str] = []
        self.heard: list[bytes] = []
        self.go = threading.Event()
        self.fd: int | None = None
        self.copies: dict[str, Path] = {}
        self.inside, self.outside = socket.socketpair()
        self.inside.setblocking(False)
        self.channel = ServerChannel(OUTSIDE_TYPE, self.instance, name=self.name)
        OutsideProvider.alive.append(self)

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail:
            raise OSError(f"{name} fails on purpose")

    def start(self) -> None:
        self._called("start")
        self.channel.set_process_packet_callbacks(self._process)
        self.channel.set_state_change_callbacks(started=lambda _: self.calls.append("started"))
        self.host.add_channel(self.channel)
        self.host.add_reader(self.inside.fileno(), self._readable)
        self.channel.enable()
        self.channel.start()

    def activate(self) -> None:
        self._called("activate")
        if not self.options.path:
            return
        path = Path(self.options.path)
        if self.copies:
            shutil.copyfile(self.copies.pop("data"), path)
        if self.fd is not None:
            return  # it was not given up
        fd = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        self.fd = fd

    def deactivate(self) -> None:
        self._called("deactivate")
        self._let_go()

    def stop(self) -> None:
        self.calls.append("stop")
        self.host.remove_reader(self.inside.fileno())
        self.inside.close()
        self.outside.close()
        self._let_go()

    def _let_go(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def files(self) -> dict[str, Path]:
        return {"data": Path(self.options.path)} if self.options.path and self.options.snapshot else {}

    def restore_files(self, files: Mapping[str, Path]) -> None:
        self.copies = dict(files)

    def save(self) -> bytes:
        self._called("save")
        return b""

    def command(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any] | Future[dict[str, Any]]:
        if name == "hello":
            return {"hello": arguments.get("who")}
        if name == "later":
            answer: Future[dict[str, Any]] = Future()
            self.host.call_later(0.01, lambda: answer.set_result({"late": True}))
            return answer
        if name == "never":
            return Future()
        raise UsageError(f"no command {name!r}")

    def _readable(self) -> None:
        try:
            data = self.inside.recv(64)
        except BlockingIOError:
            return
        if data == b"bad":
            raise ValueError("a call that raises")
        self.heard.append(data)

    def _process(self, channel: Channel, completion: Completion, payload: bytes) -> None:
        name = payload.rstrip(b"\0")
        if name == b"read":
            fd = self.fd
            self.host.run_blocking(lambda: os.pread(fd or -1, 4096, 0), lambda r, e: completion.complete(r or b"error"))
        elif name == b"stay":
            self.host.run_blocking(lambda: self.go.wait(20), lambda r, e: completion.complete(b"went"))
        elif name == b"orphan":  # answered before its work is done
            self.host.run_blocking(lambda: self.go.wait(20), lambda r, e: self.calls.append("orphan done"))
            completion.complete(b"orphan")
        elif name == b"raise":
            self.host.run_blocking(lambda: 1 // 0, lambda r, e: completion.complete(type(e).__name__.encode()))
        else:
            completion.complete(payload)
