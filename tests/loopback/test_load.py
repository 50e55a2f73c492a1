"""`load`: a server takes a saved state for its own, from the start (`--await-state`) or in mid-life (a revert)."""

import hashlib
import random
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from support.multi import MultiProvider
from support.pace import until
from support.traffic import PAGE, Traffic
from vmbus import providers
from vmbus.device import saved
from vmbus.errors import EnvironmentProblem, StateError, UsageError
from vmbus.kmcl.saved import PacketChunk, decode_chunk
from vmbus.memory.guest import MemoryRevoked
from vmbus.providers.echo import EchoProvider
from vmbus.ring import READ_INDEX, WRITE_INDEX
from vmbus.testkit.loopback.function import LoopbackFunction
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.testkit.loopback.pair import LoopbackPair
from vmbus.transport.library import Library
from vmbus_guest.driver import VmbusDriver

DESCRIPTION = describe("echo", "burst", echo={"hold": 8, "hold_seconds": 0.01})
NEW = {"kind": "echo", "name": "new", "instance": "00000000-0000-4000-8000-0000000000aa", "options": {"hold": 3}}


class Checkpoint:
    """A moment of a paused device and of guest memory, taken while the guest stands still."""

    def __init__(self, server: LoopbackServer, function: LoopbackFunction) -> None:
        self.path = server.directory / f"checkpoint-{uuid4().hex}"
        report = server.command("save", path=str(self.path))
        self.sha256: str = report["sha256"]
        self.packets: dict[str, int] = report["packets"]
        self.config = bytes.fromhex(server.command("pci")["config"])
        self.description: dict[str, Any] = server.command("status")["description"]
        self.ram = bytes(function._ram)

    def load(self, server: LoopbackServer, **more: Any) -> dict[str, Any]:
        return server.command("load", path=str(self.path), sha256=self.sha256, **more)


class Vm(LoopbackPair):
    """A guest and its one server. The guest stands still over a revert: its own state cannot go back here."""

    def __init__(self, library: Library) -> None:
        super().__init__(DESCRIPTION, library)
        self.traffic = Traffic(self.driver, hold=30, window=60, ring_pages_in=1, ring_pages_out=1)
        self.choose = random.Random(7)

    def start(self, count: int = 2000) -> None:
        self.traffic.start(count, count, size=60, window=400)
        self.driver.run_until(lambda: len(self.traffic.burst.held) > 20, 10, "packets of the host")

    def checkpoint(self) -> Checkpoint:
        """Leaves the server paused, with work for it in the rings."""
        self.server.command("pause")
        for _ in range(20):
            self.driver.step(0.0)
        self.function.barrier()
        return Checkpoint(self.server, self.function)

    def wander(self, since: int) -> None:
        """Waits until the running server has got ahead, by itself, with what it finds in the rings."""
        until(lambda: self.progress() > since, "the server to do something", every=0.0)

    def progress(self) -> int:
        tallies = self.server.command("status")["providers"]
        return sum(one["tally"]["completed"] for one in tallies.values())

    def revert(self, checkpoint: Checkpoint, **more: Any) -> dict[str, Any]:
        """As QEMU does it: a reset, guest memory, the device's state, the PCI function."""
        self.function.reset()
        self.function._ram[:] = checkpoint.ram
        loaded = checkpoint.load(self.server, **more)
        assert loaded["packets"] == checkpoint.packets
        assert self.server.command("status")["phase"] == "restoring"
        self.function.replay(checkpoint.config)
        finished = self.server.command("restore-finish")
        assert finished["packets"] == checkpoint.packets
        assert finished["channels"] == loaded["channels"]
        return finished


@pytest.fixture
def vm(libvfio_user: Library) -> Iterator[Vm]:
    with Vm(libvfio_user) as vm:
        yield vm


def counts(vm: Vm) -> tuple[Any, ...]:
    status = vm.server.command("status")
    return status["phase"], status["packets"], status["providers"], status["description"], status["bus"]


