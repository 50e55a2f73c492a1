"""Work that one request of a guest's makes necessary, in pieces and turns; and a bus all of whose work is put off."""

from __future__ import annotations

import asyncio
import random

import pytest

from support.bus import TYPE, Joined, instance, one_range
from vmbus.bus.offers import Offer, OfferState
from vmbus.bus.server import BusServer, ConnectionState
from vmbus.util import pieces
from vmbus.util.backlog import Backlog
from vmbus.util.pieces import TURN_SECONDS
from vmbus.wire import messages as m


class Slow:
    """A backlog whose pieces take `piece` seconds each of a clock of their own. `done`: in that order."""

    def __init__(self, piece: float) -> None:
        self.now = 0.0
        self.piece = piece
        self.asked = 0
        self.done: list[int] = []
        self.backlog = Backlog(self._schedule, lambda: self.now)

    def _schedule(self) -> None:
        self.asked += 1

    def do(self, *numbers: int) -> None:
        for number in numbers:
            self.backlog.do(lambda number=number: self._take(number))

    def _take(self, number: int) -> None:
        self.now += self.piece
        self.done.append(number)


def test_a_turn_is_short_and_the_rest_is_done_in_order() -> None:
    slow = Slow(TURN_SECONDS / 4)
    with slow.backlog.turn():
        slow.do(*range(10))
    assert slow.done == [0, 1, 2, 3] and slow.asked == 1
    slow.do(10)  # waits its turn, also when it comes later, from outside
    slow.backlog.run()
    assert slow.done == list(range(8)) and slow.asked == 2
    slow.backlog.run()
    assert slow.done == list(range(11)) and slow.asked == 2 and not slow.backlog


def test_work_in_turns_lets_others_have_theirs_and_is_undone_when_it_is_called_off() -> None:
    now, done = 0.0, []

    def work() -> pieces.Pieces[str]:
        nonlocal now
        try:
            for number in range(8):
                now += TURN_SECONDS / 4
                done.append(number)
                yield
        except GeneratorExit:
            done.append("undone")
            raise
        return "all"

    async def turns(most: int) -> list[int]:
        task = asyncio.ensure_future(pieces.in_turns(work(), clock=lambda: now))
        lengths = []
        while not task.done() and len(lengths) < most:
            lengths.append(len(done))
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return lengths

    assert pieces.at_once(work()) == pieces.whole(work)() == "all" and done == 2 * list(range(8))
    done.clear()
    assert asyncio.run(turns(9)) == [0, 4, 8] and done == list(range(8))
    done.clear()
    asyncio.run(turns(1))
    assert done == [0, 1, 2, 3, "undone"]


def test_turns_inside_of_a_turn_are_parts_of_it() -> None:
    slow = Slow(TURN_SECONDS)
    with slow.backlog.turn():
        with slow.backlog.turn():
            slow.do(0)
        slow.do(1)
        assert slow.done == [0]
    slow.backlog.finish()
    assert slow.done == [0, 1]


def test_who_waits_inside_of_a_turn_lets_the_backlog_go_on() -> None:
    slow = Slow(TURN_SECONDS)
    with slow.backlog.turn():
        slow.do(0, 1, 2)
        slow.backlog.run()
        slow.backlog.run()
        assert slow.done == [0, 1, 2]


def test_at_once_and_clear() -> None:
    slow = Slow(TURN_SECONDS)
    with slow.backlog.turn():
        slow.do(0, 1)
        slow.backlog.clear()
        slow.backlog.at_once = True
        slow.do(2, 3)
    assert slow.done == [0, 2, 3]


def test_a_piece_that_raises_does_not_keep_the_others() -> None:
    slow = Slow(TURN_SECONDS)

    def defect() -> None:
        raise ZeroDivisionError

    with slow.backlog.turn():
        slow.do(0)
        slow.backlog.do(defect)
        slow.do(1)
    with pytest.raises(ZeroDivisionError):
        slow.backlog.run()
    slow.backlog.run()
    assert slow.done == [0, 1] and slow.asked == 2


