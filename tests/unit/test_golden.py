"""Golden state: files written by an older program are restored by this one, exactly; newer ones may be read or refused.

tests/golden/make.py wrote them. A change that breaks these tests breaks the snapshots that people have.
"""

import hashlib
import importlib.util
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from support.device import BASE, CONFIG, PAGE, Machine
from vmbus.bus.offers import CONNECTION_ID_BASE
from vmbus.device import saved
from vmbus.errors import StateError
from vmbus.kmcl import saved as chunks
from vmbus.memory.guest import GuestMemory
from vmbus.ring import RingReader, RingWriter
from vmbus.wire import messages as m
from vmbus.wire.packet import PacketType
from vmbus.wire.synic import SLOT_FLAG_PENDING, SLOT_HEADER, SLOT_OFFSET, SLOT_SIZE, Register
from vmbus.wire.workload import (
    BURST_ANSWER,
    BURST_TYPE,
    ECHO_TYPE,
    BurstDone,
    burst_digest,
    parse_burst_packet,
    parse_echo_reply,
    transform,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def load_maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load_maker()
DIRECTORIES = sorted(path for path in GOLDEN.iterdir() if path.name.startswith("v"))
FILES = sorted(path for directory in DIRECTORIES for path in directory.glob("*.state.bin"))
V1 = GOLDEN / "v1"

directories = pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda path: path.name)
files = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name.partition('.')[0]}")


def read(path: Path) -> tuple[saved.DeviceState, bytes]:
    """A state and the guest's memory."""
    memory = path.with_name(path.name.replace(".state.", ".memory."))
    return saved.decode(path.read_bytes()), zlib.decompress(memory.read_bytes())


def restored(state: saved.DeviceState, memory: bytes) -> Machine:
    """A device of today in the place of the one that was saved; it does not run yet."""
    machine = Machine(echo=make.ECHO_OPTIONS)
    machine.ram[: len(memory)] = memory
    machine.boot()
    machine.adopt(state)
    return machine


def running(directory: Path, shape: str) -> tuple[Machine, saved.DeviceState]:
    """The device of a file, which goes on."""
    state, memory = read(directory / f"{shape}.state.bin")
    machine = restored(state, memory)
    machine.device.thaw()
    return machine, state


def again(machine: Machine) -> saved.DeviceState:
    """The state that today's program writes of a device that has not run since its restore."""
    return saved.save_device("vmbus0", CONFIG, machine.device, machine.providers)


def same(old: Any, new: Any, where: str = "") -> None:
    """All that the old file says is in the new one; what only the new one has is a field that was added since."""
    if isinstance(old, dict):
        assert isinstance(new, dict) and set(old) <= set(new), where
        for key in old:
            same(old[key], new[key], f"{where}/{key}")
    elif isinstance(old, list):
        assert isinstance(new, list) and len(old) <= len(new), where
        for index, value in enumerate(old):
            same(value, new[index], f"{where}/{index}")
    elif isinstance(old, bytes) and old != new:
        # A chunk, or a LibBuf inside of one: a structure of its own.
        assert old[:1] >= b"\x80" and old[0] & 0xF0 == 0x80, where
        same(msgspec.msgpack.decode(old), msgspec.msgpack.decode(new), f"{where}*")
    else:
        assert old == new, where


def test_every_shape_is_there() -> None:
    assert V1 in DIRECTORIES
    for directory in DIRECTORIES:
        assert {path.name for path in directory.iterdir()} >= {
            f"{shape}.{kind}.bin" for shape in make.SHAPES for kind in ("state", "memory")
        }
    shapes = {path.name.partition(".")[0]: read(path)[0] for path in V1.glob("*.state.bin")}
    counts = saved.count_packets(shapes["traffic"])
    assert counts.queued > 20 and counts.sent > 20
    assert saved.count_packets(shapes["completions"]).completions > 10
    assert len(shapes["partial"].bus.partial) == 1
    assert len(shapes["undelivered"].synic.outbox) == 4
    assert [one.state for one in shapes["opened"].bus.offers] == ["open", "open"]
    assert [one.state for one in shapes["idle"].bus.offers] == ["unoffered", "unoffered"]


