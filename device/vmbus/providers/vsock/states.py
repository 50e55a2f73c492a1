"""The states of a connection, and the rules by which it moves.

    OFFERED      its channel is offered; the guest has not opened it
    FLOWING      open in both directions
    GUEST_DONE   the guest's FIN has come; the host's bytes go on
    HOST_DONE    the host's stream has ended, and our FIN is on its way; the guest's bytes go on
    BOTH_DONE    both; what is on its way is still delivered
    ENDING       nothing moves any more; the channel is to be rescinded
    ENDED        it was

A FIN is sent with HOST_END and with nothing else, so once; and nothing is sent after it. Rules live in `TRANSITIONS`
and nowhere else.
"""

from enum import Enum

from vmbus.errors import UsageError


class State(Enum):
    """See the module's text."""

    OFFERED = "offered"
    FLOWING = "flowing"
    GUEST_DONE = "guest done"
    HOST_DONE = "host done"
    BOTH_DONE = "both done"
    ENDING = "ending"
    ENDED = "ended"


class Event(Enum):
    """What moves a connection. OVER: it is complete, has failed, or was refused. RESCINDED: its channel is gone."""

    OPENED = "opened"
    GUEST_FIN = "guest's FIN"
    HOST_END = "host's end"
    OVER = "over"
    RESCINDED = "rescinded"


_S = State
_E = Event

TRANSITIONS: dict[tuple[State, Event], State] = {
    (_S.OFFERED, _E.OPENED): _S.FLOWING,
    (_S.OFFERED, _E.OVER): _S.ENDING,
    (_S.FLOWING, _E.GUEST_FIN): _S.GUEST_DONE,
    (_S.FLOWING, _E.HOST_END): _S.HOST_DONE,
    (_S.FLOWING, _E.OVER): _S.ENDING,
    (_S.GUEST_DONE, _E.HOST_END): _S.BOTH_DONE,
    (_S.GUEST_DONE, _E.OVER): _S.ENDING,
    (_S.HOST_DONE, _E.GUEST_FIN): _S.BOTH_DONE,
    (_S.HOST_DONE, _E.OVER): _S.ENDING,
    (_S.BOTH_DONE, _E.OVER): _S.ENDING,
    (_S.ENDING, _E.RESCINDED): _S.ENDED,
}

GUEST_SENDS = frozenset({_S.FLOWING, _S.HOST_DONE})
"""States in which the guest may send."""
HOST_SENDS = frozenset({_S.FLOWING, _S.GUEST_DONE})
"""States in which the host's bytes are read and sent."""
OPEN = GUEST_SENDS | HOST_SENDS | {_S.BOTH_DONE}
"""States in which the two ends are joined."""


def next_state(state: State, event: Event, name: str) -> State:
    """The state after `event`. Raises UsageError naming the connection: a defect of this program."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        possible = ", ".join(e.value for s, e in TRANSITIONS if s is state)
        raise UsageError(
            f"connection {name} is {state.value}: {event.value!r} is not possible now (possible: {possible})"
        ) from None
