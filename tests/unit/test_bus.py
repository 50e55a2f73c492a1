"""The bus: negotiation, offers, the life of a channel, whatever order the guest's messages come in."""

from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from support.bus import Joined, check, instance, one_range, open_channel
from vmbus.bus.offers import MAX_RELID, TRANSITIONS, Offer, OfferEvent, OfferState
from vmbus.bus.server import REFUSED, ConnectionState
from vmbus.errors import UsageError
from vmbus.wire import messages as m


@pytest.fixture
def bus() -> Joined:
    """Connected with the newest version, two channels offered as relids 1 and 2."""
    joined = Joined()
    joined.connect()
    return joined


@pytest.fixture
def opened(bus: Joined) -> Joined:
    """Relid 1 is open with GPADL 7."""
    bus.gpadl()
    assert bus.open() == [m.OpenResult(1, 99, 0)]
    return bus


def kinds(messages: list) -> list[str]:
    return [type(message).__name__ for message in messages]


# ---- negotiation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", list(m.Version))
def test_every_version_that_we_speak_is_agreed_on(version: m.Version) -> None:
    bus = Joined()
    bus.client.initiate_contact(version)
    where = 4 if version >= m.Version.V5_0 else version
    assert bus.heard == [m.VersionResponse(1, 0, where)]
    assert (bus.bus.state, bus.bus.version) == (ConnectionState.CONNECTED, version)
    bus.client.request_offers()
    assert kinds(bus.heard[1:]) == ["OfferChannel", "OfferChannel", "AllOffersDelivered"]
    assert bus.client.connection_id == (4 if version >= m.Version.V5_0 else 1)


@pytest.mark.parametrize("version", [0, 0xD, 0x10001, 0x30000, 0x40002, 0x50004, 0x60000, 0xFFFFFFFF])
def test_an_unknown_version_is_refused_and_another_may_follow(version: int) -> None:
    bus = Joined()
    assert bus.say(m.InitiateContact(version, 0, 0, 0, 0)) == [m.VersionResponse(0, 0, 0)]
    assert bus.bus.state is ConnectionState.DISCONNECTED
    assert bus.say(m.RequestOffers()) == [] and bus.bus.rejected == 1
    assert bus.say(m.InitiateContact(m.Version.V4_0, 0, 0, 0, 0)) == [m.VersionResponse(1, 0, m.Version.V4_0)]


def test_relids_that_are_released_outside_of_a_connection_are_no_complaint(opened: Joined) -> None:
    """Linux releases each of its channels after UNLOAD, which has released them all."""
    opened.owner.prompt_close = False
    assert opened.say(m.Unload()) == [] and opened.bus.disconnecting
    assert opened.say(m.RelidReleased(1)) == []
    opened.owner.let_go(opened.offers[0])
    assert opened.heard[-1] == m.UnloadResponse()
    for relid in (1, 2, 7):
        assert opened.say(m.RelidReleased(relid)) == []
    assert opened.bus.rejected == 0
    opened.connect()
    assert len(opened.client.offers) == 2 and opened.say(m.RelidReleased(7)) == [] and opened.bus.rejected == 1


@pytest.mark.parametrize("last", ["Unload", "InitiateContact"])
def test_the_last_of_contact_and_unload_counts(opened: Joined, last: str) -> None:
    opened.owner.prompt_close = False
    messages = {"InitiateContact": m.InitiateContact(m.Version.V5_3, 0, 2, 0, 0), "Unload": m.Unload()}
    for name in (*(set(messages) - {last}), last):
        assert opened.say(messages[name]) == []
    before = len(opened.heard)
    opened.owner.let_go(opened.offers[0])
    assert kinds(opened.heard[before:]) == ["UnloadResponse" if last == "Unload" else "VersionResponse"]
    connected = last != "Unload"
    assert (opened.bus.state is ConnectionState.CONNECTED) == connected
    # Nothing of the superseded request is left over for the next connection.
    opened.owner.prompt_close = True
    opened.connect()
    opened.gpadl()
    opened.open()
    before = len(opened.heard)
    opened.say(m.CloseChannel(1))
    assert opened.heard[before:] == [] and opened.bus.state is ConnectionState.CONNECTED


