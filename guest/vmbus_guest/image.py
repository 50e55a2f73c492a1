"""Build the guest's initial file system: Debian's busybox, Python, ext4 tools and kernel modules, and our packages.

Runs on the host, needs no root rights and no cpio program. The image is two newc archives in one file, uncompressed
(unpacking under an emulated CPU costs more than reading):

* the *base*: busybox with its applets, Python with a pruned, precompiled standard library, mke2fs and e2fsck,
  the daemons of Linux's integration driver, the shared libraries they need, the kernel modules. It changes only when
  one of the Debian packages or this module changes.
* *ours*: the guest's part of `vmbus` (with the native core, if the guest's Python can load it), `vmbus_guest`, and the
  tree `rootfs/` beside this module (whose `init` the kernel starts), and our kernel module, if there is one. Files of
  `rootfs/` replace those of the base. It is written again whenever a source file changes.

Both are cached under a digest of everything that goes into them, and equal inputs give equal bytes.

In the guest: `/usr/bin/python3`, our packages in `/usr/lib/vmbus`, modules as `/lib/modules/NAME.ko`, and
`/lib/modules/order`, a line `NAME DEPENDENCY...` per module that can be loaded from top to bottom. What `init` loads
for the driver `userspace` or `linux` is in `/lib/modules/DRIVER`, a name per line (both lists for `both`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import vmbus
from vmbus.errors import EnvironmentProblem
from vmbus.native.build import FILE_NAME, BuildError
from vmbus.provision.cache import Cache, digest, prune, publish_bytes, remove
from vmbus.provision.digests import damaged, write_digests
from vmbus.provision.guest_files import LINUX_DRIVERS, PYTHON, USERSPACE_DRIVER, VIRTIO, Kernel
from vmbus.provision.kernel_module import NAME as KERNEL_MODULE
from vmbus.provision.native import check
from vmbus.provision.report import Reporter, SilentReporter
from vmbus.provision.roots import RECORD, Root
from vmbus_guest import newc

PACKAGES_FOLDER = "usr/lib/vmbus"
"""Where our packages are in the guest."""

GUEST_ROOMS = {
    "vmbus": (
        "__init__.py",
        "errors.py",
        "places.py",
        "util",
        "native",
        "wire",
        "memory",
        "ring",
        "kmcl",
        "bus",
        "observe/__init__.py",
        "observe/audit",
    ),
}
"""Of our packages what the guest runs: folders and files below the package, for those of which it does not run all."""

HOST_ONLY = {"vmbus_guest": ("image.py", "newc.py", "rootfs", "system.py")}
"""And what it does not."""

UNUSED_PYTHON = (
    # Tests, tools for people at a desk, documentation.
    *("test", "idlelib", "tkinter", "turtle*", "turtledemo", "ensurepip", "venv", "lib2to3", "pydoc*", "unittest"),
    *("doctest.pyc", "config-*", "_sysconfigdata_*", "pickletools.pyc", "wsgiref", "antigravity.pyc", "this.pyc"),
    # Network protocols, mark-up, databases, terminals: the guest talks to its host over a virtio port.
    *("xml", "xmlrpc", "html", "http", "email", "mailbox.pyc", "imaplib.pyc", "smtplib.pyc", "poplib.pyc"),
    *("ftplib.pyc", "ssl.pyc", "sqlite3", "dbm", "curses", "zoneinfo", "_strptime.pyc", "zipapp.pyc"),
    "_pydecimal.pyc",  # the compiled one is there
    *(f"encodings/{name}" for name in ("cp*", "iso*", "mac_*", "koi8*", "big5*", "euc*", "gb*", "hp*", "hz*")),
    *(f"encodings/{name}" for name in ("johab*", "kz*", "ptcp*", "shift_*", "tis*", "mbcs*", "oem*", "palmos*")),
    *(f"lib-dynload/{name}" for name in ("_test*", "_xxtest*", "xx*", "_ctypes_test*", "_codecs_*", "_multibyte*")),
    *(f"lib-dynload/{name}" for name in ("_ssl*", "_hashlib*", "_sqlite3*", "_dbm*", "_curses*", "readline*")),
    *(f"lib-dynload/{name}" for name in ("_lzma*", "_bz2*", "_zoneinfo*", "_interp*")),
)
"""Patterns for what is left out of Python's standard library: a path relative to it, or any of its parents.

