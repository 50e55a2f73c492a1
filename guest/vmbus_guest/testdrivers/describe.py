"""Test driver `catalogue`: what test drivers there are, and their parameters. No device.

Parameters:

    driver   only this one

A driver's parameters are described in its module's documentation string (for a class also in those of the modules of
the classes above it): lines with four spaces, the name or names, two spaces or more, the text; lines that go on are
indented further. Defaults and limits are what the driver really asks for.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from vmbus.errors import UsageError
from vmbus_guest.pci import PciFunction
from vmbus_guest.testdrivers import Entry, drivers
from vmbus_guest.testdrivers.context import Asked, Context, Parameters

COMMON = {
    "instance": "UUID of the channel's instance (default: the first of the type that nobody uses)",
    "ring_pages_in": "data pages of 4096 bytes in the ring from the host (uio: the kernel decides)",
    "ring_pages_out": "data pages of 4096 bytes in the ring to the host (uio: the kernel decides)",
    "access": "how the device is reached: 'vfio', 'uio' (through Linux's own bus), or 'auto'",
    "function": "which device of several: its name, or its function's address (default: the first that Linux has not)",
    "stall_seconds": "without any progress for so long the run is given up, and what is outstanding counts as lost",
}
"""Of all drivers with a `Workload`."""

_UNKNOWN = "no_such_parameter"


def texts_of(documentation: str | None) -> dict[str, str]:
    """The parameters that a documentation string describes, by name."""
    found: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in (documentation or "").splitlines():
        if line.startswith("Parameters"):
            inside = True
        elif inside and line.startswith("    "):
            head, gap, text = line.strip().partition("  ")
            if line[4] != " " and gap:
                names = [name.strip() for name in head.split(",")]
                found.update(dict.fromkeys(names, text.strip()))
            else:
                found.update({name: f"{found[name]} {line.strip()}" for name in names})
        elif line.strip() and found:
            break
    return found


def describe(entry: Entry) -> dict[str, Any]:
    """One driver: `summary`, whether it is a `workload` (which `mixed` can run), and its `parameters` by name, each
    with `text`, `default`, `minimum` and `maximum`. Raises what importing it raises."""
    module = entry.imported()
    kind = entry.workload()
    if kind is not None:
        parameters = Parameters({})
        kind(parameters)
        modules = [sys.modules[one.__module__] for one in reversed(kind.__mro__) if one.__module__ in sys.modules]
    else:
        context = Context({_UNKNOWN: 0}, _no_function)
        with contextlib.suppress(UsageError):  # as meant: parameters are checked before anything is done
            entry.load()(context)
        parameters = context.parameters
        modules = [module]
    texts = COMMON if kind is not None else {}
    for one in modules:
        texts = texts | texts_of(one.__doc__)
    return {
        "summary": entry.summary,
        "workload": kind is not None,
        "parameters": {name: _parameter(asked, texts.get(name, "")) for name, asked in parameters.asked.items()},
    }


def check_parameters(entry: Entry, values: Mapping[str, Any]) -> None:
    """Raise UsageError, as the driver will, for parameters that it does not take. Nothing is run."""
    kind = entry.workload()
    if kind is not None:
        parameters = Parameters(values)
        kind(parameters)
    else:
        context = Context({_UNKNOWN: 0}, _no_function)
        with contextlib.suppress(UsageError):
            entry.load()(context)
        parameters = Parameters(values)
        for name, asked in context.parameters.asked.items():
            if asked.default is not None:
                parameters.get(name, asked.default, minimum=asked.minimum, maximum=asked.maximum)
            else:
                parameters.asked[name] = asked
    parameters.check()


def _parameter(asked: Asked, text: str) -> dict[str, Any]:
    return {"text": text, **asked._asdict()}


def _no_function() -> PciFunction:
    raise UsageError("a test driver opened the device before it checked its parameters")


def run(context: Context) -> dict[str, Any]:
    """See the module's text. A driver of a user's that cannot be described is named with what is wrong."""
    wanted = context.parameters.get("driver", "")
    context.parameters.check()
    known = drivers()
    if wanted and wanted not in known:
        raise UsageError(f"no test driver '{wanted}'; there are {', '.join(sorted(known))}")
    found: dict[str, Any] = {}
    for name in [wanted] if wanted else sorted(known):
        try:
            found[name] = describe(known[name])
        except Exception as error:
            if wanted:
                raise
            found[name] = {"summary": known[name].summary, "error": str(error)}
    return {"drivers": found, "verdict": "passed"}
