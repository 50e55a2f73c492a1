"""`vmbus attach`: a QEMU that somebody else started is saved, restored, taken back and moved, with packets in flight;
what does not fit is said. QEMU is `support.hand_qemu` here; the server, its device and the guest's driver are real."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import pace
from support.by_hand import Attached, ByHand, command
from support.hand_qemu import MEMORY, function
from vmbus.errors import EnvironmentProblem, StateError, UsageError
from vmbus.operations.attach import (
    Attachment,
    attach,
    attach_received,
    attach_restored,
)
from vmbus.operations.migration.address import UnixAddress
from vmbus.operations.migration.listener import listen
from vmbus.qemu.agent import AgentClient
from vmbus.qemu.qmp import Monitor
from vmbus.qemu.survey import DoesNotFit, survey
from vmbus.snapshot.bundle import open_snapshot
from vmbus.testkit.loopback.harness import describe
from vmbus.transport.library import Library
from vmbus.vm.errors import SaveFailed
from vmbus.vm.moments import Moment
from vmbus.vm.process import ProcessDied
from vmbus.vm.run_directory import running_vms, runtime_base


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, libvfio_user: Library) -> Iterator[Path]:
    """A short directory, for everything."""
    with tempfile.TemporaryDirectory(prefix="p-") as name:
        path = Path(name)
        for variable in ("XDG_RUNTIME_DIR", "VMBUS_STATE"):
            (path / variable).mkdir(mode=0o700)
            monkeypatch.setenv(variable, str(path / variable))
        monkeypatch.setenv("VMBUS_LIBVFIO_USER", str(libvfio_user.path))
        (path / "device.json").write_bytes(describe("echo", "burst", echo={"hold": 0}).to_json())
        yield path
        assert running_vms() == [] and not [one for one in runtime_base().iterdir() if one.name[0] != "."]


def by_hand(place: Path, name: str = "a", **answers: Any) -> ByHand:
    return ByHand(place / name, answers=answers or None)


def started(place: Path, name: str = "a", *, awaits: bool = False, **answers: Any) -> ByHand:
    hand = by_hand(place, name, **{key.replace("_", "-"): value for key, value in answers.items()})
    try:
        hand.serve(str(place / "device.json"), *(["--await-state"] if awaits else []))
        hand.stand_in(*(["-S", "-incoming", "defer"] if awaits else []))
    except BaseException:
        hand.__exit__(None, None, None)
        raise
    return hand


def at(hand: ByHand, *, agent: bool = False) -> Attachment:
    return Attachment(hand.qmp, [hand.control], hand.agent if agent else None)


async def asked(hand: ByHand, what: str) -> dict[str, Any]:
    """The guest, by a way that is not the attached VM's."""
    agent = AgentClient(hand.agent)
    await agent.connect()
    try:
        return await agent.request(what, {}, timeout=pace.seconds(20))
    finally:
        await agent.close()


async def in_flight(hand: ByHand) -> None:
    async def enough() -> bool:
        counts = await asked(hand, "counts")
        return bool(counts["held"] >= 100 and counts["completed"] >= 50)

    await pace.eventually(enough, "packets in flight")


async def good(hand: ByHand) -> None:
    """The guest works to its end, and nothing was lost, doubled or changed."""
    before = await asked(hand, "counts")
    found = await asked(hand, "finish")
    assert found["good"] and not found["failed"] and found["completed"] >= before["completed"], found


async def state_of(hand: ByHand) -> str:
    monitor = Monitor("QEMU by hand")
    await monitor.connect(hand.qmp)
    try:
        return await monitor.status()
    finally:
        await monitor.close()


@pytest.fixture
def run() -> Callable[[Awaitable[Any]], Any]:
    async def bounded(work: Awaitable[Any]) -> Any:
        return await asyncio.wait_for(work, pace.seconds(60))

    return lambda work: asyncio.run(bounded(work))


