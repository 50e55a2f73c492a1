"""Inspection: what is shown is what is there, whatever a guest or a file has put there; looking changes nothing."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from support.chunks import packet_in, with_chunks
from support.device import BASE, CONFIG, Machine, connect, open_echo
from unit.test_snapshot_bundle import DEMO, manifest, write
from vmbus.cli import main
from vmbus.device import saved
from vmbus.errors import StateError, UsageError
from vmbus.kmcl.saved import encode
from vmbus.observe.inspection import collect
from vmbus.observe.inspection.collect import Listing, inspect_device
from vmbus.observe.inspection.difference import Difference, compare
from vmbus.observe.inspection.document import InFlight, Inspection, Source, as_answer, from_answer
from vmbus.observe.inspection.plain import decoded, plain
from vmbus.observe.inspection.saved import inspect_path, inspect_state
from vmbus.observe.inspection.target import Saved, find
from vmbus.observe.inspection.tree import clean, render
from vmbus.observe.inspection.watch import rates
from vmbus.providers.echo import EchoProvider
from vmbus.ring import INTERRUPT_MASK, READ_INDEX, WRITE_INDEX
from vmbus.snapshot.bundle import utc_now
from vmbus.snapshot.checkpoints import IMAGE, Checkpoint, ImageSnapshot, Store
from vmbus.snapshot.manifest import RAM, STATE, FileRecord, Packets
from vmbus.wire.synic import Register
from vmbus.wire.workload import BURST_TYPE, BurstStart, echo_request
from vmbus_guest.driver import VmbusDriver

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "v1"
ESCAPES = "\x1b[31mred\x07\n[bold]"


class Owned:
    def __init__(self, *channels: Any) -> None:
        self.channels = list(channels)
        self.clients: list[Any] = []


def look(machine: Machine, packets: int = 64, channels: list[str] | None = None) -> Inspection:
    owners = {provider.name: Owned(provider.channel) for provider in machine.providers}  # type: ignore[attr-defined]
    listing = Listing(packets, channels)
    return inspect_device("vmbus0", CONFIG, machine.device, machine.providers, owners, listing)


def busy(hold: int = 5, requests: int = 20, window: int = 300) -> tuple[Machine, VmbusDriver, Any]:
    """Packets held by echo; packets of burst in the ring and in the queue, since the guest takes none."""
    machine = Machine(echo={"hold": hold})
    driver = connect(machine)
    echo = open_echo(driver)
    burst = driver.client_channel(BURST_TYPE, name="burst", ring_pages_in=2, ring_pages_out=2)
    driver.enable(burst)
    burst.allocate_packet().send(BurstStart(size=64, packets=5000, window=window).pack())
    for number in range(requests):
        echo.allocate_packet().send(echo_request(number, b"data", inline=True))
    machine.serve()
    return machine, driver, echo


def text(document: Inspection, **arguments: Any) -> str:
    console = Console(width=400, force_terminal=False)
    with console.capture() as capture:
        console.print(render(document, **arguments))
    return capture.get()


def channel_of(document: Inspection, name: str) -> Any:
    return next(one for one in document.channels if one.name == name)


# ---- a live device ---------------------------------------------------------------------------------------------------


def test_each_packet_in_flight_is_there_once_with_its_state_and_age() -> None:
    began = time.monotonic()
    machine, _, _ = busy()
    document = look(machine, 10_000)
    echo, burst = channel_of(document, "echo0"), channel_of(document, "burst1")
    assert [packet.transaction for packet in echo.packets] == machine.channel("echo").outstanding
    assert {packet.state for packet in echo.packets} == {"held"} and echo.in_flight == InFlight(held=5)
    real = machine.channel("burst")
    sent, queued, _ = real.in_use()
    assert [p.transaction for p in burst.packets if p.state == "sent"] == sent
    assert [(p.transaction, p.size) for p in burst.packets if p.state == "queued"] == [
        (transaction, len(body)) for _, transaction, body in queued
    ]
    assert (burst.in_flight.sent, burst.in_flight.queued) == (len(sent), len(queued)) and sent and queued
    assert document.in_flight.total == 5 + 300
    longest = time.monotonic() - began
    for packet in echo.packets + burst.packets:
        assert packet.age is not None and 0 <= packet.age <= longest and not packet.restored
    assert echo.packets[0].age >= echo.packets[-1].age
    assert document.providers[1].status is not None and document.providers[1].status["issued"] == 300


def test_a_packet_that_nobody_completes_grows_old() -> None:
    machine, _, _ = busy()
    burst = machine.channel("burst")
    before = channel_of(look(machine), "burst1").packets[0]
    burst.packets_in_use[0].since -= 3600
    held = machine.channel("echo")
    completion = next(iter(held.flow.outstanding))
    held.flow.outstanding[completion] -= 7200
    document = look(machine)
    assert channel_of(document, "burst1").packets[0].age >= before.age + 3600
    assert "for 60 min" in text(document) and "for 2.0 h" in text(document)


def test_completions_that_wait_for_room_are_shown() -> None:
    machine, _, echo = busy(hold=0, requests=0)
    machine.channel("echo").quiesce()  # what is answered now finds no way out
    machine.channel("echo").unquiesce()
    for number in range(600):
        echo.allocate_packet().send(echo_request(number, bytes(1000), inline=True))
        machine.serve()
    channel = channel_of(look(machine), "echo0")
    assert channel.in_flight.completions > 10
    waiting = [packet for packet in channel.packets if packet.state == "completion"]
    assert waiting and all(packet.size and packet.age is not None and packet.age < 60 for packet in waiting)


def test_ages_after_a_restore_say_so() -> None:
    machine, _, _ = busy()
    state = machine.save()
    machine.come_back(state)
    packets = channel_of(look(machine), "burst1").packets
    assert packets and all(packet.restored for packet in packets)
    assert "since the restore" in text(look(machine))


def test_what_is_listed_is_bounded_and_what_is_left_out_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, _, _ = busy(window=3000)
    for packets in (0, 1, 7):
        document = look(machine, packets)
        burst = channel_of(document, "burst1")
        assert len(burst.packets) == 2 * packets
        assert burst.omitted == 3000 - 2 * packets and burst.in_flight.total == 3000
    only = look(machine, 7, ["echo0"])
    assert not channel_of(only, "burst1").packets and len(channel_of(only, "echo0").packets) == 5
    monkeypatch.setattr(collect, "MOST_PACKETS", 90)
    assert sum(len(channel.packets) for channel in look(machine, 10_000).channels) <= 90
    assert "... 2,9" not in text(document) and f"... {burst.omitted} more" in text(document)


def test_looking_changes_nothing_in_guest_memory_and_nothing_in_the_device() -> None:
    machine, driver, _ = busy()
    state = msgspec.to_builtins(machine.save())
    memory = bytes(machine.ram)
    machine.device.memory.start_log()
    for _ in range(3):
        look(machine, 10_000)
    assert (bytes(machine.ram) == memory) is True
    assert machine.device.memory.log is not None and not machine.device.memory.log.pages
    assert (msgspec.to_builtins(machine.save()) == state) is True
    document = look(machine)
    assert document.memory is not None and document.memory.log is not None and document.memory.log.pages == 0
    machine.device.memory.write(BASE, b"x" * 5000)
    again = look(machine).memory
    assert again is not None and again.log is not None and (again.log.pages, again.log.bytes) == (2, 8192)
    assert "dirty log: 2 pages" in text(look(machine))
    driver.close(graceful=False)


def test_signals_sent_and_suppressed_add_up() -> None:
    machine, driver, echo = busy(hold=0, requests=0)
    (incoming, outgoing) = channel_of(look(machine), "echo0").rings
    assert (incoming.direction, outgoing.direction) == ("incoming", "outgoing")
    rings = machine.channel("echo").rings
    assert rings is not None
    before = rings[1].signals, rings[1].batches
    answers: list[bytes] = []
    packet = echo.allocate_packet()
    packet.completion_routine = lambda packet, status, reply: answers.append(reply)
    packet.send(echo_request(0, b"data", inline=True))
    driver.run_until(lambda: bool(answers), 5, "the answer")
    assert (rings[1].signals, rings[1].batches) == (before[0] + 1, before[1] + 1)
    # A guest that is awake is not signalled: the ring it reads is masked.
    rings[1].header.store32(INTERRUPT_MASK, 1)
    packet.send(echo_request(1, b"data", inline=True))
    machine.serve()
    outgoing = channel_of(look(machine), "echo0").rings[1]
    assert outgoing.signals == before[0] + 1 and outgoing.batches == before[1] + 2
    assert outgoing.suppressed == outgoing.batches - outgoing.signals > 0
    assert outgoing.used is not None and outgoing.used > 0 and outgoing.used + outgoing.free + 8 == outgoing.size


@pytest.mark.parametrize("value", [1, 0xFFFFFFFF, 0x80000000, 1 << 20])
def test_impossible_ring_words_are_shown_as_they_are(value: int) -> None:
    machine, _, _ = busy()
    rings = machine.channel("echo").rings
    assert rings is not None
    rings[0].header.store32(WRITE_INDEX, value)
    rings[1].header.store32(READ_INDEX, value)
    rings[1].header.store32(WRITE_INDEX, 8)
    before = bytes(machine.ram)
    incoming, outgoing = channel_of(look(machine), "echo0").rings
    assert (incoming.write_index, outgoing.read_index, outgoing.write_index) == (value, value, 8)
    assert (incoming.used, incoming.free, outgoing.used) == (None, None, None)
    assert f"write index {value:#x} is impossible" in incoming.problem
    assert "overwritten our index" in outgoing.problem
    assert machine.channel("echo").active and bytes(machine.ram) == before
    assert "impossible" in text(look(machine))


def test_a_provider_that_cannot_tell_is_shown_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, _, _ = busy()

    def broken(self: EchoProvider) -> dict[str, Any]:
        raise RuntimeError(ESCAPES)

    monkeypatch.setattr(EchoProvider, "status", broken)
    document = look(machine)
    assert document.providers[0].status is None and "RuntimeError" in document.providers[0].problem
    assert document.providers[1].status is not None
    assert "status() raised RuntimeError" in text(document)


def test_the_document_survives_the_wire_and_another_format_is_refused() -> None:
    machine, _, _ = busy()
    document = look(machine)
    answer = json.loads(msgspec.json.encode(as_answer(document)))
    found = from_answer(answer, "demo")
    assert found.source == Source(kind="server", name="demo")
    found.source = document.source
    assert (msgspec.json.encode(found) == msgspec.json.encode(document)) is True
    with pytest.raises(StateError, match="format 2; this program reads 1"):
        from_answer(answer | {"format": 2}, "demo")
    with pytest.raises(StateError, match="cannot be read"):
        from_answer(answer | {"channels": 7}, "demo")
    with pytest.raises(StateError, match="format None"):
        from_answer({"device": "an older server's"}, "demo")


def test_rates_are_per_second_and_only_of_what_moved() -> None:
    machine, _, echo = busy(hold=0, requests=3)
    before = look(machine)
    for number in range(3, 7):
        echo.allocate_packet().send(echo_request(number, b"data", inline=True))
    machine.serve()
    moved = rates(before, look(machine), 2.0)
    assert moved["echo0"]["received"] == 2.0 and "sent" not in moved["echo0"] and "burst1" not in moved
    assert rates(look(machine), before, 2.0) == {}


# ---- shown to people -------------------------------------------------------------------------------------------------


def test_nothing_of_a_guest_or_a_file_reaches_the_terminal_as_it_is() -> None:
    machine, _, _ = busy()
    document = look(machine)
    document.providers[0].status = {"said": ESCAPES, ESCAPES: [ESCAPES, {"deep": ESCAPES}]}
    document.providers[0].name = document.channels[0].name = document.source.name = ESCAPES
    document.channels[1].rings[0].problem = ESCAPES
    shown = text(document)
    assert "\x1b" not in shown and "\x07" not in shown and "[bold]" in shown
    assert clean("a\x00b\u202ec") == "a\\x00b\\u202ec"
    assert len(clean("x" * 10_000)) < 200


def test_only_the_channels_asked_for() -> None:
    machine, _, _ = busy()
    shown = text(look(machine), channels=["echo0"], rates={"echo0": {"received": 12345.6}})
    assert "echo0" in shown and "burst1" not in shown and "guest memory" not in shown
    assert "per second: received 12,346" in shown


ANY = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=80)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner)


@settings(max_examples=40)
@given(st.recursive(ANY, nested, max_leaves=20))
def test_plain_data_can_always_be_sent(value: Any) -> None:
    msgspec.json.decode(msgspec.json.encode(plain(value)))


def test_plain_data_is_bounded() -> None:
    deep: Any = []
    for _ in range(500):
        deep = [deep]
    assert len(json.dumps(plain(deep))) < 100
    wide = plain([list(range(1000)) for _ in range(1000)])
    assert len(json.dumps(wide)) < 100_000 and wide[-1] == f"... {1000 - len(wide) + 1} more"
    assert plain({"data": bytes(100)}) == {"data": f"{'00' * 32}... (100 bytes)"}
    assert len(plain("x" * 100_000)) < 2000
    assert plain(1 << 70) == hex(1 << 70) and plain(float("nan")) == "nan"
    assert decoded(b"\x07") == ("", None) and decoded(b"") == ("", None)
    assert decoded(msgspec.msgpack.encode({"a": 1})) == ("MessagePack", {"a": 1})
    assert decoded(b'{"a": [1]}') == ("JSON", {"a": [1]})
    assert decoded(b"\x91" * 100_000) == ("", None)


# ---- something saved -------------------------------------------------------------------------------------------------


def golden(shape: str) -> Path:
    return GOLDEN / f"{shape}.state.bin"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.state.bin")), ids=lambda path: path.name.partition(".")[0])
def test_every_golden_state_can_be_looked_into(path: Path) -> None:
    document = inspect_path(path)
    counts = saved.count_packets(saved.decode(path.read_bytes()))
    assert document.in_flight == InFlight(counts.queued, counts.sent, counts.completions)
    assert sum(len(channel.packets) for channel in document.channels) == document.in_flight.total
    assert document.source.kind == "state" and document.server is None and document.saved is None
    assert not any(channel.rings for channel in document.channels)  # older states have no words of rings
    for packet in (packet for channel in document.channels for packet in channel.packets):
        if packet.state != "completion":
            assert packet.lib["version"] == 1 and packet.save_size == 24 and packet.described["digest"]
    assert text(document)


def test_a_saved_device_shows_what_the_live_one_did() -> None:
    machine, _, _ = busy()
    live = look(machine, 10_000)
    state = machine.save()
    document = inspect_state(state, Source(kind="state", name="x"))
    burst, before = channel_of(document, "burst1"), channel_of(live, "burst1")
    assert [(p.transaction, p.state, p.kind, p.size, p.body) for p in burst.packets] == [
        (p.transaction, p.state, p.kind, p.size, p.body) for p in before.packets
    ]
    assert [p.described["sequence"] for p in burst.packets] == list(range(300))
    for ring, was in zip(burst.rings, before.rings, strict=True):
        assert (ring.write_index, ring.read_index, ring.pending_send_size, ring.used, ring.free) == (
            was.write_index, was.read_index, was.pending_send_size, was.used, was.free,
        )  # fmt: skip
    assert document.providers[1].state_format == "MessagePack" and document.providers[1].state["issued"] == 300
    assert document.bus.gpadls == live.bus.gpadls
    assert [(o.relid, o.state, o.open) for o in document.bus.offers] == [
        (o.relid, o.state, o.open) for o in live.bus.offers
    ]


def test_a_snapshots_own_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.setenv("VMBUS_PROVIDER_PATH", str(tmp_path))
    machine, _, _ = busy()
    state = machine.save()
    strange = msgspec.structs.replace(state.providers[1], kind="evil:Provider", state=b"\xc1raw")
    state = msgspec.structs.replace(state, providers=[state.providers[0], strange])
    document = inspect_state(state, Source(kind="state", name="x"))
    packet = channel_of(document, "burst1").packets[0]
    assert packet.described == {} and packet.save_size == 24 and len(packet.save) == 48
    assert document.providers[1].preview == b"\xc1raw".hex() and document.providers[1].state is None
    assert f"24 B {packet.save}" in text(document)


def test_what_a_provider_does_not_know_as_its_own_is_shown_as_bytes() -> None:
    machine, _, _ = busy()

    def other(chunks: list[bytes]) -> None:
        chunks[1] = encode(msgspec.structs.replace(packet_in(chunks[1])[0], save=b"other"))

    document = of(with_chunks(machine.save(), 1, other))
    packet = channel_of(document, "burst1").packets[0]
    assert packet.save == b"other".hex() and "not what 'burst' saves" in packet.described["problem"]


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    (tmp_path / "sources").mkdir()
    asyncio.run(write(tmp_path / "one", tmp_path / "sources", golden("traffic").read_bytes()))
    return tmp_path / "one"


def test_a_snapshot_and_a_checkpoint(snapshot: Path, tmp_path: Path) -> None:
    document = inspect_path(snapshot)
    assert document.source.kind == "snapshot" and document.saved is not None and document.saved.incoming_held == 3
    assert document.saved.files[RAM] == 3000 and document.in_flight.queued > 20
    assert document.description == msgspec.to_builtins(DEMO.device)
    assert "pc-q35-11.1" in text(document)
    store = Store(tmp_path / "checkpoints", own=False)
    store.prepare()
    store.image.write_bytes(b"image")
    data = golden("traffic").read_bytes()
    store.state("before").write_bytes(data)
    store.commit(
        Checkpoint(
            tag="before",
            number=1,
            created=utc_now(),
            vm=DEMO,
            machine=manifest({}).machine,
            qemu="11.1.3",
            packets=Packets(queued=1, sent=2),
            incoming_held=0,
            state=FileRecord(len(data), hashlib.sha256(data).hexdigest()),
            image=ImageSnapshot("s1", 12345, 1, 2),
        )
    )
    assert (store.directory / IMAGE).exists()
    for name in ("before", "before.json", "before.state"):
        found = inspect_path(store.directory / name)
        assert found.source.kind == "checkpoint" and found.in_flight == document.in_flight
    assert compare(document, found).changes == [] or {one.where[0] for one in compare(document, found).changes} <= {
        "project"
    }
    with pytest.raises(StateError, match=r"directory of checkpoints; choose one: .*before"):
        inspect_path(store.directory)
    store.state("before").write_bytes(data[:-1] + b"x")
    with pytest.raises(StateError, match="not the device's state of checkpoint 'before'"):
        inspect_path(store.directory / "before")


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda where: flip(where / STATE), r"device\.state was changed after the snapshot was made"),
        (lambda where: (where / "manifest.json").unlink(), "is not a snapshot: it has no manifest.json"),
        (lambda where: (where / RAM).unlink(), r"lacks the file ram\.qemu"),
        (lambda where: shutil.rmtree(where), "there is nothing at"),
        (lambda where: (shutil.rmtree(where), where.write_bytes(b"x" * 100)), "not device state"),
        (lambda where: (shutil.rmtree(where), os.mkfifo(where)), "is not a plain file"),
    ],
)
def test_what_is_damaged_is_refused_with_the_reason(
    snapshot: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(snapshot)
    with pytest.raises(StateError, match=message):
        inspect_path(snapshot)


# ---- two of them -----------------------------------------------------------------------------------------------------


def of(state: saved.DeviceState) -> Inspection:
    return inspect_state(state, Source(kind="state", name="x"), DEMO.device)


def places(found: Difference) -> set[str]:
    return {f"{one.kind} {'/'.join(one.where)}" for one in found.changes}


def test_one_packet_lost_among_hundreds_is_named() -> None:
    """What a restore that loses packets does, and what nobody sees in the counts of a busy device."""
    machine, _, _ = busy()
    state = machine.save()
    lost = with_chunks(state, 1, lambda chunks: chunks.pop(100))
    found = compare(of(state), of(lost))
    assert not found.same
    assert places(found) >= {"removed channels/burst1/packets/100"}
    assert sum(one.where[2] == "packets" for one in found.changes) == 1
    assert {one.where[2] for one in found.changes} == {"packets", "in flight"}
    assert places(compare(of(lost), of(state))) >= {"added channels/burst1/packets/100"}


def test_packets_that_changed_places_or_contents_are_named() -> None:
    machine, _, _ = busy()
    state = machine.save()

    def swap(chunks: list[bytes]) -> None:
        chunks[5], chunks[6] = chunks[6], chunks[5]

    found = compare(of(state), of(with_chunks(state, 1, swap)))
    assert places(found) == {"changed channels/burst1/packets/order"}

    def damage(chunks: list[bytes]) -> None:
        chunk, _ = packet_in(chunks[5])
        chunks[5] = encode(msgspec.structs.replace(chunk, save=chunk.save[:-1] + b"\xff"))

    found = compare(of(state), of(with_chunks(state, 1, damage)))
    assert places(found) == {
        "changed channels/burst1/packets/5/save",
        "changed channels/burst1/packets/5/described/digest",
    }


def test_registers_rings_providers_gpadls_and_description() -> None:
    machine, _, _ = busy()
    state = machine.save()
    config = bytearray(state.config)
    config[4] ^= 4
    registers = dict(state.synic.registers)
    gone = registers.popitem()[0]
    ring = state.channels[0].incoming
    assert ring is not None
    other = msgspec.structs.replace(
        state,
        config=bytes(config),
        synic=msgspec.structs.replace(state.synic, registers=registers),
        bus=msgspec.structs.replace(state.bus, gpadls=state.bus.gpadls[:-1]),
        channels=[
            msgspec.structs.replace(
                state.channels[0], incoming=msgspec.structs.replace(ring, interrupt_mask=ring.interrupt_mask ^ 1)
            ),
            *state.channels[1:],
        ],
        providers=[state.providers[0], msgspec.structs.replace(state.providers[1], state=b"")],
    )
    document = of(other)
    document.description = dict(document.description or {}, name="another")
    found = places(compare(of(state), document))
    assert f"removed synic/registers/{Register(gone).name}" in found
    assert "changed function/bus_master" in found and "changed description/name" in found
    assert "changed channels/echo0/incoming ring/interrupt_mask" in found
    assert any(one.startswith("removed bus/gpadls/") for one in found)
    assert "changed providers/burst1/state_bytes" in found


def test_packets_that_were_not_listed_are_not_called_the_same() -> None:
    machine, _, _ = busy()
    document = look(machine, 3)
    found = compare(document, document)
    assert found.same and found.truncated


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))


def run(*words: str) -> Any:
    return CliRunner().invoke(main, ["inspect", *words])


@pytest.mark.usefixtures("runtime")
def test_the_command_on_something_saved(snapshot: Path) -> None:
    shown = run(str(snapshot))
    assert shown.exit_code == 0 and "packets" in shown.output and "digest" in shown.output
    document = msgspec.json.decode(run(str(snapshot), "--json").output, type=Inspection)
    assert document.in_flight.total == sum(len(one.packets) for one in document.channels)
    name = next(one.name for one in document.channels if one.packets)
    assert run(str(snapshot), "--packets", "1").output.count("saved by its provider") == 1
    one = msgspec.json.decode(run(str(snapshot), "--json", "--channel", name).output, type=Inspection)
    assert [channel.name for channel in one.channels] == [name]
    assert run(str(snapshot), "--verify").exit_code == 0
    flip(snapshot / RAM)
    assert run(str(snapshot)).exit_code == 0
    refused = run(str(snapshot), "--verify")
    assert refused.exit_code == StateError.status and "ram.qemu was changed" in refused.output


@pytest.mark.usefixtures("runtime")
def test_fault_n24_one_look_is_short_unless_more_is_asked_for(snapshot: Path) -> None:
    said = "saved by its provider"
    short, full = run(str(snapshot)).output, run(str(snapshot), "--packets", "1000").output
    assert short.count(said) <= 8 < full.count(said)
    assert "more (--packets N, --channel " in short and "more (--packets" not in full
    document = msgspec.json.decode(run(str(snapshot), "--json").output, type=Inspection)
    name = max(document.channels, key=lambda one: len(one.packets)).name
    assert run(str(snapshot), "--channel", name).output.count(said) == full.count(said)


def test_the_exit_status_of_diff_is_that_of_diff(tmp_path: Path) -> None:
    a, b = str(golden("traffic")), str(golden("opened"))
    same = run("diff", a, a)
    assert same.exit_code == 0 and "---" in same.output and "  - " not in same.output
    other = run("diff", a, b)
    assert other.exit_code == 1 and "  - packet 1 sent, inband" in other.output and " packets removed" in other.output
    found = msgspec.json.decode(run("diff", a, b, "--json").output, type=Difference)
    assert not found.same and any(one.kind == "removed" and "packets" in one.where for one in found.changes)
    (tmp_path / "bad").write_bytes(b"bad")
    for words in (("diff", a, str(tmp_path / "bad")), ("diff", a, str(tmp_path / "none")), ("diff", a)):
        assert run(*words).exit_code == 2, words


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "no VM is running; name a snapshot"),
        (["demo"], 2, "neither a running VM (running: none) nor a snapshot"),
        (["./demo"], 11, "there is nothing at demo"),
        ([".", "--watch"], 2, "does not change: --watch is for running VMs"),
        (["--watch", "."], 2, "does not change"),
        (["--watch", "2", "."], 2, "does not change"),
        (["--watch", "0", "."], 2, "0.05"),
        ([".", "--count", "1"], 2, "--count goes with --watch"),
        (["a", "b"], 2, "give one TARGET"),
        (["diff", "a", "b", "--watch"], 2, "diff goes with"),
        ([".", "--checkpoint", "x"], 2, "--checkpoint goes with a running VM"),
        ([str(GOLDEN / "idle.state.bin"), "--channel", "x"], 2, "there is no channel 'x'"),
        ([str(GOLDEN)], 11, "is not a snapshot: it has no manifest.json"),
    ],
)
def test_wrong_words_are_explained(words: list[str], status: int, message: str) -> None:
    result = run(*words)
    assert message in result.output and result.exit_code == status, result.output


def test_names_of_running_vms_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert getattr(find("demo", names=["demo"]), "name", None) == "demo"
    assert find("./demo", names=["demo"]) == Saved(Path("demo"))
    assert find("demo", names=[]) == Saved(Path("demo"))
    with pytest.raises(UsageError, match="several VMs are running"):
        find(None, names=["a", "b"])
