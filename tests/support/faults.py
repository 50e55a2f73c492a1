"""A provider whose callbacks fail when a test says so: `support.faults:Faulty`.

The option `switch` names a file; what it says happens at the next call: ``save raises``, ``restore hangs`` and so on.
``hangs beyond reach`` and ``returns after 1.5`` (seconds) stand for native code: not even a signal ends it before it is
done.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec

from vmbus.kmcl.server import ServerChannel
from vmbus.providers import Host, Provider

FAULTY_TYPE = UUID("5b0c8a3e-3d5b-4b39-9a86-0d5b6c0f3b21")
STATE = b"faulty's own state"


class FaultyOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`switch`: see the module."""

    switch: str


class Faulty(Provider):
    """See the module."""

    kind = "support.faults:Faulty"
    Options = FaultyOptions

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        self.channel = ServerChannel(FAULTY_TYPE, instance, name=name)

    def start(self) -> None:
        self.host.add_channel(self.channel)
        self.channel.enable()
        self.channel.start()

    def save(self) -> bytes:
        self._fail("save")
        return STATE

    def restore(self, state: bytes) -> None:
        assert state == STATE
        self._fail("restore")

    def _fail(self, callback: str) -> None:
        try:
            word, _, how = Path(self.options.switch).read_text().partition(" ")
        except FileNotFoundError:
            return
        if word != callback:
            return
        if how == "raises":
            raise RuntimeError(f"a defect in {callback}")
        if how == "hangs":
            threading.Event().wait()
        # As native code does that does not look at signals.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        threading.Event().wait(None if how == "hangs beyond reach" else float(how.removeprefix("returns after ")))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.sigtimedwait({signal.SIGALRM}, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
