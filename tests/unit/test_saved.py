"""Saved state: round trips of devices in many shapes; every damage and every foreign state is refused in time."""

import hashlib
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.device import BASE, CONFIG, PAGE, Machine, connect, describe, open_echo
from support.traffic import Traffic
from vmbus.bus.gpadl import PartialState, RangeState
from vmbus.bus.offers import OfferState
from vmbus.bus.server import ConnectionState
from vmbus.device import saved
from vmbus.errors import StateError
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.saved import CompletionChunk, LibBuf, PacketChunk, decode_chunk, decode_lib, encode
from vmbus.wire import messages as m
from vmbus.wire.gpa import range_for
from vmbus.wire.synic import Register


def busy() -> tuple[Machine, Traffic]:
    """A machine in mid-traffic: outgoing packets queued and sent, requests in the rings."""
    machine = fresh()
    traffic = Traffic(connect(machine), hold=1 << 30, window=120, ring_pages_in=1, ring_pages_out=1)
    traffic.start(120, 500, size=50, window=200)
    machine.serve()
    for _ in range(3):
        traffic.driver.step(0.0)
        for _ in range(min(7, len(traffic.burst.held))):
            traffic.burst.complete_one()
        machine.serve()
    return machine, traffic


def go_on(machine: Machine, traffic: Traffic) -> None:
    """For so long that whatever can come to its end has come to it."""
    for _ in range(2000):
        traffic.driver.step(0.0)
        while traffic.burst.held:
            traffic.burst.complete_one()
        machine.serve()
        machine.fire_timers()


@pytest.fixture(scope="module")
def example() -> saved.DeviceState:
    state = busy()[0].save()
    counts = saved.count_packets(state)
    assert counts.queued > 20 and counts.sent > 20
    return state


def fresh() -> Machine:
    return Machine(echo={"hold": 5})


def check(state: saved.DeviceState, machine: Machine | None = None) -> None:
    machine = machine or fresh()
    saved.check_fits(state, "vmbus0", machine.device, machine.providers)


# ---- round trips -----------------------------------------------------------------------------------------------------


def shape(name: str) -> Machine:
    machine = fresh()
    if name == "new":
        return machine
    driver = connect(machine)
    if name == "SynIC without bus":
        machine.device.bus.reset()
    elif name == "disabled":
        machine.write32(Register.CONTROL, 0)
    elif name == "old version":
        driver.bus.initiate_contact(m.Version.V4_1)
    elif name == "offers not requested":
        driver.bus.initiate_contact(m.Version.V5_3)
    elif name == "messages not taken":
        for _ in range(5):
            driver.bus.modify_channel(1, 0)
    elif name == "GPADLs":
        driver.bus.create_gpadl(1, [range_for(BASE + 5 * PAGE + 12, 9000), range_for(BASE, 1)])
        driver.bus._post(4, m.gpadl_messages(2, 99, bytes(400), 1)[0])
    elif name == "one open":
        open_echo(driver)
    elif name == "rescinded":
        open_echo(driver)
        machine.channel("echo").fail("for the test")
    elif name == "rescinded and released":
        machine.device.bus.rescind(next(iter(machine.device.bus.offers)))
        while driver.step(0):
            pass
    elif name == "post failed":
        machine.write32(Register.POST_ADDRESS_LOW, 4)
        machine.write32(Register.POST_MESSAGE, 1)
    elif name == "fault":
        machine.device.memory.unmap(BASE, 1 << 20)
        machine.device.memory.map(BASE, memoryview(machine.ram)[: 1 << 20], True)
    return machine


SHAPES = [
    "new",
    "connected",
    "SynIC without bus",
    "disabled",
    "old version",
    "offers not requested",
    "messages not taken",
    "GPADLs",
    "one open",
    "rescinded",
    "rescinded and released",
    "post failed",
    "fault",
]


