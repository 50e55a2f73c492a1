"""A Debian system as it is after `dpkg --unpack`, written as one tar: files, and dpkg's own records of them.

No file is created, so every one has the owner and the mode that its package gives it, without root rights. What is left
to do is what packages do themselves: `preinst install` of each, then `dpkg --configure -a`, in the running system.

Differences from what dpkg would have done: configuration files are in their places at once (dpkg keeps the new ones
aside until a package is configured, and takes a missing one for settled), and triggers are not yet pending (each
package that has some is configured anyway).

Standard library only.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from vmbus.provision.archive import command_output
from vmbus.provision.roots import InstalledPackage
from vmbus.provision.sources import ARCHITECTURE, parse_stanza

INFO = "var/lib/dpkg/info"
STATUS = "var/lib/dpkg/status"
TRIGGERS = "var/lib/dpkg/triggers"

_MERGED = ("bin", "sbin", "lib", "lib64")


@dataclass
class Control:
    """A package's control archive."""

    fields: str
    """The stanza, as in the package."""
    files: Mapping[str, bytes]
    """Everything else: maintainer scripts, conffiles, triggers, md5sums, ..."""
    values: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.values = parse_stanza(self.fields)

    @property
    def package(self) -> InstalledPackage:
        return InstalledPackage(self.values["Package"], self.values["Version"], self.values["Architecture"])

    @property
    def label(self) -> str:
        """How dpkg names the package where several architectures of it may be installed."""
        name = self.values["Package"]
        return f"{name}:{ARCHITECTURE}" if self.values.get("Multi-Arch") == "same" else name


def read_control(deb: Path) -> Control:
    """Read a package's control archive. Raises EnvironmentProblem."""
    files: dict[str, bytes] = {}
    with (
        command_output(["dpkg-deb", "--ctrl-tarfile", str(deb)], f"reading {deb.name}") as stream,
        tarfile.open(fileobj=stream, mode="r|") as tar,
    ):
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                files[member.name.removeprefix("./")] = content.read()
    return Control(files.pop("control").decode(), files)


def merged(name: str) -> str:
    """Spell a path of a package as it is on a system with a merged /usr: without a leading `./`, lib/x is usr/lib/x."""
    name = name.removeprefix("./").strip("/")
    head, slash, _ = name.partition("/")
    return f"usr/{name}" if slash and head in _MERGED else name


class TreeWriter:
    """Writes the tar, package by package; directories that several packages have are written once."""

    def __init__(self, output: IO[bytes]) -> None:
        self._tar = tarfile.open(fileobj=output, mode="w|", format=tarfile.GNU_FORMAT)  # noqa: SIM115
        self._seen: set[str] = set()
        for name in ("usr", *(f"usr/{name}" for name in _MERGED)):
            self.directory(name)
        for name in _MERGED:
            self.symlink(name, f"usr/{name}")

    def directory(self, name: str, mode: int = 0o755) -> None:
        """A directory of root's, and those above it, unless it is there."""
        parent = name.rpartition("/")[0]
        if parent:
            self.directory(parent)
        if name not in self._seen:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            self._add(entry)

    def symlink(self, name: str, target: str) -> None:
        """A symbolic link."""
        self.directory(name.rpartition("/")[0] or "usr")
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, target, 0o777
        self._add(entry)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self.directory(name.rpartition("/")[0] or "usr")
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(data), mode
        self._add(entry, io.BytesIO(data))

    def package(
        self, stream: IO[bytes], only: str = "", digested: Collection[str] = ()
    ) -> tuple[list[str], dict[str, str]]:
        """All files of a package, from its tar; `only`: those below there.

        Returns their paths as dpkg lists them, and the MD5 digests of the `digested` ones among them.
        """
        listed: list[str] = []
        digests: dict[str, str] = {}
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                shown = member.name.removeprefix(".").rstrip("/")
                listed.append(shown or "/.")
                member.name = merged(member.name)
                if not member.name or (only and not member.name.startswith(only)):
                    continue
                if member.name in self._seen:
                    if member.isdir() or member.issym():
                        continue  # of another package too, or one of the links at the top
                    raise ValueError(f"two packages have the file {member.name}")
                self.directory(member.name.rpartition("/")[0] or "usr")
                if member.islnk():
                    member.linkname = merged(member.linkname)
                content = tar.extractfile(member) if member.isreg() else None
                if content is not None and shown in digested:
                    data = content.read()
                    digests[shown] = hashlib.md5(data, usedforsecurity=False).hexdigest()
                    content = io.BytesIO(data)
                self._add(member, content)
        return listed, digests

    def close(self) -> None:
        """Write the tar's end."""
        self._tar.close()

    def _add(self, entry: tarfile.TarInfo, content: IO[bytes] | None = None) -> None:
        if entry.name in self._seen:
            raise ValueError(f"{entry.name} is there twice")
        self._seen.add(entry.name)
        entry.uname = entry.gname = ""  # numbers count; this host's names may have others
        entry.pax_headers = {}
        self._tar.addfile(entry, content)


