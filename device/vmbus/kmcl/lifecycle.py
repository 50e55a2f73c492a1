"""The channel's state machine.

Two things are orthogonal. *Open or closed* follows the guest: it opens and closes an offered channel. *Started or
paused* follows the owner: `start` and `pause` only set a wish while the channel is not open. A channel is ACTIVE,
taking and sending packets, when it is open and started.

    DISABLED   allocated; may be configured; the other end does not know it
    CLOSED     enabled (offered, or waiting for an offer), not open
    OPENED     open, not taking packets: not started yet, or paused
    ACTIVE     open and started
    CLOSING    the other end has closed it, or it failed; incoming packets that the owner still holds are awaited

Leaving ACTIVE always calls Suspend. Leaving CLOSING always calls Closed. Rules live in `TRANSITIONS` and nowhere else.
"""

from enum import Enum

from vmbus.kmcl.status import ChannelStateError


class ChannelState(Enum):
    """Where a channel is; see the module's text."""

    DISABLED = "disabled"
    CLOSED = "closed"
    OPENED = "opened"
    ACTIVE = "active"
    CLOSING = "closing"


class ChannelEvent(Enum):
    ENABLE = "enable"
    DISABLE = "disable"
    OPEN = "open"
    OPEN_FAILED = "open failed"
    ACTIVATE = "activate"
    SUSPEND = "suspend"
    CLOSE = "close"
    CLOSED = "closed"


_S = ChannelState
_E = ChannelEvent

TRANSITIONS: dict[tuple[ChannelState, ChannelEvent], ChannelState] = {
    (_S.DISABLED, _E.ENABLE): _S.CLOSED,
    (_S.CLOSED, _E.DISABLE): _S.DISABLED,
    (_S.CLOSED, _E.OPEN): _S.OPENED,
    (_S.OPENED, _E.OPEN_FAILED): _S.CLOSED,
    (_S.OPENED, _E.ACTIVATE): _S.ACTIVE,
    (_S.OPENED, _E.CLOSE): _S.CLOSING,
    (_S.ACTIVE, _E.SUSPEND): _S.OPENED,
    (_S.CLOSING, _E.CLOSED): _S.CLOSED,
}


def next_state(state: ChannelState, event: ChannelEvent, channel: str) -> ChannelState:
    """The state after `event`. Raises ChannelStateError naming the channel and what would be possible."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        possible = ", ".join(e.value for s, e in TRANSITIONS if s is state)
        raise ChannelStateError(
            f"channel {channel} is {state.value}: {event.value!r} is not possible now (possible: {possible})"
        ) from None
