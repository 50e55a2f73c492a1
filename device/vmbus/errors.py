"""The error hierarchy: who broke the rules, and what can be done about it.

`PeerError`        the guest broke a protocol: its channel (or message) is failed, the server runs on.
`UsageError`       the caller of our own API broke a rule: a defect in a provider or a tool.
`EnvironmentProblem` something outside is missing or unusable: a program, a library, a socket, a permission.
`StateError`       saved state that is damaged, foreign, or of a version that cannot be restored.
`WaitTimeout`      a bounded wait ran out; the message says what was waited for.

Every message says what failed, on which object, and what to do.
"""

from vmbus.places import spelled


class VmbusError(Exception):
    """Base of every error that this project raises on purpose."""

    status = 1
    """Exit status of a command that ends with it; they are listed in the README."""

    def __str__(self) -> str:
        return spelled(super().__str__())


class PeerError(VmbusError):
    """The other side of a protocol broke it. Never the fault of the code that catches it."""


class UsageError(VmbusError):
    """The caller used our API against its contract."""

    status = 2


class EnvironmentProblem(VmbusError):
    """The machine lacks something, or something on it cannot be used; the message says how to mend it."""

    status = 10


class StateError(VmbusError):
    """Saved state is damaged, incomplete, foreign, or of an unsupported version. Nothing was changed."""

    status = 11


class WaitTimeout(VmbusError):
    """A bounded wait ran out."""

    status = 12

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(f"waited {seconds:g} s in vain for {what}")
        self.what = what
        self.seconds = seconds
