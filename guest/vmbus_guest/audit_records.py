"""The records that test drivers keep for the auditor: the agent has them written, and gives them to the host."""

# Imports are kept few, os instead of pathlib: each costs boot time in an emulated guest.
# ruff: noqa: PTH104, PTH112, PTH123, PTH208

from __future__ import annotations

import os

from vmbus_guest.jobs import RequestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

AUDIT_PIECE = 512 << 10
"""Bytes of a record in one answer; in base64 they still fit into a line."""


def flush(directory: str | None, arguments: dict[str, Any], running: set[int]) -> dict[str, Any]:
    """Ask running test drivers to write their records, and list all records.

    `flushed` tells whether a record has everything up to the first request with this `token`. `running`: process ids of
    test drivers. Raises RequestError.
    """
    token = arguments.get("token")
    if not isinstance(token, str) or not token.isalnum() or len(token) > 64:
        raise RequestError("bad-argument", "'token' is a word of letters and digits")
    if directory is None or not os.path.isdir(directory):
        return {"on": directory is not None, "records": []}
    request = f"{directory}/flush"
    with open(f"{request}.new", "w", encoding="ascii") as file:
        file.write(token)
    os.rename(f"{request}.new", request)
    records = []
    for name in sorted(os.listdir(directory)):
        if not name.endswith(".audit"):
            continue
        with open(f"{directory}/{name}", "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 256))
            flushed = f'"{token}"'.encode() in file.read()
        owner = name.split("-")[-2]  # guest-DRIVER-PID-UID.audit
        alive = owner.isdigit() and int(owner) in running
        records.append({"name": name, "size": size, "flushed": flushed, "running": alive})
    return {"on": True, "records": records}


def read(directory: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """A piece of a record, as base64; empty at its end. Raises RequestError."""
    import base64

    name, offset = arguments.get("name"), arguments.get("offset", 0)
    if not isinstance(name, str) or "/" in name or not name.endswith(".audit") or directory is None:
        raise RequestError("bad-argument", f"no audit record {name!r}")
    if type(offset) is not int or offset < 0:
        raise RequestError("bad-argument", "'offset' is a number of bytes")
    try:
        with open(f"{directory}/{name}", "rb") as file:
            file.seek(offset)
            return {"data": base64.b64encode(file.read(AUDIT_PIECE)).decode()}
    except OSError as error:
        raise RequestError("bad-argument", f"cannot read audit record {name!r}: {error}") from error