@pytest.mark.parametrize("name", SHAPES)
def test_a_device_comes_back_as_it_was(name: str) -> None:
    machine = shape(name)
    state = machine.save()
    data = saved.encode(state)
    assert saved.decode(data) == state
    before = dict(machine.device.describe(), resets=0, memory=None)
    machine.come_back(saved.decode(data))
    after = dict(machine.device.describe(), resets=0, memory=None)
    for text in (before, after):
        text["bus"].pop("messages_rejected")
        text["synic"].pop("bad_accesses")
        for channel in text["channels"]:
            channel.pop("counters")
            (channel["rings"] or {}).get("incoming", {}).pop("interrupt_mask", None)
    # A message may have moved on into an empty slot, and a held channel goes on.
    assert abs(after["synic"].pop("messages_waiting") - before["synic"].pop("messages_waiting")) <= 1
    for channel in before["channels"]:
        channel["state"] = channel["state"].replace("opened", "active")
    assert after == before
    again = machine.save()
    assert describe(again).replace('"outbox"', "") != ""
    assert (again.bus, again.synic.registers, again.providers) == (state.bus, state.synic.registers, state.providers)


def test_a_dead_drivers_memory_is_missing_at_the_restore() -> None:
    """It may be: the guest takes bus mastering away before it unmaps."""
    machine, _ = busy()
    config = bytearray(CONFIG)
    config[4] = 0
    state = msgspec.structs.replace(machine.save(), config=bytes(config))
    machine.device.memory.unmap(BASE, len(machine.ram))
    machine.boot()
    machine.device.freeze()
    restored = saved.restore_device(state, machine.device, machine.providers)
    assert (restored.packets.queued, restored.packets.sent) == (0, 0)
    assert restored.dropped == saved.count_packets(state)
    assert machine.channel("burst").packets_in_use == []
    assert machine.device.bus.state is ConnectionState.DISCONNECTED
    machine.device.thaw()
    machine.map_all()
    machine.used = bytearray(len(machine.used))
    again = Traffic(connect(machine))
    again.start(50, 50)
    again.finish()


def test_a_busy_channel_or_one_in_transition_is_not_saved() -> None:
    machine, _ = busy()
    with pytest.raises(Exception, match="cannot be saved"):
        saved.save_device("vmbus0", CONFIG, machine.device, machine.providers)
    machine.quiesce()
    next(iter(machine.device.bus.offers)).state = OfferState.CLOSING
    with pytest.raises(StateError, match="closing"):
        saved.save_device("vmbus0", CONFIG, machine.device, machine.providers)


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_every_changed_byte_is_noticed(example: saved.DeviceState) -> None:
    data = saved.encode(example)
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        with pytest.raises(StateError):
            saved.decode(bytes(changed))


def test_every_truncation_is_noticed(example: saved.DeviceState) -> None:
    data = saved.encode(example)
    for length in [*range(200), *range(200, len(data), 37), len(data) - 1]:
        with pytest.raises(StateError):
            saved.decode(data[:length])
    with pytest.raises(StateError, match="head says"):
        saved.decode(data + b"\0")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [(0, b"VMBSTATF", "not device state"), (8, struct.pack("<I", 2), "format version 2"), (8, bytes(4), "version 0")],
)
def test_other_files_and_versions_are_refused(
    example: saved.DeviceState, offset: int, value: bytes, message: str
) -> None:
    data = bytearray(saved.encode(example))
    data[offset : offset + len(value)] = value
    with pytest.raises(StateError, match=message):
        saved.decode(bytes(data))


def sealed(body: bytes) -> bytes:
    """A file with a right head over any body."""
    head = struct.pack("<8sIIQ32s", b"VMBSTATE", 1, 0, len(body), hashlib.sha256(body).digest())
    return head + body


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_field_of_another_kind_is_refused_or_means_the_same(example: saved.DeviceState, data: st.DataObject) -> None:
    """Somebody who can compute digests changes one value anywhere: never anything but StateError."""
    tree = msgspec.msgpack.decode(msgspec.msgpack.encode(example))
    path, node = "", tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        path += f"/{key}"
        child = node[key]
        if isinstance(child, (dict, list)) and child and data.draw(st.booleans()):
            node = child
            continue
        break
    node[key] = data.draw(
        st.none()
        | st.booleans()
        | st.sampled_from([-1, 0, 1, 2, 2047, 2048, 1 << 32, (1 << 64) - 1, 1.5, "x", b"", b"\0" * 16, [], {}])
    )
    machine = fresh()
    try:
        state = saved.decode(sealed(msgspec.msgpack.encode(tree)))
        saved.check_fits(state, "vmbus0", machine.device, machine.providers)
        assert machine.device.bus.state is ConnectionState.DISCONNECTED
        saved.restore_device(state, machine.device, machine.providers)
    except StateError:
        pass
    for channel in machine.device.channels:
        assert channel.state in (ChannelState.CLOSED, ChannelState.ACTIVE, ChannelState.OPENED)


