"""Freezing a guest's file systems: whatever happens, they are thawed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vmbus.errors import UsageError
from vmbus.kmcl.pipe import frame, unframe
from vmbus.providers.integration import IntegrationProvider
from vmbus.providers.integration.freezing import AGAIN_SECONDS, MOVES, Freeze, Happening, Stage
from vmbus.testkit import ProviderTest
from vmbus.testkit import guest as testkit
from vmbus.testkit.guest import HostPacket
from vmbus.wire import ic
from vmbus.wire.ic import VssOperation

OPTIONS = {"services": ["vss"]}


class Guest:
    """Linux's end, with its daemon. `fails`: operations that it refuses; while `slow` it answers nothing."""

    def __init__(self, kit: ProviderTest) -> None:
        self.kit = kit
        self.frozen = False
        self.slow = False
        self.fails: set[int] = set()
        self.asked: list[int] = []
        self._unanswered: list[tuple[int, ic.Message]] = []
        self.open()

    def open(self) -> None:
        self._unanswered.clear()
        self.client: testkit.Guest = self.kit.guest("integration-vss", ring_pages=2)
        self.client.answer = self._take
        self.client.open()
        self.kit.run()

    def _take(self, packet: HostPacket) -> bytes:
        self._unanswered.append((packet.transaction, ic.parse(unframe(packet.payload))))
        assert len(self._unanswered) == 1, "Linux reads one at a time"
        if not self.slow:
            self.answer()
        return b""

    def answer(self) -> None:
        """Answer what was asked."""
        while self._unanswered:
            transaction, message = self._unanswered.pop(0)
            reply = self._reply(message)
            payload = frame(reply.pack())
            self.client.channel.allocate_packet().send(payload, wait_for_completion=False, transaction=transaction)

    def _reply(self, message: ic.Message) -> ic.Message:
        if message.kind == ic.MessageType.NEGOTIATE:
            return message.reply(ic.answer_negotiation(ic.choose(message.body, ic.FRAMEWORK_VERSIONS, ic.VSS.versions)))
        assert message.kind == ic.MessageType.VSS and len(message.body) >= 12
        operation = ic.parse_vss(message.body)
        self.asked.append(operation)
        if operation in self.fails:
            return message.reply(status=ic.IcStatus.FAIL)
        if operation != VssOperation.HOT_BACKUP:
            self.frozen = operation == VssOperation.FREEZE
        return message.reply()


@pytest.fixture
def kit() -> Iterator[ProviderTest]:
    with ProviderTest(IntegrationProvider, options=OPTIONS) as kit:
        yield kit


def freeze(kit: ProviderTest, seconds: float) -> dict[str, object]:
    """The command, with its own argument `seconds`, not the kit's."""
    answer = kit.provider.command("freeze", {"seconds": seconds})
    assert not isinstance(answer, dict)
    kit.run()
    return dict(answer.result(0))


def stage(kit: ProviderTest) -> str:
    return str(kit.provider.status()["vss"]["stage"])


def test_they_are_frozen_and_thawed(kit: ProviderTest) -> None:
    with pytest.raises(UsageError, match="vss service is not there: it has not opened"):
        kit.command("freeze")
    guest = Guest(kit)
    with pytest.raises(UsageError, match="are not frozen, but thawed"):
        kit.command("thaw")
    assert freeze(kit, 60) == {"frozen": True} and guest.frozen
    with pytest.raises(UsageError, match="are frozen already"):
        kit.command("freeze")
    kit.advance(50)
    assert guest.frozen
    assert kit.command("thaw") == {"thawed": True} and not guest.frozen
    assert guest.asked == [VssOperation.HOT_BACKUP, VssOperation.FREEZE, VssOperation.THAW]
    kit.advance(100)
    status = kit.provider.status()["vss"]
    assert (status["freezes"], status["thaws"], status["stage"]) == (1, 1, "thawed") and len(guest.asked) == 3
    with pytest.raises(UsageError, match="seconds"):
        freeze(kit, 0)


def test_they_are_thawed_when_the_time_is_over(kit: ProviderTest) -> None:
    guest = Guest(kit)
    assert freeze(kit, 5)["frozen"]
    kit.advance(4.9)
    assert guest.frozen
    kit.advance(0.2)
    assert not guest.frozen
    with pytest.raises(UsageError, match="are not frozen, but thawed"):
        kit.command("thaw")


def test_a_guest_that_is_slow_is_thawed_as_soon_as_it_has_frozen(kit: ProviderTest) -> None:
    guest = Guest(kit)
    guest.slow = True
    answer = kit.provider.command("freeze", {"seconds": 5})
    kit.run()
    guest.answer()  # that it can
    kit.advance(6)
    assert not isinstance(answer, dict) and "to be frozen" in str(answer.exception(0)) and stage(kit) == "thawing"
    guest.slow = False
    guest.answer()
    kit.run()
    assert guest.asked[-2:] == [VssOperation.FREEZE, VssOperation.THAW] and not guest.frozen
    # One that cannot even say whether it can is asked nothing more.
    guest.slow = True
    answer = kit.provider.command("freeze", {"seconds": 5})
    kit.advance(6)
    guest.slow = False
    guest.answer()
    kit.run()
    assert not isinstance(answer, dict) and answer.exception(0) and guest.asked[-1] == VssOperation.HOT_BACKUP
    assert kit.command("freeze")["frozen"]


