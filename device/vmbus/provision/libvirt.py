"""libvirt in a private root, for the tests of docs/plugin.md: no part of the set-up, and fetched (some 20 MB) when they
first want it.

libvirt finds its data in fixed places, so it is run with this root's `usr/share` in the place of the system's: in a
mount namespace of its own, which takes root.

Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmbus.provision.cache import Cache, remove
from vmbus.provision.report import Reporter, SilentReporter
from vmbus.provision.roots import Root, RootRecipe, find_root, make_root
from vmbus.provision.sources import SUITE

PACKAGES = (
    *("libvirt-clients", "libvirt-common", "libvirt-daemon", "libvirt-daemon-common"),
    *("libvirt-daemon-driver-qemu", "libvirt0"),
    # What these three load; all that they depend on is for other drivers, and three times as much.
    *("libacl1", "libapparmor1", "libatomic1", "libaudit1", "libblkid1", "libbrotli1", "libbsd0", "libc6"),
    *("libcap-ng0", "libcom-err2", "libcurl3t64-gnutls", "libffi8", "libgcc-s1", "libglib2.0-0t64", "libgmp10"),
    *("libgnutls30t64", "libgssapi-krb5-2", "libhogweed6t64", "libidn2-0", "libjson-c5", "libk5crypto3"),
    *("libkeyutils1", "libkrb5-3", "libkrb5support0", "libldap2", "liblzma5", "libmd0", "libmount1", "libnettle8t64"),
    *("libnghttp2-14", "libnghttp3-9", "libngtcp2-16", "libngtcp2-crypto-gnutls8", "libnl-3-200", "libnuma1"),
    *("libp11-kit0", "libpcre2-8-0", "libpsl5t64", "libreadline8t64", "librtmp1", "libsasl2-2", "libselinux1"),
    *("libssh-4", "libssh2-1t64", "libssl3t64", "libtasn1-6", "libtinfo6", "libtirpc3t64", "libunistring5"),
    *("libxml2", "libzstd1", "zlib1g"),
)
RECIPE = RootRecipe("libvirt", (SUITE,), PACKAGES, closure=False)


@dataclass(frozen=True)
class Libvirt:
    """How to start it. `share`: what has to be at /usr/share."""

    libvirtd: tuple[str, ...]
    virsh: tuple[str, ...]
    iohelper: tuple[str, ...]
    """What libvirtd starts to write files."""
    environment: dict[str, str]
    share: Path


def find_libvirt(cache: Cache | None = None, reporter: Reporter | None = None) -> Libvirt:
    """The private root's libvirt, fetched into the cache if need be; the cache's lock is taken for that.

    Raises EnvironmentProblem, ProgramFailed, WaitTimeout.
    """
    cache = cache or Cache()
    reporter = reporter or SilentReporter()
    root = find_root(cache, RECIPE)
    if root is None:
        with cache.lock(on_wait=reporter.note):
            root = make_root(cache, RECIPE, reporter)
            remove(cache.path("apt"))
    return from_root(root)


def from_root(root: Root) -> Libvirt:
    """As it is in a root."""
    drivers = root.libraries / "libvirt" / "connection-driver"
    return Libvirt(
        libvirtd=tuple(root.program("usr/sbin/libvirtd")),
        virsh=tuple(root.program("usr/bin/virsh")),
        iohelper=tuple(root.program("usr/lib/libvirt/libvirt_iohelper")),
        environment={"LIBVIRT_DRIVER_DIR": str(drivers)},
        share=root.path / "usr/share",
    )
