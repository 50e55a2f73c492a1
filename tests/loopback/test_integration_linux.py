"""The integration services with a guest that behaves as Linux's own drivers and key-value daemon do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from support.hv_utils import FACTS, HvUtils
from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.errors import UsageError, VmbusError
from vmbus.providers.integration.parts import Time
from vmbus.testkit.loopback.harness import LoopbackServer
from vmbus.transport.library import Library
from vmbus.wire import ic
from vmbus_guest.driver import VmbusDriver

INSTANCE = "6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7a10"
VALUES = {"role": "test", "place": "loopback"}


def describe(**options: Any) -> DeviceDescription:
    settings = {"heartbeat_seconds": 0.02, "time_seconds": 0.05, "sync_seconds": 0.2, "values": VALUES, **options}
    providers = [
        ProviderDescription(kind="integration", name="services", instance=INSTANCE, options=settings),
        ProviderDescription(kind="echo", name="echo", instance=INSTANCE[:-1] + "1"),
    ]
    return DeviceDescription(name="vmbus0", providers=providers)


class Guest:
    """Linux's drivers over our driver, in the test's own thread."""

    def __init__(self, library: Library, *, daemon: bool = True, **options: Any) -> None:
        self._library = library
        self._options = options
        self.server = LoopbackServer(describe(**options), library)
        self.boot(daemon=daemon)

    def boot(self, *, daemon: bool = True) -> None:
        """Another one, with the same device."""
        self.function = self.server.function()
        self.driver = VmbusDriver(self.function)
        self.linux = HvUtils(self.driver, daemon=daemon)

    def close(self) -> None:
        self.driver.close(graceful=False)
        self.server.stop()

    def until(self, condition: Callable[[], Any], what: str) -> None:
        self.driver.run_until(lambda: bool(condition()), 20, what)

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """A command to the provider, while the guest runs."""
        return self.command("provider", name="services", command=command, arguments=arguments)

    def command(self, command: str, /, **arguments: Any) -> dict[str, Any]:
        work = asyncio.run_coroutine_threadsafe(self.server.server.command(command, arguments), self.server._loop)
        self.until(work.done, f"the server to do {command!r}")
        return work.result(0)

    def status(self, service: str) -> dict[str, Any]:
        return dict(self.server.command("status")["providers"]["services"][service])

    def save_and_restore(self, away: float) -> None:
        """Into another server; the guest's clock stands still for `away` seconds."""
        state = self.server.save()
        config = bytes.fromhex(self.server.command("pci")["config"])
        self.server.stop()
        self.linux.offset -= away
        self.server = LoopbackServer(describe(**self._options), self._library, restore=state)
        self.function.reconnect(self.server.socket_path, config)
        self.server.command("restore-finish")


@pytest.fixture
def guest(libvfio_user: Library) -> Iterator[Guest]:
    guest = Guest(libvfio_user)
    yield guest
    guest.close()


def test_integration_service_of_linux_over_a_restore(guest: Guest) -> None:
    linux = guest.linux
    guest.until(lambda: linux.heartbeats > 3 and linux.pools[0] == VALUES, "heartbeats, and the description's values")
    # Its way to get answers without the value; its numbers are text.
    guest.ask("kvp-set", key="number", value=4711, type="u32")
    assert linux.pools[0]["number"] == "4711"
    assert guest.ask("kvp-get", key="number", pool="external") == {"value": "4711", "type": "string"}
    assert guest.ask("kvp-get", key="role", pool="external")["value"] == "test"
    assert tuple(guest.ask("kvp-list", pool="auto")["values"]) == FACTS
    for command, arguments, message in (
        ("kvp-get", {"key": "nothing", "pool": "external"}, "no key 'nothing'"),
        ("kvp-delete", {"key": "nothing"}, "no key 'nothing'"),
        ("kvp-set", {"key": "OSName", "value": "x", "pool": "auto"}, "refused to set key 'OSName'"),
    ):
        with pytest.raises(UsageError, match=message):
            guest.ask(command, **arguments)
    assert guest.ask("kvp-delete", key="number") == {"told": True}
    sequence = guest.status("heartbeat")["sequence"]
    guest.save_and_restore(3600)
    guest.until(lambda: abs(linux.offset) < 1, "the new time")
    assert guest.ask("kvp-list", pool="external")["values"] == VALUES, "not told twice, and nothing lost"
    beats = guest.status("heartbeat")["beats"]
    guest.until(lambda: guest.status("heartbeat")["beats"] > beats + 2, "more heartbeats")
    heartbeat = guest.status("heartbeat")
    assert heartbeat["wrong"] == 0 and sequence < heartbeat["sequence"] <= linux.heartbeats, "their numbers go on"
    assert guest.ask("shutdown", mode="restart", force=True) == {"accepted": True, "status": 0}
    assert guest.ask("shutdown", mode="hibernate")["status"] == ic.IcStatus.FAIL
    assert linux.ended == [3] and linux.overrun == 0
    for name in ("heartbeat", "shutdown", "time", "kvp"):
        status = guest.status(name)
        assert status["stray"] == status["unanswered"] == 0 and status["phase"] == "ready", status


