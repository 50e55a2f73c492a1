"""The integration services on a real device server: the guest's service answers, over saves, restores and rescinds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.integration import FakeService, make_service
from vmbus.description import DeviceDescription, ProviderDescription
from vmbus.errors import UsageError, VmbusError
from vmbus.kmcl.pipe import frame
from vmbus.kmcl.settings import FLAG_IS_PIPE
from vmbus.loopback.harness import LoopbackServer
from vmbus.qemu.description import load_description
from vmbus.vfio_user.library import Library
from vmbus.wire import ic
from vmbus_guest.driver import VmbusDriver

pytestmark = pytest.mark.loopback

INSTANCE = "6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7a10"


def describe(**options: Any) -> DeviceDescription:
    settings = {"heartbeat_seconds": 0.02, "time_seconds": 0.05, **options}
    providers = [
        ProviderDescription(kind="integration", name="services", instance=INSTANCE, options=settings),
        ProviderDescription(kind="echo", name="echo", instance=INSTANCE[:-1] + "1"),
    ]
    return DeviceDescription(name="vmbus0", providers=providers)


class Guest:
    """The service over a driver, in the test's own thread."""

    def __init__(self, server: LoopbackServer, directory: Path) -> None:
        self.server = server
        self.function = server.function()
        self.driver = VmbusDriver(self.function)
        self.service: FakeService = make_service(directory)
        self.service.open(self.driver)
        self.driver.on_rescind = self.service.rescinded
        self.closed = False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.driver.close(graceful=False)

    def until(self, condition: Callable[[], Any], what: str) -> None:
        self.driver.run_until(lambda: bool(condition()), 20, what)

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """A command to the provider, while the guest's driver runs."""
        return self.command("provider", name="services", command=command, arguments=arguments)

    def command(self, command: str, /, **arguments: Any) -> dict[str, Any]:
        work = asyncio.run_coroutine_threadsafe(self.server.server._command(command, arguments), self.server._loop)
        self.until(work.done, f"the server to do {command!r}")
        return work.result(0)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.server.command("status")["providers"]["services"]
        return found


@pytest.fixture
def guest(libvfio_user: Library, tmp_path: Path) -> Iterator[Guest]:
    with LoopbackServer(describe(values={"role": "test"}), libvfio_user) as server:
        guest = Guest(server, tmp_path / "kvp")
        yield guest
        guest.close()


def test_the_whole_story(guest: Guest, libvfio_user: Library) -> None:
    service = guest.service
    guest.until(lambda: service.done["heartbeats"] >= 3 and service.done["syncs"] >= 1, "heartbeats and the time")
    guest.until(lambda: "role" in service.store.values("external"), "the description's values")
    assert guest.ask("heartbeat")["alive"]
    assert guest.ask("kvp-set", key="colour", value="blue") == {}
    service.store.set("guest", "answer", "42")
    assert guest.ask("kvp-get", key="answer")["value"] == "42"
    assert guest.ask("kvp-list", pool="auto")["values"]["OSName"] == "Fake"
    assert service.store.values("external") == {"role": (1, "test"), "colour": (1, "blue")}

    # Saved and restored in another server; the guest was away for an hour.
    before = service.done["heartbeats"]
    state = guest.server.save()
    config = bytes.fromhex(guest.server.command("pci")["config"])
    sequence = guest.status()["heartbeat"]["sequence"]
    guest.server.stop()
    service.fake.time -= 3600
    syncs = service.done["syncs"]
    server = LoopbackServer(describe(values={"role": "test"}), libvfio_user, restore=state)
    try:
        guest.server = server
        guest.function.reconnect(server.socket_path, config)
        server.command("restore-finish")
        guest.until(lambda: service.done["syncs"] > syncs, "the new time")
        assert service.largest_offset > 3000
        guest.until(lambda: service.done["heartbeats"] >= before + 3, "more heartbeats")
        status = guest.status()
        assert status["heartbeat"]["sequence"] > sequence and status["heartbeat"]["wrong"] == 0
        assert all(part["stray"] == 0 and part["phase"] == "ready" for part in status.values())
        assert guest.ask("kvp-get", key="answer")["value"] == "42"
        assert guest.ask("shutdown", force=True) == {"accepted": True, "status": 0}
        service.tick(0)
        assert service.fake.ends == [(False, True)]
    finally:
        guest.close()
        server.stop()


