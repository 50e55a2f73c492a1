"""What is plugged into a device server to look at it: audit records, captures, inspections; and what tools may ask of
each. Implements `vmbus.server.instruments`."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from vmbus.device.observing import DeviceObserver
from vmbus.errors import UsageError
from vmbus.observe.audit.device import RecordingObserver
from vmbus.observe.audit.files import make_directory, recorder_in
from vmbus.observe.capture.capture import DEFAULT_EXTERNAL, Capture, CaptureOptions
from vmbus.observe.inspection.collect import Listing, inspect_device
from vmbus.observe.inspection.document import DEFAULT_PACKETS, ServerInfo, as_answer
from vmbus.server.commands import Answer, Arguments, Command, facts
from vmbus.server.instruments import Instrument

if TYPE_CHECKING:
    from vmbus.server.app import DeviceServer


def all_instruments(
    *, audit: Path | None = None, capture: Path | None = None, external: int = DEFAULT_EXTERNAL
) -> list[Instrument]:
    """Those of a server. `audit`: the directory for audit records, made if need be; None: nothing is recorded.
    `capture`: the file for a capture of all packets from the beginning on (docs/capture.md); None: no capture yet.
    `external`: bytes that it copies of each packet's external data.

    Raises EnvironmentProblem and UsageError.
    """
    records = Records(audit)
    return [records, Captures(capture, external), Inspections()]


# ---- audit records ---------------------------------------------------------------------------------------------------


class Records(Instrument):
    """An audit record for each session, in a directory."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        if directory is not None:
            make_directory(directory)
        self.commands = {"audit": Command(self._flush)}

    def observer(self, name: str) -> DeviceObserver | None:
        """With a record of its own."""
        return None if self._directory is None else RecordingObserver(recorder_in(self._directory, "host", name))

    async def _flush(self, server: DeviceServer, _: Arguments) -> Answer:
        """Write the audit record up to now, and say which it is."""
        for observer in server.device.observers:
            if isinstance(observer, RecordingObserver):
                recorder = observer.recorder
                return {
                    "on": True,
                    "position": recorder.flush("asked for"),
                    "uid": recorder.uid,
                    "path": recorder.path,
                    "failed": recorder.failed,
                }
        return {"on": False}


# ---- captures --------------------------------------------------------------------------------------------------------


class CaptureArguments(Arguments, frozen=True):
    """The new file, or a FIFO that is read; see docs/capture.md."""

    path: str
    options: CaptureOptions | None = None


class Captures(Instrument):
    """At most one at a time."""

    def __init__(self, path: Path | None, external: int) -> None:
        self._capture = None if path is None else Capture(path.absolute(), CaptureOptions(external=external))
        self.commands = {
            "capture-start": Command(self._start, CaptureArguments),
            "capture-stop": Command(self._stop),
            "capture": Command(self._status),
        }

    def observer(self, name: str) -> DeviceObserver | None:
        """The capture that is running."""
        return self._capture

    def close(self) -> None:
        """What is left of it is written."""
        if self._capture is not None:
            self._capture.stop()

    async def _start(self, server: DeviceServer, asked: CaptureArguments) -> Answer:
        before = self._capture
        if before is not None and before.status()["running"]:
            raise UsageError(f"a capture is running already, to {before.path}; stop that first (capture-stop)")
        self._capture = Capture(Path(asked.path), asked.options or CaptureOptions())
        if before is not None:
            server.device.remove_observer(before)
        server.device.add_observer(self._capture)
        return self._capture.status()

    async def _stop(self, server: DeviceServer, _: Arguments) -> Answer:
        """End the capture and write what is left of it. Its figures, also if it had ended by itself."""
        capture = self._capture
        if capture is None:
            raise UsageError("there is no capture to stop")
        if capture in server.device.observers:
            server.device.remove_observer(capture)
        await asyncio.to_thread(capture.let_go())
        if self._capture is capture:
            self._capture = None
        return capture.status()

    async def _status(self, server: DeviceServer, _: Arguments) -> Answer:
        """How the capture goes; `running` is False, and nothing else is told, without one."""
        return {"running": False} if self._capture is None else self._capture.status()


# ---- inspections -----------------------------------------------------------------------------------------------------


class InspectArguments(Arguments, frozen=True):
    """`packets`: how many of each sort are listed for each channel; 0: they are only counted. `channels`: of which
    channels, by name; None: of all."""

    packets: Annotated[int, msgspec.Meta(ge=0)] = DEFAULT_PACKETS
    channels: list[str] | None = None


class Inspections(Instrument):
    """Looks when it is asked."""

    def __init__(self) -> None:
        self.commands = {"inspect": Command(self._inspect, InspectArguments)}

    async def _inspect(self, server: DeviceServer, asked: InspectArguments) -> dict[str, Any]:
        """Everything about the device, see `vmbus.observe.inspection`."""
        document = inspect_device(
            server.description.name,
            server.config.snapshot(),
            server.device,
            server.providers,
            server.session.hosts,
            Listing(asked.packets, asked.channels),
        )
        document.description = msgspec.to_builtins(server.description)
        document.server = ServerInfo(**facts(server), life=server.sessions, uptime=time.monotonic() - server.began)
        return as_answer(document)