def test_plugin_attach_keeps_notes_goes_back_and_leaves_qemu_running(place: Path, run: Any) -> None:
    async def body(hand: ByHand) -> None:
        vm = await attach(at(hand), "mine")
        assert vm.name == "mine" and running_vms() == ["mine"] and vm.facts is not None
        await in_flight(hand)
        with pytest.raises(UsageError, match="without an agent"):
            await vm.call_agent("ping")
        taken = await vm.checkpoint("here")
        report = await vm.save(place / "kept", live=True, keep=True)
        assert taken.packets["sent"] + taken.packets["queued"] >= 100 <= sum(report.packets.values())
        reverted = await vm.revert("here")
        assert reverted.packets == taken.packets and await vm.monitor.running()
        snapshot = await open_snapshot(place / "kept")
        assert snapshot.manifest.machine.foreign and set(snapshot.manifest.files) == {"ram.qemu", "device.state"}
        await vm.leave()
        assert hand.running and await state_of(hand) == "running"
        # Nothing of ours is left in QEMU: the next one can do the same.
        again = await attach(at(hand))
        assert again.name == "by-hand"
        await again.checkpoint("here")
        await again.monitor.execute("stop")
        for live in (True, False):
            await again.save(place / f"paused-{live}", live=live, keep=True)
            with pytest.raises(SaveFailed, match=r"sends one that stands still only once.*stays paused as it was"):
                await again.save(place / "once-more", live=live, keep=True)
            await again.checkpoint(f"paused-{live}".lower())
            await again.revert("here")
            assert not await again.monitor.running()
            await again.monitor.cont()
            await again.monitor.execute("stop")
        await again.monitor.cont()
        await again.leave()

    with started(place) as hand:
        run(body(hand))


def test_plugin_attach_saves_and_restores_into_another_qemu(place: Path, run: Any) -> None:
    async def body(first: ByHand) -> None:
        vm = await attach(at(first))
        await in_flight(first)
        report = await vm.save(place / "snapshot", live=True)
        assert vm.ended and sum(report.packets.values()) >= 100
        await asyncio.to_thread(first.qemu_ends)
        with started(place, "b", awaits=True) as second:
            back = await attach_restored(at(second), place / "snapshot")
            assert back.restored is not None and back.restored.packets == report.packets
            assert await back.monitor.running()
            # Whoever restores it as one of ours is told how it is done.
            done = await asyncio.to_thread(command, "restore", str(place / "snapshot"))
            assert done.returncode == StateError.status and "attach --restore" in " ".join(done.stderr.split())
            await back.leave()
            assert second.running

    with started(place) as hand:
        run(body(hand))


def test_plugin_attach_migrates_from_one_hand_started_qemu_to_another(place: Path, run: Any) -> None:
    secret = secrets.token_bytes(32)
    address = UnixAddress(str(place / "m.sock"))

    async def body(source: ByHand, destination: ByHand) -> None:
        vm = await attach(at(source), "source")
        await in_flight(source)
        listener = await listen(address, secret)
        arriving = asyncio.create_task(attach_received(at(destination), listener, "destination"))
        report = await vm.migrate(str(address), secret)
        arrived = await arriving
        assert vm.ended and vm.moved_to == str(address) and sum(report.packets.values()) >= 100
        assert await arrived.monitor.running() and arrived.restored is not None
        assert arrived.restored.packets == report.packets
        assert await asyncio.to_thread(source.qemu_ends) == 0
        await arrived.leave()
        assert await state_of(destination) == "running"

    with started(place, "s") as source, started(place, "d", awaits=True) as destination:
        run(body(source, destination))


def test_plugin_attach_as_a_command(place: Path, run: Any) -> None:
    with started(place) as hand:
        with Attached(hand, "--name", "mine") as attached:
            # The control socket was found beside the other one.
            run(in_flight(hand))
            done = command("checkpoint", "mine", "one")
            assert done.returncode == 0, done.stderr
            done = command("inspect", "mine", "--json")
            assert {one["name"] for one in json.loads(done.stdout)["channels"]} == {"echo", "burst"}, done.stderr
            attached.process.send_signal(signal.SIGTERM)
            assert attached.end() == 130
        assert hand.running and running_vms() == [] and run(state_of(hand)) == "running"
        run(good(hand))
        with Attached(hand) as attached:
            done = command("save", str(place / "s2"))
            assert done.returncode == 0, done.stderr
            assert attached.end() == 0 and "saved to" in attached.text
        assert hand.qemu_ends() == 0


