"""Private roots: folders of Debian packages, unpacked by `dpkg -x` and run through their own loader.

Nothing here needs root rights. Standard library only: the first stage of the set-up imports this.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmbus.provision.apt import QUERY_TIMEOUT, Apt
from vmbus.provision.cache import Cache, digest, publish_bytes
from vmbus.provision.programs import run_lines
from vmbus.provision.report import Reporter

UNPACK_TIMEOUT = 300.0


@dataclass(frozen=True)
class InstalledPackage:
    """What was unpacked into a private root."""

    name: str
    version: str
    architecture: str


def package_fields(deb: Path) -> InstalledPackage:
    """Return name, version and architecture of a package file, from the package itself."""
    lines = run_lines(
        ["dpkg-deb", "--showformat=${Package}\\n${Version}\\n${Architecture}\\n", "--show", deb],
        f"reading {deb.name}",
        QUERY_TIMEOUT,
    )
    return InstalledPackage(*lines[:3])


def unpack(debs: Sequence[Path], target: Path, reporter: Reporter | None = None) -> list[InstalledPackage]:
    """Unpack package files into `target` (no maintainer script runs); return what they were."""
    installed: list[InstalledPackage] = []
    for position, deb in enumerate(debs):
        if reporter is not None:
            reporter.progress(position, len(debs), deb.name.split("_")[0])
        run_lines(["dpkg-deb", "--extract", deb, target], f"unpacking {deb.name}", UNPACK_TIMEOUT)
        installed.append(package_fields(deb))
    return installed


@dataclass(frozen=True)
class Root:
    """A folder with unpacked packages, run through its own loader."""

    path: Path
    packages: Mapping[str, str]
    """Version by package name."""

    @property
    def libraries(self) -> Path:
        return self.path / "usr/lib/x86_64-linux-gnu"

    def program(self, name: str) -> list[str]:
        """Return the start of a command line for `name` (a path below the root) with the root's own C library."""
        return [
            str(self.libraries / "ld-linux-x86-64.so.2"),
            "--library-path",
            str(self.libraries),
            str(self.path / name),
        ]


@dataclass(frozen=True)
class RootRecipe:
    """Which packages make up a private root. Versions are resolved at set-up time: mirrors drop old ones."""

    name: str
    suites: tuple[str, ...]
    packages: tuple[str, ...]
    target_release: str | None = None
    closure: bool = True
    """Whether to take everything the packages depend on, or the packages alone."""

    @property
    def key(self) -> str:
        return f"{self.name}-{digest(1, self.suites, self.packages, self.target_release, self.closure, length=8)}"


RECORD = "packages.json"


def find_root(cache: Cache, recipe: RootRecipe) -> Root | None:
    path = cache.path("root", recipe.key)
    try:
        record = json.loads((path / RECORD).read_bytes())
        return Root(path, {entry["name"]: entry["version"] for entry in record["packages"]})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_root(cache: Cache, recipe: RootRecipe, reporter: Reporter, apt: Apt | None = None) -> Root:
    """Return the root, made now if it does not exist. The caller holds the cache's lock.

    Raises EnvironmentProblem, ProgramFailed, WaitTimeout.
    """
    found = find_root(cache, recipe)
    if found is not None:
        return found
    apt = apt or Apt(cache, recipe.suites, reporter=reporter)
    if recipe.closure:
        debs = apt.install_closure(recipe.packages, recipe.target_release)
    else:
        debs = apt.download(recipe.packages)
    with cache.publish_directory(cache.path("root", recipe.key)) as partial:
        reporter.begin(f"Unpacking {recipe.name}")
        merge_usr(partial)
        installed = unpack(debs, partial, reporter)
        write_record(partial, installed, recipe.suites)
        reporter.end(f"{len(installed)} packages")
    discard(debs)
    root = find_root(cache, recipe)
    assert root is not None
    return root


def merge_usr(root: Path) -> None:
    """Lay out a root like Debian's: /bin, /lib and the like are links into /usr."""
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(Path("usr") / name)


def write_record(directory: Path, installed: Iterable[InstalledPackage], suites: Sequence[str]) -> None:
    record = {
        "suites": list(suites),
        "packages": [
            {"name": package.name, "version": package.version, "architecture": package.architecture}
            for package in sorted(installed, key=lambda package: package.name)
        ],
    }
    publish_bytes(directory / RECORD, (json.dumps(record, indent=1) + "\n").encode())


def discard(debs: Iterable[Path]) -> None:
    """Remove package files that have been unpacked."""
    for deb in debs:
        deb.unlink(missing_ok=True)
