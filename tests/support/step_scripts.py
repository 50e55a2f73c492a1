"""The protocol, enumerated: scripts for `support.steps.every_step`. Between them they pass through every message of the
bus, every state of a channel, and every way in which a packet, a message or an interrupt can be on its way.
"""

from __future__ import annotations

import math
from unittest import mock
from uuid import UUID

from support.step_provider import (
    FRONT_TYPE,
    BackProvider,
    FrontProvider,
    GuestEnd,
    PipeEnd,
    PipeProvider,
    StepProvider,
)
from support.steps import BASE, PAGE, Described, Run, Scenario
from vmbus.errors import EnvironmentProblem, PeerError
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.wire import messages as m
from vmbus.wire.gpa import pack_ranges, range_for
from vmbus.wire.synic import CONTROL_ENABLE, CONTROL_RESET, PAGE_VALID, Register

ONE = UUID(int=0x51)
TWO = UUID(int=0x52)
STEPS: list[Described] = [(StepProvider, "one", ONE, {})]
BOTH: list[Described] = [*STEPS, (StepProvider, "two", TWO, {})]


def _channel(run: Run, name: str = "guest", instance: UUID = ONE, index: int = 0) -> GuestEnd:
    """An open channel whose books are compared."""
    end = GuestEnd(run.driver, instance=instance, index=index).enable()
    run.books[name] = end.books
    return end


def _relid(run: Run, instance: UUID = ONE, index: int = 0) -> int:
    return next(
        one.relid
        for one in run.driver.bus.offers.values()
        if (one.interface_instance, one.subchannel_index) == (instance, index)
    )


def _post(run: Run, message: object) -> None:
    run.driver.bus._send(message)


# ---- the connection --------------------------------------------------------------------------------------------------


def negotiation(run: Run) -> None:
    """Versions refused and accepted, in every order; messages too early; offers, twice asked for; a new contact."""
    try:
        run.connect((0x60000, 0xD, 0x30000))
    except EnvironmentProblem:
        refused = True
    assert refused
    for version in reversed(m.Version):
        driver = run.connect((0x60000, version))
        assert driver.bus.version == version and len(driver.bus.offers) == 2
    driver = run.driver
    driver.bus.initiate_contact(m.Version.V4_1)
    _post(run, m.InitiateContact(m.Version.V5_0, 0, 2, 0, 0))
    run.settle()
    for early in (m.CloseChannel(1), m.GpadlTeardown(1, 5), m.RelidReleased(1), m.ModifyChannel(1, 0)):
        _post(run, early)
    driver.bus.request_offers()
    driver.bus.request_offers()
    run.settle()
    _post(run, m.OpenChannel(1, 1, 99, 0, 2, b""))
    _post(run, m.CloseChannel(2))
    _post(run, m.RelidReleased(1))  # of an offer that stands: the guest does not want it
    _post(run, m.CloseChannel(1))
    run.settle()


def unload_and_reconnect(run: Run) -> None:
    """UNLOAD with nothing, with open channels and with packets under way; a reset; a driver that was killed."""
    for graceful in (True, False, True):
        driver = run.connect()
        end = _channel(run, f"guest {len(run.drivers)}")
        end.channel.set_transaction_quota(4)
        end.hold = True
        end.ask(b"ask_", data=b"x" * 20)
        end.push(40)
        run.settle()
        end.complete(lambda position: position % 2 == 0)
        run.settle()
        assert len(end.held) == 4 and len(end.packets) == 6, "some are held, the ring is full, and others are queued"
        if graceful:
            driver.bus.unload()
            run.settle()
            assert driver.bus.unloaded
        driver.function.write32(Register.CONTROL, CONTROL_RESET)
    run.connect()
    end = _channel(run, "the last")
    end.ask(b"ask_")
    run.driver.close_channel(end.channel)
    run.driver.bus.unload()
    run.settle()
    run.driver.bus.unload()
    run.settle()


