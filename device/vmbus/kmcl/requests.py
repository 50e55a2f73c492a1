"""Synchronous requests: one packet sent, and its completion waited for (VmbChannelSendSynchronousRequest)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmbus.errors import WaitTimeout
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.status import ChannelStateError, KmclError, Status
from vmbus.wire.gpa import range_for

if TYPE_CHECKING:
    from vmbus.kmcl.channel import Channel

LONGEST_REQUEST = 60.0  # seconds


def send_synchronous_request(
    channel: Channel,
    payload: bytes,
    *,
    external: Sequence[tuple[int, int]] | None = None,
    wait_for_completion: bool = True,
    completion_size: int | None = None,
    timeout: float | None = None,
) -> bytes:
    """Send one packet and wait for its completion; returns the reply (VmbChannelSendSynchronousRequest).

    The server's end may use it only with `timeout` 0 and without `wait_for_completion`: then the packet goes into
    the ring at once or not at all. `timeout` None waits for as long as a minute. `completion_size`: the most bytes
    of the reply to return, a multiple of 8; None: all of it.

    Raises KmclError: BUFFER_OVERFLOW, there was no room at once and `timeout` is 0, nothing was queued; CANCELLED,
    the time ran out (a request that was still queued is withdrawn, a late completion is ignored); DEVICE_REMOVED,
    the channel is not active or is going away; INVALID_PARAMETER for a server that would have to wait.
    ChannelStateError where nothing can be waited for: inline in `process_packet`, or without a `waiter`.
    """
    if not channel.can_describe_memory and (wait_for_completion or timeout != 0):
        raise channel.refuse("a server may not wait: timeout 0, without completion", Status.INVALID_PARAMETER)
    if completion_size is not None and (completion_size < 0 or completion_size % 8):
        raise channel.refuse(f"a completion of {completion_size} bytes, no multiple of 8", Status.INVALID_PARAMETER)
    if not channel.active:
        raise channel.refuse(f"no synchronous request while it is {channel.state.value}", Status.DEVICE_REMOVED)
    if wait_for_completion:
        _require_wait(channel)
    outgoing = channel.outgoing
    packet = channel.allocate_packet()
    outcome: list[tuple[int, bytes]] = []
    packet.completion_routine = lambda _, status, reply: outcome.append((status, reply))
    ranges = None if external is None else [range_for(address, length) for address, length in external]
    outgoing.prepare(packet, payload, ranges, wait_for_completion)
    if outgoing.queue or not outgoing.put_at_once(packet):
        try:
            if timeout == 0:
                raise channel.refuse("no room for a synchronous request; it was not queued", Status.BUFFER_OVERFLOW)
            _require_wait(channel)
        except KmclError:
            channel.flow.next_transaction -= 1
            raise
        outgoing.enqueue(packet)
    channel.flow.sends += 1
    # Also from inside a `batch`: what is waited for has to be visible.
    outgoing.publish()
    if channel.link is not None:
        # Inside a packet the ring is masked: a turn of its own unmasks it, so that the completion is signalled.
        channel.link.wake()
    bound = LONGEST_REQUEST if timeout is None else timeout
    try:
        channel.wait(
            lambda: bool(outcome) or channel.state not in (ChannelState.ACTIVE, ChannelState.OPENED),
            bound,
            f"the completion of synchronous request {packet.transaction}",
        )
    except WaitTimeout as error:
        outgoing.withdraw(packet)
        raise channel.refuse(f"synchronous request {packet.transaction}: {error}", Status.CANCELLED) from error
    if not outcome or outcome[0][0] != Status.SUCCESS:
        raise channel.refuse(f"synchronous request {packet.transaction}: the channel closed", Status.DEVICE_REMOVED)
    return outcome[0][1][:completion_size]


def _require_wait(channel: Channel) -> None:
    if channel.incoming.in_turn:
        raise ChannelStateError(
            f"channel {channel.name}: nothing can be waited for inline in a packet's callback; defer_to_passive(), or "
            "set_incoming_processing_at_passive()",
            Status.INVALID_DEVICE_REQUEST,
        )
    if channel.waiter is None:
        raise ChannelStateError(f"channel {channel.name}: nothing was given to wait with (`waiter`)")
