"""`fake_qemu` as somebody starts it by hand, and not through us: ``python -m support.hand_qemu ARGUMENTS``.

It has QEMU's arguments ``-qmp unix:PATH``, ``-device {...vfio-user-pci...}``, ``-incoming defer`` and ``-chardev
socket,id=agent,path=PATH``, and answers what a QEMU is asked about itself. FAKE_QEMU_ANSWERS is a file with answers
(JSON, by command) in the place of these, read at each question: for one that does not fit; null is an error.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from support.fake_qemu import RAM, Qemu, words

MEMORY = 256 << 20  # what it claims: it has less
VMBUS = {"vendor": 0x5642, "device": 0x4D56}


def function(slot: int, **more: Any) -> dict[str, Any]:
    return {"bus": 0, "slot": slot, "function": 0, "id": VMBUS} | more


ANSWERS: dict[str, Any] = {
    "query-version": {"qemu": {"major": 11, "minor": 1, "micro": 3}, "package": ""},
    "query-name": {"name": "by-hand"},
    "query-target": {"arch": "x86_64"},
    "query-accelerators": {"enabled": "tcg", "present": ["tcg"]},
    "query-memory-size-summary": {"base-memory": MEMORY, "plugged-memory": 0},
    "query-memdev": [{"id": "mem", "size": MEMORY, "share": True}],
    "query-cpus-fast": [{"cpu-index": 0}],
    "query-hotpluggable-cpus": [{"vcpus-count": 1}] * 2,
    "query-pci": [{"bus": 0, "devices": [function(0, id={"vendor": 0x8086, "device": 0x29C0}), function(5)]}],
    "query-block": [],
    "query-vm-generation-id": None,
    "qom-get": "pc-q35-11.1-machine",
}


class HandQemu(Qemu):
    """See the module."""

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(arguments)
        (device,) = (json.loads(text) for text in words(arguments, "-device") if text.startswith("{"))
        self._socket = device["socket"]["path"].replace("/", "\\x2f")
        self.ending: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def answers(self) -> dict[str, Any]:
        file = os.environ.get("FAKE_QEMU_ANSWERS")
        return ANSWERS | (json.loads(Path(file).read_bytes()) if file else {})

    async def execute(self, command: str, given: dict[str, Any]) -> Any:
        if command in (answers := self.answers):
            if (answer := answers[command]) is None:
                raise LookupError(f"{command} finds nothing")
            return answer
        return await super().execute(command, given)

    async def do_query_migrate(self) -> Any:
        return await super().do_query_migrate() | self.answers.get("more-of-query-migrate", {})

    async def do_stop(self) -> Any:
        return {} if self.state == "inmigrate" else await super().do_stop()  # it will stand when the stream is there

    async def do_qom_list(self, path: str) -> Any:
        if path == "/machine/peripheral-anon":
            return [{"name": "type", "type": "string"}, {"name": "device[0]", "type": "child<vfio-user-pci>"}]
        names = (f"vfio-user:{self._socket}{base} BAR 0[0]" for base in (" base", ""))
        found = [{"name": name, "type": "child<memory-region>"} for name in names]
        return found if path.endswith("device[0]") else []

    async def do_quit(self) -> Any:
        self.tell("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        asyncio.get_running_loop().call_later(0.05, self.ending.set_result, None)
        return {}


async def main(arguments: list[str]) -> None:
    qemu = HandQemu(arguments)
    (monitor,) = words(arguments, "-qmp")
    servers = [await asyncio.start_unix_server(qemu.agent, path=qemu.chardevs["agent"]["path"])]
    # The monitor last: who sees it finds everything.
    servers.append(await asyncio.start_unix_server(qemu.monitor, path=monitor.split(",")[0].removeprefix("unix:")))
    pump = asyncio.create_task(qemu.pump())
    await asyncio.wait({pump, qemu.ending}, return_when=asyncio.FIRST_COMPLETED)
    os._exit(0)  # as QEMU: at once


if __name__ == "__main__":
    assert RAM
    random.seed(0)
    asyncio.run(main(sys.argv[1:]))