def synic_off_and_on(run: Run) -> None:
    """Registers one by one, a post that is refused, and messages that wait while the SynIC is disabled."""
    driver = run.connect()
    _post(run, m.ModifyChannel(1, 3))
    write = driver.function.write32
    write(Register.CONTROL, 0)
    for register, value in ((Register.POST_ADDRESS_LOW, 12), (Register.POST_MESSAGE, 1), (Register.EOM, 1)):
        write(register, value)
    run.heard.append(f"post status {driver.function.read32(Register.POST_STATUS)}")
    pages = driver._pages.iova
    write(Register.EVENT_PAGE_LOW, 4 << 20 | PAGE_VALID)
    write(Register.EVENT_PAGE_HIGH, 7)
    write(Register.CONTROL, CONTROL_ENABLE)
    run.heard.append(f"status {driver.function.read32(Register.STATUS)}")
    write(Register.EVENT_PAGE_LOW, (pages + PAGE) & 0xFFFFFFFF | PAGE_VALID)
    write(Register.EVENT_PAGE_HIGH, pages >> 32)
    write(Register.POST_ADDRESS_LOW, (pages + 2 * PAGE) & 0xFFFFFFFF)
    write(Register.CONTROL, CONTROL_ENABLE)
    run.heard.append(f"status {driver.function.read32(Register.STATUS)}")
    run.settle()
    _channel(run).ask(b"ask_")


def messages_not_taken(run: Run) -> None:
    """Answers pile up behind a full slot; the guest takes them one by one, with EOM, sometimes late or twice."""
    driver = run.connect()
    handles = []
    for number in range(6):
        buffer = driver.allocate(PAGE)
        handles.append(driver.bus.create_gpadl(1 + number % 2, [range_for(buffer.iova, PAGE)]))
    driver._take_message()
    driver.bus.modify_channel(1, 1)
    driver.bus.connect(UUID(int=1), UUID(int=2))  # nobody serves that
    driver._take_message()
    driver.function.write32(Register.EOM, 1)
    for handle in handles[:3]:
        driver.bus.teardown_gpadl(1, handle)
    driver._take_message()
    # EOM before the slot is empty, and after it was emptied without one.
    driver.function.write32(Register.EOM, 1)
    driver._slot_type[0] = 0
    run.heard.append("one thrown away")
    run.world.point("the slot emptied without EOM")
    driver.function.write32(Register.EOM, 1)
    run.settle()


# ---- GPADLs ----------------------------------------------------------------------------------------------------------


def gpadls(run: Run) -> None:
    """One message, several bodies, two at a time in turns, refused ones, torn down complete, half and unknown."""
    driver = run.connect()
    bus, post = driver.bus, driver._post
    whole = bus.create_gpadl(1, [range_for(BASE + 8 * PAGE + 12, 9000), range_for(BASE, 1)])
    run.settle()
    lists = [[range_for(BASE + 2 * PAGE * number, PAGE) for number in range(count)] for count in (60, 45)]
    first, second = (
        m.gpadl_messages(relid, handle, pack_ranges(ranges), len(ranges))
        for relid, handle, ranges in ((1, 0x70, lists[0]), (2, 0x71, lists[1]))
    )
    assert min(len(first), len(second)) >= 4
    for position in range(len(first)):
        for messages in (first, second):
            if position < len(messages):
                post(bus.connection_id, messages[position])
    run.settle()
    assert bus.created.get(0x70) == bus.created.get(0x71) == 0
    for one in (
        m.GpadlHeader(1, 0x72, 400, 1, bytes(40)),  # half, and torn down
        m.GpadlHeader(1, 0x72, 400, 1, bytes(40)),
        m.GpadlTeardown(1, 0x72),
        m.GpadlBody(0, 0x72, bytes(16)),
        m.GpadlHeader(2, 0x73, 24, 1, b""),  # nothing yet; then an empty range, which is refused
        m.GpadlBody(0, 0x73, bytes(24)),
        m.GpadlHeader(9, 0x74, 24, 1, bytes(24)),
        m.GpadlHeader(2, 0x75, 24, 2, bytes(24)),
        m.GpadlHeader(1, 0x70, 24, 1, bytes(24)),
        m.GpadlTeardown(2, 0x71),
        m.GpadlTeardown(2, 0x71),
        m.GpadlHeader(2, 0x76, 4096, 2, bytes(160)),  # stays half, and goes with its channel
        m.RelidReleased(2),
        m.GpadlBody(0, 0x76, bytes(160)),
        m.GpadlHeader(1, 0x77, 4096, 2, bytes(160)),  # stays half to the end
        m.GpadlBody(0, 0x77, bytes(160)),
        m.GpadlTeardown(1, whole),
    ):
        _post(run, one)
        driver.step(0.0)
    run.settle()


