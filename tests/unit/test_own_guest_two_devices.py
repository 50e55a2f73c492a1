"""A VM with several devices: its description, its command line, what is written down of it, and that each step of a
save is taken with all of them or undone with all of them.

QEMU and the device servers of the saves are models (`support.model_vm`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.model_vm import CONFIG, LogBroken, ModelDevice, ModelVm
from vmbus.cli.drivers import Drive, jobs_for, parse_drive
from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.errors import EnvironmentProblem, StateError, UsageError
from vmbus.operations.capture import Capture
from vmbus.operations.migration.fitting import check_states
from vmbus.operations.migration.messages import FurtherState, State, decode, encode
from vmbus.operations.target import Captured, FileTarget
from vmbus.qemu.device import DeviceInstance, ask_each
from vmbus.qemu.instance import machine_for
from vmbus.qemu.pci_replay import PciAddress
from vmbus.snapshot.checkpoints import Checkpoint, ImageSnapshot, Store
from vmbus.snapshot.manifest import (
    FileRecord,
    Machine,
    Manifest,
    Packets,
    Versions,
    contents_of,
    decode_manifest,
    encode_manifest,
)
from vmbus.vm.command_line import Programs, kernel_arguments, qemu_arguments
from vmbus.vm.description import (
    MOST_DEVICES,
    FurtherDevice,
    VmDescription,
    parse_description,
    with_further,
    with_options,
)
from vmbus.vm.errors import SaveFailed
from vmbus.vm.moments import Sabotage
from vmbus.vm.sockets import Sockets
from vmbus.vm.timing import Phases

GUID = "6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7a01"


def device(name: str, *providers: str) -> DeviceDescription:
    return DeviceDescription(name, [ProviderDescription("echo", one, GUID) for one in providers])


ONE = VmDescription("demo", device("vmbus0", "echo"))
TWO = msgspec.structs.replace(ONE, devices=[FurtherDevice("vmbus1", device("", "other").providers, 7)])
PROGRAMS = Programs(("qemu",), "11.1.3", "tcg", Path("kernel"), Path("initramfs"))
TEXT = f"""
name = "two"
[device]
name = "vmbus0"
[[device.providers]]
kind = "echo"
name = "echo"
instance = "{GUID}"
[[devices]]
name = "vmbus1"
slot = 6
[[devices.providers]]
kind = "echo"
name = "other"
instance = "{GUID}"
"""

# ---- descriptions ----------------------------------------------------------------------------------------------------


def test_own_guest_two_devices_are_described() -> None:
    found = parse_description(TEXT, "two.toml")
    assert [one.name for one in found.all_devices] == ["vmbus0", "vmbus1"] and found.slots == [5, 6]
    assert all(type(one) is DeviceDescription for one in found.all_devices), "as servers are started with"
    assert found.with_devices(found.all_devices) == found
    assert with_options(found, {"other": {"hold": 1}}).all_devices[1].providers[0].options == {"hold": 1}
    with pytest.raises(UsageError, match="no provider nobody"):
        with_options(found, {"nobody": {}})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("slot = 6", "slot = 5", "two devices in slot 5"),
        ("slot = 6", "slot = 3", r"devices\[0\].slot"),
        ("slot = 6", "", "missing required field `slot`"),
        ('name = "vmbus1"', 'name = "vmbus0"', "two devices called vmbus0"),
        ('name = "other"', 'name = "echo"', "two providers called echo"),
        ('name = "two"', 'name = "two"\nguest.driver = "linux"', "nobody would drive further ones"),
    ],
)
def test_own_guest_two_devices_that_do_not_go_together_are_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_description(TEXT.replace(old, new), "two.toml")


def test_own_guest_two_devices_of_two_descriptions() -> None:
    """What is taken gets another slot or name; Linux keeps the first device."""
    both = with_further(ONE, [ONE, TWO])
    assert [one.name for one in both.all_devices] == ["vmbus0", "vmbus0-2", "vmbus0-3", "vmbus1"]
    assert [one.providers[0].name for one in both.all_devices] == ["echo", "echo-2", "echo-3", "other"]
    assert both.slots == [5, 6, 7, 8] and both.guest.huge_pages == 24
    assert with_further(ONE, []) is ONE
    linux = msgspec.structs.replace(ONE, guest=msgspec.structs.replace(ONE.guest, driver="linux"))
    assert with_further(linux, [ONE]).guest.driver == "both" and with_further(linux, [ONE]).guest.huge_pages == 8
    assert len(with_further(ONE, [ONE] * (MOST_DEVICES - 1)).all_devices) == MOST_DEVICES
    with pytest.raises(UsageError, match=f"{MOST_DEVICES + 1} devices; allowed: {MOST_DEVICES}"):
        with_further(ONE, [ONE] * MOST_DEVICES)


def test_own_guest_two_devices_whose_providers_came_to_be_called_alike_cannot_be_saved() -> None:
    with pytest.raises(UsageError, match="two providers called echo"):
        TWO.with_devices([TWO.device, device("vmbus1", "echo")])


def test_own_guest_two_devices_on_the_command_line() -> None:
    def devices(vm: VmDescription) -> list[dict[str, Any]]:
        arguments = qemu_arguments(vm, PROGRAMS, Path("/run/x"))
        found = [json.loads(one) for one in arguments if one.startswith("{") and "vfio-user-pci" in one]
        return [{key: one[key] for key in ("id", "addr")} | {"path": one["socket"]["path"]} for one in found]

    first = {"id": "vmbus", "addr": "5", "path": "/run/x/vfio.sock"}
    assert devices(ONE) == [first]
    assert devices(TWO) == [first, {"id": "vmbus-2", "addr": "7", "path": "/run/x/vfio-2.sock"}]
    assert "vmbus.functions=vmbus0@05,vmbus1@07" in kernel_arguments(TWO)
    assert "vmbus.functions" not in kernel_arguments(ONE), "as ever"
    assert len(str(Sockets(Path()).control_of(MOST_DEVICES - 1))) <= len("supervisor.sock"), "paths are bounded by that"


def test_own_guest_two_devices_are_driven_by_two_programs() -> None:
    words = ["echo", "burst", "echo:function=vmbus1", "burst:function=vmbus1", "echo:function=vmbus2"]
    mixed, second, third = jobs_for([parse_drive(word) for word in words], [])
    assert mixed == Drive("mixed", {"workloads": [{"driver": "echo"}, {"driver": "burst"}]})
    assert [one["function"] for one in second.parameters["workloads"]] == ["vmbus1", "vmbus1"]
    assert third == Drive("echo", {"function": "vmbus2"})


# ---- what is written down --------------------------------------------------------------------------------------------


def manifest_of(vm: VmDescription, machine: Machine) -> Manifest:
    record = FileRecord(0, "0" * 64)
    return Manifest(
        created="now",
        live=False,
        vm=vm,
        machine=machine,
        versions=Versions("0", "11.1.3", "x"),
        packets=Packets(0, 0),
        incoming_held=0,
        files=dict.fromkeys(contents_of(vm), record),
    )


def test_own_guest_two_devices_in_a_manifest_and_one_as_ever() -> None:
    one = machine_for(ONE, PROGRAMS, None).with_configs([CONFIG])
    encoded = encode_manifest(manifest_of(ONE, one))
    plain = json.loads(encoded)["manifest"]
    assert "devices" not in plain["vm"] and "further" not in plain["machine"], "an earlier program reads it"
    assert set(plain["files"]) == {"ram.qemu", "device.state", "vmlinuz", "initramfs.cpio"}

    two = machine_for(TWO, PROGRAMS, None)
    assert two == two.with_configs([CONFIG, CONFIG], driven=True).bare
    full = manifest_of(TWO, two.with_configs([CONFIG, CONFIG]))
    assert decode_manifest(encode_manifest(full), "x") == full
    assert "device-2.state" in full.files and full.machine.further[0].pci_address == "00:07.0"
    for wrong, message in (
        (msgspec.structs.replace(full, machine=one), "1 PCI functions for 2 devices"),
        (msgspec.structs.replace(full, files=manifest_of(ONE, one).files), "lists the files"),
        (msgspec.structs.replace(manifest_of(ONE, one), files=full.files), "lists the files"),
    ):
        with pytest.raises(StateError, match=message):
            decode_manifest(encode_manifest(wrong), "x")


def test_own_guest_two_devices_in_a_migration_and_one_as_ever() -> None:
    record = FileRecord(3, "0" * 64)
    one = State(file=record, device=ONE.device, pci_config=CONFIG, packets=Packets(1, 2), run=True)
    assert b"further" not in encode(one), "an earlier program understands it"
    rest = FurtherState(file=record, device=TWO.all_devices[1], pci_config=CONFIG)
    two = msgspec.structs.replace(one, further=[rest])
    assert decode(encode(two), "peer") == two and two.states == [two, rest]
    check_states(two, TWO, "peer")
    with pytest.raises(StateError, match="states of 1 devices; the VM has 2"):
        check_states(one, TWO, "peer")


def test_own_guest_two_devices_in_the_record_of_a_checkpoint(tmp_path: Path) -> None:
    store = Store(tmp_path, own=True)
    states = [b"the first", b"the second"]
    records = [FileRecord(len(state), hashlib.sha256(state).hexdigest()) for state in states]
    for index, state in enumerate(states):
        store.state("here", index).write_bytes(state)
    assert {path.name for path in tmp_path.iterdir()} == {"here.state", "here.state-2"}
    there = Checkpoint(
        tag="here",
        number=1,
        created="now",
        vm=TWO,
        machine=machine_for(TWO, PROGRAMS, None).with_configs([CONFIG, CONFIG]),
        qemu="11.1.3",
        packets=Packets(0, 0),
        incoming_held=0,
        state=records[0],
        image=ImageSnapshot("vmbus-here", 1, 1, 1),
        further=records[1:],
    )
    store.commit(there)
    assert store.record("here") == there and list(store.verify_states(there)) == states
    store.state("here", 1).write_bytes(b"the sec0nd")
    with pytest.raises(StateError, match=r"here\.state-2 is not the device's state"):
        store.verify_states(there)
    store.commit(msgspec.structs.replace(there, further=msgspec.UNSET))
    with pytest.raises(StateError, match="1 states for 2 devices"):
        store.record("here")
    store.remove("here")
    assert list(tmp_path.iterdir()) == []


# ---- saves -----------------------------------------------------------------------------------------------------------


class Second(ModelVm):
    """The server of the second device of a VM, whose machine is the first one's."""

    def __init__(self, vm: ModelVm) -> None:
        self.vm = vm
        super().__init__(TWO)
        self.state = b"the second state"

    def step(self, name: str) -> None:
        self.vm.steps.append(f"second {name}")
        super().step(name)

    async def running(self) -> bool:
        return self.vm.vcpus

    @property
    def migration(self) -> str:
        return self.vm.migration

    @migration.setter
    def migration(self, value: str) -> None:
        pass

    @property
    def described(self) -> Any:
        return msgspec.to_builtins(TWO.all_devices[1])


