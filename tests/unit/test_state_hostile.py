"""Saved states that somebody has made up: StateError, before anything changed, in the memory of a running device."""

import hashlib
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.device import Machine, connect, open_echo
from vmbus import providers
from vmbus.bus.gpadl import MAX_DESCRIPTION, MAX_GPADLS, MAX_IN_PROGRESS, MAX_RANGES
from vmbus.bus.offers import MAX_RELID
from vmbus.bus.synic import MAX_SAVED_OUTBOX
from vmbus.device import saved
from vmbus.errors import EnvironmentProblem, StateError
from vmbus.kmcl import saved as kmcl_saved
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.saved import MAX_ENTRIES, decode_channel, decode_chunk, decode_lib
from vmbus.providers import Provider
from vmbus.server.restoring import read_state
from vmbus.util import records
from vmbus.wire.workload import BURST_TYPE, BurstStart, Sequence, Tally, echo_request

pack = msgspec.msgpack.encode
DEEP = b"\x91" * 10_000 + b"\xc0"
NO_TEXT = b"\xa2\xff\xfe"
KINDS = ["echo", "burst", "ddi-burst", "lab", "integration"]


def sealed(body: bytes) -> bytes:
    return struct.pack("<8sIIQ32s", saved.MAGIC, 1, 0, len(body), hashlib.sha256(body).digest()) + body


def array(length: int, one: bytes, times: int | None = None) -> bytes:
    """An array that promises `length` elements and has `times` of them."""
    return b"\xdd" + struct.pack(">I", length) + one * (length if times is None else times)


def with_raw(tree: Any, path: tuple[Any, ...], raw: bytes) -> Any:
    """`tree` with the bytes `raw` at a path."""
    if not path:
        return msgspec.Raw(raw)
    copy = list(tree) if isinstance(tree, list) else dict(tree)
    copy[path[0]] = with_raw(tree[path[0]], path[1:], raw)
    return copy


def paths(tree: Any) -> list[tuple[Any, ...]]:
    """Of every value in a tree."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [(), *((key, *rest) for key, value in inside for rest in paths(value))]


def busy(kinds: list[str] = KINDS) -> Machine:
    machine = Machine(kinds)
    driver = connect(machine)
    if "echo" in kinds:
        open_echo(driver).allocate_packet().send(echo_request(0, b"data", inline=True))
    burst = driver.client_channel(BURST_TYPE, name="burst", ring_pages_in=1, ring_pages_out=1)
    burst.set_process_packet_callbacks(lambda channel, completion, payload: None)
    driver.enable(burst)
    burst.allocate_packet().send(BurstStart(60, 90, 90).pack())
    machine.serve()
    return machine


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    return dict(msgspec.msgpack.decode(pack(busy().save())))


def refused(state: bytes, machine: Machine | None = None) -> str:
    """A fresh device refuses it, and nothing has changed."""
    machine = machine or Machine(KINDS)
    with pytest.raises(StateError) as caught:
        saved.check_fits(saved.decode(state), "vmbus0", machine.device, machine.providers)
    assert all(channel.state is ChannelState.CLOSED for channel in machine.device.channels)
    assert not machine.device.bus.gpadls.complete and not machine.device.synic.values
    return str(caught.value)


# ---- bytes that are no records ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [DEEP, NO_TEXT, b"", b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xd7\xff" + b"\xff" * 8])
@pytest.mark.parametrize("decoder", [decode_chunk, decode_lib, lambda data: decode_channel([data], "x")])
def test_what_is_no_chunk_is_refused(decoder: Callable[[bytes], object], raw: bytes) -> None:
    for data in (
        raw,
        b"\x81\xa2zz" + raw,
        b"\x81\xa4type" + raw,
        b"\x82\xa4type\xa7channel\xa2zz" + raw,
        b"\x81" + raw,
    ):
        with pytest.raises(StateError):
            decoder(data)


@pytest.mark.parametrize("raw", [DEEP, NO_TEXT, b"\xd7\xff" + b"\xff" * 8], ids=["deep", "no text", "no time"])
def test_such_a_value_is_refused_wherever_it_is(tree: dict[str, Any], raw: bytes) -> None:
    places = [path for path in paths(tree) if "chunks" not in path or path[-1] == 0]
    assert len(places) > 100
    for path in places:
        refused(sealed(pack(with_raw(tree, path, raw))), Machine([]))


def test_an_unknown_field_nested_without_end_is_refused(tree: dict[str, Any]) -> None:
    for path in paths(tree):
        node: Any = tree
        for key in path:
            node = node[key]
        if isinstance(node, dict) and "registers" not in path:
            with pytest.raises(StateError):
                saved.decode(sealed(pack(with_raw(tree, path, pack({**node, "unknown": msgspec.Raw(DEEP)})))))


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_everywhere(data: bytes) -> None:
    for decoder in (decode_chunk, decode_lib, lambda data: saved.decode(sealed(data))):
        with pytest.raises(StateError):
            decoder(data)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_mutated_states_are_refused_or_restored(tree: dict[str, Any], data: st.DataObject) -> None:
    """Whoever can compute digests cuts, repeats or overwrites bytes anywhere in the body: StateError only. And what is
    restored can be saved and restored again."""
    body = bytearray(pack(tree))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        what = data.draw(st.sampled_from(["cut", "flip", "insert", "double"]))
        if what == "cut":
            del body[at : at + data.draw(st.integers(1, 40))]
        elif what == "flip":
            body[at] ^= data.draw(st.integers(1, 255))
        elif what == "insert":
            body[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            body[at:at] = body[at : at + 60]
        if not body:
            break
    machine = Machine(KINDS)
    try:
        state = saved.decode(sealed(bytes(body)))
        saved.check_fits(state, "vmbus0", machine.device, machine.providers)
        saved.restore_device(state, machine.device, machine.providers)
    except StateError:
        return
    saved.verify(saved.encode(machine.save()), machine.providers)


# ---- limits ----------------------------------------------------------------------------------------------------------


def peak_while_refused(body: bytes) -> int:
    """Bytes that the refusal took, the file's own excepted."""
    data = sealed(body)
    tracemalloc.start()
    with pytest.raises(StateError):
        saved.decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def gpadl(ranges: bytes) -> bytes:
    return pack({"relid": 1, "handle": 1, "ranges": msgspec.Raw(ranges)})


