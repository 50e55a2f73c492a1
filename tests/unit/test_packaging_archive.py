"""A finished set-up as one file: what is in it comes out again, and nothing else ever does."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.prebuilt import Member, entry, little_cache, manifest, pack, put, tree
from vmbus.errors import EnvironmentProblem
from vmbus.provision import environment, guest_files, libvfio_user, prebuilt, qemu
from vmbus.provision.cache import Cache
from vmbus.provision.report import SilentReporter

CHECKOUT = Path(__file__).resolve().parents[2]


class Notes(SilentReporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def export(cache: Cache, file: Path, **settings: str) -> str:
    return prebuilt.export(file, cache, None, SilentReporter(), environment=settings)


# --- a whole one -----------------------------------------------------------------------------------------------


def test_packaging_what_goes_into_an_archive_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = little_cache(tmp_path / "old"), Cache(tmp_path / "new")
    first, second = (export(old, tmp_path / name) for name in ("a.tar.gz", "b.tar.gz"))
    assert first == second and (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()
    monkeypatch.setattr(libvfio_user, "loading_problem", lambda path: None)
    put(new.path("provisioned", "x.json"), b"of before")
    prebuilt.bring(tmp_path / "a.tar.gz", new, None, SilentReporter())
    wanted = {
        name: what
        for name, what in tree(old.root).items()
        if name != "lock" and "__pycache__" not in name and what != "/etc/passwd"
    }
    assert {name: what for name, what in tree(new.root).items() if name != "lock"} == wanted
    root = new.path("root", guest_files.USERLAND_RECIPE.key)
    assert (root / "bin/program").read_bytes() == b"guest" and (root / "usr/lib/lib.so").stat().st_mode & 0o100
    with tarfile.open(tmp_path / "a.tar.gz") as tar:  # any tar reads it
        assert tar.getnames()[0] == prebuilt.MANIFEST and all(member.isreg() for member in tar)


def test_packaging_an_import_replaces_only_what_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = little_cache(tmp_path / "old"), little_cache(tmp_path / "new")
    monkeypatch.setattr(libvfio_user, "loading_problem", lambda path: None)
    kernel, root = guest_files.kernel_folder(new), new.path("root", qemu.ROOT_RECIPE.key)
    put(kernel / guest_files.KERNEL_RECORD, b'{"version": "6.12.0"}')
    before = root.stat().st_ino
    export(old, tmp_path / "a")
    prebuilt.bring(tmp_path / "a", new, None, SilentReporter())
    assert root.stat().st_ino == before
    assert guest_files.read_kernel(kernel).version == "6.12.1"


def test_packaging_a_library_that_does_not_load_is_left_out(tmp_path: Path) -> None:
    notes, new = Notes(), Cache(tmp_path / "new")
    export(little_cache(tmp_path / "old"), tmp_path / "a")
    prebuilt.bring(tmp_path / "a", new, None, notes)
    assert len(notes.said) == 1 and "libvfio-user of a is left out: " in notes.said[0]
    assert not libvfio_user.build_folder(new).exists() and guest_files.kernel_folder(new).exists()


def test_packaging_what_a_machine_has_of_its_own_stays_there(tmp_path: Path) -> None:
    old = little_cache(tmp_path / "old")
    export(old, tmp_path / "a", VMBUS_QEMU="/q", VMBUS_LIBVFIO_USER="/l")
    with tarfile.open(tmp_path / "a") as tar:
        assert {name.partition("/")[0] for name in tar.getnames()} == {"kernel", "guest", prebuilt.MANIFEST}
    with pytest.raises(EnvironmentProblem, match="unset VMBUS_KERNEL, VMBUS_INITRAMFS"):
        export(old, tmp_path / "b", VMBUS_KERNEL="/k", VMBUS_INITRAMFS="/i")
    assert not (tmp_path / "b").exists()


def test_packaging_an_archive_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(little_cache(tmp_path / "old"), tmp_path / "a")
    monkeypatch.setattr(guest_files, "MODULES", ("other",))
    with pytest.raises(
        EnvironmentProblem, match=r"the guest's kernel in it is not what this version uses.*write it anew"
    ):
        prebuilt.bring(tmp_path / "a", Cache(tmp_path / "new"), None, SilentReporter())
    nothing(tmp_path / "new")


def test_packaging_packages_are_those_of_one_python_and_lock_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout's, for the environment that they become."""
    (checkout := tmp_path / "checkout").mkdir()
    (checkout / environment.LOCK_FILE).write_text("a==1\n")
    old = little_cache(tmp_path / "old")
    packages = environment.packages_folder(environment.environment_path(old, checkout))
    put(packages / "a.py", b"print('a')")
    prebuilt.export(tmp_path / "a", old, checkout, SilentReporter(), environment={})
    new, notes = Cache(tmp_path / "new"), Notes()
    prebuilt.bring(tmp_path / "a", new, checkout, notes)
    python = environment.environment_python(new, checkout)
    assert python is not None and "Python" not in "".join(notes.said)
    assert environment.packages_folder(python.parents[1]).joinpath("a.py").read_bytes() == b"print('a')"
    (checkout / environment.LOCK_FILE).write_text("a==2\n")
    prebuilt.bring(tmp_path / "a", new, checkout, notes)
    assert environment.environment_python(new, checkout) is None and "for another one" in notes.said[-1]
    monkeypatch.setattr(environment, "PYTHON", "3.99")
    prebuilt.bring(tmp_path / "a", new, checkout, notes)
    assert any("written with --python 3.99" in one for one in notes.said)


