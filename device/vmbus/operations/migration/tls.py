"""Who is at the other end of a connection, by certificates: mutual TLS for a migration that crosses a network.

A directory has a host's certificates under the names that QEMU and libvirt use for theirs: ``ca-cert.pem``, and, of a
host that receives VMs, ``server-cert.pem`` and ``server-key.pem``, of one that sends them, ``client-cert.pem`` and
``client-key.pem``; also ``ca-crl.pem``, if certificates have been revoked. `certificates` makes a set of them.
"""

from __future__ import annotations

import hashlib
import ssl
import stat
from asyncio import StreamWriter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vmbus.errors import EnvironmentProblem, UsageError, os_error

CA, REVOKED = "ca-cert.pem", "ca-crl.pem"
SHUTDOWN_TIMEOUT = 5.0
"""Seconds for the other side to say that it has read everything, when a connection ends."""


class Peer(NamedTuple):
    """Whose certificate the other side has shown, and proved to have the key of."""

    names: frozenset[str]
    """The names of hosts and addresses in it, and its common name, in lower case."""
    fingerprint: bytes
    """SHA-256 of the certificate."""

    def __str__(self) -> str:
        return ", ".join(sorted(self.names)) or f"the certificate {self.fingerprint.hex()[:16]}"


@dataclass(frozen=True)
class Tls:
    """One side's certificate, and what it asks of the other one's. Made by `for_source` and `for_destination`."""

    context: ssl.SSLContext
    fingerprint: bytes
    server: bool
    name: str | None = None
    """At a source: the name that the destination's certificate has to have; None: the host of its address."""
    peers: frozenset[str] = frozenset()
    """At a destination: the names of which a source's certificate has to have one; empty: any of the CA."""

    def peer(self, writer: StreamWriter) -> Peer:
        """Who is at the other end of a connection."""
        connection: ssl.SSLObject = writer.get_extra_info("ssl_object")
        certificate = connection.getpeercert(binary_form=True)
        told = connection.getpeercert()
        assert certificate is not None and told is not None  # the context asks for one
        alternatives: tuple[tuple[str, str], ...] = told.get("subjectAltName", ())  # type: ignore[assignment]
        subject: tuple[tuple[tuple[str, str], ...], ...] = told.get("subject", ())  # type: ignore[assignment]
        names = {value for kind, value in alternatives if kind in ("DNS", "IP Address")}
        names |= {value for part in subject for kind, value in part if kind == "commonName"}
        return Peer(frozenset(one.lower() for one in names), hashlib.sha256(certificate).digest())

    def binding(self, peer: Peer) -> bytes:
        """What ties a proof to both ends of this connection: the server's certificate, and the client's."""
        return self.fingerprint + peer.fingerprint if self.server else peer.fingerprint + self.fingerprint

    def objection(self, peer: Peer) -> str | None:
        """Why somebody of the CA may not come all the same; None: it may."""
        if not self.peers or self.peers & peer.names:
            return None
        return f"{peer} may not send a VM here, only {', '.join(sorted(self.peers))} (--peer)"


def for_source(directory: Path, name: str | None = None) -> Tls:
    """The certificates of a host that sends a VM. `name`: what the destination's certificate has to say, if it is not
    the host of its address. Raises `UsageError` and `EnvironmentProblem`."""
    context, fingerprint = _context(directory, "client", ssl.PROTOCOL_TLS_CLIENT)
    return Tls(context, fingerprint, False, name=name)


def for_destination(directory: Path, peers: Collection[str] = ()) -> Tls:
    """The certificates of a host that receives a VM. `peers`: names of those who may send one. Raises as above."""
    context, fingerprint = _context(directory, "server", ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # each connection proves everything; and nothing waits unread when a client closes
    return Tls(context, fingerprint, True, peers=frozenset(one.lower() for one in peers))


def _context(directory: Path, side: str, protocol: ssl._SSLMethod) -> tuple[ssl.SSLContext, bytes]:
    certificate, key = directory / f"{side}-cert.pem", directory / f"{side}-key.pem"
    with os_error(f"cannot read the certificates in {directory}"):
        mode = key.stat().st_mode
        text = certificate.read_text("ascii", "replace")
        (directory / CA).stat()
    if not stat.S_ISREG(mode) or stat.S_IMODE(mode) & 0o077:
        raise UsageError(f"the key {key} has to be a plain file and its owner's alone: chmod 600 it")
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(directory / CA)
        if (directory / REVOKED).exists():
            context.load_verify_locations(directory / REVOKED)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        # A key with a passphrase would ask for it on the terminal.
        context.load_cert_chain(certificate, key, password=lambda: "")
        own = ssl.PEM_cert_to_DER_cert(_first(text))
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(f"the certificates in {directory} cannot be used: {error}") from error
    except OSError as error:
        raise EnvironmentProblem(f"cannot read the certificates in {directory}: {error}") from error
    return context, hashlib.sha256(own).digest()


def _first(text: str) -> str:
    """The first certificate of a file: the others are the way from it to the CA."""
    begin, end = ssl.PEM_HEADER, ssl.PEM_FOOTER
    return begin + text.partition(begin)[2].partition(end)[0] + end