RANGE = b"\x93\x01\x00"
MIB = 1 << 20
BLOWN = {
    "tiny ranges": lambda: ("bus", "gpadls", array(1, gpadl(array(4 * MIB, RANGE + b"\x90")))),
    "as many as there may be, in each": lambda: (
        "bus",
        "gpadls",
        array(20, gpadl(array(MAX_RANGES, b"\x93\x01\x00\x91\x01"))),
    ),
    "page numbers": lambda: ("bus", "gpadls", array(1, gpadl(array(1, RANGE + array(5 * MIB, b"\x07"))))),
    "page numbers in many ranges": lambda: (
        "bus",
        "gpadls",
        array(1, gpadl(array(300, RANGE + array(60_000, b"\x07")))),
    ),
    "GPADLs": lambda: ("bus", "gpadls", array(MAX_GPADLS + 1, gpadl(b"\x90"))),
    "GPADLs in progress": lambda: ("bus", "partial", array(MAX_IN_PROGRESS + 1, b"\x80")),
    "offers": lambda: ("bus", "offers", array(MAX_RELID + 1, b"\x80")),
    "messages": lambda: ("synic", "outbox", array(MAX_SAVED_OUTBOX + 1, b"\xc4\x08" + bytes(8))),
    "registers": lambda: ("synic", "registers", b"\xdf" + struct.pack(">I", MIB) + b"\x01\x02" * MIB),
    "chunks": lambda: (
        None,
        "channels",
        array(1, pack({"instance": bytes(16), "chunks": msgspec.Raw(array(MAX_ENTRIES + 2, b"\xc4\x00"))})),
    ),
    "channels": lambda: (None, "channels", array(16 * MAX_RELID, b"\x80")),
    "providers": lambda: (None, "providers", array(16 * MAX_RELID, b"\x80")),
}


