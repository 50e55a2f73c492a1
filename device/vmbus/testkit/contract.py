"""What a provider owes at a save and a restore, checked from outside."""

from collections.abc import Sequence
from typing import Any

from vmbus.errors import VmbusError
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.saved import PacketChunk, decode_chunk, decode_lib
from vmbus.kmcl.server import ServerChannel

_SHOWN = 48


class ContractViolation(VmbusError, AssertionError):
    """A provider broke its contract; the message names the channel, the packet and the call that was expected."""


class ChannelFailed(ContractViolation):
    """A channel failed; `reason` is the provider's."""

    def __init__(self, channel: str, reason: str) -> None:
        super().__init__(f"channel {channel} failed: {reason}")
        self.reason = reason


def shorten(data: bytes) -> str:
    """Bytes for a message."""
    return repr(data) if len(data) <= _SHOWN else f"{data[:_SHOWN]!r}... ({len(data)} bytes)"


def differing(one: bytes, other: bytes) -> tuple[str, str]:
    """Two different texts for a message that show where they differ."""
    if len(one) <= _SHOWN and len(other) <= _SHOWN:
        return repr(one), repr(other)
    at = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    first = max(0, at - 8)

    def shown(data: bytes) -> str:
        part = data[first : first + _SHOWN]
        return f"{len(data)} bytes with {'...' if first else ''}{part!r}{'...' if first + _SHOWN < len(data) else ''}"

    return f"{shown(one)} at byte {at}", f"{shown(other)} there"


def packets_of(channel: ServerChannel) -> dict[int, tuple[Any, Any]]:
    """Completion routine and pointer of every outgoing packet in use, by transaction."""
    packets = channel.packets_in_use
    return {packet.transaction: (packet.completion_routine, packet.pointer) for packet in packets}


def check_save_is_repeatable(name: str, what: str, first: object, second: object) -> None:
    """A save changes nothing: two in a row are equal."""
    if first != second:
        shown = ""
        if isinstance(first, bytes) and isinstance(second, bytes):
            shown = " ({}, then {})".format(*differing(first, second))
        raise ContractViolation(
            f"{what} of {name} returned different bytes when it was asked twice in a row{shown}: a save must change "
            "nothing, and depend on nothing but the state (no times, no random numbers)"
        )


def check_provider_state(name: str, saved: bytes, again: bytes) -> None:
    """The provider's own bytes round-trip."""
    if saved != again:
        before, after = differing(saved, again)
        raise ContractViolation(
            f"the state of provider {name} does not round trip: save() returned {before}, and after restore() of that "
            f"it returns {after}; restore() has to put back all that save() writes"
        )


def check_channel_state(channel: ServerChannel, saved: Sequence[bytes], again: Sequence[bytes]) -> None:
    """What comes out of the restored channel is what went in, packet by packet."""
    if list(saved) == list(again):
        return
    before, after = _by_packet(saved), _by_packet(again)
    for transaction, chunk in before.items():
        found = after.get(transaction)
        if found is None:
            raise ContractViolation(
                f"packet {transaction} of channel {channel.name} was saved and is not in use after the restore: the "
                "restore callback may not complete, free or send packets"
            )
        if found.save != chunk.save:
            one, other = differing(chunk.save, found.save)
            raise ContractViolation(
                f"packet {transaction} of channel {channel.name}: its save callback wrote {one}, and for the restored "
                f"packet it writes {other}; the restore callback has to rebuild from save_buf "
                "all that the save callback writes (usually packet.pointer)"
            )
    new = sorted(set(after) - set(before))
    raise ContractViolation(
        f"channel {channel.name} is not as it was saved"
        + (f": packets {new} are new; nothing may be sent before the started callback" if new else "")
    )


def _by_packet(data: Sequence[bytes]) -> dict[int, PacketChunk]:
    chunks = map(decode_chunk, data)
    return {decode_lib(chunk.lib).transaction: chunk for chunk in chunks if isinstance(chunk, PacketChunk)}


def check_packets(channel: ServerChannel, before: dict[int, tuple[Any, Any]]) -> None:
    """Restored packets have what no file carries: completion routine and pointer."""
    default = Packet(channel).completion_routine
    for transaction, (routine, pointer) in packets_of(channel).items():
        old_routine, old_pointer = before.get(transaction, (routine, pointer))
        where = f"the restore callback of channel {channel.name} gave packet {transaction}"
        if old_routine is not default and routine is default:
            raise ContractViolation(
                f"{where} no completion routine, so nobody will hear of its completion; expected: "
                "packet.completion_routine = ... as at the send"
            )
        if old_pointer is not None and pointer is None:
            raise ContractViolation(f"{where} no context; expected: packet.pointer = ... from save_buf, as at the send")
