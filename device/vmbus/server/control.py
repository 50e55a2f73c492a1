"""The control socket: tools talk to a device server in JSON lines.

Request `{"id": 1, "command": "status", "arguments": {}}`, answer `{"id": 1, "result": {...}}` or
`{"id": 1, "error": {"kind": "...", "message": "..."}}`, with a `code` if the error has one. The socket belongs to its
owner only. Commands of one connection run one after another.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from vmbus.errors import EnvironmentProblem, ReportedError, UsageError, VmbusError, WaitTimeout, code_of
from vmbus.util.complaints import bounded_log
from vmbus.util.listening import Listener, listening
from vmbus.util.patience import Guard, patient

log = bounded_log(__name__)

MAX_LINE = 16 << 20
CONTROL_SUFFIX = ".control"
"""What is put behind the path of the vfio-user socket for the control socket's, unless somebody says another one."""
_ANSWER_TIMEOUT = 60.0  # seconds that a client may take to read an answer

Handler = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]


class ControlError(ReportedError):
    """The server answered with an error; its `kind` is "internal" for a defect there."""

    def __init__(self, command: str, kind: str, message: str, code: str = "") -> None:
        super().__init__(f"device server, {command}: {message}", kind, code)


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    id: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    command: str
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)


class _Error(msgspec.Struct, omit_defaults=True):
    kind: str
    message: str
    code: str = ""


class _Response(msgspec.Struct, omit_defaults=True):
    id: int
    result: dict[str, Any] | None = None
    error: _Error | None = None


def _encode(response: _Response) -> bytes:
    try:
        return msgspec.json.encode(response)
    except (TypeError, ValueError, OverflowError) as error:
        log.exception("an answer cannot be sent")
        return msgspec.json.encode(_Response(response.id, error=_Error("internal", repr(error))))


def decode_request(line: bytes) -> _Request:
    """What is asked for in a line. Raises UsageError."""
    try:
        return msgspec.json.decode(line, type=_Request)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UsageError(f"not a request: {error}") from error


def decode_response(line: bytes) -> _Response:
    """What a server answers in a line. Raises EnvironmentProblem."""
    try:
        return msgspec.json.decode(line, type=_Response)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise EnvironmentProblem(f"what the device server says cannot be understood: {error}") from error


class ControlServer:
    """Serves `handler` on a socket: at a path, or one that was handed over."""

    def __init__(self, path: Path | Listener, handler: Handler) -> None:
        self._path = path
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._listener: Listener
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. Raises EnvironmentProblem."""
        self._listener = listening(self._path)
        self._server = await asyncio.start_unix_server(self._serve, sock=self._listener.socket, limit=MAX_LINE)

    async def close(self) -> None:
        """Stop listening, end all connections, remove the socket."""
        if self._server is None:
            return  # what is at the path, if anything, is not ours
        self._server.close()
        current = asyncio.current_task()
        for task in list(self._tasks):
            if task is not current:
                task.cancel()
        self._listener.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while line := await reader.readline():
                writer.write(_encode(await self._answer(line)) + b"\n")
                async with asyncio.timeout(_ANSWER_TIMEOUT):
                    await writer.drain()
        except TimeoutError:
            log.warning("control connection ended: its other end has not read an answer for %g s", _ANSWER_TIMEOUT)
            writer.transport.abort()
        except (ConnectionError, ValueError, asyncio.LimitOverrunError) as error:
            log.warning("control connection ended: %s", error)
        except asyncio.CancelledError:
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, line: bytes) -> _Response:
        try:
            request = decode_request(line)
        except UsageError as error:
            return _Response(0, error=_Error(error.kind, str(error)))
        try:
            return _Response(request.id, result=await self._handler(request.command, request.arguments))
        except VmbusError as error:
            return _Response(request.id, error=_Error(error.kind, str(error), code_of(error)))
        except Exception as error:
            log.exception("control command %s failed", request.command)
            return _Response(request.id, error=_Error("internal", repr(error)))


class ControlClient:
    """A tool's connection to a device server. Connects at the first call, again after a failure."""

    def __init__(self, path: Path, guard: Guard | None = None) -> None:
        """`guard`: what waits for each answer, for a server that may die meanwhile."""
        self._path = path
        self._guard = guard
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._lock = asyncio.Lock()
        self._id = 0

    async def call(self, command: str, /, timeout: float = 30.0, **arguments: Any) -> dict[str, Any]:
        """One command. Raises ControlError (the server refused), WaitTimeout, EnvironmentProblem (no server).

        `timeout`: seconds of a usual machine, see `vmbus.util.patience`.
        """
        work = self._bounded(command, patient(timeout), arguments)
        if self._guard is None:
            return await work
        answer: dict[str, Any] = await self._guard(work, f"the device server's answer to {command!r}", timeout + 1)
        return answer

    async def _bounded(self, command: str, timeout: float, arguments: dict[str, Any]) -> dict[str, Any]:
        async with self._lock:
            try:
                async with asyncio.timeout(timeout):
                    return await self._call(command, arguments)
            except asyncio.CancelledError:
                # The answer may still come; it must not be taken for that of the next call.
                self.close()
                raise
            except TimeoutError as error:
                self.close()
                raise WaitTimeout(f"the device server on {self._path} to answer {command!r}", timeout) from error
            except EnvironmentProblem:
                self.close()
                raise
            except (OSError, EOFError, ValueError) as error:  # a line that is too long is a ValueError
                self.close()
                raise EnvironmentProblem(
                    f"the device server on {self._path} is gone or never was there ({command!r}: {error!r})"
                ) from error

    async def _call(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if self._writer is None or self._reader is None:
            self._reader, self._writer = await asyncio.open_unix_connection(str(self._path), limit=MAX_LINE)
        self._id += 1
        self._writer.write(msgspec.json.encode(_Request(self._id, command, arguments)) + b"\n")
        await self._writer.drain()
        line = await self._reader.readline()
        if not line:
            raise EOFError("connection closed")
        response = decode_response(line)
        if response.id != self._id:
            raise EOFError(f"answer {response.id} came for request {self._id}")
        if response.error is not None:
            raise ControlError(command, response.error.kind, response.error.message, response.error.code)
        return response.result or {}

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None
