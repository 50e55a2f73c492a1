"""Captures of a real device server, as other programs see them, and replays of them against providers."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pcapng import FileScanner
from pcapng.blocks import EnhancedPacket, InterfaceDescription, InterfaceStatistics

from support import pace
from support.captures import command, events_of, file_of, packets_of
from support.commands import spawn
from support.shuffled import EACH, KEYS, SHUFFLED_TYPE
from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.errors import StateError, UsageError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.observe.audit.checker import check_paths
from vmbus.observe.audit.files import recorder_in
from vmbus.observe.capture import record
from vmbus.observe.capture.pcapng import Interface
from vmbus.observe.capture.record import Record
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.testkit.loopback.pair import DriverSide, LoopbackPair
from vmbus.testkit.replay import replay
from vmbus.testkit.replay_report import ReplayOptions, ReplayReport
from vmbus.transport.library import Library
from vmbus.wire import workload
from vmbus.wire.packet import PacketType
from vmbus_guest.driver import VmbusDriver
from vmbus_guest.testdrivers import CATALOGUE
from vmbus_guest.testdrivers.context import Context

THERE = Interface("echo", workload.ECHO_TYPE, workload.BURST_TYPE, 0)
MIXED = {
    "workloads": [
        {"driver": "echo", "count": 400, "window": 16, "size": 3000, "minimum_size": 1, "external": 0.5, "seed": 3},
        {"driver": "burst", "count": 300},
    ]
}


def drive(server: LoopbackServer, name: str, **parameters: Any) -> dict[str, Any]:
    """Run a test driver as the guest."""
    result = CATALOGUE[name].load()(Context(parameters, server.function))
    assert result["verdict"] == "passed", result
    return result


def asker(driver: VmbusDriver) -> Callable[..., None]:
    """Opens the echo provider's channel. What it returns sends so many requests, and waits for their answers."""
    guest = DriverSide(driver).open(workload.ECHO_TYPE, ring_pages=16)

    def ask(sequence: int, count: int = 1) -> None:
        numbers = range(sequence, sequence + count)
        for request in [guest.send(workload.echo_request(number, b"x" * 1000, inline=True)) for number in numbers]:
            request.wait()

    return ask


