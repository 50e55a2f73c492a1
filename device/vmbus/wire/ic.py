"""Integration components: heartbeat, shutdown, time synchronisation, key-value exchange and freezing of file systems,
as Linux's hv_util and its daemons speak them on the guest's side.

Each service has a channel in message-pipe mode. Behind the pipe's header (`vmbus.kmcl.pipe`) every message, in either
direction, has the header below and a body. The host asks; the guest answers with a packet of its own that repeats the
request's transaction id, in the packet and in the header, and usually the request's length. The first exchange
negotiates versions: of the framework and of the service's messages.

Offsets in this module count from the header, so 8 less than where the pipe's header is counted.
"""

from collections.abc import Sequence
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Any, NamedTuple
from uuid import UUID

from vmbus.errors import PeerError

HEADER = Struct("<HHHHHHIBBH")
"""Framework version (2), message type, message version (2), size behind the header, status, transaction, flags, 0."""

MAXIMUM_MESSAGE = 8192
"""Bytes of a message with its header; the largest that exists, addresses in a key-value exchange, has 7448."""
MAXIMUM_VERSIONS = 100
"""In either list of a negotiation."""

_COUNTS = Struct("<HHI")
_VERSION = Struct("<HH")
_HEARTBEAT = Struct("<Q")
_SHUTDOWN = Struct("<III")
_TIME_3 = Struct("<QQQB")
_TIME_4 = Struct("<QQBBB")
_VSS = Struct("<B7xI")  # operation, flags
_KVP_HEADER = Struct("<BBH")
_KVP_VALUE = Struct("<III512s2048s")  # type, size of the key, size of the value
_KVP_KEY = Struct("<I512s")
_KVP_ENUMERATE = Struct("<IIII512s2048s")  # index, then as above

HEARTBEAT_RESERVED = 32
SHUTDOWN_TEXT = 2048
KEY_BYTES = 512
VALUE_BYTES = 2048

UNIX_EPOCH = 116_444_736_000_000_000
"""1970-01-01 in the time of these messages: units of 100 ns since 1601-01-01 UTC."""
UNITS = 10_000_000
"""Of that time, in a second."""


class IcError(PeerError):
    """Bytes that are not such a message."""


class Version(NamedTuple):
    """Of the framework, or of a service's messages."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


class MessageType(IntEnum):
    NEGOTIATE = 0
    HEARTBEAT = 1
    KVP = 2
    SHUTDOWN = 3
    TIME = 4
    VSS = 5


class Flag(IntFlag):
    """Of a message: the host sends TRANSACTION | REQUEST, the guest TRANSACTION | RESPONSE."""

    TRANSACTION = 1
    REQUEST = 2
    RESPONSE = 4


class IcStatus(IntEnum):
    OK = 0
    FAIL = 0x80004005
    NO_MORE_ITEMS = 0x80070103
    NOT_SUPPORTED = 0x80070032


class Service(NamedTuple):
    """One of the services. Versions: newest first, what Linux's driver knows."""

    name: str
    interface_type: UUID
    message_type: MessageType
    versions: tuple[Version, ...]


FRAMEWORK_VERSIONS = (Version(3, 0), Version(1, 0))

HEARTBEAT = Service(
    "heartbeat",
    UUID("57164f39-9115-4e78-ab55-382f3bd5422d"),
    MessageType.HEARTBEAT,
    (Version(3, 0), Version(1, 0)),
)
SHUTDOWN = Service(
    "shutdown",
    UUID("0e0b6031-5213-4934-818b-38d90ced39db"),
    MessageType.SHUTDOWN,
    (Version(3, 2), Version(3, 1), Version(3, 0), Version(1, 0)),
)
TIME = Service(
    "time",
    UUID("9527e630-d0ae-497b-adce-e80ab0175caf"),
    MessageType.TIME,
    (Version(4, 0), Version(3, 0), Version(1, 0)),
)
KVP = Service(
    "kvp",
    UUID("a9a0f4e7-5a45-4d96-b827-8a841e8c03e6"),
    MessageType.KVP,
    (Version(4, 0), Version(3, 0), Version(1, 0)),
)
VSS = Service(
    "vss",
    UUID("35fa2e29-ea23-4236-96ae-3a6ebacba440"),
    MessageType.VSS,
    (Version(5, 0),),
)
SERVICES = (HEARTBEAT, SHUTDOWN, TIME, KVP, VSS)


