"""What a device server offers: the device's name and its providers, as typed data.

The same structure is read from TOML (a table of a VM description) and from JSON (the file that a device
server is started with). Decoding is strict: an unknown or missing field, a wrong type and an illegal value are
errors that name the source, the field and what is allowed.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Annotated, Any

import msgspec

from vmbus.errors import UsageError, os_error
from vmbus.util.explaining import Kind, Name, explain


class ProviderDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One provider (VSP) of a device: it becomes one channel offer."""

    kind: Kind
    """Which provider, e.g. ``echo`` or ``burst``, or ``package.module:Class`` for an author's own."""
    name: Name
    """This instance's name: in logs, in tools, and for its test driver. Unique in the device."""
    instance: str
    """Instance GUID of the offer, in the usual text form. Unique in the device."""
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    """Settings of this kind of provider; the provider itself checks them."""

    def __post_init__(self) -> None:
        try:
            uuid.UUID(self.instance)
        except ValueError:
            raise ValueError(
                f"instance {self.instance!r} is not a GUID such as 6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7a01"
            ) from None


class DeviceDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Name
    providers: Annotated[list[ProviderDescription], msgspec.Meta(min_length=1, max_length=256)]

    def __post_init__(self) -> None:
        for field in ("name", "instance"):
            seen: set[str] = set()
            for provider in self.providers:
                value = str(getattr(provider, field)).lower()
                if value in seen:
                    raise ValueError(f"two providers have the same {field} {value!r}")
                seen.add(value)

    def to_json(self) -> bytes:
        """This description as the JSON text that a device server is started with."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


def load_device(path: Path) -> DeviceDescription:
    """Reads a device description from a JSON file.

    Raises `EnvironmentProblem` if the file cannot be read and `UsageError` (naming the field) if it is wrong.
    """
    with os_error(f"cannot read device description {path}"):
        data = path.read_bytes()
    return parse_device(data, str(path))


def parse_device(data: bytes, source: str) -> DeviceDescription:
    """Decodes a device description from JSON; `source` names it in errors. Raises `UsageError`."""
    try:
        return msgspec.json.decode(data, type=DeviceDescription)
    except msgspec.ValidationError as error:
        raise UsageError(f"{source}: {explain(error, DeviceDescription)}") from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise UsageError(f"{source}: not JSON: {error}") from error
