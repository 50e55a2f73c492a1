"""The test's side of owners in hosts (`support.vm_owner`): a host with the owner that runs there, who is asked."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any, Self

import msgspec

import vmbus
import vmbus_guest
from support import vm_owner
from support.pace import eventually
from vmbus.errors import VmbusError
from vmbus.testbed.hosts import TEMPORARY, Host
from vmbus.vm.command_line import Programs
from vmbus.vm.process import Child, log_tail

SOCKET = TEMPORARY / "owner.sock"
PORT = 4711
SECRET = secrets.token_hex(32)
IMPORT_PATH = os.pathsep.join(
    str(Path(path).resolve().parents[1]) for path in (vmbus.__file__, vmbus_guest.__file__, __file__)
)


class Refused(VmbusError):
    """An owner's error: its `kind` is the class, `source_alive` the error's."""

    def __init__(self, message: str, kind: str, source_alive: bool | None) -> None:
        super().__init__(message)
        self.kind = kind
        self.source_alive = source_alive


class Place:
    """A host and the owner that runs in it."""

    def __init__(self, host: Host, owner: Child) -> None:
        self.host = host
        self.owner = owner

    @classmethod
    async def spawn(cls, host: Host, programs: Programs, module: str, *words: str, **environment: str) -> Self:
        """An owner: `support.vm_owner`, or one like it."""
        text = msgspec.json.encode(programs, enc_hook=str).decode()
        argv = [sys.executable, "-m", module, str(SOCKET), text, *words]
        return cls(host, await host.spawn("the owner", argv, environment={"PYTHONPATH": IMPORT_PATH, **environment}))

    async def ready(self) -> None:
        """Waits until the owner takes requests."""

        async def said() -> bool:
            return vm_owner.READY in self.owner.log.read_text()

        await self.owner.guard(eventually(said, "the owner to listen", 30), "the owner to listen", 31)

    @property
    def name(self) -> str:
        return self.host.name.upper()

    @property
    def address(self) -> str:
        return f"tcp:{self.host.address}:{PORT}"

    async def ask(self, command: str, /, *, patience: float = 150.0, **arguments: Any) -> dict[str, Any]:
        return await self.owner.guard(self._ask(command, arguments), f"{self.name} to {command}", patience)

    async def _ask(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        path = str(self.host.path(SOCKET))
        reader, writer = await asyncio.open_unix_connection(path, limit=vm_owner.LINE_LIMIT)
        try:
            writer.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
            line = await reader.readline()
        finally:
            writer.close()
        answer = json.loads(line) if line else {"error": log_tail(self.owner.log, 40), "kind": "Crash"}
        if "error" in answer:
            raise Refused(f"{self.name}: {answer['error']}", answer["kind"], answer.get("source_alive"))
        return dict(answer["result"])

    async def agent(self, name: str, /, *, timeout: float = 30.0, **arguments: Any) -> dict[str, Any]:
        return await self.ask("agent", name=name, arguments=arguments, timeout=timeout, patience=timeout + 30)

    async def listens(self) -> bool:
        """Whether a destination waits there for a source."""
        return "yes" in await self.host.run([sys.executable, "-I", "-S", "-c", _LISTENS])

    async def receive(self, **more: Any) -> asyncio.Task[dict[str, Any]]:
        """Has the owner wait for a VM; returns when it listens."""
        task = asyncio.create_task(self.ask("receive", address=self.address, secret=SECRET, patience=400, **more))

        async def waits() -> bool:
            if task.done():
                task.result()
            return await self.listens()

        try:
            await eventually(waits, f"{self.name} to listen", 30)
        except BaseException:
            task.cancel()
            raise
        return task

    async def migrate(self, target: Place, **more: Any) -> dict[str, Any]:
        """The VM leaves for another host; the report. Nothing is waited for there."""
        return await self.ask("migrate", address=target.address, secret=SECRET, patience=400, **more)


_LISTENS = f"import sys; print('yes' if ':{PORT:04X} 00000000:0000 0A' in open('/proc/net/tcp').read() else 'no')"
