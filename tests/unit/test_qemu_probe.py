"""Who migrates the device, and what is left to us where QEMU does: nothing is stopped, logged, flushed or put back."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from support.device import Machine, connect, open_echo
from support.model_vm import CONFIG, ModelVm
from vmbus.device import saved
from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.errors import EnvironmentProblem, StateError
from vmbus.operations.capture import Capture
from vmbus.operations.migration.arrival import Arrival
from vmbus.operations.target import FileTarget
from vmbus.qemu.device import DeviceInstance
from vmbus.qemu.foreign import MigrationGuard
from vmbus.qemu.pci_replay import PciAddress
from vmbus.qemu.probe import driven_by_client, require_complete, require_running, require_same
from vmbus.snapshot import manifest
from vmbus.vm.description import VmDescription
from vmbus.vm.errors import SaveFailed
from vmbus.vm.timing import Phases

DEVICE = DeviceDescription("vmbus0", [ProviderDescription("echo", "echo", "6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7a01")])


class Driving(ModelVm):
    """A QEMU that migrates the device itself, and its device server, which refuses what is not its client's doing."""

    def __init__(self, *, driven: bool = True) -> None:
        super().__init__(VmDescription("demo", DEVICE))
        self.driven = driven
        self.complete = False
        self.asked: list[str] = []

    def set_running(self, running: bool) -> None:
        super().set_running(running)
        self.device = "running" if running else "driven"

    async def perform(self, command: str, given: dict[str, Any]) -> Any:
        if command == "cont":
            self.set_running(True)
        return await super().perform(command, given)

    async def human(self, line: str, *, timeout: float = 1.0) -> str:
        raise AssertionError("a device in STOP_COPY answers no reads")

    async def call(self, command: str, timeout: float = 1.0, **arguments: Any) -> dict[str, Any]:
        self.asked.append(command)
        if command == "save":
            assert self.device == "driven" and not self.vcpus
            self.step(command)
            return self.saved(arguments["path"])
        assert command in ("status", "pci"), command
        found = await super().call(command, timeout)
        return found | {"migration": {"state": "stop", "complete": self.complete}}


def capture(model: Driving, folder: Path, *, live: bool) -> Capture:
    return Capture(model, FileTarget(folder), Phases(), live=live)


SET_UP = ["query-migrate-capabilities", "query-migrate-parameters", "migrate-set-capabilities"]


@pytest.mark.parametrize(
    ("live", "calls"), [(False, ["stop", "migrate", "save"]), (True, ["migrate", "save", "migrate-continue"])]
)
async def test_a_save_leaves_the_device_to_qemu(tmp_path: Path, live: bool, calls: list[str]) -> None:
    model = Driving()

    one = capture(model, tmp_path, live=live)
    async with one.taken() as captured:
        assert not model.vcpus
        await one.resume()
    captured = captured
    assert [step for step in model.steps if not step.startswith("wait")] == [
        *SET_UP,
        "migrate-set-parameters",
        *calls,
        "cont",
    ]
    assert captured.driven and captured.packets == {"queued": 3, "sent": 4} and captured.configs == [CONFIG]
    assert (captured.flushed_pages, captured.devices[0].state.sha256) == (0, hashlib.sha256(b"state").hexdigest())
    assert model.vcpus and model.device == "running"


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("step", ["stop", "migrate", "migrate-continue"])
def test_a_failed_save_lets_it_run_on(tmp_path: Path, live: bool, step: str) -> None:
    model = Driving()
    model.fail[step] = [EnvironmentProblem("on purpose")]

    async def body() -> None:
        async with capture(model, tmp_path, live=live).taken():
            raise EnvironmentProblem("on purpose")

    with pytest.raises(SaveFailed, match="on purpose; the VM runs on"):
        asyncio.run(body())
    assert model.vcpus and model.device == "running" and list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_know_the_question_is_not_driven() -> None:
    async def call(command: str, timeout: float = 1.0) -> dict[str, Any]:
        return {"phase": "running"}

    device = DeviceInstance(DEVICE, PciAddress(0, 5), cast(Any, None), cast(Any, SimpleNamespace(call=call)))
    assert asyncio.run(driven_by_client([device])) is False


def test_devices_of_one_vm_are_all_driven_or_none() -> None:
    both = [Driving(driven=driven).devices[0] for driven in (True, False)]
    with pytest.raises(StateError, match="some of the VM's devices itself"):
        asyncio.run(driven_by_client(both))


