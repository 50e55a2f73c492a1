"""Debian's archive for a guest's apt: what may be asked for, and that the host's apt does the asking."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from vmbus.errors import EnvironmentProblem
from vmbus.qemu.archive import HEAD_LIMIT, MOST_CONNECTIONS, ArchiveServer, Mirrors, NotFound, archive_path
from vmbus_guest.relay import join

FILES = {"dists/trixie/InRelease": b"signed", "pool/main/b/bash/bash_5.deb": b"d" * 700_000}


async def fetch(path: str, target: Path) -> None:
    if path == "pool/broken":
        raise EnvironmentProblem("the mirror is away")
    if path not in FILES:
        raise NotFound(path)
    await asyncio.to_thread(target.write_bytes, FILES[path])


def served(tmp_path: Path, work: Callable[[ArchiveServer, Path], Coroutine[Any, Any, None]]) -> list[str]:
    """Run `work` beside a server; what it had to say, and nothing of it is left."""
    said: list[str] = []
    path = tmp_path / "a.sock"

    async def run() -> None:
        async with asyncio.timeout(30), ArchiveServer(path, fetch, said.append) as server:
            await work(server, path)

    asyncio.run(run())
    assert not list(tmp_path.iterdir())
    return said


async def ask(path: Path, *requests: str) -> list[tuple[str, bytes]]:
    """Answers to several requests on one connection: (status line, body)."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    found = []
    for request in requests:
        writer.write(f"{request} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.partition("Content-Length: ")[2].partition("\r\n")[0])
        body = b"" if request.startswith("HEAD") else await reader.readexactly(length)
        found.append((head.partition("\r\n")[0].removeprefix("HTTP/1.1 "), body))
    writer.close()
    return found


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/debian/dists/trixie/InRelease", "dists/trixie/InRelease"),
        (
            "/debian/pool/main/g/gcc-14/libstdc%2b%2b6_14.2.0-19~x_amd64.deb",
            "pool/main/g/gcc-14/libstdc++6_14.2.0-19~x_amd64.deb",
        ),
        ("/debian/pool/../dists/x", None),
        ("/debian/pool/%2e%2e/%2e%2e/etc/passwd", None),
        ("/debian/dists//x", None),
        ("/debian/project/trace", None),
        ("/debian/dists/-o", None),
        ("/debian/dists/x?y", None),
        ("/etc/passwd", None),
        ("http://elsewhere.example/debian/dists/x", None),
    ],
)
def test_what_may_be_asked_for(target: str, path: str | None) -> None:
    assert archive_path(target) == path


def test_several_files_over_one_connection(tmp_path: Path) -> None:
    async def work(server: ArchiveServer, path: Path) -> None:
        answers = await ask(
            path,
            "GET /debian/dists/trixie/InRelease",
            "GET /debian/dists/none",
            "GET /secret",
            "HEAD /debian/pool/main/b/bash/bash_5.deb",
            "GET /debian/pool/broken",
            "GET /debian/pool/main/b/bash/bash_5.deb",
        )
        assert answers == [
            ("200 OK", b"signed"),
            ("404 Not Found", b""),
            ("404 Not Found", b""),
            ("200 OK", b""),
            ("502 Bad Gateway", b""),
            ("200 OK", FILES["pool/main/b/bash/bash_5.deb"]),
        ]
        assert (server.served, server.refused) == (3, 1)

    assert served(tmp_path, work) == ["the mirror is away"]


@pytest.mark.parametrize(
    "sent", [b"POST /debian/dists/x HTTP/1.1\r\n\r\n", b"\0" * (2 * HEAD_LIMIT), b"GET /debian", b""]
)
def test_what_is_no_request_ends_its_connection_alone(tmp_path: Path, sent: bytes) -> None:
    async def work(server: ArchiveServer, path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(sent)
        writer.write_eof()
        assert b"200" not in await reader.read()
        writer.close()
        assert (await ask(path, "GET /debian/dists/trixie/InRelease"))[0] == ("200 OK", b"signed")

    assert not served(tmp_path, work)


def test_connections_are_bounded(tmp_path: Path) -> None:
    async def work(server: ArchiveServer, path: Path) -> None:
        held = [await asyncio.open_unix_connection(str(path)) for _ in range(MOST_CONNECTIONS)]
        reader, writer = await asyncio.open_unix_connection(str(path))
        assert await reader.read() == b""
        for _, one in [*held, (reader, writer)]:
            one.close()

    assert not served(tmp_path, work)


def test_the_hosts_apt_fetches_from_the_first_archive_that_has_it(tmp_path: Path) -> None:
    helper = tmp_path / "helper"
    helper.write_text(
        "#!/bin/sh\n"
        'case $4 in http://one/*) echo "E: Failed to fetch $4  404  Not Found"; exit 100 ;;\n'
        '*/down) echo "E: could not connect"; exit 100 ;; *) printf %s "$4" > "$5" ;; esac\n'
    )
    helper.chmod(0o755)
    target = tmp_path / "file"
    both = Mirrors(["http://one/debian/", "http://two/debian"], [str(helper)])
    asyncio.run(both.fetch("dists/x", target))
    assert target.read_text() == "http://two/debian/dists/x"
    with pytest.raises(NotFound):
        asyncio.run(Mirrors(["http://one/debian"], [str(helper)]).fetch("dists/x", target))
    with pytest.raises(EnvironmentProblem, match="could not connect"):
        asyncio.run(both.fetch("down", target))


def test_the_guests_relay_carries_both_ways_and_their_ends() -> None:
    caller, near = socket.socketpair()
    far, host = socket.socketpair()
    relay = threading.Thread(target=join, args=(near, far))
    relay.start()
    with caller, host:
        caller.sendall(b"question")
        caller.shutdown(socket.SHUT_WR)
        assert host.recv(100) == b"question" and host.recv(100) == b""
        host.sendall(b"answer")
        host.shutdown(socket.SHUT_WR)
        assert caller.recv(100) == b"answer" and caller.recv(100) == b""
    relay.join(10)
    assert not relay.is_alive()
    near.close()
    far.close()
