"""Two hosts with a link between them, and commands that run in them.

    async with await TwoHosts.create() as hosts:
        receiver = await hosts.b.spawn("the receiver", [...])
        await hosts.shape(rate=10e6, latency=0.02)
        await hosts.cut()

Each host sees its own network, its own processes and its own files in the directories for temporary and runtime files;
the rest of the file system, with the caches of QEMU and the guest's image, is the machine's. Works for root, and for an
ordinary user where the machine lets one make user namespaces.

Nothing of it outlives its owner (see the package). What a crash leaves is the directory with the logs; it names its
owner, and the next `create` removes it.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vmbus
from vmbus.errors import EnvironmentProblem, WaitTimeout, os_error
from vmbus.places import import_path
from vmbus.provision.cache import Cache
from vmbus.testbed.init import MESSAGE_LIMIT
from vmbus.vm.process import Child, log_tail
from vmbus.vm.run_directory import RunDirectory, private_base

START_TIMEOUT = 30.0
REQUEST_TIMEOUT = 20.0

PREFIX = 24
ADDRESSES = {"a": "192.0.2.1", "b": "192.0.2.2"}
"""The hosts' IPv4 addresses, from a block that is set aside for examples."""

TEMPORARY = Path("/tmp")
RUNTIME = TEMPORARY / "run"
"""A host's directories for temporary files and for sockets, as it sees them."""

_ENTER = Path(__file__).with_name("enter.py")
_IMPORT_ROOT = Path(vmbus.__file__).resolve().parent.parent


class Forbidden(EnvironmentProblem):
    """This machine does not let us make what a host or a link consists of."""


def _hidden() -> list[Path]:
    """Directories in which a host has files of its own; those first that others may lie in."""
    candidates = [TEMPORARY, Path("/var/tmp"), Path("/dev/shm"), Path(tempfile.gettempdir())]
    candidates.append(Path(f"/run/user/{os.getuid()}"))
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        candidates.append(Path(runtime))
    found = {path.resolve() for path in candidates if path.is_dir()}
    return sorted(found, key=lambda path: len(path.parts))


def _kept(more: Sequence[Path]) -> list[Path]:
    """What programs in a host need, wherever it is: our code, Python, the cache, and what the caller adds."""
    candidates = [_IMPORT_ROOT.parent, Path(sys.prefix), Path(sys.base_prefix), Cache().root, *more]
    candidates += [Path(os.environ[name]) for name in ("VMBUS_QEMU", "VMBUS_LIBVFIO_USER") if os.environ.get(name)]
    found = {spelling for path in candidates if path.exists() for spelling in (path.absolute(), path.resolve())}
    return sorted(found, key=lambda path: len(path.parts))


