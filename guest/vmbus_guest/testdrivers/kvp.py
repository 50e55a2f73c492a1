"""Test driver `kvp`: a program of the guest that exchanges keys and values with the host.

Parameters:

    pool       which pool of the key-value exchange
    set        a key to set
    value      to what
    get        a key whose value is wanted: the result's `value`
    directory  where the pools are

The result has the pool's `values`.
"""

from __future__ import annotations

from typing import Any

from vmbus_guest.services.kvp import DIRECTORY, Store
from vmbus_guest.testdrivers.context import Context


def run(context: Context) -> dict[str, Any]:
    """Set, then get, then list."""
    pool = context.parameters.get("pool", "external")
    to_set = context.parameters.get("set", "")
    value = context.parameters.get("value", "")
    to_get = context.parameters.get("get", "")
    directory = context.parameters.get("directory", DIRECTORY)
    context.parameters.check()
    store = Store(directory)
    if to_set:
        store.set(pool, to_set, value)
    values = {key: found for key, (_, found) in store.values(pool).items()}
    result: dict[str, Any] = {"values": values, "verdict": "passed"}
    if to_get:
        result["value"] = values.get(to_get)
        result["verdict"] = "passed" if to_get in values else "failed"
    return result
