"""What a guest has written over words of its rings, at whatever moment, costs it that channel, at the save or at the
restore, and never keeps the others from coming back."""

import struct
from uuid import UUID

import msgspec
import pytest

from support.device import BASE, Machine, connect
from support.multi import MULTI_TYPE, Guest, MultiProvider
from vmbus import providers
from vmbus.bus.local import LocalBus
from vmbus.bus.offers import OfferState
from vmbus.bus.replacing import Restored
from vmbus.device import saved
from vmbus.errors import StateError
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.server import ServerChannel
from vmbus.ring import READ_INDEX, WRITE_INDEX
from vmbus_guest.driver import VmbusDriver

PAGE = 4096
PUSHED = 150

# Of a channel with one data page in each ring: the ring from the guest, then the one to it.
WORDS = {
    "read index of the host": READ_INDEX,
    "write index of the guest": WRITE_INDEX,
    "write index of the host": 2 * PAGE + WRITE_INDEX,
    "read index of the guest": 2 * PAGE + READ_INDEX,
}
HOSTS = [word for word in WORDS if word.endswith("host")]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(providers.PROVIDERS, "multi", MultiProvider)


class Pair:
    """A device with two providers, each with packets in flight in both states: a victim, and one whose traffic must
    come to its end exactly once."""

    def __init__(self, subs: int = 0) -> None:
        self.machine = Machine(("multi", "multi"))
        self.driver: VmbusDriver = connect(self.machine)
        self.rescinded: list[ClientChannel] = []
        self.driver.on_rescind = self.rescinded.append
        self.victim = Guest(self.driver, instance=UUID(int=1))
        if subs:
            self.victim.ask(b"subs", subs)
            self.settle()
        self.subs = [Guest(self.driver, index, instance=UUID(int=1)) for index in range(1, subs + 1)]
        self.other = Guest(self.driver, instance=UUID(int=2))
        for guest in (self.victim, *self.subs, self.other):
            guest.keep = []
            guest.channel.set_transaction_quota(20)  # the rest of them lies in the ring, or finds no room
        for channel in self.machine.device.channels:
            self.provider(channel.interface_instance.int - 1).push(channel, PUSHED)
        self.machine.serve()
        self.settle()

    def settle(self) -> None:
        while self.driver.step(0.0):
            pass

    def provider(self, number: int) -> MultiProvider:
        found = self.machine.providers[number]
        assert isinstance(found, MultiProvider)
        return found

    def scribble(self, guest: Guest, word: str, value: int) -> None:
        view = self.driver.link_of(guest.channel).rings.view
        struct.pack_into("<I", view, WORDS[word], value)

    def word(self, guest: Guest, word: str) -> int:
        view = self.driver.link_of(guest.channel).rings.view
        return int(struct.unpack_from("<I", view, WORDS[word])[0])

    def save(self) -> saved.DeviceState:
        """As the server does: what is written is read and checked before anybody believes in it."""
        data = saved.encode(self.machine.save())
        return saved.verify(data, self.machine.providers)

    def restore(self, state: saved.DeviceState) -> Restored:
        machine = self.machine
        machine.boot()
        restored = machine.adopt(state)
        machine.device.thaw()
        return restored

    def take_all(self, guest: Guest) -> None:
        """All that was pushed on a channel came, once and in order."""
        for completion in guest.keep or ():
            completion.complete()
        guest.keep = None
        self.driver.run_until(lambda: len(guest.got) == PUSHED, 5, "all packets")
        self.settle()
        self.machine.serve()
        assert guest.got == list(range(PUSHED))

    def finish(self, guest: Guest, number: int) -> None:
        """`take_all`, and the channel's provider, which has no other, heard of it all."""
        self.take_all(guest)
        completed = [one for one in self.provider(number).completed if one]
        assert sorted(int.from_bytes(one, "little") for one in completed) == list(range(PUSHED))

    def starts_again(self) -> None:
        """The victim is offered anew, and works."""
        self.settle()
        assert self.victim.channel in self.rescinded
        self.victim.got.clear()
        self.victim.keep = None
        self.driver.enable(self.victim.channel)
        assert self.victim.ask(b"echo") == b"echo\0\0\0\0"


@pytest.mark.parametrize("value", [0xFFFFFFF8, 10, 8], ids=hex)
@pytest.mark.parametrize("word", WORDS)
def test_overwritten_index_before_the_save_fails_that_channel_alone(word: str, value: int) -> None:
    pair = Pair()
    plausible = word not in HOSTS and value == 8  # the guest's own word: it may say what it likes, if that is possible
    pair.scribble(pair.victim, word, value)
    state = pair.save()
    offer = next(one for one in state.bus.offers if one.instance == UUID(int=1).bytes_le)
    if not plausible:
        assert offer.state == OfferState.RESCINDED.value and pair.provider(0).cancelled
    restored = pair.restore(state)
    assert restored.renewed == 0 and restored.packets.queued and restored.packets.sent
    pair.finish(pair.other, 1)
    if not plausible:
        pair.starts_again()


