"""Find libvfio-user, load it, and tell which of its two generations it is.

The library's SONAME never changes although its ABI does, so the generation is read off two facts:

* the symbol `vfu_get_migr_register_area_size` was removed in September 2023: present means the 2022 generation,
  the one inside Debian's QEMU source package;
* without that symbol, the message text ``hit max regions %zu`` in the file means that the library takes the number
  of DMA regions as an argument (March 2026 and later), which is what our bindings of the new generation call.

Anything in between would be called with wrong arguments, so it is refused.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vmbus.errors import EnvironmentProblem
from vmbus.transport import bindings

ENVIRONMENT_VARIABLE = "VMBUS_LIBVFIO_USER"
SONAME = "libvfio-user.so.0"
_SYMBOL_OF_OLD = "vfu_get_migr_register_area_size"
_TEXT_OF_NEW = b"hit max regions %zu"
_HOW_TO_GET_ONE = f"run scripts/setup, or name the file in {ENVIRONMENT_VARIABLE}"


class Generation(enum.Enum):
    OLD = "2022"
    """Revision 0b28d205572c of June 2022: at most 16 DMA regions, no MSI of its own, v1 migration."""
    NEW = "2026"
    """March 2026 and later."""


@dataclass(frozen=True)
class Library:
    """A loaded libvfio-user whose prototypes are set."""

    cdll: ctypes.CDLL
    generation: Generation
    path: Path
    description: str
    """For people: path and generation."""


def named(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The file that the environment variable names. Raises EnvironmentProblem if there is none."""
    text = environment.get(ENVIRONMENT_VARIABLE, "").strip()
    return _existing(Path(text).expanduser().absolute(), f"from {ENVIRONMENT_VARIABLE}") if text else None


def system_path() -> Path | None:
    """The system's library, where there is one: it need be none that we can serve."""
    ends = (f"/{os.uname().machine}-linux-gnu", "64", "")
    folders = (prefix + end for prefix in ("/usr/local/lib", "/usr/lib", "/lib") for end in ends)
    return next((path for folder in folders if (path := Path(folder) / SONAME).is_file()), None)


def load(path: Path) -> Library:
    """Load the library at `path`, tell its generation and set its prototypes.

    Raises EnvironmentProblem if the file cannot be loaded, is another library, or is of a revision between the two
    supported generations.
    """
    try:
        # use_errno: the library reports through errno, which Python would otherwise overwrite before we look.
        cdll = ctypes.CDLL(os.fspath(path), use_errno=True)
    except OSError as error:
        raise EnvironmentProblem(f"libvfio-user at {path} cannot be loaded ({error}); {_HOW_TO_GET_ONE}") from error
    generation = _generation(cdll, path)
    bindings.declare(cdll, new_abi=generation is Generation.NEW)
    if cdll.dma_sg_size() != bindings.SG_SIZE:
        raise EnvironmentProblem(
            f"libvfio-user at {path} has scatter-gather entries of {cdll.dma_sg_size()} bytes, "
            f"not {bindings.SG_SIZE}: an unknown revision; {_HOW_TO_GET_ONE}"
        )
    return Library(cdll, generation, path, f"{path} ({generation.value} generation)")


def find_and_load(explicit: Path | None = None) -> Library:
    """Loads `explicit`, else what the environment variable names, else the system's. Raises EnvironmentProblem."""
    path = named() if explicit is None else _existing(explicit, "as given")
    path = path or system_path()
    if path is None:
        raise EnvironmentProblem(f"no libvfio-user found; {_HOW_TO_GET_ONE}")
    return load(path)


def _existing(path: Path, origin: str) -> Path:
    if not path.is_file():
        raise EnvironmentProblem(f"libvfio-user ({origin}): {path} is not a file; {_HOW_TO_GET_ONE}")
    return path


def _generation(cdll: ctypes.CDLL, path: Path) -> Generation:
    missing = [name for name in bindings.FUNCTIONS if not hasattr(cdll, name)]
    if missing:
        raise EnvironmentProblem(
            f"{path} is not a libvfio-user we know: it lacks {', '.join(missing)}; {_HOW_TO_GET_ONE}"
        )
    if hasattr(cdll, _SYMBOL_OF_OLD):
        return Generation.OLD
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(_TEXT_OF_NEW) >= 0:
            return Generation.NEW
    raise EnvironmentProblem(
        f"libvfio-user at {path} is newer than the 2022 generation and older than March 2026: its calling "
        f"conventions differ from both supported generations; {_HOW_TO_GET_ONE}"
    )
