"""How the native core is compiled: one run of a C compiler. Standard library only, and nothing of ours: the wheel's
build hook loads this file by itself. What it needs is imported late: every process of the guest's imports this."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FILE_NAME = "_core.abi3.so"
"""The same file serves every Python from 3.11 on."""

OPTIONS = (
    *("-std=c11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-DPy_LIMITED_API=0x030B0000"),
    *("-Wall", "-Wextra", "-Werror", "-Wl,-z,relro,-z,now"),
)

TIMEOUT = 120.0
_FOLDER = Path(__file__).parent


class BuildError(Exception):
    """The compiler failed; the message ends with what it said."""


def sources() -> list[Path]:
    """The C files and their headers, sorted."""
    return sorted(path for path in _FOLDER.iterdir() if path.suffix in (".c", ".h"))


def key() -> str:
    """Digest over the sources and the options."""
    import hashlib

    parts = hashlib.sha256(repr(OPTIONS).encode())
    for path in sources():
        parts.update(hashlib.sha256(path.read_bytes()).digest())
    return parts.hexdigest()[:16]


def compile_core(compiler: str, include: Sequence[Path], output: Path, extra: Sequence[str] = ()) -> None:
    """Compile and link the native core, with Python's headers below `include`. Raises BuildError."""
    import subprocess

    # System headers: what a compiler thinks of Python's own is not our business.
    headers = [part for folder in include for part in ("-isystem", str(folder))]
    files = [str(path) for path in sources() if path.suffix == ".c"]
    argv = [compiler, *OPTIONS, *extra, *headers, *files, "-o", str(output)]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(str(error)) from error
    if done.returncode != 0:
        raise BuildError(done.stderr.strip()[-2000:])
