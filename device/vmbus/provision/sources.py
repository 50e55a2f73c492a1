"""Debian's suites, and where the host's own apt gets them from.

The mirror is the one that the host's own apt is configured with, or `VMBUS_DEBIAN_MIRROR` on a machine that is not
Debian. No mirror's name appears in this project. Standard library only: the first stage of the set-up imports this.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from vmbus.errors import EnvironmentProblem

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

KEYRINGS = (
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
)

_NOT_A_MIRROR = re.compile(r"-(security|debug|backports.*|updates|proposed-updates)$")


@dataclass(frozen=True)
class Source:
    """One archive entry of an apt configuration, reduced to what matters here."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""
    check_valid_until: bool = True


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


def parse_stanza(text: str) -> dict[str, str]:
    """Return the fields of a control stanza; continuation lines are joined by newlines."""
    values: dict[str, str] = {}
    last = ""
    for line in text.splitlines():
        if line[:1] in (" ", "\t"):
            if last:
                values[last] += "\n" + line.strip()
        elif ":" in line:
            last, _, value = line.partition(":")
            values[last] = value.strip()
    return values


def parse_deb822_style(text: str) -> list[Source]:
    """Parse the deb822 form of sources.list(5): stanzas of `Field: value`, with continuation lines and comments."""
    sources: list[Source] = []
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n[ \t]*\n", "\n".join(lines)):
        fields = {name.strip().lower(): value for name, value in parse_stanza(stanza).items()}
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