def test_plugin_attach_that_was_killed_is_mended(place: Path, run: Any) -> None:
    async def halted(hand: ByHand) -> None:
        """What a command leaves that was killed in the middle of a live save."""
        vm = await attach(at(hand))
        await vm.monitor.execute("migrate-set-capabilities", {"capabilities": [
            {"capability": "pause-before-switchover", "state": True}
        ]})  # fmt: skip
        with vm.own_migration():
            await vm.control.call("log-start")
            file = {"transport": "file", "filename": str(place / "half"), "offset": 0}
            await vm.monitor.execute("migrate", {"channels": [{"channel-type": "main", "addr": file}]})
            await vm.monitor.wait_migration({"pre-switchover"}, pace.seconds(20), "the switchover")
            await vm.control.call("pause")
            await vm.leave()

    with started(place) as hand:
        run(in_flight(hand))
        run(halted(hand))
        with pytest.raises(DoesNotFit, match="another migration tool is at work") as refused:
            run(attach(at(hand)))
        assert "an operation was interrupted" in str(refused.value) and "--resume" in str(refused.value)

        async def mended() -> None:
            vm = await attach(at(hand), resume=True)
            assert (await vm.call_server("status"))["phase"] == "running" and await vm.monitor.running()
            await vm.leave()

        run(mended())
        run(good(hand))


def test_plugin_attach_that_is_ended_in_the_middle_of_a_save_leaves_a_vm_that_runs(place: Path, run: Any) -> None:
    async def body(hand: ByHand) -> None:
        vm = await attach(at(hand))
        await in_flight(hand)
        reached, never = asyncio.Event(), asyncio.Event()

        async def halt(moment: Moment) -> None:
            if moment is Moment.SAVING:
                reached.set()
                await never.wait()

        saving = asyncio.create_task(vm.save(place / "snapshot", live=True, keep=True, at=halt))
        await reached.wait()
        saving.cancel()
        await vm.leave()
        assert saving.done() and await state_of(hand) == "running" and not (place / "snapshot").exists()
        await good(hand)

    with started(place) as hand:
        run(body(hand))


@pytest.mark.parametrize("what", ["qemu", "server"])
def test_plugin_attach_notices_an_end(place: Path, run: Any, what: str) -> None:
    async def body(hand: ByHand) -> None:
        vm = await attach(at(hand))
        waiting = asyncio.create_task(vm.wait_ended())
        process = hand.qemu if what == "qemu" else hand.server
        assert process is not None
        process.kill()
        with pytest.raises(
            ProcessDied, match=("QEMU" if what == "qemu" else "the device server") + " of VM .* is gone"
        ):
            await waiting
        await vm.leave()
        if what == "server":
            assert hand.running
        else:
            hand.qemu_ends()

    with started(place) as hand:
        run(body(hand))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("no device", {"query-pci": [{"bus": 0, "devices": []}]}, "QEMU has no VMBus device"),
    ("bridge", {"query-pci": [{"bus": 0, "devices": [function(1, id={"vendor": 1, "device": 2}, pci_bridge={
        "devices": [function(0, bus=1)]})]}]}, "is not where it can be put back"),
    ("slot", {"query-pci": [{"bus": 0, "devices": [function(2)]}]}, "in a slot from 4 to 30"),
    ("two devices", {"query-pci": [{"bus": 0, "devices": [function(5), function(6)]}]}, "--control PATH for each"),
    ("private memory", {"query-memdev": [{"id": "pc.ram", "size": MEMORY, "share": False}]}, "pc.ram.* is not shared"),
    ("odd memory", {"query-memory-size-summary": {"base-memory": MEMORY + 4096}}, "guest memory of 256.004 MiB"),
    ("one CPU for ever", {"query-hotpluggable-cpus": [{}]}, "has no memory fences.*maxcpus=2"),
    ("many CPUs", {"query-cpus-fast": [{}] * 65, "query-hotpluggable-cpus": [{}] * 65}, "65 CPUs"),
    ("another processor", {"query-target": {"arch": "aarch64"}}, "QEMU emulates aarch64"),
    ("another accelerator", {"query-accelerators": {"enabled": "mshv"}}, "runs under mshv; it can be kvm or tcg"),
    ("machine", {"qom-get": "pc/../q35-machine"}, "a snapshot cannot be"),
    ("another tool", {"more-of-query-migrate": {"status": "active"}}, "another migration tool is at work"),
    ("blocked", {"more-of-query-migrate": {"blocked-reasons": ["no, thanks"]}}, "refuses to migrate: no, thanks"),
    ("moved", {"query-status": {"status": "postmigrate", "running": False}}, "it was saved or migrated"),
    ("ill", {"query-status": {"status": "io-error", "running": False}}, "QEMU is io-error"),
    ("temporary", {"query-block": [{"device": "hda", "inserted": {"ro": False, "file": "/var/tmp/vl.Ab12xY"}}]},
     "started with -snapshot"),
    ("awaits", {"query-status": {"status": "inmigrate", "running": False}}, "QEMU awaits a stream"),
    ("nonsense", {"query-pci": [{"bus": 0, "devices": [{"bus": "x"}]}]}, "cannot be understood: field"),
]  # fmt: skip


