"""Run one test driver: `python3 -m vmbus_guest.testdrivers NAME [--parameters JSON [--audit DIRECTORY]]`.

Standard output carries the report as JSON lines and nothing else. Exit status: 0 if the run came to its end, whatever
its verdict; 1 if it failed (an `error` line says why); 2 for wrong usage. SIGTERM asks the driver to stop early.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any

from vmbus.errors import UsageError, VmbusError
from vmbus_guest.pci import PciFunction
from vmbus_guest.testdrivers import drivers
from vmbus_guest.testdrivers.context import Context, Parameters, standard_output

if TYPE_CHECKING:
    from vmbus.observe.audit.recorder import Recorder
    from vmbus_guest.channel_driver import ChannelDriver


def main(arguments: list[str]) -> int:
    """Run the driver that the command line names."""
    known = drivers()
    if (
        len(arguments) not in (1, 3, 5)
        or arguments[0] not in known
        or arguments[1:2] not in ([], ["--parameters"])
        or arguments[3:4] not in ([], ["--audit"])
    ):
        usage = "usage: python3 -m vmbus_guest.testdrivers NAME [--parameters JSON [--audit DIRECTORY]]"
        print(usage, file=sys.stderr)
        for name, entry in sorted(known.items()):
            print(f"  {name:11}  {entry.summary}", file=sys.stderr)
        return 2
    output = standard_output()
    context = Context({}, lambda: _open_function(context.function), output, open_uio=_open_uio, prefer_uio=_prefer_uio)
    try:
        if arguments[1:]:
            parameters: Any = json.loads(arguments[2])
            if not isinstance(parameters, dict):
                raise UsageError("the parameters are not a JSON object")
            context.parameters = Parameters(parameters)
        if arguments[3:]:
            context.keep_record(arguments[4], f"{arguments[0]}-{os.getpid()}")

        def stop(*_: object) -> None:
            context.stop_requested = True

        signal.signal(signal.SIGTERM, stop)
        result = known[arguments[0]].load()(context)
    except BrokenPipeError:
        return 1  # nobody listens any more
    except json.JSONDecodeError as error:
        context.report("error", kind="UsageError", message=f"the parameters are not JSON: {error}")
        return 1
    except Exception as error:
        if not isinstance(error, VmbusError):
            traceback.print_exc()
        context.report("error", kind=type(error).__name__, message=str(error))
        return 1
    finally:
        context.end_record()
    context.report("result", result=result)
    return 0


def _open_function(which: str) -> PciFunction:
    from vmbus_guest.vfio import VfioFunction, choose_function

    return VfioFunction.open(address=choose_function(which))


def _open_uio(recorder: Recorder | None) -> ChannelDriver:
    from vmbus_guest.uio import UioDriver

    return UioDriver(recorder=recorder)


def _prefer_uio() -> bool:
    """Whether Linux's own bus drives the device, and no function is left for VFIO."""
    from vmbus_guest.uio import bus_is_there
    from vmbus_guest.vfio import free_functions

    return bus_is_there() and not free_functions()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the kernel takes the memory back faster than the interpreter's tear-down does
