"""The command `capture`: a running VM's packets into a pcapng file, what is in such a file, and replaying it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import select
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from vmbus.cli.asking import NAME_FIRST, find_vm
from vmbus.cli.completion import vms
from vmbus.cli.results import WithDefault, json_option, print_result
from vmbus.cli.terminal import console, run
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.observe.capture import record as r
from vmbus.observe.capture.capture import DEFAULT_EXTERNAL, DEFAULT_LIMIT, DEFAULT_SNAPLEN
from vmbus.observe.capture.pcapng import Captured, CaptureReader, Interface
from vmbus.observe.inspection.target import Running, chosen
from vmbus.observe.words import describe
from vmbus.server.control import ControlClient
from vmbus.wire.packet import PacketType

_LOOK = 0.5  # seconds between looks at how a capture goes
_PIPE_BYTES = 1 << 16
_UNITS = {"k": 10, "m": 20, "g": 30}


def parse_size(text: str) -> int:
    """A number of bytes, such as 4096, 64K, 16M or 1G. Raises UsageError."""
    digits, unit = (text[:-1], text[-1].lower()) if text[-1:].isalpha() else (text, "")
    if not digits.isdigit() or (unit and unit not in _UNITS):
        raise UsageError(f"{text!r} is no size such as 4096, 64K, 16M or 1G")
    return int(digits) << _UNITS.get(unit, 0)


class _Commands(WithDefault):
    """`record` may be left out."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["record", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Commands)
def capture() -> None:
    """Record a channel's packets, look at them, replay them.

    \b
    capture [record] [NAME] -o FILE   capture a running VM's packets until Ctrl-C
    capture show FILE                 what is in a capture
    capture frames FILE -o OUTPUT     its network cards' frames, as Wireshark and others know them
    capture replay FILE --provider K  play its guest to a provider, and compare the answers
    """


# ---- record --------------------------------------------------------------------------------------------------------


@capture.command()
@click.argument("name", required=False, shell_complete=vms)
@click.option("-o", "--output", metavar="FILE", help="A new pcapng file; - for standard output.")
@click.option("--channel", "channels", multiple=True, metavar="WHICH", help="Name, interface type or instance [/N].")
@click.option("--snaplen", default=str(DEFAULT_SNAPLEN), metavar="BYTES", help="Cut each record behind so many bytes.")
@click.option("--external", default=str(DEFAULT_EXTERNAL), metavar="BYTES", help="Of each packet's external data.")
@click.option("--limit", default=str(DEFAULT_LIMIT), metavar="BYTES", help="Of the file; the capture ends there.")
@click.option("--seconds", type=click.FloatRange(min=0), help="End after this time.")
@click.option("--packets", type=click.IntRange(min=1), help="End after about so many packets.")
@click.option("--detach", is_flag=True, help="Start the capture and leave it running.")
@click.option("--status", "ask_status", is_flag=True, help="How the running capture goes.")
@click.option("--stop", "ask_stop", is_flag=True, help="End the running capture.")
@click.option("--device", metavar="NAME|NUMBER", help="Which device of several (default: the first).")
@click.option("--control", type=click.Path(path_type=Path), help="The control socket of a device server, not a VM's.")
@json_option
def record(
    name: str | None,
    output: str | None,
    channels: tuple[str, ...],
    snaplen: str,
    external: str,
    limit: str,
    seconds: float | None,
    packets: int | None,
    detach: bool,
    ask_status: bool,
    ask_stop: bool,
    device: str | None,
    control: Path | None,
    as_json: bool,
) -> None:
    """Capture the packets of VM NAME (none for the only one) until Ctrl-C."""
    socket = control or run(_control(find_vm(name, NAME_FIRST), device))
    if ask_status or ask_stop:
        if output is not None or (ask_status and ask_stop):
            raise UsageError("--status and --stop go alone: without -o, and without each other")
        click.echo(json.dumps(run(_ask(socket, "capture-stop" if ask_stop else "capture")), indent=2))
        return
    if output is None:
        raise UsageError("-o FILE is missing: where should the capture go?")
    options = {
        "channels": list(channels),
        "snaplen": parse_size(snaplen),
        "external": parse_size(external),
        "limit": parse_size(limit),
    }
    if output == "-":
        if detach:
            raise UsageError("--detach needs a file: standard output ends with this command")
        if sys.stdout.isatty():
            raise UsageError("a capture is no text: send standard output into a file or a program")
        if as_json:
            raise UsageError("--json needs -o FILE: the capture has standard output")
        with _pipe() as path:
            status = _watch(socket, path, options, seconds, packets)
        console.print(_summary(status, path), soft_wrap=True)
        _exit(status)
        return
    path = Path(output).absolute()
    if detach:
        begun = run(_ask(socket, "capture-start", path=str(path), options=options))
        print_result(begun, as_json, f"capturing to {path}; capture --stop ends it")
        return
    status = _watch(socket, path, options, seconds, packets)
    print_result(status, as_json, _summary(status, path))
    _exit(status)


