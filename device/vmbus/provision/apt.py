"""apt with lists, cache and status of its own: packages of any Debian suite, without touching the host.

The suite usually differs from the host's (QEMU and the guest's files are taken from trixie), the mirror does not (see
`vmbus.provision.sources`). apt's own settings (proxies, credentials, certificates) stay in force. Everything is checked
by apt against the Debian archive keyring: the signature of the release file, and through it the digest of each index,
package and source archive.

Nothing here needs root rights. Standard library only: the first stage of the set-up imports this.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmbus.errors import EnvironmentProblem, WaitTimeout
from vmbus.provision.cache import Cache, publish_bytes
from vmbus.provision.programs import ProgramFailed, run_lines
from vmbus.provision.report import Reporter, SilentReporter
from vmbus.provision.sources import ARCHITECTURE, Source, archive_keyring, mirror_candidates

UPDATE_TIMEOUT = 600.0
DOWNLOAD_TIMEOUT = 3600.0
QUERY_TIMEOUT = 60.0


def require_programs() -> None:
    """Raise EnvironmentProblem unless apt and dpkg are there and the machine is an x86-64 one."""
    if os.uname().machine != "x86_64":
        raise EnvironmentProblem(f"the set-up knows x86-64 machines only, this one is {os.uname().machine}")
    missing = [name for name in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"{', '.join(missing)} not found: the set-up fetches Debian packages with apt and unpacks them with dpkg. "
            "Make an archive on a Debian machine, with scripts/setup --export FILE, and take it here with --import FILE"
        )


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
            except (ProgramFailed, WaitTimeout) as error:
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

        Raises ProgramFailed, WaitTimeout, EnvironmentProblem.
        """
        self.update()
        release = ["-t", target_release] if target_release else []
        base = ["apt-get", *self._options, "-y", *release, "install", *packages]
        return self._download(base, _names(packages))

    def download(self, packages: Sequence[str]) -> list[Path]:
        """Download `packages` alone, without what they depend on; return the package files.

        Raises ProgramFailed, WaitTimeout, EnvironmentProblem.
        """
        self.update()
        base = ["apt-get", *self._options, "download", *packages]
        return self._download(base, _names(packages))

    def source_archive(self, package: str, release: str) -> Path:
        """Download the upstream archive of a source package, verified by apt; return its path.

        Raises ProgramFailed, WaitTimeout, EnvironmentProblem.
        """
        self.update()
        base = ["apt-get", *self._options, "source", "--download-only", "--tar-only", f"{package}/{release}"]
        files = self._download(base, f"source of {package}")
        if len(files) != 1:
            raise ProgramFailed(f"expected one upstream archive of {package}, apt named {len(files)}")
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
            raise ProgramFailed(f"apt named no file for {what}:\n  " + "\n  ".join(listing[-5:]))
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
        except ProgramFailed as error:
            if full := self.cache.is_full(error):
                raise EnvironmentProblem(full) from error
            raise
        self.reporter.end()
        files = [self.archives / name for name, _ in entries]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise ProgramFailed(f"apt reported success, but these files are missing: {', '.join(missing)}")
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
