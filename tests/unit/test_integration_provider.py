"""The integration provider in the test kit, against a guest that answers as Linux does."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.hv_utils import ANSWERED, FACTS, LinuxAnswers
from support.integration import KitGuest
from vmbus.errors import UsageError
from vmbus.kmcl.pipe import frame
from vmbus.providers.integration import IntegrationProvider
from vmbus.providers.integration.exchange import QUEUE
from vmbus.providers.integration.kvp import MOST_TOLD
from vmbus.providers.integration.provider import TIME_VERSIONS, IntegrationOptions
from vmbus.testkit import ContractViolation, ProviderTest, every_step
from vmbus.wire import ic
from vmbus.wire.ic import MessageType


class Provider(IntegrationProvider):
    """Its clock goes one second further each time that it is looked at."""

    now = 2_000_000.0

    @staticmethod
    def clock() -> float:
        Provider.now += 1
        return Provider.now

    @staticmethod
    def steady() -> float:
        return Provider.now


class Clocks(IntegrationProvider):
    """On a host whose clock can be set, or stand still."""

    time = 1_700_000_000.0
    elapsed = 0.0
    clock = staticmethod(lambda: Clocks.time)
    steady = staticmethod(lambda: Clocks.elapsed)


def test_versions_are_negotiated_and_heartbeats_answered() -> None:
    with ProviderTest(Provider) as kit:
        guest = KitGuest(kit)
        status = kit.provider.status()
        assert {name: part["version"] for name, part in status.items()} == {
            "heartbeat": "3.0",
            "shutdown": "3.2",
            "time": "3.0",
            "kvp": "4.0",
        }
        assert not status["heartbeat"]["alive"]
        kit.advance(9)
        beats = [one for one in guest.asked["heartbeat"] if one.kind == MessageType.HEARTBEAT]
        assert [ic.parse_heartbeat(one.body) for one in beats] == [0, 1, 2, 3]
        assert all(one.framework == (3, 0) and one.version == (3, 0) and one.flags == 3 for one in beats)
        assert [one.transaction for one in guest.asked["heartbeat"]] == [1, 2, 3, 4, 5]
        heartbeat = kit.command("heartbeat")
        assert heartbeat["alive"] and (heartbeat["beats"], heartbeat["wrong"], heartbeat["silent"]) == (4, 0, 0)
        guest.silent = True
        kit.advance(20)
        assert not kit.command("heartbeat")["alive"]
        assert len(guest.asked["heartbeat"]) == 6, "a guest that does not answer is not asked again"
        guest.answer()
        guest.silent = False
        kit.advance(2)
        assert kit.command("heartbeat")["alive"]


def test_the_guest_is_told_the_time_at_the_start_after_a_restore_and_on_request() -> None:
    with ProviderTest(Provider, options={"time_seconds": 5}) as kit:
        guest = KitGuest(kit, "time")
        sets = guest.linux.sets
        assert len(sets) == 1
        kit.advance(12)
        flags = [ic.parse_time_sync(one.body, ic.Version(3, 0)).flag for one in guest.asked["time"][1:]]
        assert flags == [ic.TimeFlag.SYNC, ic.TimeFlag.SAMPLE, ic.TimeFlag.SAMPLE]
        kit.save_restore()
        kit.run()
        assert len(sets) == 2
        assert kit.command("time-sync") == {"status": 0}
        assert len(sets) == 3 and sets == sorted(sets)
        assert kit.provider.status()["time"]["syncs"] == 3
        # A request that the guest has not taken at the save does not keep the new time back for long.
        guest.silent = True
        kit.save_restore()
        kit.save_restore()
        guest.silent = False
        kit.run()
        guest.answer()
        kit.run()
        assert len(sets) in (4, 5) and sets[-1] == max(sets)


def test_a_shutdown_is_asked_for_and_answered() -> None:
    with ProviderTest(Provider) as kit:
        with pytest.raises(UsageError, match="shutdown service is not there: it has not opened"):
            kit.command("shutdown")
        guest = KitGuest(kit, "shutdown")
        assert kit.command("shutdown", text="bye") == {"accepted": True, "status": 0}
        assert kit.command("shutdown", mode="restart", force=True)["accepted"]
        assert guest.linux.ended == [0, 3]
        refused = kit.command("shutdown", mode="hibernate")
        assert refused == {"accepted": False, "status": ic.IcStatus.FAIL}
        assert ic.parse_shutdown(guest.asked["shutdown"][1].body) == ic.Shutdown(text="bye")
        for arguments, message in (({"mode": "explode"}, "no way 'explode'"), ({"loud": True}, "loud")):
            with pytest.raises(UsageError, match=message):
                kit.command("shutdown", **arguments)


def test_keys_and_values_go_both_ways() -> None:
    with ProviderTest(Provider, options={"values": {"role": "web", "zone": "b"}}) as kit:
        guest = KitGuest(kit, "kvp")
        external = guest.linux.pools[ic.Pool.EXTERNAL]
        assert external == {"role": "web", "zone": "b"}
        assert kit.command("kvp-set", key="größe", value=4711, type="u32") == {"told": True}
        assert external["größe"] == "4711"
        guest.linux.pools[ic.Pool.GUEST]["answer"] = "42"
        assert kit.command("kvp-get", key="answer") == {"value": "42", "type": "string"}
        assert kit.command("kvp-get", key="größe", pool="external") == {"value": "4711", "type": "string"}
        assert tuple(kit.command("kvp-list", pool="auto")["values"]) == FACTS
        assert kit.command("kvp-list", pool="auto-external")["values"] == {}
        assert kit.command("kvp-delete", key="zone") == {"told": True}
        assert list(kit.command("kvp-list", pool="external")["values"]) == ["role", "größe"]
        for command, arguments, message in (
            ("kvp-get", {"key": "nothing"}, "no key 'nothing' in its pool guest"),
            ("kvp-delete", {"key": "zone"}, "no key 'zone' in its pool external"),
            ("kvp-set", {"key": "a", "value": "b", "pool": "auto"}, "the guest refused to set key 'a'"),
            ("kvp-set", {"key": "a", "value": "x" * 1024}, "at most 1023"),
            ("kvp-set", {"key": "a", "value": "x", "type": "u32"}, "key-value exchange"),
            ("kvp-set", {"key": "", "value": "x"}, "kvp-set: field 'key'"),
            ("kvp-get", {"key": "x", "pool": "moon"}, "pool"),
            ("dance", {}, "no command 'dance'; it has"),
        ):
            with pytest.raises(UsageError, match=message):
                kit.command(command, **arguments)
        assert kit.provider.status()["kvp"]["stray"] == 0


def test_integration_service_fault_d10_keys_of_the_host_are_told_at_every_open() -> None:
    """Also those that were set before the guest's service came, and over a restore; what was refused is forgotten."""
    with ProviderTest(Provider, options={"values": {"role": "web", "zone": "b"}, "services": ["kvp"]}) as kit:
        assert kit.command("kvp-set", key="early", value=1, type="u64") == {"told": False}
        assert kit.command("kvp-set", key="role", value="db") == {"told": False}
        assert kit.command("kvp-delete", key="zone") == {"told": False}
        kit.save_restore()
        guest = KitGuest(kit, "kvp")
        external = guest.linux.pools[ic.Pool.EXTERNAL]
        wanted = {"early": "1", "role": "db"}
        assert external == wanted
        guest.clients["kvp"].close()
        external.clear()  # it boots anew
        kit.save_restore()
        guest.open(ic.KVP)
        assert external == wanted
        assert kit.command("kvp-delete", key="early") == {"told": True}
        assert kit.command("kvp-set", key="late", value="x") == {"told": True}
        # Refused, it is as it was; in a pool of the guest's, nothing is remembered.
        guest.silent = True
        refused = kit.provider.command("kvp-set", {"key": "late", "value": "y"})
        kit.run()
        client, _, transaction, message = guest.unanswered.pop()
        guest.send(client, message.reply(status=ic.IcStatus.FAIL), transaction)
        kit.run()
        assert not isinstance(refused, dict) and "refused to set key 'late'" in str(refused.exception(0))
        guest.silent = False
        kit.command("kvp-set", key="theirs", value="x", pool="guest")
        guest.clients["kvp"].close()
        external.clear()
        guest.open(ic.KVP)
        assert external == {"role": "db", "late": "x"}
        guest.clients["kvp"].close()
        for number in range(MOST_TOLD - 2):
            kit.command("kvp-set", key=f"k{number}", value="x" * 1000)
        with pytest.raises(UsageError, match=f"told of {MOST_TOLD} keys at most"):
            kit.command("kvp-set", key="more", value="x")
        kit.save_restore()
        guest.open(ic.KVP)
        assert len(external) == MOST_TOLD and kit.provider.status()["kvp"]["stray"] == 0


