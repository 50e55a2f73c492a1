"""What an operation on a VM that failed leaves of it."""

from __future__ import annotations

from vmbus.errors import EnvironmentProblem


class OperationFailed(EnvironmentProblem):
    """An operation on a VM did not work out. `source_alive` tells whether the VM runs on as before; else it is lost,
    and whoever has it ends it."""

    def __init__(self, message: str, *, source_alive: bool, code: str = "") -> None:
        super().__init__(message, code=code)
        self.source_alive = source_alive
        self.status = 13 if source_alive else 14


class SaveFailed(OperationFailed):
    """A save or a checkpoint."""


class RevertFailed(OperationFailed):
    """A way back to a checkpoint."""


class MigrateFailed(SaveFailed):
    """A live migration: the VM is the one that was to leave, or to arrive."""


class MigrationInDoubt(EnvironmentProblem):
    """Nobody can tell whether the VM runs at the destination: it stays stopped here until somebody decides."""

    status = 15
