"""Finding the library and telling its generation, without one."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmbus.errors import EnvironmentProblem
from vmbus.transport import bindings, library


def fake(*more: str) -> ctypes.CDLL:
    return cast(ctypes.CDLL, SimpleNamespace(**dict.fromkeys((*bindings.FUNCTIONS, *more))))


def test_fault_p3_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built comes last, see `vmbus.provision.libvfio_user`."""
    files = {name: tmp_path / name for name in ("explicit", "named", "system")}
    for file in files.values():
        file.write_bytes(b"")
    monkeypatch.setattr(library, "load", lambda path: path)
    monkeypatch.setattr(library, "system_path", lambda: files["system"])
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, str(files["named"]))
    assert library.find_and_load(files["explicit"]) == files["explicit"]
    assert library.find_and_load() == files["named"]
    monkeypatch.delenv(library.ENVIRONMENT_VARIABLE)
    assert library.find_and_load() == files["system"]
    monkeypatch.setattr(library, "system_path", lambda: None)
    with pytest.raises(EnvironmentProblem, match="scripts/setup"):
        library.find_and_load()
    with pytest.raises(EnvironmentProblem, match="as given"):
        library.find_and_load(tmp_path / "missing")
    with pytest.raises(EnvironmentProblem, match="VMBUS_LIBVFIO_USER"):
        library.named({library.ENVIRONMENT_VARIABLE: str(tmp_path / "missing")})


@pytest.mark.parametrize(
    ("symbols", "content", "expected"),
    [
        (("vfu_get_migr_register_area_size",), b"hit max regions %d", library.Generation.OLD),
        ((), b"..hit max regions %zu..", library.Generation.NEW),
        ((), b"..hit max regions %d..", None),
    ],
)
def test_generations(
    tmp_path: Path, symbols: tuple[str, ...], content: bytes, expected: library.Generation | None
) -> None:
    path = tmp_path / "libvfio-user.so.0"
    path.write_bytes(content)
    if expected is None:
        with pytest.raises(EnvironmentProblem, match="newer than the 2022 generation and older than March 2026"):
            library._generation(fake(*symbols), path)
    else:
        assert library._generation(fake(*symbols), path) is expected


def test_another_library_is_refused() -> None:
    name = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libc" in line)
    with pytest.raises(EnvironmentProblem, match="vfu_create_ctx"):
        library.load(Path(name))


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "libvfio-user.so.0"
    path.write_bytes(b"not ELF")
    with pytest.raises(EnvironmentProblem, match="cannot be loaded"):
        library.load(path)


def test_only_dma_setup_transfers_and_migration_differ_between_generations() -> None:
    class Recorder:
        def __init__(self) -> None:
            for name in bindings.FUNCTIONS:
                setattr(self, name, SimpleNamespace())

    old, new = Recorder(), Recorder()
    bindings.declare(cast(Any, old), new_abi=False)
    bindings.declare(cast(Any, new), new_abi=True)
    differing = {n for n in bindings.FUNCTIONS if getattr(old, n).argtypes != getattr(new, n).argtypes}
    assert differing == {"vfu_setup_device_dma", "vfu_sgl_write", "vfu_setup_device_migration_callbacks"}
    # A context given as an int would lose its upper half.
    assert all(
        getattr(old, name).argtypes[0] is ctypes.c_void_p
        for name in bindings.FUNCTIONS
        if name not in ("vfu_create_ctx", "dma_sg_size")
    )


def test_structures_have_the_librarys_layout() -> None:
    assert ctypes.sizeof(bindings.IoVec) == 16
    assert ctypes.sizeof(bindings.DmaInfo) == 56
    assert (bindings.DmaInfo.vaddr.offset, bindings.DmaInfo.page_size.offset, bindings.DmaInfo.prot.offset) == (
        16,
        40,
        48,
    )
    callbacks = bindings.MigrationCallbacks
    assert ctypes.sizeof(callbacks) == 32
    assert (callbacks.transition.offset, callbacks.read_data.offset, callbacks.write_data.offset) == (8, 16, 24)
    assert ctypes.sizeof(bindings.ScatterGather) == bindings.SG_SIZE
    assert bindings.ScatterGather.offset.offset == 24