# ---- going back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paused", [False, True])
def test_a_revert_in_mid_traffic(vm: Vm, paused: bool) -> None:
    """Again and again, with other lives in between; what these did is undone, and every transaction comes out once."""
    vm.start()
    for _ in range(6):
        checkpoint = vm.checkpoint()
        then = vm.progress()
        vm.server.command("resume")
        for _ in range(2):
            vm.wander(then)
            if paused:
                vm.server.command("pause")
            vm.revert(checkpoint)
        for _ in range(5):
            vm.traffic.some(vm.choose)
    vm.traffic.finish()
    assert vm.driver.rescinded == [] and vm.driver.failures == []
    status = vm.server.command("status")
    assert status["providers"]["echo"]["tally"]["completed"] == 2000
    assert status["providers"]["burst"]["tally"]["completed"] == 2000


def test_without_the_load_a_revert_is_noticed(vm: Vm) -> None:
    """Sabotage: guest memory and the PCI function go back, the device does not."""
    vm.start()
    checkpoint = vm.checkpoint()
    then = vm.progress()
    vm.server.command("resume")
    vm.wander(then)
    vm.function.reset()
    vm.function._ram[:] = checkpoint.ram
    vm.function.replay(checkpoint.config)
    with pytest.raises((Exception, AssertionError)):
        vm.traffic.finish(timeout=1.0)


def test_with_the_state_of_another_checkpoint_a_revert_is_noticed(vm: Vm) -> None:
    """Sabotage: guest memory of one moment, the device of another."""
    vm.start()
    early = vm.checkpoint()
    vm.server.command("resume")
    while vm.traffic.burst.tally.completed < 500:
        vm.traffic.some(vm.choose)
    late = vm.checkpoint()
    vm.function.reset()
    vm.function._ram[:] = late.ram
    early.load(vm.server)
    vm.function.replay(late.config)
    with pytest.raises((Exception, AssertionError)):
        vm.server.command("restore-finish")
        vm.traffic.finish(timeout=1.0)


def test_without_the_replay_a_revert_is_refused_and_can_be_finished(vm: Vm) -> None:
    vm.start()
    checkpoint = vm.checkpoint()
    vm.function.reset()
    checkpoint.load(vm.server)
    with pytest.raises(StateError, match="not put back"):
        vm.server.command("restore-finish")
    vm.function.replay(checkpoint.config)
    vm.server.command("restore-finish")
    vm.traffic.finish()


def test_a_provider_that_came_since_is_gone_and_one_that_went_is_back(vm: Vm) -> None:
    vm.start()
    before = vm.checkpoint()
    vm.server.command("resume")
    vm.server.command("offer", provider=NEW)
    after = vm.checkpoint()
    vm.server.command("resume")
    with pytest.raises(StateError, match="providers"):
        before.load(vm.server)  # of the present device it is not
    assert list(vm.server.command("status")["providers"]) == ["echo", "burst", "new"]
    for checkpoint, names in ((before, ["echo", "burst"]), (after, ["echo", "burst", "new"])):
        vm.revert(checkpoint, description=checkpoint.description)
        status = vm.server.command("status")
        assert list(status["providers"]) == names
        assert status["description"] == checkpoint.description
    # The guest knows of the new one in `after` only, and that is where it is.
    vm.traffic.finish()


def test_the_old_life_is_over(vm: Vm) -> None:
    """Its timers never ring, its windows on guest memory lead nowhere, its providers are stopped once."""
    vm.start()
    checkpoint = vm.checkpoint()
    server = vm.server.server
    rang: list[int] = []
    stopped: list[str] = []

    def prepare() -> Any:
        for provider in server.providers:
            name, stop = provider.name, provider.stop
            provider.stop = lambda name=name, stop=stop: (stopped.append(name), stop())
            provider.host.call_later(0.0, lambda: rang.append(1))
            provider.host.call_later(0.05, lambda: rang.append(1))
        return server.providers, server.device, server.device.memory.window([(vm.function._iova_base, 8)])

    old_providers, old_device, window = vm.server.on_loop(prepare)
    checkpoint.load(vm.server)
    assert stopped == ["echo", "burst"]
    with pytest.raises(MemoryRevoked):
        window.store32(0, 1)
    assert old_device.memory.mapped() == [] and server.device.memory.mapped()
    vm.server.on_loop(lambda: old_providers[0].host.call_soon(lambda: rang.append(2)))
    vm.function.replay(checkpoint.config)
    vm.server.command("restore-finish")
    vm.traffic.finish()
    assert rang == []


# ---- refusals --------------------------------------------------------------------------------------------------------


