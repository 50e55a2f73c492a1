"""The device in a QEMU that is started by hand, by the command that docs/plugin.md shows: saved with packets in flight,
restored into another one, taken back, moved to a third, and let go."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support.boot import books
from support.by_hand import Attached, ByHand, command
from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.operations.attach import Attachment, attach, attach_received, attach_restored
from vmbus.operations.migration.address import UnixAddress
from vmbus.operations.migration.listener import listen
from vmbus.qemu.qmp import Monitor
from vmbus.snapshot.bundle import open_snapshot
from vmbus.testkit.story import Story, until_in_flight
from vmbus.vm.command_line import AGENT_PORT, Programs

pytestmark = [pytest.mark.vm, pytest.mark.long]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plugin.md"
STORY = Story(packets=64, stall_seconds=20.0).endless()


def command_of_the_page(hand: ByHand, programs: Programs, *more: str) -> list[str]:
    """What the page says, with this test's files and programs, and a port for the agent."""
    (block,) = re.findall(r"^```sh\n(qemu-system-x86_64 -accel.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    places = {
        "vmbus.sock": hand.vfio,
        "qmp.sock": hand.qmp,
        "console.log": hand.folder / "console.log",
        "vmlinuz": programs.kernel,
        "initramfs.cpio": programs.initramfs,
    }
    words = shlex.split(block.replace("\\\n", " "))
    assert words[0] == "qemu-system-x86_64"
    found = []
    for word in words[1:]:
        for old, new in places.items():
            word = word.replace(old, str(new))
        found.append(word)
    agent = ["-device", "virtio-serial-pci,addr=3", "-chardev", f"socket,id=agent,path={hand.agent},server=on,wait=off"]
    agent += ["-device", f"virtserialport,chardev=agent,nr=1,name={AGENT_PORT}"]
    return [*programs.qemu, *found, *agent, *more]


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, programs: Programs) -> Path:
    if programs.libvfio_user is not None:
        monkeypatch.setenv("VMBUS_LIBVFIO_USER", str(programs.libvfio_user))
    return tmp_path_factory.mktemp("p")


@pytest.fixture
def started(place: Path, programs: Programs) -> Iterator[Callable[..., ByHand]]:
    with ExitStack() as stack:

        def start(name: str, *more: str, awaits: bool = False) -> ByHand:
            hand = stack.enter_context(ByHand(place / name))
            hand.serve("demo", "--once", *(["--await-state"] if awaits else []))
            hand.start(command_of_the_page(hand, programs, *(["-S", "-incoming", "defer"] if awaits else []), *more))
            return hand

        yield start


def at(hand: ByHand) -> Attachment:
    return Attachment(hand.qmp, [hand.control], hand.agent)


def test_plugin_a_plain_qemu_saved_restored_taken_back_and_moved_in_mid_traffic(
    run: Callable[..., Any], place: Path, started: Callable[..., ByHand], note: Callable[[str], None]
) -> None:
    async def body() -> None:
        secret, address = secrets.token_bytes(32), UnixAddress(str(place / "m.sock"))
        first = started("1")
        vm = await attach(at(first), "plain")
        await vm.wait_ready()
        job = int((await vm.call_agent("start", driver="mixed", parameters=STORY.workloads()))["job"])
        await until_in_flight(vm, job, STORY)
        taken = await vm.checkpoint("here")
        reverted = await vm.revert("here")
        assert reverted.packets == taken.packets and sum(taken.packets.values()) > 0
        await until_in_flight(vm, job, STORY)
        saved = await vm.save(place / "snapshot", live=True)
        assert vm.ended and await asyncio.to_thread(first.qemu_ends) == 0 and sum(saved.packets.values()) >= 64
        second = started("2", awaits=True)
        vm = await attach_restored(at(second), place / "snapshot", "again")
        assert vm.restored is not None and vm.restored.packets == saved.packets
        await until_in_flight(vm, job, STORY)
        third = started("3", awaits=True)
        listener = await listen(address, secret)
        arriving = asyncio.create_task(attach_received(at(third), listener, "there"))
        moved = await vm.migrate(str(address), secret)
        vm = await arriving
        assert await asyncio.to_thread(second.qemu_ends) == 0
        figures = await books(vm, job, None)
        assert not figures.reasons, figures.reasons
        note(
            f"a QEMU by hand: {figures.completed} transactions, each once, over a checkpoint with {taken.packets}, a "
            f"revert, a save with {saved.packets}, a restore and a migration with {moved.packets} in flight"
        )
        await vm.leave()
        # As commands, without an agent; and QEMU outlives all of them.
        with Attached(third, "--name", "plain") as attached:
            done = command("save", "--vm", "plain", "--live", "--keep", str(place / "kept"))
            assert done.returncode == 0, done.stderr
            found = command("inspect", "plain", "--json")
            assert {one["name"] for one in json.loads(found.stdout)["channels"]} == {"echo", "burst"}, found.stderr
            attached.process.terminate()
            assert attached.end() == 130
        monitor = Monitor("QEMU by hand")
        await monitor.connect(third.qmp)
        assert third.running and await monitor.running()
        await monitor.close()

    run(body(), timeout=240.0)


