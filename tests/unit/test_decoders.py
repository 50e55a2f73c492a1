"""Every decoder of bytes from outside raises one class of error, whatever the bytes are.

The table has all of them. A function of ours that decodes JSON, MessagePack or TOML and is in no row fails here, and so
does a parser of a wire format; decoders of what only our own programs have written are named with the reason.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vmbus.wire
from vmbus.cli import asking, supervisor
from vmbus.device import saved
from vmbus.device.description import parse_device
from vmbus.errors import EnvironmentProblem, PeerError, StateError, UsageError, VmbusError
from vmbus.observe.audit import format as audit_format
from vmbus.operations.migration import messages
from vmbus.operations.migration.channel import NotAuthentic
from vmbus.operations.migration.verdicts import Verdicts
from vmbus.qemu import agent
from vmbus.server import control
from vmbus.snapshot.checkpoints import Store
from vmbus.snapshot.manifest import decode_manifest
from vmbus.transport import doorway, protocol
from vmbus.vm.description import parse_description
from vmbus.vm.own_disks import decode_qcow2
from vmbus.vm.run_directory import OWNER, read_owner
from vmbus.wire import gpa, ic, packet, scsi
from vmbus.wire import messages as wire_messages

CHECKOUT = Path(__file__).resolve().parents[2]
FOLDER = Path(tempfile.mkdtemp(prefix="decoders-"))


@pytest.fixture(scope="module", autouse=True)
def folder() -> Iterator[None]:
    yield
    for path in FOLDER.iterdir():
        path.unlink()
    FOLDER.rmdir()


class Decoder(NamedTuple):
    """`call` takes bytes, `least` or more of them; `error` is all that it may raise (None: nothing). `samples`: good
    ones, to be mutated."""

    call: Callable[[bytes], object]
    error: type[VmbusError] | None
    samples: tuple[bytes, ...] = ()
    least: int = 0


def in_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def call(data: bytes) -> object:
        (FOLDER / name).write_bytes(data)
        return read(FOLDER / name)

    return call


def version_request(text: bytes) -> bytes:
    return bytes(protocol.HEADER.size + 4) + text + b"\0"


QCOW2 = (
    b"QFI\xfb"
    + bytes.fromhex("00000003000000000000007800000004")
    + bytes(76)
    + bytes.fromhex("00000000000000000000006800000000e2792aca000000037261770000000000")
    + b"base"
)
DESCRIPTION = (CHECKOUT / "qemu_configs" / "demo.toml").read_bytes()
MESSAGES = tuple(messages.encode(one) for one in (messages.Ping(), messages.Go(), messages.Failed(reason="x")))
STATES = tuple(path.read_bytes() for path in sorted((CHECKOUT / "tests" / "golden" / "v1").glob("*.state.bin"))[:2])

DECODERS: dict[str, Decoder] = {
    "vmbus.device.saved.decode": Decoder(saved.decode, StateError, STATES),
    "vmbus.operations.migration.messages.decode": Decoder(
        lambda data: messages.decode(data, "peer"), NotAuthentic, MESSAGES
    ),
    "vmbus.operations.migration.verdicts._last_line": Decoder(
        in_file(f"{'a' * 32}.verdict", lambda path: Verdicts(path.parent).find("a" * 32)),
        None,
        (b'{"stage":"gone"}\n',),
    ),
    "vmbus.qemu.agent.decode_line": Decoder(agent.decode_line, None, (b'{"id": 1, "result": {}}',)),
    "vmbus.cli.supervisor.decode_request": Decoder(
        supervisor.decode_request, UsageError, (b'{"command": "save", "arguments": {"directory": "/x"}}',)
    ),
    "vmbus.cli.asking.decode_answer": Decoder(
        asking.decode_answer, EnvironmentProblem, (b'{"progress": "x"}', b'{"result": {}}')
    ),
    "vmbus.server.control.decode_request": Decoder(
        control.decode_request, UsageError, (b'{"id": 1, "command": "status", "arguments": {}}',)
    ),
    "vmbus.server.control.decode_response": Decoder(
        control.decode_response, EnvironmentProblem, (b'{"id": 1, "result": {}}',)
    ),
    "vmbus.device.description.parse_device": Decoder(
        lambda data: parse_device(data, "x"), UsageError, (b'{"name": "a", "providers": []}',)
    ),
    "vmbus.vm.description.parse_description": Decoder(
        lambda data: parse_description(data, "x"), UsageError, (DESCRIPTION,)
    ),
    "vmbus.vm.own_disks.decode_qcow2": Decoder(lambda data: decode_qcow2(data, "x"), StateError, (QCOW2, QCOW2[:200])),
    "vmbus.vm.run_directory.read_owner": Decoder(
        in_file(OWNER, lambda path: read_owner(path.parent)), None, (b'{"pid":1,"start_time":2,"boot":"x"}',)
    ),
    "vmbus.snapshot.manifest.decode_manifest": Decoder(
        lambda data: decode_manifest(data, "x"), StateError, (b'{"manifest":{"format":"vmbus-snapshot","version":1}}',)
    ),
    "vmbus.snapshot.checkpoints.Store.record": Decoder(
        in_file("t.json", lambda path: Store(path.parent, own=False).record("t")), StateError, (b'{"checkpoint": {}}',)
    ),
    "vmbus.observe.audit.format._json": Decoder(
        lambda data: audit_format._json(data, "x", 0), StateError, (b'{"a": 1}',)
    ),
    "vmbus.transport.doorway.announced_transfer": Decoder(
        lambda data: doorway.announced_transfer(version_request(data)),
        None,
        (b'{"capabilities": {"max_data_xfer_size": 4096}}',),
    ),
    "vmbus.wire.gpa.parse_ranges": Decoder(partial(gpa.parse_ranges, count=2, max_bytes=1 << 20), PeerError),
    "vmbus.wire.packet.parse_gpa_direct": Decoder(partial(packet.parse_gpa_direct, max_bytes=1 << 20), PeerError),
    "vmbus.wire.ic.parse_time_sync": Decoder(partial(ic.parse_time_sync, version=ic.Version(3, 0)), PeerError),
    "vmbus.wire.ic.parse_kvp_answer": Decoder(partial(ic.parse_kvp_answer, request=ic.Kvp(3, 0)), PeerError),
    "vmbus.wire.scsi.parse_unmap": Decoder(partial(scsi.parse_unmap, most=64), PeerError),
    **{
        f"vmbus.wire.messages.decode {direction.name}": Decoder(
            partial(wire_messages.decode, direction=direction), PeerError
        )
        for direction in wire_messages.Direction
    },
}

OUR_OWN = {
    "vmbus.util.records.decode": "by `Refusing`, which tests/unit/test_state_hostile.py is about",
    "vmbus.testkit.replay_player.Player._event": "tests/unit/test_capture.py has damaged captures",
    "vmbus.transport.doorway.with_shorter_transfers": "what the library has said",
    "vmbus.testkit.loopback.client.VfioUserClient._negotiate": "the tests' client",
    "vmbus_guest.jobs.Job.feed": "tests/unit/test_guest_agent.py has drivers that print rubbish",
    "vmbus_guest.agent.Agent._request": "tests/unit/test_guest_agent.py has requests that are none",
    "vmbus_guest.testdrivers.__main__.main": "what the agent has said",
    "vmbus_guest.testdrivers.remote._Lines.read": "what the test on the host has said",
    "vmbus.wire.ethernet.parse_mac": "takes text, of a description",
}

AT_LEAST = {
    # Their callers have looked at the length: a whole message, a whole command, a whole word.
    "vmbus.wire.nvsp.parse_answer": 4,
    "vmbus.wire.rndis.parse": 8,
    "vmbus.wire.storvsp.parse_head": 64,
    "vmbus.wire.storvsp.parse_properties": 64,
    "vmbus.wire.storvsp.parse_srb": 64,
    "vmbus.wire.storvsp.parse_u16": 64,
}

NOT_DECODERS = re.compile(r"^vmbus\.wire\.scsi\.read_capacity")
DEVELOPERS_TOOLS = ("soak", "cli", "provision", "testbed", "testkit")


def wire_parsers() -> dict[str, Decoder]:
    """All parsers of wire formats that take the bytes alone, besides those in the table."""
    found = {}
    for info in pkgutil.iter_modules(vmbus.wire.__path__):
        module = importlib.import_module(f"vmbus.wire.{info.name}")
        for name, value in vars(module).items():
            full = f"{module.__name__}.{name}"
            ours = inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
            if not ours or not re.match("decode|parse|unpack|read", name) or NOT_DECODERS.match(full):
                continue
            if full in OUR_OWN or any(known.partition(" ")[0] == full for known in DECODERS):
                continue
            if full == "vmbus.wire.scsi.parse_extent":  # its caller has a command block, which always has 16 bytes
                found[full] = Decoder(lambda data: scsi.parse_extent(data[:16].ljust(16, b"\0")), None)
                continue
            (parameter,) = inspect.signature(value).parameters.values()  # else it needs a row of its own
            view = "memoryview" in str(parameter.annotation)
            call = (lambda data, of=value: of(memoryview(data))) if view else value
            found[full] = Decoder(call, PeerError, least=AT_LEAST.get(full, 0))
    return found


ALL = DECODERS | wire_parsers()


def check(decoder: Decoder, data: bytes) -> None:
    if len(data) < decoder.least:
        return
    try:
        decoder.call(data)
    except Exception as error:
        assert decoder.error is not None and isinstance(error, decoder.error), (
            f"{type(error).__name__}: {str(error)[:200]} for {data[:100]!r}"
        )


DEPTH = 20_000
FIXED = [
    b"",
    b"[" * DEPTH,
    b'{"a":' * DEPTH,
    b"\x91" * DEPTH,
    b"\x81\xa1a" * DEPTH,
    b"a = " + b"[" * 5000,
    b"\xff\xfe\xfd",
    b'"\xff"',
    b'{"\xff": 1}',
    b"\xdd\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"9" * 5000,
    b'{"id": 1e999}',
    b'{"id": ' + b"9" * 5000 + b"}",
    b"null",
    b"[]",
    b"0",
    bytes(1 << 16),
    b"\xff" * (1 << 16),
]

JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def mutated(draw: Any, sample: bytes) -> bytes:
    data = bytearray(sample)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        how = draw(st.sampled_from(("flip", "insert", "cut", "nest", "repeat")))
        if how == "flip" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=8))
        elif how == "cut":
            del data[at:]
        elif how == "nest":
            data[at:at] = draw(st.sampled_from((b"[", b"\x91", b'{"a":'))) * draw(st.sampled_from((1, 50, 20_000)))
        else:
            data += data[at:]
    return bytes(data[: 1 << 20])


@pytest.mark.parametrize("name", sorted(ALL))
def test_fault_h5_fault_h7_a_decoder_raises_one_class_of_error(name: str) -> None:
    decoder = ALL[name]
    for data in FIXED:
        check(decoder, data)
    for sample in decoder.samples:
        decoder_takes_something(decoder, sample)

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def fuzz(source: st.DataObject) -> None:
        how = source.draw(st.sampled_from(("bytes", "typed", "mutated")))
        if how == "mutated" and decoder.samples:
            check(decoder, mutated(source.draw, source.draw(st.sampled_from(decoder.samples))))
        elif how == "typed":
            value = source.draw(JSONISH)
            check(decoder, json.dumps(value).encode())
            check(decoder, msgspec.msgpack.encode(_small(value)))
        else:
            check(decoder, source.draw(st.binary(max_size=200)))

    fuzz()


def _small(value: Any) -> Any:
    """MessagePack has no larger numbers."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value % (1 << 63)
    if isinstance(value, list):
        return [_small(one) for one in value]
    return {key: _small(one) for key, one in value.items()} if isinstance(value, dict) else value


