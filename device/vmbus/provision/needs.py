"""What set-up and each feature need of a machine, found out without fetching anything. `scripts/setup --check` shows
it, and a set-up that lacks room ends before its first download.

Standard library only: the first stage of the set-up imports this module.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vmbus.errors import VmbusError, code_of
from vmbus.provision import environment as environments
from vmbus.provision import guest_files, libvfio_user, qemu
from vmbus.provision.accel import KVM_DEVICE
from vmbus.provision.apt import require_programs
from vmbus.provision.cache import Cache
from vmbus.provision.roots import find_root
from vmbus.provision.sources import archive_keyring, mirror_candidates

MEGABYTE = 1_000_000
LISTS = 380 * MEGABYTE
"""Bytes of Debian's package lists, which are there while something is fetched from it."""
PYTHON, IMAGE = NOT_DEBIANS = ("Python packages", "guest's image")
"""Parts for which nothing is fetched from Debian's archive."""
TUN = Path("/dev/net/tun")
_CAP_NET_ADMIN = 12


class Part(NamedTuple):
    """Something that set-up makes. `stays`: bytes in the cache; `passes`: more of them while it is made."""

    name: str
    stays: int
    passes: int
    there: bool


class Finding(NamedTuple):
    """`ok` None: not needed for a VM at all, and not there."""

    what: str
    ok: bool | None
    text: str


def parts(cache: Cache, settings: Mapping[str, str] = os.environ, checkout: Path | None = None) -> list[Part]:
    """What set-up makes, and whether it is there. `checkout`: whose virtual environment; None: it needs none."""
    packages = checkout is None
    if checkout is not None:
        try:
            packages = environments.environment_python(cache, checkout) is not None
        except VmbusError:
            packages = False
    own_qemu = bool(settings.get("VMBUS_QEMU", "").strip()) or find_root(cache, qemu.ROOT_RECIPE) is not None
    own_library = bool(settings.get("VMBUS_LIBVFIO_USER", "").strip()) or libvfio_user.is_built(cache)
    own_kernel, whole = (bool(settings.get(name, "").strip()) for name in ("VMBUS_KERNEL", "VMBUS_INITRAMFS"))
    userland = whole or find_root(cache, guest_files.USERLAND_RECIPE) is not None
    return [
        Part(PYTHON, 195 * MEGABYTE, 60 * MEGABYTE, packages),
        Part("QEMU", 185 * MEGABYTE, 70 * MEGABYTE, own_qemu),
        Part("libvfio-user", 2 * MEGABYTE, 140 * MEGABYTE, own_library),
        Part("guest's kernel", 55 * MEGABYTE, 110 * MEGABYTE, own_kernel or any(cache.path("kernel").glob("*/*.json"))),
        Part("guest's files", 85 * MEGABYTE, 30 * MEGABYTE, userland),
        Part(
            *("guest's kernel module", 110 * MEGABYTE, 20 * MEGABYTE),
            own_kernel or any(cache.path("module").glob("*")),
        ),
        Part(IMAGE, 30 * MEGABYTE, 30 * MEGABYTE, any(cache.path("image").glob("*"))),
    ]


def room_needed(wanted: list[Part]) -> int:
    """Bytes that these take at most, while those are made that are not there."""
    missing = [part for part in wanted if not part.there]
    lists = LISTS if any(part.name not in NOT_DEBIANS for part in missing) else 0
    return sum(part.stays for part in missing) + max((part.passes for part in missing), default=0) + lists


def require_room(cache: Cache, settings: Mapping[str, str] = os.environ, checkout: Path | None = None) -> None:
    """Raise EnvironmentProblem, before anything is fetched, if there is no room for what is missing."""
    cache.require_room(room_needed(parts(cache, settings, checkout)), "the set-up")


def _attempt(what: str, work: object, good: str) -> Finding:
    assert callable(work)
    try:
        work()
    except VmbusError as error:
        return Finding(what, False, str(error))
    return Finding(what, True, good)


