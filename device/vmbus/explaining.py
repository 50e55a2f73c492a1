"""What a decoder complains of, in the words of whoever wrote the data: which field, what is wrong, what is allowed."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import inspect

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