def damaged(checkpoint: Checkpoint) -> dict[str, Any]:
    data = bytearray(checkpoint.path.read_bytes())
    data[len(data) // 2] ^= 1
    checkpoint.path.write_bytes(data)
    return {"sha256": hashlib.sha256(data).hexdigest()}


def emptied(checkpoint: Checkpoint) -> dict[str, Any]:
    checkpoint.path.write_bytes(b"")
    return {"sha256": hashlib.sha256(b"").hexdigest()}


def foreign(checkpoint: Checkpoint) -> dict[str, Any]:
    state = saved.decode(checkpoint.path.read_bytes())
    data = saved.encode(msgspec.structs.replace(state, device="other"))
    checkpoint.path.write_bytes(data)
    return {"sha256": hashlib.sha256(data).hexdigest()}


def a_packet_less(checkpoint: Checkpoint) -> dict[str, Any]:
    state = saved.decode(checkpoint.path.read_bytes())
    chunks = state.channels[1].chunks
    index = next(number for number, data in enumerate(chunks) if isinstance(decode_chunk(data), PacketChunk))
    cut = msgspec.structs.replace(state.channels[1], chunks=chunks[:index] + chunks[index + 1 :])
    data = saved.encode(msgspec.structs.replace(state, channels=[state.channels[0], cut]))
    checkpoint.path.write_bytes(data)
    return {"sha256": hashlib.sha256(data).hexdigest()}


def changed_description(**fields: Any) -> Callable[[Checkpoint], dict[str, Any]]:
    def change(checkpoint: Checkpoint) -> dict[str, Any]:
        first, *rest = checkpoint.description["providers"]
        return {"description": {"name": "vmbus0", "providers": [{**first, **fields}, *rest]}}

    return change


REFUSALS: dict[str, tuple[Callable[[Checkpoint], dict[str, Any]], type[Exception], str]] = {
    "damaged": (damaged, StateError, "SHA-256"),
    "another digest": (lambda _: {"sha256": "0" * 64}, StateError, "not the one meant"),
    "no digest": (lambda _: {"sha256": 7}, UsageError, "sha256"),
    "empty": (emptied, StateError, "cut short"),
    "foreign": (foreign, StateError, "of device 'other'"),
    "a packet less": (a_packet_less, StateError, "cut"),
    "no file": (lambda _: {"path": "/nowhere/at/all"}, EnvironmentProblem, "/nowhere/at/all"),
    "no path": (lambda _: {"path": 3}, UsageError, "path"),
    "no description": (lambda _: {"description": {"name": "vmbus0"}}, UsageError, "providers"),
    "other instance": (changed_description(instance="1" * 32), StateError, "instance GUIDs"),
    "unknown kind": (changed_description(kind="nothing"), UsageError, "no provider of kind"),
    "a kind that is gone": (changed_description(kind="netvsc"), UsageError, "any more: use 'network'"),
    "wrong options": (changed_description(options={"hold": -1}), UsageError, "hold"),
    "an author's code": (changed_description(kind="evil:Class"), UsageError, "may not"),
}


@pytest.mark.parametrize("paused", [False, True])
def test_a_refusal_leaves_the_server_as_it_was(vm: Vm, paused: bool) -> None:
    vm.start(300)
    for reason, (change, error, word) in REFUSALS.items():
        checkpoint = vm.checkpoint()
        if not paused:
            vm.server.command("resume")
        before = counts(vm)
        arguments = {"path": str(checkpoint.path), "sha256": checkpoint.sha256} | change(checkpoint)
        with pytest.raises(error, match=word):
            vm.server.command("load", **arguments)
        if paused:
            assert counts(vm) == before, reason
            vm.server.command("resume")
        assert vm.server.command("status")["phase"] == "running"
    vm.traffic.finish()


class Sulky(EchoProvider):
    """Starts once, and never again."""

    started = 0
    stopped = 0

    def start(self) -> None:
        super().start()
        Sulky.started += 1
        if Sulky.started > 1:
            raise RuntimeError("no second time")

    def stop(self) -> None:
        super().stop()
        Sulky.stopped += 1


def test_a_provider_that_does_not_start_leaves_the_server_as_it_was(
    libvfio_user: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules["vmbus.providers"].PROVIDERS, "echo", Sulky)
    monkeypatch.setattr(Sulky, "started", 0)
    monkeypatch.setattr(Sulky, "stopped", 0)
    vm = Vm(libvfio_user)
    try:
        vm.start(300)
        checkpoint = vm.checkpoint()
        before = counts(vm)
        with pytest.raises(StateError, match="no second time"):
            checkpoint.load(vm.server)
        assert counts(vm) == before and (Sulky.started, Sulky.stopped) == (2, 1)
        vm.server.command("resume")
        vm.traffic.finish()
    finally:
        vm.close()


class Clinging(EchoProvider):
    """Cannot be stopped."""

    def stop(self) -> None:
        raise RuntimeError("I stay")


def test_an_old_provider_that_cannot_be_stopped_does_not_hinder(
    libvfio_user: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules["vmbus.providers"].PROVIDERS, "echo", Clinging)
    vm = Vm(libvfio_user)
    vm.start(300)
    checkpoint = vm.checkpoint()
    then = vm.progress()
    vm.server.command("resume")
    vm.wander(then)
    vm.revert(checkpoint)
    assert "provider echo: stop raised" in caplog.text
    vm.traffic.finish()
    monkeypatch.setattr(Clinging, "stop", EchoProvider.stop)
    vm.close()


def test_phases_in_which_nothing_is_loaded(vm: Vm) -> None:
    vm.start(300)
    checkpoint = vm.checkpoint()
    vm.server.command("log-start")
    with pytest.raises(UsageError, match="dirty log is running"):
        checkpoint.load(vm.server)
    vm.server.command("log-stop")
    vm.function.reset()
    checkpoint.load(vm.server)
    with pytest.raises(UsageError, match=r"load needs a server that is awaiting or paused or running; .* restoring"):
        checkpoint.load(vm.server)
    vm.function.replay(checkpoint.config)
    vm.server.command("restore-finish")
    vm.traffic.finish()


def test_a_check_changes_nothing(vm: Vm) -> None:
    vm.start(300)
    checkpoint = vm.checkpoint()
    before = counts(vm)
    assert checkpoint.load(vm.server, check=True)["packets"] == checkpoint.packets
    with pytest.raises(StateError, match="not the one meant"):
        vm.server.command("load", path=str(checkpoint.path), sha256="0" * 64, check=True)
    assert counts(vm) == before
    vm.server.command("resume")
    vm.traffic.finish()


# ---- what the guest has written over its rings -----------------------------------------------------------------------


@pytest.mark.parametrize(("ring", "when"), [("from the guest", "before the save"), ("to the guest", "after the save")])
def test_an_overwritten_index_costs_a_revert_that_channel_alone(vm: Vm, ring: str, when: str) -> None:
    vm.start()
    echo = vm.traffic.echo.channel
    rings = vm.driver.link_of(echo).rings.view
    offset = READ_INDEX if ring == "from the guest" else (echo.ring_pages_out + 1) * PAGE + WRITE_INDEX
    vm.server.command("pause")
    if when == "before the save":
        struct.pack_into("<I", rings, offset, 10)
    vm.function.barrier()
    checkpoint = Checkpoint(vm.server, vm.function)
    assert checkpoint.packets["queued"] + checkpoint.packets["sent"] > 0
    vm.server.command("resume")
    vm.function.reset()
    vm.function._ram[:] = checkpoint.ram
    if when == "after the save":
        struct.pack_into("<I", rings, offset, 10)
    checkpoint.load(vm.server)
    vm.function.replay(checkpoint.config)
    finished = vm.server.command("restore-finish")
    assert (finished["channels"], finished["renewed"]) == (1, int(when == "after the save"))
    assert len(finished["broken"]) == finished["renewed"]
    burst = vm.traffic.burst

    def answered() -> bool:
        while burst.held:
            burst.complete_one()
        return burst.finished and bool(vm.driver.rescinded)

    vm.driver.run_until(answered, 20, "the other channel's packets")
    burst.check()
    assert len(vm.driver.rescinded) == 1


# ---- a server that awaits its state ----------------------------------------------------------------------------------


def test_a_server_that_awaits_its_state(vm: Vm, libvfio_user: Library, tmp_path: Path) -> None:
    vm.start()
    vm.server.command("offer", provider=NEW)
    checkpoint = vm.checkpoint()
    old = vm.server
    vm.server = LoopbackServer(DESCRIPTION, libvfio_user, awaiting=True)
    assert vm.server.command("status")["phase"] == "awaiting"
    for command, arguments in (
        ("pause", {}),
        ("save", {"path": str(tmp_path / "x")}),
        ("resume", {}),
        ("offer", {"provider": NEW}),
        ("restore-finish", {}),
    ):
        with pytest.raises(UsageError, match="awaiting"):
            vm.server.command(command, **arguments)
    with pytest.raises(StateError, match="not the one meant"):
        vm.server.command("load", path=str(checkpoint.path), sha256="0" * 64)
    assert vm.server.command("status")["phase"] == "awaiting", "a refused state can be followed by a good one"
    vm.function.reconnect(vm.server.socket_path, None)
    loaded = checkpoint.load(vm.server, description=checkpoint.description)
    assert loaded["packets"] == checkpoint.packets and loaded["channels"] == 2
    vm.function.replay(checkpoint.config)
    assert vm.server.command("restore-finish")["packets"] == checkpoint.packets
    assert vm.server.command("status")["description"] == checkpoint.description
    old.stop()
    vm.traffic.finish()


@pytest.mark.parametrize("ahead", ["all", "less", "nothing"])
def test_a_live_migration_puts_the_function_back_ahead_and_holds_the_device(
    vm: Vm, libvfio_user: Library, ahead: str
) -> None:
    """The function gets its configuration before the state comes. Without it, or with half of it, nothing is rebuilt;
    and what is rebuilt stands still, whatever there is to do, until it is told to go on."""
    vm.start()
    checkpoint = vm.checkpoint()
    old = vm.server
    vm.server = LoopbackServer(DESCRIPTION, libvfio_user, awaiting=True)
    vm.function.reconnect(vm.server.socket_path, None)
    if ahead != "nothing":
        vm.function.replay(checkpoint.config)
    if ahead == "less":
        vm.function.config_write(0x42, bytes(2))  # as if MSI had been off then
    assert vm.server.command("status")["phase"] == "awaiting"
    checkpoint.load(vm.server)
    assert (bytes.fromhex(vm.server.command("pci")["config"]) == checkpoint.config) == (ahead == "all")
    if ahead != "all":
        with pytest.raises(StateError, match="was not put back as it was saved"):
            vm.server.command("restore-finish", frozen=True)
        vm.function.replay(checkpoint.config)
    assert vm.server.command("restore-finish", frozen=True)["packets"] == checkpoint.packets
    before = counts(vm)
    assert before[0] == "paused"
    for _ in range(20):
        vm.driver.step(0.0)  # the rings are full of work
        vm.function.barrier()
    assert counts(vm) == before
    vm.server.command("resume")
    vm.wander(0)
    old.stop()
    vm.traffic.finish()


def test_a_server_cannot_have_a_state_and_await_one(vm: Vm, libvfio_user: Library) -> None:
    state = vm.server.save()
    with pytest.raises(UsageError, match="not both"):
        LoopbackServer(DESCRIPTION, libvfio_user, restore=state, awaiting=True)


# ---- sub-channels, mapped memory -------------------------------------------------------------------------------------


def test_sub_channels_and_mapped_memory_go_back_too(libvfio_user: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.multi import Guest

    monkeypatch.setitem(providers.PROVIDERS, "multi", MultiProvider)
    with LoopbackServer(describe("multi"), libvfio_user) as server, VmbusDriver(server.function()) as driver:
        guest = Guest(driver)
        guest.ask(b"subs", 1)
        sub = Guest(driver, 1)
        assert sub.ask(b"echo")
        function = driver.function
        assert isinstance(function, LoopbackFunction)
        server.command("pause")
        checkpoint = Checkpoint(server, function)
        for _ in range(2):
            function.reset()
            checkpoint.load(server)
            function.replay(checkpoint.config)
            assert server.command("restore-finish")["channels"] == 2
            assert guest.ask(b"echo") and sub.ask(b"echo")
            server.command("pause")
            function._ram[:] = function._ram  # what the guest did since stays: its rings are those of now
            checkpoint = Checkpoint(server, function)
        server.command("resume")
        assert guest.ask(b"echo") and sub.ask(b"echo")
        assert driver.rescinded == []