def gpadls_of_a_provider(run: Run) -> None:
    """Mapped and written to by the provider, torn down before and after the unmap, and gone with their channel."""
    driver = run.connect()
    end = _channel(run)
    buffers = [driver.allocate(2 * PAGE) for _ in range(4)]
    handles = [driver.create_gpadl(end.channel, buffer) for buffer in buffers]
    run.books["memory"] = lambda: [bytes(buffer.view[:8]).hex() for buffer in buffers]
    for handle in handles[:3]:
        end.ask(b"map_", handle)
    end.ask(b"umap", handles[0])
    driver.bus.teardown_gpadl(_relid(run), handles[0])
    driver.bus.teardown_gpadl(_relid(run), handles[1])  # waits for the provider
    end.ask(b"ask_")
    end.ask(b"umap", handles[1])
    run.settle()
    assert {handles[0], handles[1]} <= driver.bus.torndown
    end.ask(b"map_", 0x999)
    end.ask(b"umap", handles[2])
    driver.link_of(end.channel).gpadls.difference_update(handles[:2])
    driver.close_channel(end.channel)


# ---- channels --------------------------------------------------------------------------------------------------------


def open_and_close(run: Run) -> None:
    """Opens that fail in each way; a close with packets held on both ends, and OPENCHANNEL before it ends; rings torn
    down without a close."""
    driver = run.connect()
    relid = _relid(run)
    _post(run, m.OpenChannel(relid, 5, 0x55, 0, 2, b"no such GPADL"))
    handle = driver.bus.create_gpadl(relid, [range_for(driver.allocate(4 * PAGE).iova, 4 * PAGE)])
    _post(run, m.OpenChannel(relid, 6, handle, 0, 4, b"split beyond the end"))
    run.settle()
    end = _channel(run)
    end.ask(b"refu", 1)
    driver.close_channel(end.channel)
    try:
        end.enable()
        raise AssertionError("the provider was asked to refuse")
    except PeerError as error:
        run.heard.append(str(error))
    end.enable()
    end.ask(b"ask_")
    driver.bus.modify_channel(relid, 2)
    _post(run, m.OpenChannel(relid, 7, handle, 0, 2, b"open already"))
    run.settle()
    end.send(b"hold")
    end.hold = True
    end.push(30)
    run.settle()
    end.send(b"hold")
    run.world.work()
    driver.bus.close_channel(relid)
    driver.bus.close_channel(relid)
    run.settle()
    end.held.clear()
    driver._links.clear()
    end.channel.close(lambda: None, force=True)
    end.channel.disable()
    end.hold = False
    end.enable()
    end.ask(b"ask_")
    driver.bus.teardown_gpadl(relid, driver.link_of(end.channel).gpadl)
    run.settle()
    assert end.channel.state is ChannelState.DISABLED, "rescinded"
    end.enable()
    end.ask(b"ask_")


def rescinds(run: Run) -> None:
    """A channel that fails is rescinded and offered anew; a provider goes while its channel is open, and while the
    guest has not released it yet the same provider comes back."""
    driver = run.connect()
    end = _channel(run)
    other = _channel(run, "other", TWO)
    end.push(3)
    run.settle()
    end.send(b"fail")
    run.settle()
    assert end.channel.state is ChannelState.DISABLED
    end.enable()
    end.ask(b"ask_")
    released: list[int] = []
    with_release, driver.bus.release = driver.bus.release, released.append  # type: ignore[method-assign]
    other.hold = True
    other.push(30)
    run.settle()
    run.world.withdraw("two")
    run.settle()
    run.world.offer((StepProvider, "two", TWO, {}))
    run.settle()
    end.ask(b"ask_")
    assert len(released) == 1
    driver.bus.release = with_release  # type: ignore[method-assign]
    with_release(released[0])
    run.settle()
    other.held.clear()
    other.hold = False
    other.enable()
    other.ask(b"ask_")
    run.world.withdraw("two")
    run.settle()


