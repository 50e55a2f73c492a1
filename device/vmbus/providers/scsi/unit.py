"""A logical unit: a disk, and what SCSI has beside it."""

from collections.abc import Callable
from typing import Annotated, Any
from uuid import UUID, uuid5

import msgspec

from vmbus.providers.base import Host
from vmbus.providers.disk.backend import Backend
from vmbus.providers.disk.disk import MAXIMUM_DATA, MAXIMUM_RANGE, Disk
from vmbus.providers.disk.image import Image
from vmbus.providers.disk.options import DiskOptions, DiskRecord
from vmbus.providers.disk.request import Status
from vmbus.providers.scsi.commands import Facts

MOST_UNITS = 64
"""Logical units of one controller."""


class UnitOptions(DiskOptions, frozen=True, forbid_unknown_fields=True):
    """See docs/provider-scsi.md. `lun`: its number."""

    lun: Annotated[int, msgspec.Meta(ge=0, lt=MOST_UNITS)] = 0


class UnitState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is saved of it. `grown`: the guest has not been told of its new size yet."""

    options: UnitOptions
    disk: DiskRecord
    grown: bool


class Unit:
    """One logical unit.

    Attributes:
        disk: what is behind it. grown: the next command is told that the capacity has changed.
        leaving: it is not there any more for the guest, and closed as soon as nothing runs on it.
    """

    def __init__(
        self,
        host: Host,
        name: str,
        controller: UUID,
        options: UnitOptions,
        answer: Callable[[Any, Status], None],
        make_backend: Callable[[Image], Backend],
    ) -> None:
        self.options = options
        self.lun = options.lun
        self.disk = Disk(host, f"{name} lun {options.lun}", options, answer, make_backend)
        # Another image is another disk, and the same image the same one, wherever it goes.
        self.identity = uuid5(controller, f"{options.lun} {options.image}").bytes
        self.grown = False
        self.leaving = False

    @property
    def file_name(self) -> str:
        """The image's name among the files of a snapshot."""
        return f"lun-{self.lun}"

    @property
    def facts(self) -> Facts:
        """What it is now; only once it was activated."""
        core = self.disk.core
        assert core is not None
        geometry = core.geometry
        return Facts(geometry.size, geometry.block_size, geometry.read_only, self.identity, MAXIMUM_DATA, MAXIMUM_RANGE)

    def save(self) -> UnitState:
        """What a restore needs. Raises as `Disk.save`."""
        return UnitState(self.options, self.disk.save(), self.grown)

    def restore(self, state: UnitState) -> None:
        self.disk.restore(state.disk)
        self.grown = state.grown

    def status(self) -> dict[str, Any]:
        return {"lun": self.lun, **self.disk.status(), "leaving": self.leaving}