async def _control(name: str, device: str | None) -> Path:
    target = Running.vm(name)
    if device is not None:
        (chosen_one,) = await chosen(target, device)
        assert isinstance(chosen_one, Running)
        target = chosen_one
    return target.control


async def _ask(socket: Path, command: str, **arguments: Any) -> dict[str, Any]:
    client = ControlClient(socket)
    try:
        return await client.call(command, **arguments)
    finally:
        client.close()


def _watch(
    socket: Path, path: Path, options: dict[str, Any], seconds: float | None, packets: int | None
) -> dict[str, Any]:
    """Captures until Ctrl-C or a bound, and returns how it went; `gone` in it says why that is not known to the end."""
    status: dict[str, Any] = {}
    gone = ""

    async def attend() -> None:
        nonlocal gone
        client = ControlClient(socket)
        try:
            status.update(await client.call("capture-start", path=str(path), options=options))
            console.print(f"capturing to {path}; Ctrl-C ends it")
            end = None if seconds is None else time.monotonic() + seconds
            try:
                while status["running"] and (packets is None or status["packets"] < packets):
                    left = _LOOK if end is None else min(_LOOK, end - time.monotonic())
                    if left <= 0:
                        break
                    await asyncio.sleep(left)
                    status.update(await client.call("capture"))
            except EnvironmentProblem:
                gone = "the device server has ended"
            finally:
                # Also when this is interrupted: the capture is ours.
                if not gone:
                    status.update(await asyncio.shield(client.call("capture-stop")))
        except EnvironmentProblem:
            if not status:
                raise
            gone = "the device server has ended"
        finally:
            client.close()

    with contextlib.suppress(KeyboardInterrupt):
        run(attend())
    if not status:
        raise KeyboardInterrupt
    return status | {"gone": gone}


def _summary(status: dict[str, Any], path: Path) -> str:
    text = f"{status['packets']} packets of {len(status['channels'])} channels in {path}"
    if status["dropped"]:
        text += f"; {status['dropped']} were dropped, since they came faster than they could be written"
    if status["gone"]:
        text += f" (up to about the end: {status['gone']})"
    if status["ended"]:
        text += f"; the capture has ended by itself: {status['ended']}"
    return text


def _exit(status: dict[str, Any]) -> None:
    """With the status 1, if it ended by itself and was not to."""
    if status["ended"] and not status["full"]:
        sys.exit(1)


@contextlib.contextmanager
def _pipe() -> Iterator[Path]:
    """A FIFO whose content goes to standard output. Nobody else can reach it.

    It is gone as soon as the other end has begun to write: so nothing is left however this process ends.
    """
    directory = tempfile.TemporaryDirectory(prefix="vmbus-capture-")
    with directory:
        path = Path(directory.name) / "fifo"
        os.mkfifo(path, 0o600)
        # Open at both ends from here on, so that neither the server's open nor ours waits or fails.
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        ended = threading.Event()

        def copy() -> None:
            try:
                poll = select.poll()
                poll.register(reader, select.POLLIN)
                while True:
                    poll.poll(100)
                    try:
                        data = os.read(reader, _PIPE_BYTES)
                    except BlockingIOError:
                        if ended.is_set():
                            return
                        continue
                    if not data:
                        if ended.wait(0.05):
                            return
                        continue
                    directory.cleanup()
                    view = memoryview(data)
                    while view:
                        view = view[os.write(1, view) :]
            except OSError:
                pass  # whoever read our standard output is gone
            finally:
                os.close(reader)  # which the server notices, and ends the capture

        thread = threading.Thread(target=copy, name="capture to standard output", daemon=True)
        thread.start()
        try:
            yield path
        finally:
            ended.set()
            thread.join(5.0)


# ---- show ----------------------------------------------------------------------------------------------------------


@capture.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--channel", "channels", multiple=True, metavar="WHICH", help="Name, interface type or instance [/N].")
@click.option("--count", type=click.IntRange(min=1), help="The first so many records.")
@json_option
def show(file: Path, channels: tuple[str, ...], count: int | None, as_json: bool) -> None:
    """Show what is in a capture FILE, a line each: number, seconds, channel, direction, kind, transaction, sizes, and
    what the packet says, or its first bytes."""
    with CaptureReader(file) as reader:
        if as_json:
            _show_json(reader, channels, count)
            return
        first = 0
        for one, found in _selected(reader, channels, count):
            first = first or one.at
            if one.lost:
                click.echo(f"... {one.lost} packets of channel {found.name} were not captured")
            click.echo(f"{one.number:6} {(one.at - first) / 1e9:12.6f} {found.name:16} {_describe(found, one.record)}")
        if reader.torn:
            click.echo(f"note: {reader.torn}")


def _selected(
    reader: CaptureReader, channels: tuple[str, ...], count: int | None
) -> Iterator[tuple[Captured, Interface]]:
    """The first `count` records of these channels."""
    selected = ((one, reader.interfaces[one.interface]) for one in reader)
    yield from itertools.islice((each for each in selected if each[1].selected(channels)), count)


