"""Archives of set-ups: small ones, and such as nobody would write who means well."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vmbus.provision import guest_files, libvfio_user, qemu
from vmbus.provision.cache import Cache
from vmbus.provision.prebuilt import FORMAT, MANIFEST, products
from vmbus.provision.roots import RECORD


class Member(NamedTuple):
    """A member of a tar, as its header says it."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    size: int | None = None
    link: str = ""


def little_cache(folder: Path) -> Cache:
    """What a set-up has made, as far as names go."""
    cache = Cache(folder)
    kernel = guest_files.kernel_folder(cache)
    put(kernel / "vmlinuz", b"kernel")
    put(kernel / "modules/vfio.ko", b"module")
    facts = {"version": "6.12.1", "package": "6.12.1-1", "modules": {"vfio": []}, "vmbus": {}}
    put(kernel / guest_files.KERNEL_RECORD, json.dumps(facts).encode())
    for recipe in (guest_files.USERLAND_RECIPE, qemu.ROOT_RECIPE):
        root = cache.path("root", recipe.key)
        put(root / RECORD, b'{"packages": []}')
        put(root / "usr/bin/program", recipe.name.encode(), 0o755)
        put(root / "usr/lib/__pycache__/x.pyc", b"left out")
        (root / "bin").symlink_to("usr/bin")
        (root / "usr/lib/lib.so").symlink_to("../bin/program")
        (root / "usr/lib/elsewhere").symlink_to("/etc/passwd")
    library = libvfio_user.build_folder(cache)
    put(library / libvfio_user.RECORD, b'{"source": {"archive": "a"}}')
    put(library / libvfio_user.SONAME, b"no library")
    return cache


def put(path: Path, data: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def tree(folder: Path) -> dict[str, object]:
    """Everything below there: content and mode of files, targets of links."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_file():
            found[name] = (path.read_bytes(), path.stat().st_mode & 0o777)
    return found


def entry(key: str, files: Sequence[tuple[str, bytes]] = (), links: Sequence[Sequence[str]] = ()) -> dict[str, Any]:
    """A product of a manifest."""
    lines = [[name, len(data), False, hashlib.sha256(data).hexdigest()] for name, data in files]
    return {"key": key, "files": lines, "links": [list(link) for link in links]}


def manifest(
    files: Sequence[tuple[str, bytes]] = (), links: Sequence[Sequence[str]] = (), **more: Any
) -> dict[str, Any]:
    """Of an archive that this version would take, whose guest's programs are these."""
    keys = {product.role: product.key for product in products(Cache(Path("/nonexistent")), None)}
    both = {"kernel": entry(keys["kernel"]), "guest": entry(keys["guest"], files, links)}
    return {"format": FORMAT, "version": "0", "products": both, **more}


def pack(file: Path, content: object, members: Sequence[Member] = (), end: bytes = bytes(1024)) -> Path:
    """Write an archive with this manifest and these members, whatever they are."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    data = io.BytesIO()
    for member in (Member(MANIFEST, text), *members):
        header = tarfile.TarInfo(member.name)
        header.type, header.linkname = member.kind, member.link
        header.size = len(member.data) if member.size is None else member.size
        data.write(header.tobuf(tarfile.GNU_FORMAT))
        data.write(member.data + bytes(-len(member.data) % tarfile.BLOCKSIZE))
    file.write_bytes(gzip.compress(data.getvalue() + end, 1))
    return file