# ---- what does not fit -----------------------------------------------------------------------------------------------


def replaced(state: saved.DeviceState, **changes: Any) -> saved.DeviceState:
    return msgspec.structs.replace(state, **changes)


def with_bus(state: saved.DeviceState, **changes: Any) -> saved.DeviceState:
    return replaced(state, bus=msgspec.structs.replace(state.bus, **changes))


def with_offer(device: saved.DeviceState, /, **changes: Any) -> saved.DeviceState:
    first = msgspec.structs.replace(device.bus.offers[0], **changes)
    return with_bus(device, offers=[first, *device.bus.offers[1:]])


def with_synic(state: saved.DeviceState, **changes: Any) -> saved.DeviceState:
    return replaced(state, synic=msgspec.structs.replace(state.synic, **changes))


def with_gpadl(state: saved.DeviceState, **changes: Any) -> saved.DeviceState:
    first = msgspec.structs.replace(state.bus.gpadls[0], **changes)
    return with_bus(state, gpadls=[first, *state.bus.gpadls[1:]])


@pytest.mark.parametrize(
    ("kinds", "options"),
    [(["echo"], {}), (["burst", "echo"], {}), (["echo", "burst", "burst"], {}), (["echo", "echo"], {})],
)
def test_other_providers_are_refused(example: saved.DeviceState, kinds: list[str], options: dict[str, Any]) -> None:
    with pytest.raises(StateError, match="providers"):
        check(example, Machine(kinds, **options))


def test_another_device_is_refused(example: saved.DeviceState) -> None:
    with pytest.raises(StateError, match="of device 'other'"):
        check(replaced(example, device="other"))