@pytest.mark.parametrize("name", BLOWN)
def test_limits_of_run_time_hold_while_decoding(
    tree: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = MIB if name.endswith("in each") else MAX_DESCRIPTION  # so many would take long
    monkeypatch.setattr("vmbus.bus.gpadl.MAX_DESCRIPTION", limit)
    room, field, raw = BLOWN[name]()
    path = (field,) if room is None else (room, field)
    body = pack(with_raw(tree, path, raw))
    assert peak_while_refused(body) < 10 * limit, (name, len(body))


def test_packets_of_all_channels_share_a_limit(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "MAX_ENTRIES", -saved.MOST_CHANNELS + 60)
    with pytest.raises(StateError, match="packets, which cannot be restored"):
        saved.decode(sealed(pack(tree)))


# ---- every packet is decoded once ------------------------------------------------------------------------------------


def test_each_packet_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = busy(["echo", "burst"])
    state = saved.decode(saved.encode(machine.save()))
    counted = {"chunk": 0, "lib": 0}

    def counting(what: str, decoder: Any) -> Any:
        class Counting:
            def decode(self, data: bytes) -> Any:
                counted[what] += 1
                return decoder.decode(data)

        return Counting()

    monkeypatch.setattr(kmcl_saved, "_chunk_decoder", counting("chunk", kmcl_saved._chunk_decoder))
    monkeypatch.setattr(kmcl_saved, "_lib_decoder", counting("lib", kmcl_saved._lib_decoder))
    packets = saved.count_packets(state)
    machine.come_back(state)
    assert saved.count_packets(state) == packets
    assert counted == {"chunk": 90 + 2, "lib": 90} and packets.queued + packets.sent == 90
    assert machine.channel("burst").packets_sent + machine.channel("burst").packets_queued == 90


def test_a_callback_may_pass_other_bytes_and_they_are_decoded() -> None:
    """Whatever the owner passes is looked at: only the very bytes that it was given are known already."""
    machine = busy(["burst"])
    state = machine.save()
    burst = machine.channel("burst")
    machine.boot()
    burst = machine.channel("burst")
    burst._restore_packet = lambda channel, lib, save: channel.restore_packet(channel.allocate_packet(), lib[:-1])
    with pytest.raises(StateError, match="LibBuf"):
        machine.adopt(state)


# ---- providers -------------------------------------------------------------------------------------------------------


def changed(state: saved.DeviceState, kind: str, path: tuple[Any, ...], value: Any) -> bytes:
    provider_records = list(state.providers)
    number = next(at for at, one in enumerate(provider_records) if one.kind == kind)
    own = msgspec.msgpack.decode(provider_records[number].state)
    node = own
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    provider_records[number] = msgspec.structs.replace(provider_records[number], state=pack(own))
    return saved.encode(msgspec.structs.replace(state, providers=provider_records))


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("echo", ("next_sequence",), -1),
        ("echo", ("tally", "lost"), -1),
        ("echo", ("finished_at_suspend",), (1 << 64) - 1),
        ("burst", ("issued",), -5),
        ("burst", ("issued",), 91),
        ("burst", ("run",), [1 << 40, 1, 1]),
        ("burst", ("run",), [60_001, 1, 1]),
        ("burst", ("run",), [1, 1, 0]),
        ("burst", ("run",), [1, 1, 1 << 21]),
        ("burst", ("needless",), 65),
        ("burst", ("tally",), {}),
        ("ddi-burst", ("run",), [1 << 60, 1 << 60, 1 << 60]),
        ("ddi-burst", ("runs",), -1),
        ("lab", ("stations", 0, "lines", 0, "index"), 65536),
        ("lab", ("stations", 0, "lines", 0, "index"), 7),
        ("lab", ("stations", 0, "lines", 0, "mapped"), [-1]),
        ("lab", ("stations",), []),
        ("lab", ("pipes", 0, "bytes"), -1),
        ("integration", ("parts",), {}),
        ("integration", ("parts", "kvp", "exchange", "counters"), {}),
        ("integration", ("parts", "kvp", "exchange", "version"), [9, 9]),
        ("integration", ("parts", "heartbeat", "numbers", "sequence"), -1),
    ],
)
def test_ranges_of_providers_are_checked_before_anything_changes(kind: str, path: tuple[Any, ...], value: Any) -> None:
    machine = busy()
    state = machine.save()
    saved.check_fits(state, "vmbus0", *(lambda fresh: (fresh.device, fresh.providers))(Machine(KINDS)))
    refused(changed(state, kind, path, value))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("raw", [DEEP, NO_TEXT, b"", b"\xc1", b"\x81" + DEEP, b"\x81" + NO_TEXT + b"\x01"])
def test_what_is_no_state_of_a_provider_is_refused(kind: str, raw: bytes) -> None:
    provider = next(one for one in Machine([kind]).providers if one.kind == kind)
    for call in (provider.check, provider.restore):
        with pytest.raises(StateError, match=provider.name):
            call(raw)


