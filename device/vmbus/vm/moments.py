"""What tests do to an operation: the moments of a save, a restore and a migration at which they may kill, cut or raise,
and damage that has to be noticed.

Every operation tells its hook when it reaches a moment, and waits for the hook. Nothing but tests passes one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum


class Moment(Enum):
    """In the order in which a live migration reaches them; the value names it in the failure matrix."""

    BEFORE_STREAM = "before the stream"
    RAM_COPY = "during RAM copy"
    PRE_SWITCHOVER = "at pre-switchover"
    SAVING = "while saving"
    WRITING = "while writing the state"
    STOPPED = "after the source stopped"
    SEALING = "while writing the bundle"
    LOADING = "while the destination loads"
    PCI_REPLAY = "during PCI replay"
    PACKET_RESTORE = "during packet restore"
    BEFORE_GO = "before the decision"
    AFTER_GO = "after the decision"
    BEFORE_CONT = "before cont"


Hook = Callable[[Moment], Awaitable[None]]
"""Told the moment that is reached; whatever it raises happens there."""


async def no_hook(moment: Moment) -> None:
    """The hook of everybody but tests."""


@dataclass(frozen=True)
class Sabotage:
    """Damage done on purpose, for tests that prove that the damage is noticed. Nothing else sets these."""

    skip_flush: bool = False
    skip_pci_replay: bool = False
    edit_state: Callable[[bytes], bytes] | None = None
    only: str | None = None
    """The device to which it is done; None: all of them."""

    def of(self, device: str) -> Sabotage:
        """What is done to this device."""
        return self if self.only in (None, device) else NO_SABOTAGE


NO_SABOTAGE = Sabotage()
