"""One process owns a VM; others ask it for things: save, migrate, revert, agent requests, status, the end.

The owner listens on a socket in the VM's run directory (its user's alone). A connection carries one request as a
JSON line, then any number of ``{"progress": TEXT}`` lines, then ``{"result": {...}}`` or ``{"error": {...}}`` with the
error's message, kind, code and exit status.
Whoever hangs up before the answer cancels what was asked for: an interrupted save leads back to a running VM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from vmbus.cli.asking import LINE_LIMIT, Status
from vmbus.cli.results import Failure
from vmbus.cli.viewers import Viewers
from vmbus.errors import UsageError, VmbusError
from vmbus.observe.audit.guest import collect_audit
from vmbus.operations.machine import VirtualMachine
from vmbus.operations.migration.channel import NO_SECRET, read_secret
from vmbus.operations.migration.tls import for_source
from vmbus.vm.timing import Progress

_REQUEST_TIMEOUT = 10.0


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    command: str
    arguments: dict[str, Any] = {}


class _None(msgspec.Struct):
    """The arguments of a command that has none."""


class _SaveArguments(msgspec.Struct, forbid_unknown_fields=True):
    directory: str
    live: bool = False
    keep: bool = False


class _MigrateArguments(msgspec.Struct, forbid_unknown_fields=True):
    """`secret_file`, `tls`: one of them at least; `tls` is a directory with certificates."""

    address: str
    secret_file: str | None = None
    tls: str | None = None
    tls_name: str | None = None
    multifd: int = 0
    timeout: float | None = None
    downtime_limit: int | None = None
    bandwidth: int | None = None


class _ResolveArguments(msgspec.Struct, forbid_unknown_fields=True):
    """`run`: None asks the destination."""

    run: bool | None


class _CheckpointsArguments(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`directory`: None for the checkpoints that end with the VM."""

    directory: str | None = None

    @property
    def path(self) -> Path | None:
        return None if self.directory is None else Path(self.directory)


class _CheckpointArguments(_CheckpointsArguments, forbid_unknown_fields=True, kw_only=True):
    tag: str


class _AgentArguments(msgspec.Struct, forbid_unknown_fields=True):
    command: str
    arguments: dict[str, Any] = {}
    timeout: float = 30.0


class _ProviderArguments(msgspec.Struct, forbid_unknown_fields=True):
    provider: str
    command: str
    arguments: dict[str, Any] = {}
    seconds: float = 10.0


class _Begun:
    """The progress of a request, of which the owner's terminal hears once its first phase begins: what was refused is
    told to whoever asked alone."""

    def __init__(self, notice: Callable[[str], None], progress: Progress, text: str = "") -> None:
        self._notice = notice
        self._progress = progress
        self._text = text
        self._begun = False

    def __call__(self, phase: str) -> None:
        if not self._begun:
            self._begun = True
            if self._text:
                self._notice(self._text)
        self._progress(phase)

    def failed(self, text: str) -> None:
        """It came to nothing."""
        if self._begun and text:
            self._notice(text)


class _StopArguments(msgspec.Struct, forbid_unknown_fields=True):
    kill: bool = False
    timeout: float = 60.0