def test_integration_service_fault_d6_fault_d7_fault_d9_an_answer_without_sense_or_refused_is_named() -> None:
    """A list goes on beyond it, and only the guest's word that there is no more is its end."""
    with ProviderTest(Provider, options={"services": ["kvp"]}) as kit:
        guest = KitGuest(kit, "kvp")
        for number in range(6):
            guest.linux.pools[ic.Pool.GUEST][f"k{number}"] = "v"
        bad: dict[int, Callable[[bytes], bytes] | int] = {}

        def answer(service: ic.Service, message: ic.Message) -> ic.Message:
            found = LinuxAnswers.answer(guest.linux, service, message)
            position = ic.parse_kvp(message.body).position
            what = bad.get(position)
            if isinstance(what, int):
                return message.reply(status=what)
            return found if what is None else message.reply(what(found.body))

        guest.linux.answer = answer  # type: ignore[method-assign]
        first = ic.kvp(ic.Kvp(ic.KvpOperation.ENUMERATE, ic.Pool.GUEST, "k", "v"))
        unknown = ENUMERATED_TYPE.pack(99)
        bad[1] = lambda body: body[:8] + unknown + body[12:16] + bytes(4) + body[20:]  # of no type, and no value
        bad[2] = lambda body: body[:12] + SIZES.pack(3, 4) + body[20:]  # half a character
        bad[3] = lambda body: body[:12] + SIZES.pack(4, 9999) + body[20:]
        bad[4] = lambda body: body[:20] + b"\0\xd8" + body[22:]  # half a pair
        bad[5] = lambda body: first[:4] + ENUMERATED_TYPE.pack(17) + first[8:]  # of another request
        listed = kit.command("kvp-list")
        assert listed["values"] == {"k0": "v"} and len(listed["senseless"]) == 5
        assert "number 1: a value of type 99" in listed["senseless"][0]
        with pytest.raises(UsageError, match="no key 'k3' in its pool guest; and the guest's answers make no sense"):
            kit.command("kvp-get", key="k3")
        assert kit.command("kvp-get", key="k0")["value"] == "v"
        bad.clear()
        bad[3] = int(ic.IcStatus.FAIL)
        for command, arguments in (("kvp-list", {}), ("kvp-get", {"key": "k5"})):
            with pytest.raises(UsageError, match="refused to enumerate number 3 of pool 1: status 0x80004005"):
                kit.command(command, **arguments)
        assert kit.command("kvp-get", key="k2")["value"] == "v"
        assert kit.provider.status()["kvp"]["phase"] == "ready"