@pytest.mark.parametrize("step", [-1e9, 1e9])
def test_integration_service_of_linux_is_put_right_whatever_its_clock_did(guest: Guest, step: float) -> None:
    guest.until(lambda: guest.linux.sets, "the time at the start")
    guest.linux.offset += step
    before = guest.linux.samples
    guest.until(lambda: abs(guest.linux.offset) < 1, "its clock to be right again")
    guest.until(lambda: guest.linux.samples > before, "samples between")


def test_sabotage_a_guest_that_is_only_given_samples_stays_wrong(
    libvfio_user: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = Guest(libvfio_user, sync_seconds=0)
    try:
        guest.until(lambda: guest.linux.sets, "the time at the start")
        guest.linux.offset = 1e6
        guest.until(lambda: guest.linux.samples > 10, "samples")
        assert guest.linux.offset == 1e6
        # Over a restore, too.
        told = Time.tell
        monkeypatch.setattr(Time, "tell", lambda time, flag, done=None: told(time, ic.TimeFlag.SAMPLE, done))
        guest.save_and_restore(3600)
        before = guest.linux.samples
        guest.until(lambda: guest.linux.samples > before + 10, "samples")
        assert guest.linux.offset == 1e6 - 3600
    finally:
        guest.close()


def test_integration_service_of_linux_that_boots_again_or_is_offered_anew(guest: Guest) -> None:
    """Each time it is told what the host wants it to know."""
    guest.ask("kvp-set", key="kept", value="x")
    for _ in range(2):
        guest.driver.close(graceful=False)  # it dies
        assert guest.server.command("provider", name="services", command="kvp-set", arguments={"key": "n", "value": 1})
        with pytest.raises(UsageError, match="shutdown service is not there: it has not opened the channel"):
            guest.server.command("provider", name="services", command="shutdown")
        guest.boot()
        guest.until(lambda: guest.linux.pools[0] == VALUES | {"kept": "x", "n": "1"}, "the values")
    assert guest.command("rescind", name="services")["released"]
    again = describe().providers[0]
    guest.command("offer", provider=msgspec.to_builtins(again))
    before = guest.linux.heartbeats
    guest.until(lambda: guest.linux.heartbeats > before + 2, "heartbeats of the new provider")
    assert guest.status("heartbeat")["beats"] >= 1


def test_integration_service_of_linux_before_its_daemon_has_come(libvfio_user: Library) -> None:
    """Nothing is read until then, not even the negotiation; over a restore, too."""
    guest = Guest(libvfio_user, daemon=False, answer_seconds=0.1)
    try:
        linux = guest.linux
        with pytest.raises(VmbusError, match="perhaps its daemon does not run"):
            guest.ask("kvp-list")
        guest.save_and_restore(0)
        for number in range(5):
            assert guest.ask("kvp-set", key="early", value=number) == {"told": False}
        with pytest.raises(VmbusError, match="perhaps its daemon does not run"):
            guest.ask("kvp-list")
        assert guest.status("kvp")["sent"] == 1, "the negotiation, once"
        linux.start_daemon()
        guest.until(lambda: linux.pools[0] == VALUES | {"early": "4"}, "the values of the host's")
        assert linux.overrun == 0 and guest.status("kvp")["stray"] == 0
        # A daemon that is slower than anybody waits: it is never asked two things at once.
        linux.busy = 0.3
        for _ in range(3):
            with pytest.raises(VmbusError, match="vain"):
                guest.ask("kvp-list")
        deadline = time.monotonic() + linux.busy
        guest.until(lambda: time.monotonic() > deadline, "the daemon to be slow")
        linux.busy = None
        linux.go_on()
        assert guest.ask("kvp-get", key="role", pool="external")["value"] == "test"
        assert linux.overrun == 0
    finally:
        guest.close()
