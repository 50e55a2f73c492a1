"""libvirt for a test: a libvirtd of its own, which sees nothing of this machine's and leaves nothing on it.

It runs in a mount namespace: /run, /var and /etc are its own there. As `qemu:///session` it is in a user namespace,
too, in which it is an ordinary user. Root alone can have that.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import IO

from support import pace
from support.by_hand import PYTHONPATH
from vmbus.provision.libvirt import Libvirt

MOUNTS = """
set -e
mount --make-rprivate /
cp -a /etc {own}/etc
mount --bind {own}/etc /etc
for place in /run /var/lib /var/cache /var/log; do mount -t tmpfs none $place; done
mkdir -p /etc/libvirt/hooks /run/libvirt
mkdir -p -m 0700 /run/user/1000
mount -t overlay none -o lowerdir={own}/lib:/usr/lib /usr/lib
grep -q ^libvirt-qemu: /etc/passwd || echo 'libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin' >> /etc/passwd
grep -q ^libvirt-qemu: /etc/group || echo 'libvirt-qemu:x:64055:' >> /etc/group
cp {own}/qemu.conf /etc/libvirt/qemu.conf
cp {own}/libvirtd.conf /etc/libvirt/libvirtd.conf
cp {own}/hook /etc/libvirt/hooks/qemu
cp -a {own}/descriptions /etc/vmbus-device
mount --bind {share} /usr/share
"""
QEMU_CONF = """
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""
LIBVIRTD_CONF = 'unix_sock_rw_perms = "0700"\nauth_unix_rw = "none"\nauth_unix_ro = "none"\n'


class LibvirtHost:
    """One libvirtd, in a new directory `own`. `session`: that of an ordinary user."""

    def __init__(self, libvirt: Libvirt, own: Path, hook: str, descriptions: dict[str, str], *, session: bool) -> None:
        self._libvirt = libvirt
        self.own = own
        self.session = session
        self.uri = "qemu:///session" if session else "qemu:///system"
        for name in ("home/.config/libvirt", "descriptions", "lib/libvirt"):
            (own / name).mkdir(mode=0o700, parents=True)
        self.run = Path("/run/user/1000" if session else "/run")
        (own / "hook").write_text(hook)
        (own / "hook").chmod(0o755)
        helper = own / "lib/libvirt/libvirt_iohelper"
        helper.write_text(f'#!/bin/sh\nexec {shlex.join(libvirt.iohelper)} "$@"\n')
        helper.chmod(0o755)
        (own / "qemu.conf").write_text(QEMU_CONF)
        (own / "libvirtd.conf").write_text(LIBVIRTD_CONF)
        for name, text in descriptions.items():
            (own / "descriptions" / f"{name}.toml").write_text(text)
        configured = own / "home/.config"
        (configured / "libvirt/qemu.conf").write_text('stdio_handler = "file"\n')
        (configured / "vmbus-device").symlink_to(own / "descriptions")
        self._environment = os.environ | libvirt.environment | {"PYTHONPATH": PYTHONPATH}
        if session:
            self._environment |= {"HOME": str(own / "home"), "XDG_RUNTIME_DIR": str(self.run)}
        script = MOUNTS.format(own=shlex.quote(str(own)), share=shlex.quote(str(libvirt.share)))
        mapped = ["unshare", "-U", "--map-user=1000", "--map-group=1000"] if session else []
        daemon = [*mapped, *libvirt.libvirtd, *([] if session else ["--config", "/etc/libvirt/libvirtd.conf"])]
        with (own / "libvirtd.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", "-m", "sh", "-c", f"{script}\nexec {shlex.join(daemon)}"],
                env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            pace.until(lambda: self.virsh("uri", check=False).returncode == 0 or self._over, "libvirtd", 30, every=0.2)
            assert not self._over, self.log
        except BaseException:
            self.__exit__()
            raise

    @property
    def _over(self) -> bool:
        return self._process.poll() is not None

    @property
    def log(self) -> str:
        return (self.own / "libvirtd.log").read_text()

    @property
    def _enter(self) -> list[str]:
        return ["nsenter", "-t", str(self._process.pid), "-m", *(["-U", "--preserve-credentials"] * self.session)]

    def spawn(self, *argv: str, output: IO[bytes]) -> subprocess.Popen[bytes]:
        """Starts a program that sees the files that libvirtd sees."""
        return subprocess.Popen(
            [*self._enter, *argv], env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )

    def inside(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs such a program."""
        done = subprocess.run(
            [*self._enter, *argv], env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=pace.seconds(60),
        )  # fmt: skip
        assert not check or done.returncode == 0, (argv, done.stdout, done.stderr, self.log[-2000:])
        return done

    def virsh(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command of virsh."""
        return self.inside(*self._libvirt.virsh, "-c", self.uri, *words, check=check)

    def state(self, domain: str) -> str:
        """What virsh calls the domain's state."""
        return self.virsh("domstate", domain).stdout.strip()

    def __enter__(self) -> LibvirtHost:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._over:
            for domain in self.virsh("list", "--name", check=False).stdout.split():
                self.virsh("destroy", domain, check=False)
            self._process.terminate()
        try:
            self._process.wait(pace.seconds(20))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
