"""Checkpoints and reverts: the order of steps, refusals before anything changes, and what each failure leads to.

QEMU and the device server are a model that keeps what matters: whether the vCPUs run, whose memory the guest has, which
life the device lives, and whether both are of the same moment whenever the vCPUs run.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.model_vm import CONFIG, PACKETS, ModelVm, write_new
from vmbus.bus.saved import BusState
from vmbus.bus.synic import SynicState
from vmbus.device import saved
from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.errors import EnvironmentProblem, StateError, UsageError
from vmbus.operations.checkpoint import checkpoint, delete_checkpoint
from vmbus.operations.image import THROWN_AWAY, image_in
from vmbus.operations.revert import revert
from vmbus.qemu.jobs import run_job
from vmbus.qemu.qmp import QmpCommandFailed
from vmbus.server.control import ControlError
from vmbus.snapshot.checkpoints import IMAGE, Store, check_tag
from vmbus.vm.description import VmDescription
from vmbus.vm.errors import RevertFailed, SaveFailed
from vmbus.vm.moments import Sabotage

DEVICE = DeviceDescription("vmbus0", [ProviderDescription("echo", "echo", "00000000-0000-4000-8000-000000000001")])
VM = VmDescription(name="demo", device=DEVICE)


def state_of(moment: int) -> bytes:
    """A decodable state in which a moment can be told."""
    synic = SynicState(enabled=True, fault=False, registers={}, post_status=0, outbox=[moment.to_bytes(8, "big")])
    bus = BusState(connected=False, version=0, offers_requested=False, offers=[], gpadls=[], partial=[])
    return saved.encode(
        saved.DeviceState(device="vmbus0", config=CONFIG, synic=synic, bus=bus, channels=[], providers=[])
    )


def read(path: str) -> bytes:
    return Path(path).read_bytes()


class Model(ModelVm):
    """A VM and its device server."""

    def __init__(self, description: VmDescription = VM, *, folder: Path | None = None) -> None:
        super().__init__(description, folder=folder)
        self.phase = "running"
        self.now = 1
        """What both have done: guest memory and device live at this moment, or at `memory` and `device`."""
        self.memory = self.device = 1
        self.resets = 0
        self.snapshots: dict[str, dict[str, Any]] = {}
        self.nodes: list[str] = []
        self.jobs: dict[str, dict[str, Any]] = {}
        self.job_errors: dict[str, str] = {}
        self.load_fails_after_reset = False
        self.forgotten: list[str] = []
        self.capabilities |= {"multifd": True}
        self.saves = 0
        self.migration_error = ""
        self.loaded: int | None = None
        self.disk: bytes | None = None
        """A provider's file, which belongs to the state."""

    def work(self) -> None:
        assert self.vcpus and self.phase == "running"
        self.now += 1
        self.memory = self.device = self.now

    def consistent(self) -> bool:
        """What must hold whenever the vCPUs run."""
        return not self.vcpus or (self.phase == "running" and self.memory == self.device and self.config == CONFIG)

    def step(self, name: str) -> None:
        if not name.startswith("query-"):
            super().step(name)

    # the monitor

    async def perform(self, command: str, given: dict[str, Any]) -> Any:
        match command:
            case "query-migrate":
                return {"error-desc": self.migration_error} if self.migration_error else {}
            case "query-named-block-nodes":
                return [{"node-name": node, "image": {"snapshots": self._listed()}} for node in self.nodes]
            case "blockdev-add":
                self.nodes.append(given["node-name"])
            case "blockdev-del":
                self.nodes.remove(given["node-name"])
            case "stop":
                self.vcpus = False
            case "query-jobs":
                return [{"id": name, **job} for name, job in self.jobs.items()]
            case "job-dismiss":
                del self.jobs[given["id"]]
            case "blockdev-create" | "snapshot-save" | "snapshot-load" | "snapshot-delete":
                error = self.job_errors.get(command) or self._job(command, given)
                self.jobs[given["job-id"]] = {"status": "concluded", "type": command} | (
                    {} if error is None else {"error": error}
                )
        return None

    def _listed(self) -> list[dict[str, Any]]:
        return [
            {"id": str(number), "name": name, "vm-state-size": 7, "date-sec": one["made"], "date-nsec": 0}
            for number, (name, one) in enumerate(self.snapshots.items())
        ]

    def _job(self, command: str, given: dict[str, Any]) -> str | None:
        if command == "blockdev-create":
            return None
        assert self.capabilities["multifd"] is False
        tag = given["tag"]
        if command == "snapshot-delete":
            del self.snapshots[tag]
            return None
        assert not self.vcpus and given["vmstate"] in given["devices"]
        if command == "snapshot-save":
            if tag != f"vmbus-{THROWN_AWAY}":
                assert self.phase == "paused", "nobody may write into guest memory meanwhile"
            self.migration_error = ""
            self.saves += 1
            self.snapshots[tag] = {"memory": self.memory, "made": self.saves}
            return None
        assert self.phase in ("paused", "restoring"), "nobody may write into guest memory meanwhile"
        self.resets += 1
        self.config = bytes(256)
        if self.load_fails_after_reset or self.migration_error:
            self.memory = -1
            return "the stream is broken"
        self.memory = self.snapshots[tag]["memory"]
        return None

    async def cont(self) -> None:
        self.step("cont")
        self.vcpus = True
        assert self.consistent()

    # the server

    async def call(self, command: str, timeout: float = 1.0, **arguments: Any) -> dict[str, Any]:
        if command == "status":
            self.step("status")
            return {"phase": self.phase, "resets": self.resets, "description": msgspec.to_builtins(DEVICE)}
        if command == "pci":
            return {"config": self.config.hex(), "bar0": 0xFE000000}
        self.step("load check" if arguments.get("check") else command)
        match command:
            case "pause":
                assert not self.vcpus
                self.phase = "paused"
                return {"files": [] if self.disk is None else ["file.disk.image"]}
            case "resume":
                assert self.phase == "paused"
                self.phase = "running"
            case "save":
                self.state = state_of(self.device)
                files = {}
                if self.disk is not None:
                    write_new(f"{arguments['files']}/file.disk.image", self.disk)
                    files["file.disk.image"] = len(self.disk)
                return self.saved(arguments["path"]) | {"files": files}
            case "load":
                data = read(arguments["path"])
                assert hashlib.sha256(data).hexdigest() == arguments["sha256"]
                assert arguments["description"] == msgspec.to_builtins(DEVICE)
                if not arguments["check"]:
                    self.phase = "restoring"
                    if self.disk is not None:
                        self.disk = read(f"{arguments['files']}/file.disk.image")
                    self.loaded = int.from_bytes(saved.decode(data).synic.outbox[0], "big")
                return {"packets": PACKETS, "channels": 2}
            case "restore-finish":
                if self.config != CONFIG:
                    raise ControlError("restore-finish", "state", "the PCI function was not put back as it was saved")
                assert self.loaded is not None
                self.device, self.phase = self.loaded, "running"
                return {"packets": PACKETS}
        return {}

    # the VM

    async def put_back(self, config: bytes) -> int:
        self.step("put back")
        self.config = config
        return 7

    async def renew_agent(self, reason: str) -> None:
        assert not self.vcpus
        self.forgotten.append(reason)