FOREIGN = {
    "another instance": lambda s: replaced(
        s, providers=[msgspec.structs.replace(s.providers[0], instance=bytes(16)), s.providers[1]]
    ),
    "channels swapped": lambda s: replaced(s, channels=s.channels[::-1]),
    "a channel less": lambda s: replaced(s, channels=s.channels[:1]),
    "an offer of nobody": lambda s: with_offer(s, instance=bytes(16)),
    "an offer twice": lambda s: with_bus(s, offers=[*s.bus.offers, msgspec.structs.replace(s.bus.offers[0], relid=9)]),
    "an offer missing": lambda s: with_bus(s, offers=s.bus.offers[:1]),
    "an unknown offer state": lambda s: with_offer(s, state="ajar"),
    "an offer in transition": lambda s: with_offer(s, state="closing"),
    "open without parameters": lambda s: with_offer(s, open=None),
    "closed with parameters": lambda s: with_offer(s, state="offered"),
    "offered without relid": lambda s: with_offer(s, relid=0),
    "one relid for two": lambda s: with_offer(s, relid=s.bus.offers[1].relid),
    "open without its rings": lambda s: with_bus(s, gpadls=[]),
    "open while disconnected": lambda s: with_bus(s, connected=False),
    "an unknown version": lambda s: with_bus(s, version=0x60000),
    "an unknown post status": lambda s: with_synic(s, post_status=3),
    "an unknown register": lambda s: with_synic(s, registers={0x48: 1}),
    "a GPADL of nobody": lambda s: with_gpadl(s, relid=77),
    "a GPADL twice": lambda s: with_bus(s, gpadls=[*s.bus.gpadls, s.bus.gpadls[0]]),
    "a GPADL without ranges": lambda s: with_gpadl(s, ranges=[]),
    "a GPADL with a page less": lambda s: with_gpadl(
        s, ranges=[msgspec.structs.replace(s.bus.gpadls[0].ranges[0], pfns=s.bus.gpadls[0].ranges[0].pfns[1:])]
    ),
    "an empty range": lambda s: with_gpadl(s, ranges=[RangeState(0, 0, [])]),
    "a partial GPADL that is whole": lambda s: with_bus(s, partial=[PartialState(1, 5, 24, 1, bytes(24))]),
    "a partial GPADL of nobody": lambda s: with_bus(s, partial=[PartialState(77, 5, 24, 1, b"")]),
    "two partial GPADLs of one name": lambda s: with_bus(s, partial=[PartialState(1, 5, 24, 1, b"")] * 2),
    "a partial GPADL of half words": lambda s: with_bus(s, partial=[PartialState(1, 5, 12, 1, b"")]),
    "a damaged chunk": lambda s: replaced(
        s, channels=[msgspec.structs.replace(s.channels[0], chunks=[b"\xc1"]), s.channels[1]]
    ),
    "no chunks": lambda s: replaced(s, channels=[s.channels[0], msgspec.structs.replace(s.channels[1], chunks=[])]),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_does_not_fit_is_refused_before_anything_changes(example: saved.DeviceState, name: str) -> None:
    machine = fresh()
    state = saved.decode(saved.encode(FOREIGN[name](example)))
    with pytest.raises(StateError) as caught:
        check(state, machine)
    assert str(caught.value)
    assert machine.device.bus.state is ConnectionState.DISCONNECTED
    assert all(offer.state is OfferState.UNOFFERED for offer in machine.device.bus.offers)


# ---- what only shows when it is put back -----------------------------------------------------------------------------


def restored(state: saved.DeviceState, machine: Machine) -> None:
    machine.boot()
    machine.adopt(state)


def burst_chunks(state: saved.DeviceState) -> list[bytes]:
    return list(state.channels[1].chunks)


def with_chunks(state: saved.DeviceState, chunks: list[bytes]) -> saved.DeviceState:
    return replaced(state, channels=[state.channels[0], msgspec.structs.replace(state.channels[1], chunks=chunks)])


def queued(packet: PacketChunk) -> bool:
    return decode_lib(packet.lib).queued


@pytest.mark.parametrize(
    "changes",
    [
        {"transaction": 1 << 40},
        {"transaction": 0},
        {"version": 2},
        {"kind": 11},
        {"kind": 8},
        {"offset8": 1},
        {"offset8": 3},
        {"flags": 2},
    ],
)
def test_bad_library_state_of_a_packet_is_refused(changes: dict[str, int]) -> None:
    machine, _ = busy()
    state = machine.save()
    chunks = burst_chunks(state)
    packet = decode_chunk(chunks[-1])
    assert isinstance(packet, PacketChunk)
    lib = msgspec.structs.replace(decode_lib(packet.lib), **changes)
    chunks[-1] = encode(PacketChunk(lib=encode(lib), save=packet.save))
    with pytest.raises(StateError):
        restored(with_chunks(state, chunks), machine)


@pytest.mark.parametrize("what", ["packet", "completion"])
def test_what_can_never_fit_into_the_ring_is_refused(what: str) -> None:
    machine, _ = busy()
    state = machine.save()
    chunks = burst_chunks(state)
    body = bytes(5000)
    if what == "packet":
        packet = decode_chunk(chunks[-1])
        assert isinstance(packet, PacketChunk)
        lib: LibBuf = msgspec.structs.replace(decode_lib(packet.lib), body=body)
        chunks[-1] = encode(PacketChunk(lib=encode(lib), save=packet.save))
    else:
        chunks[-1] = encode(CompletionChunk(transaction=1, body=body))
    with pytest.raises(StateError, match="fit"):
        restored(with_chunks(state, chunks), machine)


@pytest.mark.parametrize("save", [b"", b"x", bytes(25)])
def test_provider_state_of_the_wrong_size_is_refused_or_the_run_fails(save: bytes) -> None:
    machine, traffic = busy()
    state = machine.save()
    chunks = burst_chunks(state)
    packet = decode_chunk(chunks[-1])
    assert isinstance(packet, PacketChunk)
    chunks[-1] = encode(PacketChunk(lib=packet.lib, save=save))
    if save:
        with pytest.raises(StateError, match="restore callback"):
            restored(with_chunks(state, chunks), machine)
        return
    machine.come_back(with_chunks(state, chunks))
    go_on(machine, traffic)
    assert traffic.burst.done is None, "the host never hears that it was answered"


def test_memory_that_is_not_there_is_said_and_can_be_mended() -> None:
    machine, traffic = busy()
    state = machine.save()
    machine.boot()
    machine.device.freeze()
    with pytest.raises(StateError, match="not mapped"):
        saved.restore_device(state, machine.device, machine.providers)
    assert machine.device.bus.state is ConnectionState.DISCONNECTED
    machine.map_all()
    saved.restore_device(state, machine.device, machine.providers)
    machine.device.thaw()
    traffic.finish()
