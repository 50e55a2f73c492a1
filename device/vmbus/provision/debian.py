"""Debian packages without touching the host: apt with lists, cache and status of its own, unpacked by `dpkg -x`.

The packages' suite usually differs from the host's (QEMU and the guest's files are taken from trixie), the mirror does
not: it is the one that the host's own apt is configured with, or `VMBUS_DEBIAN_MIRROR` on a machine that is not
Debian. No mirror's name appears in this project. apt's own settings (proxies, credentials, certificates) stay in force.
Everything is verified by apt against the Debian archive keyring: the signature of the release file, and through it
the digest of each index, package and source archive.

Nothing here needs root rights. Standard library only: the first stage of the set-up imports this module.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from vmbus.errors import EnvironmentProblem, VmbusError, WaitTimeout, code_in
from vmbus.provision.cache import Cache, digest, publish_bytes
from vmbus.provision.report import Reporter, SilentReporter
from vmbus.util.launcher import tied

SUITE = "trixie"
"""The suite whose kernel, guest files and QEMU source are used on every host."""

BACKPORTS = "trixie-backports"
"""The suite whose QEMU is used: trixie's own is older than the first with vfio-user-pci."""

FALLBACK_HOST_SUITE = "bookworm"
"""Taken for libraries that are loaded into the host's Python when the host is not Debian: the oldest supported one,
so that its libraries ask for no newer C library than the host has."""

HOST_SUITES = ("bookworm", "trixie", "forky", "duke", "sid")
"""Debian releases that can be the host, oldest first (Python 3.11 is the oldest that the project runs on)."""

ARCHITECTURE = "amd64"

UPDATE_TIMEOUT = 600.0
DOWNLOAD_TIMEOUT = 3600.0
UNPACK_TIMEOUT = 300.0
QUERY_TIMEOUT = 60.0

KEYRINGS = (
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
)

_NOT_A_MIRROR = re.compile(r"-(security|debug|backports.*|updates|proposed-updates)$")


class AptError(VmbusError):
    """apt or dpkg failed; the message ends with what it said."""


