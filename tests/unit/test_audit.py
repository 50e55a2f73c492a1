"""The auditor: what it accepts, what it finds, and what it says about records that are torn, missing or brief."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from support.device import Machine
from support.history import COMPLETION, INBAND, History, Link, ring_bytes
from support.pair import Pair
from support.traffic import Burst, Traffic
from vmbus.cli import main
from vmbus.device import saved
from vmbus.errors import EnvironmentProblem, StateError, UsageError
from vmbus.kmcl.saved import decode_lib
from vmbus.observe.audit import format as f
from vmbus.observe.audit.checker import check_paths, check_records
from vmbus.observe.audit.device import RecordingObserver
from vmbus.observe.audit.files import guest_recorder, make_directory, recorder_in
from vmbus.observe.audit.recorder import BRIEF, GRAIN, Recorder
from vmbus.observe.audit.records import Record, find_files
from vmbus.observe.audit.report import Report
from vmbus.observe.audit.store import FileStore, MemoryStore
from vmbus_guest.driver import VmbusDriver

DAMAGE = ("lost", "doubled", "reordered", "corrupted")
SEEDS = st.integers(0, 1 << 32)


def history(seed: int, *, grain: int = 16, steps: int = 120, limit: int = 1 << 30, **damage: str | int) -> History:
    model = History(grain, limit)
    if damage:
        model.damage = (str(damage["reader"]), int(damage["at"]), str(damage["what"]))
    model.run(random.Random(seed), steps)
    model.settle()
    return model


# ---- histories -------------------------------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from([1, 3, 16, 64]))
@settings(max_examples=75, deadline=None)
def test_a_valid_history_is_clean(seed: int, grain: int) -> None:
    model = history(seed, grain=grain)
    report = model.check()
    assert report.clean, str(report)
    assert report.packets == model.host.next + model.guest.next - 2
    assert report.in_flight == 0


def _answering(seed: int, *, steps: int = 120, **damage: str | int) -> History:
    """A history in which the guest answers each of the host's packets by one of its own with the same number, as a
    driver of integration services does, and sends packets of its own beside."""
    model, choose = History(), random.Random(seed)
    guest = model.guest
    guest.ids_given = True
    if damage:
        model.damage = (str(damage["reader"]), int(damage["at"]), str(damage["what"]))
    for _ in range(steps):
        model.run(choose, 1)
        if guest.held and choose.random() < 0.5:
            guest.queue.append((INBAND, False, guest.held[-1][0], b"answer.."))
    return model


@given(SEEDS)
@settings(max_examples=75, deadline=None)
def test_fault_n2_answers_under_the_others_numbers_are_clean(seed: int) -> None:
    model = _answering(seed)
    report = model.check()
    assert report.clean, str(report)
    model.settle()
    report = model.check()
    assert report.clean, str(report)


def test_fault_n2_nothing_but_answers_under_the_others_numbers() -> None:
    """What heartbeats look like: none of them is of the channel's own numbers."""
    model = History()
    model.guest.ids_given = True
    for number in range(1, 40):
        model.host.accept(True, b"request.")
        model.put(model.host, 1)
        model.take(model.guest, 1)
        model.guest.complete(0, b"done")
        model.guest.queue.append((INBAND, False, number, b"answer.."))
        model.put(model.guest, 2)
    model.settle()
    report = model.check()
    assert report.clean and report.packets == 78, str(report)


@pytest.mark.parametrize("wanted", [True, False])
def test_fault_n2_a_packet_that_is_lost_before_the_ring_is_found_among_answers(wanted: bool) -> None:
    found = 0
    for seed in range(40):
        model = _answering(seed)
        own = [at for at, one in enumerate(model.guest.queue) if one[0] == INBAND and one[2] and one[1] is wanted]
        if not own or (not wanted and model.guest.queue[own[0]][3] == b"answer.."):
            continue
        del model.guest.queue[own[0]]
        model.settle()
        report = model.check()
        found += report.verdict == "broken" and report.problems[0].kind == "lost"
    assert found >= 5


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_what_is_unfinished_is_in_flight_and_clean(seed: int) -> None:
    model = History()
    model.run(random.Random(seed), 80)
    report = model.check()
    assert report.clean, str(report)
    waiting = sum(
        len(end.sent) + sum(kind != COMPLETION for kind, *_ in end.queue) for end in (model.host, model.guest)
    )
    assert report.in_flight == waiting