@pytest.mark.parametrize("value", [0xFFFFFFF8, 10, 8], ids=hex)
@pytest.mark.parametrize("word", HOSTS)
def test_overwritten_index_after_the_save_makes_that_channel_anew_alone(word: str, value: int) -> None:
    pair = Pair()
    state = pair.save()
    channel = pair.provider(0).channel
    in_flight = channel.packets_queued, channel.packets_sent
    pair.scribble(pair.victim, word, value)
    restored = pair.restore(state)
    assert restored.renewed == 1
    assert (restored.dropped.queued, restored.dropped.sent) == in_flight
    assert restored.packets.queued and restored.packets.sent
    assert pair.provider(0).events == ["closed multi0.0"], "its owner is told"
    pair.finish(pair.other, 1)
    pair.starts_again()


def test_overwritten_index_of_the_guest_after_the_save_makes_that_channel_anew_alone() -> None:
    for word in set(WORDS) - set(HOSTS):
        pair = Pair()
        state = pair.save()
        pair.scribble(pair.victim, word, 10)
        assert pair.restore(state).renewed == 1
        pair.finish(pair.other, 1)
        pair.starts_again()


def test_a_save_with_an_overwritten_index_does_not_touch_guest_memory() -> None:
    """It may have been saved already. The guest hears of the rescind when it goes on, here as after a restore."""
    pair = Pair()
    pair.machine.quiesce()
    pair.scribble(pair.victim, "write index of the host", 8)
    before = bytes(pair.machine.ram)
    waiting = len(pair.machine.device.synic.outbox)
    state = pair.save()
    assert bytes(pair.machine.ram) == before
    assert len(state.synic.outbox) == waiting + 1
    for channel in pair.machine.device.channels:
        channel.unquiesce()
    pair.machine.device.thaw()
    pair.starts_again()
    pair.finish(pair.other, 1)


def test_an_overwritten_index_of_a_subchannel_costs_that_alone() -> None:
    pair = Pair(subs=2)
    state = pair.save()
    pair.scribble(pair.subs[0], "write index of the host", 8)
    assert pair.restore(state).renewed == 1
    assert pair.provider(0).events == ["closed multi0.1"]
    pair.settle()
    assert pair.rescinded == [pair.subs[0].channel]
    pair.finish(pair.other, 1)
    pair.take_all(pair.subs[1])
    pair.take_all(pair.victim)


def test_an_overwritten_index_of_a_primary_costs_its_subchannels() -> None:
    pair = Pair(subs=2)
    state = pair.save()
    pair.scribble(pair.victim, "read index of the host", 8)
    assert pair.restore(state).renewed == 3
    assert pair.provider(0).events == [f"closed multi0.{index}" for index in range(3)]
    pair.settle()
    assert len(pair.rescinded) == 3
    pair.finish(pair.other, 1)
    pair.starts_again()


def test_a_state_without_own_indices_is_restored_and_an_overwritten_index_believed_where_it_can_be() -> None:
    """As today's states are, which do not have them; and why they do from now on."""
    for value, renewed in ((8, 0), (10, 1)):
        pair = Pair()
        state = pair.save()
        channels = [
            msgspec.structs.replace(
                one,
                incoming=msgspec.structs.replace(one.incoming, own_index=None),
                outgoing=msgspec.structs.replace(one.outgoing, own_index=None),
            )
            for one in state.channels
        ]
        pair.scribble(pair.victim, "read index of the host", value)
        assert pair.restore(msgspec.structs.replace(state, channels=channels)).renewed == renewed
        pair.finish(pair.other, 1)


def test_the_own_index_is_in_the_record() -> None:
    pair = Pair()
    state = pair.save()
    record = state.channels[0]
    assert record.own_indices == (
        pair.word(pair.victim, "read index of the host"),
        pair.word(pair.victim, "write index of the host"),
    )


def test_memory_that_is_missing_is_no_overwritten_index() -> None:
    pair = Pair()
    state = pair.save()
    machine = pair.machine
    machine.boot()
    machine.device.freeze()
    machine.device.memory.map(BASE, memoryview(machine.ram)[:PAGE], True)
    with pytest.raises(StateError, match="not mapped"):
        saved.restore_device(state, machine.device, machine.providers)


@pytest.mark.parametrize("when", ["before the save", "after the save"])
def test_overwritten_index_on_a_bus_within_the_process(when: str) -> None:
    bus = LocalBus()
    gone: list[ClientChannel] = []
    bus.on_rescind = gone.append

    def make() -> None:
        for number in (1, 2):
            server = ServerChannel(MULTI_TYPE, UUID(int=number), name=f"server {number}")
            server.set_process_packet_callbacks(lambda _, completion, payload: completion.complete(payload))
            bus.offer(server)
            server.enable()
            server.start()

    make()
    clients = [ClientChannel(MULTI_TYPE, UUID(int=number), name=f"client {number}") for number in (1, 2)]
    for client in clients:
        bus.open(client)
    bus.run()
    header = bus.offers[0].rings[1].header  # type: ignore[index]
    word = memoryview(header._view)[WRITE_INDEX : WRITE_INDEX + 4]
    if when == "before the save":
        word[:] = struct.pack("<I", 8)
    records = bus.save()
    if when == "after the save":
        word[:] = struct.pack("<I", 8)
    bus.replace(records, make)
    assert gone == [clients[0]] and clients[0].state is ChannelState.DISABLED
    replies: list[bytes] = []
    packet = clients[1].allocate_packet()
    packet.completion_routine = lambda packet, status, reply: replies.append(reply)
    packet.send(b"12345678")
    bus.run()
    assert replies == [b"12345678"]
