"""One way to test: the same tests of a provider in the kit, over a device server in this process, and in a VM. What is
different is the fixture's name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.bell import BELL_TYPE, NUMBER, Bell
from vmbus.errors import VmbusError, WaitTimeout
from vmbus.kmcl import Status
from vmbus.testkit import ContractViolation, DeviceUnderTest, Guest
from vmbus.wire.workload import ECHO_TYPE, echo_request, parse_echo_reply, transform

Make = Callable[..., DeviceUnderTest]

WAYS = [
    pytest.param("vmbus_kit", marks=pytest.mark.unit),
    pytest.param("vmbus_loopback", marks=pytest.mark.loopback),
    pytest.param("vmbus_qemu", marks=pytest.mark.vm),
]


@pytest.fixture(params=WAYS)
def make(request: pytest.FixtureRequest) -> Make:
    found: Make = request.getfixturevalue(request.param)
    return found


def echoes(guest: Guest, numbers: range) -> None:
    """Requests of which some are held by the provider, and their answers over whatever happens meanwhile."""
    for number in numbers:
        reply = parse_echo_reply(guest.request(echo_request(number, b"hello", inline=True)))
        assert reply is not None and reply.data == transform(b"hello", number)


def test_echo(make: Make) -> None:
    device = make("echo", options={"hold": 2, "hold_seconds": 0.05})
    guest = device.open(ECHO_TYPE)
    for move in (device.save_restore, device.migrate, device.save_restore):
        first = len(guest.requests)
        requests = {
            number: guest.send(echo_request(number, b"over it", inline=True)) for number in range(first, first + 5)
        }
        move()
        for number, request in requests.items():
            reply = parse_echo_reply(request.wait())
            assert reply is not None and reply.data == transform(b"over it", number)
        content = bytes(range(256)) * 40
        memory = guest.memory(content)
        number = len(guest.requests)
        guest.request(echo_request(number, content, inline=False), external=memory)
        assert memory.data == transform(content, number)
        echoes(guest, range(number + 1, number + 3))
    assert device.saves == 3 and device.status()["tally"]["completed"] == len(guest.requests) == 24


def test_ones_own_provider(make: Make) -> None:
    device = make(Bell, options={"every": 2})
    guest = device.open()
    memory = guest.memory(b"in memory")
    assert guest.request(b"first") == b"FIRST".ljust(8, b"\0")
    assert guest.request(b"second..", external=memory.part(3, 6)) == b"SECOND.."
    assert memory.data == b"in MEMORY"
    packet = guest.receive()
    assert NUMBER.unpack_from(packet.payload) == (2,) and packet.wanted and not packet.completed
    assert device.status() == {"served": 2, "confirmed": 0} and device.in_flight().sent == 1

    # A packet that the guest has, over everything: it is confirmed where the device is then.
    assert device.save_restore().sent == device.migrate().sent == 1
    packet.complete()
    device.wait_until(lambda: device.status()["confirmed"] == 1, what="the confirmation")
    assert not device.in_flight().any and not device.save_restore().any

    # Packets that lie in a ring which nobody reads, and behind it.
    with guest.away():
        assert device.command("ring", times=120) == {"rung": 120}
        device.wait_until(lambda: device.in_flight().queued > 20, what="packets that have no room")
        moved = device.migrate()
    assert moved.queued > 20 and moved.sent > 20 and moved.queued + moved.sent == 120
    for number in range(120):
        packet = guest.receive()
        assert NUMBER.unpack_from(packet.payload) == (number,)
        packet.complete()
    device.wait_until(lambda: device.status()["confirmed"] == 121, what="all confirmations")
    assert guest.unreceived == 0 and guest.request(b"after") == b"AFTER".ljust(8, b"\0")


def test_what_goes_wrong_is_said(make: Make) -> None:
    device = make(Bell, options={"every": 2})
    guest = device.open(BELL_TYPE)
    with pytest.raises(WaitTimeout, match=r"what never comes"):
        device.wait_until(lambda: False, 0.05, "what never comes")
    with pytest.raises(ContractViolation, match=r"a packet sent by the provider on channel .*; 0 have come so far"):
        guest.receive(0.05)
    with pytest.raises(VmbusError, match="no command 'nothing'"):
        device.command("nothing")
    # What was not taken when the channel closes comes back cancelled, and it can be opened again.
    with guest.away():
        request = guest.send(b"x")
        guest.close()
    assert request.done and request.status in (Status.CANCELLED, Status.SUCCESS) and not guest.is_open
    guest.open()
    assert guest.request(b"again...") == b"AGAIN..."