class Message(NamedTuple):
    """One message. `transaction` is 0 to 255; `body` is everything behind the header."""

    kind: int
    body: bytes
    framework: Version = Version(0, 0)
    version: Version = Version(0, 0)
    status: int = 0
    transaction: int = 0
    flags: int = Flag.TRANSACTION | Flag.REQUEST

    def pack(self) -> bytes:
        """Its bytes, without the pipe's header."""
        return (
            HEADER.pack(
                *self.framework, self.kind, *self.version, len(self.body), self.status, self.transaction, self.flags, 0
            )
            + self.body
        )

    def reply(self, body: bytes | None = None, status: int = IcStatus.OK) -> "Message":
        """The guest's answer: the same header and, as the guest answers in the request's own buffer, its length. A
        shorter body is followed by what the request has there."""
        body = self.body if body is None else body + self.body[len(body) :]
        return self._replace(body=body, status=status, flags=Flag.TRANSACTION | Flag.RESPONSE)


def parse(data: bytes) -> Message:
    """One message out of what a pipe carried. Raises IcError."""
    if not HEADER.size <= len(data) <= MAXIMUM_MESSAGE:
        raise IcError(f"an integration message of {len(data)} bytes; {HEADER.size} to {MAXIMUM_MESSAGE} are possible")
    major, minor, kind, message_major, message_minor, size, status, transaction, flags, _ = HEADER.unpack_from(data)
    # The guest's answer to a negotiation has its own size, and still the length of the request.
    if size > len(data) - HEADER.size:
        raise IcError(f"an integration message says {size} bytes, and has {len(data) - HEADER.size} behind its header")
    return Message(
        kind,
        data[HEADER.size :],
        Version(major, minor),
        Version(message_major, message_minor),
        status,
        transaction,
        flags,
    )


# ---- negotiation ---------------------------------------------------------------------------------------------------


def negotiation(frameworks: Sequence[Version], versions: Sequence[Version]) -> bytes:
    """The body of the host's offer: all versions that it can do."""
    pairs = b"".join(_VERSION.pack(*one) for one in (*frameworks, *versions))
    return _COUNTS.pack(len(frameworks), len(versions), 0) + pairs


def parse_negotiation(body: bytes) -> tuple[list[Version], list[Version]]:
    """Versions of the framework and of the messages; in an answer one of each, or none. Raises IcError."""
    if len(body) < _COUNTS.size:
        raise IcError(f"a negotiation of {len(body)} bytes")
    frameworks, versions, _ = _COUNTS.unpack_from(body)
    if max(frameworks, versions) > MAXIMUM_VERSIONS:
        raise IcError(f"a negotiation with {frameworks} and {versions} versions; at most {MAXIMUM_VERSIONS} each")
    need = _COUNTS.size + _VERSION.size * (frameworks + versions)
    if len(body) < need:
        raise IcError(f"a negotiation with {frameworks} and {versions} versions in {len(body)} bytes")
    pairs = [Version(*pair) for pair in _VERSION.iter_unpack(body[_COUNTS.size : need])]
    return pairs[:frameworks], pairs[frameworks:]


def choose(body: bytes, frameworks: Sequence[Version], versions: Sequence[Version]) -> tuple[Version, Version] | None:
    """The guest's choice from the host's offer: the first of each of its own that is in it; None if there is none.

    Raises IcError.
    """
    offered = parse_negotiation(body)
    framework = next((one for one in frameworks if one in offered[0]), None)
    version = next((one for one in versions if one in offered[1]), None)
    return None if framework is None or version is None else (framework, version)


def answer_negotiation(choice: tuple[Version, Version] | None) -> bytes:
    return _COUNTS.pack(0, 0, 0) if choice is None else negotiation(choice[:1], choice[1:])


# ---- heartbeat -----------------------------------------------------------------------------------------------------


def heartbeat(sequence: int) -> bytes:
    """The body of a heartbeat; the guest answers with the sequence number plus 1."""
    return _HEARTBEAT.pack(sequence & 0xFFFF_FFFF_FFFF_FFFF) + bytes(HEARTBEAT_RESERVED)


def parse_heartbeat(body: bytes) -> int:
    """Its sequence number. Raises IcError."""
    if len(body) < _HEARTBEAT.size:
        raise IcError(f"a heartbeat of {len(body)} bytes")
    return int(_HEARTBEAT.unpack_from(body)[0])


# ---- shutdown ------------------------------------------------------------------------------------------------------


class ShutdownFlag(IntFlag):
    """What the guest is to do; without any, it powers off."""

    FORCE = 1
    RESTART = 2
    HIBERNATE = 4


