"""hv_sock on the wire: ports, offers, packets; and the messages with which a guest asks for channels."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.bus import Joined
from vmbus.bus.connects import CONNECTION_REFUSED, MOST_CONNECTS, ConnectDesk, Wish
from vmbus.bus.offers import Offer, OfferState
from vmbus.errors import UsageError
from vmbus.wire import hvsock
from vmbus.wire import messages as m

PORTS = st.integers(0, hvsock.MAX_PORT)


# ---- ports and packets -----------------------------------------------------------------------------------------------


def test_the_guid_of_a_port_is_linuxs() -> None:
    assert hvsock.service_of(0x1234) == UUID("00001234-facb-11e6-bd58-64006a7986d3")
    for port in (-1, 1 << 32):
        with pytest.raises(UsageError):
            hvsock.service_of(port)


@given(PORTS)
def test_a_port_and_back(port: int) -> None:
    service = hvsock.service_of(port)
    assert hvsock.port_of(service) == port == hvsock.peer_port(service)


@given(st.uuids())
def test_other_guids_are_no_ports(guid: UUID) -> None:
    found = hvsock.port_of(guid)
    assert found is None or hvsock.service_of(found) == guid


@pytest.mark.parametrize("from_host", [True, False])
def test_the_offer(from_host: bool) -> None:
    data = hvsock.offer_data(from_host=from_host)
    assert data[:4] == bytes(4) and data[4] == from_host and hvsock.is_from_host(data) is from_host


@given(st.binary(min_size=1, max_size=hvsock.MAX_DATA), st.integers(0, 7))
def test_a_packet_and_back(data: bytes, padding: int) -> None:
    assert hvsock.unpack(hvsock.pack(data) + bytes(padding)) == data


def test_a_fin_is_a_packet_without_data() -> None:
    assert hvsock.unpack(hvsock.FIN) == b"" and len(hvsock.FIN) == 8


@given(st.binary(max_size=64) | st.tuples(st.integers(0, 3), st.integers(0, 80), st.binary(max_size=64)))
def test_any_payload_is_taken_or_refused(payload: bytes | tuple[int, int, bytes]) -> None:
    if isinstance(payload, tuple):
        kind, size, rest = payload
        payload = hvsock.HEADER.pack(kind, size) + rest
    try:
        data = hvsock.unpack(payload)
    except hvsock.HvSockError:
        return
    assert payload[:4] == b"\1\0\0\0" and data == payload[8 : 8 + int.from_bytes(payload[4:8], "little")]


@pytest.mark.parametrize("size", [hvsock.MAX_DATA + 1, 1 << 31, (1 << 32) - 1])
def test_a_length_that_nobody_takes(size: int) -> None:
    with pytest.raises(hvsock.HvSockError):
        hvsock.unpack(hvsock.HEADER.pack(1, size) + bytes(hvsock.MAX_DATA + 8))


# ---- requests for channels -------------------------------------------------------------------------------------------


def test_the_layout_of_the_messages() -> None:
    """Linux's request ends behind the two GUIDs; a newer one goes on with a third."""
    endpoint, service = UUID(int=7), hvsock.service_of(80)
    message = m.encode(m.ConnectRequest(endpoint, service))
    assert message[:8] == b"\x15" + bytes(7) and len(message) == 40
    assert (message[8:24], message[24:]) == (endpoint.bytes_le, service.bytes_le)
    assert m.decode(message + bytes(16), m.Direction.GUEST) == m.ConnectRequest(endpoint, service)
    answer = m.encode(m.ConnectResult(endpoint, service, CONNECTION_REFUSED))
    assert answer[0] == 23 and answer[40:] == bytes.fromhex("360200c0")


class Taker:
    """Takes requests for `ports`."""

    def __init__(self, *ports: int) -> None:
        self.ports = ports
        self.wishes: list[Wish] = []

    def __call__(self, wish: Wish) -> bool:
        if hvsock.port_of(wish.service) not in self.ports:
            return False
        self.wishes.append(wish)
        return True


def ask(bus: Joined, port: int, endpoint: int = 1) -> list:
    return bus.say(m.ConnectRequest(UUID(int=endpoint), hvsock.service_of(port)))


