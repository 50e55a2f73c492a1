"""The server's phases: where a device can get, and that a refusal says what would have been right."""

from __future__ import annotations

import pytest

from vmbus.errors import UsageError
from vmbus.server import commands, lineup, restoring, suspending
from vmbus.server.commands import Arguments, Command
from vmbus.server.phase import NEXT, Phase, Step, after, require


def test_every_step_is_in_the_table_and_no_phase_is_a_dead_end() -> None:
    assert set(NEXT) == set(Step)
    ways = {phase: {to[phase] for to in NEXT.values() if phase in to} for phase in Phase}
    for start in Phase:
        reached = {start}
        while more := {to for phase in reached for to in ways[phase]} - reached:
            reached |= more
        assert Phase.RUNNING in reached, start
        assert start in (Phase.AWAITING, Phase.RESTORING) or reached >= set(Phase) - {Phase.AWAITING}
    assert after(Phase.PAUSED, Step.LOAD) is Phase.RESTORING


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(KeyError):
        after(Phase.RUNNING, Step.RESTORE)
    with pytest.raises(UsageError, match="x needs a server that is running or paused; this one is driven"):
        require(Phase.DRIVEN, (Phase.RUNNING, Phase.PAUSED), "x")


COMMANDS = {**commands.COMMANDS, **suspending.COMMANDS, **restoring.COMMANDS, **lineup.COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_name_the_argument_that_is_wrong(name: str) -> None:
    with pytest.raises(UsageError, match=rf"^{name}: .*nonsense"):
        COMMANDS[name].decode(name, {"nonsense": 1})


@pytest.mark.parametrize("seconds", [-1, 3601, True, "1", None, float("nan")])
def test_nobody_waits_for_ever(seconds: object) -> None:
    with pytest.raises(UsageError, match=r"^pause: field 'seconds'"):
        COMMANDS["pause"].decode("pause", {"seconds": seconds})


def test_a_command_without_arguments_takes_none() -> None:
    async def do(server: object, asked: Arguments) -> dict[str, object]:
        return {}

    assert Command(do).decode("x", {}) == Arguments()