@given(SEEDS, st.sampled_from(DAMAGE), st.sampled_from(["host", "guest"]), st.integers(0, 300), st.booleans())
@settings(max_examples=200, deadline=None)
def test_one_damaged_packet_is_found_and_named(seed: int, what: str, reader: str, at: int, exact: bool) -> None:
    model = history(seed, grain=1 if exact else 16, what=what, reader=reader, at=at)
    assume(model.victim is not None)
    assert model.victim is not None
    # The very last one may still be on its way, as far as anybody can tell.
    assume(what != "lost" or model.taken[reader] > at + 1)
    report = model.check()
    assert report.verdict == "broken", str(report)
    problem = report.problems[0]
    kind, transaction = model.victim
    assert problem.kind == what, str(report)
    assert problem.direction == f"to the {reader}"
    if what == "corrupted" and not exact:
        assert problem.ordinal is not None and problem.ordinal <= at < problem.ordinal + 16
    else:
        assert (problem.first, problem.last) == (transaction, transaction), str(report)
        assert problem.of == ("completion" if kind == COMPLETION else "packet")


@given(SEEDS, st.sampled_from(DAMAGE), st.integers(0, 200))
@settings(max_examples=50, deadline=None)
def test_brief_records_still_catch_it(seed: int, what: str, at: int) -> None:
    model = history(seed, limit=0, what=what, reader="guest", at=at)
    report = model.check()
    if model.victim is None:
        assert report.clean, str(report)
    else:
        # Lost, in a history this short: nothing tells it from a packet that is still in the ring.
        assert report.verdict == "broken" or (what == "lost" and report.verdict == "incomplete"), str(report)


@given(SEEDS, st.sampled_from(DAMAGE))
@settings(max_examples=10, deadline=None)
def test_brief_records_catch_it_for_good_behind_the_next_checksum(seed: int, what: str) -> None:
    model = history(seed, limit=0, steps=400, what=what, reader="guest", at=30)
    report = model.check()
    assert model.victim is not None and model.taken["guest"] > 1024 + 30
    assert report.verdict == "broken", str(report)
    # Brief records do not hold every packet: the first one at which they contradict each other may be later, but not
    # behind the next checksum.
    assert report.problems[0].ordinal is not None and report.problems[0].ordinal <= 30 + BRIEF * GRAIN


@given(SEEDS, st.sampled_from(["drop", "double", "swap", "body"]), st.data())
@settings(max_examples=75, deadline=None)
def test_damage_between_a_save_and_its_restore_is_named(seed: int, what: str, data: st.DataObject) -> None:
    choose = random.Random(seed)
    model = History()
    model.run(choose, 60)
    for _ in range(8):
        model.host.accept(True, choose.randbytes(16))
    where = data.draw(st.integers(0, len(model.host.queue) - 2))
    host = model.host
    while host.held:
        host.complete(0, b"at the pause")
    victim = host.queue[where]
    lives = host.recorder.saved([host])  # type: ignore[list-item]
    old = host.recorder
    match what:
        case "drop":
            del host.queue[where]
        case "double":
            host.queue.insert(where, victim)
        case "swap":
            host.queue[where : where + 2] = reversed(host.queue[where : where + 2])
        case "body":
            host.queue[where] = (*victim[:3], b"another" + victim[3])
    position = old.position
    host.start()
    host.recorder.resume(old.uid, position, lives)
    host.trace = host.recorder.opened(host, Link(model.headers["host"], model.headers["guest"]), "resumed")  # type: ignore[arg-type]
    host.recorder.restored([host])  # type: ignore[list-item]
    report = model.check()
    names = {"drop": "lost", "double": "doubled", "swap": "reordered", "body": "corrupted"}
    assert report.problems[0].kind == names[what], str(report)
    assert report.problems[0].first == victim[2]
    assert "restore" in report.problems[0].where