@pytest.fixture(scope="module")
def captured(libvfio_user: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture of 400 requests to an echo provider, in order, half of them with external data."""
    path = tmp_path_factory.mktemp("captured") / "echo.pcapng"
    with LoopbackServer(describe("echo"), libvfio_user, capture=path) as server:
        parameters = {key: value for key, value in MIXED["workloads"][0].items() if key != "driver"}
        drive(server, "echo", **parameters)
    return path


# ---- what is in a capture --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Field type should not be:DeprecationWarning")  # of the reader's own code
def test_a_stock_reader_accepts_it_and_finds_every_packet(libvfio_user: Library, tmp_path: Path) -> None:
    path = tmp_path / "mixed.pcapng"
    with LoopbackServer(describe("echo", "burst"), libvfio_user, capture=path) as server:
        drive(server, "mixed", **MIXED)
        status = server.command("capture-stop")
        counters = {one.name: one.counters for one in server.server.device.channels}
    with path.open("rb") as file:
        blocks = list(FileScanner(file))
    interfaces = [block for block in blocks if isinstance(block, InterfaceDescription)]
    assert {block.options["if_name"] for block in interfaces} == {"echo", "burst"}
    assert {block.link_type for block in interfaces} == {147}
    directions: Counter[tuple[str, int]] = Counter()
    unanswered: Counter[str] = Counter()
    for block in blocks:
        if isinstance(block, EnhancedPacket) and block.packet_data[1] == record.PACKET:
            name, direction = block.interface.options["if_name"], block.packet_data[2]
            directions[name, direction] += 1
            # A packet that wants no completion is completed by itself.
            unanswered[name] += direction == record.TO_GUEST and not block.packet_data[14] and block.packet_data[8] == 6
            assert block.packet_len == block.captured_len
    for name, one in counters.items():
        assert directions[name, record.TO_HOST] == one["received"] + one["completed"] - unanswered[name], name
        assert directions[name, record.TO_GUEST] == one["sent"] + one["answered"], name
    assert sum(directions.values()) == status["packets"] and not status["dropped"]
    ends = [block for block in blocks if isinstance(block, InterfaceStatistics)]
    assert sum(block.options["isb_ifrecv"] for block in ends) == status["packets"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_external_data_is_there_as_it_was_taken_and_as_it_was_given_back(captured: Path) -> None:
    asked: dict[int, Record] = {}
    external = 0
    for one in packets_of(captured):
        if one.direction == record.TO_HOST:
            asked[one.transaction] = one
            continue
        request = asked.pop(one.transaction)
        sequence, length, _ = workload.ECHO_REQUEST.unpack_from(request.payload)
        if request.kind == PacketType.GPA_DIRECT:
            assert len(request.external) == request.external_size == length == one.external_size
            assert one.external == workload.transform(request.external, sequence)
            external += 1
    assert not asked and external > 100


def test_it_can_begin_and_end_in_mid_traffic_and_choose_a_channel(libvfio_user: Library, tmp_path: Path) -> None:
    path = tmp_path / "part.pcapng"
    with LoopbackPair(describe("echo", "burst"), libvfio_user) as pair:
        guest = pair.open(workload.ECHO_TYPE)
        other = pair.open(workload.BURST_TYPE)
        guest.request(workload.echo_request(0, b"before", inline=True))
        with pair.capture(path, channels=["echo"]):
            guest.request(workload.echo_request(1, b"captured", inline=True))
            other.send(b"garbage")
            pair.advance(0.05)
        guest.request(workload.echo_request(2, b"after", inline=True))
    found = packets_of(path)
    assert [workload.ECHO_REQUEST.unpack_from(one.payload)[0] for one in found if one.direction == record.TO_HOST] == [
        1
    ]
    assert len(found) == 2 and events_of(path) == ["joined"]


def test_the_snap_length_and_the_bound_of_external_data(libvfio_user: Library, tmp_path: Path) -> None:
    path = tmp_path / "cut.pcapng"
    with LoopbackPair(describe("echo"), libvfio_user) as pair:
        guest = pair.open(workload.ECHO_TYPE, ring_pages=64)
        data = os.urandom(60_000)
        memory = guest.memory(data)
        with pair.capture(path, external=100, snaplen=record.HEADER.size + record.MAX_EVENT):
            guest.request(workload.echo_request(0, data, inline=False), external=memory)
            guest.request(workload.echo_request(1, data, inline=True))
    request, inline = (one for one in packets_of(path) if one.direction == record.TO_HOST)
    assert (request.external_size, request.external) == (60_000, data[:100])
    assert inline.whole and inline.payload[16 : 16 + len(data)] == data


def test_memory_that_cannot_be_read_is_said(libvfio_user: Library, tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    with LoopbackPair(describe("echo"), libvfio_user, capture=path) as pair:
        guest = pair.open(workload.ECHO_TYPE)
        guest.request(workload.echo_request(0, b"x" * 500, inline=False), external=[(0x7000_0000_0000, 500)])
    request = packets_of(path)[0]
    assert (request.bits, request.external_size, request.external) == (record.UNREADABLE, 500, b"")


def test_it_goes_on_over_a_pause_and_a_load_and_a_new_server_has_its_own(libvfio_user: Library, tmp_path: Path) -> None:
    first, second = tmp_path / "first.pcapng", tmp_path / "second.pcapng"
    with LoopbackServer(describe("echo"), libvfio_user, capture=first) as server:
        function = server.function()
        driver = VmbusDriver(function)
        ask = asker(driver)
        ask(0)
        server.command("pause")
        saved = server.directory / "saved.bin"
        digest = server.command("save", path=str(saved))["sha256"]
        server.command("resume")
        server.command("load", path=str(saved), sha256=digest)
        function.reset()
        function.replay(server.server.restore.config)
        server.command("restore-finish")
        ask(1)
        state = server.save()
    assert events_of(first)[:9] == [
        *("opened", "paused", "saved", "running"),
        *("closed", "resumed", "restored"),
        *("paused", "saved"),
    ]
    assert len(packets_of(first)) == 4
    with LoopbackServer(describe("echo"), libvfio_user, restore=state, capture=second) as server, driver:
        function.reconnect(server.socket_path, state.config)
        server.command("restore-finish")
        ask(2)
    assert events_of(second)[:2] == ["resumed", "restored"] and len(packets_of(second)) == 2
    # Both together are the guest's whole story, and can be played one behind the other.
    report = replay([first, second], "echo", libvfio_user)
    assert report.same and report.answers == 3, str(report)


def test_together_with_an_audit_record_both_are_whole(libvfio_user: Library, tmp_path: Path) -> None:
    audit, path = tmp_path / "audit", tmp_path / "a.pcapng"
    with LoopbackServer(describe("echo"), libvfio_user, audit=audit, capture=path) as server:
        recorder = recorder_in(audit, "guest", "here")
        with VmbusDriver(server.function(), recorder=recorder) as driver:
            ask = asker(driver)
            ask(0, 500)
            server.command("capture-stop")  # the record goes on without it
            ask(500)
        recorder.close()
    report = check_paths([audit])
    assert report.clean and report.packets == report.transactions == 501, str(report)
    assert len(packets_of(path)) == 1000


def test_commands_of_the_server(libvfio_user: Library, tmp_path: Path) -> None:
    with LoopbackServer(describe("echo"), libvfio_user) as server:
        assert server.command("capture") == {"running": False}
        with pytest.raises(UsageError, match="no capture to stop"):
            server.command("capture-stop")
        with pytest.raises(UsageError, match="absolute path"):
            server.command("capture-start", path="a")
        with pytest.raises(UsageError, match="unknown field"):
            server.command("capture-start", path=str(tmp_path / "a"), options={"color": 1})
        server.command("capture-start", path=str(tmp_path / "a"))
        with pytest.raises(UsageError, match="is running already"):
            server.command("capture-start", path=str(tmp_path / "b"))
        assert server.command("capture-stop")["running"] is False
        server.command("capture-start", path=str(tmp_path / "b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, which to a writer is what a full disk is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_cannot_grow_ends_the_capture_and_the_device_goes_on(libvfio_user: Library, tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    with LoopbackPair(describe("echo"), libvfio_user, capture=path) as pair:
        guest = pair.open(workload.ECHO_TYPE)
        with files_up_to(20_000):
            for sequence in range(60):
                guest.request(workload.echo_request(sequence, b"x" * 1000, inline=True))
            pair.wait_until(lambda: not pair.server.command("capture")["running"], 10, "the capture to end")
        status = pair.server.command("capture")
        assert "File too large" in status["ended"] and not status["full"]
        guest.request(workload.echo_request(60, b"on", inline=True))
    assert path.stat().st_size <= 20_000
    assert packets_of(path), "what was written is whole"


# ---- the command -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def traffic(server: LoopbackServer) -> Iterator[None]:
    """An echo guest on a thread of its own while the block runs."""
    end = threading.Event()

    def work() -> None:
        with VmbusDriver(server.function()) as driver:
            ask, sequence = asker(driver), 0
            while not end.is_set():
                ask(sequence)
                sequence += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(pace.seconds(20))


def test_the_command_captures_into_a_file(libvfio_user: Library, tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    with LoopbackServer(describe("echo"), libvfio_user) as server, traffic(server):
        done = command("--control", server.control_path, "-o", path, "--packets", 20)
        assert done.exit_code == 0, done.output
        assert (
            command("--control", server.control_path, "-o", path, "--packets", 20).exit_code == UsageError.status
        )  # it exists
        other = tmp_path / "b.pcapng"
        assert command("--control", server.control_path, "-o", other, "--detach").exit_code == 0
        assert json.loads(command("--control", server.control_path, "--status").stdout)["running"]
        assert json.loads(command("--control", server.control_path, "--stop").stdout)["path"] == str(other)
    assert len(packets_of(path)) >= 20
    shown = command("show", path, "--count", 3).stdout.splitlines()
    assert len(shown) == 3 and '"event"' in shown[0] and "INBAND" in shown[1] + shown[2]


def to_standard_output(server: LoopbackServer, *words: str) -> subprocess.Popen[bytes]:
    command = ["capture", "--control", str(server.control_path), "-o", "-", *words]
    found: Any = spawn(*command, stderr=subprocess.PIPE, text=False)
    return found


def test_the_command_captures_to_standard_output(libvfio_user: Library, tmp_path: Path) -> None:
    with LoopbackServer(describe("echo"), libvfio_user) as server, traffic(server):
        done = to_standard_output(server, "--packets", "20")
        output, errors = done.communicate(timeout=pace.seconds(60))
        assert done.returncode == 0, errors
        (tmp_path / "a").write_bytes(output)
        assert len(packets_of(tmp_path / "a")) >= 20
        # A reader that goes away ends the capture, not the device.
        gone = to_standard_output(server)
        assert gone.stdout is not None
        assert len(gone.stdout.read(100)) == 100
        gone.stdout.close()
        _, errors = gone.communicate(timeout=pace.seconds(60))
        assert gone.returncode == 1 and b"its reader is gone" in errors, errors
        # One that is killed does, too.
        killed = to_standard_output(server)
        assert killed.stdout is not None and killed.stdout.read(100)
        killed.kill()
        killed.communicate(timeout=pace.seconds(60))
        for _ in range(1000):
            if not server.command("capture")["running"]:
                break
        else:
            raise AssertionError("the capture outlives its reader")


# ---- replay ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def play(libvfio_user: Library) -> Callable[..., ReplayReport]:
    def play(path: Path, kind: str = "echo", **options: Any) -> ReplayReport:
        chosen = {"timeout": 5.0, **options}
        settings = chosen.pop("provider_options", None)
        return replay([path], kind, libvfio_user, provider_options=settings, options=ReplayOptions(**chosen))

    return play


Play = Callable[..., ReplayReport]


def test_a_replay_finds_the_same(captured: Path, play: Play) -> None:
    report = play(captured)
    assert report.same and (report.sent, report.answers, report.notes, report.left_out) == (400, 400, [], []), str(
        report
    )


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Break the echo provider in one way."""
    complete = Completion.complete
    counts: Counter[str] = Counter()

    def broken(kind: str) -> None:
        def altered(self: Completion, reply: bytes = b"") -> None:
            if self.channel.name != "replayed" or not reply:
                complete(self, reply)
                return
            counts["answers"] += 1
            if counts["answers"] % 100 == 50:
                if kind == "answer":
                    reply = reply[:-1] + bytes([reply[-1] ^ 1])
                elif kind == "external" and self.has_external_data:
                    view = self.external_data().views[0]
                    view[0] = view[0] ^ 1
                elif kind == "missing":
                    return
                elif kind == "fails":
                    self.fail("on purpose")
                    return
            complete(self, reply)

        monkeypatch.setattr(Completion, "complete", altered)

    return broken


@pytest.mark.parametrize(
    ("kind", "found", "said"),
    [
        ("answer", {"answer": 4}, "instead of"),
        ("external", {"external data": 1}, "instead of"),
        ("fails", {"channel": 1}, "the host has closed it"),
        # The channel cannot be closed either, since its provider never answers.
        ("missing", {"missing": 4, "channel": 1}, "in time"),
    ],
)
def test_a_replay_finds_what_is_sabotaged(
    captured: Path, play: Play, sabotage: Callable[[str], None], kind: str, found: dict[str, int], said: str
) -> None:
    sabotage(kind)
    report = play(captured, timeout=0.3 if kind == "missing" else 5.0)
    assert Counter(one.what for one in report.details) == found and not report.same, str(report)
    assert said in report.details[0].message and report.details[0].record > 0
    if kind == "answer":
        assert play(captured, ignore=((0, 1 << 20),)).same


def test_fault_u7_a_replay_tells_at_once_and_gives_up_after_a_few(
    captured: Path, libvfio_user: Library, sabotage: Callable[[str], None]
) -> None:
    """A capture with hundreds of lost packets would take the full wait for each of them."""
    sabotage("missing")
    told: list[str] = []
    options = ReplayOptions(timeout=0.3, give_up=2)
    report = replay([captured], "echo", libvfio_user, options=options, tell=told.append)
    assert sum(one.what == "missing" for one in report.details) == 2 and not report.same
    assert any(note.startswith("given up: 2 things") for note in report.notes)
    assert told[0].startswith("missing: channel ") and any("given up" in one for one in told)


def test_a_replay_with_the_guests_answers_and_the_providers_own_packets(
    libvfio_user: Library, tmp_path: Path, play: Play
) -> None:
    """Burst sends packets whose content nobody can foretell, and judges the guest's answers."""
    path = tmp_path / "burst.pcapng"
    with LoopbackServer(describe("burst"), libvfio_user, capture=path) as server:
        drive(server, "burst", count=200)
    report = play(path, "burst")
    assert not report.same and report.packets > 0 and {one.what for one in report.details} <= {"packet", "missing"}
    # Nothing of that is compared: the guest's own requests and their answers are.
    free = play(path, "burst", ignore_packets=True)
    assert free.same and free.sent == free.answers == 1, str(free)


def test_fault_t10_the_order_of_what_is_worked_on_at_once_is_compared_per_key(
    libvfio_user: Library, tmp_path: Path, play: Play
) -> None:
    kind, path = "support.shuffled:Shuffled", tmp_path / "shuffled.pcapng"
    got: list[bytes] = []
    provider = ProviderDescription(kind=kind, name="mine", instance=str(UUID(int=77)), options={"seed": 1})
    described = DeviceDescription(name="vmbus0", providers=[provider])
    with LoopbackServer(described, libvfio_user, capture=path) as server, VmbusDriver(server.function()) as driver:
        channel = driver.client_channel(SHUFFLED_TYPE)

        def took(_: Channel, completion: Completion, payload: bytes) -> None:
            got.append(payload)
            completion.complete()

        channel.set_process_packet_callbacks(took)
        driver.enable(channel)
        channel.allocate_packet().send(b"go......")
        driver.run_until(lambda: len(got) == KEYS * EACH, 20, "the provider's packets")
    ours = {"provider_options": {"seed": 2}}
    strict = play(path, kind, **ours)
    assert strict.differences > 10 and {one.what for one in strict.details} == {"packet"}
    found = play(path, kind, key=(0, 8), **ours)
    assert found.same and found.packets == KEYS * EACH, str(found)
    late = play(path, kind, key=(0, 8), provider_options={"seed": 2, "late": True})
    assert late.differences == 2 and {one.what for one in late.details} == {"packet"}, str(late)


def test_timed_replays_keep_the_distances(libvfio_user: Library, tmp_path: Path, play: Play) -> None:
    path = tmp_path / "slow.pcapng"
    with LoopbackPair(describe("echo"), libvfio_user, capture=path) as pair:
        guest = pair.open(workload.ECHO_TYPE)
        guest.request(workload.echo_request(0, b"a", inline=True))
        pair.advance(0.5)
        guest.request(workload.echo_request(1, b"b", inline=True))
    assert min(play(path).seconds for _ in range(3)) < play(path, timed=True).seconds - 0.3


def test_closings_and_openings_are_replayed(libvfio_user: Library, tmp_path: Path, play: Play) -> None:
    path = tmp_path / "again.pcapng"
    with LoopbackPair(describe("echo"), libvfio_user, capture=path) as pair:
        for pages in (1, 3):
            guest = pair.open(workload.ECHO_TYPE, ring_pages=pages)
            guest.request(workload.echo_request(0, b"a", inline=True))
            guest.close()
    assert events_of(path) == ["opened", "closed", "opened", "closed"]
    report = play(path)
    assert report.same and report.answers == 2


def test_what_cannot_be_replayed_is_said(captured: Path, tmp_path: Path, play: Play) -> None:
    with pytest.raises(UsageError, match="offers none of the captured channels"):
        play(captured, "burst")
    with pytest.raises(UsageError, match="there is no provider of kind 'none'"):
        play(captured, "none")
    with pytest.raises(UsageError, match="hold"):
        play(captured, provider_options={"hold": "many"})
    with pytest.raises(UsageError, match=r"no packets in .* of these channels"):
        play(captured, channels=("other",))
    data = captured.read_bytes()
    torn = tmp_path / "torn.pcapng"
    torn.write_bytes(data[: len(data) // 2])
    report = play(torn)
    assert report.same and any("ends inside this block" in note for note in report.notes)
    cut = tmp_path / "cut.pcapng"
    packet = Record(record.PACKET, 0, 0, int(PacketType.INBAND), 1, 1, b"", bytes(64), 0, b"")
    cut.write_bytes(file_of(packet, interface=THERE, cut=80))
    with pytest.raises(StateError, match="cut by the snap length"):
        play(cut)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (b"{", "no JSON object"),
        (b"[]", "no JSON object"),
        (b'{"event": "opened", "ring_to_host": 100}', "no size of a ring"),
        (b'{"event": "opened", "ring_to_host": 1099511627776}', "no size of a ring"),
        (b'{"event": "opened", "ring_to_guest": "x"}', "no size of a ring"),
    ],
)
def test_hostile_events_are_refused(tmp_path: Path, play: Play, event: bytes, message: str) -> None:
    path = tmp_path / "a.pcapng"
    path.write_bytes(file_of(Record(record.EVENT, 0, 0, 0, 0, 0, b"", event, 0, b""), interface=THERE))
    with pytest.raises(StateError, match=message):
        play(path)


def test_the_replay_command(captured: Path, sabotage: Callable[[str], None]) -> None:
    done = command("replay", captured, "--provider", "echo", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["same"] is True
    sabotage("answer")
    done = command("replay", captured, "--provider", "echo")
    assert done.exit_code == 1 and "answer: channel echo, record " in done.stdout
    assert "not JSON" in command("replay", captured, "--provider", "echo", "--options", "{").output