ENUMERATED_TYPE = struct.Struct("<I")
SIZES = struct.Struct("<II")


def test_integration_service_saved_at_every_step() -> None:
    """Heartbeats keep their numbers, the guest's books are right, and no answer is stray."""

    def script(kit: ProviderTest) -> object:
        guest = KitGuest(kit, "heartbeat", "shutdown", "kvp")
        kit.advance(5)
        kit.command("kvp-set", key="one", value="1")
        guest.silent = True
        # The tool that asked goes with the process; the request does not.
        for name in ("two", "three"):
            kit.provider.command("kvp-set", {"key": name, "value": name})
        kit.provider.command("shutdown", {})
        kit.step("requests are under way and waiting")
        kit.run()
        kit.advance(1)
        guest.silent = False
        guest.answer()
        kit.run()
        kit.advance(5)
        beats = [ic.parse_heartbeat(one.body) for one in guest.asked["heartbeat"][1:]]
        assert beats == list(range(len(beats))), beats
        status = kit.provider.status()
        assert status["heartbeat"]["beats"] == len(beats) and status["heartbeat"]["wrong"] == 0
        assert [part["stray"] + part["unanswered"] for part in status.values()] == [0] * 3
        assert [part["sent"] - part["answered"] for part in status.values()] == [0] * 3
        negotiations = [sum(one.kind == 0 for one in asked) for asked in guest.asked.values()]
        sets = [ic.parse_kvp(one.body).key for one in guest.asked["kvp"][1:]]
        return guest.linux.pools, guest.linux.ended, negotiations, sets

    # Without the time: it is told after every restore, so with a save at every step there would be no end of it.
    options = {"services": ["heartbeat", "shutdown", "kvp"]}
    assert every_step(script, Provider, options=options, outcome=lambda kit, returned: returned) > 25