@pytest.mark.parametrize("request_", [m.Unload(), m.InitiateContact(m.Version.V5_3, 0, 2, 0, 0)])
def test_a_channel_cannot_be_reopened_while_the_connection_ends(opened: Joined, request_) -> None:
    opened.owner.prompt_close = False
    opened.say(request_)
    opened.open()
    opened.say(m.CloseChannel(1))
    before = len(opened.heard)
    opened.owner.let_go(opened.offers[0])
    assert kinds(opened.heard[before:])[-1:] in (["UnloadResponse"], ["VersionResponse"])
    assert opened.offers[0].state is OfferState.UNOFFERED


# ---- offers ----------------------------------------------------------------------------------------------------------


def test_offers_say_what_their_owner_said() -> None:
    bus = Joined(1, flags=0x10, user_defined=b"for the guest")
    bus.connect()
    (offer,) = bus.client.offers.values()
    assert (offer.interface_instance, offer.flags, offer.relid) == (instance(0), 0x10, 1)
    assert offer.user_defined == b"for the guest".ljust(120, b"\0")
    assert (offer.dedicated_interrupt, offer.monitor_allocated, offer.connection_id) == (1, 0, 0x10001)
    assert bus.bus.find(offer.connection_id) is None, "a closed channel cannot be signalled"


def test_an_offer_that_comes_late_is_sent_at_once(bus: Joined) -> None:
    bus.offer(2)
    assert kinds(bus.heard)[-2:] == ["AllOffersDelivered", "OfferChannel"]
    assert bus.heard[-1].relid == 3
    with pytest.raises(UsageError, match="offered already"):
        bus.offer(2)


def test_there_are_as_many_offers_as_relids() -> None:
    bus = Joined(MAX_RELID)
    bus.connect()
    assert sorted(bus.client.offers) == list(range(1, MAX_RELID + 1))
    with pytest.raises(UsageError, match="relids"):
        bus.offer(MAX_RELID)
    assert len(bus.bus.offers) == MAX_RELID, "what was refused is not kept"
    bus.connect()
    assert len(bus.client.offers) == MAX_RELID


# ---- open and close --------------------------------------------------------------------------------------------------


def test_the_owner_may_take_its_time(bus: Joined) -> None:
    bus.owner.prompt_open = False
    bus.gpadl()
    assert bus.open() == []
    assert bus.open() == [m.OpenResult(1, 99, REFUSED)], "while it is opening it cannot be opened"
    assert bus.say(m.CloseChannel(1)) == [] and bus.offers[0].state is OfferState.OPENING
    bus.bus.opened(bus.offers[0], 0)
    assert bus.heard[-1] == m.OpenResult(1, 99, 0)
    bus.bus.opened(bus.offers[0], 0)
    assert kinds(bus.heard).count("OpenResult") == 2, "a second answer is not passed on"


def test_an_open_while_closing_is_done_afterwards(opened: Joined) -> None:
    opened.owner.prompt_close = False
    opened.say(m.CloseChannel(1))
    opened.gpadl(handle=8)
    assert opened.say(m.GpadlTeardown(1, 7)) == []
    assert opened.open(handle=8) == []
    assert opened.open(handle=8) == [m.OpenResult(1, 99, REFUSED)], "one reopen at a time"
    before = len(opened.heard)
    opened.owner.let_go(opened.offers[0])
    check(opened.bus, opened.owner)
    assert opened.heard[before:] == [m.GpadlTorndown(7), m.OpenResult(1, 99, 0)]


