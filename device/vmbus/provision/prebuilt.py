"""A finished set-up as one file, for machines without apt, compiler or network: `scripts/setup --export FILE`, and
`--import FILE` there.

What is in it: QEMU, libvfio-user, the guest's kernel, programs and kernel module, the native core, and, where a
checkout exports, the Python packages of its lock file. Not what a machine finds out about itself (which accelerator),
nor the guest's image, which is made of these parts and of the sources that are there.

The file is a compressed tar. Its first member, `manifest.json`, names every file with its size and digest, and every
link; the others follow in that order. Nothing but ordinary files is taken from it, in no other order, and nothing
appears in the cache before all of it has been compared. That finds damage, and keeps a file from writing elsewhere; who
imports runs programs from it all the same, and has to trust where it comes from.

Standard library only: where there is no virtual environment yet, this is what makes one.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import stat
import sys
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, NoReturn, cast

from vmbus import __version__
from vmbus.errors import EnvironmentProblem
from vmbus.native import build as native_build
from vmbus.provision import environment as environments
from vmbus.provision import guest_files, kernel_module, libvfio_user, native, own_files, qemu
from vmbus.provision.archive import place_below
from vmbus.provision.cache import Cache, remove
from vmbus.provision.report import Reporter
from vmbus.provision.roots import RECORD, make_root
from vmbus.transport import library

FORMAT = 1
MANIFEST = "manifest.json"
LEVEL = 6
"""zlib's: a third of the size, in half a minute."""

MOST_MANIFEST = 32 << 20
"""Bytes of an archive's manifest."""
MOST_FILES = 100_000
"""Files and links of an archive."""
MOST_BYTES = 4 << 30
"""Bytes of all files of an archive."""

_OPTION = "--import"
_PYTHON = "python-"
_ROLE = re.compile(r"[a-z][a-z0-9.-]{0,40}")
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20


class Product(NamedTuple):
    """One of the things that set-up makes."""

    role: str
    """Its folder in an archive."""
    what: str
    """In words."""
    folder: Path
    """Where this machine's cache has it, or will."""
    key: str
    """What it is made by, the same on every machine."""
    record: str
    """The file that differs when it is another one; empty: the key tells."""
    needed: bool = True
    """Whether an import without it, or with that of another recipe, is refused."""


def products(cache: Cache, checkout: Path | None) -> list[Product]:
    """All there are, in the order of an archive; the kernel module only where its kernel is known."""
    kernel = guest_files.kernel_folder(cache)
    found = [
        Product("kernel", "the guest's kernel", kernel, kernel.name, guest_files.KERNEL_RECORD),
        _root("guest", "the guest's programs", cache, guest_files.USERLAND_RECIPE.key),
        _root("qemu", "QEMU", cache, qemu.ROOT_RECIPE.key, needed=False),
        Product(
            *("libvfio-user", "libvfio-user", libvfio_user.build_folder(cache), libvfio_user.recipe_key()),
            *(libvfio_user.RECORD, False),
        ),
        Product(
            *("native", "the native core", cache.path("native", native_build.key()), native_build.key(), "", False)
        ),
    ]
    if (module := _module(cache, kernel)) is not None:
        found.append(module)
    if checkout is not None:
        found.append(
            _packages(
                environments.PYTHON,
                environments.packages_folder(environments.environment_path(cache, checkout)),
                checkout,
            )
        )
    return found


def _packages(python: str, folder: Path, checkout: Path) -> Product:
    what = f"the packages for Python {python}"
    return Product(_PYTHON + python, what, folder, environments.packages_key(checkout, python), "", False)


def _root(role: str, what: str, cache: Cache, key: str, needed: bool = True) -> Product:
    return Product(role, what, cache.path("root", key), key, RECORD, needed)


def _module(cache: Cache, kernel: Path) -> Product | None:
    """Our kernel module for the kernel in that folder."""
    try:
        key = kernel_module.module_key(guest_files.read_kernel(kernel), kernel_module.source_folder())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Product("module", "the guest's kernel module", cache.path("module", key), key, "", False)


# --- the way out -----------------------------------------------------------------------------------------------