def disabled_and_enabled(run: Run) -> None:
    """The provider takes its channel away while it is open and while it is closed, and offers it again later."""
    driver = run.connect()
    end = _channel(run)
    end.ask(b"ask_")
    for _ in range(2):
        end.send(b"away")
        driver.step(0.0)
        run.world.work()
        while driver.step(0.0):
            pass
        run.settle()
        assert end.channel.state is ChannelState.DISABLED
        end.enable()
        end.ask(b"ask_")
    end.send(b"away")
    run.world.work()
    driver.close_channel(end.channel)
    driver.bus.unload()
    run.settle()
    driver = run.connect()
    _channel(run, "the last").ask(b"ask_")


def hot_offers(run: Run) -> None:
    """Before the guest is connected, before it asks for offers, and while traffic runs; with sub-channels there."""
    run.world.offer((StepProvider, "early", UUID(int=0x60), {}))
    driver = run.connect()
    end = _channel(run)
    end.ask(b"subs", 1)
    end.push(20)
    run.world.offer((StepProvider, "late", UUID(int=0x61), {}))
    late = _channel(run, "late", UUID(int=0x61))
    late.ask(b"ask_", data=b"y" * 100)
    run.settle()
    end.push(20)
    run.settle()
    driver.bus.initiate_contact(m.Version.V5_2)
    driver._links.clear()
    run.world.offer((StepProvider, "unseen", UUID(int=0x62), {}))
    run.settle()
    driver.bus.request_offers()
    run.settle()
    run.world.withdraw("early")
    run.settle()


def subchannels(run: Run) -> None:
    """Made, opened, used, withdrawn and closed before and after their primary."""
    driver = run.connect()
    end = _channel(run)
    end.ask(b"subs", 3)
    run.settle()
    subs = [_channel(run, f"sub {index}", index=index) for index in (1, 2)]
    for number, one in enumerate((end, *subs)):
        one.push(20 + number)
        one.ask(b"ask_", data=bytes(number))
    run.settle()
    end.ask(b"drop")
    run.settle()
    subs[0].hold = True
    subs[0].push(30)
    run.settle()
    subs[0].complete()
    driver.close_channel(subs[1].channel)
    run.settle()
    driver.close_channel(end.channel)
    run.settle()
    again = _channel(run, "again")
    run.settle()
    _channel(run, "sub again", index=2).ask(b"ask_")
    again.ask(b"subs", 1)
    run.settle()
    driver.bus.close_channel(_relid(run))  # and forgets its sub-channels
    run.settle()


def local_offers(run: Run) -> None:
    """A provider that has the guest's requests answered by another one, over a channel within the server."""
    run.connect()
    end = GuestEnd(run.driver, kind=FRONT_TYPE).enable()
    run.books["guest"] = end.books
    for size in (0, 8, 300, 40):
        end.send(b"ask_", data=bytes(range(256))[:size])
    run.settle()
    for size in range(0, 1200, 100):
        end.send(b"ask_", data=bytes(size))
    run.settle()
    run.driver.close_channel(end.channel)
    end.enable()
    end.ask(b"ask_")


# ---- traffic ---------------------------------------------------------------------------------------------------------


def first_packets(run: Run) -> None:
    """One of each kind, step by step: inline, with external data, held by the provider, from the host."""
    driver = run.connect()
    end = _channel(run)
    run.world.point("open")
    end.send(b"ask_", data=b"hello")
    run.settle()
    buffer = driver.allocate(2 * PAGE)
    buffer.view[:300] = bytes(range(150)) * 2
    pieces = [*driver.external(buffer, 4000, 200), *driver.external(buffer, 0, 104)]
    end.send(b"ask_", external=pieces)
    run.settle()
    run.books["memory"] = lambda: bytes(buffer.view).hex()
    end.send(b"hold")
    end.send(b"ask_")
    run.settle()
    end.hold = True
    end.push(2)
    run.settle()
    end.push(1, wait=False)
    run.settle()
    end.complete(lambda position: position == 1)
    run.settle()
    end.complete()


