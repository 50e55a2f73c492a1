"""The provider `network` on real channels with a guest that speaks as hv_netvsc does, good and bad, over saves."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.network_guest import UP, CabledNetwork, Ends, NetworkGuest
from support.nic import PEER, frame, number_of, udp
from vmbus.errors import StateError, UsageError
from vmbus.providers.network import oids
from vmbus.providers.network.adapter import MOST_CONTROL
from vmbus.providers.network.card import ANNOUNCE_AFTER
from vmbus.providers.network.interface import Port
from vmbus.providers.network.provider import CONTROL_BYTES, SEND_SECTION
from vmbus.providers.network.spread import UDP4, Spread
from vmbus.providers.network.watch import Trouble
from vmbus.testkit import ContractViolation, ProviderTest, every_step
from vmbus.wire import nvsp, rndis
from vmbus.wire.ethernet import OFFLOAD_SIZE

MAC = "02:00:00:00:00:01"
OPTIONS: dict[str, Any] = {"mac": MAC, "interface": "test0"}
SUCCESS, FAILURE, BAD_RNDIS = nvsp.Status.SUCCESS, nvsp.Status.FAILURE, nvsp.Status.INVALID_RNDIS


@pytest.fixture(autouse=True)
def cables() -> Iterator[None]:
    yield
    for cable in CabledNetwork.cables.values():
        assert cable.ports == 0, "an interface outlives its device"
        cable.close()
    CabledNetwork.cables.clear()


def card(**options: Any) -> ProviderTest:
    return ProviderTest(CabledNetwork, options=OPTIONS | options)


def guest_of(kit: ProviderTest, *, ring_pages: int = 32, **arguments: Any) -> NetworkGuest:
    return NetworkGuest(Ends(kit, ring_pages), **arguments)


@pytest.fixture
def kit() -> Iterator[ProviderTest]:
    with card() as kit:
        yield kit


@pytest.fixture
def guest(kit: ProviderTest) -> NetworkGuest:
    return guest_of(kit)


def cable_of(guest: NetworkGuest) -> Any:
    assert isinstance(guest.ends.device, ProviderTest)
    return CabledNetwork.cables[guest.ends.device.hosted.clock]


def plain(one: bytes) -> bytes:
    """A frame without its offload header."""
    return one[10:]


# ---- set-up ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", nvsp.VERSIONS)
def test_a_guest_of_each_version_comes_up(version: int) -> None:
    with card(mtu=9000) as kit:
        guest = guest_of(kit, version=version, mtu=9000)
        cable = cable_of(guest)
        assert cable.carrier
        cable.push(udp(1, 1))
        kit.run()
        assert guest.frames == [udp(1, 1)]
        assert guest.send(plain(udp(2, 1))) == SUCCESS and cable.sent == [udp(2, 1)]
        guest.shut_down()
        assert not cable.carrier
        assert kit.provider.status()["guest"]["nvsp"] is None


def test_an_unknown_version_is_refused_and_the_guest_asks_again() -> None:
    with card() as kit:
        guest = guest_of(kit, upto="init", version=nvsp.VERSION_6_1)
        guest.ends.close()
        guest.ends.open(0, lambda *_: None)
        for low, high in ((0x70000, 0x70000), (2, 0x60001), (0, 0)):
            assert guest.nvsp(nvsp.Init(low, high)).words[2] == nvsp.Status.NONE
        assert guest.nvsp(nvsp.Init(0x50000, 0x50000)).words[2] == SUCCESS
        assert guest.nvsp(nvsp.Init(0x50000, 0x50000)).words[2] == nvsp.Status.NONE, "once"


def test_the_answers_to_questions() -> None:
    with card(mtu=4000) as kit:
        guest = guest_of(kit)
        words = {
            oids.LARGEST_FRAME: 4000,
            oids.MEDIA_CONNECT_STATUS: 0,
            oids.PACKET_FILTER: UP,
            0x00010107: oids.LINK_SPEED,
        }
        for oid, expected in words.items():
            assert guest.query(oid) == struct.pack("<I", expected), hex(oid)
        assert guest.query(oids.PERMANENT_ADDRESS) == bytes.fromhex("020000000001")
        name = guest.query(oids.FRIENDLY_NAME)
        assert name is not None and name.decode("utf-16-le") == kit.provider.name
        assert guest.query(oids.RSS_CAPABILITIES) == b"", "a single queue"
        for unknown in (0, 0xFFFFFFFF, 0x00010200):
            assert guest.query(unknown) is None
            assert guest.set(unknown, b"1234") == rndis.Status.NOT_SUPPORTED
        capabilities = guest.query(oids.OFFLOAD_HW_CAPABILITIES, bytes(156))
        assert capabilities is not None and len(capabilities) == 156 and capabilities[:4] == b"\xa7\x03\x9c\0"


def test_without_offload_there_are_none() -> None:
    with card(offload=False) as kit:
        guest = guest_of(kit)
        capabilities = guest.query(oids.OFFLOAD_HW_CAPABILITIES)
        assert capabilities is not None and not any(capabilities[4:])
        assert guest.section < 2048
        wish = rndis.ppi(rndis.Ppi.CHECKSUM, 1 | 8 | 34 << 16)
        assert guest.send(plain(udp(1, 1)), information=wish) == BAD_RNDIS and not cable_of(guest).sent


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mac": "01:00:5e:00:00:01"}, "single station"),
        ({"mtu": 9001}, "mtu"),
        ({"queues": 17}, "queues"),
        ({"guest_address": "192.0.2.2/24"}, "guest_address"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ProviderTest(CabledNetwork, options=options)


# ---- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [1, 2, 3])
@pytest.mark.parametrize("size", [0, 18, 1000, 1400])
def test_the_three_shapes_of_a_packet(kit: ProviderTest, guest: NetworkGuest, shape: int, size: int) -> None:
    sent = [udp(number, 7, size=size) for number in range(1 if shape == 2 else 3)]
    assert guest.send(*map(plain, sent), shape=shape) == SUCCESS
    assert cable_of(guest).sent == sent


def test_a_tag_travels_beside_the_frame(kit: ProviderTest, guest: NetworkGuest) -> None:
    whole = plain(udp(1, 1))
    tag = rndis.ppi(rndis.Ppi.VLAN, 5 | 1 << 3 | 0x123 << 4)
    assert guest.send(whole, information=tag) == SUCCESS
    assert cable_of(guest).sent == [bytes(10) + whole[:12] + b"\x81\x00\xb1\x23" + whole[12:]]


def test_the_filter(kit: ProviderTest, guest: NetworkGuest) -> None:
    mine, other = udp(1, 1), frame(b"x", target=PEER)
    everybody, group = frame(b"y", target=b"\xff" * 6), frame(b"z", target=b"\x01\0\x5e\0\0\1")
    for wanted, expected in (
        (UP, [mine, everybody, group]),
        (0x1, [mine]),
        (0x8, [everybody]),
        (0x4, [group]),
        (0x20, [mine, other, everybody, group]),
    ):
        guest.frames.clear()
        assert guest.set_filter(wanted) == 0
        cable_of(guest).push(mine, other, everybody, group)
        kit.run()
        assert guest.frames == expected, hex(wanted)
    guest.frames.clear()
    assert guest.set_filter(0) == 0 and not cable_of(guest).carrier
    cable_of(guest).push(mine)
    kit.run()
    assert not guest.frames, "0 stops it"
    assert guest.set_filter(UP) == 0
    kit.run()
    assert guest.frames == [mine]


def test_nobody_reads_the_interface_while_the_guest_takes_nothing() -> None:
    with card(window_kib=64, offload=False) as kit:
        guest = guest_of(kit)
        guest.holding = True
        frames = [udp(number, 7, size=1000) for number in range(400)]
        cable_of(guest).push(*frames)
        kit.run()
        assert 40 <= len(guest.frames) <= 64
        assert kit.provider.bounds()["bytes to the guest, queue 0"].reached
        # Its questions are answered all the same.
        guest.holding = False
        assert guest.query(oids.MEDIA_CONNECT_STATUS) == bytes(4)
        guest.release()
        kit.run()
        assert guest.frames == frames
        assert kit.provider.status()["queues"][0]["used"] == 0


def test_the_guest_never_has_more_completions_under_way_than_sections() -> None:
    """It keeps as many, and has no place for more."""
    with card(offload=True) as kit:
        guest = guest_of(kit, receive=512 << 10)
        assert guest.sections == 7
        guest.holding = True
        for number in range(40):
            cable_of(guest).push(udp(number, 1))
            kit.run()
        assert len(guest.held) == 6
        guest.release()
        kit.run()
        assert list(map(number_of, guest.frames)) == list(range(40))


# ---- queues ----------------------------------------------------------------------------------------------------------


def test_a_flow_keeps_its_queue() -> None:
    with card(queues=4) as kit:
        guest = guest_of(kit, receive=4 << 20)
        capabilities = guest.query(oids.RSS_CAPABILITIES)
        assert capabilities is not None and struct.unpack_from("<BBHIII", capabilities)[5] == 4
        assert guest.open_queues(16) == 4
        frames = [udp(number, 1000 + number % 50) for number in range(1000)]
        for start in range(0, 1000, 250):
            cable_of(guest).push(*frames[start : start + 250])
            kit.run()
        assert sorted(map(number_of, guest.frames)) == list(range(1000)) and len(guest.by_channel) == 4
        homes: dict[int, int] = {}
        for index, some in guest.by_channel.items():
            numbers = list(map(number_of, some))
            assert numbers == sorted(numbers)
            for number in numbers:
                assert homes.setdefault(number % 50, index) == index
        for index in range(4):
            assert guest.send(plain(udp(index, 1)), index=index) == SUCCESS
        assert len(cable_of(guest).sent) == 4
        assert kit.provider.status()["guest"]["queues"] == 4


@pytest.mark.parametrize(("operation", "wanted"), [(0, 1), (2, 1), (1, 0)])
def test_wishes_for_channels_that_cannot_be(operation: int, wanted: int) -> None:
    with card(queues=2) as kit:
        guest = guest_of(kit)
        assert guest.nvsp(nvsp.SubChannels(operation, wanted)).words[:2] == (FAILURE, 0)
        guest.ends.close()
        old = guest_of(kit, version=0x40000)
        assert old.nvsp(nvsp.SubChannels(1, 1)).words[0] == FAILURE
        old.ends.close()
        several = guest_of(kit)
        assert several.nvsp(nvsp.SubChannels(1, 0xFFFFFFFF)).words[:2] == (SUCCESS, 1)


def test_a_small_receive_buffer_is_good_for_fewer_queues() -> None:
    with card(queues=16) as kit:
        guest = guest_of(kit, receive=300 << 10)
        assert guest.open_queues(16) == 3, "each has room for the longest frame"
        cable_of(guest).push(*(udp(number, number, size=1000) for number in range(60)))
        kit.run()
        assert len(guest.frames) == 60 and len(guest.by_channel) == 3
        # With so many open, a buffer that would do for one does not.
        guest.revoke()
        small = guest.ends.lend(guest.ends.allocate(150 << 10), 150 << 10)
        assert guest.nvsp(nvsp.ReceiveBuffer(small, 0xCAFE)).words[0] == FAILURE
        guest.step_receive()


def test_the_guests_table_and_key_say_which_queue_and_are_saved() -> None:
    with card(queues=3) as kit:
        guest = guest_of(kit, receive=4 << 20)
        guest.open_queues(3)
        key = bytes(range(40))
        assert guest.spread([1, 2], key) == 0
        frames = [udp(number, number) for number in range(60)]
        expected = [Spread([1, 2], key, UDP4).queue_of(one) for one in frames]
        for _ in range(2):
            assert guest.spread([1, 3], key) == guest.spread([], key) == rndis.Status.INVALID_DATA
            guest.by_channel.clear()
            cable_of(guest).push(*frames)
            kit.run()
            for queue in (1, 2):
                wanted = [one for one, place in zip(frames, expected, strict=True) if place == queue]
                assert guest.by_channel[queue] == wanted and wanted
            kit.save_restore()
        assert guest.spread(flags=0x10) == 0
        guest.by_channel.clear()
        cable_of(guest).push(*frames)
        kit.run()
        assert set(guest.by_channel) == {0}


# ---- its address -----------------------------------------------------------------------------------------------------


def parameter(name: str, value: str, kind: int = 2) -> bytes:
    texts = [text.encode("utf-16-le") for text in (name, value)]
    return struct.pack("<5I", 20, len(texts[0]), kind, 20 + len(texts[0]), len(texts[1])) + b"".join(texts)


def test_a_guest_may_choose_another_address() -> None:
    """As Linux asks for it, and as the OID of the address has it; it is saved, and announced."""
    mine, chosen = bytes.fromhex("020000000001"), bytes.fromhex("0200000000aa")
    with card() as kit:
        guest = guest_of(kit)
        cable = cable_of(guest)
        assert guest.set(oids.CONFIG_PARAMETER, parameter("NetworkAddress", "0200000000AA")) == 0
        assert cable.announced == 1
        for _ in range(2):
            assert guest.query(oids.CURRENT_ADDRESS) == chosen and guest.query(oids.PERMANENT_ADDRESS) == mine
            guest.frames.clear()
            frames = [frame(b"a", target=chosen), frame(b"b", target=mine)]
            cable.push(*frames, frame(b"c", target=PEER))
            kit.run()
            assert guest.frames == frames
            kit.save_restore()
        kit.advance(5)
        assert kit.provider.status()["guest"]["address"] == chosen.hex(":")
        # A driver that begins anew goes on with either.
        guest.shut_down()
        again = guest_of(kit)
        cable.push(frame(b"a", target=chosen), frame(b"b", target=mine))
        kit.run()
        assert len(again.frames) == 2
        for oid, data, status in (
            (oids.CURRENT_ADDRESS, chosen, rndis.Status.SUCCESS),
            (oids.CURRENT_ADDRESS, b"\1" + bytes(5), rndis.Status.INVALID_DATA),
            (oids.CURRENT_ADDRESS, chosen[:5], rndis.Status.INVALID_DATA),
            (oids.CURRENT_ADDRESS, bytes(6), rndis.Status.INVALID_DATA),
            (oids.CONFIG_PARAMETER, parameter("NetworkAddress", "02-00-00-00-00-AB"), rndis.Status.SUCCESS),
            (oids.CONFIG_PARAMETER, parameter("NetworkAddress", "0200000000"), rndis.Status.INVALID_DATA),
            (oids.CONFIG_PARAMETER, parameter("NetworkAddress", "ffffffffffff"), rndis.Status.INVALID_DATA),
            (oids.CONFIG_PARAMETER, parameter("NetworkAddress", "0200000000AA", 0), rndis.Status.INVALID_DATA),
            (oids.CONFIG_PARAMETER, parameter("Speed", "10"), rndis.Status.NOT_SUPPORTED),
            (oids.CONFIG_PARAMETER, parameter("NetworkAddress", "0200000000AA")[:-2], rndis.Status.INVALID_DATA),
            (oids.CONFIG_PARAMETER, b"", rndis.Status.INVALID_DATA),
        ):
            assert again.set(oid, data) == status, (hex(oid), data)
        assert again.query(oids.CURRENT_ADDRESS) == bytes.fromhex("0200000000ab")
        assert again.set(oids.CONFIG_PARAMETER, parameter("NetworkAddress", "")) == 0
        assert again.query(oids.CURRENT_ADDRESS) == mine


# ---- the link, announcements -----------------------------------------------------------------------------------------


def test_the_link_goes_down_and_up(kit: ProviderTest, guest: NetworkGuest) -> None:
    kit.command("link", state="down")
    kit.run()
    assert guest.link == [rndis.Status.MEDIA_DISCONNECT] and not cable_of(guest).carrier
    assert guest.query(oids.MEDIA_CONNECT_STATUS) == b"\1\0\0\0"
    assert guest.send(plain(udp(1, 1))) == SUCCESS and not cable_of(guest).sent
    kit.command("link", state="up")
    kit.run()
    assert guest.link[1:] == [rndis.Status.MEDIA_CONNECT] and cable_of(guest).carrier
    guest.holding = True
    for state in ("down", "up", "down", "up", "down"):
        kit.command("link", state=state)
        kit.run()
    assert len(guest.link) == 3, "one message at a time"
    guest.release()
    kit.run()
    assert guest.link[-1] == rndis.Status.MEDIA_DISCONNECT and len(guest.link) == 3


class Deaf(CabledNetwork):
    """Sabotage: it does not hear what becomes of its interface."""

    def _hear(self) -> None:
        assert self.port is not None
        self.port.watch.look()


def interface_comes_and_goes(kit: ProviderTest) -> None:
    guest = guest_of(kit)
    cable = cable_of(guest)
    for trouble in Trouble:
        told = len(guest.link)
        cable.missing = True
        cable.becomes(trouble)
        kit.advance(0.1)
        assert guest.link[told:] == [rndis.Status.MEDIA_DISCONNECT], trouble
        status = kit.provider.status()
        assert status["trouble"] == trouble and status["present"] is (trouble is not Trouble.GONE)
        assert guest.send(plain(udp(1, 1))) == SUCCESS
        guest.set_filter(0)
        guest.set_filter(UP)
        kit.advance(5)
        cable.missing = False
        if trouble is Trouble.DOWN:
            kit.save_restore()  # the next one is made at the restore
        else:
            cable.becomes(None)
        kit.advance(5)
        assert guest.link[told + 1 :] == [rndis.Status.MEDIA_CONNECT] and kit.provider.status()["trouble"] is None
        assert cable.carrier and cable.announced > 0
        cable.push(udp(5, 1))
        kit.run()
        assert guest.frames[-1] == udp(5, 1)


def test_while_the_interface_is_of_no_use_the_guest_has_no_link() -> None:
    with card() as kit:
        interface_comes_and_goes(kit)


def test_sabotage_a_card_that_does_not_hear_of_its_interface_is_found_out() -> None:
    with ProviderTest(Deaf, options=OPTIONS) as kit, pytest.raises(AssertionError):
        interface_comes_and_goes(kit)


def introduced(kit: Any) -> list[bytes]:
    """The ARP frames that a guest has after a move to where the bridge has another Ethernet address."""
    guest = guest_of(kit)
    cable_of(guest).hosts = ((bytes([192, 0, 2, 1]), PEER),)
    kit.save_restore()
    kit.advance(5)
    return [frame for frame in guest.frames if frame[OFFLOAD_SIZE + 12 :][:2] == b"\x08\x06"]


def test_fault_m13_the_guest_is_told_where_its_bridge_is_after_a_move() -> None:
    """At once, and again: no more than 2 s, and no line of a moment ago, are between the move and the last of them."""
    with card() as kit:
        frames = introduced(kit)
        assert len(frames) == len(ANNOUNCE_AFTER) and ANNOUNCE_AFTER[0] < 0.1 and ANNOUNCE_AFTER[-1] < 2
        sender = frames[0][OFFLOAD_SIZE + 14 + 8 :]
        assert sender[:10] == PEER + bytes([192, 0, 2, 1]) and sender[16:20] == bytes([192, 0, 2, 1])


class Mute(CabledNetwork):
    """Says nothing of where things are now."""

    def _announce_soon(self) -> None:
        pass


def test_sabotage_fault_m13_a_card_that_does_not_tell_its_guest_is_found_out() -> None:
    with ProviderTest(Mute, options=OPTIONS) as kit:
        assert not introduced(kit)


def test_fault_d5_the_mtu_is_the_smaller_wish_and_comes_back() -> None:
    with card(mtu=9000) as kit:
        guest = guest_of(kit, mtu=1500)
        assert kit.provider.status()["guest"]["mtu"] == 1500
        assert guest.send(plain(frame(bytes(9000))), shape=2) == SUCCESS, "it had waited, with Linux"
        assert guest.send(plain(frame(bytes(9009))), shape=2) == BAD_RNDIS
        guest.shut_down()
        again = guest_of(kit, mtu=9000)
        assert kit.provider.status()["guest"]["mtu"] == 9000
        assert again.send(plain(frame(bytes(9000))), shape=2) == SUCCESS


def provider_of(kit: ProviderTest) -> CabledNetwork:
    assert isinstance(kit.provider, CabledNetwork)
    return kit.provider


def test_before_it_is_withdrawn_the_guest_comes_to_rest(kit: ProviderTest, guest: NetworkGuest) -> None:
    guest.holding = True
    cable_of(guest).push(udp(1, 1))
    kit.run()
    leave = provider_of(kit).depart()
    assert leave is not None
    kit.run()
    assert guest.link == [rndis.Status.MEDIA_DISCONNECT] and not cable_of(guest).carrier
    cable_of(guest).push(udp(2, 1))
    for _ in range(3):
        kit.advance(0.3)
        assert guest.send(plain(udp(1, 1))) == SUCCESS
        assert not leave.done(), "it still has something to say"
    kit.advance(1)
    assert not leave.done(), "it still has a frame"
    guest.release()
    kit.advance(1)
    assert leave.done() and len(guest.frames) == 1
    provider_of(kit).stay()
    kit.advance(1)
    assert guest.link[1:] == [rndis.Status.MEDIA_CONNECT] and len(guest.frames) == 2
    again = provider_of(kit).depart()
    assert again is not None
    kit.advance(1)
    assert not again.done(), "Linux follows the link every two seconds"
    kit.advance(2)
    assert again.done()
    provider_of(kit).stay()


def test_a_guest_that_never_comes_to_rest_is_not_waited_for_without_bound() -> None:
    with card() as kit:
        guest = guest_of(kit)
        guest.holding = True
        leave = provider_of(kit).depart()
        assert leave is not None
        kit.advance(6)
        assert leave.done()
        guest.release()
    with card() as kit:
        assert provider_of(kit).depart() is None, "nobody is there"


# ---- buffers ---------------------------------------------------------------------------------------------------------


def test_a_revoked_buffer_is_never_touched_again(kit: ProviderTest, guest: NetworkGuest) -> None:
    guest.holding = True
    cable_of(guest).push(udp(1, 1))
    kit.run()
    guest.revoke()
    before = guest.receive.read(0, guest.receive_size)
    cable_of(guest).push(*(udp(number, 1) for number in range(20)))
    guest.release()
    kit.run()
    assert guest.receive.read(0, guest.receive_size) == before
    assert guest.send(plain(udp(1, 1))) == FAILURE
    # The guest lends other memory, and goes on.
    guest.receive = guest.ends.allocate(guest.receive_size)
    guest.step_receive()
    guest.step_send()
    kit.run()
    assert list(map(number_of, guest.frames)) == [1, *range(20)]


def test_buffers_that_will_not_do_are_refused() -> None:
    with card() as kit:
        guest = guest_of(kit, upto="configure")
        small = guest.ends.lend(guest.ends.allocate(4096), 4096)
        assert guest.nvsp(nvsp.ReceiveBuffer(small, 0xCAFE)).words[0] == FAILURE
        for handle in (0, 12345, 0xFFFFFFFF):
            assert guest.nvsp(nvsp.ReceiveBuffer(handle, 0xCAFE)).words[0] == FAILURE
            assert guest.nvsp(nvsp.SendBuffer(handle, 0)).words[0] == FAILURE
        guest.step_receive()
        guest.step_send()
        again = guest.ends.lend(guest.ends.allocate(1 << 20), 1 << 20)
        assert guest.nvsp(nvsp.ReceiveBuffer(again, 0xCAFE)).words[0] == FAILURE
        assert guest.nvsp(nvsp.SendBuffer(again, 0)).words[0] == FAILURE
        guest.step_initialize()
        guest.step_filter()


def test_memory_that_the_guest_takes_away_is_an_error_of_its_packets_alone(
    kit: ProviderTest, guest: NetworkGuest
) -> None:
    for memory in (guest.receive, guest.send_memory):
        memory.take_away()
    assert guest.send_rndis(nvsp.DATA_CHANNEL, 0, 60, None) == FAILURE
    cable_of(guest).push(udp(1, 1))
    kit.run()
    assert not guest.frames and kit.provider.status()["queues"][0]["lost"] == 1


# ---- hostile guests --------------------------------------------------------------------------------------------------


def test_bad_packets_have_an_answer_and_the_card_goes_on(kit: ProviderTest, guest: NetworkGuest) -> None:
    whole = plain(udp(1, 1))
    good = rndis.packet_header(len(whole)) + whole
    area = guest.ends.allocate(4096)

    def bytes_of(data: bytes, channel: int = nvsp.DATA_CHANNEL) -> int:
        area.write(0, data.ljust(4096, b"\0"))
        return guest.send_rndis(channel, nvsp.NO_SECTION, 0, [(area.address, len(data))])

    def changed(at: int, value: int) -> bytes:
        return good[:at] + struct.pack("<I", value) + good[at + 4 :]

    for section, size in ((0, SEND_SECTION + 1), (10, SEND_SECTION), (0xFFFFFFFE, 8), (11, 1)):
        assert guest.send_rndis(nvsp.DATA_CHANNEL, section, size, None) == FAILURE
    for bad in (
        *(changed(4, value) for value in (0, 7, 8, 43, len(good) + 1, 0xFFFFFFFF)),
        *(changed(8, value) for value in (0, 35, len(good) - 8, 0xFFFFFFFF, 0x7FFFFFFF)),
        *(changed(12, value) for value in (len(whole) + 1, 0xFFFFFFFF, 0, 13)),
        changed(0, 0),
        changed(0, rndis.Type.QUERY),
        changed(0, 0x80000004),
    ):
        assert bytes_of(bad) == BAD_RNDIS, bad[:48].hex()
    assert not cable_of(guest).sent
    for information in (
        struct.pack("<IIII", 0, 0, 12, 0),
        struct.pack("<IIII", 17, 0, 12, 0),
        struct.pack("<IIII", 16, 0, 17, 0),
        struct.pack("<IIII", 11, 0, 8, 0),
        struct.pack("<IIII", 0xFFFFFFFF, 0, 0xFFFFFFFF, 0),
        rndis.ppi(0, 1 | 8 | 0x3FF << 16),
        rndis.ppi(0, 1 | 4 | 13 << 16),
        rndis.ppi(2, 1 << 30 | 1400 | 34 << 20),
        rndis.ppi(2, 0),
    ):
        assert guest.send(whole, information=information) == BAD_RNDIS, information.hex()
    # Those before a bad one are sent.
    assert bytes_of(good + changed(4, 7)) == BAD_RNDIS and cable_of(guest).sent == [udp(1, 1)]
    for bad in (b"", b"\4\0\0\0", rndis.query(1, 1)[:20], good, rndis.query(1, 1) * 2, rndis.initialize(1)[:20]):
        assert bytes_of(bad.ljust(1, b"\0"), nvsp.CONTROL_CHANNEL) == BAD_RNDIS
    for at, value in ((16, 5000), (16, 0xFFFFFFFF), (20, 19), (20, 0xFFFFFFFF)):
        request = bytearray(rndis.set_oid(1, oids.PACKET_FILTER, bytes(4)))
        request[at : at + 4] = struct.pack("<I", value)
        assert bytes_of(bytes(request), nvsp.CONTROL_CHANNEL) == BAD_RNDIS
    cable_of(guest).sent.clear()
    assert bytes_of((rndis.packet_header(14) + bytes(14)) * 65) == BAD_RNDIS
    assert len(cable_of(guest).sent) == 64
    assert guest.send(whole) == SUCCESS


def test_nonsense_is_completed_too(kit: ProviderTest, guest: NetworkGuest) -> None:
    for payload in (b"", b"\1", struct.pack("<I", 1), struct.pack("<I", 9999) + bytes(36), b"\xff" * 4000):
        assert guest.ends.ask(0, payload, None) == b""
    assert guest.ends.ask(0, nvsp.pack_message(nvsp.Other(nvsp.Type.SWITCH_DATA_PATH)), None) == b""
    assert guest.nvsp(nvsp.Other(nvsp.Type.OID_QUERY)).words[0] == rndis.Status.NOT_SUPPORTED
    assert guest.nvsp(nvsp.SubChannels(1, 3)).words[:2] == (FAILURE, 0)
    assert guest.nvsp(nvsp.PdApi(3))[:] == (nvsp.Type.PD_API, (3, FAILURE, *[0] * 13))
    for unasked in (nvsp.Type.PD_POST_BATCH, nvsp.Type.INDIRECTION_TABLE, 137):
        assert guest.ends.ask(0, struct.pack("<II", unasked, 1) + bytes(32), None) == b""
    assert guest.set(oids.OFFLOAD_PARAMETERS, b"1234") == rndis.Status.INVALID_DATA
    assert guest.set(oids.RSS_PARAMETERS, b"1234") == rndis.Status.INVALID_DATA
    assert guest.set(oids.PACKET_FILTER, b"1") == rndis.Status.INVALID_DATA


def test_out_of_order_is_refused_and_answered() -> None:
    with card() as kit:
        guest = guest_of(kit, upto="init")
        assert guest.send(plain(udp(1, 1))) == FAILURE, "there is no send buffer"
        guest.step_receive()
        assert guest.query(oids.LARGEST_FRAME) is None, "not before INITIALIZE"
        assert guest.set_filter(UP) == rndis.Status.FAILURE
        guest.step_send()
        guest.step_initialize()
        guest.step_filter()
        guest.halt()
        assert not cable_of(guest).carrier
        assert guest.query(oids.LARGEST_FRAME) is None
        guest.step_initialize()
        guest.step_filter()
        guest.step_configure()
        cable_of(guest).push(udp(1, 1))
        kit.run()
        assert len(guest.frames) == 1


def test_control_messages_that_nobody_completes_are_bounded(kit: ProviderTest, guest: NetworkGuest) -> None:
    guest.holding = True
    statuses = []
    for number in range(1, 4000):
        statuses.append(guest.send_control(rndis.query(number + 1000, oids.FRIENDLY_NAME)))
        if statuses[-1] != SUCCESS:
            break
    assert statuses[-1] == FAILURE and len(statuses) > MOST_CONTROL
    guest.release()
    kit.run()
    assert len(guest.replies) >= len(statuses) - 1
    assert guest.query(oids.MEDIA_CONNECT_STATUS) == bytes(4)


MESSAGES = st.one_of(
    st.binary(max_size=64),
    st.builds(
        lambda kind, words: struct.pack("<I", kind) + words,
        st.sampled_from([*map(int, nvsp.Type), 0, 99, 0xFFFFFFFF]),
        st.binary(min_size=0, max_size=40),
    ),
)
RNDIS = st.one_of(
    st.binary(max_size=80),
    st.builds(
        lambda kind, length, rest: struct.pack("<II", kind, length) + rest,
        st.sampled_from([*map(int, rndis.Type), 0, 0xFFFFFFFF]),
        st.integers(0, 120) | st.integers(0, 0xFFFFFFFF),
        st.binary(max_size=120),
    ),
    st.builds(
        lambda oid, data, set_it: (rndis.set_oid if set_it else rndis.query)(77, oid, data),
        st.sampled_from([*oids._QUERIES, oids.OFFLOAD_PARAMETERS, oids.RSS_PARAMETERS, oids.CONFIG_PARAMETER, 0]),
        st.binary(max_size=200),
        st.booleans(),
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("nvsp"), MESSAGES),
            st.tuples(st.just("data"), RNDIS),
            st.tuples(st.just("control"), RNDIS),
            st.tuples(st.just("save"), st.just(b"")),
        ),
        max_size=12,
    )
)
def test_whatever_a_guest_says_is_answered_and_hurts_nobody(steps: list[tuple[str, bytes]]) -> None:
    with card() as kit:
        guest = guest_of(kit)
        guest._take_control = lambda message: None  # type: ignore[method-assign]
        area = guest.ends.allocate(4096)
        cable_of(guest).push(*(udp(number, 1) for number in range(3)))
        for what, data in steps:
            if what == "save":
                kit.save_restore()
            elif what == "nvsp":
                guest.ends.ask(0, data, None)
            else:
                area.write(0, data.ljust(4096, b"\0"))
                channel = nvsp.CONTROL_CHANNEL if what == "control" else nvsp.DATA_CHANNEL
                external = [(area.address, max(len(data), 1))]
                guest.send_rndis(channel, nvsp.NO_SECTION, 0, external)
        guest.ends.close()
        again = guest_of(kit)
        cable_of(guest).sent.clear()
        assert again.send(plain(udp(9, 1))) == SUCCESS and cable_of(again).sent == [udp(9, 1)]


# ---- saves -----------------------------------------------------------------------------------------------------------


def seen(kit: ProviderTest, returned: Any) -> Any:
    """What counts, however frames were put together: each once, in order."""
    guest: NetworkGuest = returned
    return {
        "to guest": list(map(number_of, guest.frames)),
        "to host": cable_of(guest).sent,
        "link": guest.link[-1:],
        "replies": sorted(guest.replies),
    }


def script(kit: ProviderTest) -> NetworkGuest:
    guest = guest_of(kit, ring_pages=2, receive=300 << 10)
    cable_of(guest).push(*(udp(number, 5, size=600) for number in range(60)))
    kit.run()
    guest.holding = True
    cable_of(guest).push(*(udp(60 + number, 5, size=600) for number in range(200)))
    kit.run()
    guest.send_control(rndis.query(1000, oids.FRIENDLY_NAME))
    guest.release()
    kit.command("link", state="down")
    kit.run()
    kit.command("link", state="up")
    kit.run()
    for shape in (1, 2, 3):
        guest.send(plain(udp(shape, 3)), shape=shape)
    cable_of(guest).push(*(udp(260 + number, 5) for number in range(20)))
    kit.advance(2)
    return guest


SCRIPT_OPTIONS = OPTIONS | {"window_kib": 64, "offload": False}


def test_network_survives_a_save_at_every_step() -> None:
    assert every_step(script, CabledNetwork, options=SCRIPT_OPTIONS, outcome=seen) > 40


def several_queues(kit: ProviderTest) -> NetworkGuest:
    guest = guest_of(kit, ring_pages=2, receive=500 << 10)
    cable_of(guest).push(*(udp(number, number % 5, size=300) for number in range(20)))
    guest.open_queues(3)
    guest.holding = True
    cable_of(guest).push(*(udp(20 + number, number % 5, size=300) for number in range(60)))
    kit.run()
    guest.release()
    guest.send(plain(udp(1, 3)), index=2)
    kit.run()
    guest.shut_down()
    kit.run()
    again = guest_of(kit, ring_pages=2, receive=500 << 10)
    again.frames, again.by_channel = guest.frames, {}
    again.open_queues(2)
    cable_of(again).push(*(udp(80 + number, number % 5) for number in range(10)))
    kit.run()
    return again


def by_flow(kit: ProviderTest, returned: Any) -> Any:
    found: dict[bytes, list[int]] = {}
    for one in returned.frames:
        found.setdefault(one[10 + 34 : 10 + 38], []).append(number_of(one))
    return found, cable_of(returned).sent, len(kit.channels)


def test_network_survives_a_save_at_every_step_of_several_queues() -> None:
    options = OPTIONS | {"window_kib": 64, "offload": False, "queues": 3}
    assert every_step(several_queues, CabledNetwork, options=options, outcome=by_flow) > 40


def test_a_card_that_leaves_frames_in_the_interface_does_not_survive() -> None:
    class Forgetful(CabledNetwork):
        def _drain(self, port: Port) -> None:
            pass

    with pytest.raises(ContractViolation, match="the outcome is another one"):
        every_step(script, Forgetful, options=SCRIPT_OPTIONS, outcome=seen)


def test_a_card_that_forgets_which_part_a_packet_has_is_found_out() -> None:
    """Sabotage: the SaveBuf says nothing of the receive buffer, so a part that the guest has is written over."""

    class Careless(CabledNetwork):
        def _make_queue(self, index: int) -> Any:
            queue = super()._make_queue(index)
            queue.channel._restore_packet = lambda channel, lib, own: queue.restore_packet(
                channel, lib, own[:8] + bytes(16)
            )
            return queue

    with pytest.raises((ContractViolation, AssertionError)):
        every_step(script, Careless, options=SCRIPT_OPTIONS, outcome=seen)


def test_network_survives_with_frames_in_every_place() -> None:
    with card(window_kib=64, offload=False) as kit:
        guest = guest_of(kit, ring_pages=1)
        guest.holding = True
        frames = [udp(number, 1, size=1000) for number in range(300)]
        cable_of(guest).push(*frames[:20])
        kit.run()
        with guest.ends.guests[0].away():
            cable_of(guest).push(*frames[20:])
            kit.run()
            saved = kit.save_restore()
        status = kit.provider.status()
        assert saved.sent > 0 and status["drained"] > 0, (saved, status)
        assert status["queues"][0]["used"] > 40_000, "the window is what it was"
        guest.release()
        kit.run()
        assert guest.frames == frames
        status = kit.provider.status()
        assert status["queues"][0]["used"] == status["backlog"] == 0


def test_a_packet_that_outlives_its_buffer_is_restored_too(kit: ProviderTest, guest: NetworkGuest) -> None:
    guest.holding = True
    cable_of(guest).push(udp(1, 1))
    kit.run()
    guest.revoke()
    kit.save_restore()
    guest.receive = guest.ends.allocate(guest.receive_size)
    guest.step_receive()
    guest.release()
    guest.step_send()
    cable_of(guest).push(udp(2, 1))
    kit.run()
    assert list(map(number_of, guest.frames)) == [1, 2]


def test_states_that_make_no_sense_are_refused() -> None:
    with card() as kit:
        guest_of(kit)
        state = msgspec.msgpack.decode(kit.provider.save())
        for bad in (
            b"",
            b"\xc1",
            msgspec.msgpack.encode(state | {"version": 2}),
            msgspec.msgpack.encode(state | {"mac": b"\x02\0\0\0\0\x09"}),
            msgspec.msgpack.encode(state | {"nvsp": 7}),
            msgspec.msgpack.encode(state | {"nvsp": 0}),
            msgspec.msgpack.encode(state | {"mtu": 9000}),
            msgspec.msgpack.encode(state | {"queues": 2}),
            msgspec.msgpack.encode(state | {"table": [1]}),
            msgspec.msgpack.encode(state | {"table": [-1]}),
            msgspec.msgpack.encode(state | {"key": bytes(41)}),
            msgspec.msgpack.encode(state | {"types": -1}),
            msgspec.msgpack.encode(state | {"address": b"\1\0\0\0\0\1"}),
            msgspec.msgpack.encode(state | {"address": bytes(6)}),
            msgspec.msgpack.encode(state | {"receive": state["receive"] | {"size": CONTROL_BYTES}}),
            msgspec.msgpack.encode(state | {"control": [[2, b""]] * (MOST_CONTROL + 1)}),
            msgspec.msgpack.encode(state | {"control": [[1, b""]]}),
            msgspec.msgpack.encode(state | {"backlog": [bytes(65536)] * 100}),
            msgspec.msgpack.encode(state | {"backlog": [b""]}),
            msgspec.msgpack.encode(state | {"counters": {"gold": 1}}),
            msgspec.msgpack.encode(state | {"more": 1}),
            msgspec.msgpack.encode({"version": 1, "mac": state["mac"], "agreed": None, "channels": 1, "link": True}),
        ):
            kit.check_refuses(bad)


@pytest.mark.parametrize(
    "own",
    [b"", bytes(24), struct.pack("<HHIQQ", 2, 1, 1, 0, 8), struct.pack("<HHIQQ", 1, 9, 1, 0, 8)]
    + [struct.pack("<HHIQQ", 1, 1, 1, *part) for part in ((8, 1), (0, 1 << 40), (1 << 63, 1 << 63))],
)
def test_saved_packets_that_make_no_sense_are_refused(kit: ProviderTest, guest: NetworkGuest, own: bytes) -> None:
    guest.holding = True
    cable_of(guest).push(udp(1, 1))
    kit.run()
    queue = kit.provider.queues[0]  # type: ignore[attr-defined]
    with pytest.raises(StateError):
        queue.restore_packet(queue.channel, b"", own)
    guest.release()


def test_a_saved_packet_is_described_in_words(kit: ProviderTest, guest: NetworkGuest) -> None:
    guest.holding = True
    cable_of(guest).push(udp(1, 1), udp(2, 1))
    kit.run()
    queue = kit.provider.queues[0]  # type: ignore[attr-defined]
    buffer = bytearray(24)
    queue.save_packet(queue.channel, queue.channel.packets_in_use[0], memoryview(buffer))
    told = CabledNetwork.describe_packet(bytes(buffer))
    assert told["kind"] == "frames" and told["messages"] == 2
    guest.release()
