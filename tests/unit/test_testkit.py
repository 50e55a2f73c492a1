"""The test kit: what an author can do with it, and that each breach of the contract is named."""

import importlib
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from vmbus.bus.local import LocalBus
from vmbus.errors import StateError, UsageError
from vmbus.kmcl import KmclError, Status
from vmbus.kmcl.server import ServerChannel
from vmbus.providers import Provider
from vmbus.testkit import ContractViolation, HostPacket, ProviderTest, every_step
from vmbus.testkit.contract import differing
from vmbus.testkit.host import Clock, FakeHost
from vmbus.testkit.steps import difference
from vmbus.testkit.watch import ProviderWarning
from vmbus.wire.workload import (
    BURST_ANSWER,
    BurstDone,
    BurstStart,
    burst_digest,
    echo_request,
    parse_burst_packet,
    parse_echo_reply,
    transform,
)

TYPE = UUID("00000000-0000-4000-8000-00000000bbbb")
NUMBER = struct.Struct("<Q")


class Counter(Provider):
    """Does everything right: answers a request of 8 bytes with the count, late if it says so; `send N` makes it send.

    Subclasses below each do one thing wrong.
    """

    kind = "counter"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.count = 0
        self.done = 0
        self.held: list[tuple[Any, bytes]] = []
        self.timer: Any = None
        self.channel = ServerChannel(TYPE, self.instance, name=self.name)

    def start(self) -> None:
        self.channel.set_process_packet_callbacks(self.process)
        self.channel.set_state_change_callbacks(suspend=self.suspend)
        self.channel.set_save_restore_packet_callbacks(self.save_packet, self.restore_packet)
        self.host.add_channel(self.channel)
        self.channel.enable()
        self.channel.start()

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def process(self, channel, completion, payload: bytes) -> None:
        if payload[:4] == b"send":
            completion.complete(b"")
            for _ in range(payload[4]):
                self.send()
        elif payload[:4] == b"late":
            self.held.append((completion, payload))
            if self.timer is None:
                self.timer = self.host.call_later(2.0, self.release)
        elif payload[:4] == b"soon":
            self.host.call_soon(lambda: self.answer(completion))
        elif payload[:4] == b"fail":
            completion.fail("the guest asked for it")
        elif payload[:4] == b"into":
            completion.external_data().views[0][:4] = b"done"
            completion.complete(b"")
        else:
            self.answer(completion)

    def answer(self, completion) -> None:
        self.count += 1
        completion.complete(NUMBER.pack(self.count))

    def release(self) -> None:
        self.timer = None
        while self.held:
            self.answer(self.held.pop(0)[0])

    def suspend(self, channel) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.release()

    def send(self) -> None:
        self.count += 1
        packet = self.channel.allocate_packet()
        packet.pointer = self.count
        packet.completion_routine = self.completed
        packet.send(NUMBER.pack(self.count) + bytes(200))

    def completed(self, packet, status: int, reply: bytes) -> None:
        if status == Status.SUCCESS:
            assert reply == NUMBER.pack(packet.pointer * 2)
            self.done += 1
        packet.free()

    def save_packet(self, channel, packet, buffer: memoryview) -> int:
        if len(buffer) >= 8:
            NUMBER.pack_into(buffer, 0, packet.pointer)
        return 8

    def restore_packet(self, channel, lib_buf: bytes, save_buf: bytes) -> None:
        packet = channel.allocate_packet()
        channel.restore_packet(packet, lib_buf)
        (packet.pointer,) = NUMBER.unpack(save_buf)
        packet.completion_routine = self.completed

    def save(self) -> bytes:
        return struct.pack("<QQ", self.count, self.done)

    def restore(self, state: bytes) -> None:
        try:
            self.count, self.done = struct.unpack("<QQ", state)
        except struct.error as error:
            raise StateError(f"counter: {error}") from error

    def status(self) -> dict[str, Any]:
        return {"count": self.count, "done": self.done}