def test_packaging_arguments_of_set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brought: list[Path] = []
    monkeypatch.setattr(prebuilt, "bring", lambda file, *_: brought.append(file))
    cache = Cache(tmp_path)
    for words in (["--quiet", "--import", "f", "--json"], ["--quiet", "--import=f", "--json"]):
        assert prebuilt.imported(words, cache, None, SilentReporter()) == ["--quiet", "--json"]
    assert brought == [Path("f")] * 2
    assert prebuilt.imported(["--export", "x"], cache, None, SilentReporter()) == ["--export", "x"]
    with pytest.raises(EnvironmentProblem, match="wants the name of a file"):
        prebuilt.imported(["--import"], cache, None, SilentReporter())


# --- hostile ones ----------------------------------------------------------------------------------------------


def nothing(folder: Path) -> None:
    """Nothing has come into the cache."""
    assert not folder.exists() or [path.name for path in folder.rglob("*")] in ([], ["lock"])


def many(path: Path) -> Path:
    lines = [[f"{number}", 0, False, ""] for number in range(prebuilt.MOST_FILES + 1)]
    content = manifest()
    content["products"]["guest"]["files"] = lines
    return pack(path, content)


def large(path: Path) -> Path:
    content = manifest([("a", b"x")])
    content["products"]["guest"]["files"][0][1] = prebuilt.MOST_BYTES + 1
    return pack(path, content)


def damaged_line(line: object) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        content = manifest()
        content["products"]["guest"]["files"] = [line]
        return pack(path, content)

    return write


def archive(
    files: list[tuple[str, bytes]] | None = None,
    links: list[tuple[str, str]] | None = None,
    members: list[Member] | None = None,
    end: bytes = bytes(1024),
    **more: Any,
) -> Callable[[Path], Path]:
    files = files or []
    wanted = [Member(f"guest/{name}", data) for name, data in files] if members is None else members
    return lambda path: pack(path, manifest(files, links or [], **more), wanted, end)


