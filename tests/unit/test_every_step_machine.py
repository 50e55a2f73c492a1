"""Random protocols with random traffic, saved at random steps: hypothesis draws what the guest does, how far each end
gets, and at which step (also in the middle of something) the device is saved.

The model knows what was asked for: every request is answered exactly once and rightly, packets of the host arrive once
and in order, each GPADL is answered once and each teardown once, and external data is transformed once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock
from uuid import UUID

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from support.step_provider import NUMBER, PUSH, REQUEST, GuestEnd, StepProvider, answer_to, pushed, transform
from support.step_scripts import BOTH, ONE, TWO
from support.steps import BASE, PAGE, Run, Tamper, World, checkpoint, replace, thorough
from support.twins import RingFences
from vmbus.device import saved
from vmbus.errors import VmbusError
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.saved import ChannelChunk, decode_chunk, encode
from vmbus.kmcl.status import Status
from vmbus.wire import messages as m
from vmbus.wire.gpa import pack_ranges, range_for
from vmbus.wire.synic import CONTROL_RESET, Register

OPEN = (ChannelState.OPENED, ChannelState.ACTIVE)
WHERE = [("one", ONE, 0), ("two", TWO, 0), ("one", ONE, 1), ("one", ONE, 2)]
ENDS = st.integers(0, len(WHERE) - 1)
SIZES = st.sampled_from([8, 40, 200, 1000])
MODES = {"replace": replace, "thorough": thorough, "checkpoint": checkpoint}
TOTAL = Counter[str]()


class End(GuestEnd):
    """A guest's end that knows what its answers have to be."""

    def __init__(self, run: Run, provider: str, instance: UUID, index: int) -> None:
        super().__init__(run.driver, instance=instance, index=index)
        self.provider = provider
        self.expected: dict[int, bytes] = {}
        self.external: dict[int, tuple[Any, bytes]] = {}

    @property
    def is_open(self) -> bool:
        return self.channel.state in OPEN