def test_an_open_while_closing_whose_rings_go_with_the_close_is_refused(opened: Joined) -> None:
    opened.owner.prompt_close = False
    opened.say(m.CloseChannel(1))
    assert opened.open(handle=7) == []
    assert opened.say(m.GpadlTeardown(1, 7)) == []
    before = len(opened.heard)
    opened.owner.let_go(opened.offers[0])  # the owner's code must not suffer for it
    assert opened.heard[before:] == [m.GpadlTorndown(7), m.OpenResult(1, 99, REFUSED)]
    assert opened.offers[0].state is OfferState.OFFERED


def test_memory_of_a_closing_channel_is_given_back_when_the_owner_let_go(opened: Joined) -> None:
    opened.gpadl(handle=8)
    opened.owner.prompt_close = False
    opened.say(m.CloseChannel(1))
    assert opened.say(m.GpadlTeardown(1, 7)) == []
    assert opened.say(m.GpadlTeardown(1, 8)) == []
    assert opened.say(m.GpadlTeardown(1, 7)) == [], "the first is still to be answered"
    before = len(opened.heard)
    opened.owner.let_go(opened.offers[0])
    assert opened.heard[before:] == [m.GpadlTorndown(7), m.GpadlTorndown(8)]
    assert not opened.bus.gpadls.complete


def test_taking_the_rings_of_an_open_channel_costs_the_channel(opened: Joined) -> None:
    answers = opened.say(m.GpadlTeardown(1, 7))
    assert sorted(kinds(answers)) == ["GpadlTorndown", "RescindOffer"]
    assert opened.owner.events[-1] == ("close", "owner 0", True)
    assert kinds(opened.say(m.RelidReleased(1))) == ["OfferChannel"]


@pytest.mark.parametrize("version", [m.Version.V5_2, m.Version.V5_3])
def test_interrupts_can_be_moved(version: m.Version) -> None:
    bus = Joined()
    bus.connect(version)
    bus.gpadl()
    bus.open()
    acknowledged = version >= m.Version.V5_3
    assert bus.say(m.ModifyChannel(1, 3)) == ([m.ModifyChannelResponse(1, 0)] if acknowledged else [])
    assert bus.offers[0].request.target_vp == 3
    assert bus.say(m.ModifyChannel(2, 3)) == ([m.ModifyChannelResponse(2, REFUSED)] if acknowledged else [])
    assert bus.say(m.ModifyChannel(77, 3)) == ([m.ModifyChannelResponse(77, REFUSED)] if acknowledged else [])


# ---- rescind ---------------------------------------------------------------------------------------------------------


def reach(state: OfferState) -> Joined:
    """A bus whose relid 1 is in `state`."""
    bus = Joined()
    bus.connect()
    bus.gpadl()
    bus.owner.prompt_open = state is not OfferState.OPENING
    bus.owner.prompt_close = False
    if state is not OfferState.OFFERED:
        bus.open()
    if state is OfferState.CLOSING:
        bus.say(m.CloseChannel(1))
    assert bus.offers[0].state is state
    return bus


@pytest.mark.parametrize("state", [OfferState.OFFERED, OfferState.OPENING, OfferState.OPEN, OfferState.CLOSING])
def test_rescind_in_every_state(state: OfferState) -> None:
    bus = reach(state)
    before = len(bus.heard)
    bus.bus.rescind(bus.offers[0])
    bus.bus.rescind(bus.offers[0])
    expected = [m.OpenResult(1, 99, REFUSED)] if state is OfferState.OPENING else []
    assert bus.heard[before:] == [*expected, m.RescindOffer(1)]
    check(bus.bus, bus.owner)
    assert not bus.owner.using, "the owner had to let go"
    # What a guest may still send: nothing is answered that has no answer, and the rest is.
    assert bus.say(m.CloseChannel(1)) == []
    assert bus.say(m.GpadlTeardown(1, 7)) == [m.GpadlTorndown(7)]
    bus.gpadl(handle=8)
    rejected = bus.bus.rejected
    offer = bus.say(m.RelidReleased(1))
    assert kinds(offer) == ["OfferChannel"] and offer[0].interface_instance == instance(0)
    assert not bus.bus.gpadls.complete and bus.bus.rejected == rejected
    bus.owner.prompt_open = True
    bus.gpadl()
    assert bus.open() == [m.OpenResult(1, 99, 0)]


