"""Errors of providers on a real server: in `status` and `inspect`, and the end of what hangs on them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any
from uuid import UUID

import msgspec
import pytest

from support import pace
from vmbus import providers
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.server import ServerChannel
from vmbus.providers import Provider
from vmbus.providers.base import Bound
from vmbus.providers.faults import ProviderRaised
from vmbus.testkit.loopback.harness import describe
from vmbus.testkit.loopback.pair import LoopbackPair
from vmbus.transport.library import Library
from vmbus.transport.migration import MigrationRefused, MigrationState

TYPE = UUID("3d2f4f5e-52b8-4b86-9a2d-0c0f6d6f9d03")


class Careless(Provider):
    """Keeps requests; once `go` is set, `done` of the work for b"done" raises. b"wait" waits inside, for ever."""

    kind = "careless"
    alive: list[Careless] = []  # noqa: RUF012 - all that were made

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.go = threading.Event()
        self.raises: set[str] = set()
        self.waited: list[BaseException] = []
        self.channel = ServerChannel(TYPE, self.instance, name=self.name)
        Careless.alive.append(self)

    def start(self) -> None:
        self.channel.set_process_packet_callbacks(self._process)
        self.channel.set_incoming_processing_at_passive(True)
        self.host.add_channel(self.channel)
        self.channel.enable()
        self.channel.start()

    def stop(self) -> None:
        self._raise_in("stop")

    def activate(self) -> None:
        self._raise_in("activate")

    def deactivate(self) -> None:
        self._raise_in("deactivate")

    def status(self) -> dict[str, Any]:
        self._raise_in("status")
        return {}

    def bounds(self) -> dict[str, Bound]:
        return {"patience": Bound(1, 2, 3)}

    def _raise_in(self, name: str) -> None:
        if name in self.raises:
            raise ValueError(f"{name} on purpose")

    def _done(self, *_: Any) -> None:
        raise ValueError("on purpose")

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        what = payload.rstrip(b"\0")
        if what == b"echo":
            completion.complete(payload)
        elif what == b"done":
            self.host.run_blocking(lambda: self.go.wait(pace.seconds(20)), self._done)
        elif what == b"wait":
            self.host.call_later(0.05, lambda: self._done())
            try:
                assert self.channel.waiter is not None
                self.channel.waiter(lambda: False, 20.0, "nothing")
            except BaseException as error:
                self.waited.append(error)

    def command(self, name: str, arguments: Any) -> Any:
        if name == "raise":
            self._done()
        self.host.call_later(0.05, lambda: self._done())
        return Future()


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, libvfio_user: Library) -> Iterator[LoopbackPair]:
    monkeypatch.setitem(providers.PROVIDERS, "careless", Careless)
    with LoopbackPair(describe("careless", "echo"), libvfio_user) as pair:
        yield pair
    Careless.alive.clear()


def provider_of(pair: LoopbackPair) -> Careless:
    found: Any = pair.server.server.providers[0]
    assert isinstance(found, Careless)
    return found


def faults_of(pair: LoopbackPair, name: str = "careless") -> dict[str, Any]:
    return dict(pair.server.command("status")["faults"].get(name, {}))


def test_it_is_counted_named_and_the_channel_that_holds_packets_fails(pair: LoopbackPair) -> None:
    guest = pair.open(TYPE)
    request = guest.send(b"done")
    assert pair.server.command("status")["faults"] == {}
    pair.wait_until(lambda: pair.server.command("status")["incoming_held"] == 1, 10, "the provider to have the request")
    provider_of(pair).go.set()
    pair.wait_until(lambda: request.done, 10, "the channel's end")
    (error,) = faults_of(pair)["errors"]
    assert error["callback"] == "done of run_blocking (Careless._done)" and error["times"] == 1
    assert error["error"] == "ValueError('on purpose')"
    document = msgspec.to_builtins(pair.server.command("inspect"))
    shown = next(one for one in document["providers"] if one["name"] == "careless")
    assert shown["errors"] == 1 and shown["faults"][0]["error"] == error["error"]
    assert shown["bounds"]["patience"] == {"now": 1, "most": 2, "reached": 3}
    assert pair.server.command("status")["bounds"]["careless"]["work that waits"] == {
        "now": 0,
        "most": 1024,
        "reached": 0,
    }
    # The other provider and a save do not care.
    pair.save_restore()


def test_a_pause_that_waits_for_it_ends_with_the_cause(pair: LoopbackPair) -> None:
    guest = pair.open(TYPE)
    guest.send(b"done")
    pair.wait_until(lambda: pair.server.command("status")["incoming_held"] == 1, 10, "the provider to have the request")
    timer = threading.Timer(0.1, provider_of(pair).go.set)
    timer.start()
    began = time.monotonic()
    with pytest.raises(ProviderRaised, match=r"done of run_blocking \(Careless._done\) of provider careless raised"):
        pair.server.command("pause", seconds=20.0)
    assert time.monotonic() - began < pace.seconds(10) and pair.server.command("status")["phase"] == "running"
    pair.server.command("pause", seconds=5.0)
    pair.server.command("resume")


def test_a_client_that_stops_the_device_is_told_the_cause(pair: LoopbackPair) -> None:
    guest = pair.open(TYPE)
    guest.send(b"done")
    pair.wait_until(lambda: pair.server.command("status")["incoming_held"] == 1, 10, "the provider to have the request")
    threading.Timer(0.2, provider_of(pair).go.set).start()
    server = pair.server.server

    def stop() -> Any:
        try:
            server.driven._stop()
        except MigrationRefused as error:
            return error
        return None

    refused = pair.server.on_loop(stop, 20)
    assert refused is not None and "raised ValueError('on purpose')" in str(refused)
    assert "the device runs on" in str(refused)
    assert MigrationState.RUNNING is server.driven.state


def test_a_command_and_a_blocking_wait_end_with_the_cause(pair: LoopbackPair) -> None:
    guest = pair.open(TYPE)
    with pytest.raises(ProviderRaised, match=r"raised ValueError\('on purpose'\); 'later' has no answer"):
        pair.server.command("provider", name="careless", command="later", seconds=20.0)
    with pytest.raises(ProviderRaised, match=r"command 'raise' of provider 'careless' raised ValueError"):
        pair.server.command("provider", name="careless", command="raise")
    guest.send(b"wait")
    provider = provider_of(pair)
    pair.wait_until(lambda: bool(provider.waited), 10, "the end of the wait")
    (error,) = provider.waited
    assert isinstance(error, ProviderRaised) and "nothing is left to wait for (nothing)" in str(error)
    assert faults_of(pair)["count"] == 3


def test_what_the_server_calls_is_counted_too(pair: LoopbackPair) -> None:
    provider = provider_of(pair)
    provider.raises = {"status"}
    assert pair.server.command("status")["providers"]["careless"] == {
        "problem": "status() raised ValueError('status on purpose')"
    }
    provider.raises = {"deactivate"}
    with pytest.raises(Exception, match="deactivate on purpose"):
        pair.server.command("pause")
    assert {one["callback"] for one in faults_of(pair)["errors"]} == {"status", "deactivate"}
