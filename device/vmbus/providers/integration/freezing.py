"""The service that has the guest freeze its file systems, so that what is on its disks fits together.

A guest that is never thawed is lost, so whatever happens ends in a thaw: the time that whoever froze it gave, a refusal
half-way, a device that goes on after a pause or a restore (whoever froze it has what was wanted, or is gone). A thaw
that the guest refuses is asked for again.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from enum import Enum
from typing import Any

from vmbus.errors import UsageError, VmbusError, WaitTimeout
from vmbus.providers.base import Host, Timer
from vmbus.providers.integration.exchange import Done, Exchange, Request
from vmbus.providers.integration.parts import Answer, Part, settle
from vmbus.wire import ic

AGAIN_SECONDS = 2.0
"""Until a thaw that was refused is asked for again."""


class Stage(Enum):
    """Of the guest's file systems, as far as is known."""

    THAWED = "thawed"
    ASKING = "asking"
    FREEZING = "freezing"
    FROZEN = "frozen"
    THAWING = "thawing"


class Happening(Enum):
    FREEZE = "somebody wants them frozen"
    READY = "the guest can do that"
    DONE = "the guest has frozen them"
    REFUSED = "the guest has refused"
    END = "they are to be thawed"
    THAWED = "the guest has thawed them"


MOVES: Mapping[tuple[Stage, Happening], Stage] = {
    (Stage.THAWED, Happening.FREEZE): Stage.ASKING,
    (Stage.ASKING, Happening.READY): Stage.FREEZING,
    (Stage.ASKING, Happening.REFUSED): Stage.THAWED,
    (Stage.ASKING, Happening.END): Stage.THAWED,
    (Stage.FREEZING, Happening.DONE): Stage.FROZEN,
    # Some of them may be frozen.
    (Stage.FREEZING, Happening.REFUSED): Stage.THAWING,
    (Stage.FREEZING, Happening.END): Stage.THAWING,
    (Stage.FROZEN, Happening.END): Stage.THAWING,
    (Stage.THAWING, Happening.THAWED): Stage.THAWED,
    # Refused again, or wanted again: it is asked for until it is done.
    (Stage.THAWING, Happening.REFUSED): Stage.THAWING,
    (Stage.THAWING, Happening.END): Stage.THAWING,
}