`_hashlib` needs 8 MB of OpenSSL; hashlib has its own implementations of everything that is used here."""

TOOLS = ("usr/sbin/mke2fs", "usr/sbin/e2fsck", "etc/mke2fs.conf", "usr/sbin/hv_kvp_daemon", "usr/sbin/hv_vss_daemon")
"""Taken from Debian's e2fsprogs (busybox cannot make or check an ext4 file system) and hyperv-daemons."""

COMPILE_TIMEOUT = 300.0
KEPT_IMAGES = 8
RECENT = 1800.0
"""Images that were used less lately are removed, but for those of the last so many seconds: somebody may be about to
start a machine from one. It is not needed any more once that runs."""

_COMPILER = """
import json, marshal, sys
from importlib.util import MAGIC_NUMBER, source_hash
from pathlib import Path
jobs, optimize = json.load(sys.stdin)
for source, target, shown in jobs:
    data = Path(source).read_bytes()
    code = compile(data, shown, "exec", dont_inherit=True, optimize=optimize)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    header = MAGIC_NUMBER + (1).to_bytes(4, "little") + source_hash(data)
    Path(target).write_bytes(header + marshal.dumps(code, 2))
"""
"""Run by the guest's own Python: the layout of PEP 552, with the flag for a hash that is not checked, since the guest
shall not read the sources to see whether they changed. Later versions of marshal write back references, and which
ones depends on the addresses of objects: py_compile's output differs from run to run."""


@dataclass(frozen=True)
class GuestImage:
    """What QEMU is given to boot."""

    kernel: Path
    initramfs: Path
    key: str
    """Digest over everything that is in the image."""


def build_image(
    userland: Root,
    kernel: Kernel,
    cache: Cache | None = None,
    reporter: Reporter | None = None,
    packages: Iterable[Path] | None = None,
    rootfs: Path | None = None,
    native_core: Path | None = None,
    kernel_module: Path | None = None,
) -> GuestImage:
    """Return the image for these parts, built if it is not in the cache. The caller holds the cache's lock.

    `packages` are the folders of our packages and `rootfs` the tree that goes over everything else; by default
    those of this checkout. `native_core`: its file, as built for the host. `kernel_module`: ours, built for `kernel`.

    Raises EnvironmentProblem if a part cannot be used.
    """
    cache = cache or Cache()
    reporter = reporter or SilentReporter()
    key = image_key(userland, kernel, packages, rootfs, native_core, kernel_module)
    found = find_image(cache, key)
    if found is not None:
        return found
    if name := damaged(kernel.image.parent):
        folder = kernel.image.parent
        raise EnvironmentProblem(f"{folder / name} was damaged: remove {folder}, and the next set-up fetches it anew")
    base = _base(userland, kernel, cache, reporter)
    reporter.begin("Guest image")
    own = newc.write(
        [
            *_own_entries(userland, cache, packages, rootfs),
            *_native_core(userland, native_core, reporter),
            *_kernel_module(kernel_module),
        ]
    )
    directory = cache.path("image", key)
    with cache.publish_directory(directory) as partial:
        shutil.copyfile(kernel.image, partial / "vmlinuz")  # a link would share its damage
        with (partial / "initramfs.cpio").open("wb") as file:
            with base.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
            file.write(own)
        write_digests(partial)
    image = GuestImage(directory / "vmlinuz", directory / "initramfs.cpio", key)
    prune(directory, KEPT_IMAGES, RECENT)
    reporter.end(f"{image.initramfs.stat().st_size / 1e6:.1f} MB")
    return image


def adopt_image(kernel: Path, initramfs: Path, key: str, cache: Cache) -> GuestImage:
    """Return an image of the user's own files, as they are. The caller holds the cache's lock."""
    directory = cache.path("image", key)
    with cache.publish_directory(directory) as partial:
        shutil.copyfile(kernel, partial / "vmlinuz")
        shutil.copyfile(initramfs, partial / "initramfs.cpio")
        write_digests(partial)
    prune(directory, KEPT_IMAGES, RECENT)
    return GuestImage(directory / "vmlinuz", directory / "initramfs.cpio", key)


