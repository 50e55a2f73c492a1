"""Unpacking without relying on what a minimal Python or machine may lack.

xz is needed for kernel modules and source archives. Python's own module is used where it was built in, else the
xz program, else the busybox of the guest's files, which is static and runs anywhere.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, cast

from vmbus.errors import EnvironmentProblem

try:
    import lzma
except ImportError:  # a Python compiled by hand, without the library's headers at hand
    lzma = None  # type: ignore[assignment]

UNPACK_TIMEOUT = 300.0

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"


def decompress_xz(data: bytes, tools: Sequence[Sequence[str]] = (("xz",),)) -> bytes:
    """Return the contents of an xz stream; `tools` are commands that take `-dc`, tried where Python has no module.

    Raises EnvironmentProblem if nothing can do it or the data are damaged.
    """
    if lzma is not None:
        try:
            return lzma.decompress(data)
        except lzma.LZMAError as error:
            raise EnvironmentProblem(f"damaged xz data: {error}") from error
    for tool in tools:
        if shutil.which(tool[0]) is None:
            continue
        result = subprocess.run([*tool, "-dc"], input=data, capture_output=True, timeout=UNPACK_TIMEOUT)
        if result.returncode == 0:
            return result.stdout
        raise EnvironmentProblem(f"{tool[0]} could not decompress: {result.stderr.decode(errors='replace').strip()}")
    raise EnvironmentProblem("nothing on this machine can decompress xz; run: sudo apt-get install -y xz-utils")


def decompress(data: bytes) -> bytes:
    """Return the contents of what xz, gzip or zstd has compressed. Raises EnvironmentProblem."""
    if data.startswith(_GZIP):
        try:
            return gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise EnvironmentProblem(f"damaged gzip data: {error}") from error
    if data.startswith(_ZSTD):
        if shutil.which("zstd") is None:
            raise EnvironmentProblem("nothing on this machine can decompress zstd: install the program zstd")
        result = subprocess.run(["zstd", "-dcq"], input=data, capture_output=True, timeout=UNPACK_TIMEOUT)
        if result.returncode != 0:
            raise EnvironmentProblem(f"zstd could not decompress: {result.stderr.decode(errors='replace').strip()}")
        return result.stdout
    return decompress_xz(data)


def place_below(folder: Path, name: str, origin: str) -> Path:
    """Where an archive's member `name` goes: somewhere below `folder`, as far as its name says.

    Raises EnvironmentProblem, which names `origin`, for one that would leave the folder: an absolute name, as two
    slashes in a row make one of what is left when its beginning is cut off, or one that climbs.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise EnvironmentProblem(f"{origin} holds a file that would leave its folder: {name!r}")
    return folder.joinpath(*parts)


@contextmanager
def open_archive(path: Path) -> Iterator[IO[bytes]]:
    """Open an xz-compressed file for sequential reading.

    Raises EnvironmentProblem if nothing on the machine can decompress it.
    """
    if lzma is not None:
        with lzma.open(path) as stream:
            yield cast(IO[bytes], stream)
        return
    if shutil.which("xz") is None:
        raise EnvironmentProblem("nothing on this machine can decompress xz; run: sudo apt-get install -y xz-utils")
    with command_output(["xz", "-dc", str(path)], f"decompressing {path.name}") as output:
        yield output


@contextmanager
def command_output(argv: Sequence[str], what: str) -> Iterator[IO[bytes]]:
    """Give out a program's standard output as a stream; the program has ended when the block is left.

    The rest of the output may be left unread. Raises EnvironmentProblem if the program failed although everything
    was read.
    """
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    try:
        yield process.stdout
        complete = not process.stdout.read(1)
    except BaseException:
        process.kill()
        raise
    finally:
        process.stdout.close()
        message = process.stderr.read(4096).decode(errors="replace").strip()
        process.stderr.close()
        process.wait(timeout=UNPACK_TIMEOUT)
    if complete and process.returncode != 0:
        raise EnvironmentProblem(f"{what} failed with status {process.returncode}: {message}")