REFUSED = {
    "private memory": (("-object memory-backend-memfd,id=mem,size=256M,share=on", "-object memory-backend-memfd,id=mem,"
                        "size=256M,share=off"), "guest memory .mem. is not shared"),
    "one CPU for ever": (("-smp 1,maxcpus=2", "-smp 1,maxcpus=1"), "has no memory fences"),
    "temporary disks": (("-nodefaults", "-nodefaults -snapshot -hda DISK"), "started with -snapshot"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(REFUSED))
def test_plugin_a_qemu_that_does_not_fit_says_why(
    run: Callable[..., Any], place: Path, programs: Programs, what: str
) -> None:
    """A QEMU that stands from its start: no guest is needed for this."""
    (old, new), words = REFUSED[what]
    (place / "disk").write_bytes(bytes(1 << 20))
    with ByHand(place / "q") as hand:
        hand.serve("demo", "--once")
        line = shlex.join(command_of_the_page(hand, programs, "-S"))
        assert shlex.join(shlex.split(old)) in line
        hand.start(shlex.split(line.replace(old, new.replace("DISK", str(place / "disk")))))
        with pytest.raises(EnvironmentProblem, match=words):
            run(attach(at(hand)))
        assert hand.running


def test_plugin_unsafe_settings_and_a_monitor_in_use_are_refused(
    run: Callable[..., Any], started: Callable[..., ByHand]
) -> None:
    async def body() -> None:
        hand = started("q", "-S")
        monitor = Monitor("QEMU by hand")
        await monitor.connect(hand.qmp)
        with pytest.raises(EnvironmentProblem, match="a monitor serves one client at a time"):
            await attach(at(hand))
        on = [{"capability": "x-ignore-shared", "state": True}]
        await monitor.execute("migrate-set-capabilities", {"capabilities": on})
        await monitor.close()
        with pytest.raises(UsageError, match="'x-ignore-shared' is switched on"):
            await attach(at(hand))
        assert hand.running

    run(body())


def test_plugin_several_devices_find_their_servers(run: Callable[..., Any], place: Path, programs: Programs) -> None:
    """Whatever the order is in which the control sockets are named."""
    instances = ("6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7aa1", "6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7aa2")
    devices = [
        DeviceDescription(f"vmbus{number}", [ProviderDescription("echo", f"echo{number}", instance)])
        for number, instance in enumerate(instances)
    ]

    async def body(first: ByHand, second: ByHand) -> None:
        vm = await attach(Attachment(first.qmp, [second.control, first.control]), "two")
        assert vm.description.slots == [5, 6] and vm.description.all_devices == devices
        report = await vm.save(place / "snapshot")
        assert report.packets == {"queued": 0, "sent": 0} and await asyncio.to_thread(first.qemu_ends) == 0
        found = await open_snapshot(place / "snapshot")
        assert set(found.manifest.files) == {"ram.qemu", "device.state", "device-2.state"}
        assert [one.name for one in found.manifest.vm.all_devices] == ["vmbus0", "vmbus1"]

    with ByHand(place / "1") as first, ByHand(place / "2") as second:
        for hand, device in zip((first, second), devices, strict=True):
            (hand.folder / "device.json").write_bytes(device.to_json())
            hand.serve(str(hand.folder / "device.json"), "--once")
        more = {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(second.vfio)}, "addr": "6"}
        first.start(command_of_the_page(first, programs, "-S", "-device", json.dumps(more)))
        run(body(first, second))