class Vm:
    """The model with three checkpoints: a at moment 1, b at 2, c at 3; it is at moment 4. `own`: in a directory that
    ends with it."""

    def __init__(self, directory: Path, model: Model | None = None, tags: str = "abc", *, own: bool = False) -> None:
        self.directory = directory
        self.model = model or Model(folder=directory)
        self._where = None if own else directory
        for tag in tags:
            self.take(tag)
            self.model.work()
        self.model.steps.clear()

    @property
    def store(self) -> Store:
        return image_in(self.model, self._where).store

    def revert(self, tag: str, **more: Any) -> Any:
        return asyncio.run(revert(self.model, tag, directory=self._where, **more))

    def take(self, tag: str) -> Any:
        return asyncio.run(checkpoint(self.model, tag, directory=self._where))

    def delete(self, tag: str) -> None:
        asyncio.run(delete_checkpoint(self.model, tag, directory=self._where))

    def become(self, **changed: Any) -> None:
        """Another VM opens the same checkpoints."""
        for name, value in changed.items():
            setattr(self.model, name, value)
        self.model.images.clear()


@pytest.fixture
def vm(tmp_path: Path) -> Vm:
    return Vm(tmp_path / "checkpoints")


def test_the_steps_of_a_checkpoint(tmp_path: Path) -> None:
    model = Model()
    report = Vm(tmp_path / "c", model, "").take("now")
    steps = [step for step in model.steps if step != "status"]
    assert steps == [
        *("blockdev-add", "blockdev-create", "job-dismiss", "blockdev-add"),
        *("migrate-set-capabilities", "migrate-set-parameters"),
        *("stop", "barrier", "pause", "save", "snapshot-save", "job-dismiss", "resume", "cont"),
    ]
    assert (report.packets, report.incoming_held, report.vm_state_bytes) == (PACKETS, 5, 7)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["now.json", "now.state", IMAGE]
    assert model.vcpus and model.consistent()