@pytest.mark.parametrize("state", [OfferState.OPENING, OfferState.OPEN, OfferState.CLOSING])
def test_a_channel_in_use_cannot_be_released(state: OfferState) -> None:
    bus = reach(state)
    assert bus.say(m.RelidReleased(1)) == []
    assert bus.offers[0].state is state and bus.bus.rejected == 1


# ---- whatever comes --------------------------------------------------------------------------------------------------


@given(number=st.integers(0, 40), body=st.binary(min_size=0, max_size=232))
def test_random_bodies_of_every_message(number: int, body: bytes) -> None:
    bus = Joined()
    bus.connect()
    bus.gpadl()
    bus.open()
    bus.say(number.to_bytes(4, "little") + bytes(4) + body)


RELIDS = st.sampled_from([0, 1, 2, 3, 2047, 2048, 0xFFFFFFFF])
HANDLES = st.sampled_from([0, 7, 8, 9])


class AnyGuest(RuleBasedStateMachine):
    """A guest that sends whatever it likes, owners that are slow: answers are counted, invariants checked."""

    def __init__(self) -> None:
        super().__init__()
        self.bus = Joined(3)
        self.bus.owner.prompt_open = self.bus.owner.prompt_close = False
        self.waiting = {"open": 0, "created": 0, "unload": False, "contact": False}

    def say(self, message) -> list:
        return self.bus.say(message)

    @rule(version=st.sampled_from([*m.Version, 0x60000]))
    def contact(self, version: int) -> None:
        self.say(m.InitiateContact(version, 0, 2, 0, 0))

    @rule()
    def request_offers(self) -> None:
        self.say(m.RequestOffers())

    @rule()
    def unload(self) -> None:
        self.say(m.Unload())

    @rule(relid=RELIDS, handle=HANDLES, pages=st.integers(1, 60))
    def gpadl(self, relid: int, handle: int, pages: int) -> None:
        connected = self.bus.bus.state is ConnectionState.CONNECTED
        disconnecting = self.bus.bus.disconnecting
        answers = []
        for message in m.gpadl_messages(relid, handle, one_range(pages), 1):
            answers += self.say(message)
        created = [answer for answer in answers if isinstance(answer, m.GpadlCreated)]
        if connected and not disconnecting:
            assert len(created) >= 1

    @rule(relid=RELIDS, handle=HANDLES, size=st.sampled_from([16, 24, 240, 800, 7, 0xFFF8]), count=st.integers(0, 3))
    def header(self, relid: int, handle: int, size: int, count: int) -> None:
        self.say(m.GpadlHeader(relid, handle, size, count, one_range(2)))

    @rule(handle=HANDLES, words=st.binary(max_size=224))
    def body(self, handle: int, words: bytes) -> None:
        self.say(m.GpadlBody(0, handle, words))

    @rule(relid=RELIDS, handle=HANDLES)
    def tear_down(self, relid: int, handle: int) -> None:
        bus = self.bus.bus
        offer = next((one for one in bus.offers if one.relid == relid), None)
        late = offer is not None and offer.state is OfferState.CLOSING and (relid, handle) in bus.gpadls.complete
        served = bus.state is ConnectionState.CONNECTED and not bus.disconnecting
        answers = self.say(m.GpadlTeardown(relid, handle))
        assert answers.count(m.GpadlTorndown(handle)) == int(served and not late)

    @rule(relid=RELIDS, handle=HANDLES)
    def open(self, relid: int, handle: int) -> None:
        bus = self.bus.bus
        offer = next((one for one in bus.offers if one.relid == relid), None)
        quiet = offer is not None and (
            offer.state is OfferState.RESCINDED
            or (offer.state is OfferState.CLOSING and offer.reopen is None)
            or (offer.state is OfferState.OFFERED and (relid, handle) in bus.gpadls.complete)
        )
        served = bus.state is ConnectionState.CONNECTED and not bus.disconnecting
        answers = self.say(open_channel(relid, handle))
        assert answers == ([m.OpenResult(relid, 99, REFUSED)] if served and not quiet else [])

    @rule(relid=RELIDS)
    def close(self, relid: int) -> None:
        assert self.say(m.CloseChannel(relid)) == []

    @rule(relid=RELIDS)
    def release(self, relid: int) -> None:
        self.say(m.RelidReleased(relid))

    @rule(relid=RELIDS)
    def modify(self, relid: int) -> None:
        bus = self.bus.bus
        served = bus.version >= m.Version.V5_3 and not bus.disconnecting
        assert kinds(self.say(m.ModifyChannel(relid, 1))) == ["ModifyChannelResponse"] * served

    @rule(data=st.binary(max_size=240))
    def garbage(self, data: bytes) -> None:
        self.say(data)

    @rule(index=st.integers(0, 2), status=st.sampled_from([0, 0, 0xC0000001]))
    def owner_opens(self, index: int, status: int) -> None:
        offer = self.bus.offers[index]
        if offer.state is OfferState.OPENING:
            before = len(self.bus.heard)
            if status:
                self.bus.owner.using.pop(id(offer))
            self.bus.bus.opened(offer, status)
            assert kinds(self.bus.heard[before:]) == ["OpenResult"]

    @rule(index=st.integers(0, 2))
    def owner_lets_go(self, index: int) -> None:
        offer = self.bus.offers[index]
        if offer.state is OfferState.CLOSING:
            torndown, reopen = list(offer.teardowns), offer.reopen
            before = len(self.bus.heard)
            self.bus.owner.let_go(offer)
            heard = self.bus.heard[before:]
            assert heard[: len(torndown)] == [m.GpadlTorndown(handle) for handle in torndown]
            refused = reopen is not None and offer.state is OfferState.OFFERED
            assert kinds(heard).count("OpenResult") == int(refused)

    @rule(index=st.integers(0, 2))
    def rescind(self, index: int) -> None:
        offer = self.bus.offers[index]
        owed = len(offer.teardowns) + (offer.state is OfferState.OPENING) + (offer.reopen is not None)
        known = offer.state not in (OfferState.UNOFFERED, OfferState.RESCINDED)
        before = len(self.bus.heard)
        self.bus.bus.rescind(offer)
        answers = [one for one in kinds(self.bus.heard[before:]) if one in ("GpadlTorndown", "OpenResult")]
        assert len(answers) == owed * known

    @rule()
    def reset(self) -> None:
        self.bus.bus.reset()
        assert self.bus.bus.state is ConnectionState.DISCONNECTED

    @invariant()
    def holds(self) -> None:
        check(self.bus.bus, self.bus.owner)
        waiting = self.bus.bus.disconnecting
        assert not waiting or any(offer.in_use for offer in self.bus.bus.offers), "nothing to wait for: answer"


AnyGuest.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_guest = pytest.mark.unit(AnyGuest.TestCase)


# ---- the table of offers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", OfferState)
@pytest.mark.parametrize("event", OfferEvent)
def test_offers_move_by_their_table_and_not_otherwise(state: OfferState, event: OfferEvent) -> None:
    offer = Offer(UUID(int=1), UUID(int=2), 0, b"", None)
    offer.state = state
    if (state, event) in TRANSITIONS:
        offer.move(event)
        assert offer.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(UsageError, match=f"is {state.value}: '{event.value}' is not possible now"):
            offer.move(event)
        assert offer.state is state


def test_every_state_of_an_offer_is_reached_and_left() -> None:
    assert {state for state, _ in TRANSITIONS} == set(TRANSITIONS.values()) == set(OfferState)
    assert {event for _, event in TRANSITIONS} == set(OfferEvent)
