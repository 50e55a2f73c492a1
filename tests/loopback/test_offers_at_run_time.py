"""Providers that come and go over the control socket, and providers that wait, on a real server."""

import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from support import pace
from support.multi import MULTI_TYPE, Guest, MultiProvider
from support.traffic import Echo
from vmbus import providers
from vmbus.device.description import DeviceDescription
from vmbus.errors import UsageError, WaitTimeout
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.server import ServerChannel
from vmbus.testkit.loopback.function import LoopbackFunction
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.transport.library import Library
from vmbus_guest.driver import VmbusDriver

NEW = {"kind": "multi", "name": "new", "instance": "00000000-0000-4000-8000-0000000000aa"}


class WaitingProvider(MultiProvider):
    """Answers b"wait" when its timer has run out, having waited for it inside of the packet callback; b"loop" after a
    round trip to itself over a local offer."""

    kind = "waiting"

    def start(self) -> None:
        super().start()
        self.inner = ServerChannel(MULTI_TYPE, self.instance, name="inner")
        self.inner.set_server_flags(1)
        self.inner.set_process_packet_callbacks(lambda channel, completion, payload: completion.complete(payload[::-1]))
        self.host.add_channel(self.inner)
        self.inner.enable()
        self.inner.start()
        self.client = ClientChannel(MULTI_TYPE, name="inner client")
        self.host.add_client(self.client)
        self.client.enable()

    def _opened(self, channel: Channel) -> None:
        super()._opened(channel)
        if getattr(self, "wait_in_open", False):
            assert self.channel.waiter is not None
            self.channel.waiter(lambda: False, 1.0, "what cannot come")

    def _process(self, channel: Channel, completion: Completion, payload: bytes) -> None:
        assert channel.waiter is not None
        done: list[bytes] = []
        if payload[:4] == b"wait":
            self.host.call_later(0.02, lambda: done.append(b"timer..."))
            channel.waiter(lambda: bool(done), 5.0, "the timer")
            completion.complete(done[0])
        elif payload[:4] == b"bell":
            # Another channel's packet has to be served meanwhile.
            channel.waiter(lambda: len(self.subs) > 0, 5.0, "a sub-channel")
            completion.complete(b"ding")
        elif payload[:4] == b"late":
            try:
                channel.waiter(lambda: False, 0.05, "what never comes")
            except WaitTimeout as error:
                completion.complete(str(error).encode())
        elif payload[:4] == b"loop":
            completion.complete(self.client.send_synchronous_request(b"12345678", timeout=5.0))
        else:
            super()._process(channel, completion, payload)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(providers.PROVIDERS, "multi", MultiProvider)
    monkeypatch.setitem(providers.PROVIDERS, "waiting", WaitingProvider)


@pytest.fixture
def server(libvfio_user: Library) -> Iterator[LoopbackServer]:
    with LoopbackServer(describe("echo"), libvfio_user) as server:
        yield server


def description(server: LoopbackServer) -> DeviceDescription:
    return msgspec.convert(server.command("status")["description"], DeviceDescription)


class Background:
    """A command whose answer comes later, while the guest runs on."""

    def __init__(self, server: LoopbackServer, command: str, **arguments: Any) -> None:
        self.result: Any = None

        def run() -> None:
            try:
                self.result = server.command(command, **arguments)
            except Exception as error:
                self.result = error

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def finish(self, driver: VmbusDriver) -> Any:
        driver.run_until(lambda: not self.thread.is_alive(), 10, "the command")
        return self.result


def test_a_provider_comes_works_and_goes(server: LoopbackServer) -> None:
    with VmbusDriver(server.function()) as driver:
        for round_ in range(3):
            assert server.command("offer", provider=NEW) == {"name": "new", "relids": [2]}
            assert [one.name for one in description(server).providers] == ["echo", "new"]
            guest = Guest(driver)
            guest.ask(b"push", 100)
            guest.ask(b"subs", 1)
            driver.run_until(lambda g=guest: len(g.got) == 100, 5, "the packets")
            sub = Guest(driver, 1)
            command = Background(server, "rescind", name="new")
            assert command.finish(driver)["released"] is True
            assert guest.channel.state is sub.channel.state is ChannelState.DISABLED
            assert len(driver.rescinded) == 2 * (round_ + 1)
            assert [one.name for one in description(server).providers] == ["echo"]
            assert list(server.command("status")["providers"]) == ["echo"]
        echo = Echo(driver)
        echo.start(50)
        driver.run_until(lambda: echo.finished, 5, "echo")
        echo.check()


