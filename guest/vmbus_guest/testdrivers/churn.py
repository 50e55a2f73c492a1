"""Test driver `churn`: a channel of the lab is opened, used, and closed with requests outstanding, again and again.

Parameters:

    count     how often it is opened; 0: until stopped
    requests  answers that are waited for before it is closed
    window    requests outstanding; so many are still under way when it is closed
    size      most bytes of data in a request
"""

from __future__ import annotations

from typing import Any

from vmbus_guest.testdrivers.context import Parameters
from vmbus_guest.testdrivers.requests import Books, LabWorkload, Requests


class ChurnWorkload(LabWorkload):
    """See the module's text."""

    name = "churn"
    default_pages = 2

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._count = parameters.get("count", 20, minimum=0)
        self._requests = parameters.get("requests", 20, minimum=0)
        self._window = parameters.get("window", 32, minimum=1, maximum=4096)
        self._size = parameters.get("size", 200, minimum=1, maximum=4000)
        self._books = Books()
        self._session: Requests | None = None
        self.opened = 1

    def begin(self) -> None:
        self._session = Requests(self.channel, window=self._window, size=self._size, moved=self.moved)
        self._session.begin()

    def tick(self, now: float) -> float:
        """Close and open, when it is time."""
        session = self._session
        if session is None:
            return now
        if self._stopped or (self._count and self.opened >= self._count):
            if session.tally.completed >= self._requests or self._stopped:
                session.stop()
        elif session.tally.completed >= self._requests:
            session.stop()
            self.driver.close_channel(self.channel)
            session.end()
            self._books.add(session)
            self._session = None
            self.driver.enable(self.channel)
            self.opened += 1
            self.moved()
            self.begin()
        return super().tick(now)

    def finished(self) -> bool:
        """The last session has come to its end by itself."""
        return self._session is not None and self._session.finished

    def counts(self) -> dict[str, Any]:
        """All sessions together."""
        books = Books()
        books.add(self._session) if self._session is not None else None
        now, before = books.as_dict(), self._books.as_dict()
        return {"opened": self.opened, **{name: now[name] + before[name] for name in now}}

    def result(self) -> dict[str, Any]:
        """All sessions together."""
        if self._session is not None:
            self._session.end()
        return self.counts()

    def good(self) -> bool:
        """Each request of each session was answered right, or cancelled; none of the last session was cancelled."""
        counts = self.counts()
        enough = self._stopped or self.opened == self._count
        return (
            enough
            and self._session is not None
            and not self._session.cancelled
            and not (counts["lost"] or counts["duplicated"] or counts["reordered"] or counts["corrupted"])
            and counts["sent"] == counts["completed"] + counts["cancelled"]
        )


WORKLOAD = ChurnWorkload