def no(port: int, endpoint: int = 1, status: int = CONNECTION_REFUSED) -> m.ConnectResult:
    return m.ConnectResult(UUID(int=endpoint), hvsock.service_of(port), status)


@pytest.fixture
def bus() -> Joined:
    joined = Joined()
    joined.connect()
    return joined


def test_a_request_goes_to_who_takes_it(bus: Joined) -> None:
    desk = bus.bus.connects
    assert ask(bus, 1) == [no(1)], "nobody is there"
    first, second = Taker(1, 2), Taker(2, 3)
    end = desk.serve(first)
    desk.serve(second)
    assert ask(bus, 2) == ask(bus, 3) == [] and ask(bus, 4) == [no(4)]
    assert (len(first.wishes), len(second.wishes), len(desk)) == (1, 1, 2)
    first.wishes[0].end()
    first.wishes[0].refuse()  # it has ended
    assert len(desk) == 1 and bus.heard[-1] == no(4)
    second.wishes[0].refuse(0xC0000001)
    assert bus.heard[-1] == no(3, status=0xC0000001) and len(desk) == 0
    end()
    end()
    assert ask(bus, 1) == [no(1)] and ask(bus, 2) == [] and len(second.wishes) == 2
    assert desk.refused == 3 and bus.bus.rejected == 0


def test_the_same_request_once_more_is_no_other_one(bus: Joined) -> None:
    taker = Taker(1)
    bus.bus.connects.serve(taker)
    assert ask(bus, 1) == ask(bus, 1) == []
    assert len(taker.wishes) == 1 and bus.bus.rejected == 1
    assert ask(bus, 1, endpoint=2) == []
    taker.wishes[0].end()
    assert ask(bus, 1) == [] and len(taker.wishes) == 3


def test_so_many_requests_and_no_more(bus: Joined) -> None:
    taker = Taker(1)
    bus.bus.connects.serve(taker)
    for endpoint in range(MOST_CONNECTS):
        assert ask(bus, 1, endpoint) == []
    assert ask(bus, 1, 1000) == [no(1, 1000)] and bus.bus.rejected == 1
    taker.wishes[5].end()
    assert ask(bus, 1, 1000) == [] and len(taker.wishes) == MOST_CONNECTS + 1


@pytest.mark.parametrize("how", ["unload", "contact", "reset"])
def test_requests_end_with_the_connection(bus: Joined, how: str) -> None:
    taker = Taker(1)
    bus.bus.connects.serve(taker)
    ask(bus, 1)
    if how == "reset":
        bus.bus.reset()
    else:
        bus.say(m.Unload() if how == "unload" else m.InitiateContact(m.Version.V5_0, 0, 2, 0, 0))
    assert len(bus.bus.connects) == 0
    heard = len(bus.heard)
    taker.wishes[0].refuse()
    assert len(bus.heard) == heard, "the guest that asked is no more"
    if how != "contact":
        assert ask(bus, 1) == [], "there is no connection"
        assert bus.bus.rejected == 1


def test_a_taker_that_ends_a_wish_at_once() -> None:
    posted: list = []
    desk = ConnectDesk(posted.append)
    desk.serve(lambda wish: wish.end() or False)
    desk.requested(m.ConnectRequest(UUID(int=1), UUID(int=2)))
    assert posted == [] and desk.refused == 0 and len(desk) == 0


# ---- an offer that is gone -------------------------------------------------------------------------------------------


def withdrawn(bus: Joined, offer: Offer) -> list[str]:
    told: list[str] = []
    offer.on_gone = lambda: told.append("gone")
    bus.bus.withdraw(offer)
    return told


def test_it_is_gone_when_the_guest_has_released_it(bus: Joined) -> None:
    told = withdrawn(bus, bus.offers[0])
    assert bus.heard[-1] == m.RescindOffer(1) and not told
    bus.say(m.RelidReleased(1))
    assert told == ["gone"] and bus.offers[0] not in bus.bus.offers


def test_it_is_gone_with_the_guests_connection(bus: Joined) -> None:
    told = withdrawn(bus, bus.offers[0])
    bus.say(m.Unload())
    assert told == ["gone"]
    assert withdrawn(bus, bus.offers[1]) == ["gone"], "the guest does not know it"
    assert bus.offers[1].state is OfferState.UNOFFERED
