"""Errors that callbacks of providers raise: counted, named, the end of what hangs on them, and of a test in the kit."""

from __future__ import annotations

import logging
import socket
from concurrent.futures import Future
from typing import Any
from uuid import UUID

import pytest

from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.server import ServerChannel
from vmbus.providers import Provider
from vmbus.providers.faults import MOST_KINDS, Faults, naming, observed
from vmbus.testkit import ContractViolation, ProviderTest

TYPE = UUID("3d2f4f5e-52b8-4b86-9a2d-0c0f6d6f9d02")


class Careless(Provider):
    """Keeps each request, and raises where the request says."""

    kind = "careless"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.channel = ServerChannel(TYPE, self.instance, name=self.name)
        self.ours, self.theirs = socket.socketpair()

    def start(self) -> None:
        self.channel.set_process_packet_callbacks(self._process)
        self.host.add_channel(self.channel)
        self.channel.enable()
        self.channel.start()

    def stop(self) -> None:
        self.host.remove_reader(self.ours.fileno())
        self.host.remove_writer(self.ours.fileno())
        self.ours.close()
        self.theirs.close()

    def _raise(self, *_: Any) -> None:
        raise ValueError("on purpose")

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        where = payload.rstrip(b"\0").decode()
        if where == "echo":
            completion.complete(payload)
        elif where == "done":
            self.host.run_blocking(lambda: None, self._raise)
        elif where == "soon":
            self.host.call_soon(self._raise)
        elif where == "timer":
            self.host.call_later(1.0, self._raise)
        elif where == "reader":
            self.host.add_reader(self.ours.fileno(), self._raise)
            self.theirs.send(b"x")
        elif where == "writer":
            self.host.add_writer(self.ours.fileno(), self._raise)

    def command(self, name: str, arguments: Any) -> Future[dict[str, Any]]:
        self.host.call_soon(self._raise)
        return Future()


WHERE = {
    "done": "done of run_blocking",
    "soon": "a call of call_soon",
    "timer": "a scheduled call",
    "reader": "the call of add_reader",
    "writer": "the call of add_writer",
}


@pytest.mark.parametrize("where", WHERE)
def test_fault_t1_whatever_raises_fails_the_test_and_the_channel_that_hangs_on_it(where: str) -> None:
    with ProviderTest(Careless) as kit:
        guest = kit.open()
        request = guest.send(where.encode())
        with pytest.raises(ValueError, match="on purpose") as caught:
            kit.advance(2.0)
        assert any(WHERE[where] in note for note in caught.value.__notes__)
        kit.run()
        assert request.done and not guest.is_open
        # A save later finds nothing that is held.
        kit.save_restore()


@pytest.mark.parametrize("where", WHERE)
def test_a_test_that_expects_it_goes_on(where: str) -> None:
    with ProviderTest(Careless) as kit:
        guest = kit.open()
        with kit.expect_errors() as errors:
            guest.send(where.encode())
            kit.advance(2.0)
        (error,) = errors
        assert isinstance(error, ValueError)
        kit.open()
        assert guest.request(b"echo").rstrip(b"\0") == b"echo"


def test_a_channel_that_the_guest_is_closing_is_closed_by_it() -> None:
    with ProviderTest(Careless) as kit:
        guest = kit.open()
        request = guest.send(b"timer")
        kit.run()
        with kit.expect_errors():
            guest.close()
            kit.advance(2.0)
        assert request.done and kit.provider.channel.state is ChannelState.CLOSED  # type: ignore[attr-defined]
        kit.open()
        assert guest.request(b"echo").rstrip(b"\0") == b"echo"


def test_expecting_what_does_not_come_fails() -> None:
    with ProviderTest(Careless) as kit:
        guest = kit.open()
        match = "expected: a callback of provider careless that raises"
        with pytest.raises(ContractViolation, match=match), kit.expect_errors():
            guest.request(b"echo")
        with pytest.raises(ValueError, match="on purpose"):
            guest.send(b"soon")
            kit.run()


def test_errors_are_counted_by_kind_and_what_is_kept_and_logged_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    faults, ended, waited = Faults("one"), list[str](), list[str]()
    faults.on_raised = ended.append
    seen: list[tuple[str, str]] = []
    with observed(lambda name, callback, error: seen.append((name, callback))), caplog.at_level(logging.ERROR):
        with faults.waiting(waited.append):
            for _ in range(3):
                faults.raised("a call", ValueError("again"))
        faults.seen("process_packet", KeyError("told by KMCL"))
    assert faults.count == 4 and [(one.callback, one.times) for one in faults.list] == [
        ("a call", 3),
        ("process_packet", 1),
    ]
    cause = "a call of provider one raised ValueError('again')"
    assert ended == [cause] * 3 == waited and seen == [("one", "a call")] * 3 + [("one", "process_packet")]
    for number in range(10_000):
        faults.seen("a guest's doing", ValueError(f"{number}" * 200))
    assert faults.count == 10_004 and len(faults.list) == MOST_KINDS
    assert max(len(one.error) for one in faults.list) < 500
    assert len(caplog.records) < 40
    after = Faults("one")
    after.inherit(faults)
    assert after.count == faults.count and after.list == faults.list


def test_a_callback_is_named() -> None:
    from functools import partial

    assert naming("a timer", Careless.stop) == "a timer (Careless.stop)"
    assert naming("a timer", partial(Careless.stop, None)) == "a timer (Careless.stop)"  # type: ignore[arg-type]