class Shutdown(NamedTuple):
    """A request to end. `timeout` in seconds, 0 for none; `text` is for people, at most 1023 characters."""

    flags: int = 0
    reason: int = 0
    timeout: int = 0
    text: str = ""


def shutdown(request: Shutdown) -> bytes:
    text = request.text.encode("utf-16-le")[: SHUTDOWN_TEXT - 2]
    return _SHUTDOWN.pack(request.reason, request.timeout, request.flags) + text.ljust(SHUTDOWN_TEXT, b"\0")


def parse_shutdown(body: bytes) -> Shutdown:
    """The request. Raises IcError."""
    if len(body) < _SHUTDOWN.size + SHUTDOWN_TEXT:
        raise IcError(f"a shutdown request of {len(body)} bytes; it has {_SHUTDOWN.size + SHUTDOWN_TEXT}")
    reason, timeout, flags = _SHUTDOWN.unpack_from(body)
    text = body[_SHUTDOWN.size : _SHUTDOWN.size + SHUTDOWN_TEXT].decode("utf-16-le", "replace")
    return Shutdown(flags, reason, timeout, text.partition("\0")[0])


# ---- time ----------------------------------------------------------------------------------------------------------


class TimeFlag(IntEnum):
    """Why the guest is told the time: SYNC, so that it sets its clock; SAMPLE, so that it can keep it right."""

    PROBE = 0
    SYNC = 1
    SAMPLE = 2


class TimeSync(NamedTuple):
    """The host's time, in seconds since 1970, and what it is told for. `reference`: the guest's reference counter at
    that moment, units of 100 ns (version 4.0)."""

    seconds: float
    flag: int
    reference: int = 0


def time_sync(sync: TimeSync, version: Version) -> bytes:
    """The body, in that version of the messages."""
    stamp = UNIX_EPOCH + round(sync.seconds * UNITS)
    if version >= (4, 0):
        return _TIME_4.pack(stamp, sync.reference, sync.flag, 0, 0) + bytes(5)
    return _TIME_3.pack(stamp, 0, 0, sync.flag) + bytes(7)


def parse_time_sync(body: bytes, version: Version) -> TimeSync:
    """What the host says. Raises IcError."""
    if version >= (4, 0):
        if len(body) < _TIME_4.size:
            raise IcError(f"a time message of {len(body)} bytes")
        stamp, reference, flag, _, _ = _TIME_4.unpack_from(body)
    else:
        if len(body) < _TIME_3.size:
            raise IcError(f"a time message of {len(body)} bytes")
        stamp, _, _, flag = _TIME_3.unpack_from(body)
        reference = 0
    return TimeSync((stamp - UNIX_EPOCH) / UNITS, flag, reference)


# ---- freezing file systems -----------------------------------------------------------------------------------------


class VssOperation(IntEnum):
    """What is asked: HOT_BACKUP, whether it can be done at all; FREEZE, that nothing is written any more until THAW."""

    HOT_BACKUP = 2
    FREEZE = 5
    THAW = 6


def vss(operation: VssOperation) -> bytes:
    """The body of a request. The flags are the guest's, in its answer."""
    return _VSS.pack(operation, 0)


def parse_vss(body: bytes) -> int:
    """The operation. Raises IcError."""
    if len(body) < _VSS.size:
        raise IcError(f"a request about file systems of {len(body)} bytes; it has {_VSS.size}")
    return int(_VSS.unpack_from(body)[0])


# ---- key-value exchange ----------------------------------------------------------------------------------------------


class KvpOperation(IntEnum):
    GET = 0
    SET = 1
    DELETE = 2
    ENUMERATE = 3


class Pool(IntEnum):
    """Who writes what: EXTERNAL the host, for programs of the guest; GUEST programs of the guest, for the host; AUTO
    the guest's system, about itself; AUTO_EXTERNAL the host's system, about itself."""

    EXTERNAL = 0
    GUEST = 1
    AUTO = 2
    AUTO_EXTERNAL = 3


class ValueType(IntEnum):
    """Of a value; the numbers that Linux uses."""

    STRING = 1
    U32 = 4
    U64 = 8


class Kvp(NamedTuple):
    """A request about a key, or its answer. `value` is text, or a number in decimal digits;
    `position` is for ENUMERATE, from 0."""

    operation: int
    pool: int
    key: str = ""
    value: str = ""
    value_type: int = ValueType.STRING
    position: int = 0


