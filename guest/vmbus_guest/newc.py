"""The "newc" cpio format, which the kernel unpacks as its initial file system: a writer and a reader.

The format is in the kernel's documentation (driver-api/early-userspace/buffer-format): per file a header of 110 ASCII
bytes, the name with a NUL, padding to a multiple of 4, the contents, padding again; a file named `TRAILER!!!` ends
the archive. Archives may follow each other in one file. Nothing here touches the file system: device nodes and owners
are fields of a header, so that no root rights are needed. The output depends on the entries alone (no times, no
inode numbers of the host).
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAGIC = b"070701"
HEADER_SIZE = 110
TRAILER = "TRAILER!!!"


@dataclass(frozen=True)
class Entry:
    """One file of an archive. All belong to root."""

    name: str
    """Path without a leading slash."""
    mode: int
    """Type and permissions, as in `stat.st_mode`."""
    data: bytes = b""
    """Contents of a regular file, target of a symbolic link."""
    device: tuple[int, int] = (0, 0)
    """Major and minor number of a device node."""


def directory(name: str, permissions: int = 0o755) -> Entry:
    return Entry(name, stat.S_IFDIR | permissions)


def file(name: str, data: bytes, permissions: int = 0o644) -> Entry:
    return Entry(name, stat.S_IFREG | permissions, data)


def symlink(name: str, target: str) -> Entry:
    """Return an entry for a symbolic link."""
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def character_device(name: str, major: int, minor: int, permissions: int = 0o600) -> Entry:
    return Entry(name, stat.S_IFCHR | permissions, device=(major, minor))


def write(entries: Iterable[Entry]) -> bytes:
    """Return an archive with `entries`, sorted by path, missing parent directories added.

    Raises ValueError for a path that is absolute, empty, or not normal, and for two entries with one path.
    """
    by_name: dict[str, Entry] = {}
    for entry in entries:
        parts = entry.name.split("/")
        if not all(part not in ("", ".", "..") and "\0" not in part for part in parts) or parts[0] == TRAILER:
            raise ValueError(f"not a path for an archive: {entry.name!r}")
        if entry.name in by_name:
            raise ValueError(f"two entries for {entry.name}")
        by_name[entry.name] = entry
    for name in list(by_name):
        parent = name.rpartition("/")[0]
        while parent and parent not in by_name:
            by_name[parent] = directory(parent)
            parent = parent.rpartition("/")[0]
    output = bytearray()
    # Sorted by components: a directory comes before what is in it, which the kernel requires.
    for inode, name in enumerate(sorted(by_name, key=lambda name: name.split("/")), start=1):
        _append(output, by_name[name], inode)
    _append(output, Entry(TRAILER, 0), 0)
    return bytes(output)


def _append(output: bytearray, entry: Entry, inode: int) -> None:
    name = entry.name.encode() + b"\0"
    fields = (
        inode,
        entry.mode,
        0,  # user
        0,  # group
        2 if stat.S_ISDIR(entry.mode) else 1,  # links
        0,  # modification time
        len(entry.data),
        0,  # device that holds the file
        0,
        *entry.device,
        len(name),
        0,  # checksum, unused in this variant
    )
    output += MAGIC + b"".join(b"%08X" % field for field in fields) + name
    output += bytes(-len(output) % 4)
    output += entry.data
    output += bytes(-len(output) % 4)


def read(data: bytes) -> Iterator[Entry]:
    """Yield the entries of an archive, or of several in a row.

    Raises ValueError if the data are damaged.
    """
    offset = 0
    ended = False
    while offset < len(data):
        if data[offset] == 0 and ended:  # padding between archives
            offset += 1
            continue
        header = data[offset : offset + HEADER_SIZE]
        if len(header) < HEADER_SIZE or not header.startswith(MAGIC):
            raise ValueError(f"no header at offset {offset}")
        fields = [int(header[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
        size, name_size = fields[6], fields[11]
        body = -(-(offset + HEADER_SIZE + name_size) // 4) * 4
        name = data[offset + HEADER_SIZE : offset + HEADER_SIZE + name_size]
        if len(name) != name_size or name[-1:] != b"\0" or body + size > len(data):
            raise ValueError(f"the entry at offset {offset} is cut off")
        offset = -(-(body + size) // 4) * 4
        ended = name[:-1].decode() == TRAILER
        if not ended:
            yield Entry(name[:-1].decode(), fields[1], data[body : body + size], (fields[9], fields[10]))
    if not ended:
        raise ValueError("the archive has no end")
