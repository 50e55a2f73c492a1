"""What a test driver is given: its parameters, a way to report, and the PCI function to drive."""

from __future__ import annotations

# ruff: noqa: PTH123 - pathlib costs time in an emulated guest
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar

from vmbus.errors import UsageError
from vmbus_guest.pci import PciFunction

PROGRESS_INTERVAL = 0.5
"""Seconds between two progress reports."""

LOOK_INTERVAL = 0.05
"""Seconds between two looks whether the audit record is wanted."""

if TYPE_CHECKING:
    from vmbus.observe.audit.recorder import Recorder
    from vmbus_guest.channel_driver import ChannelDriver

ACCESS = ("auto", "vfio", "uio")
"""How the device may be reached."""

Value = TypeVar("Value", int, float, str, bool)


class Asked(NamedTuple):
    """A parameter that a driver has asked for. `default` None: a list of objects that must be given."""

    default: Any
    minimum: float | None
    maximum: float | None


class Parameters:
    """The parameters of a run, checked as they are asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self.asked: dict[str, Asked] = {}
        """Those that were asked for, by name."""

    def get(self, name: str, default: Value, *, minimum: float | None = None, maximum: float | None = None) -> Value:
        """Return a parameter, of its default's type. Raises `UsageError` for a wrong type or range."""
        self.asked[name] = Asked(default, minimum, maximum)
        value = self._values.get(name, default)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise UsageError(f"parameter '{name}' must be of type {type(default).__name__}, not {value!r}")
        if isinstance(value, int | float) and not (
            (minimum is None or value >= minimum) and (maximum is None or value <= maximum)  # refuses NaN too
        ):
            limits = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise UsageError(f"parameter '{name}' is {value}; it must be {limits}")
        return value

    def objects(self, name: str) -> list[dict[str, Any]]:
        """Return a parameter that is a list of objects, at least one. Raises `UsageError` if it is not."""
        self.asked[name] = Asked(None, None, None)
        values = self._values.get(name)
        if not isinstance(values, list) or not values or not all(isinstance(value, dict) for value in values):
            raise UsageError(f"parameter '{name}' must be a list of objects, not {values!r}")
        return values

    def texts(self, name: str) -> list[str]:
        """Return a parameter that is a list of texts, at least one. Raises `UsageError` if it is not."""
        self.asked[name] = Asked(None, None, None)
        values = self._values.get(name)
        if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
            raise UsageError(f"parameter '{name}' must be a list of texts, not {values!r}")
        return values

    def check(self) -> None:
        """Raises `UsageError` if there is one that nobody asked for: most likely a typing error."""
        unknown = sorted(set(self._values) - set(self.asked))
        if unknown:
            raise UsageError(f"unknown parameter '{unknown[0]}'; known: {', '.join(sorted(self.asked))}")


class Context:
    """One run of a test driver.

    `open_function` opens the PCI function under test; a run on the host passes its own. `open_uio` opens a driver over
    Linux's own bus, where there can be one, and `prefer_uio` tells whether that is how the device is reached here.
    `output` takes the report as JSON lines: `{"event": "progress", ...}` now and then. Whoever sets `stop_requested`
    asks for an early end.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any],
        open_function: Callable[[], PciFunction],
        output: IO[str] | None = None,
        *,
        open_uio: Callable[[Recorder | None], ChannelDriver] | None = None,
        prefer_uio: Callable[[], bool] = lambda: False,
    ) -> None:
        self.parameters = Parameters(parameters)
        self.open_function = open_function
        self.function = ""
        """Which one, where there are several: an address or a device's name. Empty: the first that Linux has not."""
        self._open_uio = open_uio
        self._prefer_uio = prefer_uio
        self.stop_requested = False
        self.recorder: Recorder | None = None
        self._audit = ""
        self._flushed = ""
        self._next_look = 0.0
        self._output = output
        self._next_progress = 0.0

    def connect(self, access: str = "auto", function: str = "") -> ChannelDriver:
        """Open the device for channels, in one of the ways of `ACCESS`; `function` as the attribute. Raises what that
        raises."""
        self.function = function
        if access == "uio" or (access == "auto" and not function and self._prefer_uio()):
            if self._open_uio is None:
                raise UsageError("the device cannot be reached through UIO from here: only in a guest")
            return self._open_uio(self.recorder)
        from vmbus_guest.driver import VmbusDriver

        opened = self.open_function()
        try:
            return VmbusDriver(opened, recorder=self.recorder)
        except BaseException:
            opened.close()
            raise

    def keep_record(self, directory: str, name: str) -> None:
        """Keep an audit record in a new file of `directory`. Raises EnvironmentProblem."""
        from vmbus.observe.audit.files import guest_recorder

        self._audit = directory
        self.recorder = guest_recorder(directory, name)

    def look_for_flush(self, now: float) -> None:
        """Write the record out if the agent has asked for it since the last time. Cheap: called at every turn."""
        if self.recorder is None or now < self._next_look:
            return
        self._next_look = now + LOOK_INTERVAL
        try:
            with open(f"{self._audit}/flush", encoding="ascii") as file:
                token = file.read()
        except OSError:
            return
        if token != self._flushed:
            self._flushed = token
            self.recorder.flush(token)

    def end_record(self) -> None:
        if self.recorder is not None:
            self.recorder.close()

    @property
    def progress_due(self) -> bool:
        """Whether it is time for a progress report again."""
        return time.monotonic() >= self._next_progress

    def progress(self, **fields: Any) -> None:
        """Report where the run is."""
        self._next_progress = time.monotonic() + PROGRESS_INTERVAL
        self.report("progress", **fields)

    def report(self, event: str, **fields: Any) -> None:
        if self._output is not None:
            self._output.write(json.dumps({"event": event, **fields}, separators=(",", ":")) + "\n")
            self._output.flush()


def standard_output() -> IO[str]:
    """Take standard output for the report alone; from now on prints go to standard error."""
    output = sys.stdout
    sys.stdout = sys.stderr
    return output
