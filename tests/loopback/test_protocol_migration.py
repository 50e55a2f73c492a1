"""Migration that the client drives through the protocol, between two servers and with two guest memories: the state,
the dirty reports, the state machine, and everything that is refused while the source runs on."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from support.stubborn import ANSWER, STUBBORN_TYPE
from support.traffic import PAGE, Traffic, busy
from vmbus.device import saved
from vmbus.errors import UsageError, WaitTimeout
from vmbus.memory.guest import GuestMemory
from vmbus.server.driven import _STEPS
from vmbus.server.phase import Phase
from vmbus.testkit.loopback.client import Disconnected, RemoteError, VfioUserClient
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.testkit.loopback.migration import ProtocolMigration
from vmbus.testkit.loopback.pair import LoopbackPair
from vmbus.transport import protocol
from vmbus.transport.context import Context
from vmbus.transport.library import Library
from vmbus.transport.migration import LONGEST_DATA, MigrationState
from vmbus.transport.protocol import Command, DeviceState, Feature
from vmbus.util.complaints import COMPLAINTS
from vmbus_guest.driver import VmbusDriver

pytestmark = [pytest.mark.loopback, pytest.mark.needs_migration_v2]

DESCRIPTION = describe("echo", "burst", echo={"hold": 8, "hold_seconds": 0.01})
RAM = 8 << 20


class Vm(LoopbackPair):
    """A guest that moves from server to server."""

    def __init__(self, library: Library, **options: dict) -> None:
        self.servers: list[LoopbackServer] = []
        super().__init__(describe("echo", "burst", **options) if options else DESCRIPTION, library, ram_size=RAM)

    def new_server(self, *, awaiting: bool = False) -> LoopbackServer:
        server = LoopbackServer(self.description, self.library, awaiting=awaiting)
        self.servers.append(server)
        return server

    def moved_to(self, server: LoopbackServer) -> None:
        """The guest is there; the old server ends."""
        self.server.stop()
        self.server = server

    def close(self) -> None:
        super().close()
        for server in self.servers:
            server.stop()


@pytest.fixture
def vm(libvfio_user: Library) -> Iterator[Vm]:
    with Vm(libvfio_user) as vm:
        yield vm


def stopped(vm: Vm, chunk: int = 4096) -> tuple[ProtocolMigration, bytes]:
    """A migration up to where the device stands still, all memory is copied and its state is read."""
    migration = ProtocolMigration(vm.function)
    migration.begin()
    migration.stop()
    migration.copy_again()
    return migration, migration.read(chunk)


def goes_on(vm: Vm, migration: ProtocolMigration, data: bytes, chunk: int = 4096) -> None:
    """The guest goes on at a new server."""
    destination = vm.new_server()
    migration.run(migration.load(destination.socket_path, data, chunk))
    vm.moved_to(destination)


def wait_until(server: LoopbackServer, condition: Callable[[], bool], what: str) -> None:
    """Only the server works meanwhile. What `on_loop` gets through is proof that its loop goes round."""
    for _ in range(20_000):
        if server.on_loop(condition):
            return
    raise AssertionError(f"in vain: {what}")


def write(client: VfioUserClient, data: bytes) -> None:
    for start in range(0, len(data), 4096):
        client.write_migration_data(data[start : start + 4096])


def refused(code: int) -> pytest.RaisesExc:
    return pytest.raises(RemoteError, check=lambda error: error.errno == code)


# ---- whole migrations ------------------------------------------------------------------------------------------------


def test_there_and_on_in_mid_traffic(vm: Vm) -> None:
    choose = random.Random(4)
    traffic = Traffic(vm.driver, hold=30, window=60, ring_pages_in=1, ring_pages_out=1)
    traffic.start(3000, 3000, size=60, window=400)
    generations, reported, most = 0, 0, [0, 0]
    while generations < 20 and not traffic.burst.finished:
        traffic.some(choose)
        migration = ProtocolMigration(vm.function)
        migration.begin()
        for _ in range(choose.randrange(3)):
            migration.copy_again()
        migration.stop()
        migration.copy_again()
        # Compared outside of the assertion: where CI is set, pytest would diff megabytes.
        same = bytes(migration.memory) == bytes(vm.function.ram)
        assert same, "guest memory differs from its copy outside of what was reported"
        data = migration.read(choose.choice([97, 1000, 4096, 65536, 1 << 20]))
        migration.release()
        counts = saved.count_packets(saved.decode(data))
        most = [max(most[0], counts.queued), max(most[1], counts.sent)]
        destination = vm.new_server(awaiting=generations % 2 == 1)
        client = migration.load(destination.socket_path, data, choose.choice([97, 1000, 4096, LONGEST_DATA]))
        migration.run(client)
        vm.moved_to(destination)
        assert destination.command("status")["packets"]["queued"] >= 0
        generations += 1
        reported += migration.copied
    print(f"{generations} generations, up to {most} packets queued and sent, {reported} pages reported")
    assert generations > 10 and min(most) >= 20, (generations, most)
    assert reported > 0
    traffic.finish()
    status = vm.server.command("status")
    assert status["providers"]["burst"]["tally"]["completed"] == 3000
    assert status["providers"]["burst"]["restored"] > 100
    assert status["providers"]["echo"]["tally"]["completed"] == 3000
    assert vm.driver.rescinded == [] and vm.driver.failures == []


def test_pieces_of_a_byte(vm: Vm) -> None:
    traffic = Traffic(vm.driver)
    traffic.start(100, 100)
    traffic.finish()
    migration, data = stopped(vm, 1)
    goes_on(vm, migration, data, 1)
    traffic.start(100, 0)
    vm.driver.run_until(lambda: traffic.echo.finished, 10, "the echoes after the migration")
    traffic.echo.check()


def test_the_state_is_that_of_the_command_save(vm: Vm) -> None:
    traffic = busy(vm.driver)
    by_command = vm.server.save()
    # Nothing moves between the two: the guest stands still, and a paused server takes no turn.
    vm.server.on_loop(lambda: setattr(vm.server.server, "_phase", Phase.RUNNING))
    migration = ProtocolMigration(vm.function)
    migration.stop()
    data = migration.read(1000)
    same = saved.decode(data) == by_command
    assert same, "the states differ"
    assert saved.encode(by_command) == data or pytest.fail("the same state, and other bytes")
    # What the client reads can be had as a file, too; before, while and after it is read.
    for number in range(2):
        status = vm.server.command("status")
        assert status["phase"] == "driven"
        report = vm.server.command("save", path=str(vm.server.directory / f"given-{number}"))
        assert (report["bytes"], report["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert status["packets"] == report["packets"]
        if not number:
            migration.release()
    migration.cancel()
    with pytest.raises(UsageError, match="needs a server that is paused"):
        vm.server.command("save", path=str(vm.server.directory / "given-3"))
    traffic.finish()


def test_a_migration_that_is_given_up_leaves_no_trace(vm: Vm) -> None:
    choose = random.Random(9)
    traffic = Traffic(vm.driver, ring_pages_in=1, ring_pages_out=1)
    traffic.start(1500, 1500)
    for round_ in range(12):
        traffic.some(choose)
        migration = ProtocolMigration(vm.function)
        migration.begin()
        if round_ % 4 > 0:
            migration.copy_again()
        if round_ % 4 > 1:
            migration.stop()
        if round_ % 4 > 2:
            migration.read(5000)
        migration.cancel()
        assert vm.function.client.migration_state() is DeviceState.RUNNING
        assert vm.server.on_loop(lambda: vm.server.server.device.memory.log) is None
    traffic.finish()


def test_what_came_in_goes_out_again_when_it_never_ran(vm: Vm) -> None:
    """A VM that is restored, not started, and saved again."""
    traffic = busy(vm.driver)
    migration, data = stopped(vm)
    middle, end = vm.new_server(awaiting=True), vm.new_server()
    client = migration.load(middle.socket_path, data, 4096)
    client.set_migration_state(DeviceState.STOP_COPY)
    again = b"".join(iter(lambda: client.read_migration_data(4096), b""))
    assert again == data or pytest.fail("it changed on the way")
    client.close()
    migration.run(migration.load(end.socket_path, again, 4096))
    vm.moved_to(end)
    traffic.finish()


def test_a_running_device_is_replaced(vm: Vm) -> None:
    """Going back in place: the server has a life already, and the guest returns to an earlier one."""
    traffic = busy(vm.driver)
    migration, data = stopped(vm)
    client = vm.function.client
    client.set_migration_state(DeviceState.RUNNING)
    client.logging_stop()
    wait_until(vm.server, lambda: not vm.server.server.device.busy, "the server to come to rest")
    client.set_migration_state(DeviceState.RESUMING)
    vm.function.ram[:] = migration.memory
    write(client, data)
    client.set_migration_state(DeviceState.RUNNING)
    traffic.finish()
    assert vm.server.command("status")["providers"]["burst"]["restored"] > 100


# ---- guest memory ----------------------------------------------------------------------------------------------------


def only_the_server(vm: Vm) -> Traffic:
    """A backlog in the rings that nobody has taken yet."""
    traffic = Traffic(vm.driver, hold=1 << 30, ring_pages_in=4, ring_pages_out=4)
    traffic.echo.window = 40
    vm.server.command("pause")
    traffic.start(40, 3000, size=200, window=500)
    vm.function.barrier()
    return traffic


def let_it_work(vm: Vm) -> None:
    """The server alone, until nothing moves any more."""
    vm.server.command("resume")
    echo, burst = vm.server.server.providers
    wait_until(vm.server, lambda: echo.tally.completed == 40 and not echo._held, "the echoes")
    wait_until(vm.server, lambda: burst.channel.packets_queued >= 100, "the host's packets")


@pytest.mark.parametrize("reported", [True, False])
def test_sabotage_skipping_the_dirty_report(vm: Vm, reported: bool, caplog: pytest.LogCaptureFixture) -> None:
    traffic = only_the_server(vm)
    client = vm.function.client
    migration = ProtocolMigration(vm.function)
    migration.begin()
    let_it_work(vm)
    migration.stop()
    if reported:
        assert len(migration.copy_again()) >= 10
    same = bytes(migration.memory) == bytes(vm.function.ram)
    assert same is reported
    data = migration.read(4096)
    if not reported:
        with refused(errno.EBUSY):
            migration.release()
        assert "never reported" in caplog.text
        assert client.migration_state() is DeviceState.STOP_COPY
        migration.cancel()
        traffic.burst.hold = 20
        traffic.finish()
        return
    migration.release()
    goes_on(vm, migration, data)
    traffic.burst.hold = 20
    traffic.finish()


def test_sabotage_moving_on_without_the_dirty_report_is_found_out(vm: Vm) -> None:
    """A client that does not even end the save in order: then the books tell, as for any VMM that forgets pages."""
    traffic = only_the_server(vm)
    migration = ProtocolMigration(vm.function)
    migration.begin()
    let_it_work(vm)
    migration.stop()
    data = migration.read(4096)
    goes_on(vm, migration, data)
    traffic.burst.hold = 20
    with pytest.raises((Exception, AssertionError)) as caught:
        traffic.finish(timeout=1.0)
    books = (traffic.echo.tally, traffic.burst.tally)
    assert vm.driver.rescinded or isinstance(caught.value, WaitTimeout) or not all(one.good for one in books)


def test_each_page_is_reported_once_per_write(vm: Vm) -> None:
    only_the_server(vm)
    vm.function.client.logging_start()
    let_it_work(vm)
    vm.server.command("pause")
    first = {page for iova, size in vm.function.maps.items() for page in vm.function.client.dirty_pages(iova, size)}
    again = {page for iova, size in vm.function.maps.items() for page in vm.function.client.dirty_pages(iova, size)}
    assert len(first) >= 10 and not again
    vm.function.client.logging_stop()
    vm.server.command("resume")


def test_pages_are_reported_with_the_unmapping(vm: Vm) -> None:
    only_the_server(vm)
    client = vm.function.client
    client.logging_start()
    let_it_work(vm)
    vm.server.command("pause")
    pages = vm.server.on_loop(lambda: set(vm.server.server.device.memory.log.pages))
    reported: set[int] = set()
    for iova, size in vm.function.maps.items():
        reported |= set(client.dma_unmap_dirty(iova, size))
    assert {page * PAGE for page in pages} == reported
    assert vm.server.on_loop(lambda: vm.server.server.device.memory.log.broken) is None


def test_unmapping_written_memory_unreported_ends_the_pass(vm: Vm, caplog: pytest.LogCaptureFixture) -> None:
    traffic = only_the_server(vm)
    extra = vm.function.allocate(PAGE)
    client = vm.function.client
    client.logging_start()
    client.set_migration_state(DeviceState.PRE_COPY)
    let_it_work(vm)
    # A mapping that nothing of the guest's needs, with a page in it that the server wrote.
    far = vm.function._iova_base + (64 << 20)
    client.dma_map(far, 1 << 20, vm.function.memory_fd, 0)
    vm.server.on_loop(lambda: vm.server.server.device.memory.write(far, vm.function.ram[:4].tobytes()))
    client.dma_unmap(far, 1 << 20)
    for attempt in (lambda: client.set_migration_state(DeviceState.STOP_COPY), lambda: report_all(vm)):
        with refused(errno.EIO):
            attempt()
    assert "unmapped" in caplog.text and "LOGGING_START" in caplog.text
    assert client.migration_state() is DeviceState.PRE_COPY
    client.set_migration_state(DeviceState.RUNNING)
    client.logging_stop()
    vm.function.free(extra)
    # The next pass works.
    migration, data = stopped(vm)
    goes_on(vm, migration, data)
    traffic.burst.hold = 20
    traffic.finish()


def report_all(vm: Vm) -> None:
    for iova, size in vm.function.maps.items():
        vm.function.client.dirty_pages(iova, size)


# ---- sabotage of the state -------------------------------------------------------------------------------------------


@dataclass
class Damage:
    what: str
    do: Callable[[bytes], bytes]
    message: str


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


DAMAGES = [
    Damage("a byte is lost", lambda data: data[:5000] + data[5001:], "where its head says"),
    Damage("the last byte is lost", lambda data: data[:-1], "where its head says"),
    Damage("cut in half", lambda data: data[: len(data) // 2], "where its head says"),
    Damage("only the head", lambda data: data[:40], "cut short"),
    Damage("nothing", lambda data: b"", "cut short"),
    Damage("a byte is changed", lambda data: flip(data, 6000), "SHA-256 does not match"),
    Damage("a byte too much", lambda data: data + b"\0", "more than the"),
    Damage("twice", lambda data: data + data, "more than the"),
    Damage("another magic", lambda data: flip(data, 0), "is not device state"),
    Damage("another version", lambda data: flip(data, 8), "format version"),
    Damage("a huge length", lambda data: data[:16] + b"\xff" * 8 + data[24:], "at most"),
    Damage("noise", lambda data: random.Random(5).randbytes(len(data)), "is not device state"),
    Damage(
        "of another device",
        lambda data: saved.encode(saved.msgspec.structs.replace(saved.decode(data), device="other")),
        "the state is of device",
    ),
    Damage(
        "of another function",
        lambda data: saved.encode(saved.msgspec.structs.replace(saved.decode(data), config=bytes(256))),
        "is not this function's",
    ),
    Damage(
        "a provider is missing",
        lambda data: saved.encode(
            saved.msgspec.structs.replace(saved.decode(data), providers=saved.decode(data).providers[:1])
        ),
        "restore with the description",
    ),
]


def test_sabotage_a_damaged_state_is_refused_and_the_source_runs_on(vm: Vm, caplog: pytest.LogCaptureFixture) -> None:
    traffic = busy(vm.driver)
    migration, data = stopped(vm)
    fresh, awaiting = vm.new_server(), vm.new_server(awaiting=True)
    for damage in DAMAGES:
        for destination, phase in ((fresh, "running"), (awaiting, "awaiting")):
            caplog.clear()
            COMPLAINTS.refill()
            with refused(errno.EINVAL):
                client = migration.load(destination.socket_path, damage.do(data), 3000)
                try:
                    client.set_migration_state(DeviceState.RUNNING)
                finally:
                    client.close()
            assert damage.message in caplog.text, damage.what
            wait_until(destination, lambda server=destination: not server.server.context.attached, "the client's end")
            assert destination.command("status")["phase"] == phase, damage.what
            assert destination.command("status")["migration"] == {"state": "running", "complete": False}
    # After all that, the good one.
    client = migration.load(fresh.socket_path, data, 3000)
    client.close()
    migration.cancel()
    traffic.finish()


def test_after_a_refusal_the_state_can_be_written_again(vm: Vm) -> None:
    traffic = busy(vm.driver)
    migration, data = stopped(vm)
    destination = vm.new_server()
    client = migration.load(destination.socket_path, data[:-1], 3000)
    with refused(errno.EINVAL):
        client.set_migration_state(DeviceState.RUNNING)
    assert client.migration_state() is DeviceState.RESUMING
    write(client, data)
    with refused(errno.EINVAL):
        client.write_migration_data(b"one more")
    write(client, data)
    migration.run(client)
    vm.moved_to(destination)
    traffic.finish()


def test_without_guest_memory_the_device_does_not_run(vm: Vm, caplog: pytest.LogCaptureFixture) -> None:
    traffic = busy(vm.driver)
    migration = ProtocolMigration(vm.function)
    migration.begin()
    migration.stop()
    data = migration.read(4096)
    destination = vm.new_server()
    with VfioUserClient(destination.socket_path) as client:
        client.set_migration_state(DeviceState.RESUMING)
        write(client, data)
        with refused(errno.EINVAL):
            client.set_migration_state(DeviceState.RUNNING)
        assert client.migration_state() is DeviceState.STOP and "not mapped" in caplog.text
        assert destination.command("status")["phase"] == "driven"
    migration.cancel()
    traffic.finish()


# ---- the state machine -----------------------------------------------------------------------------------------------

_WIRE = {
    MigrationState.STOP: DeviceState.STOP,
    MigrationState.RUNNING: DeviceState.RUNNING,
    MigrationState.STOP_COPY: DeviceState.STOP_COPY,
    MigrationState.PRE_COPY: DeviceState.PRE_COPY,
    MigrationState.RESUMING: DeviceState.RESUMING,
}


def test_our_steps_are_those_of_the_library(vm: Vm) -> None:
    """From every state to every other: the library leads through our table, and both say the same at the end."""
    client = vm.function.client
    driven = vm.server.server.driven
    assert len(_STEPS) == 9
    for start in (MigrationState.STOP, MigrationState.STOP_COPY, MigrationState.PRE_COPY, MigrationState.RUNNING):
        for end in _WIRE:
            client.set_migration_state(_WIRE[start])
            assert driven.state is start
            legal = not (start is MigrationState.STOP_COPY and end is MigrationState.PRE_COPY)
            if legal:
                client.set_migration_state(_WIRE[end])
            else:
                with refused(errno.EINVAL):
                    client.set_migration_state(_WIRE[end])
            assert _WIRE[driven.state] is client.migration_state()
            if driven.state is MigrationState.RESUMING:
                # Without a state there is no way out of it, except to hang up.
                for wanted in _WIRE.values():
                    if wanted is not DeviceState.RESUMING:
                        with refused(errno.EINVAL):
                            client.set_migration_state(wanted)
                vm.function.reconnect(vm.server.socket_path, None)
                client = vm.function.client
            client.set_migration_state(DeviceState.RUNNING)
    assert vm.server.command("status")["phase"] == "running"


@pytest.mark.parametrize("steps", [[s for s in _WIRE.values() if s is not DeviceState.RUNNING][:n] for n in (1, 2, 4)])
def test_a_client_that_leaves_takes_its_migration_with_it(vm: Vm, steps: list[DeviceState]) -> None:
    traffic = Traffic(vm.driver)
    traffic.start(50, 50)
    traffic.finish()
    client = vm.function.client
    client.logging_start()
    for state in steps:
        if state is DeviceState.PRE_COPY:
            client.set_migration_state(DeviceState.RUNNING)
        if state is DeviceState.RESUMING:
            client.logging_stop()
        client.set_migration_state(state)
    vm.function.close()
    with vm.server.function(ram_size=RAM) as function:
        assert function.client.migration_state() is DeviceState.RUNNING
        status = vm.server.command("status")
        assert (status["phase"], status["migration"]["state"]) == ("running", "running")
        assert vm.server.on_loop(lambda: vm.server.server.device.memory.log) is None
        traffic = Traffic(VmbusDriver(function))
        traffic.start(50, 50)
        traffic.finish()


def feature(number: int, operation: int, data: bytes, room: int = 0) -> Callable[[VfioUserClient], object]:
    return lambda client: client.feature(number, operation, data, room=room)


HOSTILE: dict[str, Callable[[VfioUserClient], object]] = {
    "a state that does not exist": lambda client: client.set_migration_state(8),
    "a state far away": lambda client: client.set_migration_state(0xFFFF_FFFF),
    "into ERROR": lambda client: client.set_migration_state(DeviceState.ERROR),
    "into RUNNING_P2P": lambda client: client.set_migration_state(5),
    "into PRE_COPY_P2P": lambda client: client.set_migration_state(7),
    "no state at all": feature(Feature.DEVICE_STATE, protocol.FEATURE_SET, b""),
    "half a state": feature(Feature.DEVICE_STATE, protocol.FEATURE_SET, b"\1\0\0\0"),
    "a feature that does not exist": feature(99, protocol.FEATURE_GET, b"", 8),
    "setting the flags": feature(Feature.MIGRATION, protocol.FEATURE_SET, bytes(8)),
    "a log without words": feature(Feature.LOGGING_START, protocol.FEATURE_SET, b""),
    "a log of large pages": lambda client: client.logging_start(8192),
    "a log of small pages": lambda client: client.logging_start(512),
    "a log of no pages": lambda client: client.logging_start(0),
    "reading while it runs": lambda client: client.read_migration_data(100),
    "writing while it runs": lambda client: client.write_migration_data(b"x"),
    "an empty feature": lambda client: client.request(Command.DEVICE_FEATURE, b"\0"),
    "an empty read": lambda client: client.request(Command.MIG_DATA_READ, b"\0"),
    "a read with too little room": lambda client: client.request(
        Command.MIG_DATA_READ, protocol.MIGRATION_DATA.pack(8, 100)
    ),
    "a write of less than it says": lambda client: client.request(
        Command.MIG_DATA_WRITE, protocol.MIGRATION_DATA.pack(108, 100) + bytes(50)
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_nonsense_is_refused_and_changes_nothing(vm: Vm, what: str) -> None:
    traffic = busy(vm.driver)
    with refused(errno.EINVAL):
        HOSTILE[what](vm.function.client)
    assert vm.function.client.migration_state() is DeviceState.RUNNING
    assert vm.server.on_loop(lambda: vm.server.server.device.memory.log) is None
    traffic.finish()


def test_any_words_about_migration_leave_a_server_that_serves(vm: Vm) -> None:
    """Random features, operations, lengths and contents; whatever they did, the next client gets a device."""
    choose = random.Random(16)
    traffic = Traffic(vm.driver)
    traffic.start(50, 50)
    traffic.finish()
    answered = 0
    for _ in range(20):
        with contextlib.suppress(Disconnected):
            for _ in range(40):
                command = choose.choice([Command.DEVICE_FEATURE] * 4 + [Command.MIG_DATA_READ, Command.MIG_DATA_WRITE])
                number = choose.choice([*Feature, choose.randrange(20)]) | choose.choice([1, 1, 1, 2, 4, 3, 7, 9]) << 16
                words = [choose.choice([24, 40, 4096, choose.getrandbits(32)]), number]
                words += [choose.choice([0, 1, 2, 3, 4, 6, 8, PAGE, choose.getrandbits(32)]) for _ in range(8)]
                body = struct.pack("<10I", *words)[: choose.choice([1, 7, 8, 12, 16, 24, 31, 32, 40])]
                try:
                    vm.function.client.request(command, body)
                    answered += 1
                except RemoteError:
                    pass
        vm.function.reconnect(vm.server.socket_path, None)
    assert answered > 20
    vm.function.close()
    with vm.server.function(ram_size=RAM) as function:
        traffic = Traffic(VmbusDriver(function))
        traffic.start(50, 50)
        traffic.finish()


def test_reports_that_cannot_be_given(vm: Vm) -> None:
    traffic = busy(vm.driver)
    client = vm.function.client
    (iova, size), *_ = vm.function.maps.items()
    with refused(errno.EINVAL):
        client.dirty_pages(iova, size)  # no log runs
    client.logging_start()
    client.logging_start()  # a second time: nothing happens
    for page_size in (512, 8192, 1 << 20, 3000):
        with refused(errno.EINVAL):
            client.dirty_pages(iova, size, page_size)
    for place, length in ((iova, size // 2), (iova + PAGE, size - PAGE), (iova - size, size), (iova, 2 * size)):
        with pytest.raises(RemoteError):
            client.dirty_pages(place, length)
    short = protocol.LOGGING_REPORT.pack(iova, size, PAGE)
    with refused(errno.EINVAL):
        client.feature(Feature.LOGGING_REPORT, protocol.FEATURE_GET, short, room=len(short) + 8)
    with refused(errno.EINVAL):
        client.feature(Feature.LOGGING_REPORT, protocol.FEATURE_GET, short[:20])
    # None of that took a page out of the log.
    pages = vm.server.on_loop(lambda: len(vm.server.server.device.memory.log.pages))
    traffic.burst.complete_one()
    assert sum(len(client.dirty_pages(iova, size)) for iova, size in vm.function.maps.items()) >= pages
    client.logging_stop()
    client.logging_stop()
    traffic.finish()


def test_what_is_no_longer_possible_while_the_client_has_the_device(vm: Vm) -> None:
    traffic = busy(vm.driver)
    client = vm.function.client
    client.set_migration_state(DeviceState.STOP)
    for command, arguments in (
        ("pause", {}),
        ("resume", {}),
        ("save", {"path": str(vm.server.directory / "state")}),
        ("flush", {}),
        ("rescind", {"name": "echo"}),
        ("restore-finish", {}),
        ("load", {"path": "x", "sha256": "y"}),
    ):
        with pytest.raises(UsageError, match="this one is driven"):
            vm.server.command(command, **arguments)
    client.set_migration_state(DeviceState.RUNNING)
    # And the other way round.
    vm.server.command("pause")
    with refused(errno.EBUSY):
        client.set_migration_state(DeviceState.STOP)
    client.set_migration_state(DeviceState.PRE_COPY)
    with refused(errno.EBUSY):
        client.set_migration_state(DeviceState.STOP_COPY)
    client.set_migration_state(DeviceState.RUNNING)
    vm.server.command("resume")
    vm.server.command("log-start")
    with refused(errno.EBUSY):
        client.logging_start()
    client.set_migration_state(DeviceState.STOP)
    with refused(errno.EBUSY):
        client.set_migration_state(DeviceState.RESUMING)
    client.set_migration_state(DeviceState.RUNNING)
    vm.server.command("log-stop")
    client.logging_start()
    with pytest.raises(UsageError, match="running already"):
        vm.server.command("log-start")
    client.logging_stop()
    traffic.finish()


def test_an_awaiting_server_has_nothing_to_give_and_nothing_to_run(libvfio_user: Library) -> None:
    with (
        LoopbackServer(DESCRIPTION, libvfio_user, awaiting=True) as server,
        VfioUserClient(server.socket_path) as client,
    ):
        for state in (DeviceState.STOP_COPY, DeviceState.RUNNING):
            client.set_migration_state(DeviceState.STOP)
            with refused(errno.EINVAL):
                client.set_migration_state(state)
        assert client.migration_state() is DeviceState.STOP
        assert server.command("status")["phase"] == "driven"
        client.close()
        wait_until(server, lambda: not server.server.context.attached, "the client's end")
        assert server.command("status")["phase"] == "awaiting"
        assert server.server.device.frozen


# ---- providers that take their time ----------------------------------------------------------------------------------


def stubborn(library: Library, kind: str, *, external: bool = False) -> tuple[LoopbackServer, VmbusDriver, list[bytes]]:
    """A server whose provider holds five requests; with `external`, also memory of theirs (`driver.lent`)."""
    server = LoopbackServer(describe(f"support.stubborn:{kind}"), library)
    driver = VmbusDriver(server.function(ram_size=RAM))
    channel = driver.client_channel(STUBBORN_TYPE)
    driver.enable(channel)
    replies: list[bytes] = []
    lent = driver.lent = driver.allocate(5 * PAGE)
    for number in range(5):
        packet = channel.allocate_packet()
        packet.completion_routine = lambda packet, status, reply: replies.append(reply)
        packet.send(b"wait", external=driver.external(lent, number * PAGE, PAGE) if external else None)
    wait_until(server, lambda: len(server.server.providers[0].held) == 5, "the requests")
    return server, driver, replies


@pytest.fixture
def own_description(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of providers are theirs; these have a colon in theirs."""
    import vmbus.testkit.loopback.harness as harness

    real = harness.ProviderDescription
    monkeypatch.setattr(
        harness,
        "ProviderDescription",
        lambda kind, name, instance, options: real(kind, name.rpartition(":")[2].lower(), instance, options),
    )


