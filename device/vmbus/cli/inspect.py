"""The command `inspect`: looks into a running VM's device or into something saved, and compares two of them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from typing import Any

import click
import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text
from rich.tree import Tree

from vmbus.cli.completion import targets
from vmbus.cli.results import Failure, print_failure, print_json
from vmbus.cli.terminal import run
from vmbus.errors import UsageError, VmbusError
from vmbus.observe.inspection.difference import Change, Difference, compare, lines
from vmbus.observe.inspection.document import MOST_PACKETS, Inspection, PacketInfo
from vmbus.observe.inspection.target import Running, Saved, chosen, find, look
from vmbus.observe.inspection.tree import clean, packet_text, render
from vmbus.observe.inspection.watch import View, Watch
from vmbus.observe.words.seen import counted
from vmbus.snapshot.bundle import open_snapshot
from vmbus.util.screen import screen
from vmbus.vm.run_directory import runtime_base

DEFAULT_SECONDS = 1.0
_WATCHED_PACKETS = 4
_SHORT = 4
"""Packets of each sort of a channel that one look shows, unless more are asked for."""
_NOTICES = 5
_PLAIN_WIDTH = 4000
_SHOWN = 400  # characters of a value in a difference
_SIGNS = {"removed": ("-", "red"), "added": ("+", "green"), "changed": ("~", "yellow")}
TROUBLE = 2
"""The exit status of `inspect diff` when it cannot compare, as with diff(1)."""


class _Command(click.Command):
    """Lets `--watch` stand alone before other words: its value is optional."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words: list[str] = []
        for index, word in enumerate(args):
            words.append(word)
            if word == "--watch" and not _is_number(args[index + 1 : index + 2]):
                words[-1] = f"--watch={DEFAULT_SECONDS:g}"
        return super().parse_args(ctx, words)


def _is_number(words: list[str]) -> bool:
    try:
        return bool(words) and float(words[0]) >= 0
    except ValueError:
        return False


@click.command(cls=_Command)
@click.argument("words", nargs=-1, metavar="[TARGET | diff A B]", shell_complete=targets)
@click.option("--json", "as_json", is_flag=True, help="As JSON; with --watch one line for each look.")
@click.option(
    "--watch",
    "seconds",
    type=click.FloatRange(min=0.05),
    metavar="[SECONDS]",
    help=f"Look again and again, every SECONDS (default: {DEFAULT_SECONDS:g}), until Ctrl-C.",
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="With --watch: end after N looks.")
@click.option(
    "--channel", "channels", multiple=True, metavar="NAME", help="Only this channel. May be given more often."
)
@click.option(
    "--packets",
    type=click.IntRange(min=0),
    metavar="N",
    help="List at most N packets of each sort for each channel (default: 4; with --channel or --json 64, of something "
    "saved all).",
)
@click.option("--device", metavar="NAME|NUMBER", help="Of several devices only this one (with --watch: the first).")
@click.option("--checkpoint", metavar="TAG", help="Look into checkpoint TAG of the running VM, not into the VM.")
@click.option("--verify", is_flag=True, help="Verify every file of a snapshot first, guest memory too.")
def inspect(
    words: tuple[str, ...],
    as_json: bool,
    seconds: float | None,
    count: int | None,
    channels: tuple[str, ...],
    packets: int | None,
    device: str | None,
    checkpoint: str | None,
    verify: bool,
) -> None:
    """Look inside: bus, channels, rings, GPADLs, packets in flight, providers, dirty log, counters.

    TARGET is the name of a running VM, the directory of a snapshot, a checkpoint (DIRECTORY/TAG), or a file with a
    device's state. Without it the only running VM is meant. A running device is not disturbed.

    `inspect diff A B` compares two of them. Its exit status is 0 if they are the same, 1 if not, 2 if something is
    wrong with one of them.
    """
    if words[:1] == ("diff",) and len(words) != 1:
        if len(words) != 3:
            raise click.UsageError("diff takes two: inspect diff A B")
        if seconds is not None or checkpoint is not None or channels:
            raise click.UsageError("diff goes with --json, --packets, --device and --verify alone")
        _compare(words[1], words[2], device, as_json=as_json, packets=packets, verify=verify)
        return
    if len(words) > 1:
        raise click.UsageError("give one TARGET, or diff A B")
    word = words[0] if words else None
    if checkpoint is not None:
        word = _checkpoint(word, checkpoint)
    if seconds is None:
        if count is not None:
            raise click.UsageError("--count goes with --watch")
        if packets is None and not as_json and not channels:
            packets = _SHORT  # for people, who want to see the whole of it first
        for document in run(_look(word, device, packets, channels, verify=verify)):
            _show(document, channels, as_json=as_json)
        return
    if verify or checkpoint is not None:
        raise click.UsageError("--watch looks at running VMs; --verify and --checkpoint are for what was saved")
    with contextlib.suppress(KeyboardInterrupt):
        run(_watch(word, device, seconds, count, packets, channels, as_json=as_json))


def _checkpoint(word: str | None, tag: str) -> str:
    """The path of a checkpoint that a running VM keeps with itself."""
    target = find(word)
    if not isinstance(target, Running):
        raise UsageError(f"--checkpoint goes with a running VM; for a directory of checkpoints say {target.path}/{tag}")
    return str(runtime_base() / target.name / "checkpoints" / tag)


async def _look(
    word: str | None, device: str | None, packets: int | None, channels: tuple[str, ...], *, verify: bool
) -> list[Inspection]:
    """Of each device that is meant."""
    target = find(word)
    if verify:
        if isinstance(target, Running):
            raise UsageError("--verify is for snapshots: a running VM has no digests")
        await open_snapshot(target.path)
    documents = [await look(one, packets, channels or None) for one in await chosen(target, device)]
    _require(documents, channels)
    return documents


