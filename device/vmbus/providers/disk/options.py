"""What is said of a disk: in a description, and in a saved state."""

from typing import Annotated, Literal

import msgspec

IMAGE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"


class DiskOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See docs/provider-scsi.md."""

    image: Annotated[str, msgspec.Meta(pattern=IMAGE_NAME)]
    size_mib: Annotated[int, msgspec.Meta(ge=1, le=1 << 26)] | None = None
    create: bool = False
    read_only: bool = False
    block_size: Literal[512, 4096] = 512
    snapshot: Literal["copy", "shared"] = "copy"

    def __post_init__(self) -> None:
        if self.create and self.size_mib is None:
            raise ValueError("create = true needs size_mib")
        if self.create and self.read_only:
            raise ValueError("create = true makes an empty disk, and read_only = true lets nobody fill it")


class DiskRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is saved of a disk. Sizes in bytes; `stamp`, `identity`: see `Image`."""

    size: Annotated[int, msgspec.Meta(gt=0, le=(1 << 63) - 1)]
    block_size: Literal[512, 4096]
    stamp: Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
    identity: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{32})?\Z")] = ""
