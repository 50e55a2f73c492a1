"""Where a destination waits: ``tcp:HOST:PORT``, ``tcp:[IPV6]:PORT`` or ``unix:PATH``; and QEMU's words for that."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vmbus.errors import UsageError
from vmbus.util.listening import LONGEST_PATH

_TCP = re.compile(r"tcp:(?:\[(?P<v6>[0-9a-fA-F:.%a-z]+)\]|(?P<host>[^\[\]:]+)):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True)
class TcpAddress:
    """A TCP port. Port 0, where something listens, stands for any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


@dataclass(frozen=True)
class UnixAddress:
    """A unix socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """The address in a text. Raises `UsageError` that shows the forms."""
    if found := _TCP.fullmatch(text):
        port = int(found["port"])
        if port <= 65535:
            return TcpAddress(found["v6"] or found["host"], port)
    elif text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if path and "\0" not in path:
            if len(path.encode()) > LONGEST_PATH:
                raise UsageError(f"{text!r}: a socket's path may have {LONGEST_PATH} bytes; choose a shorter one")
            return UnixAddress(path)
    raise UsageError(f"{text!r} is not an address: write tcp:HOST:PORT, tcp:[IPV6]:PORT or unix:PATH")


def stream_channel(address: Address) -> list[dict[str, object]]:
    """The `channels` argument of QEMU's migrate and migrate-incoming for a socket."""
    addr: dict[str, object] = {"transport": "socket"}
    if isinstance(address, UnixAddress):
        addr |= {"type": "unix", "path": address.path}
    else:
        addr |= {"type": "inet", "host": address.host, "port": str(address.port)}
    return [{"channel-type": "main", "addr": addr}]