def find_image(cache: Cache, key: str) -> GuestImage | None:
    """Return the image with this key if it is in the cache, as it was made."""
    directory = cache.path("image", key)
    image = GuestImage(directory / "vmlinuz", directory / "initramfs.cpio", key)
    if not image.kernel.is_file() or not image.initramfs.is_file() or damaged(directory):
        return None
    with suppress(OSError):  # a cache that is not ours to write to
        os.utime(directory)
    return image


def image_key(
    userland: Root,
    kernel: Kernel,
    packages: Iterable[Path] | None = None,
    rootfs: Path | None = None,
    native_core: Path | None = None,
    kernel_module: Path | None = None,
) -> str:
    """Return the key of the image that these parts make: a digest over all that goes into it."""
    contents = [
        (name, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "", _mode(path))
        for name, path in _sources(packages, rootfs)
    ]
    links = [str(path.readlink()) for _, path in _sources(packages, rootfs) if path.is_symlink()]
    built = [hashlib.sha256(file.read_bytes()).hexdigest() if file else "" for file in (native_core, kernel_module)]
    return digest(_base_key(userland, kernel), contents, links, built)


# --- the base --------------------------------------------------------------------------------------------------


def _base_key(userland: Root, kernel: Kernel) -> str:
    recipe = [hashlib.sha256(Path(module).read_bytes()).hexdigest() for module in (__file__, newc.__file__)]
    record = (userland.path / RECORD).read_text(encoding="utf-8")
    return digest(recipe, record, kernel.version, kernel.package, {k: list(v) for k, v in kernel.modules.items()})


def _base(userland: Root, kernel: Kernel, cache: Cache, reporter: Reporter) -> Path:
    folder = cache.path("image", f".base-{_base_key(userland, kernel)}")
    final = folder / "base.cpio"
    if final.is_file() and not damaged(folder):
        return final
    reporter.begin("Guest base")
    with cache.scratch() as scratch:
        entries = [
            *_skeleton(),
            *_busybox(userland),
            *_python(userland, Path(scratch)),
            *_tools(userland),
            *_libraries(userland),
            *_modules(kernel),
        ]
        data = newc.write(entries)
    for old in (*folder.parent.glob(".base-*"), *folder.parent.glob("base-*.cpio")):
        remove(old)
    with cache.publish_directory(folder) as partial:
        publish_bytes(partial / final.name, data)
        write_digests(partial)
    reporter.end(f"{len(data) / 1e6:.1f} MB")
    return final


def _skeleton() -> Iterator[newc.Entry]:
    for name in ("dev", "etc", "mnt", "proc", "root", "run", "sys", "usr/bin", "usr/lib64", "usr/sbin", "var/lib"):
        yield newc.directory(name)
    yield newc.directory("tmp", 0o1777)
    for name in ("bin", "sbin", "lib", "lib64"):
        yield newc.symlink(name, f"usr/{name}")
    # The kernel opens the console for init before anything can be mounted.
    yield newc.character_device("dev/console", 5, 1)
    yield newc.character_device("dev/null", 1, 3, 0o666)
    yield newc.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    yield newc.file("etc/group", b"root:x:0:\n")
    yield newc.file("etc/hosts", b"127.0.0.1 localhost\n127.0.1.1 vmbus-guest\n")


def _busybox(userland: Root) -> Iterator[newc.Entry]:
    program = userland.path / "usr/bin/busybox"
    yield newc.file("usr/bin/busybox", program.read_bytes(), 0o755)
    # Static, so that the host can run it to learn what it can do.
    for path in _run([str(program), "--list-full"], "asking busybox for its applets").splitlines():
        folder, _, name = path.rpartition("/")
        if name and name != "busybox" and not path.startswith("linuxrc"):
            place = "usr/sbin" if folder.endswith("sbin") else "usr/bin"
            if f"{place}/{name}" in TOOLS:
                continue  # the real one, which knows more
            yield newc.symlink(f"{place}/{name}", "/usr/bin/busybox")