@pytest.mark.parametrize("operation", [VssOperation.HOT_BACKUP, VssOperation.FREEZE])
def test_a_guest_that_refuses_is_left_thawed(kit: ProviderTest, operation: VssOperation) -> None:
    guest = Guest(kit)
    guest.fails = {operation}
    with pytest.raises(UsageError, match=r"the guest .* file systems: status 0x80004005"):
        kit.command("freeze")
    kit.run()
    asked = [VssOperation.HOT_BACKUP, VssOperation.FREEZE, VssOperation.THAW]
    assert guest.asked == (asked if operation == VssOperation.FREEZE else asked[:1]) and stage(kit) == "thawed"
    guest.fails = set()
    assert kit.command("freeze")["frozen"]


def test_a_thaw_that_is_refused_is_asked_for_again(kit: ProviderTest) -> None:
    guest = Guest(kit)
    assert kit.command("freeze")["frozen"]
    guest.fails = {VssOperation.THAW}
    with pytest.raises(UsageError, match="is asked again"):
        kit.command("thaw")
    kit.advance(5 * AGAIN_SECONDS)
    assert guest.frozen and guest.asked.count(VssOperation.THAW) >= 4
    guest.fails = set()
    kit.advance(AGAIN_SECONDS)
    assert not guest.frozen and stage(kit) == "thawed"


@pytest.mark.parametrize("asleep", [False, True])
def test_after_a_save_they_are_thawed_on_both_sides_of_it(kit: ProviderTest, asleep: bool) -> None:
    guest = Guest(kit)
    assert freeze(kit, 60)["frozen"]
    guest.slow = asleep
    kit.save_restore()
    kit.run()
    if asleep:
        assert guest.frozen and stage(kit) == "thawing"
        guest.slow = False
        guest.answer()
        kit.run()
    assert not guest.frozen and stage(kit) == "thawed"
    # Whoever has frozen them, saved and thaws them has done it rightly: they were frozen at the save.
    assert kit.command("thaw") == {"thawed": True}
    with pytest.raises(UsageError, match="are not frozen"):
        kit.command("thaw")


@pytest.mark.parametrize("answers", range(3))
def test_a_save_in_the_middle_of_freezing_ends_in_a_thaw(kit: ProviderTest, answers: int) -> None:
    guest = Guest(kit)
    guest.slow = True
    kit.provider.command("freeze", {"seconds": 60})
    for _ in range(answers):
        kit.run()
        guest.answer()
    kit.save_restore()
    guest.slow = False
    guest.answer()
    kit.run()
    kit.advance(1)
    assert not guest.frozen and stage(kit) == "thawed"
    with pytest.raises(UsageError, match="are not frozen"):
        kit.command("thaw") if answers < 2 else (kit.command("thaw"), kit.command("thaw"))
    assert kit.command("freeze")["frozen"]


def test_a_service_that_goes_is_forgotten(kit: ProviderTest) -> None:
    guest = Guest(kit)
    guest.slow = True
    answer = kit.provider.command("freeze", {})
    kit.run()
    guest.answer()
    kit.run()
    guest.client.close()
    assert not isinstance(answer, dict) and "went away" in str(answer.exception(0))
    guest.slow = False
    guest.open()
    assert stage(kit) == "thawed" and kit.command("freeze")["frozen"]


def test_sabotage_without_the_number_a_restored_guest_stays_frozen(kit: ProviderTest) -> None:
    guest = Guest(kit)
    assert freeze(kit, 60)["frozen"]
    kit.provider.parts["vss"].numbers["frozen"] = 0  # type: ignore[attr-defined]
    kit.save_restore()
    kit.advance(100)
    assert guest.frozen


def test_the_table_has_a_way_out_of_every_stage() -> None:
    reached, todo = {Stage.THAWED}, [Stage.THAWED]
    while todo:
        at = todo.pop()
        new = {to for (here, _), to in MOVES.items() if here is at} - reached
        reached |= new
        todo += new
    assert reached == set(Stage)
    for at in set(Stage) - {Stage.THAWED, Stage.THAWING}:
        assert MOVES[at, Happening.END] in (Stage.THAWED, Stage.THAWING)


class FreezeMachine(RuleBasedStateMachine):
    """Commands, slow and refusing guests, saves and closes in any order: at the end, when all is answered, nothing is
    frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.kit = ProviderTest(IntegrationProvider, options=OPTIONS).__enter__()
        self.guest = Guest(self.kit)

    @rule(seconds=st.sampled_from([1, 30]))
    def freeze(self, seconds: float) -> None:
        self.command("freeze", seconds=seconds)

    @rule()
    def thaw(self) -> None:
        self.command("thaw")

    def command(self, name: str, **arguments: float) -> None:
        try:
            self.kit.provider.command(name, arguments)
        except UsageError:
            return
        self.kit.run()

    @rule(slow=st.booleans())
    def pace(self, slow: bool) -> None:
        self.guest.slow = slow

    @rule()
    def answer(self) -> None:
        self.guest.answer()
        self.kit.run()

    @rule(fails=st.sets(st.sampled_from(list(VssOperation))))
    def refuse(self, fails: set[int]) -> None:
        self.guest.fails = fails

    @rule(seconds=st.sampled_from([0.5, 3, 40]))
    def wait(self, seconds: float) -> None:
        self.kit.advance(seconds)

    @rule()
    def save(self) -> None:
        self.kit.save_restore()

    @invariant()
    def what_is_frozen_is_known(self) -> None:
        part = self.kit.provider.parts["vss"]  # type: ignore[attr-defined]
        assert isinstance(part, Freeze)
        assert part.numbers["frozen"] or not self.guest.frozen
        assert part.numbers["frozen"] == (part.stage not in (Stage.THAWED, Stage.ASKING))

    def teardown(self) -> None:
        self.guest.slow, self.guest.fails = False, set()
        self.guest.answer()
        self.kit.advance(60)
        assert not self.guest.frozen and stage(self.kit) == "thawed"
        self.kit.__exit__(None, None, None)


TestFreezeMachine = FreezeMachine.TestCase
TestFreezeMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
