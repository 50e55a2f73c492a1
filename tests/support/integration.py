"""Linux's ends of an integration provider's channels, in the test kit."""

from __future__ import annotations

import time
from collections.abc import Callable

from support.hv_utils import ANSWERED, LinuxAnswers
from vmbus.kmcl.pipe import frame, unframe
from vmbus.testkit import ProviderTest
from vmbus.testkit.guest import Guest, HostPacket
from vmbus.wire import ic


class KitGuest:
    """`linux` answers, in the channels of the named services (all of them). While `silent` it answers nothing."""

    def __init__(self, kit: ProviderTest, *names: str, clock: Callable[[], float] = time.time) -> None:
        self.kit = kit
        self.linux = LinuxAnswers(clock)
        self.silent = False
        self.asked: dict[str, list[ic.Message]] = {}
        self.unanswered: list[tuple[Guest, ic.Service, int, ic.Message]] = []
        self.clients: dict[str, Guest] = {}
        for service in ANSWERED:
            if not names or service.name in names:
                self.open(service)

    def open(self, service: ic.Service) -> None:
        client = self.kit.guest(f"integration-{service.name}", ring_pages=2)
        self.asked.setdefault(service.name, [])
        self.clients[service.name] = client
        client.answer = lambda packet: self._take(client, service, packet)
        client.open()
        self.kit.run()

    def _take(self, client: Guest, service: ic.Service, packet: HostPacket) -> bytes:
        message = ic.parse(unframe(packet.payload))
        self.asked[service.name].append(message)
        self.unanswered.append((client, service, packet.transaction, message))
        if not self.silent:
            self.answer()
        return b""

    def answer(self) -> None:
        """Answer all that was asked."""
        while self.unanswered:
            client, service, transaction, message = self.unanswered.pop(0)
            self.send(client, self.linux.answer(service, message), transaction)

    def send(self, client: Guest, message: ic.Message, transaction: int = 0) -> None:
        client.channel.allocate_packet().send(frame(message.pack()), wait_for_completion=False, transaction=transaction)
