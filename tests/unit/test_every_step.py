"""A save and restore at every step of every script: the end is that of the run without, and nothing is lost or doubled.

The device is in this process, so that each step of both ends is a point (see `support.steps`). The last line that this
prints says how many were tested.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock
from uuid import UUID

import msgspec
import pytest

from support.step_provider import GuestEnd, PipeEnd, PipeProvider, StepProvider
from support.step_scripts import ONE, SCENARIOS, STEPS
from support.steps import Diverged, Report, Run, Scenario, Stuck, World, checkpoint, every_step, replace, run_once
from vmbus.bus.synic import Synic
from vmbus.device import saved
from vmbus.errors import VmbusError
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.saved import ChannelChunk, CompletionChunk, PacketChunk, decode_chunk, decode_lib, encode
from vmbus.kmcl.status import KmclError
from vmbus.ring import RingReader, RingWriter
from vmbus.wire import messages as m
from vmbus.wire.synic import CONTROL_ENABLE, Register

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """What scripts do wrong on purpose is logged each time."""
    caplog.set_level(logging.CRITICAL + 1, "vmbus")


@pytest.fixture(scope="module")
def total(note: Callable[[str], None]) -> Iterator[Report]:
    total = Report("every step, in process")
    yield total
    note(f"{total}; {len(total.kinds)} kinds of steps")


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_save_at_every_step_changes_nothing(scenario: Scenario, eager: bool, total: Report) -> None:
    report = every_step(scenario, eager=eager, each=6 if eager else 1)
    print(report)
    assert report.saves > 2 * report.points > 80
    total.add(report)


def test_every_step_passes_through_the_whole_protocol() -> None:
    """Between them the scripts send and get every message that there is, and find packets in every state."""
    found = Report()
    sent: set[type] = set()
    heard: set[str] = set()
    decode = m.decode

    def listen(data: bytes, direction: m.Direction) -> object:
        message = decode(data, direction)
        if direction is m.Direction.GUEST:
            sent.add(type(message))
        return message

    with mock.patch("vmbus.wire.messages.decode", listen):
        for scenario in SCENARIOS:
            outcome, world, kinds = run_once(scenario, checkpoint)
            found.add(Report(peak=world.peak, kinds=kinds))
            heard |= {text.partition("(")[0] for text in outcome["messages"]}
    rows = m.MESSAGES.values()
    assert sent == {row.message for row in rows if row.direction is m.Direction.GUEST}
    assert all(found.peak), "packets queued, sent, and completions that wait for room"
    registers = {"MESSAGE_PAGE_LOW", "CONTROL", "EOM", "SIGNAL_EVENT", "POST_MESSAGE", "POST_ADDRESS_LOW"}
    assert found.kinds >= {f"a write to {register}" for register in registers}
    assert found.kinds >= {"a fence of the guest", "the interrupt taken", "a turn of the device"}
    assert heard >= {row.message.__name__ for row in rows if row.direction is m.Direction.HOST}


# ---- where a save does show ------------------------------------------------------------------------------------------


def test_every_step_where_a_save_is_refused_the_device_runs_on() -> None:
    """A provider that never completes what it holds: no save, and not the least effect of having tried."""

    def stubborn(run: Run) -> None:
        run.connect()
        end = GuestEnd(run.driver, instance=ONE).enable()
        run.books["guest"] = end.books
        end.send(b"hold")
        for _ in range(3):
            end.send(b"ask_")
        end.push(30)
        run.settle()

    class Never(StepProvider):
        def _release(self) -> None:
            pass

    report = every_step(Scenario(stubborn, [(Never, "one", ONE, {})]))
    assert report.refused > 30 and report.saves > 30


def test_every_step_of_a_channel_that_is_made_anew() -> None:
    """With FORCE_NEW_CHANNEL a restore is visible: the channel is rescinded and comes back. Wherever that happens, what
    was asked has been answered or cancelled, once, and the new channel works."""

    def again(run: Run) -> None:
        driver = run.connect()
        end = GuestEnd(driver, instance=ONE)
        run.books["guest"] = end.books
        for _ in range(3):
            if end.channel.state is ChannelState.DISABLED:
                end.enable()
            end.send(b"subs", 1)
            end.push(20)
            run.settle()
            if end.channel.state is ChannelState.ACTIVE:
                for _ in range(3):
                    end.send(b"ask_")
            run.settle()
        if end.channel.state is ChannelState.DISABLED:
            end.enable()
        end.send(b"ask_")
        run.settle()
        if end.channel.state is ChannelState.DISABLED:
            end.enable()
            assert end.ask(b"ask_")

    scenario = Scenario(again, [(StepProvider, "one", ONE, {"force_new": True})])
    _, plain, _ = run_once(scenario, None)
    rescinded = 0
    for point in range(1, plain.points + 1):
        outcome, world, _ = run_once(scenario, lambda world, _: replace(world), only=point)
        books = outcome["books"]["guest"]
        assert not books["unanswered"] and all(len(given) == 1 for given in books["answers"].values()), point
        provider = world.provider("one")
        ends = [number for number, _ in provider.completed] + provider.cancelled
        assert len(ends) == len(set(ends)), point
        assert not outcome["failures"], (point, outcome["failures"])
        rescinded += any(text.startswith("RescindOffer") for text in outcome["messages"])
    assert rescinded > plain.points / 2


# ---- sabotage --------------------------------------------------------------------------------------------------------

Change = Callable[[saved.DeviceState], saved.DeviceState]


def with_bus(state: saved.DeviceState, **changes: object) -> saved.DeviceState:
    return msgspec.structs.replace(state, bus=msgspec.structs.replace(state.bus, **changes))


def with_synic(state: saved.DeviceState, **changes: object) -> saved.DeviceState:
    return msgspec.structs.replace(state, synic=msgspec.structs.replace(state.synic, **changes))


def with_chunks(state: saved.DeviceState, change: Callable[[list[object]], list[object]]) -> saved.DeviceState:
    """Every channel's chunks, decoded, and with a head that fits them again."""
    records = []
    for record in state.channels:
        head, *rest = (decode_chunk(data) for data in record.chunks)
        assert isinstance(head, ChannelChunk)
        new = change(rest)
        head = msgspec.structs.replace(head, entries=len(new))
        records.append(msgspec.structs.replace(record, chunks=[encode(head), *map(encode, new)]))  # type: ignore[arg-type]
    return msgspec.structs.replace(state, channels=records)


