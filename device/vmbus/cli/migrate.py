"""The command that moves a running VM to a destination, and what `run-vm --receive` needs of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.table import Table

from vmbus.cli.asking import NAME_FIRST, ask, find_vm
from vmbus.cli.completion import first_vm
from vmbus.cli.results import facts, json_option, print_result
from vmbus.cli.terminal import MIGRATE_LABELS, Steps, run
from vmbus.errors import UsageError
from vmbus.operations.migration.accept import Accept
from vmbus.operations.migration.address import Address, UnixAddress, parse_address
from vmbus.operations.migration.channel import NO_SECRET, read_secret
from vmbus.operations.migration.report import MigrationReport
from vmbus.operations.migration.tls import Tls, for_destination, for_source

_TIMEOUT = 7200.0

SECRET_HELP = "File with the secret that both sides know: 32 bytes, or 64 hexadecimal digits; mode 0600."
TLS_HELP = (
    "Directory with certificates under QEMU's names (scripts/certificates makes some): everything is encrypted, and "
    "both sides prove who they are."
)
_NO_CREDENTIALS = "--secret-file is missing: both sides of a migration need the same secret, or certificates (--tls)"


@dataclass(frozen=True)
class Reception:
    """How a destination waits for a VM, as `run-vm` was told."""

    address: Address
    secret: bytes
    tls: Tls | None
    accept: Accept
    stream_port: int


@dataclass(frozen=True)
class Receiving:
    """The options of a command that a VM may migrate to; `address`: None if none is to."""

    address: str | None
    secret_file: Path | None
    tls: Path | None
    peers: tuple[str, ...]
    accept: tuple[str, ...]
    stream_port: int

    def reception(self) -> Reception | None:
        """The options, checked; None: nobody is waited for. Raises `UsageError` and `EnvironmentProblem`."""
        if self.address is None:
            alone = {
                "secret-file": self.secret_file,
                "stream-port": self.stream_port,
                "tls": self.tls,
                "peer": self.peers,
                "accept": self.accept,
            }
            if option := next((option for option, value in alone.items() if value), None):
                raise UsageError(f"--{option} goes with --receive")
            return None
        if self.secret_file is None and self.tls is None:
            raise UsageError(_NO_CREDENTIALS)
        if self.tls is None and self.peers:
            raise UsageError("--peer goes with --tls: it is the name in a certificate")
        if self.tls is not None and self.stream_port:
            raise UsageError("--stream-port does not go with --tls: memory comes to the port of --receive, too")
        place = absolute(self.address)
        secret = NO_SECRET if self.secret_file is None else read_secret(self.secret_file)
        certificates = None if self.tls is None else for_destination(self.tls, self.peers)
        return Reception(place, secret, certificates, Accept(self.accept), self.stream_port)


_RECEIVING = (
    click.option(
        "--receive",
        "address",
        metavar="ADDRESS",
        help="Wait at tcp:HOST:PORT or unix:PATH for a VM that migrates here.",
    ),
    click.option(
        "--stream-port",
        metavar="PORT",
        default=0,
        type=click.IntRange(0, 65535),
        help="With --receive tcp:...: where memory is to come, if not every port is let through. Default: any free.",
    ),
    click.option("--secret-file", type=click.Path(path_type=Path, dir_okay=False), help=SECRET_HELP),
    click.option("--tls", type=click.Path(path_type=Path, file_okay=False), metavar="DIRECTORY", help=TLS_HELP),
    click.option("--peer", "peers", multiple=True, metavar="NAME", help="With --tls: whose certificate may send a VM."),
    click.option(
        "--accept",
        multiple=True,
        metavar="RULE",
        help="With --receive: take only what rules name: a description's NAME, disk:NAME, network:NAME, socket:PATH.",
    ),
)


def receiving_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a destination, which the command gets as one argument, `receiving`."""

    @functools.wraps(command)
    def gathered(**options: Any) -> None:
        names = [field.name for field in fields(Receiving)]
        command(receiving=Receiving(**{name: options.pop(name) for name in names}), **options)

    wrapped: Callable[..., None] = gathered
    for option in reversed(_RECEIVING):
        wrapped = option(wrapped)
    return wrapped


def absolute(text: str) -> Address:
    """The address in a text; a unix socket's path is made absolute, since another process may use it."""
    address = parse_address(text)
    return UnixAddress(str(Path(address.path).absolute())) if isinstance(address, UnixAddress) else address


