"""A guest's integration service without a guest: a system that only notes what would be done to it, and the service's
end of the channels in the test kit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vmbus.kmcl.pipe import frame, unframe
from vmbus.testkit import ProviderTest
from vmbus.testkit.client import Client, HostPacket
from vmbus.wire import ic
from vmbus_guest.services.integration import ANSWERED, IntegrationService
from vmbus_guest.testdrivers.context import Parameters


class FakeSystem:
    """Notes what is done. `lag`: how far behind its clock is; setting it mends that."""

    def __init__(self) -> None:
        self.time = 1_000_000.0
        self.sets: list[float] = []
        self.ends: list[tuple[bool, bool]] = []

    def now(self) -> float:
        return self.time

    def set_clock(self, seconds: float) -> None:
        if seconds > 1e12:
            raise OverflowError
        self.sets.append(seconds)
        self.time = seconds

    def end(self, *, restart: bool, force: bool) -> None:
        self.ends.append((restart, force))

    def facts(self) -> dict[str, str]:
        return {"OSName": "Fake", "FullyQualifiedDomainName": "guest.test"}


class FakeService(IntegrationService):
    """The service on a fake system."""

    def __init__(self, parameters: Parameters) -> None:
        self.fake = FakeSystem()
        super().__init__(parameters)

    def make_system(self) -> FakeSystem:
        return self.fake


def make_service(directory: Path, **parameters: Any) -> FakeService:
    return FakeService(Parameters({"directory": str(directory), **parameters}))


class KitGuest:
    """The service's ends of an integration provider's channels in the test kit. While `silent` it answers nothing."""

    def __init__(self, kit: ProviderTest, directory: Path, *names: str) -> None:
        self.kit = kit
        self.service = make_service(directory)
        self.silent = False
        self.asked: dict[str, list[ic.Message]] = {}
        self.unanswered: list[tuple[Client, ic.Service, int, ic.Message]] = []
        self.clients: dict[str, Client] = {}
        for service in ANSWERED:
            if not names or service.name in names:
                self.open(service)

    def open(self, service: ic.Service) -> None:
        client = self.kit.client(f"integration-{service.name}", ring_pages=2)
        self.asked.setdefault(service.name, [])
        self.clients[service.name] = client
        client.answer = lambda packet: self._take(client, service, packet)
        client.open()
        self.kit.run()

    def _take(self, client: Client, service: ic.Service, packet: HostPacket) -> bytes:
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
            self.send(client, self.service._answer(service, message), transaction)

    def send(self, client: Client, message: ic.Message, transaction: int = 0) -> None:
        client.channel.allocate_packet().send(frame(message.pack()), wait_for_completion=False, transaction=transaction)