def test_the_time_is_right_wherever_a_save_is() -> None:
    def script(kit: ProviderTest) -> None:
        guest = KitGuest(kit, "time")
        kit.advance(4)
        guest.silent = True
        kit.provider.command("time-sync", {})
        kit.run()
        guest.silent = False
        guest.answer()
        kit.advance(2)
        sets = guest.linux.sets
        assert sets == sorted(sets) and 2 <= len(sets) <= 2 + kit.saves, (sets, kit.saves)
        status = kit.provider.status()["time"]
        assert (status["stray"], status["unanswered"], status["sent"]) == (0, 0, status["answered"])

    with ProviderTest(Provider, options={"time_seconds": 1.5}) as kit:
        script(kit)
        steps = kit.steps
    assert steps > 10
    for point in range(1, steps + 1):
        with ProviderTest(Provider, options={"time_seconds": 1.5}) as kit:
            kit.save_at = lambda step, point=point: step == point  # type: ignore[misc]
            script(kit)


def test_sabotage_without_the_request_in_the_state_its_answer_is_stray() -> None:
    with ProviderTest(Provider, options={"services": ["heartbeat"]}) as kit:
        guest = KitGuest(kit, "heartbeat")
        guest.silent = True
        kit.advance(2.5)
        kit.save_restore()
        exchange = kit.provider.parts["heartbeat"].exchange  # type: ignore[attr-defined]
        assert exchange._under_way.kind == MessageType.HEARTBEAT
        exchange._under_way = None
        guest.answer()
        kit.run()
        heartbeat = kit.command("heartbeat")
        assert (heartbeat["stray"], heartbeat["beats"], heartbeat["alive"]) == (1, 0, False)


def test_answers_that_do_not_come_are_given_up() -> None:
    """By whoever asked: the guest is asked nothing else until it has answered, so it never has two requests at once."""
    with ProviderTest(Provider, options={"answer_seconds": 3}) as kit:
        guest = KitGuest(kit, "kvp")
        guest.silent = True
        first = kit.provider.command("kvp-get", {"key": "a"})
        kit.advance(1)
        second = kit.provider.command("kvp-set", {"key": "b", "value": "never"})
        assert not isinstance(first, dict) and not isinstance(second, dict)
        kit.advance(1.9)
        assert not first.done()
        kit.advance(0.2)
        assert "the guest's answer (kvp service)" in str(first.exception(0)) and not second.done()
        kit.advance(1)
        assert "the guest's answer (kvp service)" in str(second.exception(0))
        for _ in range(QUEUE):
            last = kit.provider.command("kvp-get", {"key": "c"})
        with pytest.raises(UsageError, match="does not answer: 64 requests wait"):
            kit.provider.command("kvp-get", {"key": "c"})
        kit.advance(2)
        assert len(guest.asked["kvp"]) == 2, "the negotiation, and the first request"
        guest.silent = False
        guest.answer()  # the first one, too late, and the others in time, except for the second, which was dropped
        kit.run()
        assert not isinstance(last, dict) and "no key 'c'" in str(last.exception(0))
        assert "b" not in guest.linux.pools[ic.Pool.EXTERNAL]
        status = kit.provider.status()["kvp"]
        assert (status["stray"], status["unanswered"], status["sent"]) == (0, 2, status["answered"])
        guest.silent = True
        waiting = kit.provider.command("kvp-get", {"key": "d"})
        guest.clients["kvp"].close()
        assert not isinstance(waiting, dict) and "went away: it has closed" in str(waiting.exception(0))


