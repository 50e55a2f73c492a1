"""`python -m vmbus.cli.serve`: the process of one device server, put together. Prints one JSON line when it listens."""

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

from vmbus.device.description import load_device
from vmbus.errors import VmbusError
from vmbus.observe.capture.capture import DEFAULT_EXTERNAL
from vmbus.observe.instruments import all_instruments
from vmbus.server.app import DeviceServer
from vmbus.server.restoring import read_state
from vmbus.transport.library import find_and_load
from vmbus.util.complaints import COMPLAINTS

_GARBAGE = (20_000, 20, 50)
"""Python looks for cycles after so many new objects, and at older ones so much more rarely. With its own figures, a
guest that maps 16,384 regions of memory causes pauses of 40 to 80 ms."""
_PATH = click.Path(path_type=Path)


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


@click.command()
@click.option("--description", type=_PATH, required=True, help="the device, as JSON")
@click.option("--socket", type=_PATH, required=True, help="vfio-user socket")
@click.option("--control", type=_PATH, required=True, help="control socket")
@click.option("--libvfio-user", "library_path", type=_PATH, help="libvfio-user.so.0 to load")
@click.option("--restore", type=_PATH, help="saved device state to come up from")
@click.option("--files", type=_PATH, help="directory with the providers' files that belong to it")
@click.option("--await-state", is_flag=True, help="do nothing until the command `load` brings the device's state")
@click.option("--audit", type=_PATH, help="directory for the audit record (docs/audit.md)")
@click.option("--capture", type=_PATH, help="new file for a capture from the beginning on")
@click.option("--external", default=DEFAULT_EXTERNAL, help="bytes that it copies of each packet's external data")
@click.option("--verbose", is_flag=True, help="log what happens in detail")
def main(
    description: Path,
    socket: Path,
    control: Path,
    library_path: Path | None,
    restore: Path | None,
    files: Path | None,
    await_state: bool,
    audit: Path | None,
    capture: Path | None,
    external: int,
    verbose: bool,
) -> None:
    """Run one device server until it is told to stop."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # What comes from elsewhere (asyncio, a provider's own loggers) is bounded like what is ours.
    for handler in logging.getLogger().handlers:
        handler.addFilter(COMPLAINTS)
    try:
        library = find_and_load(library_path)

        def make() -> DeviceServer:
            return DeviceServer(
                load_device(description),
                library,
                socket,
                control,
                restore=None if restore is None else read_state(restore),
                awaiting=await_state,
                files=files,
                instruments=all_instruments(audit=audit, capture=capture, external=external),
            )

        asyncio.run(_serve(make, socket, control))
    except VmbusError as error:
        print(f"device server: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        COMPLAINTS.tell()


if __name__ == "__main__":
    main()