class EveryStep(RuleBasedStateMachine):
    """The rules are what a guest, a host and somebody who saves can do."""

    tamper: Tamper | None = None

    def __init__(self) -> None:
        super().__init__()
        logging.getLogger("vmbus").setLevel(logging.CRITICAL + 1)
        self.world = World(BOTH, tamper=self.tamper)
        self.patches = [
            RingFences(self.world.fence),
            mock.patch("vmbus_guest.driver.full_fence", self.world.fence),
        ]
        for patch in self.patches:
            patch.start()
        self.run = Run(self.world)
        self.ends: list[End] = []
        self.old: list[End] = []
        self.lossy: set[str] = set()
        self.subs = 0
        self.connect()

    # ---- the connection ----------------------------------------------------------------------------------------------

    def connect(self) -> None:
        self.run.heard.clear()
        self.run.connect()
        self.old += self.ends
        self.ends = [End(self.run, *where) for where in WHERE]
        self.handle = 0x1000
        self.partial: dict[int, tuple[int, list[bytes]]] = {}
        self.complete: dict[int, int] = {}
        self.created: Counter[str] = Counter()
        self.torndown: Counter[int] = Counter()

    @initialize(which=st.sets(st.integers(0, 1)), mode=st.sampled_from(sorted(MODES)), every=st.integers(1, 40))
    def begin(self, which: set[int], mode: str, every: int) -> None:
        self.save_soon(mode, every, 8)
        for one in which:
            self.enable(one)

    @property
    def driver(self) -> Any:
        return self.run.driver

    @rule(graceful=st.booleans(), really=st.sampled_from([False] * 9 + [True]))
    def reconnect(self, graceful: bool, really: bool) -> None:
        if not really:
            return
        self.come_to_rest()
        for end in self.ends:
            if end.is_open:
                self.lossy.add(end.provider)
        if graceful:
            self.driver.bus.unload()
            self.driver.run_until(lambda: self.driver.bus.unloaded, 5, "UNLOAD_RESPONSE")
        self.driver.function.write32(Register.CONTROL, CONTROL_RESET)
        for end in self.ends:
            if end.channel.state in (*OPEN, ChannelState.CLOSING):
                end.channel.close(lambda: None, force=True)
        self.connect()

    # ---- channels ----------------------------------------------------------------------------------------------------

    @rule(which=ENDS)
    def enable(self, which: int) -> None:
        end = self.ends[which]
        if end.channel.state is not ChannelState.DISABLED or self.driver._offer_for(end.channel) is None:
            return
        if end.channel.subchannel_index and not self.ends[0].is_open:
            return
        if any(link.offer.relid == self.driver._offer_for(end.channel).relid for link in self.driver._links.values()):
            return
        end.enable()

    @rule(which=ENDS, really=st.sampled_from([False, False, True]))
    def close(self, which: int, really: bool) -> None:
        end = self.ends[which]
        if really and end.is_open:
            self.come_to_rest()
            self.driver.close_channel(end.channel)

    @precondition(lambda self: self.subs < 2 and self.ends[0].is_open)
    @rule()
    def make_subchannel(self) -> None:
        self.subs += 1
        self.ask(0, b"subs", 1)

    @rule(which=ENDS)
    def rest(self, which: int) -> None:
        if self.ends[which].is_open and not self.ends[which].channel.subchannel_index:
            self.ask(which, b"rest", 0)

    @rule(which=ENDS, start=st.booleans(), quota=st.sampled_from([1, 3, 1 << 20]))
    def guest_at_rest(self, which: int, start: bool, quota: int) -> None:
        end = self.ends[which]
        end.channel.set_transaction_quota(quota)
        if end.is_open:
            (end.channel.start if start else end.channel.begin_pause)()

    # ---- traffic -----------------------------------------------------------------------------------------------------

    def ask(self, which: int, command: bytes, number: int | None = None, data: bytes = b"") -> None:
        end = self.ends[which]
        key = end.send(command, number, data)
        value = key if number is None else number
        data += bytes(-(REQUEST.size + len(data)) % 8)  # what a receiver sees is padded
        end.expected[key] = NUMBER.pack(value) + transform(data, value)

    @rule(which=ENDS, count=st.integers(1, 12), size=SIZES, hold=st.booleans())
    def send(self, which: int, count: int, size: int, hold: bool) -> None:
        if self.ends[which].is_open:
            for number in range(count):
                self.ask(which, b"hold" if hold and number % 3 == 0 else b"ask_", data=bytes([number]) * size)

    @rule(which=ENDS, size=st.sampled_from([1, 300, 3000]))
    def send_external(self, which: int, size: int) -> None:
        end = self.ends[which]
        if not end.is_open or len(end.external) > 6:
            return
        buffer = self.driver.allocate(PAGE)
        data = bytes((index * 5) & 0xFF for index in range(size))
        buffer.view[:size] = data
        key = end.send(b"ask_", external=self.driver.external(buffer, 0, size))
        end.expected[key] = NUMBER.pack(key)
        end.external[key] = buffer, data

    @rule(which=ENDS, count=st.integers(1, 40), size=SIZES, wait=st.booleans(), hold=st.booleans())
    def push(self, which: int, count: int, size: int, wait: bool, hold: bool) -> None:
        end = self.ends[which]
        if end.is_open:
            end.hold = hold
            self.ask(which, b"push", data=PUSH.pack(count, size, not wait))

    @rule(which=ENDS, modulus=st.integers(1, 4))
    def complete_some(self, which: int, modulus: int) -> None:
        self.ends[which].complete(lambda position: position % modulus == 0)

    # ---- GPADLs ------------------------------------------------------------------------------------------------------

    @rule(which=st.integers(0, 1), pages=st.sampled_from([1, 2, 29, 60, 90]), apart=st.booleans())
    def begin_gpadl(self, which: int, pages: int, apart: bool) -> None:
        offer = self.driver._offer_for(self.ends[which].channel)
        if offer is None:
            return
        self.handle += 1
        ranges = [range_for(BASE + PAGE * 2 * n, PAGE) for n in range(pages)] if apart else []
        ranges = ranges or [range_for(BASE + 12, pages * PAGE)]
        messages = m.gpadl_messages(offer.relid, self.handle, pack_ranges(ranges), len(ranges))
        self.partial[self.handle] = offer.relid, messages
        self.next_body(0, 1)

    @precondition(lambda self: self.partial)
    @rule(pick=st.integers(0, 5), count=st.integers(1, 3))
    def next_body(self, pick: int, count: int) -> None:
        handle = sorted(self.partial, reverse=True)[pick % len(self.partial)]
        relid, messages = self.partial[handle]
        for _ in range(min(count, len(messages))):
            self.driver._post(self.driver.bus.connection_id, messages.pop(0))
        if not messages:
            del self.partial[handle]
            self.complete[handle] = relid
            self.created[repr(m.GpadlCreated(relid, handle, 0))] += 1

    @precondition(lambda self: self.partial or self.complete)
    @rule(pick=st.integers(0, 9), twice=st.booleans())
    def tear_down(self, pick: int, twice: bool) -> None:
        handle = sorted({*self.partial, *self.complete})[pick % (len(self.partial) + len(self.complete))]
        if handle in self.partial:
            relid, _ = self.partial.pop(handle)
            self.created[repr(m.GpadlCreated(relid, handle, 0x8000FFFF))] += 1
        else:
            relid = self.complete.pop(handle)
        self.torndown[handle] += 1
        self.driver.bus.teardown_gpadl(relid, handle)
        mapped = any(handle in one.mapped for one in self.world.life.providers)
        if twice and not mapped:
            self.torndown[handle] += 1
            self.driver.bus.teardown_gpadl(relid, handle)

    @precondition(lambda self: self.complete)
    @rule(pick=st.integers(0, 9))
    def have_mapped(self, pick: int) -> None:
        """The provider maps a GPADL, or may not: an answer is expected, whatever it is."""
        handle = sorted(self.complete)[pick % len(self.complete)]
        for end in self.ends[:2]:
            if end.is_open and self.driver.link_of(end.channel).offer.relid == self.complete[handle]:
                end.send(b"map_", handle)

    @rule(which=st.integers(0, 1))
    def have_unmapped(self, which: int) -> None:
        end = self.ends[which]
        if end.is_open:
            for handle in list(self.world.provider(end.provider).mapped):
                end.send(b"umap", handle)

    @rule(which=st.integers(0, 1), vp=st.integers(0, 3))
    def modify(self, which: int, vp: int) -> None:
        offer = self.driver._offer_for(self.ends[which].channel)
        if offer is not None:
            self.driver.bus.modify_channel(offer.relid, vp)

    # ---- how far each end gets ---------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 3))
    def guest_steps(self, count: int) -> None:
        for _ in range(count):
            self.driver.step(0.0)

    @rule()
    def guest_takes_a_message(self) -> None:
        self.driver._take_message()

    @rule()
    def guest_takes_event_flags(self) -> None:
        self.driver._take_events()

    @rule()
    def host_works(self) -> None:
        self.world.work()

    @rule()
    def time_passes(self) -> None:
        self.world.pass_time()

    @rule()
    def settle(self) -> None:
        self.run.settle()
        self.check()

    # ---- saves -------------------------------------------------------------------------------------------------------

    @rule(mode=st.sampled_from(sorted(MODES)))
    def save_now(self, mode: str) -> None:
        before = self.world.saves
        with self.world.device_side():
            MODES[mode](self.world, "")
        TOTAL[mode] += self.world.saves - before

    @rule(mode=st.sampled_from(sorted(MODES)), every=st.integers(1, 40), count=st.integers(1, 8))
    def save_soon(self, mode: str, every: int, count: int) -> None:
        """At some steps of what comes next."""
        steps = saves = 0

        def at(world: World, what: str) -> None:
            nonlocal steps, saves
            steps += 1
            if steps % every == 0 and saves < count:
                saves += 1
                note(f"saved ({mode}) after {what}")
                MODES[mode](world, what)
                TOTAL[mode] += 1

        self.world.on_point = at

    # ---- what must hold ----------------------------------------------------------------------------------------------

    def come_to_rest(self) -> None:
        """Everything that is under way comes to its end."""
        for end in self.ends:
            end.hold = False
            end.channel.set_transaction_quota(1 << 20)
            if end.is_open:
                end.channel.start()
        for _ in range(1000):
            self.run.settle()
            if not any(end.held for end in self.ends):
                break
            for end in self.ends:
                end.complete()
        self.have_unmapped(0)
        self.have_unmapped(1)
        self.run.settle()
        self.check(at_rest=True)

    def check(self, *, at_rest: bool = False) -> None:
        for end in [*self.old, *self.ends]:
            self.check_end(end, at_rest=at_rest)
        heard = Counter(text for text in self.run.heard if text.startswith(("GpadlCreated", "GpadlTorndown")))
        for text, count in self.created.items():
            assert heard[text] == count, (text, heard[text])
        mapped = {handle for one in self.world.life.providers for handle in one.mapped}
        for handle, count in self.torndown.items():
            found = heard[repr(m.GpadlTorndown(handle))]
            assert found == count or (handle in mapped and found < count), (hex(handle), found, count)
        for one in self.world.life.providers:
            assert isinstance(one, StepProvider)
            self.check_provider(one, at_rest=at_rest)
        if at_rest:
            assert not self.driver.failures

    def check_end(self, end: End, *, at_rest: bool) -> None:
        for key, given in end.answers.items():
            assert len(given) == 1, (end.channel.name, key, given)
            status, reply = given[0]
            if status == Status.SUCCESS and key in end.expected:
                want = end.expected[key]
                assert reply == want + bytes(-len(want) % 8), (key, reply)
                if key in end.external:
                    buffer, data = end.external.pop(key)
                    assert bytes(buffer.view[: len(data)]) == transform(data, key)
                    self.run.driver.free(buffer) if buffer in self.driver._buffers else None
            else:
                assert status in (Status.SUCCESS, Status.CANCELLED)
        if at_rest:
            assert len(end.answers) == end.next, [key for key in range(end.next) if key not in end.answers]
        numbers = [NUMBER.unpack_from(payload)[0] for payload in end.packets]
        assert numbers == sorted(set(numbers)), (end.channel.name, numbers)
        assert all(
            payload == pushed(number, len(payload)) for number, payload in zip(numbers, end.packets, strict=True)
        )

    def check_provider(self, provider: StepProvider, *, at_rest: bool) -> None:
        ended = [number for number, _ in provider.completed] + provider.cancelled
        assert len(ended) == len(set(ended))
        got: dict[int, bytes] = {}
        for end in [*self.old, *self.ends]:
            if end.provider == provider.name:
                for payload in end.packets:
                    number = NUMBER.unpack_from(payload)[0]
                    assert number not in got, f"packet {number} arrived on two channels"
                    got[number] = payload
        for number, reply in provider.completed:
            assert reply[:16] == answer_to(got[number]), number
        if at_rest and provider.name not in self.lossy:
            assert set(got) | set(provider.cancelled) == set(range(provider.sent)), "packets are missing"

    def teardown(self) -> None:
        try:
            self.come_to_rest()
            self.world.on_point = None
        finally:
            for patch in self.patches:
                patch.stop()
            logging.getLogger("vmbus").setLevel(logging.NOTSET)


