"""A container file carried out: by an engine where one works, else its instructions one by one in a fresh root.

The root is the Debian that set-up makes for guests, copied out of its image.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from support.empty_root import DEVICES
from support.pace import seconds
from vmbus.provision.cache import Cache, remove
from vmbus.provision.debian_system import TOOLS_RECIPE, DebianSystem
from vmbus.provision.report import SilentReporter
from vmbus.provision.roots import make_root
from vmbus.provision.sources import SUITE, mirror_candidates

STEP_TIMEOUT = 240.0
ENGINES = ("podman", "docker")
IMAGE, BASE = "localhost/vmbus-test", "localhost/vmbus-test-base"
PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
THERE = "certificates-of-the-host.crt"
"""What the root calls its copy of them. The host's own are never seen in there: its packages write to theirs."""


def instructions(file: Path) -> Iterator[tuple[str, str]]:
    """Yield (instruction, rest of its line), with continued lines joined."""
    for line in file.read_text().replace("\\\n", "").splitlines():
        if line.strip() and not line.startswith("#"):
            word, _, rest = line.partition(" ")
            yield word, rest.strip()


def require_root() -> None:
    """Raises PermissionError for an ordinary user, who may not write other users' files, nor enter another root."""
    if os.geteuid() != 0:
        raise PermissionError("a fresh root with files of several users is made and entered by root")


def debian_root(system: DebianSystem, folder: Path) -> Path:
    """A copy of the Debian's files in a new folder, for root, with this machine's way to the archives."""
    folder.mkdir(mode=0o755)
    cache = Cache()
    with cache.lock():
        tools = make_root(cache, TOOLS_RECIPE, SilentReporter())
    dump = [*tools.program("usr/sbin/debugfs"), "-R", f"rdump / {folder}", str(system.image)]
    subprocess.run(dump, check=True, capture_output=True, timeout=seconds(STEP_TIMEOUT))
    sources = folder / "etc/apt/sources.list.d/debian.sources"
    archive = mirror_candidates()[0].uri
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    sources.write_text(f"Types: deb\nURIs: {archive}\nSuites: {SUITE}\nComponents: main\nSigned-By: {keys}\n")
    resolver = folder / "etc/resolv.conf"
    resolver.unlink(missing_ok=True)
    shutil.copy("/etc/resolv.conf", resolver)
    pip = {name[4:].lower(): value for name, value in os.environ.items() if name.startswith("PIP_")}
    pip.pop("find_links", None)
    if CERTIFICATES.is_file():
        shutil.copy(CERTIFICATES, folder / THERE)
        pip["cert"] = f"/{THERE}"
        (folder / "etc/apt/apt.conf.d/90host").write_text(f'Acquire::https::CAInfo "/{THERE}";\n')
    lines = "".join(f"{name.replace('_', '-')} = {value}\n" for name, value in pip.items())
    (folder / "etc/pip.conf").write_text(f"[global]\n{lines}")
    return folder


# --- by its instructions ---------------------------------------------------------------------------------------

_ENTER = f"""
set -e
root=$1 user=$2; shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
{DEVICES}
mount -t proc proc "$root/proc"
exec chroot --userspec="$user" "$root" "$@"
"""


@dataclass
class Root:
    """A fresh root, in which a container file has been carried out."""

    folder: Path
    user: str = "root"
    directory: str = "/"
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    start: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def build(self, file: Path) -> None:
        """Carry out a container file of one stage. Raises AssertionError with what a command said."""
        for word, rest in instructions(file):
            match word:
                case "ARG" | "FROM":
                    continue  # the base is here
                case "RUN":
                    done = self.enter(["sh", "-c", rest], network=True)
                    assert done.returncode == 0, f"RUN {rest}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
                case "COPY":
                    source, target = shlex.split(rest)
                    shutil.copytree(file.parent / source, self.folder / target.lstrip("/"))
                case "ENV":
                    name, _, value = rest.partition("=")
                    self.environment[name] = Template(value).substitute(self.environment)
                case "USER":
                    self.user = rest
                case "WORKDIR":
                    self.directory = rest
                case "ENTRYPOINT":
                    self.start = json.loads(rest)
                case "CMD":
                    self.command = json.loads(rest)
                case _:
                    raise AssertionError(f"{word} is not known here")

    def enter(self, argv: Sequence[str], network: bool) -> subprocess.CompletedProcess[str]:
        """Run a program in there, in a process namespace that ends with it."""
        home = "/root" if self.user == "root" else f"/home/{self.user}"
        proxies = {name: value for name, value in os.environ.items() if name in PROXIES}
        environment = {"HOME": home, **(proxies if network else {}), **self.environment}
        spaces = ["--mount", "--pid", "--fork", "--kill-child", *([] if network else ["--net"])]
        enter = ["sh", "-c", _ENTER, "enter", str(self.folder), f"{self.user}:"]
        clean = ["/usr/bin/env", "-i", *(f"{name}={value}" for name, value in environment.items())]
        inside = ["sh", "-c", 'cd "$0" && exec "$@"', self.directory, *argv]
        return subprocess.run(
            ["unshare", *spaces, *enter, *clean, *inside],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds(STEP_TIMEOUT),
        )

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """What a container of the image does, without network."""
        return self.enter([*self.start, *(words or self.command)], network=False)

    def close(self) -> None:
        """Remove the root."""
        remove(self.folder)


# --- by an engine ----------------------------------------------------------------------------------------------


def engine() -> str:
    """A container engine that works here; empty: there is none."""
    for name in filter(shutil.which, ENGINES):
        done = subprocess.run([name, "info"], capture_output=True, timeout=seconds(60))
        if done.returncode == 0:
            return name
    return ""


@dataclass
class Image:
    """An image that an engine has built."""

    engine: str

    def build(self, file: Path, base: Path) -> None:
        """`base`: the root that it is built on. Raises AssertionError with what the engine said."""
        with subprocess.Popen(["tar", "-C", base, "-c", "."], stdout=subprocess.PIPE) as tar:
            self._do("import", "-", f"{BASE}:latest", stdin=tar.stdout)
        self._do(
            *("build", "--network", "host", "--file", str(file), "--build-arg", f"BASE={BASE}:latest"),
            *("--tag", f"{IMAGE}:latest", str(file.parent)),
        )

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """What a container of the image does, without network."""
        return self._do("run", "--rm", "--network", "none", f"{IMAGE}:latest", *words, fails=True)

    def close(self) -> None:
        """Remove the images."""
        for name in (IMAGE, BASE):
            self._do("rmi", "--force", f"{name}:latest", fails=True)

    def _do(self, *words: str, fails: bool = False, stdin: object = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self.engine, *words],
            stdin=stdin or subprocess.DEVNULL,  # type: ignore[arg-type]
            capture_output=True,
            text=True,
            timeout=seconds(2 * STEP_TIMEOUT),
        )
        assert fails or done.returncode == 0, f"{words}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done