class Supervisor:
    """Serves a VM's socket, and its console, until the VM ends.

    `on_notice` is told in a sentence about what others did (for the owner's terminal). `on_serving` is told once others
    can ask. `log`: that of an owner without a terminal.
    """

    def __init__(
        self,
        vm: VirtualMachine,
        on_notice: Callable[[str], None] | None = None,
        *,
        on_serving: Callable[[Status], None] | None = None,
        log: Path | None = None,
    ) -> None:
        self.vm = vm
        self._since = time.time()
        self._on_serving = on_serving
        self._log = log
        self._on_notice = on_notice or (lambda _: None)
        vm.on_notice = self._on_notice
        self._finished: asyncio.Future[str] | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._commands: dict[str, tuple[type[msgspec.Struct], Callable[[Any, Progress], Awaitable[Any]]]] = {
            "status": (_None, self._status),
            "save": (_SaveArguments, self._save),
            "migrate": (_MigrateArguments, self._migrate),
            "resolve": (_ResolveArguments, self._resolve),
            "checkpoint": (_CheckpointArguments, self._checkpoint),
            "checkpoints": (_CheckpointsArguments, self._checkpoints),
            "delete-checkpoint": (_CheckpointArguments, self._delete_checkpoint),
            "revert": (_CheckpointArguments, self._revert),
            "agent": (_AgentArguments, self._agent),
            "audit": (_None, self._audit),
            "provider": (_ProviderArguments, self._provider),
            "stop": (_StopArguments, self._stop),
        }

    async def run(self) -> str:
        """Serves until the VM ends, ends its processes if they are ours, and says why: powered off, saved, or stopped.

        Raises `GuestPanicked`, and `ProcessDied` if QEMU or the device server ended by itself. The VM is torn down in
        every case, also when this is cancelled.
        """
        self._finished = asyncio.get_running_loop().create_future()
        ended = asyncio.create_task(self.vm.wait_ended())
        console = asyncio.create_task(self._serve_console())
        try:
            server = await asyncio.start_unix_server(self._accept, path=str(self.vm.paths.supervisor), limit=LINE_LIMIT)
            try:
                os.chmod(self.vm.paths.supervisor, 0o600)  # noqa: PTH101 - quick, nothing to wait for
                if self._on_serving is not None:
                    self._on_serving(await self.status())
                either: set[asyncio.Future[Any]] = {ended, self._finished}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if self._finished.done():
                    return self._finished.result()
                if self.vm.moved_to is not None:
                    return f"migrated to {self.vm.moved_to}"
                return await ended
            finally:
                server.close()
                await self._let_go()
        finally:
            ended.cancel()
            console.cancel()
            await asyncio.gather(console, return_exceptions=True)
            await self.vm.leave()

    async def _serve_console(self) -> None:
        if self.vm.programs.foreign:  # its console is where its owner has put it
            return
        try:
            await Viewers(self.vm.paths.console, self.vm.paths.viewers).serve()
        except VmbusError as error:  # the VM is none the worse for it
            self._on_notice(str(error))

    async def _let_go(self) -> None:
        """Ends the connections; the answer that ended the VM may still be on its way out."""
        if others := {task for task in self._connections if not task.done()}:
            _, pending = await asyncio.wait(others, timeout=1)
            for task in pending:
                task.cancel()

    def finish(self, reason: str) -> None:
        """Makes `run` end the VM and return `reason`."""
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(reason)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT):
                line = await reader.readline()
            work = asyncio.create_task(self._answer(line, writer))
            hangup = asyncio.create_task(reader.read(1))
            try:
                await asyncio.wait({work, hangup}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    work.cancel()
                await asyncio.wait({work})
            finally:
                hangup.cancel()
                work.cancel()
        except (TimeoutError, ValueError, OSError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        def send(message: dict[str, Any]) -> None:
            writer.write(json.dumps(message).encode() + b"\n")

        after: str | None = None
        try:
            request = decode_request(line)
            result, after = await self._perform(request, lambda text: send({"progress": text}))
            send({"result": result})
        except (VmbusError, msgspec.MsgspecError) as error:  # the latter of a command's arguments
            refused = error if isinstance(error, VmbusError) else UsageError(*error.args)
            send({"error": msgspec.to_builtins(Failure.of(refused))})
            if isinstance(error, VmbusError) and self.vm.ended:
                after = str(error)
        finally:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_REQUEST_TIMEOUT):  # who does not read its answer has none
                    await writer.drain()
            if after is not None:
                self.finish(after)

    async def _perform(self, request: _Request, progress: Progress) -> tuple[dict[str, Any], str | None]:
        """The result of a request, and the reason for the VM's end if it is to end now."""
        command = self._commands.get(request.command)
        if command is None:
            raise UsageError(
                f"a VM's supervisor has no command {request.command!r}; it has {', '.join(self._commands)}"
            )
        arguments, perform = command
        result = await perform(msgspec.convert(request.arguments, arguments), progress)
        return result if isinstance(result, tuple) else (result, None)

    @contextlib.contextmanager
    def _announced(self, progress: Progress, text: str = "", interrupted: str = "") -> Iterator[_Begun]:
        """The owner's terminal is told that something has begun, and if it comes to nothing."""
        begun = _Begun(self._on_notice, progress, text)
        try:
            yield begun
        except BaseException as error:
            begun.failed(str(error) or interrupted)
            raise

    async def status(self) -> Status:
        """Raises as the monitor does."""
        vm = self.vm
        running = await vm.guard(vm.monitor.running(), "QEMU's run state", 30.0)
        providers = [one for device in vm.description.all_devices for one in device.providers]
        return Status(
            name=vm.name,
            state="in doubt" if vm.in_doubt else "running" if running else "paused",
            since=self._since,
            pid=os.getpid(),
            device=", ".join(dict.fromkeys(one.kind for one in providers)),
            providers=[one.name for one in providers],
            accelerator=vm.programs.accelerator,
            qemu=vm.programs.qemu_version,
            detached=self._log is not None,
            log=None if self._log is None else str(self._log),
        )

    async def _status(self, _: _None, progress: Progress) -> dict[str, Any]:
        return dict(msgspec.to_builtins(await self.status()))

    async def _save(self, wish: _SaveArguments, progress: Progress) -> tuple[dict[str, Any], str | None]:
        with self._announced(progress, f"saving to {wish.directory} ...", "the save was interrupted") as begun:
            report = await self.vm.save(Path(wish.directory), live=wish.live, keep=wish.keep, progress=begun)
        self._on_notice(f"saved to {report.directory}")
        return msgspec.to_builtins(report), None if wish.keep else f"saved to {report.directory}"

    async def _migrate(self, wish: _MigrateArguments, progress: Progress) -> tuple[dict[str, Any], str]:
        with self._announced(progress, f"migrating to {wish.address} ...", "the migration was interrupted") as begun:
            report = await self.vm.migrate(
                wish.address,
                NO_SECRET if wish.secret_file is None else read_secret(Path(wish.secret_file)),
                tls=None if wish.tls is None else for_source(Path(wish.tls), wish.tls_name),
                multifd=wish.multifd,
                timeout=wish.timeout,
                downtime_limit=wish.downtime_limit,
                bandwidth=wish.bandwidth,
                progress=begun,
            )
        return msgspec.to_builtins(report), f"migrated to {report.address}"

    async def _resolve(self, choice: _ResolveArguments, progress: Progress) -> tuple[dict[str, Any], str | None]:
        await self.vm.resolve(run=choice.run)
        ended = self.vm.ended
        return {"runs": not ended}, "ended here, since it runs at its migration's destination" if ended else None

    async def _checkpoint(self, where: _CheckpointArguments, progress: Progress) -> dict[str, Any]:
        with self._announced(progress) as begun:
            taken = await self.vm.checkpoint(where.tag, directory=where.path, progress=begun)
        self._on_notice(f"checkpoint {where.tag!r} taken")
        return dict(msgspec.to_builtins(taken))

    async def _revert(self, where: _CheckpointArguments, progress: Progress) -> dict[str, Any]:
        with self._announced(progress) as begun:
            report = await self.vm.revert(where.tag, directory=where.path, progress=begun)
        self._on_notice(f"taken back to checkpoint {where.tag!r}{self._clock_ahead()}")
        return dict(msgspec.to_builtins(report))

    async def _checkpoints(self, wish: _CheckpointsArguments, progress: Progress) -> dict[str, Any]:
        return {"checkpoints": msgspec.to_builtins(self.vm.checkpoints(directory=wish.path))}

    async def _delete_checkpoint(self, where: _CheckpointArguments, progress: Progress) -> dict[str, Any]:
        await self.vm.delete_checkpoint(where.tag, directory=where.path)
        return {}

    async def _agent(self, call: _AgentArguments, progress: Progress) -> dict[str, Any]:
        work = self.vm.agent.request(call.command, call.arguments, timeout=call.timeout)
        return await self.vm.guard(work, f"the agent's answer to {call.command!r}", call.timeout + 1)

    async def _audit(self, _: _None, progress: Progress) -> dict[str, Any]:
        vm = self.vm
        if vm.audit is None:
            raise UsageError(f"VM {vm.name!r} keeps no audit records: start it with --audit DIR")
        files = await collect_audit(vm)
        servers = await vm.call_servers("audit")
        return {"directory": str(vm.audit), "files": len(files), "uids": [one["uid"] for one in servers]}

    async def _provider(self, wish: _ProviderArguments, progress: Progress) -> dict[str, Any]:
        return await self.vm.command_provider(wish.provider, wish.command, wish.arguments, timeout=wish.seconds)

    async def _stop(self, wish: _StopArguments, progress: Progress) -> tuple[dict[str, Any], str | None]:
        if wish.kill:
            if self.vm.in_doubt:
                raise UsageError(
                    f"VM {self.vm.name!r} waits for a decision about its migration: scripts/migrate --resolve end ends "
                    "it here"
                )
            await self.vm.kill()
            return {"powered_off": False}, "ended on request"
        self._on_notice("the guest is asked to power off ...")
        await self.vm.power_off(wish.timeout)
        return {"powered_off": True}, None

    def _clock_ahead(self) -> str:
        """Why the guest's kernel may complain right behind this line."""
        if self.vm.programs.accelerator != "tcg":
            return ""
        return (
            "; its clock is ahead by the time since then, which its kernel may take for a soft lockup: it is none "
            "(docs/checkpoints.md)"
        )


def decode_request(line: bytes) -> _Request:
    """What is asked for in a line. Raises `UsageError`."""
    try:
        return msgspec.json.decode(line, type=_Request)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UsageError(f"not a request: {error}") from error
