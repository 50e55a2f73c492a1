"""Save and restore over the real transport, in mid-traffic, many times; the dirty log that a live save relies on."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator

import pytest

from support.traffic import PAGE, Traffic, busy
from vmbus.device import pci, saved
from vmbus.device.pci import COMMAND, COMMAND_BUS_MASTER
from vmbus.errors import StateError, UsageError
from vmbus.memory.guest import DirtyLogBroken
from vmbus.server.app import DeviceServer
from vmbus.testkit.loopback.function import LoopbackFunction
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.testkit.loopback.pair import LoopbackPair
from vmbus.transport import bindings
from vmbus.transport.library import Library
from vmbus.util import pieces
from vmbus.wire.synic import CONTROL_RESET, Register
from vmbus_guest.driver import VmbusDriver

DESCRIPTION = describe("echo", "burst", echo={"hold": 8, "hold_seconds": 0.01})


class Vm(LoopbackPair):
    """`most`: packets queued and sent at a save."""

    def __init__(self, library: Library) -> None:
        super().__init__(DESCRIPTION, library)
        self.most = [0, 0]

    def ended(self) -> saved.DeviceState:
        """The device's state; the server is ended."""
        state = self.save()
        self.server.stop()
        return state

    def next_generation(self) -> None:
        state = self.save()
        counts = saved.count_packets(state)
        self.most = [max(self.most[0], counts.queued), max(self.most[1], counts.sent)]
        assert self.restore(state)["packets"] == {"queued": counts.queued, "sent": counts.sent}


@pytest.fixture
def vm(libvfio_user: Library) -> Iterator[Vm]:
    with Vm(libvfio_user) as vm:
        yield vm


def test_many_generations_in_mid_traffic(vm: Vm) -> None:
    choose = random.Random(42)
    traffic = Traffic(vm.driver, hold=30, window=60, ring_pages_in=1, ring_pages_out=1)
    traffic.start(3000, 3000, size=60, window=400)
    generations = 0
    while generations < 30 and not traffic.burst.finished:
        traffic.some(choose)
        vm.next_generation()
        generations += 1
    assert generations > 15 and min(vm.most) >= 20, (generations, vm.most)
    traffic.finish()
    status = vm.server.command("status")
    assert status["providers"]["burst"]["tally"]["completed"] == 3000
    assert status["providers"]["burst"]["restored"] > 100
    assert status["providers"]["echo"]["tally"]["completed"] == 3000
    assert vm.driver.rescinded == [] and vm.driver.failures == []


# ---- in turns: see also test_hostile_many.py -------------------------------------------------------------------------


def during(server: DeviceServer, command: str, act: Callable[[asyncio.Task], Awaitable[object]], **arguments) -> tuple:
    """The command's result, and those of `act`, which is called between any two of its turns."""

    async def run() -> tuple:
        task = asyncio.ensure_future(server.command(command, arguments))
        found = []
        while not task.done():
            found.append(await act(task))
            await asyncio.sleep(0)
        return await asyncio.gather(task, return_exceptions=True), found

    return asyncio.run_coroutine_threadsafe(run(), server.loop).result(30)


def test_fault_h17_tools_are_answered_in_between_and_the_client_is_not(vm: Vm, monkeypatch) -> None:
    monkeypatch.setattr(pieces, "TURN_SECONDS", 0.0)
    traffic = Traffic(vm.driver, hold=30, window=60, ring_pages_in=1, ring_pages_out=1)
    traffic.start(300, 300, size=60, window=400)
    traffic.driver.step(0.01)
    state = vm.ended()
    vm.server = LoopbackServer(DESCRIPTION, vm.library, restore=state)
    vm.function.reconnect(vm.server.socket_path, state.config)
    server = vm.server.server
    looks, refused = [], []

    async def look(_: asyncio.Task) -> str:
        status = await server.command("status", {})
        document = await server.command("inspect", {})
        assert document["server"].phase == status["phase"]
        looks.append(status["resets"])
        if len(looks) == 3:
            refused.append(asyncio.ensure_future(server.command("restore-finish", {})))
            reset = CONTROL_RESET.to_bytes(4, "little")
            vm.function.client.region_write(bindings.REGION_BAR0, Register.CONTROL, reset, posted=True)
        return status["phase"]

    (restored,), seen = during(server, "restore-finish", look)
    assert restored["packets"]["sent"] == saved.count_packets(state).sent
    assert len(seen) > 10 and set(seen) == {"restoring"} and len(set(looks)) == 1, (seen, looks)
    with pytest.raises(UsageError, match="running"):
        vm.server.on_loop(lambda: refused[0].result())
    vm.function.barrier()
    assert vm.server.command("status")["resets"] > looks[0]  # it had waited