@pytest.mark.usefixtures("own_description")
def test_timers_of_providers_run_while_the_client_waits(libvfio_user: Library) -> None:
    server, driver, replies = stubborn(libvfio_user, "Late")
    with server, driver:
        client = driver.function.client
        client.set_migration_state(DeviceState.STOP_COPY)
        assert server.server.providers[0].held == []
        assert server.command("save", path=str(server.directory / "copy"))["incoming_held"] == 5
        state = saved.decode(b"".join(iter(lambda: client.read_migration_data(4096), b"")))
        assert len(state.channels) == 1
        client.set_migration_state(DeviceState.RUNNING)
        driver.run_until(lambda: len(replies) == 5, 10, "the answers")


@pytest.mark.usefixtures("own_description")
@pytest.mark.parametrize("missing", ["", "the library is not told", "lent memory is reported once"])
def test_memory_lent_to_a_provider_is_reported_again_while_it_has_it(
    libvfio_user: Library, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "the library is not told":
        monkeypatch.setattr(Context, "mark_dirty", lambda *_: None)
    elif missing:
        real = GuestMemory.take_dirty
        monkeypatch.setattr(
            GuestMemory, "take_dirty", lambda self, iova, size, **_: real(self, iova, size, written_on=False)
        )
    server, driver, replies = stubborn(libvfio_user, "Late", external=True)
    with server, driver:
        # The provider got the memory before the log began, and writes it long after the first report, without a word.
        function = driver.function
        migration = ProtocolMigration(function)
        migration.begin()
        assert bool(migration.copy_again()) is (missing != "the library is not told")
        assert bool(migration.copy_again()) is not bool(missing)
        migration.stop()
        migration.copy_again()
        assert function.ram[function.place_of(driver.lent.iova) :][:4].tobytes() == ANSWER
        same = bytes(migration.memory) == bytes(function.ram)
        assert same is not bool(missing)
        assert migration.copy_again() == [], "nothing is written any more"
        migration.cancel()
        driver.run_until(lambda: len(replies) == 5, 10, "the answers")


@pytest.mark.usefixtures("own_description")
@pytest.mark.parametrize("by", [DeviceState.STOP, DeviceState.PRE_COPY])
def test_a_provider_that_never_lets_go_keeps_the_device_running(
    libvfio_user: Library, by: DeviceState, caplog: pytest.LogCaptureFixture
) -> None:
    server, driver, replies = stubborn(libvfio_user, "Never")
    with server, driver:
        server.server.driven.stop_seconds = 0.2
        client = driver.function.client
        if by is DeviceState.PRE_COPY:
            client.set_migration_state(by)
        with refused(errno.ETIMEDOUT):
            client.set_migration_state(DeviceState.STOP_COPY)
        assert "waited 0.2 s in vain for the owners of channels" in caplog.text
        expected = DeviceState.PRE_COPY if by is DeviceState.PRE_COPY else DeviceState.RUNNING
        assert client.migration_state() is expected
        assert server.command("status")["phase"] == "running"
        server.on_loop(server.server.providers[0].release)
        driver.run_until(lambda: len(replies) == 5, 10, "the answers")
        client.set_migration_state(DeviceState.STOP_COPY)
        client.set_migration_state(DeviceState.RUNNING)


@pytest.mark.usefixtures("own_description")
@pytest.mark.parametrize("by", [DeviceState.STOP, DeviceState.PRE_COPY])
def test_a_provider_that_fails_in_save(
    libvfio_user: Library, by: DeviceState, caplog: pytest.LogCaptureFixture
) -> None:
    server, driver, replies = stubborn(libvfio_user, "Late")
    with server, driver:
        provider = server.server.providers[0]
        provider.fail_in_save = True
        client = driver.function.client
        client.set_migration_state(by)
        with refused(errno.EIO):
            client.set_migration_state(DeviceState.STOP_COPY)
        assert "a defect in save" in caplog.text
        assert client.migration_state() is by
        assert server.command("status")["phase"] == ("driven" if by is DeviceState.STOP else "running")
        client.set_migration_state(DeviceState.RUNNING)
        driver.run_until(lambda: len(replies) == 5, 10, "the answers")