def double(packet: HostPacket) -> bytes:
    return NUMBER.pack(NUMBER.unpack_from(packet.payload)[0] * 2)


# ---- what an author can do -------------------------------------------------------------------------------------------


def test_requests_are_answered_and_time_is_the_tests() -> None:
    with ProviderTest(Counter) as kit:
        guest = kit.open()
        assert guest.request(b"x") == NUMBER.pack(1)
        assert guest.request(b"soon") == NUMBER.pack(2)
        late = guest.send(b"late")
        kit.run()
        kit.advance(1.5)
        assert not late.done and kit.now == 1.5
        kit.advance(0.5)
        assert late.reply == NUMBER.pack(3)
        assert kit.now == 2.0


def test_an_answer_that_is_missing_is_named_with_what_may_bring_it() -> None:
    with ProviderTest(Counter) as kit:
        guest = kit.open()
        with pytest.raises(ContractViolation) as caught:
            guest.request(b"late", timeout=1.5)
        for part in ("packet 1", "b'late'", "channel counter", "completion.complete(reply)", "0.5 s: kit.advance()"):
            assert part in str(caught.value)
        assert guest.request(b"late") == NUMBER.pack(2) and kit.now == 2.0


def test_packets_of_the_provider_queue_and_all_are_received_once() -> None:
    with ProviderTest(Counter) as kit:
        guest = kit.open(ring_pages=1)
        guest.send(b"send\x32")
        with guest.away():
            kit.run()
            saved = kit.save_restore()
            assert saved.queued > 20 and saved.sent > 10
        numbers = []
        for _ in range(50):
            packet = guest.receive()
            numbers.append(NUMBER.unpack_from(packet.payload)[0])
            packet.complete(double(packet))
            kit.run()
        assert numbers == list(range(1, 51))
        assert guest.unreceived == 0 and kit.provider.status() == {"count": 50, "done": 50}
        with pytest.raises(ContractViolation, match=r"expected: a packet sent by the provider on channel counter; 50"):
            guest.receive()


def test_external_memory() -> None:
    with ProviderTest(Counter) as kit:
        guest = kit.open()
        memory = guest.memory(b"old!bytes")
        guest.request(b"into", external=memory)
        assert memory.data == b"donebytes"
        rest = guest.memory(16)
        guest.request(b"into", external=rest.part(8, 8))
        assert rest.data == bytes(8) + b"done" + bytes(4)
        rest.take_away()
        guest.send(b"into", external=[(rest.address, 16)])
        with pytest.raises(ContractViolation, match="external data of packet 3 of channel counter"):
            kit.run()


def test_a_channel_that_fails_can_be_expected_and_opened_again() -> None:
    with ProviderTest(Counter) as kit:
        guest = kit.open()
        guest.send(b"fail")
        assert "packet 1: the guest asked for it" in kit.expect_failure()
        assert not guest.is_open
        assert guest.requests[0].status == Status.CANCELLED
        guest.open()
        assert guest.request(b"x") == NUMBER.pack(1)
        with pytest.raises(ContractViolation, match="expected: a channel that fails"):
            kit.expect_failure()


def test_the_providers_exception_is_the_cause() -> None:
    class Raises(Counter):
        def process(self, channel, completion, payload: bytes) -> None:
            raise ZeroDivisionError("so")

    kit = ProviderTest(Raises)
    guest = kit.open()
    with pytest.raises(
        ContractViolation, match=r"channel counter failed: process_packet raised .* on packet 1"
    ) as caught:
        guest.request(b"x")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_refused_open() -> None:
    class Refuses(Counter):
        def start(self) -> None:
            self.channel.set_state_change_callbacks(opened=self.opened)
            self.host.add_channel(self.channel)
            self.channel.enable()
            self.channel.start()

        def opened(self, channel) -> None:
            raise KmclError("not today", Status.UNSUCCESSFUL)

    with ProviderTest(Refuses) as kit, pytest.raises(KmclError, match="not today"):
        kit.open()