def test_backpressure_a_guest_that_never_reads_has_one_message_to_read() -> None:
    with ProviderTest(Provider, options={"answer_seconds": 0.1, "time_seconds": 0.2, "services": ["time"]}) as kit:
        guest = KitGuest(kit, "time")
        guest.silent = True
        kit.advance(1.0)
        with guest.clients["time"].away():
            sent = kit.provider.status()["time"]["sent"]
            for _ in range(2 * QUEUE):
                kit.provider.command("time-sync", {})
                kit.advance(1.0)
            assert kit.provider.status()["time"]["sent"] == sent
            assert kit.channels[0].packets_queued == 0
            (bound,) = kit.provider.bounds().values()
            assert bound.now <= 1


def test_integration_service_negotiation_waits_for_a_daemon_as_long_as_it_takes() -> None:
    """Linux reads nothing from the key-value channel before its daemon has come."""
    with ProviderTest(Provider, options={"values": {"role": "web"}, "services": ["kvp"]}) as kit:
        guest = KitGuest(kit, "kvp")
        guest.linux.pools[ic.Pool.EXTERNAL].clear()
        guest.clients["kvp"].close()
        guest.silent = True
        guest.open(ic.KVP)
        early = kit.provider.command("kvp-list", {})
        kit.advance(9)
        assert not isinstance(early, dict) and "perhaps its daemon does not run" in str(early.exception(0))
        kit.advance(3600)
        kit.save_restore()
        kit.advance(3600)
        assert guest.asked["kvp"][-1].kind == MessageType.NEGOTIATE
        guest.silent = False
        guest.answer()
        kit.run()
        assert guest.linux.pools[ic.Pool.EXTERNAL] == {"role": "web"}
        assert kit.command("kvp-list", pool="external")["values"] == {"role": "web"}
        assert kit.provider.status()["kvp"]["stray"] == 0


@pytest.mark.parametrize("step", [-400 * 86400.0, -3600.0, -1.0, 1.0, 3600.0, 20_000 * 86400.0])
@pytest.mark.parametrize("whose", ["host", "guest"])
def test_integration_service_fault_d8_puts_the_guest_right_within_a_minute(whose: str, step: float) -> None:
    """Whatever one of the two clocks did: the host's slept or was set, the guest's was set by somebody in it. A guest
    like Linux sets its clock only when it is told to."""
    with ProviderTest(Clocks, options={"services": ["time"]}) as kit:
        linux = KitGuest(kit, "time", clock=lambda: Clocks.elapsed).linux

        def wrong() -> float:
            return abs(Clocks.elapsed + linux.offset - Clocks.time)

        assert wrong() == 0

        def pass_time(seconds: int) -> None:
            for _ in range(seconds):
                Clocks.elapsed += 1
                Clocks.time += 1
                kit.advance(1)

        pass_time(17)
        if whose == "host":
            Clocks.time += step
            pass_time(6)
        else:
            linux.offset += step
            pass_time(59)
        assert wrong() < 0.3
        before = len(linux.sets)
        pass_time(10)
        assert len(linux.sets) <= before + 1, "it is not told to set it all the time"


def test_sabotage_without_the_periodic_sync_a_guest_stays_wrong() -> None:
    with ProviderTest(Provider, options={"services": ["time"], "sync_seconds": 0}) as kit:
        linux = KitGuest(kit, "time").linux
        kit.advance(600)
        assert len(linux.sets) == 1 and linux.samples > 100


def test_a_tool_that_has_gone_harms_nobody() -> None:
    with ProviderTest(Provider) as kit:
        guest = KitGuest(kit)
        guest.silent = True
        for name, arguments in (
            ("kvp-list", {"pool": "auto"}),
            ("kvp-set", {"key": "a", "value": "b"}),
            ("shutdown", {}),
            ("time-sync", {}),
        ):
            answer = kit.provider.command(name, arguments)
            assert not isinstance(answer, dict) and answer.cancel()
        kit.run()
        guest.silent = False
        guest.answer()
        kit.advance(3)
        assert guest.linux.pools[ic.Pool.EXTERNAL] == {"a": "b"}
        assert kit.command("kvp-list", pool="external")["values"] == {"a": "b"}