class Vm(ModelVm):
    def __init__(self) -> None:
        super().__init__(TWO)
        self.second = Second(self)
        second = DeviceInstance(TWO.all_devices[1], PciAddress(0, 7), self.monitor, self.second.control)
        self.devices = [ModelDevice(self), second]

    def as_before(self) -> bool:
        phases = {self.device, self.second.device}
        return self.vcpus and phases == {"running"} and not self.logging and not self.second.logging


async def take(vm: Vm, folder: Path, *, live: bool, sabotage: Sabotage | None = None) -> Captured:
    capture = Capture(vm, FileTarget(folder), Phases(), live=live, sabotage=sabotage or Sabotage())
    async with capture.taken() as captured:
        return captured


def place(vm: Vm, step: str) -> list[int]:
    """Where a step is, of both devices."""
    return [vm.steps.index(name) for name in (step, f"second {step}")]


@pytest.mark.parametrize("live", [False, True])
def test_own_guest_two_devices_take_each_step_together(tmp_path: Path, live: bool) -> None:
    vm = Vm()
    found = asyncio.run(take(vm, tmp_path, live=live))
    steps = ["pause", "save", *(["flush"] if live else [])]
    for one, other in pairwise(steps):
        assert max(place(vm, one)) < min(place(vm, other))
    assert vm.steps.count("barrier") == 2 and max(place(vm, "save")) < (10**6 if live else vm.steps.index("migrate"))
    assert found.packets == {"queued": 6, "sent": 8} and found.incoming_held == 10
    assert found.flushed_pages == (12 if live else 0)
    assert found.configs == [CONFIG, CONFIG] and found.described(TWO) == TWO
    assert (tmp_path / "device-2.state").read_bytes() == b"the second state"
    assert found.state_bytes == len(b"state") + len(b"the second state")


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("step", ["log-start", "pause", "save", "flush"])
def test_own_guest_two_devices_run_on_if_one_refuses(tmp_path: Path, live: bool, step: str) -> None:
    if not live and step in ("log-start", "flush"):
        return
    vm = Vm()
    vm.second.fail[step] = [EnvironmentProblem("the second one does not want to")]
    with pytest.raises(SaveFailed, match="the second one does not want to; the VM runs on"):
        asyncio.run(take(vm, tmp_path, live=live))
    assert vm.as_before() and list(tmp_path.iterdir()) == []


