"""The catalogue of test drivers: small programs in the guest that use one kind of device hard and judge what they see.

A test driver is a module. It has either a class `WORKLOAD` (a `Workload`, which can also run beside others, in `mixed`)
or a function `run(context) -> result`, and its documentation string lists its parameters (see `describe`). A result is
an object with a `verdict` of "passed" or "failed". `python3 -m vmbus_guest.testdrivers NAME --parameters JSON` runs a
driver in a process of its own.

Besides those of the catalogue there may be drivers of a user's: files `NAME.py` in a directory, see `DIRECTORY`.

This module stays light: the agent imports it at boot; the drivers themselves are imported where they run.
"""

# os instead of pathlib: the agent imports this, and each import costs boot time in an emulated guest.
# ruff: noqa: PTH112, PTH118, PTH119, PTH208

from __future__ import annotations

import os

TYPE_CHECKING = False  # without `typing`, which costs a tenth of a second under TCG
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

    from vmbus_guest.testdrivers.context import Context
    from vmbus_guest.testdrivers.workload import Workload

DIRECTORY_VARIABLE = "VMBUS_DRIVERS"
DIRECTORY = "/run/vmbus-drivers"
"""Where a user's drivers are, unless the variable says otherwise."""

NAME_RULE = "1 to 32 of a-z, 0-9 and '-', starting with a letter"


class Entry:
    """One test driver of the catalogue."""

    __slots__ = ("module", "summary")

    def __init__(self, module: str, summary: str) -> None:
        self.module = module
        self.summary = summary

    def imported(self) -> ModuleType:
        """The driver's module. Raises what importing it raises."""
        module: ModuleType = __import__(self.module, fromlist=["run"])
        return module

    def workload(self) -> type[Workload] | None:
        """The class of a driver that can run beside others; None for one that cannot."""
        kind: type[Workload] | None = getattr(self.imported(), "WORKLOAD", None)
        return kind

    def load(self) -> Callable[[Context], dict[str, Any]]:
        """Import the driver's module; what runs it."""
        module = self.imported()
        run: Callable[[Context], dict[str, Any]] | None = getattr(module, "run", None)
        if run is not None:
            return run
        from vmbus.errors import UsageError
        from vmbus_guest.testdrivers.workload import run_workload

        kind = self.workload()
        if kind is None:
            raise UsageError(f"test driver {self.module}: it has neither a class WORKLOAD nor a function run")
        return lambda context: run_workload(context, kind)