@files
def test_an_old_file_is_restored_exactly(path: Path) -> None:
    state, memory = read(path)
    machine = restored(state, memory)
    machine.quiesce()
    # Compared as bytes of MessagePack, not through types that could forget a field.
    old = msgspec.msgpack.decode(path.read_bytes()[56:])
    new = msgspec.msgpack.decode(msgspec.msgpack.encode(again(machine)))
    same(without_restored(old), without_restored(new))


def without_restored(tree: dict[str, Any]) -> dict[str, Any]:
    """Burst counts the packets that were restored to it: that number alone is another one afterwards. And a device that
    has not run yet needs no signals: it has masked them."""
    for channel in tree["channels"]:
        if channel.get("incoming"):
            channel["incoming"].pop("interrupt_mask")
    for provider in tree["providers"]:
        own = msgspec.msgpack.decode(provider["state"])
        own.pop("restored", None)
        provider["state"] = own
    return tree


class Guest:
    """The guest's side on rings that it opened before: raw, since no driver object lives in a file."""

    def __init__(self, machine: Machine, state: saved.DeviceState, interface_type: Any) -> None:
        (record,) = (one for one in state.bus.offers if one.interface_type == interface_type.bytes_le)
        assert record.open is not None
        (gpadl,) = (one for one in state.bus.gpadls if one.handle == record.open.ring_gpadl)
        pages = [(pfn * PAGE, PAGE) for pfn in gpadl.ranges[0].pfns]
        split = record.open.downstream_page_offset
        memory = GuestMemory()
        memory.map(BASE, memoryview(machine.ram), True)
        self.machine = machine
        self.connection = CONNECTION_ID_BASE + record.relid
        self.reader = RingReader(memory.window(pages[split : split + 1]), memory.window(pages[split + 1 :]))
        self.writer = RingWriter(memory.window(pages[:1]), memory.window(pages[1:split]))

    def take(self) -> list[tuple[int, int, bytes]]:
        """What is in the ring: kind, transaction, payload."""
        packets, error = self.reader.fetch()
        assert error is None
        if packets and self.reader.advance(packets[-1].end):
            self.signal()
        return [(one.kind, one.transaction, one.payload) for one in packets]

    def complete(self, transaction: int, reply: bytes) -> None:
        assert self.writer.put(PacketType.COMPLETION, 0, transaction, reply)
        if self.writer.commit():
            self.signal()

    def signal(self) -> None:
        self.machine.write32(Register.SIGNAL_EVENT, self.connection)


def run(machine: Machine, turn: Callable[[], bool]) -> None:
    """Guest and device take turns until neither has anything to do."""
    for _ in range(1000):
        machine.serve()
        fired = machine.fire_timers()
        machine.serve()
        if not turn() and not fired:
            return
    raise AssertionError("never quiet")


@directories
def test_packets_of_an_old_file_come_out_exactly_once(directory: Path) -> None:
    machine, state = running(directory, "traffic")
    burst, echo = Guest(machine, state, BURST_TYPE), Guest(machine, state, ECHO_TYPE)
    seen: list[int] = []
    done: list[BurstDone] = []
    replies: list[int] = []

    def turn() -> bool:
        taken = burst.take()
        for kind, transaction, payload in taken:
            if kind == PacketType.COMPLETION:
                continue  # that the run has begun
            parsed = parse_burst_packet(payload)
            if isinstance(parsed, BurstDone):
                done.append(parsed)
                continue
            assert parsed is not None and parsed.intact
            seen.append(parsed.sequence)
            burst.complete(transaction, BURST_ANSWER.pack(parsed.sequence, burst_digest(parsed.sequence, parsed.data)))
        answers = echo.take()
        for kind, _, payload in answers:
            reply = parse_echo_reply(payload)
            assert kind == PacketType.COMPLETION and reply is not None
            assert reply.data == transform(b"data", reply.sequence)
            replies.append(reply.sequence)
        return bool(taken or answers)

    run(machine, turn)
    assert seen == list(range(make.BURST.packets))
    assert done == [BurstDone(make.BURST.packets, make.BURST.packets, 0)]
    assert replies == list(range(make.REQUESTS))


@directories
def test_completions_of_an_old_file_come_out_exactly_once(directory: Path) -> None:
    machine, state = running(directory, "completions")
    echo = Guest(machine, state, ECHO_TYPE)
    numbers: list[int] = []

    def turn() -> bool:
        taken = echo.take()
        numbers.extend(parse_echo_reply(payload).sequence for _, _, payload in taken)  # type: ignore[union-attr]
        return bool(taken)

    run(machine, turn)
    assert numbers == list(range(3 * make.REQUESTS))