def with_heads(state: saved.DeviceState, **changes: object) -> saved.DeviceState:
    records = []
    for record in state.channels:
        head = msgspec.structs.replace(decode_chunk(record.chunks[0]), **changes)
        records.append(msgspec.structs.replace(record, chunks=[encode(head), *record.chunks[1:]]))
    return msgspec.structs.replace(state, channels=records)


def queued(chunk: object) -> bool | None:
    return decode_lib(chunk.lib).queued if isinstance(chunk, PacketChunk) else None


def without_first(chunks: list[object], which: Callable[[object], bool]) -> list[object]:
    found = next((at for at, one in enumerate(chunks) if which(one)), None)
    return chunks if found is None else chunks[:found] + chunks[found + 1 :]


def sent_again(chunks: list[object]) -> list[object]:
    """A packet that is in the ring is taken for one that waits for room."""
    for at, one in enumerate(chunks):
        if queued(one) is False:
            assert isinstance(one, PacketChunk)
            lib = msgspec.structs.replace(decode_lib(one.lib), queued=True, body=bytes(160))
            return [*chunks[:at], *chunks[at + 1 :], PacketChunk(lib=encode(lib), save=one.save)]
    return chunks


def not_sent(chunks: list[object]) -> list[object]:
    """A packet that waits for room is taken for one that is in the ring."""
    for at, one in enumerate(chunks):
        if queued(one):
            assert isinstance(one, PacketChunk)
            lib = decode_lib(one.lib)
            if lib.flags:
                lib = msgspec.structs.replace(lib, queued=False, body=b"")
                return [*chunks[:at], PacketChunk(lib=encode(lib), save=one.save), *chunks[at + 1 :]]
    return chunks