def test_a_guest_that_holds_packets_cannot_close() -> None:
    with ProviderTest(Counter) as kit:
        guest = kit.open()
        guest.send(b"send\1")
        packet = guest.receive()
        with pytest.raises(UsageError, match=r"still holds packets \[1\] of channel counter"):
            guest.close()
        packet.complete(double(packet))
        guest.close()


def test_channels_are_found_by_name_type_and_number() -> None:
    class Two(Counter):
        def start(self) -> None:
            super().start()
            other = ServerChannel(UUID(int=5), UUID(int=6), name="other")
            self.host.add_channel(other)
            other.enable()

    with ProviderTest(Two) as kit:
        assert kit.guest("other") is kit.guest(UUID(int=5)) is kit.guest(1)
        assert kit.guest(0) is kit.guest("counter")
        with pytest.raises(UsageError, match="more than one channel"):
            kit.guest()
        with pytest.raises(UsageError, match=r"no channel is meant by 'third'.*\['counter', 'other'\]"):
            kit.guest("third")


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="hold"):
        ProviderTest("echo", options={"hold": -1})
    with pytest.raises(UsageError, match="known kinds"):
        ProviderTest("no-such")


# ---- save and restore at every step ----------------------------------------------------------------------------------


def exercise(kit: ProviderTest) -> object:
    guest = kit.open(ring_pages=1)
    first = [guest.send(b"x"), guest.send(b"soon"), guest.send(b"late"), guest.send(b"send\x1e")]
    kit.run()
    for number in range(30):
        packet = guest.receive()
        packet.complete(double(packet))
        if number == 10:
            kit.advance(3)
    kit.run()
    guest.close()
    guest.open()
    assert guest.request(b"x")
    return [one.done for one in first], kit.provider.status()


def in_order(kit: ProviderTest, returned: object) -> object:
    """A suspend answers `late` requests early: which number they get depends on when it is, all else does not."""
    transcript = kit.transcript()["counter"]
    assert isinstance(transcript, dict)
    return returned, len(transcript["packets"]), len(transcript["requests"])


def test_a_good_provider_passes_at_every_step() -> None:
    assert every_step(exercise, Counter, outcome=lambda kit, returned: in_order(kit, returned)) > 40


def test_echo_at_every_step() -> None:
    def script(kit: ProviderTest) -> object:
        guest = kit.open(ring_pages=1)
        requests = []
        for number in range(8):
            requests.append(guest.send(echo_request(number, bytes([number]) * 100, inline=True)))
            if number % 3 == 2:
                kit.run()
        kit.advance(1.0)
        for number, request in enumerate(requests):
            reply = parse_echo_reply(request.reply)
            assert reply is not None and reply.data == transform(bytes([number]) * 100, number)
        return kit.provider.status()["tally"]

    assert every_step(script, "echo", options={"hold": 3}) > 10


@pytest.mark.parametrize("kind", ["burst", "ddi-burst"])
def test_burst_at_every_step(kind: str) -> None:
    def script(kit: ProviderTest) -> object:
        guest = kit.open(ring_pages=1)
        assert guest.request(BurstStart(60, 80, 70).pack())[:4] == bytes(4)
        seen = []
        while True:
            packet = guest.receive()
            parsed = parse_burst_packet(packet.payload)
            if isinstance(parsed, BurstDone):
                packet.complete()
                return parsed, seen, kit.provider.status()["tally"]
            assert parsed is not None and parsed.intact
            seen.append(parsed.sequence)
            packet.complete(BURST_ANSWER.pack(parsed.sequence, burst_digest(parsed.sequence, parsed.data)))

    # The data is random: only what the script returns can be compared.
    assert every_step(script, kind, outcome=lambda _, returned: returned, points=range(1, 90, 7)) == 14


