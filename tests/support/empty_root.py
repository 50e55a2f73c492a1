"""A machine with Python and nothing else: Debian's packages as they are when they have been unpacked, and no network.
No apt, no dpkg (the shell depends on it: it is covered up), no compiler. Programs run there as an ordinary user."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from support.namespace import NotPermitted
from support.pace import seconds
from vmbus.provision.cache import Cache
from vmbus.provision.report import SilentReporter
from vmbus.provision.roots import Root, RootRecipe, make_root

PACKAGES = ("python3", "dash", "coreutils", "libc-bin")
PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}
USER = 65534
HOME = "/home/user"

DEVICES = """
mount -t tmpfs tmpfs "$root/dev"
for node in null zero full random urandom; do : > "$root/dev/$node"; mount --bind "/dev/$node" "$root/dev/$node"; done
mkdir -m 1777 "$root/dev/shm"
ln -s /proc/self/fd "$root/dev/fd"
"""
"""Of the host's devices those that nothing can be spoilt by."""

_ENTER = f"""
set -e
PATH=$PATH:/usr/sbin:/sbin  # for chroot: an ordinary user's does not lead there
root=$1 user=$2; shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
while [ "$1" != -- ]; do mount --rbind "$1" "$root$2"; shift 2; done; shift
for file in "$root"/usr/bin/dpkg*; do mount --bind /dev/null "$file"; done
mount -o remount,ro,bind "$root/usr" 2>/dev/null || true
{DEVICES}
mount -t proc proc "$root/proc"
exec chroot $user "$root" "$@"
"""


def packages(suite: str) -> Root:
    """The packages, fetched the first time."""
    cache = Cache()
    with cache.lock():
        return make_root(cache, RootRecipe(f"empty-{suite}", (suite,), PACKAGES), SilentReporter())


class EmptyRoot:
    """Lives in an empty folder."""

    def __init__(self, folder: Path, packages: Root, mounts: Mapping[Path, str]) -> None:
        """`mounts`: what else is to be seen in there, and where."""
        self.folder = folder
        links = [name for name in ("bin", "sbin", "lib", "lib64") if (packages.path / name).is_symlink()]
        system = [name for name in ("usr", "bin", "sbin", "lib", "lib64") if name not in links]  # Debian 12 has both
        self._mounts = {packages.path / name: f"/{name}" for name in system} | dict(mounts)
        for name in ("dev", "proc", "tmp", "etc", "run", HOME, *(place for place in self._mounts.values())):
            (folder / name.lstrip("/")).mkdir(parents=True, exist_ok=True)
        for name in links:
            (folder / name).symlink_to(f"usr/{name}")
        for path in (folder / "tmp", folder / HOME.lstrip("/")):
            path.chmod(0o777)
        (folder / HOME.lstrip("/")).chmod(0o700)
        if os.geteuid() == 0:
            os.chown(folder / HOME.lstrip("/"), USER, USER)
        (folder / "etc/passwd").write_text(f"root:x:0:0::/:/bin/sh\nuser:x:{USER}:{USER}::{HOME}:/bin/sh\n")
        (folder / "etc/group").write_text(f"root:x:0:\nuser:x:{USER}:\n")

    def run(self, script: str, timeout: float) -> subprocess.CompletedProcess[str]:
        """Run a script of the shell's there, without network, in a process namespace that ends with it.

        Raises NotPermitted where this machine lets us make no namespaces.
        """
        root = os.geteuid() == 0
        argv = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
        argv += [] if root else ["--user", "--map-root-user"]
        mounts = [word for path, place in self._mounts.items() for word in (str(path), place)]
        user = f"--userspec={USER}:{USER}" if root else ""  # else it is the only one that there is
        if subprocess.run([*argv, "true"], capture_output=True).returncode != 0:
            raise NotPermitted("namespaces")
        patience = f"VMBUS_PATIENCE={os.environ.get('VMBUS_PATIENCE', '1')}"
        clean = ["/usr/bin/env", "-i", f"HOME={HOME}", "PATH=/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE=1", patience]
        enter = ["sh", "-c", _ENTER, "enter", str(self.folder), user, *mounts, "--"]
        return subprocess.run(
            [*argv, *enter, *clean, "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds(timeout),
        )