def test_the_steps_of_a_revert(vm: Vm) -> None:
    report = vm.revert("b")
    steps = [step for step in vm.model.steps if step != "status"]
    assert steps == [
        *("migrate-set-capabilities", "load check", "stop", "barrier", "pause", "snapshot-load", "job-dismiss"),
        *("load", "put back", "restore-finish", "cont"),
    ]
    assert vm.model.memory == vm.model.device == 2 and vm.model.vcpus
    assert (report.channels, report.pci_writes, report.forced) == (2, 7, False)
    assert len(vm.model.forgotten) == 1


def test_to_any_and_forward_again(vm: Vm) -> None:
    for tag, moment in (("a", 1), ("c", 3), ("b", 2), ("a", 1), ("a", 1), ("c", 3)):
        vm.revert(tag)
        assert vm.model.memory == vm.model.device == moment
        vm.model.work()
        assert [one.tag for one in vm.store.list()] == ["a", "b", "c"]


def test_after_a_migration_that_failed(vm: Vm) -> None:
    """QEMU fails every load while it remembers that error."""
    vm.model.migration_error = "Switchover is interrupted"
    before = dict(vm.model.snapshots)
    vm.revert("b")
    assert vm.model.memory == vm.model.device == 2 and vm.model.vcpus
    assert vm.model.snapshots == before, "what was saved to make QEMU forget is gone"
    with pytest.raises(UsageError):
        check_tag(THROWN_AWAY)


def test_after_a_migration_that_failed_and_what_a_killed_revert_left(vm: Vm) -> None:
    vm.model.snapshots[f"vmbus-{THROWN_AWAY}"] = {"memory": 0, "made": 99}
    vm.revert("b")
    assert sorted(vm.model.snapshots) == ["vmbus-a", "vmbus-b", "vmbus-c"]


def test_without_room_to_make_qemu_forget_nothing_is_changed(vm: Vm) -> None:
    vm.model.migration_error = "Switchover is interrupted"
    vm.model.job_errors["snapshot-save"] = "No space left on device"
    with pytest.raises(RevertFailed, match=r"forget that a migration failed.*No space.*the VM runs on") as failed:
        vm.revert("b")
    assert failed.value.source_alive and vm.model.consistent() and vm.model.vcpus
    assert vm.model.memory == vm.model.device == 4


def test_a_provider_that_does_not_come_to_rest_is_ended_before_memory_is_replaced(vm: Vm) -> None:
    vm.model.fail["pause"] = [ControlError("pause", "timeout", "echo holds packets")]
    report = vm.revert("a")
    assert report.forced
    assert vm.model.steps.index("load") < vm.model.steps.index("snapshot-load")
    assert vm.model.memory == vm.model.device == 1 and vm.model.vcpus