def test_a_snapshot_is_restored_as_it_was_saved() -> None:
    for driven, in_stream, message in (
        (False, False, None),
        (True, True, None),
        (False, True, "has the device in QEMU's stream.*VMBUS_QEMU"),
        (True, False, "beside QEMU's stream.*VMBUS_LIBVFIO_USER"),
    ):
        work = require_same(Driving(driven=driven).devices, in_stream=in_stream, what="the snapshot x")
        if message is None:
            asyncio.run(work)
        else:
            with pytest.raises(StateError, match=message):
                asyncio.run(work)


def test_what_qemu_restored_is_looked_at() -> None:
    model = Driving()
    model.device = "driven"
    with pytest.raises(StateError, match="was not in it: the server is stop"):
        asyncio.run(require_complete(model.devices))
    model.complete = True
    asyncio.run(require_complete(model.devices))
    with pytest.raises(StateError, match=r"does not run.*the server is driven"):
        asyncio.run(require_running(model.devices))
    model.device = "running"
    asyncio.run(require_running(model.devices))


def test_the_manifest_says_where_the_device_is() -> None:
    plain = manifest.Machine(type="pc-q35-11.1", accelerator="tcg", pci_address="00:05.0", pci_config=CONFIG.hex())
    encoded = msgspec.json.encode(plain)
    assert set(msgspec.json.decode(encoded)) == {"type", "accelerator", "pci_address", "pci_config"}, (
        "older programs read it, and older digests hold"
    )
    assert msgspec.json.decode(encoded, type=manifest.Machine).spare_cpus == 0, "as machines were then"
    in_stream = msgspec.structs.replace(plain, device_in_stream=True, spare_cpus=1)
    assert msgspec.json.decode(msgspec.json.encode(in_stream), type=manifest.Machine) == in_stream


async def test_an_arrival_leaves_the_device_to_qemu(tmp_path: Path) -> None:
    """The source's copy is only counted; neither `load` nor the PCI replay nor `restore-finish` happens."""
    machine = Machine(("echo",))
    driver = connect(machine)
    open_echo(driver)
    data = saved.encode(machine.save())
    path = tmp_path / "state"
    path.write_bytes(data)
    model = Driving()
    model.device, model.vcpus = "driven", False

    arrival = Arrival(cast(Any, model), None)
    assert await arrival.driven()
    await arrival.replay_ahead([CONFIG])
    with pytest.raises(StateError, match="digest"):
        await arrival.load_states([(path, "0" * 64, DEVICE)])
    packets = await arrival.load_states([(path, hashlib.sha256(data).hexdigest(), DEVICE)])
    assert (packets.queued, packets.sent) == (0, 0)
    assert await arrival.replay([CONFIG]) == 0
    with pytest.raises(StateError, match="was not in it"):
        await arrival.rebuild()
    model.complete = True
    assert (await arrival.rebuild())[1] == 1
    await arrival.release()
    await arrival.run()
    assert model.asked[-2:] == ["status", "status"], "whether there is a device, and whether it runs"
    assert model.steps == ["cont"]


def test_a_migration_of_somebody_else_is_left_alone() -> None:
    """The guard against migrations that leave the device out has nothing to guard where they do not."""

    async def body(driven: bool) -> list[str]:
        model = Driving(driven=driven)
        notices: list[str] = []

        async def execute(command: str, arguments: Any = None, **_: Any) -> Any:
            return [] if command == "query-jobs" else None

        async def status() -> tuple[str, str]:
            return "active", ""

        async def wait(*_: Any) -> str:
            return "cancelled"

        async def running() -> bool:
            return True

        monitor: Any = SimpleNamespace(
            execute=execute, migration_status=status, wait_migration=wait, running=running,
            listening=lambda listener: contextlib.nullcontext(),
        )  # fmt: skip

        async def ask() -> bool:
            return await driven_by_client(model.devices)

        guard = MigrationGuard(monitor, notices.append, ask)
        task = asyncio.create_task(guard.run())
        await guard._listener.put({"event": "MIGRATION", "data": {"status": "setup"}})
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return notices

    assert asyncio.run(body(True)) == []
    (notice,) = asyncio.run(body(False))
    assert "a migration was cancelled" in notice