class Host:
    """One host.

    `name` is "a" or "b", `address` its IPv4 address, `pid` its first process as seen from outside, `children` are the
    programs that were started in it.
    """

    def __init__(self, name: str, directory: Path, init: Child, peer: socket.socket) -> None:
        self.name = name
        self.address = ADDRESSES[name]
        self.pid = 0
        self.init = init
        self.children: list[Child] = []
        self._first: int | None = None  # a descriptor of the first process
        self._directory = directory
        self._peer = peer
        self._turn = asyncio.Lock()
        self._given: list[int] = []  # descriptors that came with an answer

    @classmethod
    async def _make(cls, name: str, directory: Path, *, user: int | None, keep: Sequence[Path]) -> Host:
        """Raises `Forbidden` and `EnvironmentProblem`; nothing is left behind then."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        arguments = [sys.executable, "-m", "vmbus.testbed.init", "--control", str(theirs.fileno())]
        if user is not None:
            arguments += ["--user", str(user)]
        for option, paths in (("--hide", _hidden()), ("--keep", _kept(keep))):
            for one in paths:
                arguments += [option, str(one)]
        try:
            init = await Child.spawn(
                f"host {name!r}",
                arguments,
                directory / f"{name}.log",
                environment={"PYTHONPATH": import_path()},
                pass_fds=[theirs.fileno()],
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        host = cls(name, directory, init, ours)
        try:
            ready = False
            while not (ready and host.pid):
                message = await host._receive(f"host {name!r} to come up", START_TIMEOUT)
                if "forbidden" in message:
                    raise Forbidden(
                        f"this machine does not let us make host {name!r}: {message['forbidden']}; as root, or where "
                        "user namespaces are allowed (kernel.unprivileged_userns_clone, user.max_user_namespaces, "
                        "AppArmor), it would"
                    )
                ready = ready or "ready" in message
                if "pid" in message:
                    host.pid = int(message["pid"])
                    host._first = os.pidfd_open(host.pid)
            await host.run(["/bin/mkdir", "-m", "0700", str(RUNTIME)])
        except BaseException:
            await host.end()
            raise
        return host

    def path(self, inside: Path | str) -> Path:
        """How we get at a file (or a socket) of the host's: `inside` is its absolute path as the host sees it."""
        return Path(f"/proc/{self.pid}/root") / str(inside).lstrip("/")

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs to know to use the host's own directories."""
        return {"TMPDIR": str(TEMPORARY), "XDG_RUNTIME_DIR": str(RUNTIME), "VMBUS_STATE": str(TEMPORARY / "state")}

    async def spawn(
        self, name: str, argv: Sequence[str], *, environment: dict[str, str] | None = None, capture_stdout: bool = False
    ) -> Child:
        """Starts a program in this host. It ends with the host and with us; its output is in `child.log`.

        Raises `EnvironmentProblem` if it cannot be started at all.
        """
        log = (
            self._directory
            / f"{self.name}-{''.join(c if c.isalnum() else '-' for c in name)}-{secrets.token_hex(3)}.log"
        )
        child = await Child.spawn(
            f"{name} in host {self.name!r}",
            [sys.executable, "-I", "-S", str(_ENTER), str(self.pid), *argv],
            log,
            environment={**self.environment, **(environment or {})},
            capture_stdout=capture_stdout,
        )
        self.children.append(child)
        return child

    async def run(self, argv: Sequence[str], timeout: float = 30.0) -> str:
        """Runs a program in this host to its end and returns what it prints.

        Raises `ProcessDied` with its last words if it fails, and `WaitTimeout`.
        """
        child = await self.spawn(Path(argv[0]).name, argv)
        try:
            done, _ = await asyncio.wait({child.exited}, timeout=timeout)
            if not done:
                raise WaitTimeout(f"{' '.join(argv)} to end\n{log_tail(child.log)}", timeout)
            if child.exited.result() != 0:
                raise child.death()
            return child.log.read_text(errors="replace")
        finally:
            await child.stop()
            self.children.remove(child)

    async def counters(self) -> dict[str, int]:
        """Bytes that passed this end of the link: ``received`` and ``sent``."""
        return await self.request("counters")

    async def socket(self, port: int | None = None) -> socket.socket:
        """A TCP socket that belongs to this host, and is used from here; with a port it listens there, at the host's
        address. Raises `EnvironmentProblem`."""
        await self.request("socket", address=None if port is None else self.address, port=port or 0)
        return socket.socket(fileno=self._given.pop())

    async def request(self, command: str, *, descriptor: int | None = None, **arguments: Any) -> dict[str, Any]:
        """A request to the host's first process (see `vmbus.testbed.init`). Raises `EnvironmentProblem`."""
        async with self._turn:
            data = json.dumps({"command": command, **arguments}).encode()
            with os_error(f"host {self.name!r} is gone"):
                if descriptor is None:
                    self._peer.send(data)
                else:
                    socket.send_fds(self._peer, [data], [descriptor])
            answer = await self._receive(f"host {self.name!r} to answer {command!r}", REQUEST_TIMEOUT)
        if "forbidden" in answer:
            raise Forbidden(f"host {self.name!r}: {answer['forbidden']}")
        if "error" in answer:
            raise EnvironmentProblem(f"host {self.name!r}: {answer['error']}")
        return dict(answer["result"])

    async def end(self) -> None:
        """Ends the host and every process in it. May be called more than once. Raises `WaitTimeout`."""
        self._peer.close()
        for child in [self.init, *self.children]:
            await child.stop()
        if self._first is not None:
            # The kernel is through with a host's first process when it has ended all the others.
            await _readable(self._first, f"every process of host {self.name!r} to end", 30)
            os.close(self._first)
            self._first = None

    async def _receive(self, what: str, timeout: float) -> dict[str, Any]:
        async def message() -> dict[str, Any]:
            await _readable(self._peer.fileno(), what, timeout)
            data, descriptors, _, _ = socket.recv_fds(self._peer, MESSAGE_LIMIT, 1)
            self._given += descriptors
            if not data:  # the guard tells how it ended
                await self.init.exited
                raise EnvironmentProblem(f"host {self.name!r} hung up")
            return dict(json.loads(data))

        return await self.init.guard(message(), what, timeout)