@pytest.mark.parametrize("turns", [1, 2, 5])
def test_fault_h17_a_restore_that_is_called_off_leaves_nothing_half_done(vm: Vm, monkeypatch, turns: int) -> None:
    monkeypatch.setattr(pieces, "TURN_SECONDS", 0.0)
    Traffic(vm.driver).start(10, 10)
    state = vm.ended()
    vm.server = LoopbackServer(DESCRIPTION, vm.library, restore=state)
    vm.function.reconnect(vm.server.socket_path, state.config)
    passed = []

    async def call_off(task: asyncio.Task) -> None:
        passed.append(1)
        if len(passed) > turns:
            task.cancel()

    (error,), _ = during(vm.server.server, "restore-finish", call_off)
    status = vm.server.command("status")
    assert isinstance(error, asyncio.CancelledError) and status["phase"] == "restoring" and status["resets"]
    channels = vm.server.on_loop(lambda: vm.server.server.device.channels)
    assert status["bus"] == "disconnected" and not any(channel.link for channel in channels)


# ---- sabotage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("byte", [None, pci.COMMAND, pci.MSI_ADDRESS_LOW, pci.MSI_DATA, pci.BAR0 + 2])
def test_without_the_whole_pci_replay_the_restore_is_refused(vm: Vm, byte: int | None) -> None:
    traffic = busy(vm.driver)
    state = vm.ended()
    wrong = None
    if byte is not None:
        wrong = state.config[:byte] + bytes([state.config[byte] ^ 4]) + state.config[byte + 1 :]
    with pytest.raises(StateError, match="not put back"):
        vm.restore(state, config=wrong)
    assert vm.server.command("status")["phase"] == "restoring"
    vm.function.client.set_eventfds(bindings.IRQ_MSI, [vm.function.interrupt_fd])
    for offset, size, value in pci.replay_writes(state.config):
        vm.function.config_write(offset, value.to_bytes(size, "little"))
    vm.server.command("restore-finish")
    traffic.finish()


def test_a_state_restored_onto_other_memory_is_refused(vm: Vm) -> None:
    busy(vm.driver)
    state = vm.ended()
    server = LoopbackServer(DESCRIPTION, vm.library, restore=state)
    with server, LoopbackFunction(server.socket_path):
        with pytest.raises(StateError, match="not mapped"):
            server.command("restore-finish")
        assert server.command("status")["phase"] == "restoring", "it can be tried again"
    vm.restore(state)


# ---- the dirty log ---------------------------------------------------------------------------------------------------