def decoder_takes_something(decoder: Decoder, sample: bytes) -> None:
    check(decoder, sample)
    for end in range(0, len(sample), max(1, len(sample) // 50)):
        check(decoder, sample[:end])


def decoding_functions() -> Iterator[str]:
    """Every function of ours that decodes JSON, MessagePack or TOML."""
    for folder in ("device", "guest"):
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            relative = path.relative_to(CHECKOUT / folder)
            if len(relative.parts) < 2 or relative.parts[1] in DEVELOPERS_TOOLS:
                continue
            module = ".".join(relative.with_suffix("").parts)
            yield from (f"{module}.{name}" for name in _decoding(ast.parse(path.read_text()), ()))


def _decoding(node: ast.AST, inside: tuple[str, ...]) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute):
            text = ast.unparse(child.func)
            formats = ("json", "msgpack", "toml", "decoder")
            if text in ("json.loads", "json.load") or (
                text.endswith(".decode") and any(one in text.lower() for one in formats)
            ):
                yield ".".join(inside)
        yield from _decoding(child, (*inside, child.name) if named else inside)  # type: ignore[attr-defined]


def test_fault_h5_a_new_decoder_is_in_the_table() -> None:
    known = {name.partition(" ")[0] for name in ALL} | set(OUR_OWN)
    missing = sorted(set(decoding_functions()) - known)
    assert not missing, f"neither in DECODERS nor, with the reason, in OUR_OWN: {missing}"


def test_fault_h5_sabotage_a_list_of_exceptions_that_is_not_complete_is_found() -> None:
    def forgetful(data: bytes) -> object:
        try:
            return json.loads(data)
        except json.JSONDecodeError as error:
            raise StateError(str(error)) from error

    with pytest.raises(AssertionError, match=r"RecursionError|UnicodeDecodeError"):
        for data in FIXED:
            check(Decoder(forgetful, StateError), data)
