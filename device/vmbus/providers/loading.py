"""Finding a provider's class by its kind: one of ours, or an author's own module.

A kind of the form `package.module:Class` names code outside of this package. It is imported like any Python module:
from the import path, or from the directories in the environment variable VMBUS_PROVIDER_PATH. Since that runs code,
only a description written by the owner may ask for it. A snapshot holds a description too, and may come from anybody:
on a restore such a kind is refused unless the owner names it in VMBUS_PROVIDERS (kinds, separated by commas).
"""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Mapping

from vmbus.errors import UsageError
from vmbus.providers.base import Provider
from vmbus.util.explaining import MODULE_PATTERN

PATH_VARIABLE = "VMBUS_PROVIDER_PATH"
ALLOW_VARIABLE = "VMBUS_PROVIDERS"

GONE = {"block": "scsi", "netvsc": "network"}
"""Kinds that there were, and what has taken their place."""

_MODULE = re.compile(MODULE_PATTERN)


def is_external(kind: str) -> bool:
    """Whether a kind names an author's own module."""
    return _MODULE.fullmatch(kind) is not None


def author_directories() -> list[str]:
    """Those that VMBUS_PROVIDER_PATH names."""
    return [one for one in os.environ.get(PATH_VARIABLE, "").split(os.pathsep) if one]


def find_provider(kind: str, known: Mapping[str, type[Provider]], *, from_snapshot: bool = False) -> type[Provider]:
    """The class of a kind. `from_snapshot`: the kind was not written by this program's owner, see the module's text.

    Raises UsageError: no such kind, module or class, a class that is no provider, or code that a snapshot asks for.
    """
    if kind in known:
        return known[kind]
    if kind in GONE:
        raise UsageError(f"there is no provider of kind {kind!r} any more: use {GONE[kind]!r}")
    if not is_external(kind):
        raise UsageError(
            f"there is no provider of kind {kind!r}; known kinds: {', '.join(sorted(known))}; "
            "one of your own is named 'package.module:Class'"
        )
    if from_snapshot and kind not in _allowed():
        raise UsageError(
            f"the snapshot asks for provider {kind!r}, which is code outside of this package, and a snapshot may not "
            f"choose the code that runs; if you trust it, name it: {ALLOW_VARIABLE}={kind}"
        )
    return _import(kind)


def _allowed() -> set[str]:
    return {one.strip() for one in os.environ.get(ALLOW_VARIABLE, "").split(",")}


def _import(kind: str) -> type[Provider]:
    module_name, _, class_name = kind.partition(":")
    for directory in author_directories():
        # At the end: a module of an author never takes the place of one of ours or of Python's.
        if directory not in sys.path:
            sys.path.append(directory)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UsageError(
                f"provider {kind!r}: there is no module {error.name!r} on the import path; put its directory into "
                f"{PATH_VARIABLE}"
            ) from error
        raise UsageError(f"provider {kind!r}: its module imports {error.name!r}, which is not there") from error
    except Exception as error:
        raise UsageError(f"provider {kind!r}: importing its module raised {error!r}") from error
    found = getattr(module, class_name, None)
    if found is None:
        raise UsageError(f"provider {kind!r}: module {module.__name__} ({_file(module)}) has no class {class_name!r}")
    if not (inspect.isclass(found) and issubclass(found, Provider)):
        raise UsageError(f"provider {kind!r}: {class_name} is not a subclass of vmbus.providers.Provider")
    if inspect.isabstract(found):
        raise UsageError(f"provider {kind!r}: {class_name} has no start(), which every provider needs")
    if not isinstance(getattr(found, "kind", None), str):
        raise UsageError(f"provider {kind!r}: {class_name} has no class attribute kind = '...'")
    return found


def _file(module: object) -> str:
    return getattr(module, "__file__", None) or "?"
