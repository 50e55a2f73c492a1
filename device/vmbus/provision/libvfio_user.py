"""Find libvfio-user, or build it from the copy that Debian's QEMU source package carries.

The order is `VMBUS_LIBVFIO_USER` (a path; nothing else is tried then), the system's library, and our build. The build
is one run of the host's C compiler over the library's files, with the options of its own release build: this needs
neither pkg-config nor meson nor the library's test framework. The json-c headers come from the host or, where they are
not installed, from the host suite's Debian package.

Which generation of the library was found, and whether the binding can serve it, is told by `vmbus.transport` at once:
of what it cannot serve, the next one is tried.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vmbus.errors import EnvironmentProblem
from vmbus.provision.apt import Apt
from vmbus.provision.archive import open_archive, place_below
from vmbus.provision.cache import Cache, digest, publish_bytes
from vmbus.provision.programs import ask, complaint
from vmbus.provision.report import Reporter, SilentReporter
from vmbus.provision.roots import RootRecipe, make_root
from vmbus.provision.sources import SUITE, host_suite
from vmbus.transport import library
from vmbus.transport.library import ENVIRONMENT_VARIABLE as VARIABLE
from vmbus.transport.library import SONAME

SOURCE_FOLDER = "subprojects/libvfio-user/"
BUILD_TIMEOUT = 300.0
LOAD_TIMEOUT = 60.0
PACKAGES_FOR_A_COMPILER = "gcc libc6-dev"

COMPILER_OPTIONS = ("-shared", "-fPIC", "-O3", "-std=gnu99", "-D_GNU_SOURCE", "-fvisibility=hidden", "-w")
"""What the library's own build uses for a release. Assertions stay in: they turn a wild write into a clean end."""

LINKER_OPTIONS = (
    "-Wl,-soname," + SONAME,
    "-Wl,--no-undefined",
    "-Wl,-z,relro,-z,now",
    "-Wl,-rpath,$ORIGIN",
    "-pthread",
)
"""json-c lies beside the library, so that the two can be taken elsewhere."""

OPTIONAL_SOURCES = ("tran_pipe.c",)
"""A transport for the library's own tests, left out of its release build."""

_PACKAGES = str(Path(__file__).resolve().parents[2])
_TRIAL = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from vmbus.errors import VmbusError
from vmbus.transport.library import load
try:
    load(pathlib.Path(sys.argv[2]))
except VmbusError as error:
    sys.exit(str(error))
