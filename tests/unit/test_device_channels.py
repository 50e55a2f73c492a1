"""Sub-channels, GPADLs beyond the rings, channels that a restore makes anew, and offers that come and go."""

from collections.abc import Iterator
from uuid import UUID

import pytest

from support.device import PAGE, Machine, connect
from support.multi import MULTI_TYPE, Guest, MultiProvider
from vmbus import providers
from vmbus.bus import gpadl
from vmbus.bus.offers import OfferState
from vmbus.device import saved
from vmbus.errors import StateError, UsageError, WaitTimeout
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.status import KmclError, Status
from vmbus.memory.guest import MemoryRevoked
from vmbus.operations.migration.arrival import packets_found
from vmbus.snapshot.manifest import Packets
from vmbus_guest.channel_driver import GpadlRefused
from vmbus_guest.driver import VmbusDriver


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(providers.PROVIDERS, "multi", MultiProvider)


def make(**options: bool) -> Machine:
    return Machine(("multi", "echo"), multi=options)


def multi(machine: Machine) -> MultiProvider:
    found = machine.providers[0]
    assert isinstance(found, MultiProvider)
    return found


@pytest.fixture
def machine() -> Machine:
    return make()


@pytest.fixture
def driver(machine: Machine) -> Iterator[VmbusDriver]:
    with connect(machine) as driver:
        yield driver


def roundtrip(machine: Machine) -> None:
    machine.come_back(saved.decode(saved.encode(machine.save())))


def relids(driver: VmbusDriver) -> list[tuple[int, int]]:
    return sorted((o.subchannel_index, o.relid) for o in driver.bus.offers.values() if o.interface_type == MULTI_TYPE)


def settle(driver: VmbusDriver) -> None:
    while driver.step(0.0):
        pass


# ---- sub-channels ----------------------------------------------------------------------------------------------------


def test_a_subchannel_needs_its_primary() -> None:
    machine = make()
    for instance, kind in ((UUID(int=77), MULTI_TYPE), (UUID(int=1), UUID(int=78))):
        channel = ServerChannel(kind, instance, name="orphan", subchannel_index=1)
        machine.add_channel(channel)
        with pytest.raises(UsageError, match="has no primary"):
            channel.enable()
        machine.device.remove_channel(channel)
    with connect(machine) as driver:
        multi(machine).add_subs(1)  # not open: the guest hears of it later
        settle(driver)
        assert relids(driver) == [(0, 1)]
        Guest(driver)
        settle(driver)
        assert relids(driver) == [(0, 1), (1, 3)]