def ring_wraps(run: Run) -> None:
    """Both rings several times around, with sizes that do not divide them."""
    run.connect()
    end = _channel(run)
    for number in range(24):
        end.send(b"ask_", data=bytes(range(256)) * 2)
        if number % 5 == 4:
            end.push(3, 360)
        run.driver.step(0.0)
        if number % 3 == 2:
            run.settle()
    run.settle()


def down_ring_full(run: Run) -> None:
    """The host sends more than the ring holds; the guest takes and completes little by little, out of order."""
    run.connect()
    end = _channel(run)
    end.channel.set_transaction_quota(6)
    end.hold = True
    end.push(60, 160)
    end.push(3, 160, wait=False)
    run.settle()
    while end.held:
        end.complete(lambda position: position % 3 != 1)
        run.driver.step(0.0)
        run.world.work()
        end.complete()
        run.settle()
    assert len(end.packets) == 63


def completions_wait(run: Run) -> None:
    """Answers that find no room: the guest sends and does not read."""
    driver = run.connect()
    end = _channel(run)
    for number in range(40):
        end.send(b"ask_", data=bytes([number]) * 200)
        if number % 4 == 3:
            run.world.work()
            end.channel.outgoing.drain(math.inf)
    end.push(2)
    end.channel.outgoing.publish()
    run.world.work()
    run.settle()
    driver.close_channel(end.channel)


def up_ring_full(run: Run) -> None:
    """The guest sends more than the ring holds and asks for room; the host is at rest meanwhile, and starts again."""
    run.connect()
    end = _channel(run)
    end.ask(b"rest")
    for number in range(40):
        end.send(b"ask_", data=bytes([number]) * 160)
    end.push(5)
    run.driver.step(0.0)
    run.driver.step(0.0)
    run.settle()
    assert len(end.order) == 42


def requests_without_answers(run: Run) -> None:
    """The guest waits for room, and nothing but the signal that there is some can wake it."""
    run.connect()
    end = _channel(run)
    end.ask(b"rest")
    for number in range(60):
        end.send(b"ask_", data=bytes([number]) * 160, wait=False)
    for _ in range(3):
        run.driver.step(0.0)
    run.settle()
    assert len(run.world.provider("one").asked) == 61


def pauses(run: Run) -> None:
    """Each end at rest in turn, with packets waiting on both, and a close while at rest."""
    driver = run.connect()
    end = _channel(run)
    end.hold = True
    end.push(10)
    run.settle()
    end.ask(b"rest")
    end.complete()
    end.send(b"ask_")
    run.driver.step(0.0)
    end.channel.begin_pause()
    run.world.point("the guest's end paused")
    run.settle()
    end.channel.start()
    run.settle()
    end.hold = False
    end.send(b"rest")
    end.push(5)
    run.driver.step(0.0)
    run.world.work()
    run.settle()
    end.ask(b"rest")
    driver.close_channel(end.channel)
    run.settle()
    end.enable()
    end.ask(b"ask_")


def interrupts_not_taken(run: Run) -> None:
    """Event flags and the interrupt stay up while the host goes on; the guest takes them late, and apart."""
    driver = run.connect()
    end = _channel(run)
    other = _channel(run, "other", TWO)
    for one in (end, other):
        one.send(b"ask_", data=b"1")
        one.push(4)
    run.world.work()
    for one in (end, other):
        one.send(b"ask_", data=b"2")
    run.world.work()
    driver._take_events()  # without the interrupt
    run.world.point("event flags taken, rings not looked at")
    run.world.work()
    for one in (end, other):
        one.channel.process()
    run.world.work()
    driver.wait_interrupt = driver.function.wait_interrupt  # type: ignore[attr-defined]
    driver.function.wait_interrupt(0.0)  # taken, and nothing looked at
    driver._take_events()
    run.world.point("interrupt taken, then flags")
    driver.bus.modify_channel(_relid(run), 1)
    run.settle()
    for one in (end, other):
        one.push(2)
        run.driver.step(0.0)
    run.settle()


