"""A guest that has one good channel and does bad things on others, and what must be true all the while."""

from __future__ import annotations

import gc
import json
import os
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.many import MANY_TYPE, ManyProvider
from vmbus import providers
from vmbus.errors import PeerError
from vmbus.kmcl.client import ClientChannel
from vmbus.ring import INTERRUPT_MASK, PENDING_SEND_SIZE, READ_INDEX, WRITE_INDEX
from vmbus.server.turns import Turn
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.transport.library import Library
from vmbus.wire.synic import Register
from vmbus_guest.driver import VmbusDriver

PAGE = 4096
WORDS = {"write index": WRITE_INDEX, "read index": READ_INDEX, "mask": INTERRUPT_MASK, "pending": PENDING_SEND_SIZE}
LONGEST_TURN = 0.020
"""Seconds of the event loop's CPU time that anything a guest can ask may take in one turn."""
FLOOR = 0.001
"""Seconds by which a round trip may always be longer than usual: two turns of others come in between at most, and the
machine is busy with other things too."""
MOST_GROWTH = 96 << 20
"""Bytes by which this process, server and guest in one, may grow."""

providers.PROVIDERS["many"] = ManyProvider


class Raw:
    """An open channel of which the guest's end is nobody's but the test's: nothing reads, unless it is told to."""

    def __init__(self, driver: VmbusDriver, interface_type: Any, *, pages_in: int = 1, pages_out: int = 16) -> None:
        self.driver = driver
        self.channel: ClientChannel = driver.client_channel(
            interface_type, ring_pages_in=pages_in, ring_pages_out=pages_out
        )
        driver.enable(self.channel)
        link = self.link = driver.link_of(self.channel)
        # The driver does not look at it any more.
        del driver._links[link.offer.relid]
        driver._ready.pop(self.channel, None)
        driver._idle.pop(self.channel, None)
        self.rings = link.rings.view
        self.down = (pages_out + 1) * PAGE
        self.size_down = pages_in * PAGE
        self.transaction = 0
        self.taken = 0

    def put(self, payload: bytes, *, kind: int = 6, offset8: int = 2) -> bool:
        """A request; False when there is no room, or what the ring's header says makes no sense."""
        writer = self.link.writer
        try:
            if not writer.put(kind, 1, self.transaction + 1, payload, offset8):
                return False
            self.transaction += 1
            if writer.commit():
                self.signal()
        except PeerError:
            return False
        return True

    def fill(self, payload: bytes) -> int:
        """As many requests as there is room for."""
        count = 0
        while self.put(payload):
            count += 1
        return count

    def signal(self) -> None:
        self.driver.function.write32(Register.SIGNAL_EVENT, self.link.offer.connection_id)

    def word(self, at: int, value: int | None = None) -> int:
        """A word of the rings' memory."""
        if value is not None:
            struct.pack_into("<I", self.rings, at, value)
        return int(struct.unpack_from("<I", self.rings, at)[0])

    def take_one(self) -> bool:
        """Read one packet as a guest does that is in no hurry; whether there was one."""
        read, write = self.word(self.down + READ_INDEX), self.word(self.down + WRITE_INDEX)
        if read == write:
            return False
        (length8,) = struct.unpack_from("<H", self.rings, self.down + PAGE + (read + 4) % self.size_down)
        self.word(self.down + READ_INDEX, (read + 8 * length8 + 8) % self.size_down)
        self.taken += 1
        self.signal()
        return True


class Scene:
    """A server with one channel that must go on well, whatever is done on those of the kinds named."""

    def __init__(self, library: Library, *kinds: str, many: dict[str, Any] | None = None, **options: Any) -> None:
        self.library = library
        self.description = describe("many", *kinds, many=many or {}, **options)
        self.server = LoopbackServer(self.description, library)
        self.function = self.server.function(ram_size=64 << 20, map_size=8 << 20)
        self.begin()
        self.usual()
        self.memory = resident()

    def begin(self) -> None:
        """A driver, and the good channel."""
        self.driver = VmbusDriver(self.function)
        self.good = self.driver.client_channel(MANY_TYPE, ring_pages_in=4, ring_pages_out=4)
        self.driver.enable(self.good)

    def trip(self) -> float:
        """Seconds of a round trip on the good channel."""
        answers: list[bytes] = []
        packet = self.good.allocate_packet()
        packet.completion_routine = lambda packet, status, reply: answers.append(reply)
        began = time.perf_counter()
        packet.send(b"how are you, VSP")
        self.driver.run_until(lambda: bool(answers), 10, "an answer on the good channel")
        assert answers == [b"how are you, VSP"]
        return time.perf_counter() - began

    def median(self, trips: int, act: Callable[[], object] = lambda: None) -> float:
        """Of so many round trips; before each of them something is done."""
        seconds = []
        for _ in range(trips):
            act()
            seconds.append(self.trip())
        return statistics.median(seconds)

    def usual(self) -> float:
        return self.median(100)

    def bears(self, act: Callable[[], object], trips: int = 100) -> tuple[float, float]:
        """The good channel is as quick as usual while this goes on: the medians in both cases. A machine that is slow
        for another reason gets further chances."""
        for _ in range(3):
            usual, meanwhile = self.usual(), self.median(trips, act)
            if meanwhile <= max(2 * usual, usual + FLOOR):
                return usual, meanwhile
        raise AssertionError(f"a round trip takes {meanwhile * 1e3:.2f} ms where {usual * 1e3:.2f} are usual")

    def status(self) -> dict[str, Any]:
        """By the control socket, at once."""
        began = time.perf_counter()
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(10)
            control.connect(str(self.server.control_path))
            control.sendall(b'{"id": 1, "command": "status", "arguments": {}}\n')
            with control.makefile() as answers:
                answer = json.loads(answers.readline())
        assert time.perf_counter() - began < 1.0, "the control socket does not answer at once"
        status: dict[str, Any] = answer["result"]
        return status

    def good_to_save(self) -> dict[str, Any]:
        """What must be true after anything: the status; then the device is saved, and goes on in another server."""
        status = self.status()
        assert resident() < self.memory + MOST_GROWTH, "the server grows"
        state = self.server.save()
        self.server.stop()
        self.server = LoopbackServer(self.description, self.library, restore=state)
        self.function.reconnect(self.server.socket_path, state.config)
        self.server.command("restore-finish")
        self.trip()
        assert self.server.command("status")["faults"] == status["faults"]
        print(f"longest turn {status['longest_turn']['seconds'] * 1e3:.1f} ms ({status['longest_turn']['what']})")
        return status

    def close(self) -> None:
        self.driver.close(graceful=False)
        self.server.stop()


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def turns_of(server: LoopbackServer) -> Iterator[list[Turn]]:
    """The longest turn of the block, in CPU time of the loop's thread: what other processes do, and the collection of
    garbage that the whole test run has made, is no part of it."""
    longest: list[Turn] = []
    app = server.server
    gc.disable()
    try:
        server.on_loop(lambda: app.turns.__init__(time.thread_time))  # type: ignore[misc]
        yield longest
        summary = server.on_loop(app.turns.summary)
        longest.append(Turn(summary["seconds"], summary["what"]))
        server.on_loop(lambda: app.turns.__init__())  # type: ignore[misc]
    finally:
        gc.enable()