def test_a_guest_that_speaks_other_versions() -> None:
    with ProviderTest(Provider) as kit:
        guest = KitGuest(kit, "heartbeat")
        guest.silent = True
        guest.open(ic.SHUTDOWN)
        client, _, transaction, message = guest.unanswered.pop()
        guest.send(client, message.reply(ic.answer_negotiation(None)), transaction)
        kit.run()
        assert kit.provider.status()["shutdown"]["phase"] == "unsupported"
        with pytest.raises(UsageError, match="takes none of our versions"):
            kit.command("shutdown")
        kit.save_restore()
        assert kit.provider.status()["shutdown"]["phase"] == "unsupported"
        # An older one, which knows no restart.
        client.close()
        guest.open(ic.SHUTDOWN)
        client, _, transaction, message = guest.unanswered.pop()
        choice = (ic.Version(1, 0), ic.Version(3, 0))
        guest.send(client, message.reply(ic.answer_negotiation(choice)), transaction)
        kit.run()
        with pytest.raises(UsageError, match=r"speaks version 3.0, and cannot restart"):
            kit.command("shutdown", mode="restart")


HOSTILE = {
    "no pipe header": b"\0" * 32,
    "a length beyond the packet": frame(bytes(40))[:-32],
    "no header": frame(b"short"),
    "a size beyond the message": frame(ic.HEADER.pack(3, 0, 1, 3, 0, 500, 0, 1, 5, 0)),
    "a version that was not offered": None,
    "a negotiation that is cut": None,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_integration_service_hostile_bytes_close_their_channel_only(what: str) -> None:
    with ProviderTest(Provider) as kit:
        guest = KitGuest(kit, "time", "kvp")
        guest.silent = True
        guest.open(ic.HEARTBEAT)
        client, _, transaction, message = guest.unanswered.pop()
        payload = HOSTILE[what]
        if what == "a version that was not offered":
            payload = frame(message.reply(ic.negotiation([(3, 0)], [(7, 7)])).pack())  # type: ignore[list-item]
        elif what == "a negotiation that is cut":
            payload = frame(message._replace(body=b"\1\0\1\0", flags=5).pack())
        assert payload is not None
        client.channel.allocate_packet().send(payload, wait_for_completion=False, transaction=transaction)
        assert "heartbeat service" in kit.expect_failure()
        guest.silent = False
        assert kit.command("kvp-list", pool="auto")["values"]
        guest.open(ic.HEARTBEAT)
        kit.advance(3)
        assert kit.command("heartbeat")["alive"]


def test_strange_but_harmless_messages_are_only_counted() -> None:
    with ProviderTest(Provider) as kit:
        guest = KitGuest(kit, "heartbeat")
        client = guest.clients["heartbeat"]
        for _ in range(300):
            guest.send(client, ic.Message(MessageType.HEARTBEAT, b"", transaction=9, flags=5))
            guest.send(client, ic.Message(MessageType.NEGOTIATE, b"", transaction=1, flags=5))
            kit.run()
        assert kit.provider.status()["heartbeat"]["stray"] == 600
        kit.advance(5)
        assert kit.command("heartbeat")["alive"]
        guest.silent = True
        kit.advance(2)
        transaction, message = guest.unanswered[0][2:]
        guest.unanswered.clear()
        guest.send(client, message.reply(ic.heartbeat(12345)), transaction)
        guest.silent = False
        kit.run()
        assert kit.command("heartbeat")["wrong"] == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=6), st.sampled_from([one.name for one in ANSWERED]))