def test_files_of_providers_belong_to_a_checkpoint(tmp_path: Path) -> None:
    vm = Vm(tmp_path / "checkpoints")
    store, model = vm.store, vm.model
    model.disk = b"as in d"
    vm.take("d")
    model.work()
    model.disk = b"as in e"
    vm.take("e")
    names = {path.name for path in store.directory.iterdir()}
    assert {"d.files", "e.files"} <= names and "a.files" not in names
    vm.revert("d")
    assert model.disk == b"as in d" and model.memory == model.device == 4
    vm.revert("e")
    assert model.disk == b"as in e" and model.memory == model.device == 5
    # What is not the file that was saved is refused before anything is done.
    model.steps.clear()
    copy = store.files("d") / "file.disk.image"
    copy.write_bytes(b"as in D")
    with pytest.raises(StateError, match="is not the file of checkpoint 'd'"):
        vm.revert("d")
    copy.unlink()
    with pytest.raises(StateError, match="which belongs to the checkpoint"):
        vm.revert("d")
    copy.write_bytes(b"as in d")
    (store.files("d") / "file.disk.other").write_bytes(b"")
    with pytest.raises(StateError, match="do not belong to the checkpoint"):
        vm.revert("d")
    assert model.steps == []
    vm.delete("d")
    assert not store.files("d").exists()
    # A checkpoint that fails leaves nothing of them.
    model.fail["snapshot-save"] = [EnvironmentProblem("on purpose")]
    with pytest.raises(SaveFailed):
        vm.take("f")
    assert not store.files("f").exists()


# ---- what fails ------------------------------------------------------------------------------------------------------

BEFORE = ["status", "stop", "barrier", "pause"]
"""Steps of a revert after which the VM runs on as it was; `status` is the look at the resets."""


@pytest.mark.parametrize("step", BEFORE)
def test_a_failure_before_the_load_leaves_the_vm_running(vm: Vm, step: str) -> None:
    vm.model.fail[step] = [EnvironmentProblem("no")]
    before = vm.model.memory
    with pytest.raises(RevertFailed, match=r"revert to 'a' failed: no; the VM runs on") as caught:
        vm.revert("a")
    assert caught.value.source_alive
    assert vm.model.vcpus and vm.model.memory == vm.model.device == before
    vm.revert("a")


def test_a_load_that_fails_before_qemu_resets_leaves_the_vm_running(vm: Vm) -> None:
    vm.model.job_errors["snapshot-load"] = "no such file"
    with pytest.raises(RevertFailed, match=r"no such file; the VM runs on") as caught:
        vm.revert("a")
    assert caught.value.source_alive and vm.model.vcpus and vm.model.memory == vm.model.device == 4


HALF_WAY: dict[str, tuple[dict[str, list[BaseException]], dict[str, Any], str]] = {
    "reset": ({}, {"load_fails_after_reset": True}, "half way: .*stream is broken.*ended.*run-vm"),
    "device gone already": (
        {"pause": [ControlError("pause", "timeout", "echo holds packets")]},
        {"job_errors": {"snapshot-load": "no such file"}},
        "half way",
    ),
} | {
    step: ({step: [EnvironmentProblem("no")]}, {}, "half way: no; the VM has been ended")
    for step in ("load", "put back", "restore-finish", "cont")
}


@pytest.mark.parametrize(("fail", "changed", "word"), HALF_WAY.values(), ids=HALF_WAY)
def test_a_failure_after_qemu_has_reset_is_the_end_and_never_runs_a_mixture(
    vm: Vm, fail: dict[str, Any], changed: dict[str, Any], word: str
) -> None:
    vm.model.fail |= {step: list(errors) for step, errors in fail.items()}
    for name, value in changed.items():
        setattr(vm.model, name, value)
    with pytest.raises(RevertFailed, match=word) as caught:
        vm.revert("a")
    assert str(vm.directory) in str(caught.value), "where its checkpoints are"
    assert not caught.value.source_alive and not vm.model.vcpus


def test_sabotage_without_the_pci_replay(vm: Vm) -> None:
    with pytest.raises(RevertFailed, match="not put back"):
        vm.revert("a", sabotage=Sabotage(skip_pci_replay=True))
    assert not vm.model.vcpus


def test_the_end_of_own_checkpoints_is_said(tmp_path: Path) -> None:
    vm = Vm(tmp_path / "c", tags="a", own=True)
    vm.model.load_fails_after_reset = True
    with pytest.raises(RevertFailed, match=r"its checkpoints ended with it.*scripts/restore"):
        vm.revert("a")


def test_a_revert_that_cannot_be_undone_says_so(vm: Vm) -> None:
    vm.model.fail["pause"] = [EnvironmentProblem("no")]
    vm.model.fail["cont"] = [EnvironmentProblem("gone")]
    with pytest.raises(RevertFailed, match="the VM is lost") as caught:
        vm.revert("a")
    assert not caught.value.source_alive