def test_an_outcome_that_depends_on_the_save_is_told_with_its_step() -> None:
    class Forgets(Counter):
        """Its state round-trips, and is not all of it."""

        def save(self) -> bytes:
            return b""

        def restore(self, state: bytes) -> None:
            pass

    def script(kit: ProviderTest) -> object:
        guest = kit.open()
        return [guest.request(b"x"), guest.request(b"x")]

    with pytest.raises(ContractViolation) as caught:
        every_step(script, Forgets)
    assert "with a save and restore at step" in str(caught.value)
    assert "/returned/1 is" in str(caught.value) and "without the save" in str(caught.value)


def test_an_error_of_a_run_with_a_save_says_where_the_save_was() -> None:
    class Forgets(Counter):
        def restore(self, state: bytes) -> None:
            raise StateError("no")

    with pytest.raises(ContractViolation) as caught:
        every_step(lambda kit: kit.open(), Forgets)
    assert caught.value.__notes__ == ["with a save and restore at step 1 of 1, after open()"]


def test_differences() -> None:
    assert difference({"a": [1, 2]}, {"a": [1, 3]}) == "/a/1 is 3, and 2 without the save"
    assert difference([1], [1, 2]) == "the outcome has 2 entries, and 1 without the save"
    assert difference({"a": 1}, {"a": 1, "b": 2}) == "/b is 2, and None without the save"


def test_a_channel_that_is_made_anew_at_a_restore() -> None:
    class New(Counter):
        def start(self) -> None:
            self.channel.set_server_flags(8)  # FORCE_NEW_CHANNEL
            super().start()

    with ProviderTest(New) as kit:
        guest = kit.open()
        guest.send(b"send\3")
        kit.run()
        kit.save_restore()
        kit.run()
        assert not guest.is_open
        guest.open()
        assert guest.request(b"x") == NUMBER.pack(4)


# ---- breaches --------------------------------------------------------------------------------------------------------


def busy(provider: type[Provider]) -> ProviderTest:
    """With three packets at the guest and a request held."""
    kit = ProviderTest(provider)
    guest = kit.open()
    guest.send(b"send\3")
    guest.send(b"late")
    kit.run()
    return kit


class NeverCompletes(Counter):
    def suspend(self, channel) -> None:
        if self.timer is not None:
            self.timer.cancel()


class CompletesTwice(Counter):
    def answer(self, completion) -> None:
        super().answer(completion)
        completion.complete(b"again")


class DisagreesAboutSize(Counter):
    def save_packet(self, channel, packet, buffer: memoryview) -> int:
        return 8 if len(buffer) == 0 else 16


class SaveRaises(Counter):
    def save_packet(self, channel, packet, buffer: memoryview) -> int:
        raise KeyError("pointer")


class RestoresNothing(Counter):
    def restore_packet(self, channel, lib_buf: bytes, save_buf: bytes) -> None:
        channel.allocate_packet()


class ForgetsRoutine(Counter):
    def restore_packet(self, channel, lib_buf: bytes, save_buf: bytes) -> None:
        packet = channel.allocate_packet()
        channel.restore_packet(packet, lib_buf)
        (packet.pointer,) = NUMBER.unpack(save_buf)


class ForgetsPointer(Counter):
    def save_packet(self, channel, packet, buffer: memoryview) -> int:
        return 0

    def restore_packet(self, channel, lib_buf: bytes, save_buf: bytes) -> None:
        packet = channel.allocate_packet()
        channel.restore_packet(packet, lib_buf)
        packet.completion_routine = self.completed


class MixesPackets(Counter):
    def restore_packet(self, channel, lib_buf: bytes, save_buf: bytes) -> None:
        super().restore_packet(channel, lib_buf, NUMBER.pack(7))


class NoCallbacks(Counter):
    def start(self) -> None:
        self.channel.set_process_packet_callbacks(self.process)
        self.channel.set_state_change_callbacks(suspend=self.suspend)
        self.host.add_channel(self.channel)
        self.channel.enable()
        self.channel.start()


class LosesState(Counter):
    def restore(self, state: bytes) -> None:
        self.count, _ = struct.unpack("<QQ", state)
        self.done = 5