@dataclass(frozen=True)
class Source:
    """One archive entry of an apt configuration, reduced to what matters here."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""
    check_valid_until: bool = True


@dataclass(frozen=True)
class InstalledPackage:
    """What was unpacked into a private root."""

    name: str
    version: str
    architecture: str


# --- the host's own configuration ------------------------------------------------------------------------------


def parse_one_line_style(text: str) -> list[Source]:
    """Parse the `deb [options] URI SUITE COMPONENT...` form of sources.list(5); other lines are skipped."""
    sources: list[Source] = []
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)((?:\s+[^#\s]\S*)*)\s*(?:#.*)?$", line)
        if match is None:
            continue
        options = dict(part.split("=", 1) for part in (match[1] or "").split() if "=" in part)
        sources.append(
            Source(
                uri=match[2],
                suites=(match[3],),
                components=tuple(match[4].split()),
                signed_by=options.get("signed-by", "").split(",")[0],
                check_valid_until=options.get("check-valid-until", "yes").lower() not in ("no", "false", "0"),
            )
        )
    return sources


def parse_deb822_style(text: str) -> list[Source]:
    """Parse the deb822 form of sources.list(5): stanzas of `Field: value`, with continuation lines and comments."""
    sources: list[Source] = []
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n[ \t]*\n", "\n".join(lines)):
        fields: dict[str, str] = {}
        last = ""
        for line in stanza.splitlines():
            if line[:1] in (" ", "\t"):
                if last:
                    fields[last] += "\n" + line.strip()
            elif ":" in line:
                name, value = line.split(":", 1)
                last = name.strip().lower()
                fields[last] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false", "0"):
            continue
        signed_by = fields.get("signed-by", "")
        for uri in fields.get("uris", "").split():
            sources.append(
                Source(
                    uri=uri,
                    suites=tuple(fields.get("suites", "").split()),
                    components=tuple(fields.get("components", "").split()),
                    # A key may also be embedded in the stanza; only a file's path is of use here.
                    signed_by=signed_by.split()[0] if signed_by.startswith("/") else "",
                    check_valid_until=fields.get("check-valid-until", "yes").lower() not in ("no", "false", "0"),
                )
            )
    return sources


def host_sources(etc_apt: Path = Path("/etc/apt")) -> list[Source]:
    """Return every binary archive entry of the host's apt configuration, in apt's own order of files."""
    sources: list[Source] = []
    files = [etc_apt / "sources.list"]
    parts = etc_apt / "sources.list.d"
    if parts.is_dir():
        files += sorted(path for path in parts.iterdir() if path.suffix in (".list", ".sources"))
    for path in files:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # absent, or not for us to read: another one may serve
        sources += parse_deb822_style(text) if path.suffix == ".sources" else parse_one_line_style(text)
    return sources


def debian_mirrors(sources: Iterable[Source]) -> list[Source]:
    """Return the entries that look like the Debian archive proper, the likeliest first.

    A third party's archive may use a Debian suite's name too; it sorts last here, and apt rejects it in the end,
    because nothing but the Debian archive keyring is accepted as a signer.
    """
    ranked: list[tuple[int, int, Source]] = []
    for position, source in enumerate(sources):
        if source.uri.startswith("cdrom:"):  # holds its own release only, and apt wants it mounted
            continue
        plain = [suite for suite in source.suites if not _NOT_A_MIRROR.search(suite) and "/" not in suite]
        known = any(suite in (*HOST_SUITES, "oldstable", "stable", "testing", "unstable") for suite in plain)
        if not known or "main" not in source.components:
            continue
        rank = 0
        if "debian" not in source.signed_by:
            rank += 1
        if not urlsplit(source.uri).path.rstrip("/").endswith("/debian") and not source.uri.startswith("mirror"):
            rank += 1
        ranked.append((rank, position, source))
    ranked.sort(key=lambda item: item[:2])
    unique: list[Source] = []
    for _, _, source in ranked:
        if source.uri not in [other.uri for other in unique]:
            unique.append(source)
    return unique


def mirror_candidates(environment: Mapping[str, str] = os.environ, etc_apt: Path = Path("/etc/apt")) -> list[Source]:
    """Return the archives to try: `VMBUS_DEBIAN_MIRROR` alone if it is set, else those of the host's apt.

    Raises EnvironmentProblem if there is none.
    """
    explicit = environment.get("VMBUS_DEBIAN_MIRROR", "").strip()
    if explicit:
        return [Source(uri=explicit, suites=(), components=("main",))]
    found = debian_mirrors(host_sources(etc_apt))
    if not found:
        raise EnvironmentProblem(
            f"no Debian archive in the apt configuration under {etc_apt}; "
            "set VMBUS_DEBIAN_MIRROR to the address of a Debian mirror (the folder that holds dists/ and pool/)"
        )
    return found


def archive_keyring() -> Path:
    """Return the file with the Debian archive's keys: that of Debian's own package, whatever the host's apt trusts for
    an archive. What a key is called says nothing about whose it is.

    Raises EnvironmentProblem if the host has none.
    """
    for name in KEYRINGS:
        if Path(name).is_file():
            return Path(name)
    raise EnvironmentProblem(
        "the Debian archive's keys are not installed, so nothing could be verified; run: "
        "sudo apt-get install debian-archive-keyring"
    )


def host_suite(os_release: Path = Path("/etc/os-release")) -> str:
    """Return the Debian suite whose libraries fit the host's C library."""
    fields = parse_os_release(os_release)
    codename = fields.get("VERSION_CODENAME", "")
    if fields.get("ID") == "debian" and codename in HOST_SUITES:
        return codename
    return FALLBACK_HOST_SUITE


def parse_os_release(path: Path) -> dict[str, str]:
    """Return the assignments of an os-release(5) file; empty if there is none."""
    fields: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return fields
    for line in text.splitlines():
        name, separator, value = line.partition("=")
        if separator and not name.startswith("#"):
            try:
                fields[name.strip()] = "".join(shlex.split(value))
            except ValueError:
                continue
    return fields


# --- running programs ------------------------------------------------------------------------------------------


