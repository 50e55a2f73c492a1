"""Replay: a capture's guest, played to a provider once more.

The provider runs in a device server of its own in this process, over the real transport (`testkit.loopback`), and we
are its guest: channels are opened with rings of the same sizes, and the guest's packets are sent in the captured order,
byte for byte, with the external data that was captured. Whatever the host had sent is waited for where it stands in the
capture, and compared.

Two things cannot be the same: the transaction ids of requests that want a completion (they are ours), and where in
guest memory external data lies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec

from vmbus.device.description import DeviceDescription
from vmbus.errors import UsageError
from vmbus.observe.capture.pcapng import CaptureReader
from vmbus.testkit.loopback.harness import LoopbackServer
from vmbus.testkit.replay_player import Player
from vmbus.testkit.replay_report import ReplayOptions, ReplayReport
from vmbus.transport.library import Library
from vmbus.util.explaining import explain
from vmbus_guest.driver import VmbusDriver

GUEST_MEMORY = 256 << 20
_MAP_SIZE = GUEST_MEMORY // 16  # pieces that the older library takes

_NOT_REPLAYED = {
    "network": "what it works on lies in buffers that its guest has lent, and a guest of a capture lends none",
    "vsock": "its channels come when programs ask for them, and those are not in a capture",
}


def first_instance(paths: Sequence[Path], patterns: Sequence[str]) -> UUID:
    """The instance of the first channel in the captures that the patterns select. Raises UsageError without one."""
    for path in paths:
        with CaptureReader(path) as reader:
            for one in reader:
                found = reader.interfaces[one.interface]
                if found.selected(patterns):
                    return found.instance
    raise UsageError(
        f"there are no packets in {', '.join(map(str, paths))}" + (" of these channels" if patterns else "")
    )


def replay(
    paths: Sequence[Path],
    kind: str,
    library: Library,
    *,
    provider_options: Mapping[str, Any] | None = None,
    options: ReplayOptions | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> ReplayReport:
    """Play captures, in this order, to a provider of this kind (as in a description) with these options. `tell` is told
    at once what differs, and what is left out; it must not raise.

    Raises StateError for a damaged capture or one that cannot be replayed, EnvironmentProblem for one that cannot be
    read, UsageError if the provider is none, offers no channel of the capture, or is of a kind to which none can be
    replayed.
    """
    options = options or ReplayOptions()
    began = time.monotonic()
    if kind in _NOT_REPLAYED:
        raise UsageError(f"captures cannot be replayed to provider {kind!r}: {_NOT_REPLAYED[kind]}")
    instance = first_instance(paths, options.channels)
    described = {"kind": kind, "name": "replayed", "instance": str(instance), "options": dict(provider_options or {})}
    try:
        description = msgspec.convert({"name": "replay", "providers": [described]}, DeviceDescription)
    except msgspec.ValidationError as error:
        raise UsageError(f"provider {kind!r}: {explain(error)}") from error
    report = ReplayReport(files=[str(path) for path in paths], provider=kind)
    with LoopbackServer(description, library) as server:
        function = server.function(ram_size=GUEST_MEMORY, map_size=_MAP_SIZE)
        driver = VmbusDriver(function)
        try:
            player = Player(driver, options, report, tell)
            for path in paths:
                player.play_file(path)
            player.finish()
        finally:
            # What is held is not waited for: a provider that never answers is a finding, and no reason to hang.
            driver.close(graceful=False)
    if not report.channels:
        raise UsageError(f"provider {kind!r} offers none of the captured channels: {', '.join(report.left_out)}")
    report.seconds = time.monotonic() - began
    return report
