"""Certificates for tests: made once per run of the tests, and copied for whoever spoils them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from vmbus.operations.migration.certificates import make_authority, make_host
from vmbus.operations.migration.tls import Tls, for_destination, for_source

HERE = "127.0.0.1"


folder = Path("/nonexistent")
"""Where they are; set by a fixture of the test's."""


def authority(name: str) -> Path:
    """A CA of that name, with a set for the hosts ``a`` and ``b``, both at 127.0.0.1."""
    place = folder / name
    if not place.exists():
        make_authority(place)
        for host in ("a", "b"):
            make_host(place, host, [HERE])
    return place


def source(host: str = "a", of: str = "ours", name: str | None = None) -> Tls:
    return for_source(authority(of) / host, name)


def destination(host: str = "b", of: str = "ours", peers: tuple[str, ...] = ()) -> Tls:
    return for_destination(authority(of) / host, peers)


def expired(place: Path, side: str) -> Path:
    """The set of host ``a`` in a folder, with a certificate of that side whose time is over."""
    pki = authority("ours")
    for file in (pki / "a").iterdir():
        (place / file.name).write_bytes(file.read_bytes())
        (place / file.name).chmod(0o600)
    request = place / "request.pem"
    subprocess.run(
        ["openssl", "x509", "-x509toreq", "-in", f"{side}-cert.pem", "-signkey", f"{side}-key.pem", "-out", request],
        cwd=place, check=True, capture_output=True,
    )  # fmt: skip
    (place / "extensions").write_text(f"subjectAltName=DNS:a,IP:{HERE}\n")
    subprocess.run(
        [
            "openssl", "x509", "-req", "-in", request, "-CA", pki / "ca-cert.pem", "-CAkey", pki / "ca-key.pem",
            "-days", "-1", "-extfile", "extensions", "-out", f"{side}-cert.pem",
        ],
        cwd=place, check=True, capture_output=True,
    )  # fmt: skip
    return place


def revoking(place: Path, host: str, side: str) -> Path:
    """The set of host ``b`` in a folder, with a list that says that a certificate of another host is good no more."""
    pki = authority("ours")
    for file in (pki / "b").iterdir():
        (place / file.name).write_bytes(file.read_bytes())
        (place / file.name).chmod(0o600)
    (place / "index").touch()
    (place / "number").write_text("01\n")
    (place / "ca.conf").write_text(
        "[ca]\ndefault_ca=ours\n[ours]\ndatabase=index\ncrlnumber=number\ndefault_md=sha256\ndefault_crl_days=30\n"
    )
    common = ["openssl", "ca", "-config", "ca.conf", "-cert", pki / "ca-cert.pem", "-keyfile", pki / "ca-key.pem"]
    for words in (["-revoke", pki / host / f"{side}-cert.pem"], ["-gencrl", "-out", "ca-crl.pem"]):
        subprocess.run([*common, *words], cwd=place, check=True, capture_output=True)
    return place