def test_without_a_guest_it_goes_at_once(server: LoopbackServer) -> None:
    assert server.command("offer", provider=NEW)["relids"] == [0]
    assert server.command("rescind", name="new")["released"] is True


def test_a_guest_that_does_not_release_is_not_waited_for_longer(server: LoopbackServer) -> None:
    with VmbusDriver(server.function()) as driver:
        server.command("offer", provider=NEW)
        assert server.command("rescind", name="new", seconds=0.05)["released"] is False
        # Offered again: the guest has to release the old one first.
        assert server.command("offer", provider=NEW)["relids"] == [0]
        assert Guest(driver).ask(b"echo")
        assert len(driver.rescinded) == 1


@pytest.mark.parametrize(
    ("provider", "complaint"),
    [
        ({**NEW, "name": "echo"}, "two providers have the same name 'echo'"),
        ({**NEW, "kind": "nothing"}, "there is no provider of kind 'nothing'"),
        ({**NEW, "kind": "../x"}, "not a kind of provider"),
        ({**NEW, "instance": "x"}, "is not a GUID"),
        ({**NEW, "more": 1}, "unknown field `more`"),
        ({**NEW, "options": {"force_new": 7}}, "force_new"),
        ({"kind": "multi"}, "missing required field"),
        ("multi", "Expected `object`"),
    ],
)
def test_bad_offers_change_nothing(server: LoopbackServer, provider: Any, complaint: str) -> None:
    before = server.command("inspect")
    with pytest.raises(UsageError, match=complaint):
        server.command("offer", provider=provider)
    after = server.command("inspect")
    for what in ("description", "bus", "channels", "providers"):
        assert before[what] == after[what]


def test_a_provider_that_cannot_start_leaves_nothing(server: LoopbackServer, monkeypatch: pytest.MonkeyPatch) -> None:
    start = MultiProvider.start

    def broken(self: MultiProvider) -> None:
        start(self)
        raise OSError("no disk")

    monkeypatch.setattr(MultiProvider, "start", broken)
    with pytest.raises(UsageError, match="could not be started: OSError"):
        server.command("offer", provider=NEW)
    monkeypatch.undo()
    monkeypatch.setitem(providers.PROVIDERS, "multi", MultiProvider)
    assert len(server.command("inspect")["channels"]) == 1
    server.command("offer", provider=NEW)


def test_bad_rescinds(server: LoopbackServer) -> None:
    with pytest.raises(UsageError, match="there is no provider 'x'"):
        server.command("rescind", name="x")
    with pytest.raises(UsageError, match="is the only one"):
        server.command("rescind", name="echo")
    with pytest.raises(UsageError, match="field 'seconds'"):
        server.command("rescind", name="echo", seconds=-1)
    server.command("pause")
    for command, arguments in (("rescind", {"name": "echo"}), ("offer", {"provider": NEW})):
        with pytest.raises(UsageError, match="needs a server that is running; this one is paused"):
            server.command(command, **arguments)


def test_a_provider_that_does_not_let_go_stays(server: LoopbackServer, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Completion] = []
    monkeypatch.setattr(MultiProvider, "_process", lambda self, channel, completion, payload: held.append(completion))
    with VmbusDriver(server.function()) as driver:
        server.command("offer", provider=NEW)
        guest = Guest(driver)
        replies: list[bytes] = []
        packet = guest.channel.allocate_packet()
        packet.completion_routine = lambda packet, status, reply: replies.append(reply)
        packet.send(b"hold it!")
        driver.run_until(lambda: bool(held), 5, "the packet")
        with pytest.raises(WaitTimeout, match=r"incoming packets \{'new.0': \[1\]\}"):
            server.command("rescind", name="new", seconds=0.05)
        assert [one.name for one in description(server).providers] == ["echo", "new"]
        server.on_loop(lambda: held.pop().complete(b"answered"))
        driver.run_until(lambda: bool(replies), 5, "the answer")
        assert replies == [b"answered"]