# ---- a bus, all of whose work is done later --------------------------------------------------------------------------


class Later(Joined):
    """What grows with the channels is done piece by piece, some pieces after each message, as `choose` wants."""

    def __init__(self, choose: random.Random, offers: int) -> None:
        super().__init__(0)
        self.choose = choose
        self.now = 0.0
        self.backlog = Backlog(lambda: None, lambda: self.now)
        self.bus = self.owner.bus = BusServer(self.owner, self.backlog)
        for number in range(offers):
            self.offer(number)
        for number in range(1, offers):  # sub-channels of the first
            sub = Offer(TYPE, instance(0), 0, b"", f"sub {number}", number)
            self.offers.append(sub)
            self.bus.offer(sub)

    def say(self, message: m.OpenChannel | bytes) -> list[m.OfferChannel]:
        with self.backlog.turn():
            self.now += TURN_SECONDS
            heard = super().say(message)
        for _ in range(self.choose.randrange(3)):
            self.backlog.run()
        return heard

    def settle(self) -> None:
        self.backlog.finish()


@pytest.mark.parametrize("seed", range(60))
def test_a_bus_in_pieces_comes_to_the_same_end(seed: int) -> None:
    """Whatever the guest says between two pieces: all is answered once, and nothing is left in use."""
    choose = random.Random(seed)
    bus = Later(choose, 6)
    for life in range(3):
        bus.client.initiate_contact(m.Version.V5_3)
        bus.settle()
        assert bus.client.version_response is not None
        bus.client.request_offers()
        bus.settle()
        assert bus.client.all_offers and len(bus.client.offers) == 6
        handles: dict[int, int] = {}
        for handle in range(100 * life, 100 * life + 40):
            relid = choose.choice([*bus.client.offers])
            act = choose.randrange(6)
            if act < 3 and relid not in handles:
                handles[relid] = handle
                for message in m.gpadl_messages(relid, handle, one_range(4), 1):
                    bus.say(message)
                bus.say(m.OpenChannel(relid, relid, handle, 0, 2, b""))
            elif act == 3:
                bus.say(m.CloseChannel(relid))
            elif act == 4 and relid in handles:
                bus.say(m.GpadlTeardown(relid, handles.pop(relid)))
            elif act == 5:
                bus.bus.rescind_in_pieces(choose.choice(bus.offers))
            for gone in sorted(bus.client.rescinded):
                handles.pop(gone, None)
                bus.client.release(gone)
        end = choose.choice(["unload", "reset", "contact"])
        if end == "unload":
            bus.client.unload()
            bus.settle()
            assert bus.client.unloaded
        elif end == "reset":
            with bus.backlog.turn():
                bus.now += TURN_SECONDS
                bus.bus.reset()
            assert bus.bus.state is ConnectionState.DISCONNECTED
            heard = len(bus.heard)
            bus.settle()
            assert len(bus.heard) == heard, "after a reset nothing is said"
        if end != "contact":
            assert {offer.state for offer in bus.offers} == {OfferState.UNOFFERED} and not bus.owner.using
            assert not bus.bus.gpadls.complete


def test_a_subchannel_is_not_opened_beside_a_primary_that_is_being_closed() -> None:
    bus = Later(random.Random(1), 3)
    bus.connect()
    bus.settle()
    bus.open(1, bus.gpadl(1, handle=1))
    bus.settle()
    sub = next(relid for relid, offer in bus.client.offers.items() if offer.subchannel_index)
    handle = bus.gpadl(sub, handle=2)
    bus.choose.randrange = lambda *_: 0  # type: ignore[method-assign]
    bus.say(m.CloseChannel(1))
    answers = bus.say(m.OpenChannel(sub, 5, handle, 0, 2, b""))
    assert [one.status != 0 for one in answers] == [True]
    bus.settle()
    assert sub in bus.client.rescinded and not bus.owner.using