def export(
    file: Path,
    cache: Cache,
    checkout: Path | None,
    reporter: Reporter,
    pythons: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> str:
    """Write the archive of a set-up that is complete; return the file's SHA-256. What this machine has of its own
    (`VMBUS_QEMU`, `VMBUS_LIBVFIO_USER`) is not in it. `pythons`: further ones (as 3.13) for whom a checkout's packages
    are fetched.

    Raises EnvironmentProblem, ProgramFailed, WaitTimeout, OSError.
    """
    if set_up := [name for name in own_files.SETTINGS if environment.get(name, "").strip()]:
        raise EnvironmentProblem(f"an archive has the guest's files as set-up makes them: unset {', '.join(set_up)}")
    if pythons and checkout is None:
        raise EnvironmentProblem("only a checkout's archive has Python packages: pip installs this package's own")
    with cache.lock(on_wait=reporter.note), cache.scratch() as scratch:
        own = {"qemu": "VMBUS_QEMU", "libvfio-user": library.ENVIRONMENT_VARIABLE}
        left_out = [role for role, name in own.items() if environment.get(name, "").strip()]
        # Where the machine has one, set-up has fetched none.
        if "qemu" not in left_out:
            make_root(cache, qemu.ROOT_RECIPE, reporter)
        if "libvfio-user" not in left_out:
            libvfio_user.build(cache, reporter)
        wanted = [one for one in products(cache, checkout) if one.role not in left_out and _is_there(one)]
        for python in dict.fromkeys(pythons):
            if checkout is not None and python != environments.PYTHON:
                (folder := Path(scratch, python)).mkdir()
                environments.packages_for(python, cache, checkout, folder, reporter)
                wanted.append(_packages(python, folder, checkout))
        reporter.begin(f"Writing {file}")
        contents = {one.role: _listed(one.folder) for one in wanted}
        manifest = {
            "format": FORMAT,
            "version": __version__,
            "products": {one.role: {"key": one.key, **contents[one.role]._asdict()} for one in wanted},
        }
        digest = _write(file, json.dumps(manifest).encode(), [(one, contents[one.role]) for one in wanted], reporter)
        reporter.end(f"{file.stat().st_size / 1e6:.0f} MB")
    return digest


def _is_there(product: Product) -> bool:
    return product.folder.is_dir() and (
        product.role != "module" or (product.folder / f"{kernel_module.NAME}.ko").exists()
    )


class Contents(NamedTuple):
    """What a product consists of: (path, bytes, whether it may be run, SHA-256) by file, (path, target) by link."""

    files: list[tuple[str, int, bool, str]]
    links: list[tuple[str, str]]


def _listed(folder: Path) -> Contents:
    """Everything below there, sorted, but links that lead out of it and what Python has compiled."""
    found = Contents([], [])
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if "__pycache__" in name.parts:
            continue
        if path.is_symlink():
            if _stays(path, folder):
                found.links.append((str(name), str(path.readlink())))
        elif path.is_file():
            status = path.stat()
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found.files.append((str(name), status.st_size, bool(status.st_mode & stat.S_IXUSR), digest))
    return found


def _stays(link: Path, folder: Path) -> bool:
    """Whether a link leads to somewhere below the folder, wherever that is."""
    return not link.readlink().is_absolute() and Path(os.path.realpath(link)).is_relative_to(os.path.realpath(folder))


def _write(file: Path, manifest: bytes, products: Sequence[tuple[Product, Contents]], reporter: Reporter) -> str:
    """Equal contents make equal files. Returns the file's SHA-256."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    total = sum(len(contents.files) for _, contents in products)
    done = 0
    try:
        with (
            partial.open("wb") as raw,
            gzip.GzipFile("", "wb", LEVEL, raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.USTAR_FORMAT) as tar,
        ):
            tar.addfile(_header(MANIFEST, len(manifest)), io.BytesIO(manifest))
            for product, contents in products:
                for name, size, runs, _ in contents.files:
                    with (product.folder / name).open("rb") as source:
                        tar.addfile(_header(f"{product.role}/{name}", size, runs), source)
                    done += 1
                    if done % 100 == 0:
                        reporter.progress(done, total, product.what)
        with partial.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        partial.rename(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return digest


def _header(name: str, size: int, runs: bool = False) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size, header.mode = size, 0o755 if runs else 0o644
    return header


# --- the way in ------------------------------------------------------------------------------------------------


def imported(arguments: Sequence[str], cache: Cache, checkout: Path | None, reporter: Reporter) -> list[str]:
    """Import what `--import FILE` among the arguments of set-up names; return the others. Raises as `bring`."""
    left = list(arguments)
    for position, word in enumerate(left):
        name, equals, value = word.partition("=")
        if name != _OPTION:
            continue
        if not equals:
            if position + 1 == len(left):
                raise EnvironmentProblem(f"{_OPTION} wants the name of a file that --export has written")
            value = left.pop(position + 1)
        left.pop(position)
        bring(Path(value), cache, checkout, reporter)
        break
    return left


def bring(file: Path, cache: Cache, checkout: Path | None, reporter: Reporter) -> None:
    """Put what an archive holds into the cache, in place of what is there of the same kind.

    Raises EnvironmentProblem for an archive that is damaged, hostile, or of a version whose parts this one does not
    use; nothing has changed then. Further WaitTimeout, ProgramFailed, OSError.
    """
    if not file.is_file():
        raise EnvironmentProblem(f"there is no file {file}")
    with cache.lock(on_wait=reporter.note), cache.scratch() as scratch:
        reporter.begin(f"Reading {file}")
        with file.open("rb") as raw, gzip.GzipFile(fileobj=raw) as plain:
            archive = _Archive(cast("IO[bytes]", plain), file.name)
            try:
                archive.read_manifest()
                _compare(archive, products(cache, checkout), file)
                cache.require_room(archive.size, f"the import of {file.name}")
                archive.unpack(Path(scratch), reporter.progress)
            except (tarfile.TarError, zlib.error, EOFError, ValueError, RecursionError, OSError) as error:
                full = cache.is_full(error) if isinstance(error, OSError) else ""
                why = full or f"{file} is damaged or was not written by --export: {error}"
                raise EnvironmentProblem(why) from error
        reporter.end(f"{archive.size / 1e6:.0f} MB")
        _place(archive, Path(scratch), cache, checkout, reporter)


def _compare(archive: _Archive, known: Sequence[Product], file: Path) -> None:
    """Raise EnvironmentProblem if the archive lacks what every machine needs, as this version makes it."""
    for product in known:
        key = archive.keys.get(product.role)
        if product.needed and key != product.key:
            has = f"{product.what} in it is not what this version uses" if key else f"{product.what} is not in it"
            raise EnvironmentProblem(
                f"{file} was written by version {archive.version}, and {has} ({__version__}): write it anew, with this "
                "version's scripts/setup --export"
            )


def _place(archive: _Archive, unpacked: Path, cache: Cache, checkout: Path | None, reporter: Reporter) -> None:
    """Move what fits this machine to where it belongs."""
    known = {product.role: product for product in products(cache, checkout)}
    if (module := _module(cache, unpacked / "kernel")) is not None:
        known["module"] = module
    if checkout is not None and _PYTHON + environments.PYTHON not in archive.keys:
        reporter.note(
            f"{archive.name} has no packages for Python {environments.PYTHON}: they are fetched from the package "
            f"index, unless it is written with --python {environments.PYTHON}"
        )
    taken = []
    for role, key in archive.keys.items():
        product, folder = known.get(role), unpacked / role
        if product is None:
            continue  # packages for another Python, or for a checkout's, and there is no checkout
        problem = "it is for another one, or another version" if key != product.key else _checked(role, folder)
        if problem:
            reporter.note(f"{product.what} of {archive.name} is left out: {problem}")
        elif not _is_same(product, folder):
            taken.append((product, folder))
    for product, folder in taken:
        if checkout is not None and product.role.startswith(_PYTHON):
            environments.adopt(cache, checkout, folder, reporter)
            continue
        with cache.publish_directory(product.folder) as partial:
            for path in folder.iterdir():
                path.rename(partial / path.name)
    if taken:
        remove(cache.path("provisioned"))  # what was found here before


def _checked(role: str, folder: Path) -> str:
    """Why this machine cannot use it; empty if it can."""
    if role == "libvfio-user":
        return libvfio_user.loading_problem(folder / library.SONAME) or ""
    if role == "native":
        try:
            native.check([sys.executable, "-I"], folder / native_build.FILE_NAME)
        except native_build.BuildError as error:
            return str(error)
    return ""


def _is_same(product: Product, folder: Path) -> bool:
    """Whether it is what the cache has."""
    if not product.record:
        return product.folder.is_dir()
    try:
        return (product.folder / product.record).read_bytes() == (folder / product.record).read_bytes()
    except OSError:
        return False


@dataclass
class _Archive:
    """An archive that is read from its start to its end. All that it says is checked before it is used."""

    stream: IO[bytes]
    name: str
    version: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    size: int = 0
    """Bytes of all files."""
    _contents: dict[str, Contents] = field(default_factory=dict)

    def read_manifest(self) -> None:
        """Raises EnvironmentProblem, and what the modules for tar, gzip and JSON raise."""
        header = self._next()
        if header is None or header.name != MANIFEST or not 0 <= header.size <= MOST_MANIFEST:
            self._refuse(f"it does not begin with a {MANIFEST}")
        data = self.stream.read(header.size)
        self.stream.read(-header.size % _BLOCK)
        manifest = json.loads(data)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            self._refuse(f"it has no format {FORMAT}")
        self.version = str(manifest.get("version"))[:20]
        entries = manifest.get("products")
        if not isinstance(entries, dict):
            self._refuse("its manifest names nothing")
        count = 0
        for role, entry in entries.items():
            if _ROLE.fullmatch(role) is None or not isinstance(entry, dict):
                self._refuse("its manifest names something unknown")
            contents = self._checked(entry)
            self.keys[role], self._contents[role] = str(entry.get("key")), contents
            count += len(contents.files) + len(contents.links)
            self.size += sum(size for _, size, _, _ in contents.files)
        if count > MOST_FILES or self.size > MOST_BYTES:
            self._refuse(f"{count} files of {self.size} bytes in all are too many")

    def _checked(self, entry: Mapping[str, Any]) -> Contents:
        files, links = entry.get("files"), entry.get("links")
        if not isinstance(files, list) or not isinstance(links, list):
            self._refuse("its manifest lacks files")
        for one in files:
            match one:
                case [str(), int(size), bool(), str()] if size >= 0 and not isinstance(size, bool):
                    continue
            self._refuse(f"its manifest has a damaged line: {str(one)[:100]}")
        for one in links:
            match one:
                case [str(), str()]:
                    continue
            self._refuse(f"its manifest has a damaged line: {str(one)[:100]}")
        return Contents([(name, size, runs, digest) for name, size, runs, digest in files], [(a, b) for a, b in links])

    def unpack(self, folder: Path, on_progress: Callable[[int, int, str], None]) -> None:
        """Everything, into one folder for each product: files first, while there is no link that could be followed."""
        done, total = 0, sum(len(contents.files) for contents in self._contents.values())
        for role, contents in self._contents.items():
            below = folder / role
            below.mkdir()
            for name, size, runs, digest in contents.files:
                self._file(below, f"{role}/{name}", name, size, runs, digest)
                done += 1
                if done % 100 == 0:
                    on_progress(done, total, role)
        if self._next() is not None:
            self._refuse("it has more files than its manifest names")
        while rest := self.stream.read(_CHUNK):  # to the end, where the compression's own checksum is
            if rest.strip(b"\0"):
                self._refuse("something follows its end")
        for role, contents in self._contents.items():
            self._links(folder / role, contents.links)

    def _file(self, below: Path, member: str, name: str, size: int, runs: bool, digest: str) -> None:
        target = place_below(below, name, self.name)
        header = self._next()
        if header is None or header.name != member or header.size != size:
            self._refuse(f"{member!r} is missing, or has another size than its manifest says")
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True)
        found = hashlib.sha256()
        with target.open("xb") as file:
            left = size
            while left and (data := self.stream.read(min(left, _CHUNK))):
                found.update(data)
                file.write(data)
                left -= len(data)
        self.stream.read(-size % _BLOCK)
        if left or found.hexdigest() != digest:
            self._refuse(f"{member!r} is not what its manifest says")
        target.chmod(0o755 if runs else 0o644)

    def _links(self, below: Path, links: Sequence[tuple[str, str]]) -> None:
        made = []
        for name, target in links:
            place = place_below(below, name, self.name)
            if not place.parent.is_dir():
                place.parent.mkdir(parents=True)
            if os.path.realpath(place.parent) != str(Path(os.path.realpath(below), *PurePosixPath(name).parts[:-1])):
                self._refuse(f"{name!r} lies behind another link")
            place.symlink_to(target)
            made.append(place)
        for place in made:
            if not _stays(place, below):
                self._refuse(f"the link {place.name!r} leads out of its folder")

    def _next(self) -> tarfile.TarInfo | None:
        """The next member's header; None at the end."""
        block = self.stream.read(_BLOCK)
        if len(block) == _BLOCK and not block.strip(b"\0"):
            return None
        header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        if header.type != tarfile.REGTYPE:
            self._refuse(f"{header.name!r} is no ordinary file")
        return header

    def _refuse(self, why: str) -> NoReturn:
        raise EnvironmentProblem(f"{self.name} is damaged or was not written by --export: {why}")