def test_own_guest_two_devices_begin_again_if_the_log_of_one_breaks(tmp_path: Path) -> None:
    vm = Vm()
    vm.second.fail["flush"] = [LogBroken("the guest unmapped a page")]
    found = asyncio.run(take(vm, tmp_path, live=True))
    assert found.attempts == 2
    for step in ("log-start", "log-stop", "resume", "save"):
        assert vm.steps.count(step) == vm.steps.count(f"second {step}") == (2 if step in ("log-start", "save") else 1)


def test_own_guest_two_devices_of_which_one_died_are_lost(tmp_path: Path) -> None:
    vm = Vm()

    def dies(name: str) -> None:
        vm.second.dead = True
        raise EnvironmentProblem("gone")

    vm.second.step = dies  # type: ignore[method-assign]
    with pytest.raises(SaveFailed) as caught:
        asyncio.run(take(vm, tmp_path, live=False))
    assert caught.value.source_alive is False


def test_sabotage_own_guest_two_devices_of_which_one_is_not_flushed(tmp_path: Path) -> None:
    vm = Vm()
    asyncio.run(take(vm, tmp_path, live=True, sabotage=Sabotage(skip_flush=True, only="vmbus1")))
    assert "flush" in vm.steps and "second flush" not in vm.steps


async def test_own_guest_two_devices_are_waited_for_also_if_one_fails() -> None:
    """Neither is left half done, and the first error is told."""
    vm = Vm()
    slow = asyncio.Event()
    done: list[str] = []
    call = vm.call

    async def late(command: str, *arguments: Any, **options: Any) -> dict[str, Any]:
        await slow.wait()
        done.append(command)
        return await call(command, *arguments, **options)

    vm.call = late  # type: ignore[method-assign]
    vm.second.fail["log-start"] = [EnvironmentProblem("no")]
    asking = asyncio.create_task(ask_each(vm.devices, "log-start"))
    await asyncio.sleep(0)
    assert not (await asyncio.wait({asking}, timeout=0.05))[0]
    slow.set()
    with pytest.raises(EnvironmentProblem, match="no"):
        await asking
    assert done == ["log-start"] and vm.logging