@pytest.mark.parametrize("step", ["stop", "barrier", "pause", "save", "snapshot-save", "job-dismiss", "resume", "cont"])
def test_a_checkpoint_that_fails_leaves_the_vm_running_and_nothing_behind(vm: Vm, step: str) -> None:
    vm.model.fail[step] = [EnvironmentProblem("no")]
    with pytest.raises(SaveFailed, match="checkpoint 'd' failed: no; the VM runs on") as caught:
        vm.take("d")
    assert caught.value.source_alive and vm.model.vcpus and vm.model.consistent()
    assert sorted(vm.store.tags()) == ["a", "b", "c"]
    assert not (vm.directory / "d.state").exists()
    vm.take("d")
    assert sorted(vm.model.snapshots) == [f"vmbus-{tag}" for tag in "abcd"]


def test_fault_h13_what_a_failed_checkpoint_wrote_into_the_image_is_given_back(vm: Vm) -> None:
    """QEMU would keep it for the next one, however long that takes (tests/vm/test_checkpoint.py has the real one)."""
    vm.model.job_errors["snapshot-save"] = "No space left on device"
    reserves: list[bool] = []
    execute = vm.model.execute

    async def look(command: str, *arguments: Any, **more: Any) -> Any:
        if command in ("snapshot-save", "block_resize"):
            reserves.append((vm.directory / ".reserve").exists())
        return await execute(command, *arguments, **more)

    vm.model.execute = look  # type: ignore[method-assign]
    with pytest.raises(SaveFailed, match=r"No space left on device; the VM runs on"):
        vm.take("d")
    assert not list(vm.directory.glob("d.*"))
    assert vm.model.steps[-2:] == ["block_resize", "block_resize"]
    assert reserves == [True, False, False], "there is room for what has to be written for that"
    del vm.model.job_errors["snapshot-save"]
    vm.model.steps.clear()
    vm.take("d")
    assert "block_resize" not in vm.model.steps and not (vm.directory / ".reserve").exists()