# ---- timelines -------------------------------------------------------------------------------------------------------


def test_an_abandoned_future_is_told_and_not_held_against_anybody() -> None:
    model = History()
    model.run(random.Random(3), 50)
    choose = random.Random(1)
    while not any("too late" in str(event.body) for record in model.records() for event in record.events):
        model.restore(choose)
    model.settle()
    report = model.check()
    assert report.clean, str(report)
    assert any("after the save" in one for one in report.abandoned)
    assert len(report.timeline) == len(model.host.records)


def test_a_missing_generation_is_not_proven() -> None:
    model = History()
    model.run(random.Random(3), 50)
    model.restore(random.Random(0))
    model.restore(random.Random(0))
    model.settle()
    records = model.records()
    middle = next(record for record in records if record.uid == model.host.records[-2][0].uid)
    report = check_records([record for record in records if record is not middle])
    assert report.verdict == "incomplete"
    assert "goes on is not here" in report.missing[0].text


def test_without_the_guests_record_nothing_is_proven() -> None:
    model = history(5)
    report = check_records([record for record in model.records() if record.side == "host"])
    assert report.verdict == "incomplete" and "guest" in report.missing[0].text
    with pytest.raises(UsageError, match="no record of a server"):
        check_records([record for record in model.records() if record.side == "guest"])


def test_the_leaf_can_be_chosen() -> None:
    model = History()
    first = model.host.recorder.uid
    model.host.accept(True, b"x")
    model.put(model.host, 1)
    model.restore(random.Random(0))
    records = model.records()
    report = check_records(records, leaf=first)
    assert len(report.timeline) == 1 and report.verdict == "incomplete", "the guest's record is of the other timeline"
    with pytest.raises(UsageError, match="0 records of servers begin with"):
        check_records(records, leaf="nobody")


def test_what_the_guest_took_before_anybody_put_it_is_invented() -> None:
    model = History()
    assert model.guest.trace is not None
    model.guest.trace.taken(ring_bytes(6, True, 1, b"from nowhere"))
    report = model.check()
    assert [problem.kind for problem in report.problems] == ["invented"]
    assert report.problems[0].first == 1


def test_a_failed_channel_is_a_breach_that_names_the_packet() -> None:
    model = History()
    model.host.accept(True, b"x")
    model.put(model.host, 1)
    assert model.guest.trace is not None
    model.guest.trace.failed("I do not like it", True)
    report = model.check()
    assert (report.problems[0].kind, report.problems[0].first) == ("failed", 1)
    assert "I do not like it" in str(report)


# ---- torn, foreign, unwritable ---------------------------------------------------------------------------------------


@given(st.integers(0, 5000))
@settings(max_examples=50, deadline=None)
def test_a_torn_record_is_read_up_to_there(cut: int) -> None:
    model = history(11)
    data = bytes(model.guest.records[-1][1].data)
    model.guest.recorder.flush("x")
    whole = Record(data, "whole")
    record = Record(data[: cut % (len(data) + 1)], "torn")
    assert [event.kind for event in record.events] == [event.kind for event in whole.events][: len(record.events)]
    assert not record.torn or not record.complete


def test_the_torn_end_of_a_killed_server_is_said_and_not_a_breach() -> None:
    model = History()
    model.run(random.Random(3), 80)
    model.restore(random.Random(0))
    model.settle()
    records = model.records()
    old = model.host.records[-2][1]
    torn = Record(bytes(old.data) + f.frame_json(f.FLUSHED, 0, {"reason": "never written"})[:-5], "torn")
    report = check_records([torn if record.uid == torn.uid else record for record in records])
    assert report.clean, str(report)
    assert "torn event" in report.notes[0]