def messages_of(machine: Machine) -> list[Any]:
    """Take the messages as the guest does: the slot, and EOM for the next one."""
    low, high = (machine.read32(Register.MESSAGE_PAGE_LOW + offset) for offset in (0, 4))
    start = (low & ~1 | high << 32) - BASE + SLOT_OFFSET
    taken = []
    for _ in range(100):
        slot = bytes(machine.ram[start : start + SLOT_SIZE])
        kind, size, flags, _, _ = SLOT_HEADER.unpack_from(slot)
        if not kind:
            return taken
        taken.append(m.decode(slot[SLOT_HEADER.size : SLOT_HEADER.size + size], m.Direction.HOST))
        machine.ram[start : start + 8] = bytes(8)
        if flags & SLOT_FLAG_PENDING:
            machine.write32(Register.EOM, 1)
        machine.serve()
    raise AssertionError("messages without end")


@directories
def test_messages_of_an_old_file_are_delivered(directory: Path) -> None:
    machine, _ = running(directory, "undelivered")
    machine.serve()
    taken = messages_of(machine)
    assert [type(one) for one in taken] == [m.GpadlCreated] * 5
    assert [one.status for one in taken] == [0] * 5 and len({one.gpadl for one in taken}) == 5


@directories
def test_a_gpadl_of_an_old_file_is_completed(directory: Path) -> None:
    state, memory = read(directory / "partial.state.bin")
    machine = restored(state, memory)
    (partial,) = machine.device.bus.gpadls.partial.values()
    rest = bytearray()
    for number in range(60):
        rest += struct.pack("<IIQ", PAGE, 0, (BASE + 2 * PAGE * number) // PAGE)
    assert bytes(rest[: len(partial.data)]) == partial.data
    for start in range(len(partial.data), len(rest), 200):
        machine.device.bus.receive(m.encode(m.GpadlBody(0, partial.handle, bytes(rest[start : start + 200]))))
    (gpadl,) = machine.device.bus.gpadls.complete.values()
    assert len(gpadl.ranges) == 60 and not machine.device.bus.gpadls.partial


# ---- forwards: what a newer program may have added -------------------------------------------------------------------

NESTED = {"lib"}  # bytes that are structures themselves; so is each of "chunks"


def with_unknown_fields(node: Any) -> Any:
    """Every structure with fields that this program does not know, as a later version of the same format may have."""
    if isinstance(node, dict):
        if node and all(isinstance(key, str) for key in node):  # the map of registers is no structure
            grown = {"added_first": {"deep": [1, None]}, **{k: with_unknown_fields(v) for k, v in node.items()}}
            for name in NESTED & set(node):
                grown[name] = reencoded(node[name])
            if "chunks" in node:
                grown["chunks"] = [reencoded(one) for one in node["chunks"]]
            return grown | {"added_last": b"\0" * 9}
        return node
    if isinstance(node, list):
        return [with_unknown_fields(one) for one in node]
    return node


def reencoded(data: bytes) -> bytes:
    return msgspec.msgpack.encode(with_unknown_fields(msgspec.msgpack.decode(data)))


def sealed(tree: Any, version: int = saved.FORMAT_VERSION) -> bytes:
    body = msgspec.msgpack.encode(tree)
    return struct.pack("<8sIIQ32s", saved.MAGIC, version, 0, len(body), hashlib.sha256(body).digest()) + body


@files
def test_unknown_optional_fields_are_ignored(path: Path) -> None:
    state, memory = read(path)
    tree = msgspec.msgpack.decode(path.read_bytes()[56:])
    grown = sealed(with_unknown_fields(tree))
    assert grown.count(b"added_last") > 5
    found = saved.decode(grown)
    assert saved.count_packets(found) == saved.count_packets(state)
    first, second = (again_after(one, memory) for one in (state, found))
    assert first == second


def again_after(state: saved.DeviceState, memory: bytes) -> saved.DeviceState:
    machine = restored(state, memory)
    machine.quiesce()
    return again(machine)


def test_an_array_may_have_grown() -> None:
    """A GPA range is an array: a later version may add to its end."""
    state, memory = read(V1 / "opened.state.bin")
    tree = msgspec.msgpack.decode((V1 / "opened.state.bin").read_bytes()[56:])
    for gpadl in tree["bus"]["gpadls"]:
        for one in gpadl["ranges"]:
            one.append("added")
    assert saved.decode(sealed(tree)) == state
    restored(saved.decode(sealed(tree)), memory)


@pytest.mark.parametrize("version", [0, saved.FORMAT_VERSION + 1, 0xFFFFFFFF])
def test_unknown_versions_are_refused(version: int) -> None:
    tree = msgspec.msgpack.decode((V1 / "idle.state.bin").read_bytes()[56:])
    limits = f"this program restores {saved.OLDEST_VERSION} to {saved.FORMAT_VERSION}"
    with pytest.raises(StateError, match=f"format version {version}; {limits}"):
        saved.decode(sealed(tree, version))


@pytest.mark.parametrize("which", ["channel", "lib"])
@pytest.mark.parametrize("version", [0, chunks.VERSION + 1])
def test_unknown_versions_of_chunks_are_refused(which: str, version: int) -> None:
    tree = msgspec.msgpack.decode((V1 / "traffic.state.bin").read_bytes()[56:])
    record = tree["channels"][1]
    index = 0 if which == "channel" else 1
    chunk = msgspec.msgpack.decode(record["chunks"][index])
    if which == "channel":
        chunk["version"] = version
    else:
        lib = msgspec.msgpack.decode(chunk["lib"])
        chunk["lib"] = msgspec.msgpack.encode(lib | {"version": version})
    record["chunks"][index] = msgspec.msgpack.encode(chunk)
    machine = Machine(echo=make.ECHO_OPTIONS)
    with pytest.raises(StateError, match="version"):
        saved.check_fits(saved.decode(sealed(tree)), "vmbus0", machine.device, machine.providers)


def test_every_structure_with_a_version_refuses_others() -> None:
    """Whichever structure has a `version`, now or later: optional if it came after the first files, and bounded."""
    found = 0
    for module in (saved, chunks):
        for name, value in vars(module).items():
            if not (isinstance(value, type) and issubclass(value, msgspec.Struct)):
                continue
            for field in msgspec.structs.fields(value):
                if field.name != "version" or value is saved.BusState:  # there: the version of the guest's connection
                    continue
                found += 1
                for bad in (0, 1 << 16):
                    with pytest.raises(msgspec.ValidationError):
                        msgspec.convert(bad, field.type)
                assert msgspec.convert(1, field.type) == 1, f"{name}: version 1 can be restored"
    assert found >= 2


def test_the_limit_of_what_is_restored_is_apart_from_what_is_written() -> None:
    assert 1 <= saved.OLDEST_VERSION <= saved.FORMAT_VERSION
    assert [path.name for path in DIRECTORIES] == [
        f"v{version}" for version in range(saved.OLDEST_VERSION, saved.FORMAT_VERSION + 1)
    ], "one directory of golden files per version that can be restored"


# ---- the files themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", make.SHAPES)
def test_the_shapes_of_today_can_be_restored_too(shape: str) -> None:
    data, memory = make.make(shape)
    assert shape != "traffic" or make.make(shape) == (data, memory), "what is made is deterministic"
    machine = restored(saved.decode(data), memory)
    machine.quiesce()
    same(
        without_restored(msgspec.msgpack.decode(data[56:])),
        without_restored(msgspec.msgpack.decode(msgspec.msgpack.encode(again(machine)))),
    )


def test_existing_files_are_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "idle.state.bin").write_bytes(b"history")
    make.main(tmp_path)
    assert (tmp_path / "idle.state.bin").read_bytes() == b"history"
    assert "stays" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 2 * len(make.SHAPES)


def test_sabotage_a_changed_old_file_is_noticed() -> None:
    state, memory = read(V1 / "traffic.state.bin")
    changed = msgspec.structs.replace(state, bus=msgspec.structs.replace(state.bus, version=int(m.Version.V4_0)))
    machine = restored(changed, memory)
    machine.quiesce()
    with pytest.raises(AssertionError, match="/bus/version"):
        same(msgspec.to_builtins(state), msgspec.to_builtins(again(machine)))