class Raising(Provider):
    """Raises what it is told, where it is told."""

    kind = "raising"
    where = ""
    what: Exception = ValueError("nothing of mine")
    saves = b"fine"

    def start(self) -> None:
        pass

    def save(self) -> bytes:
        return self.saves

    def check(self, state: bytes) -> None:
        if self.where == "check" or state != b"fine":
            raise self.what

    def restore(self, state: bytes) -> None:
        if self.where == "restore":
            raise self.what


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> type[Raising]:
    class Fresh(Raising):
        pass

    monkeypatch.setitem(providers.PROVIDERS, "raising", Fresh)
    return Fresh


@pytest.mark.parametrize("where", ["check", "restore"])
@pytest.mark.parametrize("what", [ValueError("mine"), struct.error("mine"), RecursionError("mine"), KeyError("mine")])
def test_whatever_a_provider_raises_is_a_state_error_that_names_it(
    raising: type[Raising], where: str, what: Exception
) -> None:
    machine = Machine(["raising", "echo"])
    state = machine.save()
    raising.where, raising.what = where, what
    machine.boot()
    with pytest.raises(StateError, match=rf"provider 'raising0' \(raising\) raised .*mine.* in {where}\(\)"):
        machine.adopt(state)


def test_a_provider_that_misses_something_says_so_itself(raising: type[Raising]) -> None:
    machine = Machine(["raising"])
    state = machine.save()
    raising.where, raising.what = "restore", EnvironmentProblem("no disk")
    machine.boot()
    machine.map_all()
    with pytest.raises(EnvironmentProblem, match="no disk"):
        saved.restore_device(state, machine.device, machine.providers)


def test_a_save_that_its_own_provider_would_refuse_is_not_one(raising: type[Raising]) -> None:
    machine = Machine(["raising"])
    raising.saves = b"something else"
    with pytest.raises(StateError, match="raising0"):
        saved.verify(saved.encode(machine.save()), machine.providers)


# ---- what a guest can bring about ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [(1 << 64) - 1, (1 << 64) - 2, 1 << 63])
def test_a_number_of_64_bits_in_a_request_can_be_saved(number: int) -> None:
    machine = Machine(["echo"])
    driver = connect(machine)
    echo = open_echo(driver)
    answers: list[int] = []
    for sequence in (0, number, 1, number, 0):
        packet = echo.allocate_packet()
        packet.completion_routine = lambda packet, status, reply: answers.append(status)
        packet.send(echo_request(sequence, b"x", inline=True))
    driver.run_until(lambda: len(answers) == 5, 5, "the answers")
    data = saved.encode(machine.save())
    machine.come_back(saved.verify(data, machine.providers))
    assert machine.providers[0].status()["tally"]["lost"] > 0


def test_sequences_wrap_and_losses_stop_at_64_bits() -> None:
    tally = Tally()
    sequence = Sequence(tally)
    for _ in range(3):
        sequence.arrived((1 << 64) - 1)
        assert sequence.next == 0
        sequence.arrived(0)
        assert sequence.next == 1
    assert 0 < tally.lost < 1 << 64 and all(0 <= count < 1 << 64 for count in tally.as_dict().values())


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_state_is_read_from_a_plain_file_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(StateError, match="not a plain file"):
            read_state(tmp_path / name, "0" * 64)
    with pytest.raises(EnvironmentProblem, match="cannot read"):
        read_state(tmp_path / "missing", "0" * 64)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(saved.MAX_BODY + saved.HEAD_SIZE + 1)
    with pytest.raises(StateError, match="no device state is that large"):
        read_state(large, "0" * 64)


# ---- the one place ---------------------------------------------------------------------------------------------------


def test_sabotage_a_list_of_exceptions_would_not_be_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(decoder: Any, data: bytes, what: str) -> Any:
        try:
            return decoder.decode(data)
        except (msgspec.MsgspecError, ValueError) as error:
            raise StateError(what) from error

    monkeypatch.setattr(kmcl_saved, "decode", careless)
    with pytest.raises(RecursionError):
        decode_chunk(b"\x82\xa4type\xa7channel\xa2zz" + DEEP)
    with pytest.raises(StateError):
        records.decode(kmcl_saved._chunk_decoder, b"\x82\xa4type\xa7channel\xa2zz" + DEEP, "a chunk")
