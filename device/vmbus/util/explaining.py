"""Names that people give, and what a decoder complains of in the words of whoever wrote the data: which field, what is
wrong, what is allowed."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from msgspec import inspect

from vmbus.errors import UsageError

NAME = r"[a-z0-9][a-z0-9._-]{0,31}"
NAME_PATTERN = rf"^{NAME}\Z"
"""Names of VMs, devices and providers: they become parts of file names and of log lines."""

NAME_RULE = "1 to 32 of a-z, 0-9, '.', '_' and '-', starting with a letter or digit"

Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]

MODULE_PATTERN = r"[A-Za-z_][A-Za-z0-9_]*(?:[.][A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*"
"""An author's own provider: module and class, see `vmbus.providers`."""

KIND_PATTERN = rf"^(?:[a-z0-9][a-z0-9._-]{{0,31}}|{MODULE_PATTERN})\Z"

KIND_RULE = "the kind of a provider of ours, such as 'echo', or 'package.module:Class' for one of your own"

Kind = Annotated[str, msgspec.Meta(pattern=KIND_PATTERN, max_length=256)]

_COMPLAINT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<where>[^`]*)`(?: in `(?P<inside>[^`]*)`)?)?$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")


def complaint(error: msgspec.ValidationError, type_: Any = None) -> tuple[str, str]:
    """The field, or "" for all of it, and what is wrong there. With the type that was asked for, a value that is none
    of a few has these behind it."""
    found = _COMPLAINT.match(str(error))
    assert found is not None
    what, where, inside = found["what"], found["where"] or "", found["inside"]
    key = inside is not None and where in ("key", "keys")
    place = (inside if key else where) or ""
    if type_ is not None and what.startswith("Invalid enum value"):
        allowed = allowed_at(type_, place, key=key)
        if allowed:
            what += f"; allowed: {', '.join(map(str, allowed))}"
    field = place.removeprefix("$").removeprefix(".")
    return (f"{field}, a key" if key and field else field), what


def allowed_at(type_: Any, place: str, *, key: bool = False) -> list[Any]:
    """The values that are allowed at a place such as `$.guest.driver`, where they are few; with `key`: of its keys."""
    found: list[inspect.Type] = [inspect.type_info(type_)]
    for name, index in _STEP.findall(place.removeprefix("$")):
        found = [further for one in found for further in _inside(one, name, index)]
    if key:
        found = [one.key_type for one in _flat(found) if isinstance(one, inspect.DictType)]
    values: list[Any] = []
    for one in _flat(found):
        if isinstance(one, inspect.LiteralType):
            values += one.values
        elif isinstance(one, inspect.EnumType):
            values += [member.value for member in one.cls]
    return values


def _flat(types: list[inspect.Type]) -> list[inspect.Type]:
    """Unions as their members, and without what is only said about a type."""
    flat: list[inspect.Type] = []
    for one in types:
        if isinstance(one, inspect.Metadata):
            flat += _flat([one.type])
        elif isinstance(one, inspect.UnionType):
            flat += _flat(list(one.types))
        else:
            flat.append(one)
    return flat


def _inside(type_: inspect.Type, name: str, index: str) -> list[inspect.Type]:
    found: list[inspect.Type] = []
    for one in _flat([type_]):
        if isinstance(one, inspect.StructType) and name:
            found += [field.type for field in one.fields if field.encode_name == name]
        elif isinstance(one, inspect.DictType) and index:
            found.append(one.value_type)
        elif isinstance(one, inspect.ListType | inspect.VarTupleType) and index:
            found.append(one.item_type)
    return found


def check_name(name: str) -> str:
    """Returns a name of a VM that somebody has given, if it is usable: it becomes part of file names. Raises
    UsageError."""
    if re.search(NAME_PATTERN, name) is None:
        raise UsageError(f"{name!r} is not a usable name of a VM; allowed: {NAME_RULE}")
    return name


def explain(error: msgspec.ValidationError, type_: Any = None) -> str:
    """Turns a decoder's complaint into "field X: what is wrong (what is allowed)"; `type_`: what was to be decoded,
    from which more is said about what is allowed."""
    field, what = complaint(error, type_)
    if repr(KIND_PATTERN)[1:-1] in what:
        what = f"not a kind of provider; allowed: {KIND_RULE}"
    elif repr(NAME_PATTERN)[1:-1] in what:
        what = f"not a usable name; allowed: {NAME_RULE}"
    return f"field '{field}': {what}" if field else what
