"""Messages of the integration services, between the host and hv_utils."""

from datetime import UTC, datetime

from vmbus.kmcl.pipe import unframe
from vmbus.observe.words.seen import Seen
from vmbus.wire import ic
from vmbus.wire.ic import Flag, IcStatus, KvpOperation, Message, MessageType, Pool, ShutdownFlag, TimeFlag, VssOperation

_VERSIONS = 6  # of a negotiation that are listed


def words(packet: Seen) -> str:
    """See `vmbus.observe.words.describe`."""
    message = ic.parse(unframe(packet.payload))
    answer = bool(message.flags & Flag.RESPONSE)
    name = MessageType(message.kind).name
    parts = [f"{name} {'answer' if answer else 'request'} {message.transaction}"]
    try:
        said = _said(message, answer)
    except (ic.IcError, ValueError, OverflowError, OSError):
        said = f"a body of {len(message.body)} bytes that it does not have"
    if said:
        parts.append(said)
    if answer and message.status != IcStatus.OK:
        try:
            parts.append(IcStatus(message.status).name)
        except ValueError:
            parts.append(f"status {message.status:#x}")
    return ", ".join(parts)


def _said(message: Message, answer: bool) -> str:
    body = message.body
    match message.kind:
        case MessageType.NEGOTIATE:
            frameworks, versions = ic.parse_negotiation(body)
            return f"framework {_versions(frameworks)}, messages {_versions(versions)}"
        case MessageType.HEARTBEAT:
            return f"sequence {ic.parse_heartbeat(body)}"
        case MessageType.SHUTDOWN:
            if answer:
                return ""
            flags = ic.parse_shutdown(body).flags
            names = [flag.name.lower() for flag in ShutdownFlag if flags & flag and flag.name is not None]
            return ", ".join(names) or "power off"
        case MessageType.TIME:
            sync = ic.parse_time_sync(body, message.version)
            when = datetime.fromtimestamp(sync.seconds, UTC).isoformat(" ", "milliseconds").removesuffix("+00:00")
            return f"{TimeFlag(sync.flag).name} {when}"
        case MessageType.VSS:
            return VssOperation(ic.parse_vss(body)).name
        case MessageType.KVP:
            return _kvp(body)
        case _:
            return ""


def _versions(versions: list[ic.Version]) -> str:
    more = " ..." if len(versions) > _VERSIONS else ""
    return " ".join(str(one) for one in versions[:_VERSIONS]) + more if versions else "none"


def _kvp(body: bytes) -> str:
    """Of what is exchanged the key is told, and not the value: that may be somebody's secret."""
    kvp = ic.parse_kvp(body)
    pool = Pool(kvp.pool).name
    text = f"{KvpOperation(kvp.operation).name} pool {pool}"
    if kvp.operation == KvpOperation.ENUMERATE:
        text += f" index {kvp.position}"
    return f"{text} key {kvp.key}" if kvp.key else text