def _python(userland: Root, scratch: Path) -> Iterator[newc.Entry]:
    library = userland.path / "usr/lib" / PYTHON
    jobs: list[tuple[str, str, str]] = []
    compiled: list[tuple[str, Path]] = []
    for path in sorted(library.rglob("*")):
        relative = path.relative_to(library)
        # Links lead to /etc, which would be the host's.
        if path.is_symlink() or not path.is_file() or "__pycache__" in relative.parts:
            continue
        if path.suffix == ".py":
            # Without sources beside it a compiled module is imported in one step, and 10 MB stay at home.
            name = str(relative) + "c"
            if not _unused(name):
                target = scratch / name
                jobs.append((str(path), str(target), f"/usr/lib/{PYTHON}/{relative}"))
                compiled.append((f"usr/lib/{PYTHON}/{name}", target))
    _compile(userland, jobs, optimize=2)  # documentation strings are a fifth of the library
    for name, target in compiled:
        yield newc.file(name, target.read_bytes())
    for path in _python_objects(userland):
        yield newc.file(str(path.relative_to(userland.path)), path.read_bytes(), 0o755)
    yield newc.symlink("usr/bin/python3", PYTHON)
    yield newc.symlink("usr/bin/python", PYTHON)


def _python_objects(userland: Root) -> list[Path]:
    """Python and the extension modules that are kept."""
    library = userland.path / "usr/lib" / PYTHON
    modules = [path for path in sorted(library.rglob("*.so")) if path.is_file() and not path.is_symlink()]
    return [
        userland.path / "usr/bin" / PYTHON,
        *(path for path in modules if not _unused(str(path.relative_to(library)))),
    ]


def _tools(userland: Root) -> Iterator[newc.Entry]:
    for name in TOOLS:
        yield newc.file(name, (userland.path / name).read_bytes(), 0o644 if name.startswith("etc/") else 0o755)


def _libraries(userland: Root) -> Iterator[newc.Entry]:
    loader = userland.libraries / "ld-linux-x86-64.so.2"
    yield newc.file("usr/lib64/ld-linux-x86-64.so.2", loader.read_bytes(), 0o755)
    tools = [userland.path / name for name in TOOLS if not name.startswith("etc/")]
    for name, path in sorted(_shared_libraries(userland, [*_python_objects(userland), *tools]).items()):
        yield newc.file(f"usr/lib/x86_64-linux-gnu/{name}", path.read_bytes(), 0o755)


def _unused(relative: str) -> bool:
    candidates = [relative, *(str(parent) for parent in Path(relative).parents)]
    return any(fnmatch(candidate, pattern) for candidate in candidates for pattern in UNUSED_PYTHON)


def _shared_libraries(userland: Root, objects: Iterable[Path]) -> dict[str, Path]:
    """Return file by name for every library that `objects` need, as the root's own loader resolves them."""
    found: dict[str, Path] = {}
    loader = [str(userland.libraries / "ld-linux-x86-64.so.2"), "--library-path", str(userland.libraries), "--list"]
    for path in objects:
        for line in _run([*loader, str(path)], f"asking the loader what {path.name} needs").splitlines():
            name, arrow, rest = line.strip().partition(" => ")
            if not arrow or name.startswith("/"):  # the second is the loader itself, which is placed by name
                continue
            target = rest.split(" (")[0]
            if not target.startswith(str(userland.path)):
                raise EnvironmentProblem(f"{path.name} of the guest needs {name}, which none of its packages brings")
            found[name] = Path(target)
    return found


def _modules(kernel: Kernel) -> Iterator[newc.Entry]:
    for name in kernel.modules:
        yield newc.file(f"usr/lib/modules/{name}.ko", kernel.module_path(name).read_bytes())
    order = "".join(" ".join((name, *needed)) + "\n" for name, needed in kernel.modules.items())
    yield newc.file("usr/lib/modules/order", order.encode())
    yield newc.file("usr/lib/modules/version", f"{kernel.version}\n".encode())
    for driver, names in (("userspace", USERSPACE_DRIVER), ("linux", LINUX_DRIVERS)):
        lines = "".join(f"{name}\n" for name in kernel.closure((*VIRTIO, *names)))
        yield newc.file(f"usr/lib/modules/{driver}", lines.encode())


# --- ours ------------------------------------------------------------------------------------------------------


def _default_packages() -> list[Path]:
    return [Path(vmbus.__file__).parent, Path(__file__).parent]


