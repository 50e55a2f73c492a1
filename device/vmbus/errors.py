"""The error hierarchy: who broke the rules, and what can be done about it.

`PeerError`        the guest broke a protocol: its channel (or message) is failed, the server runs on.
`UsageError`       the caller of our own API broke a rule: a defect in a provider or a tool.
`EnvironmentProblem` something outside is missing or unusable: a program, a library, a socket, a permission.
`StateError`       saved state that is damaged, foreign, or of a version that cannot be restored.
`WaitTimeout`      a bounded wait ran out; the message says what was waited for.

Every message says what failed, on which object, and what to do. It is for people: a program tells errors apart by their
class and by their `code`, also those of another process (`ReportedError`).
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from vmbus.places import spelled


class Code(StrEnum):
    """Why something failed, where that makes a difference to programs."""

    DISK_FULL = "disk-full"
    LOG_BROKEN = "log-broken"
    """The guest unmapped memory that the device had written: this pass of a live copy cannot be completed."""
    NOT_CONVERGING = "not-converging"
    """The log broke in every pass of a live copy."""


class VmbusError(Exception):
    """Base of every error that this project raises on purpose."""

    status = 1
    """Exit status of a command that ends with it; they are listed in the README."""
    kind = "failed"
    """Which of the errors below it is, in a word that goes over sockets."""
    code = ""
    """One of `Code`, or a name that whoever is asked has for it (the guest's agent); mostly empty."""

    def __init__(self, *words: object, code: str = "") -> None:
        super().__init__(*words)
        if code:
            self.code = code

    def __str__(self) -> str:
        return spelled(super().__str__())


class PeerError(VmbusError):
    """The other side of a protocol broke it. Never the fault of the code that catches it."""


class UsageError(VmbusError):
    """The caller used our API against its contract."""

    status = 2
    kind = "usage"


class EnvironmentProblem(VmbusError):
    """The machine lacks something, or something on it cannot be used; the message says how to mend it."""

    status = 10
    kind = "environment"


class StateError(VmbusError):
    """Saved state is damaged, incomplete, foreign, or of an unsupported version. Nothing was changed."""

    status = 11
    kind = "state"


class WaitTimeout(VmbusError):
    """A bounded wait ran out."""

    status = 12
    kind = "timeout"

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(f"waited {seconds:g} s in vain for {what}")
        self.what = what
        self.seconds = seconds


_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "enough free space", "os error 28")
STATUSES = {one.kind: one.status for one in (StateError, WaitTimeout, UsageError, EnvironmentProblem)}
"""Exit status by kind, of those that have one of their own."""


class ReportedError(VmbusError):
    """What failed in another process and came over a socket: the message, kind and code that it had there."""

    def __init__(self, message: str, kind: str, code: str = "", status: int | None = None) -> None:
        super().__init__(message, code=code)
        self.kind = kind
        self.status = STATUSES.get(kind, VmbusError.status) if status is None else status


def full_disk(error: OSError) -> str:
    """The code of an error of the operating system."""
    return Code.DISK_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""


def code_of(error: BaseException | None) -> str:
    """The code of an error, or else of what it was raised from."""
    while error is not None:
        code = error.code if isinstance(error, VmbusError) else full_disk(error) if isinstance(error, OSError) else ""
        if code:
            return code
        error = error.__cause__
    return ""


def code_in(said: str) -> str:
    """The code of what a program says that is none of ours, and has only words for it."""
    return Code.DISK_FULL if any(words in said for words in _FULL) else ""


@contextmanager
def os_error(what: str, kind: type[VmbusError] = EnvironmentProblem) -> Iterator[None]:
    """What the operating system refuses in the block is an error of that kind, which says what came to nothing."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror or error}") from error