STATES: dict[str, tuple[str, Change]] = {
    "a message that waits": ("messages_not_taken", lambda s: with_synic(s, outbox=s.synic.outbox[:-1])),
    "a message twice": ("messages_not_taken", lambda s: with_synic(s, outbox=s.synic.outbox[:1] + s.synic.outbox)),
    "messages in another order": ("messages_not_taken", lambda s: with_synic(s, outbox=s.synic.outbox[::-1])),
    "a register": ("messages_not_taken", lambda s: with_synic(s, registers={**s.synic.registers, 0x40: 0})),
    "that the SynIC is on": ("first_packets", lambda s: with_synic(s, enabled=False)),
    "a fault of the SynIC": ("synic_off_and_on", lambda s: with_synic(s, fault=False)),
    "what a post came to": ("synic_off_and_on", lambda s: with_synic(s, post_status=0)),
    "a half-received GPADL": ("gpadls", lambda s: with_bus(s, partial=[])),
    "the last words of a half-received GPADL": (
        "gpadls",
        lambda s: with_bus(
            s, partial=[msgspec.structs.replace(one, data=one.data[:-8]) for one in s.bus.partial if one.data]
        ),
    ),
    "a GPADL": ("gpadls", lambda s: with_bus(s, gpadls=s.bus.gpadls[:-1])),
    "a teardown that waits": (
        "gpadls_of_a_provider",
        lambda s: with_bus(s, gpadls=[msgspec.structs.replace(g, tearing_down=False) for g in s.bus.gpadls]),
    ),
    "the version": ("gpadls", lambda s: with_bus(s, version=min(s.bus.version, m.Version.V4_0))),
    "the connection": (
        "gpadls",
        lambda s: (
            with_bus(
                s,
                connected=False,
                offers_requested=False,
                offers=[msgspec.structs.replace(one, state="unoffered", relid=0, open=None) for one in s.bus.offers],
                gpadls=[],
                partial=[],
            )
            if not any(one.open for one in s.bus.offers)
            else s
        ),
    ),
    "that offers were asked for": ("negotiation", lambda s: with_bus(s, offers_requested=False)),
    "a withdrawn offer": ("rescinds", lambda s: with_bus(s, offers=[one for one in s.bus.offers if not one.withdrawn])),
    "a completion that waits for room": (
        "completions_wait",
        lambda s: with_chunks(s, lambda c: without_first(c, lambda one: isinstance(one, CompletionChunk))),
    ),
    "a completion twice": (
        "completions_wait",
        lambda s: with_chunks(s, lambda c: c + [one for one in c[-1:] if isinstance(one, CompletionChunk)]),
    ),
    "a packet that is queued": (
        "down_ring_full",
        lambda s: with_chunks(s, lambda c: without_first(c, lambda one: queued(one) is True)),
    ),
    "a packet that was sent": (
        "down_ring_full",
        lambda s: with_chunks(s, lambda c: without_first(c, lambda one: queued(one) is False)),
    ),
    "a message of a pipe": (
        "pipes",
        lambda s: with_chunks(s, lambda c: without_first(c, lambda one: queued(one) is True)),
    ),
    "a sent packet's state": ("down_ring_full", lambda s: with_chunks(s, sent_again)),
    "a queued packet's state": ("down_ring_full", lambda s: with_chunks(s, not_sent)),
    "the order of queued packets": ("down_ring_full", lambda s: with_chunks(s, lambda c: c[:-4] + c[:-5:-1])),
    "the next transaction": ("down_ring_full", lambda s: with_heads(s, next_transaction=1 << 20)),
    "the owner's wish to pause": ("pauses", lambda s: with_heads(s, started=True)),
    "the owner's wish to run": ("pauses", lambda s: with_heads(s, started=False)),
    "a provider's state": (
        "first_packets",
        lambda s: msgspec.structs.replace(
            s, providers=[msgspec.structs.replace(one, state=StepProvider.empty()) for one in s.providers]
        ),
    ),
}