def run_lines(
    argv: Sequence[str | Path],
    what: str,
    timeout: float,
    on_line: Callable[[str], None] | None = None,
    cwd: Path | None = None,
    **more: str,
) -> list[str]:
    """Run a program and return the lines it printed (standard output and error), telling `on_line` of each at once.
    `more` is added to its environment.

    Raises AptError if it fails, WaitTimeout if it is still running after `timeout` seconds (it is killed then).
    """
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **more}
    process = subprocess.Popen(
        tied([str(part) for part in argv]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=cwd,
        text=True,
        errors="replace",
        process_group=0,  # some of these programs (ensurepip, apt) start others, which have to end with them
    )
    expired = threading.Event()

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def expire() -> None:
        expired.set()
        kill()

    timer = threading.Timer(timeout, expire)
    timer.daemon = True
    timer.start()
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if on_line is not None:
                on_line(lines[-1])
        status = process.wait()
    except BaseException:
        kill()
        process.wait()
        raise
    finally:
        timer.cancel()
        if process.stdout is not None:
            process.stdout.close()
    if expired.is_set():
        raise WaitTimeout(what, timeout)
    if status != 0:
        tail = "\n  ".join([line for line in lines if line.strip()][-8:])
        raise AptError(f"{what} failed with status {status}:\n  {tail}", code=code_in(tail))
    return lines


def require_programs() -> None:
    """Raise EnvironmentProblem unless apt and dpkg are there and the machine is an x86-64 one."""
    if os.uname().machine != "x86_64":
        raise EnvironmentProblem(f"the set-up knows x86-64 machines only, this one is {os.uname().machine}")
    missing = [name for name in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"{', '.join(missing)} not found: the set-up fetches Debian packages with apt and unpacks them with dpkg. "
            "Use a Debian machine, or set VMBUS_QEMU and VMBUS_LIBVFIO_USER"
        )


# --- apt with a state of its own -------------------------------------------------------------------------------


@dataclass
class Apt:
    """apt for some suites, with its own lists, archive cache and an empty status. The caller holds the cache's lock."""

    cache: Cache
    suites: tuple[str, ...]
    sources: bool = False
    """Whether source packages are wanted too."""
    reporter: Reporter = field(default_factory=SilentReporter)
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    etc_apt: Path = Path("/etc/apt")

    _options: list[str] = field(default_factory=list, init=False, repr=False)

    @property
    def directory(self) -> Path:
        """apt's state for this set of suites."""
        return self.cache.path("apt", "-".join(self.suites) + ("-source" if self.sources else ""))

    @property
    def lists(self) -> Path:
        """The archives' indexes, by archive and suite: those that several objects want are fetched once."""
        return self.cache.path("apt", "lists")

    @property
    def archives(self) -> Path:
        """Downloaded packages, complete ones; partial downloads are in a folder below and are resumed by apt."""
        return self.directory / "cache" / "archives"

    def update(self) -> None:
        """Fetch and verify the indexes, from the first archive that serves these suites; once per object.

        Raises EnvironmentProblem if none does, naming what was tried.
        """
        if self._options:
            return
        require_programs()
        failures: list[str] = []
        for source in mirror_candidates(self.environment, self.etc_apt):
            options = self._configure(source)
            self.reporter.begin(f"Package lists of {', '.join(self.suites)}")
            try:
                run_lines(
                    ["apt-get", *options, "-o", "APT::Update::Error-Mode=any", "update"],
                    f"apt-get update for {', '.join(self.suites)} from {source.uri}",
                    UPDATE_TIMEOUT,
                )
            except (AptError, WaitTimeout) as error:
                if full := self.cache.is_full(error):
                    raise EnvironmentProblem(full) from error
                failures.append(str(error))
                self.reporter.end("failed")
                continue
            self.reporter.end()
            self._options = options
            return
        raise EnvironmentProblem(
            f"no package lists for {', '.join(self.suites)} from the configured Debian archives; check the network, "
            "or set VMBUS_DEBIAN_MIRROR to another mirror. apt said:\n" + "\n".join(failures)
        )

    def install_closure(self, packages: Sequence[str], target_release: str | None = None) -> list[Path]:
        """Download `packages` with everything they depend on; return the package files.

        Raises AptError, WaitTimeout, EnvironmentProblem.
        """
        self.update()
        release = ["-t", target_release] if target_release else []
        base = ["apt-get", *self._options, "-y", *release, "install", *packages]
        return self._download(base, _names(packages))

    def download(self, packages: Sequence[str]) -> list[Path]:
        """Download `packages` alone, without what they depend on; return the package files.

        Raises AptError, WaitTimeout, EnvironmentProblem.
        """
        self.update()
        base = ["apt-get", *self._options, "download", *packages]
        return self._download(base, _names(packages))

    def source_archive(self, package: str, release: str) -> Path:
        """Download the upstream archive of a source package, verified by apt; return its path.

        Raises AptError, WaitTimeout, EnvironmentProblem.
        """
        self.update()
        base = ["apt-get", *self._options, "source", "--download-only", "--tar-only", f"{package}/{release}"]
        files = self._download(base, f"source of {package}")
        if len(files) != 1:
            raise AptError(f"expected one upstream archive of {package}, apt named {len(files)}")
        return files[0]

    def depends(self, package: str) -> list[str]:
        """Return the names of the packages that the candidate version of `package` depends on directly."""
        self.update()
        lines = run_lines(
            ["apt-cache", *self._options, "depends", "--important", package], f"looking for {package}", QUERY_TIMEOUT
        )
        return [line.split(":", 1)[1].strip() for line in lines if re.match(r"\s+(Pre)?Depends:", line)]

    def _configure(self, source: Source) -> list[str]:
        state = self.directory
        for folder in (self.lists / "partial", state / "cache/archives/partial"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        keyring = archive_keyring()
        settings = [f"signed-by={keyring}", f"arch={ARCHITECTURE}"]
        if not source.check_valid_until:
            settings.append("check-valid-until=no")
        kinds = ("deb", "deb-src") if self.sources else ("deb",)
        lines = [f"{kind} [{' '.join(settings)}] {source.uri} {suite} main" for suite in self.suites for kind in kinds]
        publish_bytes(state / "sources.list", ("\n".join(lines) + "\n").encode())
        publish_bytes(state / "status", b"")
        options = {
            "Dir::Etc::sourcelist": state / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State": state,
            "Dir::State::Lists": self.lists,
            "APT::Get::List-Cleanup": "false",  # the others are wanted by others
            "Dir::State::status": state / "status",
            "Dir::State::extended_states": state / "extended_states",
            "Dir::Cache": state / "cache",
            # Images for containers often switch apt's own caches and translations off; these settings belong to us.
            "Dir::Cache::pkgcache": "pkgcache.bin",
            "Dir::Cache::srcpkgcache": "srcpkgcache.bin",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Acquire::http::Timeout": "60",
            "Acquire::https::Timeout": "60",
            "Acquire::GzipIndexes": "false",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
            "APT::Architecture": ARCHITECTURE,
            "APT::Install-Recommends": "false",
            "APT::Install-Suggests": "false",
            "APT::Get::AllowUnauthenticated": "false",
            "APT::Get::Download-Only": "true",
            # As root apt would drop to its own user, who cannot write into the cache directory.
            "APT::Sandbox::User": "root",
            "Debug::NoLocking": "true",
        }
        # -q -q would imply -y; one -q only makes the output fit for a log.
        return ["-q", *(part for name, value in options.items() for part in ("-o", f"{name}={value}"))]

    def _download(self, base: Sequence[str], what: str) -> list[Path]:
        # apt lists only what it does not find in its archive cache or the current folder; an interrupted set-up may
        # have left some of it there, and all of it is wanted.
        nothing = self.directory / "cache" / "nothing"
        (nothing / "partial").mkdir(mode=0o700, parents=True, exist_ok=True)
        listing = run_lines(
            [*base, "-o", f"Dir::Cache::archives={nothing}", "--print-uris"],
            f"looking for {what}",
            QUERY_TIMEOUT,
            cwd=nothing,
        )
        entries = parse_print_uris(listing)
        if not entries:
            raise AptError(f"apt named no file for {what}:\n  " + "\n  ".join(listing[-5:]))
        total = sum(size for _, size in entries)
        self.reporter.begin(f"Download of {what} ({len(entries)} files, {total / 1e6:.0f} MB)")
        done = 0

        def on_line(line: str) -> None:
            nonlocal done
            if line.startswith("Get:"):
                done += 1
                self.reporter.progress(min(done, len(entries)), len(entries))

        self.cache.require_room(total, f"the download of {what}")
        try:
            run_lines(base, f"the download of {what}", DOWNLOAD_TIMEOUT, on_line, cwd=self.archives)
        except AptError as error:
            if full := self.cache.is_full(error):
                raise EnvironmentProblem(full) from error
            raise
        self.reporter.end()
        files = [self.archives / name for name, _ in entries]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise AptError(f"apt reported success, but these files are missing: {', '.join(missing)}")
        return files


def _names(packages: Sequence[str]) -> str:
    """The packages' names, for a message; of many, the first ones."""
    return ", ".join(packages) if len(packages) <= 6 else f"{', '.join(packages[:3])} and {len(packages) - 3} more"


def parse_print_uris(lines: Iterable[str]) -> list[tuple[str, int]]:
    """Return (file name, bytes) for each file that `apt-get --print-uris` lists."""
    entries: list[tuple[str, int]] = []
    for line in lines:
        match = re.match(r"'[^']+' (\S+) (\d+)(?: |$)", line)
        if match is not None:
            entries.append((match[1], int(match[2])))
    return entries


# --- private roots ---------------------------------------------------------------------------------------------


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
    """Return the root if it has been made."""
    path = cache.path("root", recipe.key)
    try:
        record = json.loads((path / RECORD).read_bytes())
        return Root(path, {entry["name"]: entry["version"] for entry in record["packages"]})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_root(cache: Cache, recipe: RootRecipe, reporter: Reporter, apt: Apt | None = None) -> Root:
    """Return the root, made now if it does not exist. The caller holds the cache's lock.

    Raises EnvironmentProblem, AptError, WaitTimeout.
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
    """Record which packages a folder was made from."""
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
