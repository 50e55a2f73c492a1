"""The virtual environment in the cache: the dependencies of `requirements.lock`, and nothing else.

The project itself is not installed; the scripts put its two import roots on the path, so that several checkouts
share one environment. It is keyed by Python and by the lock file's contents. Every file that pip installs is checked
against the digests in the lock file.

pip comes from Python's own `ensurepip`; Debian moves that into a package (python3-venv) that a minimal machine lacks,
and then pip is taken out of Debian's python3-pip-whl, fetched like everything else. Standard library only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import sys
from pathlib import Path

from vmbus.errors import EnvironmentProblem
from vmbus.provision.cache import Cache, digest, publish_bytes, remove
from vmbus.provision.programs import ProgramFailed, run_lines
from vmbus.provision.report import Reporter
from vmbus.provision.roots import RootRecipe, make_root
from vmbus.provision.sources import SUITE

LOCK_FILE = "requirements.lock"
MINIMUM_PYTHON = (3, 11)
STAMP = "complete"
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
PIP_QUIET = ("--progress-bar", "off", "--no-input", "--disable-pip-version-check")
PLATFORMS = ("manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux_2_28_x86_64", "linux_x86_64")
"""Of wheels that another machine with our C library can load, if it is no older than five years."""

VENV_TIMEOUT = 120.0
INSTALL_TIMEOUT = 1800.0

PIP_RECIPE = RootRecipe("pip", (SUITE,), ("python3-pip-whl",), closure=False)


def environment_path(cache: Cache, checkout: Path) -> Path:
    """Return where the environment for this Python and lock file belongs.

    Raises EnvironmentProblem if the lock file cannot be read or Python is too old.
    """
    if sys.version_info < MINIMUM_PYTHON:
        wanted = ".".join(str(part) for part in MINIMUM_PYTHON)
        raise EnvironmentProblem(f"Python {wanted} or later is needed; {sys.executable} is {sys.version.split()[0]}")
    lock = checkout / LOCK_FILE
    try:
        contents = lock.read_bytes()
    except OSError as error:
        raise EnvironmentProblem(f"cannot read {lock}: {error}") from error
    base = str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())
    return cache.path("env", digest(1, sys.version_info[:2], base, hashlib.sha256(contents).hexdigest()))


def environment_python(cache: Cache, checkout: Path) -> Path | None:
    """Return the environment's Python if the environment is complete, else None.

    Raises EnvironmentProblem for a cache that is somebody else's.
    """
    cache.require_own()
    directory = environment_path(cache, checkout)
    python = directory / "bin/python"
    return python if (directory / STAMP).exists() and python.exists() else None


def make_environment(cache: Cache, checkout: Path, reporter: Reporter) -> Path:
    """Return the environment's Python, made now if need be. The caller holds the cache's lock.

    Raises EnvironmentProblem, ProgramFailed, WaitTimeout.
    """
    python = environment_python(cache, checkout)
    if python is not None:
        return python
    directory = environment_path(cache, checkout)
    lock = checkout / LOCK_FILE
    pinned = len(re.findall(r"^[A-Za-z0-9][A-Za-z0-9._-]*==", lock.read_text(encoding="utf-8"), re.MULTILINE))
    with cache.publish_directory(directory) as partial:
        inside = _bare(partial, reporter)
        temporary = partial / "tmp"
        temporary.mkdir()
        pip = find_pip(cache, inside, reporter, temporary)
        reporter.begin(f"Python packages ({pinned} pinned)")
        seen = 0

        def on_line(line: str) -> None:
            nonlocal seen
            if line.startswith("Collecting "):
                seen = min(seen + 1, pinned)
                reporter.progress(seen, pinned, line.split()[1].split("==")[0])

        try:
            # pip's own files, too: those of one that was killed are removed with the directory.
            run_lines(
                [
                    *(str(inside), *pip, "install", "--require-hashes", "--only-binary", ":all:"),
                    *(*PIP_QUIET, "--requirement", str(lock)),
                ],
                "installing the Python packages",
                INSTALL_TIMEOUT,
                on_line,
                TMPDIR=str(temporary),
            )
            shutil.rmtree(temporary, ignore_errors=True)
        except ProgramFailed as error:
            if full := cache.is_full(error):
                raise EnvironmentProblem(full) from None
            raise EnvironmentProblem(f"{error}\ncheck the network and pip's configuration, then run it again") from None
        relocate(partial, directory)
        publish_bytes(partial / STAMP, b"")
        reporter.end()
    python = environment_python(cache, checkout)
    assert python is not None
    return python


def _bare(folder: Path, reporter: Reporter) -> Path:
    """Make an environment without packages there; return its Python."""
    reporter.begin("Virtual environment")
    run_lines(
        [getattr(sys, "_base_executable", sys.executable), "-I", "-m", "venv", "--without-pip", folder],
        "creating a virtual environment",
        VENV_TIMEOUT,
    )
    reporter.end()
    return folder / "bin/python"


def packages_folder(environment: Path) -> Path:
    """Where an environment for this Python has its packages."""
    return environment / "lib" / f"python{PYTHON}" / "site-packages"


def adopt(cache: Cache, checkout: Path, packages: Path, reporter: Reporter) -> None:
    """Make the environment, without a network, of packages that another machine has installed for the same lock file
    and Python; the folder is moved. The caller holds the cache's lock."""
    directory = environment_path(cache, checkout)
    with cache.publish_directory(directory) as partial:
        _bare(partial, reporter)
        place = packages_folder(partial)
        remove(place)
        packages.rename(place)
        publish_bytes(partial / STAMP, b"")


