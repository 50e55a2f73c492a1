"""A host's owner (see `support.vm_owner`) for guests with a network card: ``python -m support.network_owner SOCKET
PROGRAMS ADDRESS``.

First it puts the host's end of the link into a bridge, which gets the host's address: the guest's card becomes another
port of it, so guest, host and the other host are on one network. It can boot a guest, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from support import vm_owner
from support.boot import boot
from vmbus.errors import EnvironmentProblem
from vmbus.providers.network.interface import in_namespace
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription

BRIDGE = "br0"
LINK = "eth0"
PREFIX = 24
REFUSED = "no bridge can be made here"


class Owner(vm_owner.Owner):
    """See the module."""

    async def do_launch(self, description: dict[str, Any]) -> dict[str, Any]:
        found = msgspec.convert(description, VmDescription)
        self.vm = await boot(found, self.programs, records=vm_owner.AUDIT)
        return {}

    async def do_stations(self) -> dict[str, Any]:
        """Where the bridge has seen whom: port by Ethernet address."""
        return {"stations": in_namespace(None, _stations)}


def _stations() -> dict[str, str]:
    from pyroute2 import IPRoute  # type: ignore[import-untyped]

    with IPRoute() as link:
        names = {one["index"]: str(one.get_attr("IFLA_IFNAME")) for one in link.get_links()}
        return {
            str(entry.get_attr("NDA_LLADDR")): names[entry["ifindex"]]
            for entry in link.fdb("dump")
            if entry.get_attr("NDA_MASTER") and not entry["state"] & 0x80  # not those that are for good
        }


def _make_bridge(address: str) -> None:
    from pyroute2 import IPRoute

    for name in ("default", "all"):
        with contextlib.suppress(OSError):
            (Path("/proc/sys/net/ipv6/conf") / name / "disable_ipv6").write_text("1")
    with IPRoute() as link:
        link.link("add", ifname=BRIDGE, kind="bridge")
        (bridge,) = link.link_lookup(ifname=BRIDGE)
        (port,) = link.link_lookup(ifname=LINK)
        (there,) = link.get_links(port)
        link.addr("del", index=port, address=address, prefixlen=PREFIX)
        # An address of its own, or it would change with its ports.
        link.link("set", index=bridge, address="fe" + str(there.get_attr("IFLA_ADDRESS"))[2:])
        link.link("set", index=port, master=bridge)
        link.addr("add", index=bridge, address=address, prefixlen=PREFIX)
        link.link("set", index=bridge, state="up")


async def main(path: str, programs: str, address: str) -> None:
    """Serves until it is killed."""
    from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]

    try:
        in_namespace(None, lambda: _make_bridge(address))
    except (NetlinkError, OSError, EnvironmentProblem) as error:
        print(f"{REFUSED}: {error}", flush=True)
        return
    owner = Owner(msgspec.json.decode(programs, type=Programs, dec_hook=lambda kind, value: kind(value)))
    server = await asyncio.start_unix_server(owner.accept, path=path, limit=vm_owner.LINE_LIMIT)
    print(json.dumps({"bridge": BRIDGE}), vm_owner.READY, flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