@pytest.mark.parametrize("what", STATES)
def test_every_step_notices_what_is_missing_from_the_state(what: str) -> None:
    name, change = STATES[what]
    changed = 0

    def tamper(world: World, state: saved.DeviceState) -> saved.DeviceState:
        nonlocal changed
        new = change(state)
        changed += new != state
        return new

    with pytest.raises((Diverged, Stuck, AssertionError, VmbusError)) as caught:
        every_step(BY_NAME[name], tamper=tamper)
    assert changed, "the sabotage never changed anything"
    print(repr(caught.value)[:300])


@contextmanager
def no_interrupt_again() -> Iterator[None]:
    with mock.patch.object(Synic, "kick", Synic.deliver):
        yield


@contextmanager
def no_turn_after_the_restore() -> Iterator[None]:
    def thaw(device: object) -> None:
        device.frozen = False  # type: ignore[attr-defined]

    with mock.patch("vmbus.device.device.Device.thaw", thaw):
        yield


@contextmanager
def offers_in_another_order() -> Iterator[None]:
    with mock.patch("vmbus.bus.adoption.Adoption._put_in_order", lambda self: None):
        yield


@contextmanager
def masked_for_ever() -> Iterator[None]:
    """The restored device reads its ring once and does not say that it sleeps: rule S3."""
    with mock.patch.object(RingReader, "unmask", _on_the_device(RingReader.unmask, lambda self: not self.available())):
        yield


@contextmanager
def no_wake_up_for_room() -> Iterator[None]:
    """The restored device does not ask for room (rule S4), so it is not woken when there is some."""
    with mock.patch.object(RingWriter, "request_space", _on_the_device(RingWriter.request_space, lambda *_: False)):
        yield


@contextmanager
def no_wake_up_of_the_guest() -> Iterator[None]:
    """The restored device does not say that there is room now (rule S2)."""

    def advance(self: RingReader, consumed: int) -> bool:
        original(self, consumed)
        return False

    original = RingReader.advance
    with mock.patch.object(RingReader, "advance", _on_the_device(original, advance)):
        yield


RESTORED: list[World] = []


def _on_the_device(original: Callable, broken: Callable) -> Callable:
    """Broken on the device's side, once it was restored."""

    def either(self: object, *arguments: object) -> object:
        if RESTORED and RESTORED[-1].on_device_side:
            return broken(self, *arguments)
        return original(self, *arguments)

    return either


CODE: dict[str, tuple[str, Callable]] = {
    "the interrupt after the restore": ("interrupts_not_taken", no_interrupt_again),
    "the interrupt for a message": ("messages_not_taken", no_interrupt_again),
    "the interrupt while the SynIC is off": ("synic_off_and_on", no_interrupt_again),
    "a turn for every channel": ("first_packets", no_turn_after_the_restore),
    "the order of offers": ("hot_offers", offers_in_another_order),
    "the end of the interrupt mask": ("ring_wraps", masked_for_ever),
    "the pending send size": ("pipes", no_wake_up_for_room),
    "the wake-up of a guest that waits for room": ("requests_without_answers", no_wake_up_of_the_guest),
}


@pytest.mark.parametrize("what", CODE)
def test_every_step_notices_what_the_restore_does_not_do(what: str) -> None:
    name, broken = CODE[what]
    RESTORED.clear()

    def tamper(world: World, state: saved.DeviceState) -> saved.DeviceState:
        RESTORED.append(world)
        return state

    with broken(), pytest.raises((Diverged, Stuck, AssertionError, VmbusError)) as caught:
        every_step(BY_NAME[name], tamper=tamper)
    print(repr(caught.value)[:300])