class Freeze(Part):
    """See the module's text. `numbers["frozen"]` is 1 from the request to freeze to the answer of the thaw."""

    def __init__(self, exchange: Exchange, host: Host) -> None:
        super().__init__(exchange)
        self.numbers = {"freezes": 0, "thaws": 0, "frozen": 0}
        self.stage = Stage.THAWED
        self._host = host
        self._freezing: Answer = Future()
        self._thawing: list[Answer] = []
        self._timer: Timer | None = None
        self._saved = False
        """Whether it was a pause that ended the last one."""

    # ---- commands --------------------------------------------------------------------------------------------------

    def freeze(self, seconds: float) -> Answer:
        """Have them frozen, for so long at most. Raises UsageError when they are, or are about to be."""
        if self.stage is not Stage.THAWED:
            raise UsageError(f"the guest's file systems are {self.stage.value} already")
        self._freezing = Future()
        self._saved = False
        self._move(Happening.FREEZE)
        try:
            self._ask(ic.VssOperation.HOT_BACKUP, self._can_be_done)
        except UsageError:
            self._move(Happening.REFUSED)
            raise
        self._set_timer(seconds, lambda: self._end(WaitTimeout("the guest's file systems to be frozen", seconds)))
        return self._freezing

    def thaw(self) -> Answer:
        """Have them thawed; also right where a save or a checkpoint has done that. Raises UsageError when they are not
        frozen (any more): then what was done meanwhile may not fit together."""
        answer: Answer = Future()
        if self.stage is Stage.FROZEN:
            self._thawing.append(answer)
            self._end(UsageError("they were thawed"))
        elif self._saved and self.stage is Stage.THAWING:
            self._thawing.append(answer)
        elif self._saved and self.stage is Stage.THAWED:
            settle(answer, {"thawed": True})
        else:
            raise UsageError(f"the guest's file systems are not frozen, but {self.stage.value}")
        self._saved = False
        return answer

    def status(self) -> dict[str, Any]:
        return super().status() | {"stage": self.stage.value}

    # ---- life ------------------------------------------------------------------------------------------------------

    def ready(self) -> None:
        """The device goes on: nobody is left who would thaw them."""
        if self.numbers["frozen"]:
            self._saved = self.stage in (Stage.FROZEN, Stage.THAWED)  # the latter in another process
            self.stage = Stage.THAWING
            settle(self._freezing, None, UsageError("the device was paused while the guest froze its file systems"))
            self._thaw()

    def suspend(self) -> None:
        self._cancel_timer()
        if self.stage is Stage.ASKING:
            self._end(UsageError("the device is paused"))

    def closed(self) -> None:
        """With the guest's service goes all that could be done."""
        self._cancel_timer()
        settle(self._freezing, None, UsageError("the guest's vss service went away"))
        self.stage = Stage.THAWED
        self.numbers["frozen"] = 0

    # ---- the guest's answers ---------------------------------------------------------------------------------------

    def _can_be_done(self, message: ic.Message | None, error: VmbusError | None) -> None:
        if self.stage is not Stage.ASKING:
            return
        if message is None or message.status != ic.IcStatus.OK:
            self._cancel_timer()
            self._move(Happening.REFUSED)
            settle(self._freezing, None, error or _refusal("cannot freeze its file systems", message))
            return
        self._move(Happening.READY)
        self.numbers["frozen"] = 1
        self._ask(ic.VssOperation.FREEZE, self._frozen)

    def _frozen(self, message: ic.Message | None, error: VmbusError | None) -> None:
        if self.stage is not Stage.FREEZING or message is None:
            return  # it is to be thawed already, or gone
        if message.status != ic.IcStatus.OK:
            self._move(Happening.REFUSED)
            settle(self._freezing, None, _refusal("did not freeze its file systems", message))
            self._thaw()
            return
        self._move(Happening.DONE)
        self.numbers["freezes"] += 1
        settle(self._freezing, {"frozen": True})

    def _end(self, reason: Exception) -> None:
        self._cancel_timer()
        asked = self.stage is Stage.ASKING
        self._move(Happening.END)
        settle(self._freezing, None, reason)
        if not asked:
            self._thaw()

    def _thaw(self) -> None:
        self._cancel_timer()
        self._ask(ic.VssOperation.THAW, self._thawed)

    def _thawed(self, message: ic.Message | None, error: VmbusError | None) -> None:
        answers, self._thawing = self._thawing, []
        if message is None or self.stage is not Stage.THAWING:
            for answer in answers:
                settle(answer, None, error)
            return
        if message.status != ic.IcStatus.OK:
            self._move(Happening.REFUSED)
            for answer in answers:
                settle(answer, None, _refusal("did not thaw its file systems, and is asked again", message))
            self._set_timer(AGAIN_SECONDS, self._thaw)
            return
        self._move(Happening.THAWED)
        self.numbers["frozen"] = 0
        self.numbers["thaws"] += 1
        for answer in answers:
            settle(answer, {"thawed": True})

    # ---- helpers ---------------------------------------------------------------------------------------------------

    def _move(self, happening: Happening) -> None:
        self.stage = MOVES[self.stage, happening]

    def _ask(self, operation: ic.VssOperation, done: Done) -> None:
        # The guest may take minutes: its answer counts whenever it comes.
        request = Request(ic.MessageType.VSS, ic.vss(operation), done, patient=True)
        self.exchange.ask(request, bounded=operation is ic.VssOperation.HOT_BACKUP)

    def _set_timer(self, seconds: float, call: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = self._host.call_later(seconds, call)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _refusal(what: str, message: ic.Message | None) -> UsageError:
    status = 0 if message is None else message.status
    return UsageError(f"the guest {what}: status {status:#010x}")