def _require(documents: list[Inspection], channels: tuple[str, ...]) -> None:
    """Raises UsageError for a channel that is not there."""
    present = [channel.name for document in documents for channel in document.channels]
    missing = [name for name in channels if name not in present]
    if missing:
        raise UsageError(f"there is no channel {missing[0]!r}; there are: {', '.join(present) or 'none'}")


# ---- one look --------------------------------------------------------------------------------------------------------


def _console() -> Console:
    console = screen()
    # Without a terminal a line stays a line, however long.
    return console if console.is_terminal else screen(width=_PLAIN_WIDTH)


def _show(document: Inspection, channels: tuple[str, ...], *, as_json: bool) -> None:
    if as_json:
        if channels:
            document.channels = [channel for channel in document.channels if channel.name in channels]
        print_json(document)
    else:
        _console().print(render(document, channels=channels))


# ---- again and again -------------------------------------------------------------------------------------------------


async def _watch(
    word: str | None,
    device: str | None,
    seconds: float,
    count: int | None,
    packets: int | None,
    channels: tuple[str, ...],
    *,
    as_json: bool,
) -> None:
    target = find(word)
    if isinstance(target, Running) and device is not None:
        (target,) = await chosen(target, device)
    if not isinstance(target, Running):
        raise UsageError(f"{target.path} does not change: --watch is for running VMs")
    watch = Watch(target, packets=_WATCHED_PACKETS if packets is None else packets, channels=channels or None)
    console = _console()
    if as_json:
        async for view in watch.views(seconds, count):
            click.echo(msgspec.json.encode(view))
            sys.stdout.flush()
    elif console.is_terminal:
        notices: list[str] = []
        with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
            async for view in watch.views(seconds, count):
                notices += [f"{_clock(view.at)}  {notice}" for notice in view.notices]
                live.update(_picture(view, notices[-_NOTICES:], channels), refresh=True)
    else:
        async for view in watch.views(seconds, count):
            for notice in view.notices:
                console.print(Text(f"{_clock(view.at)}  {clean(notice)}"))
            if view.document is not None:
                console.print(Text(_clock(view.at)), _tree(view, channels), sep="\n")
            sys.stdout.flush()


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _tree(view: View, channels: tuple[str, ...]) -> Tree:
    assert view.document is not None
    return render(view.document, channels=channels, rates=view.rates)


def _picture(view: View, notices: list[str], channels: tuple[str, ...]) -> RenderableType:
    above = [Text(clean(notice), style="yellow") for notice in notices]
    below: RenderableType = Text(clean(view.problem), style="bold") if view.document is None else _tree(view, channels)
    return Group(Text(_clock(view.at), style="dim"), *above, below)


# ---- two of them -----------------------------------------------------------------------------------------------------


def _compare(a: str, b: str, device: str | None, *, as_json: bool, packets: int | None, verify: bool) -> None:
    try:
        found = run(_difference(a, b, device, packets, verify=verify))
    except VmbusError as error:
        print_failure(Failure.of(error, TROUBLE), as_json)
        sys.exit(TROUBLE)
    if as_json:
        print_json(found)
    else:
        _show_difference(found)
    sys.exit(0 if found.same else 1)


async def _difference(a: str, b: str, device: str | None, packets: int | None, *, verify: bool) -> Difference:
    found = []
    for word in (a, b):
        target = find(word)
        if verify and isinstance(target, Saved):
            await open_snapshot(target.path)
        target, *others = await chosen(target, device)
        if others:
            raise UsageError(f"{word} has several devices: say which one is to be compared (--device NAME)")
        found.append(await look(target, MOST_PACKETS if packets is None and isinstance(target, Running) else packets))
    return compare(*found)


def _show_difference(found: Difference) -> None:
    console = _console()
    for sign, source in (("---", found.a), ("+++", found.b)):
        when = f" of {source.created}" if source.created else ""
        console.print(Text(f"{sign} {source.kind} {clean(source.name)}{when}", style="bold"))
    place = ""
    for where, what, change in lines(found.changes):
        if where != place:
            place = where
            console.print(Text(clean(where), style="bold cyan"))
        console.print(_change(what, change))
    if not found.same:
        kinds = Counter(("packets " if _is_packet(change) else "") + change.kind for change in found.changes)
        order = [f"{of}{kind}" for of in ("packets ", "") for kind in _SIGNS]
        words = ", ".join(f"{kinds[kind]} {kind}" for kind in order if kinds[kind])
        console.print(Text(f"{counted(len(found.changes), 'difference')}: {words}", style="bold"))
    if found.truncated:
        console.print(Text("not everything was compared: not all packets were listed, or too much is different"))


def _is_packet(change: Change) -> bool:
    return len(change.where) == 4 and change.where[0] == "channels" and change.where[2] == "packets"


def _change(what: str, change: Change) -> Text:
    sign, style = _SIGNS[change.kind]
    value = change.before if change.kind == "removed" else change.after
    if change.kind == "changed":
        said = f"{clean(what)}: {_value(change.before)} -> {_value(value)}"
    elif _is_packet(change):  # the whole packet, as the tree shows it
        said = f"packet {packet_text(msgspec.convert(value, PacketInfo)).plain}"
    else:
        said = f"{clean(what)}: {_value(value)}"
    return Text(f"  {sign} {said}", style=style)


def _value(value: Any) -> str:
    return clean(value if isinstance(value, str) else msgspec.json.encode(value).decode(), _SHOWN)