def quota_and_timers(run: Run) -> None:
    """The provider holds as many requests as its quota allows, and a timer ends that."""
    driver = run.connect()
    end = _channel(run)
    for number in range(8):
        end.send(b"hold" if number < 5 else b"ask_", data=bytes(number))
    driver.step(0.0)
    run.world.work()
    end.push(3)
    run.settle()
    end.send(b"hold")
    run.world.work()
    run.settle()
    driver.close_channel(end.channel)


def put_off(run: Run) -> None:
    """Requests that are taken and put off to a turn of their own, or processed there in the first place."""
    run.connect()
    end = _channel(run)
    for number in range(12):
        end.send(b"ask_", data=bytes(range(number)))
        if number % 4 == 3:
            end.push(2)
            run.world.work()
    run.settle()
    for _ in range(6):
        end.send(b"hold")
    run.world.work()
    run.settle()


def outbox_full(run: Run) -> None:
    """The guest posts more than there is room for answers, and has to take some before it can go on."""
    with mock.patch("vmbus.bus.synic.MAX_OUTBOX", 3):
        driver = run.connect()
        for number in range(9):
            driver.bus.modify_channel(1 + number % 3, number)
            run.world.point("a post taken")
        run.settle()


def pipes(run: Run) -> None:
    """Messages on a pipe, more than the rings hold: no transactions, and nothing may be lost or doubled."""
    run.connect()
    end = PipeEnd(run.driver)
    run.books["pipe"] = end.books
    for number in range(30):
        end.pipe.write(bytes(range(number, number + 90)) * 3)
        if number % 7 == 6:
            run.world.work()
    end.channel.outgoing.drain(math.inf)
    run.world.work()
    run.settle()
    end.pipe.write(b"")
    run.settle()


def byte_pipes(run: Run) -> None:
    """The same as a stream of bytes."""
    run.connect()
    end = PipeEnd(run.driver, byte_mode=True)
    run.books["pipe"] = end.books
    end.pipe.write(bytes(range(256)) * 40)
    end.channel.outgoing.drain(math.inf)
    run.world.work()
    end.pipe.write(b"the end")
    run.settle()


SCENARIOS = [
    Scenario(negotiation, BOTH),
    Scenario(unload_and_reconnect, STEPS),
    Scenario(synic_off_and_on, STEPS),
    Scenario(messages_not_taken, BOTH),
    Scenario(gpadls, BOTH),
    Scenario(gpadls_of_a_provider, STEPS),
    Scenario(open_and_close, STEPS),
    Scenario(rescinds, BOTH),
    Scenario(disabled_and_enabled, STEPS),
    Scenario(hot_offers, STEPS),
    Scenario(subchannels, STEPS),
    Scenario(local_offers, [(BackProvider, "back", UUID(int=0x71), {}), (FrontProvider, "front", UUID(int=0x72), {})]),
    Scenario(first_packets, STEPS),
    Scenario(ring_wraps, STEPS),
    Scenario(down_ring_full, STEPS),
    Scenario(completions_wait, STEPS),
    Scenario(up_ring_full, STEPS),
    Scenario(requests_without_answers, STEPS),
    Scenario(pauses, STEPS),
    Scenario(interrupts_not_taken, BOTH),
    Scenario(outbox_full, BOTH),
    Scenario(quota_and_timers, [(StepProvider, "one", ONE, {"quota": 3})]),
    Scenario(quota_and_timers, [(StepProvider, "one", ONE, {"quota": 3, "patient": True})], variant="patient"),
    Scenario(put_off, [(StepProvider, "one", ONE, {"defer": True})]),
    Scenario(put_off, [(StepProvider, "one", ONE, {"passive": True, "quota": 4})], variant="passive"),
    Scenario(down_ring_full, [(StepProvider, "one", ONE, {"passive": True})], variant="passive"),
    Scenario(pipes, [(PipeProvider, "pipe", UUID(int=0x81), {})]),
    Scenario(byte_pipes, [(PipeProvider, "pipe", UUID(int=0x82), {"byte_mode": True})]),
]