def _sources(packages: Iterable[Path] | None, rootfs: Path | None) -> list[tuple[str, Path]]:
    """Return (path in the guest, file on the host) for everything of ours, sorted."""
    result: list[tuple[str, Path]] = []
    for package in _default_packages() if packages is None else packages:
        rooms, skipped = GUEST_ROOMS.get(package.name), HOST_ONLY.get(package.name, ())
        for path in package.rglob("*.py"):
            relative = path.relative_to(package)
            if rooms is not None and not any(relative.is_relative_to(room) for room in rooms):
                continue
            if relative.parts[0] not in skipped:
                result.append((f"{PACKAGES_FOLDER}/{package.name}/{relative}", path))
    overlay = Path(__file__).parent / "rootfs" if rootfs is None else rootfs
    if overlay.is_dir():
        for path in overlay.rglob("*"):
            if "__pycache__" not in path.parts:
                result.append((_canonical(str(path.relative_to(overlay))), path))
    return sorted(result)


def _canonical(name: str) -> str:
    """Spell a path without the links at the top of the tree: bin/x is usr/bin/x."""
    head, slash, rest = name.partition("/")
    return f"usr/{head}{slash}{rest}" if head in ("bin", "sbin", "lib", "lib64") else name


def _mode(path: Path) -> int:
    """Return the permissions a file gets: only whether its owner may run it counts, which is what git keeps too."""
    return 0o755 if path.is_dir() or path.lstat().st_mode & 0o100 else 0o644


def _own_entries(
    userland: Root, cache: Cache, packages: Iterable[Path] | None, rootfs: Path | None
) -> Iterator[newc.Entry]:
    jobs: list[tuple[str, str, str]] = []
    compiled: list[tuple[str, Path]] = []
    with cache.scratch() as scratch:
        for name, path in _sources(packages, rootfs):
            if path.is_symlink():
                yield newc.symlink(name, str(path.readlink()))
            elif path.is_dir():
                yield newc.directory(name)
            else:
                yield newc.file(name, path.read_bytes(), _mode(path))
                if path.suffix == ".py":
                    folder, _, module = name.rpartition("/")
                    pyc = f"{folder}/__pycache__/{module[:-3]}.cpython-313.pyc"
                    target = Path(scratch) / pyc
                    jobs.append((str(path), str(target), f"/{name}"))
                    compiled.append((pyc, target))
        _compile(userland, jobs, optimize=0)
        for name, target in compiled:
            yield newc.file(name, target.read_bytes())


def _native_core(userland: Root, file: Path | None, reporter: Reporter) -> Iterator[newc.Entry]:
    """The native core, unless the guest's Python cannot load it: a newer C library may be on the host."""
    if file is None:
        return
    try:
        check([*userland.program(f"usr/bin/{PYTHON}"), "-s", "-S", "-B"], file)
    except BuildError as error:
        reporter.note(f"the guest goes without the native core: {error}")
        return
    folder = f"{PACKAGES_FOLDER}/vmbus/native"
    yield newc.file(f"{folder}/{FILE_NAME}", file.read_bytes(), 0o755)


def _kernel_module(file: Path | None) -> Iterator[newc.Entry]:
    if file is not None:
        yield newc.file(f"usr/lib/modules/{KERNEL_MODULE}.ko", file.read_bytes())


def _compile(userland: Root, jobs: list[tuple[str, str, str]], optimize: int) -> None:
    """Compile (source, target, path in the guest) with the guest's own Python, run through its loader."""
    _run(
        [*userland.program(f"usr/bin/{PYTHON}"), "-s", "-S", "-B", "-c", _COMPILER],
        "compiling the guest's Python files",
        json.dumps([jobs, optimize]),
    )


def _run(argv: list[str], what: str, text: str = "") -> str:
    # The order of sets gets into compiled files, and the user's PYTHON* variables are meant for another Python.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
    try:
        result = subprocess.run(
            argv,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMPILE_TIMEOUT,
            env=environment,
            cwd="/",
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentProblem(f"{what} took more than {COMPILE_TIMEOUT:g} s") from error
    except OSError as error:
        raise EnvironmentProblem(f"{what} failed: {error}") from error
    if result.returncode != 0:
        raise EnvironmentProblem(f"{what} failed with status {result.returncode}: {result.stderr.strip()[-1000:]}")
    return result.stdout
