"""A host's owner of one VM at a time, for tests between hosts: ``python -m support.vm_owner SOCKET PROGRAMS``.

It does with the real `VirtualMachine` what a test tells it over a unix socket: a connection carries one request as a
JSON line, ``{"command": NAME, ...}``, and one answer, ``{"result": {...}}`` or ``{"error": MESSAGE, "kind": CLASS,
"source_alive": BOOL or null}``. PROGRAMS is a `Programs` as JSON.

A migration may be told to halt at a moment (`halt_at`); ``until-halted`` waits for that, ``go-on`` lets it go on.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from support import pace
from vmbus.errors import UsageError, VmbusError
from vmbus.observe.audit.guest import collect_audit
from vmbus.operations.machine import VirtualMachine
from vmbus.operations.migration.address import parse_address
from vmbus.operations.migration.listener import listen
from vmbus.vm.command_line import Programs
from vmbus.vm.moments import Moment

AUDIT = Path("/tmp/audit")
"""Where the servers of this owner keep their audit records."""
COLLECTED = Path("/tmp/collected")
"""Where the guest's are put: apart, since clones of a guest go on with the same ones."""
READY = "ready for requests"
LINE_LIMIT = 8 << 20


class Owner:
    """See the module."""

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        self.vm: VirtualMachine | None = None
        self._halted = asyncio.Event()
        self._go_on = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            request = json.loads(await reader.readline())
            command = request.pop("command")
            try:
                answer = {"result": await getattr(self, "do_" + command.replace("-", "_"))(**request)}
            except VmbusError as error:
                print(f"{command}: {error}", flush=True)
                alive = getattr(error, "source_alive", None)
                answer = {"error": str(error), "kind": type(error).__name__, "source_alive": alive}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        finally:
            self.tasks.discard(task)
            writer.close()

    @property
    def here(self) -> VirtualMachine:
        if self.vm is None or self.vm.ended:
            raise UsageError("no VM is here")
        return self.vm

    async def do_restore(self, directory: str) -> dict[str, Any]:
        self.vm = await VirtualMachine.restore(Path(directory), self.programs, audit=AUDIT)
        return {}

    async def do_receive(self, address: str, secret: str, halt_at: str | None = None, **more: Any) -> dict[str, Any]:
        listener = await listen(parse_address(address), bytes.fromhex(secret))
        self.vm = None
        self.vm = await VirtualMachine.receive(
            listener, self.programs, timeout=pace.seconds(60.0), at=self._hook(halt_at), audit=AUDIT, **more
        )
        return {"phases": self.vm.phases}

    async def do_migrate(self, address: str, secret: str, halt_at: str | None = None, **more: Any) -> dict[str, Any]:
        report = await self.here.migrate(address, bytes.fromhex(secret), at=self._hook(halt_at), **more)
        return dict(msgspec.to_builtins(report))

    async def do_save(self, directory: str, **more: Any) -> dict[str, Any]:
        return dict(msgspec.to_builtins(await self.here.save(Path(directory), **more)))

    async def do_agent(self, name: str, arguments: dict[str, Any], timeout: float) -> dict[str, Any]:
        return await self.here.call_agent(name, timeout=timeout, **arguments)

    async def do_device(self) -> dict[str, Any]:
        """The device server's status."""
        control = self.here.control
        assert control is not None
        return await self.here.guard(control.call("status"), "the device server's status", 30.0)

    async def do_audit(self) -> dict[str, Any]:
        """Fetches the guest's audit records; the uid of the server's own."""
        await collect_audit(self.here, COLLECTED)
        return {"uid": (await self.here.call_server("audit"))["uid"]}

    async def do_state(self) -> dict[str, Any]:
        """Whether there is a VM, and whether its vCPUs run."""
        if self.vm is None or self.vm.ended:
            return {"vm": False, "running": False}
        return {"vm": True, "running": await self.vm.guard(self.vm.monitor.running(), "QEMU's run state", 30.0)}

    async def do_kill(self) -> dict[str, Any]:
        if self.vm is not None:
            await self.vm.kill()
        return {}

    async def do_until_halted(self) -> dict[str, Any]:
        await self._halted.wait()
        return {}

    async def do_go_on(self) -> dict[str, Any]:
        self._go_on.set()
        return {}

    def _hook(self, halt_at: str | None) -> Any:
        self._halted.clear()
        self._go_on.clear()

        async def at(moment: Moment) -> None:
            print(f"at {moment.value}", flush=True)
            if moment.name == halt_at:
                self._halted.set()
                await self._go_on.wait()

        return at


async def main(path: str, programs: str) -> None:
    """Serves until it is killed."""
    owner = Owner(msgspec.json.decode(programs, type=Programs, dec_hook=lambda kind, value: kind(value)))
    server = await asyncio.start_unix_server(owner.accept, path=path, limit=LINE_LIMIT)
    print(READY, flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