def test_it_survives_a_rescind_and_a_new_offer(guest: Guest) -> None:
    service = guest.service
    guest.until(lambda: service.done["heartbeats"], "a heartbeat")
    assert guest.command("rescind", name="services")["released"]
    assert service.counts()["open"] == 0 and service.reopened == 4
    again = describe().providers[0]
    provider = {"kind": again.kind, "name": again.name, "instance": again.instance, "options": again.options}
    guest.command("offer", provider=provider)
    before = service.done["heartbeats"]
    guest.until(lambda: service.done["heartbeats"] > before + 2, "heartbeats of the new provider")
    assert guest.ask("heartbeat")["beats"] >= 1


def test_a_guest_that_is_not_there_and_one_that_comes_back(libvfio_user: Library, tmp_path: Path) -> None:
    with LoopbackServer(describe(), libvfio_user) as server:
        with pytest.raises(UsageError, match="is not there: it has not opened the channel"):
            server.command("provider", name="services", command="shutdown")
        for _ in range(3):  # a driver that is killed, and starts again
            guest = Guest(server, tmp_path / "kvp")
            guest.until(lambda guest=guest: guest.service.done["heartbeats"] > 1, "heartbeats")  # type: ignore[misc]
            guest.driver.close(graceful=False)


def test_hostile_bytes_cost_one_channel(guest: Guest) -> None:
    guest.until(lambda: guest.service.done["heartbeats"], "a heartbeat")
    channel = next(one for one in guest.service.channels if one.interface_type == ic.TIME.interface_type)
    guest.service._stopped = True  # so that it does not come back
    channel.allocate_packet().send(frame(b"\xff" * 64), wait_for_completion=False)
    guest.until(lambda: not channel.active, "the channel to be withdrawn")
    assert guest.status()["time"]["phase"] == "closed"
    assert guest.ask("kvp-list", pool="auto")["values"]
    before = guest.service.done["heartbeats"]
    guest.until(lambda: guest.service.done["heartbeats"] > before + 2, "heartbeats")


def test_a_guest_that_answers_nothing_is_asked_little(libvfio_user: Library) -> None:
    with LoopbackServer(describe(answer_seconds=0.05, services=["heartbeat", "kvp"]), libvfio_user) as server:
        driver = VmbusDriver(server.function())
        taken: list[ic.Message] = []
        for service in (ic.HEARTBEAT, ic.KVP):
            channel = driver.client_channel(service.interface_type, name=service.name)
            channel.set_flags(FLAG_IS_PIPE)
            channel.set_process_packet_callbacks(
                lambda channel, completion, payload: (taken.append(ic.parse(payload[8:])), completion.complete())
            )
            driver.enable(channel)
        driver.run_until(lambda: len(taken) == 2, 10, "two negotiations")
        for _ in range(64):
            with pytest.raises(VmbusError, match="vain"):
                server.command("provider", name="services", command="kvp-list", seconds=0.0)
        with pytest.raises(UsageError, match="does not answer: 64 requests wait"):
            server.command("provider", name="services", command="kvp-list", seconds=5)
        driver.step(0.2)
        assert [one.kind for one in taken] == [0, 0], "nothing but the negotiation, once"
        assert server.command("pause")["incoming_held"] == 0
        driver.close(graceful=False)


def test_the_description_that_comes_with_the_project() -> None:
    path = Path(__file__).resolve().parents[2] / "qemu_configs" / "services.toml"
    description = load_description(path)
    assert description.guest.services == ["integration"]
    assert [one.kind for one in description.device.providers] == ["integration"]