class RefusesItsState(Counter):
    def restore(self, state: bytes) -> None:
        raise StateError("this is no counter")


class SavesNoBytes(Counter):
    def save(self) -> Any:
        return {"count": self.count}


class SavesTheTime(Counter):
    def save(self) -> bytes:
        self.count += 1
        return super().save()


class OtherChannels(Counter):
    made = 0

    def start(self) -> None:
        type(self).made += 1
        self.channel = ServerChannel(TYPE, UUID(int=self.made), name="other")
        super().start()


class SendsWhileRestoring(Counter):
    def restore(self, state: bytes) -> None:
        super().restore(state)
        self.channel.allocate_packet().send(b"", wait_for_completion=False)


BREACHES: dict[type[Provider], str] = {
    NeverCompletes: r"channel counter cannot be saved: packets 2 \(b'late'\) .*completion\.complete\(\)",
    DisagreesAboutSize: r"save callback of channel counter, for packet 1, asked for 8 bytes and then for 16",
    SaveRaises: r"save callback of channel counter, for packet 1, raised KeyError",
    RestoresNothing: r"restore callback of channel counter, for packet 1, restored packets \[\]; it must pass",
    ForgetsRoutine: r"restore callback of channel counter gave packet 1 no completion routine.*completion_routine = ",
    ForgetsPointer: r"restore callback of channel counter gave packet 1 no context; expected: packet\.pointer = ",
    MixesPackets: r"packet 1 of channel counter: its save callback wrote .* for the restored packet it writes",
    NoCallbacks: r"channel counter has saved packets and no restore callback; set_save_restore_packet_callbacks",
    LosesState: r"state of provider counter does not round trip: save\(\) returned",
    RefusesItsState: r"restore\(\) of provider counter refused what save\(\) had returned .*this is no counter",
    SavesNoBytes: r"save\(\) of provider counter returned dict; expected: bytes",
    SavesTheTime: r"save\(\) of provider counter returned different bytes when it was asked twice",
    OtherChannels: r"channels \['other'\] of provider counter were saved, and start\(\) of a fresh one does not make",
}


@pytest.mark.parametrize("breach", BREACHES, ids=lambda breach: breach.__name__)
def test_a_breach_at_a_save_is_named(breach: type[Provider]) -> None:
    kit = busy(breach)
    with pytest.raises(ContractViolation, match=BREACHES[breach]):
        kit.save_restore()


def test_the_same_provider_without_a_breach_is_saved() -> None:
    assert busy(Counter).save_restore().sent == 3


def test_sending_while_restoring_is_named() -> None:
    with pytest.raises(ContractViolation, match="channel counter"):
        busy(SendsWhileRestoring).save_restore()


def test_completing_twice_is_named() -> None:
    kit = ProviderTest(CompletesTwice)
    with pytest.raises(ContractViolation, match="packet 1 of channel counter was completed already"):
        kit.open().request(b"x")


def test_a_packet_that_is_never_completed_is_named_at_the_end() -> None:
    with pytest.raises(ContractViolation, match=r"channel counter cannot be closed: packets 2 \(b'late'\)"):
        busy(NeverCompletes).finish()


def test_a_timer_that_is_left_behind_is_named() -> None:
    class Leaves(Counter):
        def stop(self) -> None:
            self.host.call_later(5, lambda: None)

    with pytest.raises(ContractViolation, match=r"leaves a timer that runs out in 5 s; expected: Timer\.cancel"):
        ProviderTest(Leaves).finish()


def test_a_provider_that_never_rests_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Restless(Counter):
        def answer(self, completion) -> None:
            self.host.call_soon(lambda: self.answer(completion))

    monkeypatch.setattr("vmbus.testkit.kit.TURNS", 100)
    with pytest.raises(ContractViolation, match="never become quiet: 100 turns"):
        ProviderTest(Restless).open().request(b"x")