def packages_key(checkout: Path, python: str = PYTHON) -> str:
    """What an environment's packages depend on, beside the place of its Python (`python`: as 3.11)."""
    return digest(1, python, hashlib.sha256((checkout / LOCK_FILE).read_bytes()).hexdigest())


def packages_for(python: str, cache: Cache, checkout: Path, folder: Path, reporter: Reporter) -> None:
    """Install the packages of the lock file for another Python into an empty folder, by this environment's pip. The
    caller holds the cache's lock. Raises EnvironmentProblem, ProgramFailed, WaitTimeout."""
    if re.fullmatch(r"3\.[1-9][0-9]", python) is None or int(python[2:]) < MINIMUM_PYTHON[1]:
        raise EnvironmentProblem(f"{python!r} is no version of Python that this project runs on, as 3.13 is")
    with cache.scratch() as temporary:
        pip = find_pip(cache, Path(sys.executable), reporter, Path(temporary))
        reporter.begin(f"Python packages for Python {python}")
        tags = ["--implementation", "cp", "--python-version", python]
        tags += [word for abi in (f"cp{python.replace('.', '')}", "abi3", "none") for word in ("--abi", abi)]
        tags += [word for platform in PLATFORMS for word in ("--platform", platform)]
        lock = ("--require-hashes", "--only-binary", ":all:", "--no-deps", "--requirement", str(checkout / LOCK_FILE))
        run_lines(
            [sys.executable, *pip, "install", *PIP_QUIET, *tags, *lock, "--target", str(folder)],
            f"installing the packages for Python {python}",
            INSTALL_TIMEOUT,
            TMPDIR=temporary,
        )
        reporter.end()
    remove(folder / "bin")


def find_pip(cache: Cache, python: Path, reporter: Reporter, temporary: Path) -> list[str]:
    """Return the arguments for `python` that start pip. `temporary`: for files that nobody needs afterwards.

    Raises EnvironmentProblem, ProgramFailed, WaitTimeout.
    """
    if importlib.util.find_spec("ensurepip") is not None:
        try:
            run_lines([python, "-I", "-m", "ensurepip"], "ensurepip", VENV_TIMEOUT, TMPDIR=str(temporary))
            return ["-I", "-m", "pip"]
        except ProgramFailed:
            reporter.note("Python's ensurepip does not work here; taking pip from a Debian package")
    root = make_root(cache, PIP_RECIPE, reporter)
    wheels = sorted(root.path.glob("usr/share/python-wheels/pip-*.whl"))
    if not wheels:
        raise EnvironmentProblem("Debian's python3-pip-whl holds no pip; run: sudo apt-get install -y python3-venv")
    # A wheel is a zip file, and pip can be run from inside it.
    return ["-I", str(wheels[-1] / "pip")]


def relocate(directory: Path, final: Path) -> None:
    """Make the scripts of an environment that is about to be renamed name their future interpreter."""
    for path in (directory / "bin").iterdir():
        if path.is_symlink() or not path.is_file():
            continue
        data = path.read_bytes()
        changed = data.replace(str(directory).encode(), str(final).encode())
        if changed != data and b"\0" not in data[:1024]:
            path.write_bytes(changed)