async def _readable(descriptor: int, what: str, timeout: float) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await asyncio.wait_for(ready.wait(), timeout)
    except TimeoutError:
        raise WaitTimeout(what, timeout) from None
    finally:
        loop.remove_reader(descriptor)


class TwoHosts:
    """Two hosts, `a` and `b`, joined by a veth pair. Make one with `create`; an async context manager.

    `directory` holds the logs of everything that ran.
    """

    def __init__(self, directory: RunDirectory, a: Host, b: Host) -> None:
        self.directory = directory
        self.a = a
        self.b = b
        self._shape: dict[str, Any] = {}

    @classmethod
    async def create(
        cls, *, keep: Sequence[Path] = (), user_namespace: bool | None = None, base: Path | None = None
    ) -> TwoHosts:
        """Makes both hosts and the link. What crashed runs left behind is removed first.

        `keep` are files and directories that the hosts shall see although they lie in a directory for temporary files.
        `user_namespace`: whether to make one (default: unless we are root). `base` is where the directory of logs goes.
        Raises `Forbidden`, `EnvironmentProblem`; nothing is left behind then.
        """
        if user_namespace is None:
            user_namespace = os.geteuid() != 0
        directory = RunDirectory.create("hosts", base=base or private_base("vmbus-hosts"))
        made: list[Host] = []
        try:
            a = await Host._make("a", directory.path, user=0 if user_namespace else None, keep=keep)
            made.append(a)
            b = await Host._make("b", directory.path, user=a.pid if user_namespace else None, keep=keep)
            made.append(b)
            hosts = cls(directory, a, b)
            await hosts._join()
        except BaseException:
            for host in made:
                await host.end()
            directory.remove()
            raise
        return hosts

    async def _join(self) -> None:
        descriptor = os.open(f"/proc/{self.b.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            await self.a.request("plug", descriptor=descriptor)
        finally:
            os.close(descriptor)
        for host in (self.a, self.b):
            await host.request("configure", address=host.address, prefix=PREFIX)

    @property
    def hosts(self) -> tuple[Host, Host]:
        return (self.a, self.b)

    def other(self, host: Host) -> Host:
        """The host at the other end of the link."""
        return self.b if host is self.a else self.a

    async def shape(self, *, rate: float = 0.0, latency: float = 0.0, loss: float = 0.0) -> None:
        """Shapes the link from now on, each direction alike: `rate` bytes a second (0: no limit), `latency` seconds,
        `loss` of the packets (0 to 1). Without arguments the link is as fast as the machine. Mends a cut link."""
        self._shape = {"rate": rate, "latency": latency, "loss": loss}
        await self.mend()

    async def cut(self) -> None:
        """From now on nothing passes, and nobody is told: as if the cable had been cut somewhere on its way."""
        for host in self.hosts:
            await host.request("shape", cut=True)

    async def mend(self) -> None:
        """Undoes a cut; the link is shaped as before."""
        for host in self.hosts:
            await host.request("shape", **self._shape)

    async def remove(self) -> None:
        """Ends both hosts and all that runs in them, and removes the logs. May be called more than once."""
        try:
            for host in self.hosts:
                await host.end()
        finally:
            self.directory.remove()

    async def __aenter__(self) -> TwoHosts:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.remove()
