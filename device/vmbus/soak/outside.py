"""The card's other end: a network namespace of the episode's own, and in it the other ends of TCP connections with the
guest. It stays where it is, whatever is done to the VM; a clone that runs beside it has one of its own.

The namespace's name says who made it; what a killed worker has left is removed by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from vmbus.errors import EnvironmentProblem
from vmbus.providers.network.interface import NAMESPACES, in_namespace
from vmbus.soak.peer import GUEST_PORT, PORT, Accept, Peer

HOST, GUEST, PREFIX_LENGTH = "192.0.2.1", "192.0.2.2", 24
_PREFIX = "vmbus-soak-"
_TUN = Path("/dev/net/tun")


def why_not() -> str:
    """Why there can be no card here; "" if there can."""
    if os.geteuid():
        return "that needs root's rights"
    if not os.access(_TUN, os.R_OK | os.W_OK):
        return f"that needs {_TUN}"
    return ""


class Outside:
    """Use `make`. `name`: what the card's option `namespace` takes. `peer`: the other ends, once they are there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.peer: Peer | None = None

    @classmethod
    async def make(cls) -> Outside:
        """Raises EnvironmentProblem."""
        name = f"{_PREFIX}{os.getpid()}-{_started(os.getpid())}-{os.urandom(2).hex()}"
        await asyncio.to_thread(_make, name)
        return cls(name)

    async def begin(self, seed: int, size: int, pairs: int) -> None:
        """Listen for the guest, and connect to it. Raises OSError, EnvironmentProblem."""
        self.peer = Peer(self, seed, size, pairs)
        await self.peer.start()

    def cut(self) -> None:
        """The VM has gone back: forget all connections."""
        if self.peer is not None:
            self.peer.cut()

    @contextlib.contextmanager
    def going_back(self) -> Iterator[None]:
        """In the block the VM goes back; then all connections are forgotten."""
        with contextlib.nullcontext() if self.peer is None else self.peer.excused():
            yield
            self.cut()

    async def remove(self) -> None:
        self.cut()  # what the kernel has still to send would keep the namespace
        if self.peer is not None:
            await self.peer.close()
        await asyncio.to_thread(_remove, self.name)

    async def listen(self, accept: Accept) -> asyncio.Server:
        """For the guest's connections."""
        return await asyncio.start_server(accept, sock=await self._new(lambda: socket.create_server(("0.0.0.0", PORT))))

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """One to the guest."""
        end = await self._new(socket.socket)
        try:
            end.setblocking(False)
            await asyncio.get_running_loop().sock_connect(end, (GUEST, GUEST_PORT))
            return await asyncio.open_connection(sock=end)
        except BaseException:
            end.close()
            raise

    async def _new(self, make: Callable[[], socket.socket]) -> socket.socket:
        """A socket in the namespace: it belongs there for life."""
        return await asyncio.to_thread(in_namespace, self.name, make)


def _started(pid: int) -> str:
    """When a process was started, in the kernel's ticks; "" if there is none."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(") ", 1)[1].split()[19]
    except OSError:
        return ""


def _make(name: str) -> None:
    from pyroute2 import IPRoute, netns  # type: ignore[import-untyped]

    for path in NAMESPACES.glob(f"{_PREFIX}*"):
        pid, started, *_ = path.name[len(_PREFIX) :].split("-")
        if pid.isdigit() and _started(int(pid)) != started:
            _remove(path.name)

    def switch_on() -> None:
        with IPRoute() as link:
            link.link("set", index=1, state="up")

    try:
        netns.create(name)
        in_namespace(name, switch_on)
    except OSError as error:
        _remove(name)
        raise EnvironmentProblem(f"cannot make a network namespace: {error.strerror}") from error
    except EnvironmentProblem:
        _remove(name)
        raise


def _remove(name: str) -> None:
    from pyroute2 import netns

    with contextlib.suppress(OSError):
        netns.remove(name)
    with contextlib.suppress(OSError):
        (NAMESPACES / name).unlink()
