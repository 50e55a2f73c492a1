"""A set of certificates for migrations by TLS: a CA, and what each of some hosts needs, made with ``openssl``.

For tests, and for a few hosts of one's own; where there is a CA already, it signs these. Keys never leave the directory
in which they are made, and are readable by their owner alone.
"""

from __future__ import annotations

import ipaddress
import re
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path

from vmbus.errors import EnvironmentProblem, UsageError, os_error

DAYS = 365
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")
_USES = {"server": "serverAuth", "client": "clientAuth"}


def make_authority(directory: Path, *, days: int = DAYS) -> None:
    """A new CA in `directory` (made if need be, 0700): ``ca-cert.pem``, and ``ca-key.pem``, which no host needs.

    Raises `UsageError` if there is one already.
    """
    with os_error(f"cannot make {directory}"):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (directory / "ca-key.pem").exists():
        raise UsageError(f"there is a CA in {directory} already")
    extensions = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign")
    _openssl(directory, "ca", "vmbus migrations", extensions, days)


def make_host(authority: Path, host: str, names: Collection[str] = (), *, days: int = DAYS) -> Path:
    """The directory, below the authority's, with all that the host `host` needs for sending and receiving VMs.

    Its certificates are for `host` and `names`: what is in the addresses that others use for it. Raises `UsageError`
    for a host that has one already, and for what is no name or address.
    """
    directory = authority / host
    alternatives = ",".join(dict.fromkeys(_alternative(name) for name in (host, *names)))
    with os_error(f"cannot make {directory}"):
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            raise UsageError(f"{directory} is there already: remove it for new certificates") from None
        shutil.copy(authority / "ca-cert.pem", directory / "ca-cert.pem")
    home = authority.absolute()  # openssl works in the host's directory
    signed = ("-CA", str(home / "ca-cert.pem"), "-CAkey", str(home / "ca-key.pem"))
    try:
        for side, use in _USES.items():
            extensions = (
                f"subjectAltName={alternatives}",
                f"extendedKeyUsage={use}",
                "basicConstraints=critical,CA:FALSE",
                "keyUsage=critical,digitalSignature",
            )
            _openssl(directory, side, host, extensions, days, *signed)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)  # half a set would be in the next one's way
        raise
    return directory


def _alternative(name: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(name)}"
    except ValueError:
        if not _HOST.fullmatch(name):
            raise UsageError(f"{name!r} is neither a host's name nor its address") from None
        return f"DNS:{name}"


def _openssl(directory: Path, what: str, name: str, extensions: Collection[str], days: int, *more: str) -> None:
    program = shutil.which("openssl")
    if program is None:
        raise EnvironmentProblem("certificates are made with the command openssl, which is missing: install openssl")
    words = [program, "req", "-x509", *_KEY, "-sha256", "-days", str(days), "-subj", f"/CN={name}", *more]
    for extension in extensions:
        words += ["-addext", extension]
    words += ["-keyout", f"{what}-key.pem", "-out", f"{what}-cert.pem"]
    done = subprocess.run(words, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, umask=0o077, check=False)
    if done.returncode:
        raise EnvironmentProblem(f"openssl made no certificate: {done.stderr.decode(errors='replace').strip()[-500:]}")
