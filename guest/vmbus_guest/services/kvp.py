"""Keys and values that host and guest exchange: the guest's pools, in files, for the service and for programs.

A pool is a JSON file `pool-NAME.json` in the store's directory, an object of `key: [type, value]`. Whoever writes takes
a lock and replaces the file, so that readers never see half of it. `python3 -m vmbus_guest.services.kvp` (in the guest:
`vmbus-kvp`) is the way in for scripts: get, set, delete, list.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vmbus.errors import UsageError
from vmbus.wire import ic

DIRECTORY = "/run/vmbus/kvp"
MOST_KEYS = 1024
"""In one pool."""

POOLS = {"external": ic.Pool.EXTERNAL, "guest": ic.Pool.GUEST, "auto": ic.Pool.AUTO, "auto-external": 3}

Values = dict[str, tuple[int, str]]
"""Type and value (text, or a number's digits) by key."""


class Store:
    """The pools in a directory. `facts` gives the pool `auto`, which nobody writes."""

    def __init__(self, directory: str = DIRECTORY, facts: Callable[[], dict[str, str]] | None = None) -> None:
        self._directory = directory
        self._facts = facts

    def values(self, pool: str) -> Values:
        """All of a pool, in the order in which it was written. Raises UsageError for an unknown pool."""
        if pool not in POOLS:
            raise UsageError(f"there is no pool '{pool}'; there are {', '.join(POOLS)}")
        if pool == "auto" and self._facts is not None:
            return {key: (int(ic.ValueType.STRING), value) for key, value in self._facts().items()}
        try:
            with open(self._path(pool), encoding="utf-8") as file:  # noqa: PTH123 - as elsewhere in the guest
                return {key: (int(kind), str(value)) for key, (kind, value) in json.load(file).items()}
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError, TypeError):
            return {}  # somebody's damage, and the next write mends it

    def set(self, pool: str, key: str, value: str, kind: int = ic.ValueType.STRING) -> None:
        """Set a key. Raises UsageError for what cannot be exchanged, a full pool, and the pool `auto`."""
        try:
            ic.kvp(ic.Kvp(ic.KvpOperation.SET, POOLS.get(pool, 0), key, value, kind))
        except ValueError as error:
            raise UsageError(f"key '{key[:64]}': {error}") from error
        with self._writing(pool) as values:
            if key not in values and len(values) >= MOST_KEYS:
                raise UsageError(f"pool '{pool}' is full: it has {MOST_KEYS} keys")
            values[key] = (int(kind), value)

    def delete(self, pool: str, key: str) -> bool:
        """Remove a key; returns whether it was there. Raises UsageError for the pool `auto`."""
        with self._writing(pool) as values:
            return values.pop(key, None) is not None

    @contextmanager
    def _writing(self, pool: str) -> Iterator[Values]:
        if pool == "auto":
            raise UsageError("pool 'auto' is the system's own")
        os.makedirs(self._directory, mode=0o700, exist_ok=True)  # noqa: PTH103
        lock = os.open(f"{self._directory}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            values = self.values(pool)
            yield values
            path = self._path(pool)
            with open(f"{path}.new", "w", encoding="utf-8") as file:  # noqa: PTH123
                json.dump(values, file)
            os.replace(f"{path}.new", path)  # noqa: PTH105
        finally:
            os.close(lock)

    def _path(self, pool: str) -> str:
        return f"{self._directory}/pool-{pool}.json"


def main(arguments: list[str], store: Store | None = None) -> int:
    """Serve a script: 0, or 1 with a message when there is no such key, or 2."""
    usage = "usage: vmbus-kvp get KEY [POOL] | set KEY VALUE [POOL] | delete KEY [POOL] | list [POOL]"
    store = store or Store()
    try:
        match arguments:
            case ["get", key, *pool] if len(pool) < 2:
                values = store.values(*pool or ["external"])
                if key not in values:
                    print(f"no key {key!r}", file=sys.stderr)
                    return 1
                print(values[key][1])
            case ["set", key, value, *pool] if len(pool) < 2:
                store.set((pool or ["guest"])[0], key, value)
            case ["delete", key, *pool] if len(pool) < 2:
                return 0 if store.delete((pool or ["guest"])[0], key) else 1
            case ["list", *pool] if len(pool) < 2:
                for key, (_, value) in store.values(*pool or ["external"]).items():
                    print(f"{key}={value}")
            case _:
                print(usage, file=sys.stderr)
                return 2
    except UsageError as error:
        print(f"vmbus-kvp: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