@pytest.mark.parametrize("rescinded", [False, True])
def test_a_snapshot_after_a_change_is_restored_with_its_description(libvfio_user: Library, rescinded: bool) -> None:
    function: LoopbackFunction
    with LoopbackServer(describe("echo"), libvfio_user) as old:
        function = old.function()
        driver = VmbusDriver(function)
        old.command("offer", provider=NEW)
        guest = Guest(driver)
        guest.ask(b"subs", 1)
        echo = Echo(driver)
        if rescinded:
            old.command("offer", provider={**NEW, "name": "other", "instance": NEW["instance"][:-2] + "bb"})
            old.command("rescind", name="other", seconds=0.0)  # the guest has not released it at the save
        what = description(old)
        state = old.save()
        assert [record.withdrawn for record in state.bus.offers].count(True) == rescinded
    with LoopbackServer(what, libvfio_user, restore=state) as new:
        function.reconnect(new.socket_path, state.config)
        new.command("restore-finish")
        assert description(new) == what
        assert guest.ask(b"echo") and Guest(driver, 1).ask(b"echo")
        echo.start(20)
        driver.run_until(lambda: echo.finished, 5, "echo")
        assert len(driver.rescinded) == rescinded
        driver.close()


# ---- waiting ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def waiting(libvfio_user: Library) -> Iterator[LoopbackServer]:
    with LoopbackServer(describe("waiting", "echo"), libvfio_user) as server:
        yield server


def test_a_provider_waits_in_a_callback(waiting: LoopbackServer) -> None:
    with VmbusDriver(waiting.function()) as driver:
        guest = Guest(driver)
        assert guest.ask(b"wait") == b"timer..."
        assert guest.ask(b"loop").rstrip(b"\0") == b"87654321"
        assert b"waited 0.05 s in vain for what never comes" in guest.ask(b"late")
        assert guest.ask(b"echo")


def test_others_are_served_while_one_waits(waiting: LoopbackServer) -> None:
    with VmbusDriver(waiting.function()) as driver:
        guest = Guest(driver)
        echo = Echo(driver)
        provider = waiting.server.providers[0]
        assert isinstance(provider, WaitingProvider)
        replies: list[bytes] = []
        packet = guest.channel.allocate_packet()
        packet.completion_routine = lambda packet, status, reply: replies.append(reply)
        packet.send(b"bell")
        echo.start(200)
        driver.run_until(lambda: echo.finished, 5, "echo, while the other provider waits")
        echo.check()
        assert not replies
        # The event loop waits too, so only what runs inside of the wait can end it.
        provider.subs.append(provider.channel)
        driver.run_until(lambda: bool(replies), 6, "the end of the wait")
        provider.subs.clear()


def test_no_waiting_inside_a_request_of_the_guests(waiting: LoopbackServer, caplog: pytest.LogCaptureFixture) -> None:
    provider = waiting.server.providers[0]
    provider.wait_in_open = True  # type: ignore[attr-defined]
    with VmbusDriver(waiting.function()) as driver:
        with pytest.raises(Exception, match="refused to open"):
            Guest(driver)
        assert "a request of the guest's is being handled" in caplog.text
        provider.wait_in_open = False  # type: ignore[attr-defined]
        assert Guest(driver).ask(b"echo")


def test_provider_timers_run_in_order_and_can_be_cancelled(server: LoopbackServer) -> None:
    timers = server.server.timers
    seen: list[int] = []
    done = threading.Event()

    def set_up() -> None:
        timers.call_later(0.03, lambda: (seen.append(3), done.set()))
        timers.call_later(0.01, lambda: seen.append(1))
        timers.call_later(0.02, lambda: 1 / 0)
        timers.call_later(0.015, lambda: seen.append(9)).cancel()
        timers.call_later(0.0, lambda: seen.append(0))

    server.on_loop(set_up)
    assert done.wait(pace.seconds(5))
    assert seen == [0, 1, 3]
    assert server.on_loop(timers.next_in) is None