def test_every_step_notices_a_lost_event_flag() -> None:
    """The event flags lie in guest memory; without them, and if the restore does not raise them again, a guest that was
    about to look at its rings never does."""

    def tamper(world: World, state: saved.DeviceState) -> saved.DeviceState:
        low = state.synic.registers.get(0x28, 0)
        if state.synic.enabled and low:
            start = (low & ~1) + (state.synic.registers[0x2C] << 32) - 0x1_0000_0000
            world.ram[start : start + 4096] = bytes(4096)
        return state

    scenario = BY_NAME["interrupts_not_taken"]
    every_step(scenario, tamper=tamper)  # raised again: nobody notices
    original = Synic.raise_event

    def raise_event(self: Synic, relid: int) -> None:
        if self.outbox is not None and not self._actions.frozen:  # type: ignore[attr-defined]
            original(self, relid)

    with mock.patch.object(Synic, "raise_event", raise_event), pytest.raises((Diverged, Stuck, AssertionError)):
        every_step(scenario, tamper=tamper)


# ---- what the harness has found --------------------------------------------------------------------------------------


def test_a_disabled_subchannel_is_no_part_of_the_state() -> None:
    """Its owner has given it up, and does not make it again."""
    world = World(STEPS)
    run = Run(world)
    end = GuestEnd(run.connect(), instance=ONE).enable()
    end.ask(b"subs", 2)
    end.ask(b"drop")
    run.settle()
    assert world.pause()
    data = world.save()
    assert [record.subchannel for record in saved.decode(data).channels] == [0, 1]
    world.restore(data)
    assert end.ask(b"ask_")


def test_a_disabled_channel_comes_back_disabled() -> None:
    world = World(STEPS)
    run = Run(world)
    end = GuestEnd(run.connect(), instance=ONE).enable()
    end.send(b"away")
    run.driver.step(0.0)
    world.work()
    assert world.pause()
    world.restore(world.save())
    channel = world.provider("one").channel
    assert channel.state is ChannelState.DISABLED and channel.started, "the wish stays"
    run.settle()
    end.enable()
    assert end.ask(b"ask_")


def test_offers_keep_their_order() -> None:
    """Guests get offers in the order of their creation, and relids with them."""
    world = World(STEPS)
    run = Run(world)
    end = GuestEnd(run.connect(), instance=ONE).enable()
    end.ask(b"subs", 1)
    world.offer((StepProvider, "late", UUID(int=0x61), {}))
    end.ask(b"subs", 1)

    def order() -> list[tuple[int, int]]:
        return [(offer.instance.int, offer.subchannel) for offer in world.device.bus.offers]

    before, channels = order(), [channel.name for channel in world.device.channels]
    assert before == [(ONE.int, 0), (ONE.int, 1), (0x61, 0), (ONE.int, 2)]
    assert world.pause()
    world.restore(world.save())
    assert order() == before and [channel.name for channel in world.device.channels] == channels


def test_an_interrupt_on_its_way_survives_while_the_synic_is_off() -> None:
    """It was raised before the guest disabled the SynIC, and the message that it was for lies in the slot."""
    world = World(STEPS)
    driver = Run(world).connect()
    driver.bus.modify_channel(1, 0)
    assert world.interrupted
    driver.function.write32(Register.CONTROL, 0)
    assert world.pause()
    world.restore(world.save())
    driver.function.write32(Register.CONTROL, CONTROL_ENABLE)
    driver.run_until(lambda: bool(driver.bus.modified), 5, "the answer")


def test_packets_that_nobody_could_restore_are_refused_at_the_save() -> None:
    """Not at the restore, when the source is gone."""

    class Forgetful(PipeProvider):
        def start(self) -> None:
            self.channel._save_packet = self.channel._restore_packet = None
            super().start()

    world = World([(Forgetful, "pipe", UUID(int=0x81), {})])
    run = Run(world)
    run.connect()
    end = PipeEnd(run.driver)
    for _ in range(12):
        end.pipe.write(bytes(400))
        world.work()
        end.channel.outgoing.drain(math.inf)
    assert world.provider("pipe").channel.packets_queued
    assert world.pause()
    with pytest.raises(KmclError, match="saved packets and no restore callback"):
        world.save()
    world.resume()
    run.settle()
    assert len(end.got) == 12
    assert world.pause() and world.save()
