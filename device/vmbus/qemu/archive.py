"""Debian's archive for a guest that has no network: what its apt asks for, the host's apt fetches.

The guest's apt speaks HTTP to a port of its own, from where its connections come here, over sockets between guest and
host (docs/debian-guest.md). A request for `/debian/PATH` is answered with that file of the archive that the host's own
apt is configured with, whatever proxies and credentials it needs for that; everything is verified by the guest's apt,
which has Debian's keys. Nothing else can be asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from urllib.parse import unquote

from vmbus.errors import EnvironmentProblem, WaitTimeout, os_error
from vmbus.provision.debian_system import ARCHIVE_PORT
from vmbus.provision.sources import mirror_candidates
from vmbus.qemu.instance import Instance
from vmbus.util.launcher import tied

HELPER = "/usr/lib/apt/apt-helper"
FETCH_TIMEOUT = 600.0
"""Seconds for one file."""
IDLE_TIMEOUT = 120.0
"""Seconds that a connection may be silent."""
HEAD_LIMIT = 16 << 10
"""Bytes of a request."""
MOST_FETCHES = 4
"""Files fetched at a time; more wait."""
MOST_CONNECTIONS = 32

_CHUNK = 256 << 10
_PREFIX = "/debian/"
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+~:-]*")


class NotFound(Exception):
    """The archive has no such file."""


Fetch = Callable[[str, Path], Awaitable[None]]
"""Puts the file of the archive with this path into a new file. Raises NotFound, EnvironmentProblem, WaitTimeout."""


def archive_path(target: str) -> str | None:
    """The path in the archive that an HTTP request's target means; None: it is none of ours."""
    path = unquote(target)
    if not path.startswith(_PREFIX):
        return None
    parts = path.removeprefix(_PREFIX).split("/")
    if parts[0] not in ("dists", "pool") or not all(_PART.fullmatch(part) for part in parts):
        return None
    return "/".join(parts)


class Mirrors:
    """The archives of the host's apt. `fetch` is a `Fetch`."""

    def __init__(self, uris: Sequence[str], helper: Sequence[str] = (HELPER,)) -> None:
        self._uris = [uri.rstrip("/") for uri in uris]
        self._helper = helper

    @classmethod
    def of_host(cls) -> Mirrors:
        """Those of this machine. Raises EnvironmentProblem."""
        if not os.access(HELPER, os.X_OK):
            raise EnvironmentProblem(f"there is no {HELPER}: without apt on the host the guest's apt finds no archive")
        return cls([source.uri for source in mirror_candidates()])

    async def fetch(self, path: str, target: Path) -> None:
        """Try one archive after the other."""
        said = ""
        for uri in self._uris:
            code, said = await self._run(f"{uri}/{path}", target)
            if code == 0:
                return
        if " 404 " in f" {said} " or "Not Found" in said:
            raise NotFound(path)
        raise EnvironmentProblem(f"the host's apt could not fetch {path}: {said.strip()[-500:]}")

    async def _run(self, uri: str, target: Path) -> tuple[int, str]:
        # As root apt would drop to its own user, who cannot write into our directory.
        argv = tied([*self._helper, "-o", "APT::Sandbox::User=root", "download-file", uri, str(target)])
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C"},
            process_group=0,
        )
        try:
            async with asyncio.timeout(FETCH_TIMEOUT):
                output, _ = await process.communicate()
        except TimeoutError:
            raise WaitTimeout(f"the host's apt to fetch {uri}", FETCH_TIMEOUT) from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        return process.returncode or 0, output.decode(errors="replace")


class ArchiveServer:
    """Serves guests' apt on a unix socket; use it as an async context manager.

    Attributes: `served`, how many files; `refused`, how many requests were for something else.
    """

    def __init__(
        self,
        path: Path,
        fetch: Fetch,
        on_trouble: Callable[[str], None] = lambda text: None,
        *,
        folder: Path | None = None,
    ) -> None:
        """`on_trouble` is told in a sentence what could not be fetched; it must not raise. `folder`: for files that are
        on their way (None: beside the socket)."""
        self._path = path
        self._folder = folder or path.parent
        self._fetch = fetch
        self._on_trouble = on_trouble
        self._slots = asyncio.Semaphore(MOST_FETCHES)
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.served = 0
        self.refused = 0

    async def __aenter__(self) -> ArchiveServer:
        """Listen. Raises EnvironmentProblem."""
        with os_error(f"cannot listen on {self._path}"):
            self._path.unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(self._connected, str(self._path), limit=HEAD_LIMIT)
            self._path.chmod(0o600)
        return self

    async def __aexit__(self, *_: object) -> None:
        """End all connections."""
        assert self._server is not None
        self._server.close()
        for task in self._connections:
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections)
        self._path.unlink(missing_ok=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= MOST_CONNECTIONS:
            writer.close()
            return
        self._connections.add(task)
        try:
            while await self._serve_one(reader, writer):
                pass
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the guest is gone, silent, or speaks no HTTP
        except asyncio.CancelledError:
            pass  # the end of the server; nobody waits for this task's result
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether another one may follow."""
        async with asyncio.timeout(IDLE_TIMEOUT):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        words = head.partition("\r\n")[0].split(" ")
        if len(words) != 3 or words[0] not in ("GET", "HEAD") or not words[2].startswith("HTTP/1."):
            self.refused += 1
            await _answer(writer, "400 Bad Request", close=True)
            return False
        path = archive_path(words[1])
        if path is None:
            self.refused += 1
            await _answer(writer, "404 Not Found")
            return True
        with tempfile.TemporaryDirectory(prefix="archive-", dir=self._folder) as folder:
            file = Path(folder) / "file"
            try:
                async with self._slots:
                    await self._fetch(path, file)
            except NotFound:
                await _answer(writer, "404 Not Found")
                return True
            except (EnvironmentProblem, WaitTimeout) as error:
                self._on_trouble(str(error))
                await _answer(writer, "502 Bad Gateway")
                return True
            await _send(writer, file, body=words[0] == "GET")
        self.served += 1
        return True


async def _answer(writer: asyncio.StreamWriter, status: str, *, close: bool = False) -> None:
    more = "Connection: close\r\n" if close else ""
    writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n{more}\r\n".encode())
    async with asyncio.timeout(IDLE_TIMEOUT):
        await writer.drain()


async def _send(writer: asyncio.StreamWriter, path: Path, *, body: bool) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        writer.write(
            f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nContent-Type: application/octet-stream\r\n\r\n".encode()
        )
        while body and (data := file.read(_CHUNK)):
            writer.write(data)
            async with asyncio.timeout(IDLE_TIMEOUT):
                await writer.drain()


@contextlib.asynccontextmanager
async def archive_for(vm: Instance, notice: Callable[[str], None]) -> AsyncIterator[ArchiveServer | None]:
    """Serve the archive to a VM whose guest has a Debian and sockets to the host, while the block runs; else nothing.

    `notice` is told in a sentence what could not be served. Raises what `Instance.call_server` raises.
    """
    providers = (await vm.call_server("status"))["providers"] if vm.description.guest.root else {}
    sockets = [str(status["socket"]) for status in providers.values() if "socket" in status]
    try:
        server = None
        if sockets:
            path, folder = Path(f"{sockets[0]}_{ARCHIVE_PORT}"), vm.room("archive")
            server = ArchiveServer(path, Mirrors.of_host().fetch, notice, folder=folder)
    except EnvironmentProblem as error:
        notice(f"the guest's apt has no archive: {error}")
        server = None
    if server is None:
        yield None
        return
    async with server:
        yield server