def test_refusing_damage() -> None:
    with ProviderTest(Counter) as kit:
        assert "counter" in kit.check_refuses(b"x")
        with pytest.raises(ContractViolation, match="took"):
            kit.check_refuses(bytes(16))

    class Careless(Counter):
        def restore(self, state: bytes) -> None:
            self.count, self.done = struct.unpack("<QQ", state)

    with ProviderTest(Careless) as kit, pytest.raises(ContractViolation, match="expected: StateError"):
        kit.check_refuses(b"x")


def test_old_timers_and_calls_are_gone_after_a_restore() -> None:
    class Notes(Counter):
        called = 0

        def stop(self) -> None:
            pass

        def suspend(self, channel) -> None:
            self.release()
            self.host.call_later(1, self.note)
            self.host.call_soon(self.note)

        def note(self) -> None:
            Notes.called += 1

    kit = busy(Notes)
    kit.save_restore()
    kit.advance(10)
    assert Notes.called == 0


# ---- docs/writing-a-provider.md --------------------------------------------------------------------------------------

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = (CHECKOUT / "docs" / "writing-a-provider.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """All code of the page, run from the top as it stands there."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in BLOCKS:
        exec(compile(block, "docs/writing-a-provider.md", "exec"), names)
        names.setdefault("KmclError", KmclError)
    return names


def test_the_page_echoes_in_30_lines(page: dict[str, Any]) -> None:
    assert "class Hello" in BLOCKS[0] and len(BLOCKS[0].splitlines()) <= 30
    with ProviderTest(page["Hello"]) as kit:
        assert kit.open().request(b"12345678") == b"12345678"


@pytest.mark.parametrize("name", re.findall(r"^def (test_\w+)\(", PAGE, re.MULTILINE))
def test_the_tests_on_the_page(page: dict[str, Any], name: str) -> None:
    page[name]()


def test_the_page_fills_memory(page: dict[str, Any]) -> None:
    with ProviderTest(page["Fill"]) as kit:
        guest = kit.open()
        memory = guest.memory(10_000)
        assert guest.request(b"x", external=memory).startswith(b"filled")
        assert memory.data == b"x" * 10_000
        assert guest.request(b"x").startswith(b"no data")
        memory.take_away()
        status = guest.request(b"x", external=[(memory.address, 8)])
        assert int.from_bytes(status[:4], "little") == Status.DATA_ERROR


def test_the_page_adds_up_in_slices(page: dict[str, Any]) -> None:
    with ProviderTest(page["Summer"]) as kit:
        guest = kit.open()
        memory = guest.memory(b"\1" * (3 << 20))
        requests = [guest.send(b"", external=memory) for _ in range(3)]
        kit.run()
        assert [int.from_bytes(one.reply[:8], "little") for one in requests] == [3 << 20] * 3
        assert kit.provider.bounds()["sums"] == (0, 100, 0)
        assert guest.request(b"").startswith(b"error")


def test_the_page_reads_a_file(page: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"-" * 100 + b"the end!")

    def script(kit: ProviderTest) -> object:
        guest = kit.open()
        return guest.request(b"1"), guest.request(b"2")

    assert every_step(script, page["Tail"], options={"path": str(path)}) > 3
    with ProviderTest(page["Tail"], options={"path": str(path)}) as kit:
        assert kit.open().request(b"x") == b"-" * 56 + b"the end!"
        with pytest.raises(BlockingIOError):  # the file is one provider's at a time
            ProviderTest(page["Tail"], options={"path": str(path)})


def test_fault_d13_the_pages_restore_takes_nothing_from_a_running_vm_and_can_be_tried_again(
    page: dict[str, Any], tmp_path: Path
) -> None:
    """Two VMs restored from one snapshot: the second one leaves the first one's file alone, and its own copy is there
    when it is tried again."""
    path = tmp_path / "data"
    path.write_bytes(b"as it is in the running VM")
    copy = tmp_path / "copy"
    copy.write_bytes(b"as it was at the save")
    running = ProviderTest(page["Tail"], options={"path": str(path)})
    second = page["Tail"](FakeHost(Clock(), LocalBus()), "tail", UUID(int=1), {"path": str(path)})
    second.start()
    second.restore_files({"data": copy})
    inode = path.stat().st_ino
    for _ in range(2):
        with pytest.raises(BlockingIOError):
            second.activate()
        assert (path.read_bytes(), path.stat().st_ino) == (b"as it is in the running VM", inode)
    running.finish()
    copied = shutil.copyfile

    def fails(source: object, target: object) -> None:
        copied(source, target)  # type: ignore[call-overload]
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "copyfile", fails)
        with pytest.raises(OSError, match="No space"):
            second.activate()
    assert path.read_bytes() == b"as it is in the running VM"  # whole, or not at all
    second.activate()
    assert path.read_bytes() == b"as it was at the save" and copy.exists()
    second.deactivate()
    path.write_bytes(b"written since")
    second.activate()  # after a pause that went on: nothing is put back again
    assert path.read_bytes() == b"written since"
    second.stop()


