"""A device server in this process, for tests: its own thread and event loop, the real transport, real sockets.

`LoopbackServer` is one server; a test connects to it with `LoopbackFunction` and drives the guest's side with
`vmbus_guest.driver.VmbusDriver`. `save` and a second server with `restore` stand in for a save and restore of a VM.
"""

import asyncio
import concurrent.futures
import contextlib
import tempfile
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from vmbus.device import saved
from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.errors import WaitTimeout
from vmbus.observe.instruments import all_instruments
from vmbus.server.app import DeviceServer
from vmbus.testkit.loopback.function import LoopbackFunction
from vmbus.transport.library import Library

_START_TIMEOUT = 10.0


def describe(*kinds: str, **options: dict[str, Any]) -> DeviceDescription:
    """A device with one provider of each kind, named after it; `options` by kind."""
    return DeviceDescription(
        name="vmbus0",
        providers=[
            ProviderDescription(
                kind=kind,
                name=kind,
                instance=str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{kind}.loopback.test")),
                options=options.get(kind, {}),
            )
            for kind in kinds
        ],
    )


class LoopbackServer:
    """A running device server. A context manager; `function` connects a guest to it.

    Attributes:
        server: the `DeviceServer`. Touch it only through `on_loop`.
        socket_path: where vfio-user clients connect. control_path: its control socket.
    """

    def __init__(
        self,
        description: DeviceDescription,
        library: Library,
        *,
        restore: saved.DeviceState | None = None,
        awaiting: bool = False,
        files: Path | None = None,
        audit: Path | None = None,
        capture: Path | None = None,
    ) -> None:
        """Starts it; arguments as for the server. Raises what the server raises."""
        self._stack = contextlib.ExitStack()
        self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vmbus-loopback-")))
        self.socket_path = self.directory / "vfio.sock"
        self.control_path = self.directory / "control.sock"
        self.server: DeviceServer
        self._loop: asyncio.AbstractEventLoop
        started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=self._run,
            args=(description, library, restore, awaiting, files, audit, capture, started),
            name="device-server",
            daemon=True,
        )
        self._thread.start()
        try:
            started.result(_START_TIMEOUT)
        except BaseException:
            self._thread.join(_START_TIMEOUT)
            self._stack.close()
            raise

    def _run(
        self,
        description: DeviceDescription,
        library: Library,
        restore: saved.DeviceState | None,
        awaiting: bool,
        files: Path | None,
        audit: Path | None,
        capture: Path | None,
        started: "concurrent.futures.Future[None]",
    ) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self.server = DeviceServer(
                description,
                library,
                self.socket_path,
                self.control_path,
                restore=restore,
                awaiting=awaiting,
                files=files,
                instruments=all_instruments(audit=audit, capture=capture),
            )
            await self.server.run(lambda: started.set_result(None))

        try:
            asyncio.run(serve())
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            else:
                raise

    def on_loop(self, call: Callable[[], Any], timeout: float = 10.0) -> Any:
        """Run `call` on the server's loop and return its result."""

        async def run() -> Any:
            return call()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(timeout)

    def command(self, command: str, /, timeout: float = 30.0, **arguments: Any) -> dict[str, Any]:
        """A control command, without the socket in between."""
        work = asyncio.run_coroutine_threadsafe(self.server.command(command, arguments), self._loop)
        try:
            return work.result(timeout)
        except concurrent.futures.TimeoutError as error:
            raise WaitTimeout(f"the server to do {command!r}", timeout) from error

    def function(self, **arguments: Any) -> LoopbackFunction:
        """Connect a guest, which is the caller's to close; arguments as for `LoopbackFunction`."""
        return LoopbackFunction(self.socket_path, **arguments)

    def save(self, files: Path | None = None, *, moving: bool = False) -> saved.DeviceState:
        """Pause the server and take its state, through the file as it would be written; providers' files go into the
        directory `files`. `moving`: as for a live migration."""
        self.command("pause")
        path = self.directory / f"state-{uuid.uuid4().hex}.bin"
        self.command("save", path=str(path), files=None if files is None else str(files), moving=moving)
        return saved.decode(path.read_bytes())

    def stop(self) -> None:
        """End the server. Repeating it does nothing."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self.server.stop)
            self._thread.join(10.0)
            if self._thread.is_alive():
                raise WaitTimeout("the device server's thread to end", 10.0)
        self._stack.close()

    def __enter__(self) -> "LoopbackServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