"""

RECORD = "build.json"

_JSON_C_SONAME = "libjson-c.so.5"
_JSON_C_LICENCE = "usr/share/doc/libjson-c5/copyright"


@dataclass(frozen=True)
class VfioUserLibrary:
    """A libvfio-user and where it comes from, in words."""

    path: Path
    source: str


def find_library(
    cache: Cache | None = None,
    reporter: Reporter | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Path:
    """Return the path of a libvfio-user, built if need be; see `find` for what is raised."""
    return find(cache, reporter, environment).path


def find(
    cache: Cache | None = None,
    reporter: Reporter | None = None,
    environment: Mapping[str, str] = os.environ,
) -> VfioUserLibrary:
    """Return a libvfio-user that can be loaded, built if need be. The caller holds the cache's lock.

    Raises EnvironmentProblem (an explicit setting that cannot be used, no compiler, a failed build), ProgramFailed,
    WaitTimeout.
    """
    path = library.named(environment)
    if path is not None:
        problem = loading_problem(path)
        if problem:
            raise EnvironmentProblem(f"{VARIABLE} is {path}: {problem}; unset it to have one built")
        return VfioUserLibrary(path, VARIABLE)
    reporter = reporter or SilentReporter()
    system = system_library(reporter)
    if system is not None:
        return VfioUserLibrary(system, "system")
    return build(cache or Cache(), reporter)


def check_prerequisites(cache: Cache, environment: Mapping[str, str] = os.environ) -> None:
    """Raise EnvironmentProblem now if `find` would have to build the library and could not, for want of a compiler."""
    if not environment.get(VARIABLE, "").strip() and system_library() is None and not _record(cache).exists():
        find_compiler()


def system_library(reporter: Reporter | None = None) -> Path | None:
    """Return the path of the library that the dynamic linker finds, if it is one that our binding can serve, or None.
    The reporter is told of one that is passed over, and why."""
    found = library.system_path()
    problem = None if found is None else loading_problem(found)
    if problem is not None and reporter is not None:
        reporter.note(f"the system's {found} is left alone: {problem}")
    return None if problem else found


def loading_problem(path: Path) -> str | None:
    """Return why the library cannot be loaded into a Python like this one, or is of no generation that our binding
    serves; None if all is well."""
    # In a process of its own: loading runs code of the library, and what is loaded here once stays.
    done = ask([sys.executable, "-I", "-c", _TRIAL, _PACKAGES, str(path)], sys.executable, LOAD_TIMEOUT)
    return None if done.returncode == 0 else complaint(done)


def build_key() -> str:
    """Key of the build: recipe and host suite (whose json-c it is linked with)."""
    return digest(recipe_key(), host_suite())


def recipe_key() -> str:
    """Key of the recipe, on every host."""
    return digest(3, SUITE, COMPILER_OPTIONS, LINKER_OPTIONS)


def build_folder(cache: Cache) -> Path:
    """Where our build is, once it is there."""
    return cache.path("libvfio-user", build_key())


def is_built(cache: Cache) -> bool:
    """Whether our own build is there, or the system has one."""
    return _record(cache).exists() or system_library() is not None


def _record(cache: Cache) -> Path:
    return build_folder(cache) / RECORD


def build(cache: Cache, reporter: Reporter) -> VfioUserLibrary:
    """Return our build, made now if it does not exist. The caller holds the cache's lock.

    Raises EnvironmentProblem, ProgramFailed, WaitTimeout.
    """
    record = _record(cache)
    directory = record.parent
    if not record.exists():
        compiler = find_compiler()
        source = fetch_source(cache, reporter)
        json_c = JsonC.find(cache, reporter)
        with cache.publish_directory(directory) as partial:
            reporter.begin("Building libvfio-user")
            compile_library(compiler, source, json_c, partial / SONAME)
            shutil.copyfile(json_c.library, partial / _JSON_C_SONAME)
            problem = loading_problem(partial / SONAME)
            if problem:
                raise EnvironmentProblem(f"the libvfio-user just built cannot be loaded: {problem}")
            # Their licences ask that their texts accompany binaries.
            publish_bytes(partial / "LICENSE.libvfio-user", (source / "LICENSE").read_bytes())
            if json_c.licence.is_file():
                publish_bytes(partial / "LICENSE.json-c", json_c.licence.read_bytes())
            facts = {
                "source": json.loads((source / "source.json").read_text()),
                "compiler": compiler,
                "json-c": json_c.origin,
            }
            publish_bytes(partial / record.name, (json.dumps(facts, indent=1) + "\n").encode())
            reporter.end()
    facts = json.loads(record.read_text())
    return VfioUserLibrary(directory / SONAME, f"built from Debian's {facts['source']['archive']}")


def find_compiler() -> str:
    """Return a C compiler's path: `CC`, cc, gcc or clang.

    Raises EnvironmentProblem with the command that installs one, and the way without.
    """
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found is not None and Path("/usr/include/stdio.h").exists():
            return found
    raise EnvironmentProblem(
        "no C compiler with the C library's headers, which libvfio-user needs; run: "
        f"sudo apt-get install -y {PACKAGES_FOR_A_COMPILER} (or import a set-up that a machine with one has exported: "
        "scripts/setup --import FILE)"
    )


def fetch_source(cache: Cache, reporter: Reporter) -> Path:
    """Return a folder with libvfio-user's source from Debian's QEMU source package, fetched if need be."""
    final = cache.path("source", f"libvfio-user-{SUITE}")
    if (final / "source.json").exists():
        return final
    apt = Apt(cache, (SUITE,), sources=True, reporter=reporter)
    archive = apt.source_archive("qemu", SUITE)
    with cache.publish_directory(final) as partial:
        reporter.begin(f"Unpacking {SOURCE_FOLDER.rstrip('/')} of {archive.name}")
        count = 0
        with open_archive(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                _, _, inside = member.name.partition("/")
                if not inside.startswith(SOURCE_FOLDER) or not member.isfile():
                    continue
                target = place_below(partial, inside.removeprefix(SOURCE_FOLDER), archive.name)
                data = tar.extractfile(member)
                assert data is not None
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data.read())
                count += 1
        if not (partial / "lib/libvfio-user.c").exists():
            raise EnvironmentProblem(f"{archive.name} holds no libvfio-user; set VMBUS_LIBVFIO_USER to one of your own")
        publish_bytes(partial / "source.json", (json.dumps({"archive": archive.name, "suite": SUITE}) + "\n").encode())
        reporter.end(f"{count} files")
    archive.unlink(missing_ok=True)
    return final


@dataclass(frozen=True)
class JsonC:
    """json-c to build and link with."""

    include: Path
    library: Path
    """The shared library itself, so that no development link is needed."""
    licence: Path
    """Its text, where the package has been left whole."""
    origin: str

    @classmethod
    def find(cls, cache: Cache, reporter: Reporter) -> JsonC:
        """Return the host's json-c where it is complete, and the host suite's packages for what is missing."""
        headers = Path("/usr/include/json-c")
        installed = _host_library(_JSON_C_SONAME)
        if (headers / "json.h").exists() and installed is not None:
            return cls(headers, installed, Path("/", _JSON_C_LICENCE), "host")
        suite = host_suite()
        recipe = RootRecipe(f"json-c-{suite}", (suite,), ("libjson-c-dev", "libjson-c5"), closure=False)
        root = make_root(cache, recipe, reporter)
        version = root.packages["libjson-c-dev"]
        headers = root.path / "usr/include/json-c"
        if installed is not None:
            return cls(headers, installed, Path("/", _JSON_C_LICENCE), f"host, headers of Debian {version}")
        # The package's files are below /lib or /usr/lib, depending on the suite; the root's links make it one place.
        return cls(headers, root.libraries / _JSON_C_SONAME, root.path / _JSON_C_LICENCE, f"Debian {version}")


def _host_library(soname: str) -> Path | None:
    for folder in ("/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"):
        path = Path(folder) / soname
        if path.exists():
            return path
    return None


def compile_library(compiler: str, source: Path, json_c: JsonC, output: Path) -> None:
    """Compile and link the library.

    Raises EnvironmentProblem with what the compiler said.
    """
    files = sorted(path for path in (source / "lib").glob("*.c") if path.name not in OPTIONAL_SOURCES)
    argv = [
        compiler,
        *COMPILER_OPTIONS,
        f"-I{source / 'include'}",
        f"-I{source / 'lib'}",
        f"-I{json_c.include}",
        *(str(path) for path in files),
        str(json_c.library),
        *LINKER_OPTIONS,
        "-o",
        str(output),
    ]
    result = ask(argv, "the C compiler that builds libvfio-user", BUILD_TIMEOUT)
    if result.returncode != 0:
        raise EnvironmentProblem(
            f"building libvfio-user failed; if the message below is about a missing header, run: "
            f"sudo apt-get install -y {PACKAGES_FOR_A_COMPILER}\n{result.stderr.strip()[-2000:]}"
        )