def test_no_bytes_of_the_guest_harm_another_service(payloads: list[bytes], name: str) -> None:
    with ProviderTest(Provider) as kit:
        guest = KitGuest(kit)
        client = guest.clients[name]
        for payload in payloads:
            if not client.is_open:
                break
            raw = payload if len(payload) % 2 else frame(payload)
            client.channel.allocate_packet().send(raw, wait_for_completion=False)
            try:
                kit.run()
            except ContractViolation:
                kit.run()
        other = "heartbeat" if name == "kvp" else "kvp"
        kit.advance(3)
        if other == "kvp":
            assert kit.command("kvp-list", pool="auto")["values"]
        else:
            assert kit.command("heartbeat")["alive"]


def test_states_of_others_and_damage_are_refused() -> None:
    with ProviderTest(Provider) as kit:
        KitGuest(kit)
        kit.advance(3)
        kit.provider.restore(kit.provider.save())
        state: dict[str, Any] = msgspec.msgpack.decode(kit.provider.save())
    with ProviderTest(Provider) as kit:
        for change, message in (
            (lambda s: s.update(version=2), "version"),
            (lambda s: s["parts"].pop("kvp"), "was saved with the services"),
            (lambda s: s["parts"]["time"]["numbers"].update(more=1), "other numbers"),
            (lambda s: s["parts"]["time"]["exchange"].update(version=[4, 0]), "agreed on versions"),
            (lambda s: s["parts"]["time"]["exchange"].update(last_transaction=256), "last_transaction"),
            (lambda s: s["parts"]["time"]["exchange"]["counters"].pop("sent"), "other counters"),
            (lambda s: s["parts"]["kvp"]["wishes"].update(a={"value": "\0"}), "zero character"),
            (lambda s: s["parts"]["kvp"]["wishes"].update(a={"value": "x", "value_type": 4}), "kvp service"),
            (lambda s: s["parts"]["kvp"].update(wishes={str(n): {"value": "x"} for n in range(MOST_TOLD + 1)}), "wish"),
            (lambda s: s["parts"]["kvp"]["exchange"].update(waiting=[{"kind": 2, "body": bytes(9999)}]), "body"),
        ):
            damaged = msgspec.msgpack.decode(msgspec.msgpack.encode(state))
            change(damaged)
            assert message in kit.check_refuses(msgspec.msgpack.encode(damaged))
        kit.check_refuses(b"")


def test_options_are_checked() -> None:
    with ProviderTest(Provider, options={"services": ["heartbeat"]}) as kit:
        assert [channel.name for channel in kit.channels] == ["integration-heartbeat"]
        with pytest.raises(UsageError, match="does not have the service 'kvp'"):
            kit.command("kvp-list")
    for options, message in (
        ({"services": []}, "at least one"),
        ({"services": ["kvp", "kvp"]}, "at most once"),
        ({"services": ["fcopy"]}, "fcopy"),
        ({"heartbeat_seconds": 0}, "heartbeat_seconds"),
        ({"values": {"": "x"}}, "values"),
        ({"values": {"x": "y" * 1024}}, "values"),
        ({"values": {"x": "\0"}}, "zero character"),
    ):
        with pytest.raises(UsageError, match=message):
            ProviderTest(Provider, options=options)


# ---- docs/provider-integration.md ------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "provider-integration.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    table = PAGE.partition(f"\n{heading}\n")[2].partition("| --- |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[1:]]


def test_the_page_has_the_options() -> None:
    assert [row[0].strip("`") for row in rows("## Options")] == list(IntegrationOptions.__struct_fields__)
    plain = IntegrationOptions()
    defaults = {row[0].strip("`"): row[1] for row in rows("## Options")}
    for name in ("heartbeat_seconds", "time_seconds", "answer_seconds"):
        assert float(defaults[name]) == getattr(plain, name)


def test_the_page_has_the_commands_and_versions() -> None:
    with ProviderTest(Provider) as kit, pytest.raises(UsageError) as error:
        kit.command("?")
    known = str(error.value).partition("it has ")[2].split(", ")
    assert [row[0].strip("`") for row in rows("## Commands")] == known
    for service in ic.SERVICES:
        versions = TIME_VERSIONS if service is ic.TIME else service.versions
        name = "key-value" if service is ic.KVP else service.name
        assert f"{name} {', '.join(map(str, versions))}" in PAGE.replace("\n", " "), service.name
    assert f"at most {QUEUE} wait" in PAGE