@click.command()
@click.argument("words", nargs=-1, metavar="[NAME] ADDRESS", shell_complete=first_vm)
@click.option("--secret-file", type=click.Path(path_type=Path, dir_okay=False), help=SECRET_HELP)
@click.option("--tls", type=click.Path(path_type=Path, file_okay=False), metavar="DIRECTORY", help=TLS_HELP)
@click.option("--tls-name", metavar="NAME", help="Name in the destination's certificate, if it is not ADDRESS's host.")
@click.option("--multifd", default=0, metavar="N", type=click.IntRange(0, 16), help="Send memory over N connections.")
@click.option("--timeout", type=click.FloatRange(min=1), help="Seconds that the copy of memory may take.")
@click.option(
    "--downtime-limit",
    type=click.IntRange(1, 60_000),
    help="Milliseconds that QEMU may plan for its last pass; else 20, and more if the copy does not end with that.",
)
@click.option(
    "--bandwidth",
    metavar="MIB",
    type=click.FloatRange(min=0.1),
    help="MiB per second that QEMU may send while the guest runs; else as much as there is.",
)
@click.option(
    "--resolve",
    type=click.Choice(["ask", "run", "end"]),
    help="After a migration in doubt: ask the destination and do what it says; or let the VM run here (it must never "
    "have run there), or end it here. Takes no ADDRESS.",
)
@json_option
def migrate(
    words: tuple[str, ...],
    secret_file: Path | None,
    tls: Path | None,
    tls_name: str | None,
    multifd: int,
    timeout: float | None,
    downtime_limit: int | None,
    bandwidth: float | None,
    resolve: str | None,
    as_json: bool,
) -> None:
    """Move the running VM NAME to the destination that waits at ADDRESS.

    ADDRESS is tcp:HOST:PORT or unix:PATH; there, scripts/run-vm --receive ADDRESS waits. If anything fails, the VM runs
    on here. Without NAME, the only running VM is meant.
    """
    least = 0 if resolve else 1
    if not least <= len(words) <= least + 1:
        raise UsageError("give [NAME] alone with --resolve" if resolve else "give [NAME] ADDRESS, see --help")
    name = find_vm(words[0] if len(words) > least else None, NAME_FIRST)
    if resolve:
        wanted = None if resolve == "ask" else resolve == "run"
        result = run(ask(name, "resolve", {"run": wanted}, timeout=120))
        said = f"VM {name!r} {'runs on here' if result['runs'] else 'has ended here'}"
        print_result({"name": name, "runs": result["runs"]}, as_json, said)
        return
    if secret_file is None and tls is None:
        raise UsageError(_NO_CREDENTIALS)
    # What is wrong with them is better said before anything happens.
    if secret_file is not None:
        read_secret(secret_file)
    if tls is not None:
        for_source(tls)
    elif tls_name is not None:
        raise UsageError("--tls-name goes with --tls")
    arguments = {
        "address": str(absolute(words[-1])),
        "secret_file": None if secret_file is None else str(secret_file.absolute()),
        "tls": None if tls is None else str(tls.absolute()),
        "tls_name": tls_name,
        "multifd": multifd,
        "timeout": timeout,
        "downtime_limit": downtime_limit,
        "bandwidth": None if bandwidth is None else int(bandwidth * 2**20),
    }
    with Steps(f"migration of VM {name!r} to {words[-1]}", MIGRATE_LABELS) as steps:
        result = run(ask(name, "migrate", arguments, timeout=_TIMEOUT, progress=steps))
    report = msgspec.convert(result, MigrationReport)
    print_result(report, as_json, _shown(report))


def _shown(report: MigrationReport) -> Table:
    def milliseconds(seconds: float) -> str:
        return f"{seconds * 1000:.0f} ms"

    rows = [
        ("runs at", report.address),
        ("packets in flight", f"{report.packets['queued']} queued, {report.packets['sent']} sent"),
        ("held by providers", str(report.incoming_held)),
        ("sent by QEMU", f"{report.ram_bytes / 2**20:.1f} MiB"),
        ("device state", f"{report.state_bytes / 2**10:.1f} KiB"),
        ("flushed at the switchover", f"{report.flushed_pages} pages"),
        *([("passes", str(report.attempts))] if report.attempts > 1 else []),
        ("downtime", milliseconds(report.downtime)),
        ("  QEMU's share", milliseconds(report.downtime_qemu)),
        ("  the device's share", milliseconds(report.downtime_device)),
        ("", ", ".join(f"{name} {seconds * 1000:.0f}" for name, seconds in report.spans.items())),
    ]
    return facts(rows)