class FileEntry(Entry):
    """A user's driver in a file."""

    def imported(self) -> ModuleType:
        """Run the file, as a module of its own."""
        import importlib.util
        import sys

        from vmbus.errors import UsageError

        name = "vmbus_driver_" + os.path.basename(self.module).removesuffix(".py").replace("-", "_")
        if name in sys.modules and getattr(sys.modules[name], "__file__", "") == self.module:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, self.module)
        if spec is None or spec.loader is None:
            raise UsageError(f"test driver {self.module}: not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise UsageError(f"test driver {self.module}: {_where(error, self.module)}{error!r}") from error
        return module


def _where(error: BaseException, path: str) -> str:
    """The line of the file that an error comes from."""
    found, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            found = trace.tb_lineno
        trace = trace.tb_next
    return f"line {found}: " if found else ""


def is_name(name: object) -> bool:
    """Whether a user's driver may be called that, see NAME_RULE."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 32
        and name[0] in "abcdefghijklmnopqrstuvwxyz"
        and all(letter in "abcdefghijklmnopqrstuvwxyz0123456789-" for letter in name)
    )


def directory() -> str:
    """Where a user's drivers are."""
    return os.environ.get(DIRECTORY_VARIABLE, DIRECTORY)


def drivers() -> dict[str, Entry]:
    """All of them by name: the catalogue's, and a user's, which never take the place of one of those."""
    found = dict(CATALOGUE)
    where = directory()
    for file in sorted(os.listdir(where)) if os.path.isdir(where) else ():
        name = file.removesuffix(".py")
        if file.endswith(".py") and is_name(name) and name not in found:
            found[name] = FileEntry(os.path.join(where, file), f"your own, from {file}")
    return found


CATALOGUE: dict[str, Entry] = {
    "echo": Entry(
        "vmbus_guest.testdrivers.echo",
        "keeps a window of numbered requests at the echo provider and checks every answer",
    ),
    "raw-echo": Entry(
        "vmbus_guest.testdrivers.raw_echo",
        "counts echo transactions as fast as they go, checking nothing but their number",
    ),
    "burst": Entry(
        "vmbus_guest.testdrivers.burst",
        "has the burst provider flood the guest, checks and answers every packet",
    ),
    "bulk": Entry(
        "vmbus_guest.testdrivers.bulk",
        "has the echo provider transform large buffers in place, as fast as they go, and checks every answer",
    ),
    "remap": Entry(
        "vmbus_guest.testdrivers.remap",
        "maps memory, has the echo provider write to it, and unmaps it, round after round",
    ),
    "many": Entry(
        "vmbus_guest.testdrivers.many",
        "opens many sub-channels at once, with requests and the host's own packets on each of them",
    ),
    "churn": Entry(
        "vmbus_guest.testdrivers.churn",
        "opens a channel and closes it in mid-traffic, again and again; each request is answered or cancelled, once",
    ),
    "gpadl": Entry(
        "vmbus_guest.testdrivers.gpadl",
        "lends memory to the host, which maps it, changes it and lets go, and takes it back, again and again",
    ),
    "hotplug": Entry(
        "vmbus_guest.testdrivers.hotplug",
        "has the host rescind sub-channels and whole instances in mid-traffic and offer them again",
    ),
    "ring-full": Entry(
        "vmbus_guest.testdrivers.ring_full",
        "keeps both rings of a channel full, and stops reading now and then, so that packets queue at both ends",
    ),
    "tiny-rings": Entry(
        "vmbus_guest.testdrivers.tiny_rings",
        "sends packets of all sizes through rings of one page, so that they wrap in every way",
    ),
    "maximum": Entry(
        "vmbus_guest.testdrivers.maximum",
        "sends the largest packets that there are: in the ring, in one piece of memory, in most pieces of memory",
    ),
    "pipe": Entry(
        "vmbus_guest.testdrivers.pipe",
        "sends messages and a stream of bytes over channels in pipe mode, and checks what comes back",
    ),
    "sync": Entry(
        "vmbus_guest.testdrivers.sync",
        "sends synchronous requests, also from inside the processing of the host's packets",
    ),
    "storm": Entry(
        "vmbus_guest.testdrivers.storm",
        "has the burst provider signal for every packet, and needlessly, and rings the doorbell needlessly itself",
    ),
    "idle": Entry(
        "vmbus_guest.testdrivers.idle",
        "keeps a channel open without using it, but for a sign of life now and then",
    ),
    "mixed": Entry(
        "vmbus_guest.testdrivers.mixed",
        "runs several of the others side by side over one connection to the device",
    ),
    "remote": Entry(
        "vmbus_guest.testdrivers.remote",
        "does with channels what a test on the host tells it (`vmbus.testkit.vm`)",
    ),
    "disk-writer": Entry(
        "vmbus_guest.testdrivers.disk_writer",
        "makes a file system on a block device, writes and syncs, and checks what it holds: no channels",
    ),
    "ping": Entry(
        "vmbus_guest.testdrivers.ping",
        "asks a host for echoes, and reports which came back: no device",
    ),
    "interface": Entry(
        "vmbus_guest.testdrivers.interface",
        "switches an interface of another driver's on, such as virtio_net's, and gives it an address: no device",
    ),
    "transfer": Entry(
        "vmbus_guest.testdrivers.transfer",
        "sends and takes TCP streams whose every byte is known, and checks them: no device",
    ),
    "frames": Entry(
        "vmbus_guest.testdrivers.frames",
        "sends and takes frames over connections of AF_VSOCK or TCP, checks each, and connects again: no channels",
    ),
    "disk-speed": Entry(
        "vmbus_guest.testdrivers.disk_speed",
        "reads or writes a block device past the page cache and counts: no channels",
    ),
    "command": Entry(
        "vmbus_guest.testdrivers.command",
        "runs a program again and again, each time to its end: no device",
    ),
    "function": Entry(
        "vmbus_guest.testdrivers.function",
        "opens the PCI function, reads its registers, maps memory for it, and closes it: no channels",
    ),
    "catalogue": Entry(
        "vmbus_guest.testdrivers.describe",
        "lists the test drivers and their parameters: no device",
    ),
}
"""By name."""