def test_fault_t6_the_page_says_when_stop_is_called() -> None:
    assert "When a VM ends, its server is killed" in PAGE and "nothing is called" in PAGE


def test_the_pages_alarm_refuses_damage_and_wrong_options(page: dict[str, Any]) -> None:
    with ProviderTest(page["Alarm"]) as kit:
        kit.check_refuses(b"short")
    with pytest.raises(UsageError, match="seconds"):
        ProviderTest(page["Alarm"], options={"seconds": 0})


def test_the_code_on_the_page_is_typed(tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text("from vmbus.kmcl import KmclError\n" + "\n".join(BLOCKS))
    roots = [str(CHECKOUT / "device"), str(CHECKOUT / "guest")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path), "page.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": os.pathsep.join(roots)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_messages_on_the_page_exist() -> None:
    sources = "".join(path.read_text() for path in (CHECKOUT / "device" / "vmbus").rglob("*.py"))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # literals that go on in the next line
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \|$", PAGE.partition("## Common mistakes")[2], re.MULTILINE)
    fragments = [span for row in rows for span in re.findall(r"`([^`]+)`", row)]
    assert len(fragments) > 15
    assert [one for one in fragments if one not in sources] == []


# ---- what no channel shows -------------------------------------------------------------------------------------------


def test_fault_t2_a_difference_far_behind_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgets(Counter):
        def save(self) -> bytes:
            return bytes(100) + NUMBER.pack(self.count) + bytes(100)

        def restore(self, state: bytes) -> None:
            pass

    with pytest.raises(ContractViolation, match="does not round trip") as caught, ProviderTest(Forgets) as kit:
        kit.open().request(b"now")
        kit.save_restore()
    found = re.search(
        r"save\(\) returned (.*) at byte 100, and after restore\(\) of that it returns (.*) there;", str(caught.value)
    )
    assert found is not None and found[1] != found[2], str(caught.value)
    assert "\\x01" in found[1] and "\\x01" not in found[2] and "208 bytes" in found[1]
    assert differing(b"short", b"other") == ("b'short'", "b'other'")
    assert (
        differing(bytes(60), bytes(61))[0].startswith("60 bytes with ...")
        and "at byte 60" in differing(bytes(60), bytes(61))[0]
    )
    assert "byte 70" in difference({"a": [bytes(80)]}, {"a": [bytes(70) + b"\x07" + bytes(9)]})


AUTHORS = """
from vmbus.providers import Provider
from vmbus.kmcl.server import ServerChannel
import os, time, uuid

SEEN = []
LIMIT = 5

class Mine(Provider):
    kind = "mine"
    total = 0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.queue = []
        self.channel = ServerChannel(uuid.UUID(int=7), self.instance, name=self.name)

    def start(self):
        self.channel.set_process_packet_callbacks(self.process)
        self.host.add_channel(self.channel)
        self.channel.enable()
        self.channel.start()

    def process(self, channel, completion, payload):
        match payload.rstrip(bytes(1)):
            case b"global":
                SEEN.append(payload)
            case b"rebound":
                global LIMIT
                LIMIT = 6
            case b"class":
                Mine.total += 1
            case b"descriptor":
                os.open("/dev/null", os.O_RDONLY)
            case b"slow":
                time.sleep(0.08)
            case b"queue":
                self.queue += [payload] * 6000
            case b"view":
                self.view = completion.external_data().views[0]
            case b"slice":
                self.view = completion.external_data().views[0][2:4].cast("B")
            case b"later":
                self.view[0]
        completion.complete(b"")

    def save(self):
        return b""
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Provider]:
    (tmp_path / "authors_module.py").write_text(AUTHORS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "authors_module", raising=False)
    module = importlib.import_module("authors_module")
    monkeypatch.delitem(sys.modules, "authors_module")
    monkeypatch.setitem(sys.modules, "authors_module", module)
    found: type[Provider] = module.Mine
    return found


@pytest.mark.parametrize(
    ("request_", "where"),
    [(b"global", r"authors_module.SEEN"), (b"rebound", r"authors_module.LIMIT"), (b"class", r"Mine.total")],
)
def test_fault_t3_state_outside_of_the_provider_is_named_at_a_save(
    request_: bytes, where: str, mine: type[Provider]
) -> None:
    with ProviderTest(mine) as kit:
        guest = kit.open()
        guest.request(b"harmless")
        kit.save_restore()
        guest.request(request_)
        with pytest.raises(ContractViolation, match=rf"provider mine keeps state in {where}, which was .* and is "):
            kit.save_restore()


def test_fault_t3_a_descriptor_that_is_left_open_is_named(mine: type[Provider]) -> None:
    for end in ("save_restore", "finish"):
        kit = ProviderTest(mine)
        kit.open().request(b"descriptor")
        with pytest.raises(
            ContractViolation, match=r"stop\(\) of provider mine leaves descriptors open: \d+ \(/dev/null\)"
        ):
            getattr(kit, end)()
    with ProviderTest(mine) as kit, open(os.devnull):  # noqa: PTH123 - the test's own is none of it
        kit.open().request(b"harmless")


def test_fault_t3_a_view_is_no_more_once_its_packet_is_completed(mine: type[Provider]) -> None:
    with ProviderTest(mine) as kit:
        guest = kit.open()
        guest.request(b"view", external=guest.memory(100))
        with kit.expect_errors() as errors:
            guest.send(b"later")
            kit.run()
        assert isinstance(errors[0], ValueError) and "released memoryview" in str(errors[0])


def test_fault_t3_a_turn_that_takes_long_is_reported(mine: type[Provider]) -> None:
    with ProviderTest(mine) as kit:
        guest = kit.open()
        with pytest.warns(ProviderWarning, match=r"a turn of provider mine took \d+ ms: no channel moves meanwhile"):
            guest.request(b"slow")


def test_fault_t3_a_container_that_only_grows_is_reported(mine: type[Provider]) -> None:
    with pytest.warns(ProviderWarning, match=r"queue of provider mine has 6000 entries: what bounds it\?"):  # noqa: SIM117
        with ProviderTest(mine) as kit:
            kit.open().request(b"queue")


def test_fault_t5_sending_when_closed_can_be_staged() -> None:
    """Something is due, and the channel is closed before it is called."""

    class SendsLater(Counter):
        due = False

        def process(self, channel, completion, payload: bytes) -> None:
            completion.complete(b"")
            self.host.call_soon(self.send)
            self.due = True

    with ProviderTest(SendsLater) as kit:
        guest = kit.open()
        guest.send(b"now")
        turns = 0
        while not getattr(kit.provider, "due"):  # noqa: B009
            assert kit.turn()
            turns += 1
        guest.close()
        with kit.expect_errors() as errors:
            while kit.turn():
                pass
        assert (
            turns
            and isinstance(errors[0], KmclError)
            and "packets can be sent from the opened callback on until" in str(errors[0])
        )
    with ProviderTest(Counter) as kit:
        assert not kit.turn()