class Migration:
    """What QEMU does with memory, on the guest's memfd: a full copy, then what it is told to copy again.

    The guest stands still with a backlog in its rings, and only the server works after the copy was taken.
    """

    def __init__(self, library: Library) -> None:
        self.server = LoopbackServer(DESCRIPTION, library)
        self.function = self.server.function(ram_size=8 << 20)
        self.driver = VmbusDriver(self.function)
        self.traffic = Traffic(self.driver, hold=1 << 30, ring_pages_in=4, ring_pages_out=4)
        self.traffic.echo.window = 40
        self.server.command("pause")
        self.traffic.start(40, 3000, size=200, window=500)  # posted and signalled; nobody takes them yet
        self.function.barrier()
        self.copy = b""

    def ram(self) -> bytes:
        return bytes(self.function._ram)

    def run_server(self) -> None:
        """Only the server works, until nothing moves any more."""
        server = self.server
        server.command("resume")
        echo, burst = server.server.providers
        while (
            server.on_loop(lambda: echo.tally.completed) < 40
            or server.on_loop(lambda: len(echo._held)) > 0
            or server.on_loop(lambda: burst.channel.packets_queued) < 100
        ):
            pass
        server.command("pause")

    def dirty(self) -> set[int]:
        """Offsets in RAM of the pages in the log."""
        runs = self.server.on_loop(lambda: self.server.server.device.memory.dirty_runs())
        base = self.function._iova_base
        return {at - base for start, length in runs for at in range(start, start + length, PAGE)}

    def merged(self, pages: set[int]) -> bytes:
        """The copy with those pages copied again."""
        now = self.ram()
        merged = bytearray(self.copy)
        for page in pages:
            merged[page : page + PAGE] = now[page : page + PAGE]
        return bytes(merged)

    def close(self) -> None:
        self.driver.close(graceful=False)
        self.server.stop()


@pytest.fixture
def migration(libvfio_user: Library) -> Iterator[Migration]:
    migration = Migration(libvfio_user)
    yield migration
    migration.close()


def check(migration: Migration, pages: set[int]) -> None:
    """The property that a live save stands on."""
    # Compared outside of the assertion: where CI is set, pytest would diff megabytes of bytes for minutes.
    same = migration.merged(pages) == migration.ram()
    assert same, "guest memory differs from its copy outside of the dirty pages"


def test_the_copy_and_the_dirty_pages_are_guest_memory(migration: Migration) -> None:
    server = migration.server
    server.command("log-start")
    migration.copy = migration.ram()
    migration.run_server()
    pages = migration.dirty()
    check(migration, pages)
    external = {
        migration.traffic.echo.memory.iova - migration.function._iova_base + at
        for at in range(0, migration.traffic.echo.memory.size, PAGE)
    }
    assert len(pages) >= 10 and pages & external, "external data was transformed in place"
    # Sabotage: every one of them that changed is needed.
    now = migration.ram()
    changed = [page for page in pages if migration.copy[page : page + PAGE] != now[page : page + PAGE]]
    assert len(changed) >= 8
    for page in changed:
        with pytest.raises(AssertionError, match="outside"):
            check(migration, pages - {page})
    # The client's DMA writes land in the same memory: nothing changes, and every dirty byte passes by. Without bus
    # mastering QEMU would refuse each of them, for a reason that says nothing to people.
    function = migration.function
    command = int.from_bytes(function.config_read(COMMAND, 2), "little")
    function.config_write(COMMAND, (command & ~COMMAND_BUS_MASTER).to_bytes(2, "little"))
    with pytest.raises(DirtyLogBroken, match="the guest has switched off the device's bus mastering"):
        server.command("flush")
    function.config_write(COMMAND, command.to_bytes(2, "little"))
    report = server.command("flush")
    assert (report["pages"], report["bytes"]) == (len(pages), len(pages) * PAGE)
    same = migration.ram() == now
    assert same, "a flush has changed guest memory"
    server.command("resume")
    migration.traffic.burst.hold = 20
    migration.traffic.finish()


def test_sabotage_without_a_whole_log_the_copy_is_wrong(migration: Migration) -> None:
    migration.copy = migration.ram()
    migration.run_server()
    with pytest.raises(UsageError, match="no dirty log"):
        migration.dirty()
    migration.server.command("log-start")  # late
    with pytest.raises(AssertionError, match="outside"):
        check(migration, migration.dirty())


def test_unmapping_a_dirty_page_breaks_the_log_and_a_new_one_can_be_started(migration: Migration) -> None:
    migration.server.command("log-start")
    migration.run_server()
    migration.function.unmap_buffer(migration.driver.link_of(migration.traffic.echo.channel).rings)
    migration.function.barrier()
    with pytest.raises(DirtyLogBroken, match="unmapped"):
        migration.server.command("flush")
    with pytest.raises(UsageError, match="running already"):
        migration.server.command("log-start")
    migration.server.command("log-stop")
    migration.server.command("log-start")
    migration.server.command("flush")