def _show_json(reader: CaptureReader, channels: tuple[str, ...], count: int | None) -> None:
    """As one document, a record a line, however many there are."""
    lead = '{"records": ['
    for one, found in _selected(reader, channels, count):
        record = one.record
        event = record.record == r.EVENT
        plain = {
            "number": one.number,
            "at": one.at,
            "channel": found.name,
            "lost": one.lost,
            "event": record.payload.decode(errors="replace") if event else None,
            "direction": None if event else "host" if record.direction == r.TO_HOST else "guest",
            "kind": None if event else PacketType(record.kind).name,
            "transaction": record.transaction,
            "payload": "" if event else record.payload.hex(),
            "external": record.external_size,
            "words": "" if event or not record.whole else describe(found.type, record.seen()),
        }
        click.echo(f"{lead}\n {json.dumps(plain)}", nl=False)
        lead = ","
    start = "" if lead == "," else lead
    click.echo(f'{start}\n], "torn": {json.dumps(reader.torn or None)}}}')


def _describe(interface: Interface, record: r.Record) -> str:
    if record.record == r.EVENT:
        return record.payload.decode(errors="replace")
    text = f"{'->' if record.direction == r.TO_HOST else '<-'} {PacketType(record.kind).name:10} {record.transaction:8}"
    text += f" {len(record.payload):6} bytes"
    if record.external_size:
        text += f" + {record.external_size} external"
        if record.bits & r.UNCHANGED:
            text += " (unchanged)"
        elif record.bits & r.UNREADABLE:
            text += " (unreadable)"
    words = describe(interface.type, record.seen()) if record.whole else ""
    return f"{text}  {words or record.payload[:24].hex()}"


# ---- frames --------------------------------------------------------------------------------------------------------


@capture.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="A new pcapng file.")
@json_option
def frames(file: Path, output: Path, as_json: bool) -> None:
    """Write the Ethernet frames of network cards in a capture (FILE) to a file of their own, for any tool that reads
    captures of networks."""
    from vmbus.observe.capture.frames import export

    found = export(file, output)
    text = f"{output}: {found.frames} frames"
    if found.missing:
        text += f"; those of {found.missing} packets were captured in part or not at all (--external)"
    document = {"file": str(output), "frames": found.frames, "missing": found.missing}
    print_result(document, as_json, text)


# ---- replay --------------------------------------------------------------------------------------------------------


_MOST_TOLD = 20


class _Told:
    """What a replay finds, line by line as it goes; of much, the beginning."""

    def __init__(self) -> None:
        self._left = _MOST_TOLD

    def __call__(self, text: str) -> None:
        self._left -= 1
        if self._left >= 0:
            click.echo(text, err=True)
        elif self._left == -1:
            click.echo("more of it is in the report", err=True)


@capture.command()
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--provider", "kind", required=True, metavar="KIND", help="As in a description: echo, my_module:MyClass.")
@click.option("--options", "provider_options", default="{}", metavar="JSON", help="The provider's options.")
@click.option("--channel", "channels", multiple=True, metavar="WHICH", help="Name, interface type or instance [/N].")
@click.option("--ignore", multiple=True, metavar="FIRST:BEHIND", help="Bytes of answers that may differ, such as 8:16.")
@click.option(
    "--ignore-packets", is_flag=True, help="Answer what the provider sends of its own, and compare none of it."
)
@click.option(
    "--key",
    metavar="FIRST:BEHIND",
    help="Bytes of the provider's own packets; order counts among those with equal ones.",
)
@click.option("--ignore-external", is_flag=True, help="Do not compare external data.")
@click.option("--timed", is_flag=True, help="Keep the guest's distances in time; else all goes as fast as it can.")
@click.option("--timeout", default=10.0, show_default=True, help="Seconds to wait for each thing that should come.")
@click.option(
    "--give-up", default=5, show_default=True, type=click.IntRange(min=1), help="End after so many that did not come."
)
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def replay(
    files: tuple[Path, ...],
    kind: str,
    provider_options: str,
    channels: tuple[str, ...],
    ignore: tuple[str, ...],
    ignore_packets: bool,
    key: str | None,
    ignore_external: bool,
    timed: bool,
    timeout: float,
    give_up: int,
    as_json: bool,
) -> None:
    """Play the guest of captures (FILES, in this order) to a provider, and compare what it sends with the capture.

    The provider runs in this process, in a device server of its own; no VM is needed. The exit status is 0 only if
    everything came as captured.
    """
    from vmbus.provision.libvfio_user import find_library
    from vmbus.testkit.replay import replay as play
    from vmbus.testkit.replay_report import ReplayOptions, parse_ranges
    from vmbus.transport.library import load

    try:
        settings = json.loads(provider_options)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--options is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UsageError("--options is not a JSON object")
    options = ReplayOptions(
        channels=channels,
        ignore=parse_ranges(ignore),
        ignore_packets=ignore_packets,
        ignore_external=ignore_external,
        key=parse_ranges([key])[0] if key is not None else None,
        timed=timed,
        timeout=timeout,
        give_up=give_up,
    )
    report = play(files, kind, load(find_library()), provider_options=settings, options=options, tell=_Told())
    click.echo(report.to_json() if as_json else str(report))
    sys.exit(0 if report.same else 1)