def test_fault_h13_a_checkpoint_is_not_begun_without_room(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    vm.model.steps.clear()
    with pytest.raises(EnvironmentProblem, match=r"no checkpoint can be kept in .*No space left on device"):
        vm.take("d")
    assert vm.model.steps == [] and vm.model.vcpus and not (vm.directory / ".reserve").exists()


def test_fault_h12_what_was_left_half_taken_or_half_deleted_is_removed_by_the_next(vm: Vm) -> None:
    """Of whatever name: its record is missing."""
    (vm.directory / "x.state").write_bytes(b"half")
    (vm.directory / "x.files").mkdir()
    (vm.directory / "x.files" / "file.disk.image").touch()
    (vm.directory / "letter.txt").touch()
    vm.model.snapshots["vmbus-x"] = vm.model.snapshots["vmbus-y"] = {"memory": 1, "made": 9}
    vm.take("d")
    assert sorted(vm.model.snapshots) == [f"vmbus-{tag}" for tag in "abcd"]
    left = {path.name for path in vm.directory.iterdir()}
    assert left == {"letter.txt", IMAGE} | {f"{tag}.{kind}" for tag in "abcd" for kind in ("json", "state")}


def test_an_image_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    model = Model()
    model.job_errors["blockdev-create"] = "no"
    with pytest.raises(QmpCommandFailed, match="no"):
        Vm(tmp_path / "c", model, "a")
    assert model.nodes == [] and list((tmp_path / "c").iterdir()) == [] and model.vcpus


@pytest.mark.parametrize("step", ["save", "snapshot-save"])
def test_an_interrupted_checkpoint_leaves_nothing(vm: Vm, step: str) -> None:
    vm.model.fail[step] = [asyncio.CancelledError()]
    with pytest.raises(asyncio.CancelledError):
        vm.take("d")
    assert vm.model.vcpus and vm.model.consistent() and not (vm.directory / "d.state").exists()


def test_an_interrupted_revert_goes_all_the_way(vm: Vm) -> None:
    """Once memory is being replaced there is no way back."""
    load = vm.model._job

    def interrupt(command: str, given: dict[str, Any]) -> str | None:
        if command == "snapshot-load":
            task.cancel()
        return load(command, given)

    async def body() -> None:
        nonlocal task
        task = asyncio.create_task(revert(vm.model, "a", directory=vm.directory))
        vm.model._job = interrupt  # type: ignore[method-assign]
        with pytest.raises(asyncio.CancelledError):
            await task

    task: asyncio.Task[Any]
    asyncio.run(body())
    assert vm.model.vcpus and vm.model.memory == vm.model.device == 1


# ---- refusals --------------------------------------------------------------------------------------------------------


def changed_state(vm: Vm) -> None:
    path = vm.directory / "a.state"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def changed_record(vm: Vm) -> None:
    path = vm.directory / "a.json"
    record = json.loads(path.read_bytes())
    record["checkpoint"]["packets"]["sent"] += 1
    path.write_text(json.dumps(record))


def another(suffix: str) -> Callable[[Vm], object]:
    """What is b's in the place of a's."""
    return lambda vm: (vm.directory / f"a.{suffix}").write_bytes((vm.directory / f"b.{suffix}").read_bytes())


REFUSALS: dict[str, tuple[Callable[[Vm], object], type[Exception], str]] = {
    "changed state": (changed_state, StateError, "not the device's state"),
    "another state": (another("state"), StateError, "not the device's state"),
    "no state": (lambda vm: (vm.directory / "a.state").unlink(), StateError, "cannot read"),
    "another record": (another("json"), StateError, "record of the checkpoint 'b'"),
    "garbage": (lambda vm: (vm.directory / "a.json").write_bytes(b"{"), StateError, "not the record"),
    "changed record": (changed_record, StateError, "changed after"),
    "reformatted record": (
        lambda vm: (vm.directory / "a.json").write_text(json.dumps(json.loads((vm.directory / "a.json").read_bytes()))),
        StateError,
        "changed after",
    ),
    "not in the image": (lambda vm: vm.model.snapshots.pop("vmbus-a"), StateError, "does not have QEMU's part"),
    "another in the image": (
        lambda vm: vm.model.snapshots.update({"vmbus-a": {"memory": 99, "made": 99}}),
        StateError,
        "does not have QEMU's part",
    ),
    "unsafe setting": (lambda vm: vm.model.capabilities.update({"postcopy-ram": True}), UsageError, "postcopy-ram"),
    "does not fit": (
        lambda vm: vm.model.fail.update({"load check": [ControlError("load", "state", "providers of another kind")]}),
        StateError,
        "another kind",
    ),
    "another vm": (
        lambda vm: vm.become(description=msgspec.structs.replace(VM, memory_mib=512)),
        StateError,
        "another VM",
    ),
    "room for no second cpu": (
        lambda vm: vm.become(machine=msgspec.structs.replace(vm.model.machine, spare_cpus=0)),
        StateError,
        "spare CPUs: 1.*; this one .* spare CPUs: 0.*; start the VM with --like /",
    ),
}


@pytest.mark.parametrize(("damage", "error", "word"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_changes_nothing(vm: Vm, damage: Callable[[Vm], object], error: type[Exception], word: str) -> None:
    damage(vm)
    with pytest.raises(error, match=word):
        vm.revert("a")
    assert vm.model.vcpus and vm.model.memory == vm.model.device == 4
    assert "stop" not in vm.model.steps


def test_fault_m8_a_checkpoint_of_a_paused_vm_is_paused_after_a_revert(vm: Vm) -> None:
    vm.model.vcpus = False
    vm.take("paused")
    assert not vm.model.vcpus and vm.store.record("paused").paused is True
    vm.model.vcpus = True
    vm.revert("paused")
    assert not vm.model.vcpus and vm.model.memory == vm.model.device == 4
    vm.revert("a")
    assert not vm.model.vcpus, "a VM that is paused stays so"
    vm.model.vcpus = True
    vm.revert("a")
    assert vm.model.vcpus and vm.store.record("a").paused is msgspec.UNSET


@pytest.mark.parametrize("tag", ["", "A", "a b", "../a", ".a", "a/b", "x" * 33, "a\n"])
def test_names_that_no_checkpoint_has(vm: Vm, tag: str) -> None:
    with pytest.raises(UsageError, match="not a usable name"):
        check_tag(tag)
    with pytest.raises(UsageError, match="not a usable name"):
        vm.take(tag)
    with pytest.raises(UsageError, match="not a usable name"):
        vm.revert(tag)


def test_a_tag_is_used_once_and_free_after_its_end(vm: Vm) -> None:
    with pytest.raises(UsageError, match="already"):
        vm.take("a")
    vm.delete("a")
    assert "vmbus-a" not in vm.model.snapshots and not (vm.directory / "a.state").exists()
    with pytest.raises(UsageError, match=r"no checkpoint 'a' .*there: b, c"):
        vm.delete("a")
    with pytest.raises(UsageError, match=r"no checkpoint 'a' .*there: b, c"):
        vm.revert("a")
    vm.take("a")
    assert [one.tag for one in vm.store.list()] == ["b", "c", "a"]


def test_a_directory_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("precious")
    with pytest.raises(UsageError, match="has other things in it"):
        Vm(tmp_path, tags="a")
    assert [path.name for path in tmp_path.iterdir()] == ["letter"]
    with pytest.raises(EnvironmentProblem, match="cannot keep checkpoints"):
        Vm(tmp_path / "letter", tags="a")


def test_a_job_that_is_gone_is_an_error() -> None:
    class Forgetful(Model):
        async def execute(self, command: str, arguments: Any = None, *, timeout: float = 1.0) -> Any:
            return [] if command == "query-jobs" else None

    with pytest.raises(QmpCommandFailed, match="nobody knows"):
        asyncio.run(run_job(Forgetful(), "snapshot-save", {}, 1.0, "saving"))


# ---- a QEMU that migrates the device itself --------------------------------------------------------------------------


class Driving(Model):
    """The device is in what QEMU saves and loads; it stops and runs with the vCPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.driven = True
        self.in_stream = True

    async def perform(self, command: str, given: dict[str, Any]) -> Any:
        if command == "stop":
            self.phase = "driven"
        return await super().perform(command, given)

    def _job(self, command: str, given: dict[str, Any]) -> str | None:
        if command == "blockdev-create":
            return None
        assert self.phase == "driven" and not self.vcpus
        if command == "snapshot-save":
            self.saves += 1
            self.snapshots[given["tag"]] = {"memory": self.memory, "device": self.device, "made": self.saves}
        else:
            self.resets += 1
            self.memory = self.snapshots[given["tag"]]["memory"]
            if self.in_stream:
                self.loaded = self.snapshots[given["tag"]]["device"]
        return None

    async def cont(self) -> None:
        self.phase = "running"
        if self.loaded is not None:
            self.device, self.loaded = self.loaded, None
        await super().cont()

    async def human(self, line: str, *, timeout: float = 1.0) -> str:
        raise AssertionError("QEMU does that itself")

    async def call(self, command: str, timeout: float = 1.0, **arguments: Any) -> dict[str, Any]:
        assert command in ("status", "pci", "save") or arguments.get("check"), command
        assert command != "save" or self.phase == "driven"
        found = await super().call(command, timeout, **arguments)
        if command == "status":
            found |= {
                "driven_by_client": self.driven,
                "migration": {"state": "resuming", "complete": self.loaded is not None},
            }
        return found


def test_what_qemu_does_itself_is_left_to_it(tmp_path: Path) -> None:
    model = Driving()
    vm = Vm(tmp_path / "c", model, "a")
    assert vm.store.record("a").machine.device_in_stream
    report = vm.revert("a")
    assert model.memory == model.device == 1 and model.vcpus and model.consistent()
    assert (report.packets, report.channels, report.pci_writes) == (PACKETS, 0, 0)


def test_a_checkpoint_of_another_kind_is_refused_and_the_vm_runs_on(tmp_path: Path) -> None:
    model = Driving()
    vm = Vm(tmp_path / "c", model, "a")
    model.driven = False
    with pytest.raises(RevertFailed, match=r"in QEMU's stream.*the VM runs on") as caught:
        vm.revert("a")
    assert caught.value.source_alive and model.vcpus and model.consistent()


def test_a_stream_without_the_device_ends_the_vm(tmp_path: Path) -> None:
    model = Driving()
    vm = Vm(tmp_path / "c", model, "a")
    model.in_stream = False
    with pytest.raises(RevertFailed, match="was not in it"):
        vm.revert("a")
    assert not model.vcpus