def test_closing_waits_for_the_owners_of_subchannels(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = make()
    held: list = []
    monkeypatch.setattr(MultiProvider, "_process", lambda self, channel, completion, payload: held.append(completion))
    with connect(machine) as driver:
        primary = Guest(driver)
        provider = multi(machine)
        provider.add_subs(1)
        settle(driver)
        sub = Guest(driver, 1)
        sub.channel.allocate_packet().send(b"hold it!")
        settle(driver)
        provider.events.clear()
        for relid in (3, 1):
            driver.bus.close_channel(relid)
        settle(driver)
        assert provider.events == [] and primary.channel.state is ChannelState.ACTIVE
        held.pop().complete()
        assert provider.events == ["closed multi0.1", "closed multi0.0"]
        settle(driver)
        primary.channel.close(lambda: None, force=True)


def test_unload_and_reset_with_open_subchannels() -> None:
    machine = make()
    for graceful in (True, False, True):
        driver = connect(machine)
        primary = Guest(driver)
        if not multi(machine).subs:
            primary.ask(b"subs", 2)
        settle(driver)
        Guest(driver, 1)
        driver.close(graceful=graceful)
        offers = machine.device.bus.offers
        assert all(offer.state is OfferState.UNOFFERED for offer in offers) and len(offers) == 4


def test_a_provider_has_to_make_its_subchannels_again() -> None:
    machine = make(forgetful=True)
    driver = connect(machine)
    Guest(driver).ask(b"subs", 1)
    state = machine.save()
    with pytest.raises(StateError, match=r"sub-channel 1 of instance .*1 was .*did not make it again"):
        machine.come_back(state)
    assert machine.device.bus.version == 0 and len(machine.device.bus.offers) == 2


# ---- force-new-channel -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subs", [0, 2])
@pytest.mark.parametrize("forgetful", [True, False])
def test_a_forced_channel_is_rescinded_and_offered_anew(subs: int, forgetful: bool) -> None:
    machine = make(force_new=True, forgetful=forgetful)
    with connect(machine) as driver:
        guest = Guest(driver)
        gone: list[ClientChannel] = []
        driver.on_rescind = gone.append
        if subs:
            guest.ask(b"subs", subs)
            settle(driver)
            sub = Guest(driver, 1)
        guest.keep = []
        guest.ask(b"push", 50)
        old = multi(machine)
        old.push(old.channel, 300)
        state = saved.decode(saved.encode(machine.save()))
        assert saved.count_packets(state) == (0, 0, 0), "nobody saves what will be dropped"
        lost = sum(one.packets_queued for one in machine.device.channels)
        lost_sent = sum(one.packets_sent for one in machine.device.channels)
        assert lost and lost_sent
        machine.boot()
        restored = machine.adopt(state)
        assert restored.dropped == restored.unsaved == (lost, lost_sent, 0) and restored.renewed == 1 + subs
        assert (restored.packets.queued, restored.packets.sent) == (0, 0)
        told = {name: getattr(restored, name)._asdict() for name in ("packets", "dropped", "unsaved")}
        assert packets_found([told]) == Packets(queued=0, sent=0), "as many as the state has: a migration compares"
        machine.device.thaw()
        new = multi(machine)
        assert new is not old and new.events == [] and new.channel.packets_sent == 0
        driver.run_until(lambda: guest.channel in gone, 5, "the rescind")
        settle(driver)
        assert guest.channel.state is ChannelState.DISABLED
        if subs:
            assert sub.channel in gone
        assert len(relids(driver)) == 1, "the primary is there again, sub-channels wait for it to be opened"
        guest.got.clear()
        driver.enable(guest.channel)
        guest.keep = None
        guest.ask(b"push", 50)
        driver.run_until(lambda: len(new.completed) == 50, 5, "the new packets")
        assert guest.got == list(range(50)) and new.events == ["opened multi0.0"]
        assert not old.completed or len(old.completed) < 300


# ---- GPADLs ----------------------------------------------------------------------------------------------------------


def test_a_gpadl_is_mapped_written_and_taken_back(machine: Machine, driver: VmbusDriver) -> None:
    guest = Guest(driver)
    buffer = driver.allocate(3 * PAGE)
    handle = driver.create_gpadl(guest.channel, buffer)
    assert guest.ask(b"map_", handle)[:4] == handle.to_bytes(4, "little")
    assert buffer.view[:4] == handle.to_bytes(4, "little")
    assert multi(machine).mapped[handle].size == 3 * PAGE
    refused = b"fail" + int(Status.INVALID_PARAMETER).to_bytes(4, "little")
    assert guest.ask(b"map_", handle) == guest.ask(b"mapr", handle) == refused, "one mapping at a time"
    assert guest.ask(b"map_", handle + 1) == guest.ask(b"umap", handle + 1) == refused
    rings = driver.link_of(guest.channel).gpadl
    assert guest.ask(b"mapr", rings) == refused
    guest.ask(b"umap", handle)
    assert guest.ask(b"mapr", handle)[:4] == handle.to_bytes(4, "little")
    assert multi(machine).mapped[handle].views[0].readonly
    guest.ask(b"umap", handle)
    guest.channel.delete_gpadl(handle)
    assert guest.ask(b"map_", handle) == refused
    with pytest.raises(UsageError, match="has lent no memory"):
        guest.channel.delete_gpadl(handle)


@pytest.mark.parametrize("read_only", [True, False])
def test_the_dirty_log_has_what_is_mapped_for_writing(machine: Machine, driver: VmbusDriver, read_only: bool) -> None:
    guest = Guest(driver)
    buffer = driver.allocate(2 * PAGE)
    handle = driver.create_gpadl(guest.channel, buffer, read_only=read_only)
    pages = {buffer.iova // PAGE, buffer.iova // PAGE + 1}
    memory = machine.device.memory
    memory.start_log()
    guest.ask(b"mapr" if read_only else b"map_", handle)
    assert memory.log is not None and memory.log.pages & pages == (set() if read_only else pages)
    memory.stop_log()
    memory.start_log()
    assert memory.log is not None and memory.log.pages == (set() if read_only else pages)
    guest.ask(b"umap", handle)
    memory.stop_log()
    memory.start_log()
    assert memory.log is not None and not memory.log.pages
    memory.stop_log()


def test_teardown_while_mapped_waits_for_the_unmap(machine: Machine, driver: VmbusDriver) -> None:
    guest = Guest(driver)
    buffer = driver.allocate(PAGE)
    handle = driver.create_gpadl(guest.channel, buffer)
    guest.ask(b"map_", handle)
    driver.bus.teardown_gpadl(1, handle)
    assert guest.ask(b"echo") and handle not in driver.bus.torndown
    assert machine.device.describe()["bus"]["offers"][0]["gpadls_mapped"] == 1
    rejected = machine.device.bus.rejected
    driver.bus.teardown_gpadl(1, handle)
    assert machine.device.bus.rejected == rejected + 1, "asked twice"
    multi(machine).mapped[handle].views[0][:1] = b"x"
    guest.ask(b"umap", handle)
    settle(driver)
    assert handle in driver.bus.torndown and buffer.view[:1] == b"x"
    assert [g.handle for g in machine.device.bus.gpadls.complete.values()] == [driver.link_of(guest.channel).gpadl]


def test_deleting_blocks_and_is_bounded(machine: Machine, driver: VmbusDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(driver)
    handle = driver.create_gpadl(guest.channel, driver.allocate(PAGE))
    guest.ask(b"map_", handle)
    machine.call_later(1, lambda: multi(machine).channel.unmap_gpadl(handle))
    guest.channel.delete_gpadl(handle)  # the timer runs out while it waits
    handle = driver.create_gpadl(guest.channel, driver.allocate(PAGE))
    guest.ask(b"mapr", handle)
    original = driver.run_until
    monkeypatch.setattr(driver, "run_until", lambda condition, _, what: original(condition, 0.05, what))
    with pytest.raises(WaitTimeout, match="GPADL_TORNDOWN"):
        guest.channel.delete_gpadl(handle)
    monkeypatch.undo()


def test_of_a_gpadl_that_is_a_window_only_what_is_written_is_copied(machine: Machine, driver: VmbusDriver) -> None:
    """At a switchover, which a mapping for writing fills with all of its pages."""
    guest = Guest(driver)
    memory = machine.device.memory
    buffer = driver.allocate(64 * PAGE)
    handle = driver.create_gpadl(guest.channel, buffer)
    window = multi(machine).channel.open_gpadl(handle, 64 * PAGE)
    window.write(0, b"before")
    memory.start_log()
    assert memory.log is not None and not memory.log.pages
    window.write(10 * PAGE - 1, b"ab")
    window.store32(60 * PAGE, 7)
    assert window.read(0, 6) == b"before"
    first = buffer.iova // PAGE
    assert set(memory.log.pages) == {first + 9, first + 10, first + 60}
    memory.stop_log()
    multi(machine).channel.unmap_gpadl(handle)
    with pytest.raises(MemoryRevoked):
        window.write(0, b"x")


@pytest.mark.parametrize("how", ["close", "rescind", "reset", "unload"])
def test_a_channel_goes_with_gpadls_mapped(how: str) -> None:
    machine = make()
    driver = connect(machine)
    guest = Guest(driver)
    for command in (b"map_", b"mapr"):
        guest.ask(command, driver.create_gpadl(guest.channel, driver.allocate(PAGE)))
    window = multi(machine).channel.open_gpadl(driver.create_gpadl(guest.channel, driver.allocate(PAGE)), PAGE)
    device = machine.device
    if how == "close":
        driver.close_channel(guest.channel)
        assert not device.bus.gpadls.complete
    elif how == "rescind":
        driver.bus.teardown_gpadl(1, next(iter(multi(machine).mapped)))
        multi(machine).channel.fail("for the test")
        settle(driver)
        assert next(iter(multi(machine).mapped)) in driver.bus.torndown
    elif how == "reset":
        device.reset()
    else:
        driver.bus.unload()
        settle(driver)
        assert driver.bus.unloaded
    with pytest.raises(MemoryRevoked):
        window.read(0, 1)
    assert not device.memory._writable_grants, "nothing is granted any more"
    assert not any(offer.mapped or offer.teardowns for offer in device.bus.offers)
    device.memory.start_log()
    assert device.memory.log is not None and not device.memory.log.pages


def test_memory_that_is_not_there_and_gpadls_too_many(
    machine: Machine, driver: VmbusDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = Guest(driver)
    handle = guest.channel.create_gpadl([(0x5000, PAGE)])
    refused = b"fail" + int(Status.INVALID_PARAMETER).to_bytes(4, "little")
    assert guest.ask(b"map_", handle) == refused
    assert not next(iter(machine.device.bus.offers)).mapped
    guest.channel.delete_gpadl(handle)
    monkeypatch.setattr(gpadl, "MAX_GPADLS", 1)
    with pytest.raises(KmclError) as caught:
        guest.channel.create_gpadl([(0x5000, PAGE)])
    assert isinstance(caught.value.__cause__, GpadlRefused)
    assert caught.value.status is Status.INSUFFICIENT_RESOURCES


# ---- offers that come and go -----------------------------------------------------------------------------------------


def plain(number: int) -> ServerChannel:
    channel = ServerChannel(MULTI_TYPE, UUID(int=number), name=f"plain {number}")
    channel.set_process_packet_callbacks(lambda channel, completion, payload: completion.complete(payload))
    return channel


def test_an_instance_is_not_offered_again_before_its_release(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(("echo",))
    driver = connect(machine)
    first, second = plain(50), plain(50)
    machine.add_channel(first)
    first.enable()
    settle(driver)
    assert relids(driver) == [(0, 2)]
    release = driver.bus.release
    monkeypatch.setattr(driver.bus, "release", lambda relid: None)
    machine.device.remove_channel(first)
    machine.add_channel(second)
    second.enable()
    settle(driver)
    assert driver.rescinded == [UUID(int=50)] and relids(driver) == [(0, 2)]
    state = saved.decode(saved.encode(machine.save()))
    assert [record.withdrawn for record in state.bus.offers] == [False, True, False]
    machine.boot()
    third = plain(50)
    machine.add_channel(third)
    third.enable()
    third.start()
    saved.check_fits(state, "vmbus0", machine.device, machine.providers)
    machine.map_all()
    saved.restore_device(state, machine.device, machine.providers)
    machine.device.thaw()
    settle(driver)
    assert relids(driver) == [(0, 2)], "still waiting for the release"
    release(2)
    settle(driver)
    assert relids(driver) == [(0, 2)] and not driver.bus.rescinded
    guest = Guest(driver)
    third.start()
    assert guest.ask(b"echo") == b"echo\0\0\0\0"


def test_an_enabled_client_is_opened_when_the_offer_comes() -> None:
    machine = Machine(("echo",))
    driver = connect(machine)
    channel = driver.client_channel(MULTI_TYPE, name="late")
    channel.enable()
    settle(driver)
    assert channel.state is ChannelState.CLOSED
    server = plain(50)
    machine.add_channel(server)
    server.enable()
    settle(driver)
    assert channel.state is ChannelState.ACTIVE and server.state is ChannelState.OPENED
    channel.disable()
    assert channel.state is ChannelState.DISABLED and server.state is ChannelState.CLOSED
    told: list[int] = []
    refusing = plain(51)
    refusing.set_state_change_callbacks(opened=lambda _: 1 / 0)  # type: ignore[arg-type, return-value]
    machine.add_channel(refusing)
    refusing.enable()
    channel.set_target_pnp(MULTI_TYPE, UUID(int=51), lambda _, status: told.append(status))
    channel.enable()
    settle(driver)
    assert told == [Status.UNSUCCESSFUL] and "refused to open" in driver.failures[0]


def test_a_local_offer_stays_inside() -> None:
    machine = Machine(("echo",))
    driver = connect(machine)
    server = plain(50)
    server.set_server_flags(1)
    machine.add_channel(server)
    server.enable()
    server.start()
    settle(driver)
    assert relids(driver) == []
    client = ClientChannel(MULTI_TYPE, name="inside")
    machine.device.local_bus.open(client)
    replies: list[bytes] = []
    packet = client.allocate_packet()
    packet.completion_routine = lambda packet, status, reply: replies.append(reply)
    packet.send(b"to you..")
    machine.device.local_bus.run()
    assert replies == [b"to you.."]
    assert len(machine.save().channels) == 1, "it is no part of what is saved"
    machine.device.remove_channel(server)
    assert client.state is server.state is ChannelState.DISABLED


# ---- channels that come and go, and that a restored device does not have ---------------------------------------------


def passing(machine: Machine, number: int, *, forced: bool = True) -> ServerChannel:
    """A primary channel that nobody makes again."""
    channel = ServerChannel(MULTI_TYPE, UUID(int=500 + number), name=f"passing-{number}")
    channel.force_new_channel = forced
    channel.set_process_packet_callbacks(lambda channel, completion, payload: completion.complete())
    machine.add_channel(channel)
    channel.enable()
    channel.start()
    return channel


def test_a_passing_channel_is_rescinded_at_the_restore_and_released(machine: Machine, driver: VmbusDriver) -> None:
    """Open with packets under way; offered; withdrawn and not released; waiting for that; failed: each once."""
    open_, offered, withdrawn, failed = (passing(machine, number) for number in range(4))
    settle(driver)
    ends = {}
    for one in (open_, failed):
        ends[one] = driver.client_channel(MULTI_TYPE, instance=one.interface_instance)
        ends[one].set_process_packet_callbacks(lambda channel, completion, payload: None)
        driver.enable(ends[one])
    for _ in range(500):
        open_.allocate_packet().send(bytes(1000), wait_for_completion=False)
    assert open_.packets_queued
    gone: list[str] = []
    machine.remove_channel(withdrawn, lambda: gone.append("withdrawn"))
    again = passing(machine, 2)  # of the same instance: offered when the other one is released
    failed.fail("it has to")
    state = saved.decode(saved.encode(machine.save()))
    assert saved.count_packets(state) == (0, 0, 0) and not gone
    assert again.interface_instance == withdrawn.interface_instance
    machine.come_back(state)
    settle(driver)
    expected = {one.interface_instance for one in (open_, offered, withdrawn, failed)}
    assert set(driver.rescinded) == expected and len(driver.rescinded) == 4
    assert [one.name for one in machine.device.channels] == ["multi0.0", "echo1"]
    assert len(machine.device.bus.offers) == 2 and not driver.bus.rescinded
    assert not machine.device.bus.gpadls.complete
    assert Guest(driver).ask(b"echo")
    roundtrip(machine)  # once more, with nothing of them left
    settle(driver)
    assert len(driver.rescinded) == 4