def test_plugin_attach_refuses(place: Path, run: Any) -> None:
    with started(place, query_name={"name": "as it should be"}) as hand:
        for what, answers, words in REFUSED:
            (hand.folder / "answers").write_text(json.dumps(answers))
            with pytest.raises(EnvironmentProblem, match=f"(?s){words}"):
                run(attach(at(hand)))
            vcpus = (hand.folder / "vcpus.log").read_text().split("\n")
            stops = [line for line in vcpus if line.endswith("stop")]
            assert hand.running and not stops, f"{what}: something was touched"


def test_plugin_attach_refuses_unsafe_settings_and_what_disks_forbid(place: Path, run: Any) -> None:
    disk = [{"device": "hda", "inserted": {"ro": False, "file": "/disk.qcow2"}}]

    async def body(hand: ByHand) -> None:
        vm = await attach(at(hand))
        for work in (vm.checkpoint("here"), vm.revert("here"), vm.save(place / "s", keep=True)):
            with pytest.raises(UsageError, match=r"QEMU's disks \(hda\) would not"):
                await work
        await vm.leave()
        monitor = Monitor("QEMU")
        await monitor.connect(hand.qmp)
        await monitor.execute("migrate-set-capabilities", {"capabilities": [
            {"capability": "postcopy-ram", "state": True}
        ]})  # fmt: skip
        await monitor.close()
        with pytest.raises(UsageError, match="'postcopy-ram' is switched on"):
            await attach(at(hand))
        assert hand.running

    with started(place, query_block=disk) as hand:
        run(body(hand))


def test_plugin_attach_refuses_a_server_of_another_vm(place: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are the same in all that can be asked: only a knock tells them apart. Neither of them is harmed by it."""

    async def body(one: ByHand, other: ByHand) -> None:
        with pytest.raises(DoesNotFit, match="it is that of another VM"):
            await attach(Attachment(one.qmp, [other.control]))
        assert await state_of(one) == await state_of(other) == "running"
        found = await survey(one.qmp, [one.control])
        assert found.facts.functions[0].device == 5
        monkeypatch.setattr("vmbus.qemu.survey._KNOCKS", 0)
        await survey(one.qmp, [other.control])  # without the knock nobody would notice
        await good(one)
        await good(other)

    with started(place, "one") as one, started(place, "other") as other:
        run(body(one, other))


def test_plugin_attach_refuses_what_is_not_there_or_not_ready(
    place: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(hand: ByHand) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("os.getuid", lambda: 12345)
            with pytest.raises(DoesNotFit, match=r"QEMU .* is of user .*, and this is user 12345") as other:
                await attach(at(hand))
            assert "the device server (" in str(other.value)
        with pytest.raises(EnvironmentProblem, match="cannot connect to QEMU's monitor at"):
            await attach(Attachment(place / "none.sock", [hand.control]))
        with pytest.raises(EnvironmentProblem, match="there is no device server at"):
            await attach(Attachment(hand.qmp, [place / "none.sock"]))
        with pytest.raises(DoesNotFit, match="start it with -S -incoming defer") as refused:
            await attach_restored(at(hand), place / "snapshot")
        assert "--await-state" in str(refused.value)
        with started(place, "waits", awaits=True) as waiting:
            with pytest.raises(DoesNotFit, match=r"--restore, a migration with --receive"):
                await attach(at(waiting))
            with pytest.raises(StateError, match="there is no snapshot"):
                await attach_restored(at(waiting), place / "snapshot")

    with started(place) as hand:
        run(body(hand))


def test_plugin_attach_restores_only_into_a_qemu_like_the_one_that_was_saved(place: Path, run: Any) -> None:
    async def body(hand: ByHand) -> None:
        vm = await attach(at(hand))
        await vm.save(place / "snapshot")
        more = {"query-cpus-fast": [{}, {}], "query-hotpluggable-cpus": [{}] * 3}
        other = by_hand(place, "b", **more)
        with other:
            other.serve(str(place / "device.json"), "--await-state")
            other.stand_in("-S", "-incoming", "defer")
            with pytest.raises(StateError, match=r"its number of CPUs: 2, not 1"):
                await attach_restored(at(other), place / "snapshot")
            assert other.running, "nothing was done to it"

    with started(place) as hand:
        run(body(hand))