@given(SEEDS, st.integers(0, 1 << 20), st.sampled_from([1, 16]))
@settings(max_examples=100, deadline=None)
def test_the_record_of_a_killed_guest_is_no_breach_wherever_it_stops(seed: int, cut: int, grain: int) -> None:
    """Its puts may be on the disk and not what it took before them, or the other way round."""
    model = History(grain)
    model.run(random.Random(seed), 60)
    model.guest.recorder.flush("some")
    model.run(random.Random(seed + 1), 60)
    mark = {"uid": model.host.recorder.uid, "position": model.host.recorder.flush("before")}
    records = model.records()
    data = bytes(model.guest.records[-1][1].data)
    collected = f.frame_json(f.COLLECTED, 0, mark)
    stops = data[f.HEAD.size : f.HEAD.size + cut % (len(data) - f.HEAD.size)]
    torn = Record(data[: f.HEAD.size] + collected + stops, "torn")
    assume(not torn.empty and not torn.complete)
    report = check_records([torn if record.side == "guest" else record for record in records])
    assert report.verdict != "broken", str(report)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not a record at all", "is not an audit record"),
        (f.HEAD.pack(f.MAGIC, 2, 0), "of version 2; this program reads 1"),
        (f.head() + f.FRAME.pack(99, 0, 0, 0), "no event of type 99"),
        (f.head() + f.FRAME.pack(f.META, 0, 2, 0) + b"{}", "another checksum"),
        (f.head() + f.frame(f.META, 0, b"[]"), "is not an object"),
        (f.head() + f.frame(f.META, 0, b"{"), "is not JSON"),
        (f.head() + f.frame_json(f.META, 0, {}), "does not begin with"),
    ],
)
def test_foreign_and_damaged_records_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(StateError, match=message):
        Record(data, "it")


@given(st.integers(0, 1 << 30), st.integers(1, 255))
@settings(max_examples=50, deadline=None)
def test_any_changed_byte_is_refused_or_changes_nothing(at: int, flip: int) -> None:
    model = history(4, steps=40)
    records = model.records()
    data = bytearray(model.guest.records[-1][1].data)
    data[at % len(data)] ^= flip
    try:
        changed = Record(bytes(data), "changed")
        check_records([changed if record.side == "guest" else record for record in records])
    except (StateError, UsageError):
        pass


def test_a_store_that_fails_ends_the_record_and_nothing_else() -> None:
    class Full(MemoryStore):
        def write(self, data: bytes) -> bool:
            raise OSError(errno.ENOSPC, "No space left on device")

    pair = Pair()
    recorder = Recorder(Full(), side="host", name="x")
    pair.server.observers.append(recorder)
    pair.server.set_process_packet_callbacks(lambda channel, completion, payload: completion.complete(payload))
    pair.open()
    answers: list[bytes] = []
    for number in range(5):
        packet = pair.client.allocate_packet()
        packet.completion_routine = lambda packet, status, reply: answers.append(reply)
        packet.send(number.to_bytes(8, "little"))
        pair.run()
        recorder.flush("now")
    assert len(answers) == 5
    assert "No space left" in recorder.failed


