"""`vmbus serve`, and `python -m vmbus.cli.serve`: the process of one device server, put together, for a VM of ours as
for anybody's QEMU. Prints one JSON line when it listens."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import click

import vmbus
from vmbus.device.description import DeviceDescription, load_device
from vmbus.device.pci import DEVICE_ID, VENDOR_ID
from vmbus.errors import UsageError, VmbusError
from vmbus.observe.capture.capture import DEFAULT_EXTERNAL
from vmbus.observe.instruments import all_instruments
from vmbus.providers import PROVIDERS
from vmbus.server.app import DeviceServer
from vmbus.server.control import CONTROL_SUFFIX
from vmbus.server.restoring import read_state
from vmbus.transport.library import Library, find_and_load, named, system_path
from vmbus.util.activation import handed_over
from vmbus.util.complaints import COMPLAINTS
from vmbus.util.listening import Listener, inherited

_GARBAGE = (20_000, 20, 50)
"""Python looks for cycles after so many new objects, and at older ones so much more rarely. With its own figures, a
guest that maps 16,384 regions of memory causes pauses of 40 to 80 ms."""
_PATH = click.Path(path_type=Path)

VFIO_NAME, CONTROL_NAME = "vfio", "control"
"""The names of the sockets that systemd hands over (`FileDescriptorName=`)."""

CAPABILITIES = {
    "type": "vfio-user",
    "description": "VMBus-like synthetic device",
    "version": vmbus.__version__,
    "pci": {"vendor": f"{VENDOR_ID:04x}", "device": f"{DEVICE_ID:04x}"},
    # Options that a launcher may count on; the names are those of vhost-user's back ends where they have them.
    "options": ["socket-path", "fd", "control", "await-state", "restore", "once", "socket-activation"],
    "providers": sorted(PROVIDERS),
}
"""What `--print-capabilities` prints."""


async def _serve(make: Callable[[], DeviceServer], socket: Path, control: Path) -> None:
    server = make()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)

    def ready() -> None:
        line = {"event": "listening", "socket": str(socket), "control": str(control)}
        print(json.dumps(line), flush=True)

    # What is here now stays; to look through it for garbage again and again would take longer than any turn may.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GARBAGE)
    await server.run(ready)


def _print_capabilities(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(json.dumps(CAPABILITIES, indent=2))
        context.exit()


def find_device(text: str) -> DeviceDescription:
    """The device that is meant: of a VM description, by its name or the path of a .toml file, or alone in a JSON file.

    Raises EnvironmentProblem or UsageError.
    """
    if text.endswith(".json"):
        return load_device(Path(text))
    from vmbus.vm.description import named_description  # a server of ours needs none of that

    return named_description(text).device


def find_library(explicit: Path | None) -> Library:
    """The libvfio-user to serve with: as given, the environment's, the system's, or set-up's. Raises
    EnvironmentProblem."""
    if explicit is None and named() is None and system_path() is None:
        from vmbus.provision import libvfio_user  # a server of ours is told which one
        from vmbus.provision.cache import Cache

        if libvfio_user.is_built(Cache()):
            explicit = libvfio_user.find_library()
    return find_and_load(explicit)


def sockets(path: Path | None, descriptor: int | None, control: Path | None) -> tuple[Path | Listener, Path | Listener]:
    """Where to listen: for QEMU, and for tools. Raises UsageError."""
    given = handed_over()
    if (path is None) + (descriptor is None) + (not given) != 2:
        raise UsageError("one of --socket PATH, --fd N and a socket handed over by systemd is needed, and only one")
    vfio: Path | Listener
    if path is not None:
        vfio = path
    elif descriptor is not None:
        vfio = inherited(descriptor)
    else:
        names = sorted(given, key=given.__getitem__)
        chosen = VFIO_NAME if VFIO_NAME in given else next((name for name in names if name != CONTROL_NAME), None)
        if chosen is None:
            raise UsageError(f"systemd handed over {', '.join(names)}, and no socket called {VFIO_NAME!r}")
        vfio = inherited(given[chosen])
    if control is not None:
        return vfio, control
    if CONTROL_NAME in given:
        return vfio, inherited(given[CONTROL_NAME])
    where = vfio.path if isinstance(vfio, Listener) else vfio
    if not where.is_absolute() and isinstance(vfio, Listener):
        raise UsageError("--control PATH is missing: the socket that was handed over has no path to put it beside")
    return vfio, where.with_name(where.name + CONTROL_SUFFIX)


@click.command()
@click.argument("description")
@click.option("--socket", "--socket-path", "socket", type=_PATH, help="Where QEMU is to connect (vfio-user).")
@click.option("--fd", type=click.IntRange(3), metavar="N", help="The socket is descriptor N: listening, or connected.")
@click.option("--control", type=_PATH, help="Where tools connect. Default: beside the other one, with .control behind.")
@click.option("--once", is_flag=True, help="End when the first QEMU that connected has gone.")
@click.option("--libvfio-user", "library_path", type=_PATH, help="The libvfio-user.so.0 to load.")
@click.option("--await-state", is_flag=True, help="Do nothing until a state is loaded: for a restore or a migration.")
@click.option("--restore", type=_PATH, help="File with a device's state to come up from.")
@click.option("--files", type=_PATH, help="Directory with the providers' files that belong to it.")
@click.option("--audit", type=_PATH, help="Directory for the audit record (docs/audit.md).")
@click.option("--capture", type=_PATH, help="New file for a capture from the beginning on.")
@click.option("--external", default=DEFAULT_EXTERNAL, help="Bytes that it copies of each packet's external data.")
@click.option("--verbose", is_flag=True, help="Log what happens in detail.")
@click.option(
    "--print-capabilities",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_capabilities,
    help="Print what this server can do, as JSON, and end.",
)
def main(
    description: str,
    socket: Path | None,
    fd: int | None,
    control: Path | None,
    once: bool,
    library_path: Path | None,
    restore: Path | None,
    files: Path | None,
    await_state: bool,
    audit: Path | None,
    capture: Path | None,
    external: int,
    verbose: bool,
) -> None:
    """Serve one device to a QEMU that somebody else starts, until told to stop.

    DESCRIPTION is a VM description (a name in qemu_configs/, or a path to a .toml file), of which only the device
    counts, or a .json file with a device alone. See docs/plugin.md.

    Example: vmbus serve echo --socket /tmp/vmbus.sock
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # What comes from elsewhere (asyncio, a provider's own loggers) is bounded like what is ours.
    for handler in logging.getLogger().handlers:
        handler.addFilter(COMPLAINTS)
    try:
        vfio_at, control_at = sockets(socket, fd, control)
        device = find_device(description)
        library = find_library(library_path)

        def make() -> DeviceServer:
            return DeviceServer(
                device,
                library,
                vfio_at,
                control_at,
                restore=None if restore is None else read_state(restore),
                awaiting=await_state,
                files=files,
                instruments=all_instruments(audit=audit, capture=capture, external=external),
                once=once,
            )

        paths = [where.path if isinstance(where, Listener) else where for where in (vfio_at, control_at)]
        asyncio.run(_serve(make, *paths))
    except VmbusError as error:
        print(f"device server: {error}", file=sys.stderr, flush=True)
        sys.exit(error.status)
    finally:
        COMPLAINTS.tell()


if __name__ == "__main__":
    main()
