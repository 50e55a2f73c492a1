"""The network provider on real channels with a scripted guest and a cable: frames, queues, link, bad guests, saves."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import msgspec
import pytest

from support.nic import GUEST, PEER, CabledNetwork, Guest, frame, number_of, udp
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.providers.network import NetworkProvider
from vmbus.providers.network.card import ANNOUNCE_AFTER
from vmbus.providers.network.interface import Port
from vmbus.testkit import ContractViolation, ProviderTest, every_step
from vmbus.wire.ethernet import parse_mac
from vmbus.wire.network import Feature, Frames, Hello, Link, Queues, Status, pack_frames, parse, parse_nic, parse_status

pytestmark = pytest.mark.unit

MAC = "02:00:00:00:00:01"
OPTIONS: dict[str, Any] = {"mac": MAC, "interface": "test0"}


@pytest.fixture(autouse=True)
def cables() -> Iterator[None]:
    yield
    for cable in CabledNetwork.cables.values():
        assert cable.ports == 0, "an interface outlives its device"
        cable.close()
    CabledNetwork.cables.clear()


def network(**options: Any) -> ProviderTest:
    return ProviderTest(CabledNetwork, options=OPTIONS | options)


# ---- HELLO and options -----------------------------------------------------------------------------------------------


def test_hello_tells_what_the_card_is() -> None:
    with network(mtu=9000, queues=4, guest_address="192.0.2.2/24", guest_gateway="192.0.2.1") as kit:
        guest = Guest(kit, queues=2)
        nic = guest.nic
        assert nic is not None
        assert (nic.version, nic.mtu, nic.queues, nic.link, nic.features) == (1, 9000, 2, True, Feature.OFFLOAD)
        assert (nic.mac, nic.interface) == (parse_mac(MAC), "vmnet0")
        assert (nic.address, nic.prefix, nic.gateway) == (b"\xc0\0\2\2", 24, b"\xc0\0\2\1")
        assert guest.cable.offload and guest.cable.carrier
        status = kit.provider.status()
        assert status["guest"]["in_use"] == 2 and status["present"] and status["mac"] == MAC


def test_the_smaller_wish_counts() -> None:
    for options, hello, mtu, features in (
        ({"mtu": 9000}, {"mtu": 1280}, 1280, 1),
        ({"mtu": 1280}, {"mtu": 9000}, 1280, 1),
        ({"mtu": 1500}, {"features": 0}, 1500, 0),
        ({"mtu": 1500, "offload": False}, {}, 1500, 0),
        ({"mtu": 1500}, {"features": 0xFFFF_FFFF, "version": 7}, 1500, 1),
    ):
        with network(**options) as kit:
            guest = Guest(kit)
            changed = parse_nic(guest.primary.request(Hello(**hello).pack()))
            assert changed is not None and (changed.mtu, changed.features) == (mtu, features)
            assert guest.cable.offload is bool(features)


def test_small_rings() -> None:
    with network() as kit:
        guest = Guest(kit, ring_pages=4)
        assert guest.nic is not None and guest.nic.features == 0, "no room for long frames"
    with network(mtu=9000) as kit:
        guest = Guest(kit, ring_pages=1)
        assert guest.nic is None
        assert parse_status(guest.primary.requests[0].reply) == Status.RING_TOO_SMALL


def test_a_card_has_an_address_of_its_own() -> None:
    found = set()
    for number in range(20):
        with ProviderTest(CabledNetwork, instance=UUID(int=number + 1)) as kit:
            provider = kit.provider
            assert isinstance(provider, NetworkProvider)
            again = CabledNetwork(provider.host, "other", provider.instance, {})
            assert again.mac == provider.mac and again.settings == provider.settings
            assert provider.mac[0] & 3 == 2, "locally administered, of one station"
            assert provider.settings.mac[0] == 0xFE and len(provider.settings.name) <= 15
            found |= {provider.mac, provider.settings.mac, provider.settings.name}
    assert len(found) == 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mac": "01:00:5e:00:00:01"}, "single station"),
        ({"mac": "52:54"}, "not an Ethernet address"),
        ({"mtu": 9001}, "mtu"),
        ({"mtu": 67}, "mtu"),
        ({"queues": 17}, "queues"),
        ({"interface": "a" * 16}, "interface"),
        ({"interface": "../x"}, "interface"),
        ({"namespace": "../x"}, "namespace"),
        ({"address": "192.0.2.1/33"}, "192.0.2.1/33"),
        ({"guest_address": "2001:db8::1/64"}, "2001:db8::1"),
        ({"guest_gateway": "nowhere"}, "nowhere"),
        ({"colour": 1}, "colour"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ProviderTest(CabledNetwork, options=options)


def test_an_interface_that_cannot_be_made_fails_the_start() -> None:
    class Refused(NetworkProvider):
        def make_port(self, settings: Any) -> Any:
            raise EnvironmentProblem("no rights")

    with pytest.raises(EnvironmentProblem, match="no rights"):
        ProviderTest(Refused)


# ---- frames ----------------------------------------------------------------------------------------------------------


def test_frames_go_both_ways_in_order() -> None:
    with network() as kit:
        guest = Guest(kit)
        frames = [udp(number, 7, size=number % 100) for number in range(300)]
        guest.cable.push(*frames)
        kit.run()
        assert guest.frames == frames
        assert len(guest.primary.packets) < 30, "several travel together"
        replies = [guest.send(*frames[index : index + 10]) for index in range(0, 300, 10)]
        assert guest.cable.sent == frames
        assert all(parse_status(reply) == Status.OK and reply[4:8] == b"\x0a\0\0\0" for reply in replies)
        assert kit.provider.status()["to_host"] == 300


def test_long_frames_travel_alone() -> None:
    with network() as kit:
        guest = Guest(kit)
        long = struct.pack("<BBHHHH", 1, 1, 54, 1448, 34, 16) + frame(bytes(65500))[10:]
        guest.cable.push(long, udp(1, 1), long)
        kit.run()
        assert guest.frames == [long, udp(1, 1), long]
        assert parse_status(guest.send(long)) == Status.OK and guest.cable.sent == [long]


def test_nobody_reads_the_interface_while_the_guest_takes_nothing() -> None:
    with network(window_kib=64) as kit:
        guest = Guest(kit)
        guest.holding = True
        frames = [udp(number, 7, size=1000) for number in range(400)]
        guest.cable.push(*frames)
        kit.run()
        assert 60 <= len(guest.frames) <= 64
        assert kit.provider.status()["queues"][0]["outstanding"] >= 64 << 10
        guest.release()
        kit.run()
        assert guest.frames == frames
        assert kit.provider.status()["queues"][0]["outstanding"] == 0


def test_a_flow_keeps_its_queue() -> None:
    with network(queues=4) as kit:
        guest = Guest(kit, queues=4)
        frames = [udp(number, 1000 + number % 50) for number in range(1000)]
        for start in range(0, 1000, 250):
            guest.cable.push(*frames[start : start + 250])
            kit.run()
        assert sorted(map(number_of, guest.frames)) == list(range(1000))
        assert len(guest.by_queue) == 4
        homes = {}
        for name, numbers in guest.by_queue.items():
            assert numbers == sorted(numbers)
            for number in numbers:
                assert homes.setdefault(number % 50, name) == name
        assert parse_status(guest.send(frames[0], queue=3)) == Status.OK


def test_sub_channels_wait_for_the_guests_word() -> None:
    with network(queues=3) as kit:
        client = kit.open(0, ring_pages=32, answer=lambda _: b"")
        assert parse_nic(client.request(Hello(queues=3).pack())) is not None
        cable = CabledNetwork.cables[kit._clock]
        for count in (2, 3):
            assert parse_status(client.request(Queues(count).pack())) == Status.INVALID, "they are not open"
        kit.open(1, ring_pages=32, answer=lambda _: b"")
        second = kit.open(2, ring_pages=32, answer=lambda _: b"")
        for count in (0, 4, 0xFFFF_FFFF):
            assert parse_status(client.request(Queues(count).pack())) == Status.INVALID
        assert kit.provider.status()["guest"]["in_use"] == 1
        assert parse_status(client.request(Queues(3).pack())) == Status.OK
        second.close()
        assert kit.provider.status()["guest"]["in_use"] == 1
        cable.push(*(udp(number, number) for number in range(50)))
        kit.run()
        assert kit.provider.status()["queues"][0]["frames"] == 50


# ---- link, announcements, the interface ------------------------------------------------------------------------------


def test_the_link_goes_down_and_up() -> None:
    with network() as kit:
        guest = Guest(kit)
        assert kit.command("link") == {"link": "up"}
        assert kit.command("link", state="down") == {"link": "down"}
        kit.run()
        assert guest.links == [False] and not guest.cable.carrier
        assert parse_status(guest.send(udp(1, 1), udp(2, 2))) == Status.NO_LINK
        assert guest.cable.sent == [] and kit.provider.status()["no_link"] == 2
        kit.command("link", state="up")
        kit.run()
        assert guest.links == [False, True] and guest.cable.carrier
        assert parse_status(guest.send(udp(1, 1))) == Status.OK
        guest.holding = True
        for state in ("down", "up", "down", "up", "down"):
            kit.command("link", state=state)
            kit.run()
        assert guest.links == [False, True, False], "one message at a time"
        guest.release()
        kit.run()
        assert guest.links == [False, True, False]
        for name, arguments in (("link", {"state": "off"}), ("link", {"speed": 1}), ("pull", {})):
            with pytest.raises(UsageError):
                kit.command(name, **arguments)


def test_a_guest_that_comes_later_is_told_the_link() -> None:
    with network() as kit:
        kit.command("link", state="down")
        guest = Guest(kit)
        assert guest.nic is not None and not guest.nic.link and not guest.cable.carrier
        assert guest.links == []


def test_the_interface_has_a_link_only_while_a_guest_is_there() -> None:
    with network() as kit:
        cable = CabledNetwork.cables[kit._clock]
        assert not cable.carrier
        guest = Guest(kit)
        assert cable.carrier
        guest.primary.close()
        assert not cable.carrier
        assert kit.provider.status()["guest"] is None


def test_switches_are_told_after_a_move() -> None:
    with network() as kit:
        guest = Guest(kit)
        kit.advance(5)
        assert guest.cable.announced == 0
        kit.save_and_restore()
        kit.advance(5)
        assert guest.cable.announced == len(ANNOUNCE_AFTER) > 3
        kit.command("announce")
        assert guest.cable.announced == 1 + len(ANNOUNCE_AFTER)
        kit.save_and_restore()  # timers of an earlier life are gone
        kit.save_and_restore()


def test_frames_the_interface_does_not_take_are_counted() -> None:
    with network() as kit:
        guest = Guest(kit)
        guest.cable.refusing = True
        assert guest.send(udp(1, 1))[:8] == struct.pack("<II", Status.INVALID, 0)
        assert kit.provider.status()["not_taken"] == 1


# ---- hostile guests --------------------------------------------------------------------------------------------------


def test_bad_messages_are_refused_and_the_card_goes_on() -> None:
    with network() as kit:
        guest = Guest(kit, features=0)
        before = kit.provider.status()["refused"]
        bad = (
            b"",
            b"\3\0\0\0",
            struct.pack("<III", 3, 1, 0xFFFF_FFF0) + bytes(64),
            struct.pack("<II", 3, 0xFFFF_FFFF) + bytes(64),
            struct.pack("<IIII", 3, 2, 0x8000_0000, 0x8000_0000) + bytes(64),
            Link(False).pack(),
            Hello(version=0).pack(),
            Hello(queues=0).pack(),
            Hello(mtu=20).pack(),
            bytes(range(256)),
        )
        for message in bad:
            assert parse_status(guest.primary.request(message)) != Status.OK, message[:16]
        assert kit.provider.status()["refused"] == before + len(bad)
        undersized, oversized = frame()[:20], frame(bytes(60000))
        reply = guest.send(undersized, udp(1, 1), oversized, udp(2, 1))
        assert reply[:8] == struct.pack("<II", Status.INVALID, 2)
        assert guest.cable.sent == [udp(1, 1), udp(2, 1)], "the good ones among them got through"


def test_frames_before_hello_are_refused() -> None:
    with network() as kit:
        client = kit.open(0, ring_pages=32)
        assert parse_status(client.request(pack_frames([udp(1, 1)]))) == Status.NO_HELLO
        assert parse_status(client.request(Queues(1).pack())) == Status.NO_HELLO
        assert CabledNetwork.cables[kit._clock].sent == []


def test_a_flood_is_taken_in_turns() -> None:
    with network() as kit:
        guest = Guest(kit)
        requests = [guest.primary.send(pack_frames([udp(number, 1)] * 20)) for number in range(500)]
        kit.run()
        assert all(one.done for one in requests) and len(guest.cable.sent) == 10000


def test_an_odd_completion_is_no_more_than_a_completion() -> None:
    with network() as kit:
        guest = Guest(kit)
        guest.holding = True
        guest.cable.push(udp(1, 1))
        kit.run()
        guest.held.pop().complete(b"\xff" * 4000)
        guest.holding = False
        guest.cable.push(udp(2, 1))
        kit.run()
        assert [number_of(one) for one in guest.frames] == [1, 2]


# ---- saves -----------------------------------------------------------------------------------------------------------


def seen(kit: ProviderTest, returned: Any) -> Any:
    """What counts, however frames were put together: each once, in order by flow."""
    guest: Guest = returned
    by_flow: dict[bytes, list[int]] = {}
    for one in guest.frames:
        by_flow.setdefault(one[10 + 34 : 10 + 38], []).append(number_of(one))
    return {"to guest": by_flow, "to host": guest.cable.sent, "links": guest.links[-1:]}


def script(kit: ProviderTest) -> Guest:
    guest = Guest(kit, queues=2, ring_pages=20)
    guest.cable.push(*(udp(number, number % 5, size=600) for number in range(60)))
    guest.primary.send(pack_frames([udp(number, 3) for number in range(5)]))
    kit.run()
    guest.holding = True
    guest.cable.push(*(udp(60 + number, number % 5, size=600) for number in range(200)))
    kit.run()
    kit.command("link", state="down")
    kit.run()
    guest.release()
    kit.command("link", state="up")
    kit.run()
    guest.cable.push(*(udp(260 + number, number % 5) for number in range(20)))
    kit.advance(2)
    guest.send(udp(9, 9), udp(10, 9))
    return guest


SCRIPT_OPTIONS = OPTIONS | {"queues": 2, "window_kib": 64}


def test_network_survives_a_save_at_every_step() -> None:
    assert every_step(script, CabledNetwork, options=SCRIPT_OPTIONS, outcome=seen) > 20


def test_a_provider_that_leaves_frames_in_the_interface_does_not_survive() -> None:
    class Forgetful(CabledNetwork):
        def _drain(self, port: Port) -> None:
            pass

    with pytest.raises(ContractViolation, match="the outcome is another one"):
        every_step(script, Forgetful, options=SCRIPT_OPTIONS, outcome=seen)


def test_network_survives_with_frames_queued_sent_and_in_the_interface() -> None:
    """In each place in which a frame can be at a save, there are some; each comes out once, in order."""
    with network(window_kib=256) as kit:
        guest = Guest(kit, ring_pages=20, features=0)
        guest.holding = True
        frames = [udp(number, 1, size=1000) for number in range(400)]
        guest.cable.push(*frames[:50])
        kit.run()
        with guest.primary.away():
            guest.cable.push(*frames[50:])
            kit.run()
            saved = kit.save_and_restore()
        status = kit.provider.status()
        assert saved.sent > 0 and saved.queued > 0 and status["drained"] > 0, (saved, status)
        outstanding = status["queues"][0]["outstanding"]
        assert outstanding == sum(map(len, frames)), "the window is what it was"
        guest.release()
        kit.run()
        assert guest.frames == frames
        assert kit.provider.status()["queues"][0]["outstanding"] == 0


def test_a_closed_channels_frames_are_gone() -> None:
    with network() as kit:
        guest = Guest(kit)
        with guest.primary.away():
            guest.cable.push(udp(1, 1))
            kit.run()
            kit.save_and_restore()
        guest.primary.close()
        again = Guest(kit)
        again.cable.push(udp(2, 1))
        kit.run()
        assert number_of(again.frames[-1]) == 2
        assert kit.provider.status()["queues"][0]["outstanding"] == 0


def test_states_that_make_no_sense_are_refused() -> None:
    with network(queues=2) as kit:
        guest = Guest(kit, queues=2)
        assert guest.nic is not None
        state = msgspec.msgpack.decode(kit.provider.save())
        for bad in (
            b"",
            b"\xc1",
            msgspec.msgpack.encode(state | {"version": 2}),
            msgspec.msgpack.encode(state | {"mac": b"\x02\0\0\0\0\x09"}),
            msgspec.msgpack.encode(state | {"mac": b""}),
            msgspec.msgpack.encode(state | {"channels": 3}),
            msgspec.msgpack.encode(state | {"channels": 1}),
            msgspec.msgpack.encode(state | {"agreed": state["agreed"] | {"mtu": 9000}}),
            msgspec.msgpack.encode(state | {"agreed": state["agreed"] | {"mtu": 1}}),
            msgspec.msgpack.encode(state | {"agreed": state["agreed"] | {"in_use": 3}}),
            msgspec.msgpack.encode(state | {"agreed": state["agreed"] | {"features": 2}}),
            msgspec.msgpack.encode(state | {"counters": {"to_guest": -1}}),
            msgspec.msgpack.encode(state | {"counters": {"gold": 1}}),
            msgspec.msgpack.encode(state | {"more": 1}),
        ):
            kit.check_refuses(bad)


def test_every_frame_is_one_of_the_protocols() -> None:
    message = parse(pack_frames([udp(1, 1)]))
    assert isinstance(message, Frames) and bytes(message.frames[0][10:16]) == GUEST
    assert bytes(message.frames[0][16:22]) == PEER