def _text(text: str, room: int, what: str) -> tuple[bytes, int]:
    """UTF-16 with its terminator, padded, and its size."""
    data = text.encode("utf-16-le") + b"\0\0"
    if len(data) > room or "\0" in text:
        raise ValueError(f"{what} of {len(text)} characters: at most {room // 2 - 1}, none of them a zero character")
    return data.ljust(room, b"\0"), len(data)


def _from_text(data: bytes, size: int, what: str) -> str:
    if size > len(data) or size % 2:
        raise IcError(f"{what} of {size} bytes; there is room for {len(data)}, two for each character")
    try:
        return data[:size].decode("utf-16-le").partition("\0")[0]
    except UnicodeDecodeError as error:
        raise IcError(f"{what} is not UTF-16") from error


def _value(kvp: Kvp) -> tuple[bytes, int]:
    if kvp.value_type == ValueType.STRING:
        return _text(kvp.value, VALUE_BYTES, "a value")
    size = {ValueType.U32: 4, ValueType.U64: 8}.get(ValueType(kvp.value_type), 0)
    try:
        return int(kvp.value).to_bytes(size, "little").ljust(VALUE_BYTES, b"\0"), size
    except OverflowError:
        raise ValueError(f"the value {kvp.value} does not fit into {size} bytes") from None


def _from_value(kind: int, data: bytes, size: int) -> str:
    if kind == ValueType.STRING:
        return _from_text(data, size, "a value")
    if kind == ValueType.U32:
        return str(int.from_bytes(data[:4], "little"))
    if kind == ValueType.U64:
        return str(int.from_bytes(data[:8], "little"))
    raise IcError(f"a value of type {kind}; known are {[int(one) for one in ValueType]}")


def kvp(message: Kvp) -> bytes:
    """The body of a request or of an answer. Raises ValueError for keys and values that do not fit."""
    head = _KVP_HEADER.pack(message.operation, message.pool, 0)
    if message.operation == KvpOperation.ENUMERATE:
        key, key_size = _text(message.key, KEY_BYTES, "a key") if message.key else (b"", 0)
        value, value_size = _value(message) if message.key else (b"", 0)
        return head + _KVP_ENUMERATE.pack(message.position, message.value_type, key_size, value_size, key, value)
    key, key_size = _text(message.key, KEY_BYTES, "a key")
    if message.operation == KvpOperation.DELETE:
        return head + _KVP_KEY.pack(key_size, key)
    value, value_size = _value(message) if message.operation == KvpOperation.SET or message.value else (b"", 0)
    return head + _KVP_VALUE.pack(message.value_type, key_size, value_size, key, value)


def parse_kvp(body: bytes) -> Kvp:
    """The request or the answer. Raises IcError."""
    if len(body) < _KVP_HEADER.size:
        raise IcError(f"a key-value message of {len(body)} bytes")
    operation, pool, _ = _KVP_HEADER.unpack_from(body)
    rest = body[_KVP_HEADER.size :]
    layout = {
        KvpOperation.GET: _KVP_VALUE,
        KvpOperation.SET: _KVP_VALUE,
        KvpOperation.DELETE: _KVP_KEY,
        KvpOperation.ENUMERATE: _KVP_ENUMERATE,
    }.get(operation)
    if layout is None:
        raise IcError(f"the key-value operation {operation} is not known here")
    if len(rest) < layout.size:
        raise IcError(f"key-value operation {operation} with {len(body)} bytes; it has {layout.size + 4}")
    fields: Sequence[Any] = layout.unpack_from(rest)
    if operation == KvpOperation.DELETE:
        return Kvp(operation, pool, _from_text(fields[1], fields[0], "a key"))
    position = 0
    if operation == KvpOperation.ENUMERATE:
        position, *fields = fields
    kind, key_size, value_size, key, value = fields
    name = _from_text(key, key_size, "a key")
    # A request to get or to enumerate has no value yet, and need not say of which type.
    text = _from_value(kind, value, value_size) if value_size or operation == KvpOperation.SET else ""
    return Kvp(operation, pool, name, text, kind, position)


def parse_kvp_answer(body: bytes, request: Kvp) -> Kvp:
    """The answer to a request. Raises IcError for one to another request, and for what has no value of a known type
    where there has to be one."""
    found = parse_kvp(body)
    if found.operation != request.operation or found.position != request.position:
        raise IcError("an answer to another request")
    if found.operation == KvpOperation.ENUMERATE and found.value_type not in tuple(ValueType):
        raise IcError(f"a value of type {found.value_type}; known are {[int(one) for one in ValueType]}")
    return found