def test_files_are_private_and_found(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "audit"
    make_directory(directory)
    recorder = recorder_in(directory, "host", "vmbus0")
    assert list(directory.iterdir()) == [], "a record of nothing is no file"
    recorder.flush("x")
    (path,) = find_files([directory])
    assert path.stat().st_mode & 0o777 == 0o600 and directory.stat().st_mode & 0o777 == 0o700
    assert str(path) == recorder.path
    with pytest.raises(FileExistsError):
        FileStore(path).write(b"x")
    with pytest.raises(EnvironmentProblem, match="there is no audit record"):
        find_files([tmp_path / "nothing"])
    with pytest.raises(EnvironmentProblem, match="no audit records"):
        find_files([_empty(tmp_path)])
    with pytest.raises(EnvironmentProblem, match="cannot make the directory"):
        make_directory(path / "below a file")


def _empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_a_full_guest_keeps_brief_records(tmp_path: Path) -> None:
    (tmp_path / "guest-old-1-x.audit").write_bytes(bytes(30 << 20))
    recorder = guest_recorder(str(tmp_path), "echo-7")
    assert recorder.brief
    assert Path(recorder.path).name.startswith("guest-echo-7-")


# ---- the real channels, without a transport --------------------------------------------------------------------------


def recorded_pair(**pages: int) -> tuple[Pair, MemoryStore, MemoryStore]:
    pair = Pair(**pages)
    stores = MemoryStore(), MemoryStore()
    pair.server.observers.append(Recorder(stores[0], side="host", name="server"))
    pair.client.observers.append(Recorder(stores[1], side="guest", name="client"))
    return pair, *stores


def check_pair(pair: Pair, host: MemoryStore, guest: MemoryStore) -> Report:
    for channel in (pair.server, pair.client, pair.server):
        (recorder,) = channel.observers
        assert isinstance(recorder, Recorder)
        recorder.flush("now")
    return check_records([Record(bytes(host.data), "host"), Record(bytes(guest.data), "guest")])


def test_what_was_staged_when_its_channel_failed_is_not_called_lost() -> None:
    pair, host, guest = recorded_pair()
    pair.client.set_process_packet_callbacks(lambda channel, completion, payload: completion.complete())
    pair.open()
    for _ in range(3):
        pair.server.allocate_packet().send(b"put")
    pair.run()
    with pair.server.batch():
        for _ in range(5):
            pair.server.allocate_packet().send(b"staged")
        pair.server.fail("for a reason")
    report = check_pair(pair, host, guest)
    assert [problem.kind for problem in report.problems] == ["failed"], str(report)


# ---- the command -----------------------------------------------------------------------------------------------------


def written(tmp_path: Path, model: History) -> Path:
    for number, record in enumerate(model.records()):
        source = model.guest if record.side == "guest" else model.host
        store = source.records[-1 if record.side == "guest" else number][1]
        (tmp_path / f"{number}.audit").write_bytes(bytes(store.data))
    return tmp_path


@pytest.mark.parametrize("what", [None, "lost"])
def test_the_command_tells_and_its_status_too(tmp_path: Path, what: str | None) -> None:
    model = history(8) if what is None else history(8, what=what, reader="guest", at=20)
    directory = written(tmp_path, model)
    result = CliRunner().invoke(main, ["audit", str(directory)])
    machine = CliRunner().invoke(main, ["audit", "--json", str(directory)])
    content = json.loads(machine.output)
    if what is None:
        assert (result.exit_code, machine.exit_code, content["verdict"]) == (0, 0, "clean")
        assert "exactly once and in order" in result.output
    else:
        assert model.victim is not None
        assert (result.exit_code, machine.exit_code, content["verdict"]) == (1, 1, "broken")
        assert f"transaction {model.victim[1]} is lost" in result.output
        assert content["problems"][0]["first"] == model.victim[1]
    assert check_paths([directory]).verdict == content["verdict"]


def test_the_command_says_when_something_is_missing(tmp_path: Path) -> None:
    directory = written(tmp_path, history(8))
    next(path for path in directory.iterdir() if b'"guest"' in path.read_bytes()[:400]).unlink()
    result = CliRunner().invoke(main, ["audit", str(directory)])
    assert result.exit_code == 3 and "NOT PROVEN" in result.output
    assert CliRunner().invoke(main, ["audit", str(tmp_path / "nowhere")]).exit_code == EnvironmentProblem.status


def test_a_record_that_reaches_its_last_byte_ends(tmp_path: Path) -> None:
    recorder = recorder_in(tmp_path, "guest", "x", limit=0)
    for _ in range(40):
        recorder.event(f.FLUSHED, 0, {"reason": "x" * (1 << 20)})
    assert "has reached 16777216 bytes" in recorder.failed
    assert Path(recorder.path).stat().st_size <= 16 << 20


# ---- a device: what its state carries, and channels that are made anew -----------------------------------------------


class Recorded(Machine):
    """A machine whose device, in each of its lives, keeps a record."""

    def boot(self) -> None:
        super().boot()
        if not hasattr(self, "stores"):
            self.stores: list[MemoryStore] = []
        self.stores.append(MemoryStore())
        self.recorder = Recorder(self.stores[-1], side="host", name="vmbus0")
        self.device.add_observer(RecordingObserver(self.recorder))
        for channel in self.device.channels:
            channel.force_new_channel = bool(self.options.get("renew"))

    def check(self, guest: MemoryStore, recorder: Recorder) -> Report:
        self.recorder.flush("now")
        recorder.flush("now")
        self.recorder.flush("now")
        records = [Record(bytes(store.data), "host") for store in self.stores]
        return check_records([*records, Record(bytes(guest.data), "guest")])


def recorded_traffic(machine: Recorded) -> tuple[Traffic, MemoryStore, Recorder]:
    store = MemoryStore()
    recorder = Recorder(store, side="guest", name="driver")
    driver = VmbusDriver(machine, recorder=recorder)  # type: ignore[arg-type]
    traffic = Traffic(driver, hold=40, ring_pages_in=1, ring_pages_out=1)
    traffic.start(200, 500, window=200)
    for _ in range(3):
        driver.step(0.0)
    return traffic, store, recorder


def test_a_state_without_a_record_leaves_a_gap_that_is_told() -> None:
    machine = Recorded()
    traffic, store, recorder = recorded_traffic(machine)
    state = msgspec.structs.replace(machine.save(), audit=None)
    machine.come_back(state)
    traffic.finish()
    report = machine.check(store, recorder)
    assert report.verdict == "incomplete" and "saved without one" in report.missing[0].text, str(report)


def test_packets_dropped_with_a_channel_made_anew_are_seen() -> None:
    machine = Recorded(renew=True)
    _, store, recorder = recorded_traffic(machine)
    state = machine.save()
    assert saved.count_packets(state) == (0, 0, 0)
    dropped = sum(sum(one.decoded.left_out) for one in state.channels)
    assert dropped >= 200
    machine.come_back(state)
    machine.serve()
    report = machine.check(store, recorder)
    assert report.clean, str(report)
    assert sum(channel.dropped for channel in report.channels) >= dropped
    assert "dropped with the channel" in str(report)


def test_a_provider_that_forgets_a_restored_packet_is_seen() -> None:
    """One that bends the library to its will: the packet is in the state, and nobody waits for it any more."""
    machine = Recorded(["burst"])
    store = MemoryStore()
    recorder = Recorder(store, side="guest", name="driver")
    driver = VmbusDriver(machine, recorder=recorder)  # type: ignore[arg-type]
    burst = Burst(driver, hold=1 << 30)
    burst.start(50)
    driver.run_until(lambda: len(burst.held) == 50, 5, "the packets")
    state = machine.save()
    boot = machine.boot

    def forgetful() -> None:
        boot()
        channel = machine.channel("burst")
        restore = channel._restore_packet

        def dropping(where, lib_buf: bytes, save_buf: bytes) -> None:
            restore(where, lib_buf, save_buf)
            if decode_lib(lib_buf).transaction == 7:
                channel.sent_by_mistake = channel._rebuilding.sent.pop(7)

        channel._restore_packet = dropping

    machine.boot = forgetful  # type: ignore[method-assign]
    with pytest.raises(StateError, match="were saved"):
        machine.come_back(state)
    assert [event.kind for event in Record(bytes(machine.stores[-1].data), "x").events].count(f.RESTORED) == 0