TestEveryStep = EveryStep.TestCase
TestEveryStep.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)


def without_partial(_: World, state: saved.DeviceState) -> saved.DeviceState:
    return msgspec.structs.replace(state, bus=msgspec.structs.replace(state.bus, partial=[]))


def without_messages(_: World, state: saved.DeviceState) -> saved.DeviceState:
    return msgspec.structs.replace(state, synic=msgspec.structs.replace(state.synic, outbox=[]))


def without_last_packet(_: World, state: saved.DeviceState) -> saved.DeviceState:
    records = []
    for record in state.channels:
        head = decode_chunk(record.chunks[0])
        assert isinstance(head, ChannelChunk)
        if head.entries:
            chunks = [encode(msgspec.structs.replace(head, entries=head.entries - 1)), *record.chunks[1:-1]]
            record = msgspec.structs.replace(record, chunks=chunks)
        records.append(record)
    return msgspec.structs.replace(state, channels=records)


@pytest.mark.parametrize(
    "tamper", [without_partial, without_messages, without_last_packet], ids=lambda one: one.__name__
)
def test_every_step_machine_notices(tamper: Tamper) -> None:
    """`replace` alone: the books have to notice it, not the comparison of states."""

    class Tampered(EveryStep):
        pass

    Tampered.tamper = staticmethod(tamper)  # type: ignore[assignment]
    few = settings(
        max_examples=400,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    only = dict.fromkeys(MODES, replace)
    with mock.patch.dict(MODES, only), pytest.raises((AssertionError, VmbusError)) as caught:
        run_state_machine_as_test(Tampered, settings=few)
    print(repr(caught.value)[:300])


@pytest.fixture(scope="module", autouse=True)
def how_many(note: Callable[[str], None]) -> Iterator[None]:
    yield
    note(f"every step, random workloads: {sum(TOTAL.values())} saves {dict(TOTAL)}")
