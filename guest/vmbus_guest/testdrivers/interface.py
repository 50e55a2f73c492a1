"""Test driver `interface`: switches on an interface of another driver's and gives it an address. No channels.

Parameters:

    modules     kernel modules to insert first, in their order, separated by commas: "failover,net_failover,virtio_net"
    interface   its name
    address     IPv4, with the prefix's length: "192.0.2.2/24"
    appear_seconds  how long the interface may take
"""

# os instead of pathlib: this is a guest with little time.
# ruff: noqa: PTH110, PTH112

from __future__ import annotations

import os
import time
from typing import Any

from vmbus.errors import UsageError, WaitTimeout
from vmbus_guest.interface import Settings
from vmbus_guest.services.network import parse_address
from vmbus_guest.testdrivers.context import Context
from vmbus_guest.testdrivers.disk_writer import run_tool


def run(context: Context) -> dict[str, Any]:
    """See the module's text."""
    get = context.parameters.get
    modules = get("modules", "")
    name = get("interface", "eth0")
    address = parse_address(get("address", ""))
    appear = get("appear_seconds", 30.0, minimum=0)
    context.parameters.check()
    if address is None:
        raise UsageError("parameter 'address' is missing")
    for module in filter(None, modules.split(",")):
        if not os.path.isdir(f"/sys/module/{module}"):
            run_tool("busybox", "insmod", f"/lib/modules/{module}.ko")
    deadline = time.monotonic() + appear
    while not os.path.exists(f"/sys/class/net/{name}"):
        if time.monotonic() > deadline:
            raise WaitTimeout(f"interface {name} to appear", appear)
        time.sleep(0.05)
    settings = Settings(name)
    settings.switch_on()
    settings.set_address(*address)
    settings.close()
    return {"interface": name, "verdict": "passed"}
