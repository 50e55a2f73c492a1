"""A provider that completes and sends from threads of its own, on the real server, over saves and restores."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from support import pace
from vmbus.kmcl import Completion, Packet
from vmbus.kmcl.server import ServerChannel
from vmbus.providers.echo import EchoProvider
from vmbus.testkit.loopback.harness import describe
from vmbus.testkit.loopback.pair import LoopbackPair
from vmbus.transport.library import Library
from vmbus.wire.workload import ECHO_TYPE

THREADS = 3
ASKED = 200


@pytest.fixture
def threaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The echo provider answers on threads: each request with its payload, and a packet of its own beside it."""
    todo: queue.SimpleQueue[tuple[Completion, bytes] | None] = queue.SimpleQueue()

    def work() -> None:
        while (one := todo.get()) is not None:
            completion, payload = one
            channel = completion.channel
            packet = channel.allocate_packet()
            packet.completion_routine = lambda *_: None
            packet.send(b"beside " + payload)
            completion.complete(b"answer " + payload)

    def answer(self: EchoProvider, completion: Completion, payload: bytes, waited: bool = False) -> None:
        todo.put((completion, payload))

    def nothing(self: ServerChannel, packet: Packet, buffer: memoryview) -> int:
        return 0

    def restore(channel: ServerChannel, lib: bytes, save: bytes) -> None:
        packet = channel.allocate_packet()
        channel.restore_packet(packet, lib)
        packet.completion_routine = lambda *_: None

    real = EchoProvider.start

    def start(self: EchoProvider) -> None:
        self.channel.set_save_restore_packet_callbacks(nothing, restore)
        real(self)

    monkeypatch.setattr(EchoProvider, "_answer", answer)
    monkeypatch.setattr(EchoProvider, "start", start)
    threads = [threading.Thread(target=work, name=f"worker-{number}") for number in range(THREADS)]
    for thread in threads:
        thread.start()
    yield
    for _ in threads:
        todo.put(None)
    for thread in threads:
        thread.join(pace.seconds(10))
        assert not thread.is_alive()


def test_from_any_thread_over_saves_and_restores(threaded: None, libvfio_user: Library, note: Any) -> None:
    with LoopbackPair(describe("echo"), libvfio_user) as pair:
        guest = pair.open(ECHO_TYPE)
        requests = []
        saved = {"queued": 0, "sent": 0}
        for number in range(ASKED):
            requests.append((number, guest.send(b"%07d " % number)))
            if number % 50 == 20:
                found = pair.save_restore()
                saved = {"queued": saved["queued"] + found.queued, "sent": saved["sent"] + found.sent}
        for number, request in requests:
            assert request.wait() == (b"answer %07d " % number).ljust(16, b"\0")
        packets = [guest.receive() for _ in range(ASKED)]
        for packet in packets:
            packet.complete()
        beside = sorted(packet.payload[7:14] for packet in packets)
        assert beside == sorted(b"%07d" % number for number in range(ASKED))
        status = pair.server.command("status")
    assert pair.saves == 4 and status["faults"].get("echo0", {}).get("count", 0) == 0
    note(f"{ASKED} answers and {ASKED} packets from {THREADS} threads, each once, over {pair.saves} restores: {saved}")