def status_stanza(control: Control, digests: Mapping[str, str]) -> str:
    """Return what dpkg's status file says of the package after it was unpacked. `digests`: those of its configuration
    files; with them dpkg sees later which the user has changed."""
    lines = control.fields.strip("\n").splitlines()
    kept = [lines[0], "Status: install ok unpacked", *lines[1:]]
    conffiles = [name for name in conffile_names(control) if name in digests]
    if conffiles:
        kept += ["Conffiles:", *(f" {name} {digests[name]}" for name in conffiles)]
    return "\n".join(kept) + "\n"


def conffile_names(control: Control) -> list[str]:
    """Return the package's configuration files. A line with a flag in front names one to be removed: none of these."""
    lines = control.files.get("conffiles", b"").decode().splitlines()
    return [line.strip() for line in lines if line.startswith("/")]


def trigger_interests(controls: Iterable[Control]) -> dict[str, list[str]]:
    """Return dpkg's records of who wants to know what, by file name below `TRIGGERS`: lines of paths in `File`, and one
    file of packages for each trigger that is no path."""
    found: dict[str, list[str]] = {}
    for control in controls:
        for line in control.files.get("triggers", b"").decode().splitlines():
            words = line.partition("#")[0].split()
            if len(words) != 2 or not words[0].startswith("interest"):
                continue
            who = control.label + ("/noawait" if words[0] == "interest-noawait" else "")
            if words[1].startswith("/"):
                found.setdefault("File", []).append(f"{words[1]} {who}")
            else:
                found.setdefault(words[1], []).append(who)
    return found


def records(
    controls: Sequence[Control], lists: Mapping[str, Sequence[str]], digests: Mapping[str, Mapping[str, str]]
) -> Iterator[tuple[str, bytes, int]]:
    """Yield (path, content, mode) of dpkg's records; `lists`: the files of each package, by its label; `digests`: by
    its label those of its configuration files."""
    yield f"{INFO}/format", b"1\n", 0o644
    yield "var/lib/dpkg/arch", f"{ARCHITECTURE}\n".encode(), 0o644
    yield STATUS, "\n".join(status_stanza(control, digests[control.label]) for control in controls).encode(), 0o644
    for control in controls:
        yield f"{INFO}/{control.label}.list", "".join(f"{name}\n" for name in lists[control.label]).encode(), 0o644
        for name, data in control.files.items():
            script = name in ("preinst", "postinst", "prerm", "postrm", "config")
            yield f"{INFO}/{control.label}.{name}", data, 0o755 if script else 0o644
    for name, lines in trigger_interests(controls).items():
        yield f"{TRIGGERS}/{name}", "".join(f"{line}\n" for line in lines).encode(), 0o644


def write_packages(writer: TreeWriter, debs: Sequence[Path], first: str = "base-files") -> list[InstalledPackage]:
    """Write the files of all packages, those of `first` first (its directories count), and dpkg's records of them.

    Raises EnvironmentProblem.
    """
    ordered = sorted(debs, key=lambda deb: (not deb.name.startswith(f"{first}_"), deb.name))
    controls: list[Control] = []
    lists: dict[str, list[str]] = {}
    digests: dict[str, dict[str, str]] = {}
    for deb in ordered:
        control = read_control(deb)
        with command_output(["dpkg-deb", "--fsys-tarfile", str(deb)], f"reading {deb.name}") as stream:
            lists[control.label], digests[control.label] = writer.package(stream, digested=conffile_names(control))
        controls.append(control)
    for name, data, mode in records(controls, lists, digests):
        writer.file(name, data, mode)
    return [control.package for control in controls]
