"""`python -m vmbus.server`: run one device server. Prints one JSON line when it listens."""

import asyncio
import gc
import json
import logging
import signal
import sys
from pathlib import Path

import click

from vmbus.device import saved
from vmbus.device.description import load_device
from vmbus.errors import EnvironmentProblem, VmbusError
from vmbus.observe.capture.capture import DEFAULT_EXTERNAL
from vmbus.server.app import DeviceServer
from vmbus.transport.library import Library, find_and_load
from vmbus.util.complaints import COMPLAINTS

_GARBAGE = (20_000, 20, 50)
"""Python looks for cycles after so many new objects, and at older ones so much more rarely. With its own figures, a
guest that maps 16,384 regions of memory causes pauses of 40 to 80 ms."""


def read_state(path: Path) -> saved.DeviceState:
    """The saved state in a file. Raises EnvironmentProblem or StateError."""
    try:
        data = saved.read_file(path)
    except OSError as error:
        raise EnvironmentProblem(f"cannot read device state {path}: {error.strerror}") from error
    return saved.decode(data)


async def _serve(
    description_path: Path,
    socket_path: Path,
    control_path: Path,
    library: Library,
    restore: Path | None,
    await_state: bool,
    files: Path | None,
    audit: Path | None,
    capture: Path | None,
    external: int,
) -> None:
    description = load_device(description_path)
    state = None if restore is None else read_state(restore)
    server = DeviceServer(
        description,
        library,
        socket_path,
        control_path,
        restore=state,
        awaiting=await_state,
        files=files,
        audit=audit,
        capture=capture,
        external=external,
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)

    def ready() -> None:
        line = {"event": "listening", "socket": str(socket_path), "control": str(control_path)}
        print(json.dumps(line), flush=True)

    # What is here now stays; to look through it for garbage again and again would take longer than any turn may.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GARBAGE)
    await server.run(ready)


@click.command()
@click.option("--description", type=click.Path(path_type=Path), required=True, help="the device, as JSON")
@click.option("--socket", "socket_path", type=click.Path(path_type=Path), required=True, help="vfio-user socket")
@click.option("--control", "control_path", type=click.Path(path_type=Path), required=True, help="control socket")
@click.option("--libvfio-user", "library_path", type=click.Path(path_type=Path), help="libvfio-user.so.0 to load")
@click.option("--restore", type=click.Path(path_type=Path), help="saved device state to come up from")
@click.option("--files", type=click.Path(path_type=Path), help="directory with the providers' files that belong to it")
@click.option("--await-state", is_flag=True, help="do nothing until the command `load` brings the device's state")
@click.option("--audit", type=click.Path(path_type=Path), help="directory for the audit record (docs/audit.md)")
@click.option("--capture", type=click.Path(path_type=Path), help="new file for a capture from the beginning on")
@click.option("--external", default=DEFAULT_EXTERNAL, help="bytes that it copies of each packet's external data")
@click.option("--verbose", is_flag=True, help="log what happens in detail")
def main(
    description: Path,
    socket_path: Path,
    control_path: Path,
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
    description_path = description
    try:
        library = find_and_load(library_path)
        work = _serve(
            description_path, socket_path, control_path, library, restore, await_state, files, audit, capture, external
        )
        asyncio.run(work)
    except VmbusError as error:
        print(f"device server: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        COMPLAINTS.tell()


if __name__ == "__main__":
    main()