def may_make_interfaces() -> bool:
    """Whether this process may make network interfaces in its namespace: root may, or who has CAP_NET_ADMIN."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return os.geteuid() == 0
    effective = next((line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> _CAP_NET_ADMIN & 1)


def check(cache: Cache, settings: Mapping[str, str] = os.environ, checkout: Path | None = None) -> list[Finding]:
    """Everything, in the order of README's table."""
    wanted = parts(cache, settings, checkout)
    missing = [part.name for part in wanted if not part.there]
    needed = room_needed(wanted)
    found = [
        _attempt("cache", cache.require_own, f"{cache.root}, {cache.size() / MEGABYTE:.0f} MB in it"),
        _attempt(
            "room",
            lambda: cache.require_room(needed, "the set-up"),
            f"{needed / MEGABYTE:.0f} MB are needed for {', '.join(missing)}" if missing else "everything is there",
        ),
    ]
    if set(missing) - set(NOT_DEBIANS):
        found += [
            _attempt("Debian's programs", require_programs, "apt and dpkg are there"),
            _attempt("Debian's keys", archive_keyring, "there"),
            _attempt("Debian's archive", lambda: mirror_candidates(settings), "configured"),
            _attempt("compiler", lambda: libvfio_user.check_prerequisites(cache, settings), "there, or not needed"),
        ]
    absent = [name for name in ("gcc", "make") if shutil.which(name) is None]
    found.append(
        Finding(
            "Linux's own drivers", None if absent else True, f"{', '.join(absent)} not found" if absent else "gcc, make"
        )
    )
    kvm = KVM_DEVICE.exists() and os.access(KVM_DEVICE, os.R_OK | os.W_OK)
    found.append(
        Finding("KVM", True if kvm else None, "tried at the first VM" if kvm else f"{KVM_DEVICE} cannot be opened: TCG")
    )
    admin, tun = may_make_interfaces(), os.access(TUN, os.R_OK | os.W_OK)
    lacks = [*([] if admin else ["root, or CAP_NET_ADMIN"]), *([] if tun else [f"access to {TUN}"])]
    found.append(
        Finding("network card", None if lacks else True, f"needs {' and '.join(lacks)}" if lacks else "root, TUN")
    )
    ssh = shutil.which("ssh") is not None
    found.append(Finding("log in to a Debian guest", True if ssh else None, "ssh" if ssh else "ssh not found"))
    return found


def run(arguments: list[str], cache: Cache, checkout: Path | None) -> int | None:
    """What `--check` and `--clean` do: the exit status, or None where neither is asked for. Nothing is fetched."""
    if "--clean" in arguments:
        freed = cache.clear()
        if "--json" in arguments:
            print(json.dumps({"cache": str(cache.root), "freed": freed}))
            return 0
        print(f"removed {freed / MEGABYTE:.0f} MB from {cache.root}; the next command fetches what it needs again")
        return 0
    if "--check" not in arguments:
        return None
    found = check(cache, checkout=checkout)
    if "--json" in arguments:
        print(json.dumps({"findings": [one._asdict() for one in found]}, indent=1))
    for one in found if "--json" not in arguments else ():
        mark = {True: "yes", False: "NO", None: "no"}[one.ok]
        print(f"{mark:4}{one.what}: {one.text}")
    return 1 if any(one.ok is False for one in found) else 0


def failure(error: BaseException, arguments: Sequence[str]) -> int:
    """Says what failed, on standard error and, with `--json`, as a document. Returns the exit status."""
    known = error if isinstance(error, VmbusError) else VmbusError(str(error))
    print(f"set-up: {known}", file=sys.stderr)
    if "--json" in arguments:
        plain = {"message": str(known), "kind": known.kind, "code": code_of(error), "status": known.status}
        print(json.dumps({"error": plain}, indent=1))
    return known.status


def own_cache_notice(cache: Cache, settings: Mapping[str, str] = os.environ) -> str:
    """What somebody has to hear who uses sudo: root has a cache of its own. Empty where that is nobody's surprise."""
    user = settings.get("SUDO_USER", "")
    if not user or user == "root" or os.geteuid() != 0 or settings.get("VMBUS_CACHE"):
        return ""
    return (
        f"this runs as root, by sudo: root's cache is {cache.root}, which is not that of {user}, so everything is "
        "fetched once more; only a network card needs root"
    )