HOSTILE: dict[str, Callable[[Path], Path]] = {
    "climbs": archive([("../../../../out", b"x")]),
    "absolute": archive([("/tmp/vmbus-out", b"x")]),
    "absolute, to a folder": archive([("//tmp/vmbus-out", b"x")]),
    "empty name": archive([("", b"x")]),
    "nul": archive([("a\0b", b"x")], members=[Member("guest/a", b"x")]),
    "twice": archive([("a", b"x"), ("a", b"x")]),
    "file and folder": archive([("a", b"x"), ("a/b", b"x")]),
    "lone surrogate": archive([("\ud800", b"x")], members=[Member("guest/a", b"x")]),
    "name that is too long": archive([("a" * 300, b"x")], members=[Member("guest/a", b"x")]),
    "link out": archive(links=[("l", "../../../../..")]),
    "absolute link": archive(links=[("l", "/etc/passwd")]),
    "link through a link": archive([("d/e/f", b"x")], [("up", "d/e"), ("out", "up/../../../../..")]),
    "link behind a link": archive([("d/f", b"x")], [("l", "d"), ("l/in", "f")]),
    "link in place of a file": archive([("a", b"x")], [("a", "b")]),
    "link's place climbs": archive(links=[("../l", "b")]),
    "file behind a link": archive([("l/a", b"x")], [("l", "..")]),
    "device": archive([("a", b"")], members=[Member("guest/a", kind=tarfile.CHRTYPE)]),
    "block device": archive([("a", b"")], members=[Member("guest/a", kind=tarfile.BLKTYPE)]),
    "fifo": archive([("a", b"")], members=[Member("guest/a", kind=tarfile.FIFOTYPE)]),
    "symbolic link": archive([("a", b"")], members=[Member("guest/a", kind=tarfile.SYMTYPE, link="/etc/passwd")]),
    "hard link": archive([("a", b"")], members=[Member("guest/a", kind=tarfile.LNKTYPE, link="/etc/passwd")]),
    "extended header": archive([("a", b"")], members=[Member("x", kind=tarfile.XHDTYPE, size=1 << 40)]),
    "long name": archive([("a", b"")], members=[Member("././@LongLink", kind=tarfile.GNUTYPE_LONGNAME, size=1 << 40)]),
    "size below nothing": archive([("a", b"x")], members=[Member("guest/a", b"x", size=-1)]),
    "other size": archive([("a", b"x")], members=[Member("guest/a", b"xy")]),
    "other content": archive([("a", b"x")], members=[Member("guest/a", b"y")]),
    "other order": archive([("a", b"x"), ("b", b"y")], members=[Member("guest/b", b"y"), Member("guest/a", b"x")]),
    "a file is missing": archive([("a", b"x")], members=[]),
    "a file too many": archive([], members=[Member("guest/a", b"x")]),
    "something behind its end": archive(end=bytes(1024) + b"x" * 512),
    "no end": archive(end=b""),
    "another format": archive(format=2),
    "a list": lambda path: pack(path, []),
    "no products": lambda path: pack(path, manifest(products=[])),
    "a product's name": lambda path: pack(path, manifest(products={"../x": entry("k")})),
    "a product that is none": lambda path: pack(path, manifest(products={"guest": 7})),
    "deep": lambda path: pack(path, b"[" * 100_000),
    "no JSON": lambda path: pack(path, b"{"),
    "a line": damaged_line(["a", "1", False, ""]),
    "a line without a size": damaged_line(["a", True, False, ""]),
    "a line below nothing": damaged_line(["a", -1, False, ""]),
    "files": many,
    "bytes": large,
    "no tar": lambda path: put(path, gzip.compress(b"x" * 5000)) or path,
    "no gzip": lambda path: put(path, b"x" * 5000) or path,
    "empty": lambda path: put(path, b"") or path,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_packaging_a_hostile_archive_is_refused(what: str, tmp_path: Path) -> None:
    """With one class of error, and nothing of it is left anywhere."""
    (tmp_path / "below").mkdir()
    file, folder = HOSTILE[what](tmp_path / "below/a"), tmp_path / "below/cache"
    with pytest.raises(
        EnvironmentProblem, match=r"damaged or was not written by --export|would leave its folder|write it"
    ):
        prebuilt.bring(file, Cache(folder), None, SilentReporter())
    nothing(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below"] and not Path("/tmp/vmbus-out").exists()


def test_packaging_a_manifest_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = archive([("a", b"x")])(tmp_path / "a")
    monkeypatch.setattr(prebuilt, "MOST_MANIFEST", 10)
    with pytest.raises(EnvironmentProblem, match=r"does not begin with a manifest"):
        prebuilt.bring(good, Cache(tmp_path / "cache"), None, SilentReporter())


def test_packaging_a_good_one_of_the_same_kind_is_taken(tmp_path: Path) -> None:
    """What the hostile ones differ from."""
    file = archive([("a", b"x"), ("d/e/f", b"y")], [("l", "d/e"), ("d/up", "../a")])(tmp_path / "a")
    prebuilt.bring(file, cache := Cache(tmp_path / "cache"), None, SilentReporter())
    root = cache.path("root", guest_files.USERLAND_RECIPE.key)
    assert (root / "l/f").read_bytes() == b"y" and (root / "d/up").read_bytes() == b"x"


def test_packaging_sabotage_without_the_guards_a_file_gets_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    monkeypatch.setattr(prebuilt, "place_below", lambda folder, name, origin: folder / name)
    file = archive([("../../../../out", b"x")])(tmp_path / "below/a")
    prebuilt.bring(file, Cache(tmp_path / "below/cache"), None, SilentReporter())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below", "out"]
    monkeypatch.setattr(prebuilt, "_stays", lambda link, folder: True)
    file = archive(links=[("l", "../../../../..")])(tmp_path / "below/b")
    prebuilt.bring(file, cache := Cache(tmp_path / "below/other"), None, SilentReporter())
    assert (cache.path("root", guest_files.USERLAND_RECIPE.key) / "l").is_symlink()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 5000), flip=st.integers(1, 255), shorten=st.booleans(), packed=st.booleans())
def test_packaging_a_damaged_archive_is_refused(
    cut: int, flip: int, shorten: bool, packed: bool, tmp_path: Path
) -> None:
    """Whatever is damaged, before or behind the compression: it is refused, or says what it said."""
    good = archive([("a", b"x" * 700), ("b", b"y")], [("l", "a")])(tmp_path / "good").read_bytes()
    data = bytearray(good if packed else gzip.decompress(good))
    at = cut % len(data)
    if shorten:
        del data[at:]
    else:
        data[at] ^= flip
    (tmp_path / "bad").write_bytes(data if packed else gzip.compress(data, 1))
    cache = Cache(tmp_path / "cache")
    try:
        prebuilt.bring(tmp_path / "bad", cache, None, SilentReporter())
    except EnvironmentProblem:
        return
    root = cache.path("root", guest_files.USERLAND_RECIPE.key)
    files = {name: what[0] for name, what in tree(root).items() if isinstance(what, tuple)}
    assert files == {"a": b"x" * 700, "b": b"y"}
    cache.clear()
