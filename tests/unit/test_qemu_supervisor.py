"""The owner of a VM and those who ask it for things; the VM is a dummy."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmbus.cli.asking import ask, find_vm
from vmbus.cli.running import status_of, statuses
from vmbus.cli.supervisor import Supervisor
from vmbus.errors import Code, EnvironmentProblem, ReportedError, StateError, UsageError, VmbusError, WaitTimeout
from vmbus.operations.checkpoint import CheckpointReport
from vmbus.operations.migration.report import MigrationReport
from vmbus.operations.revert import RevertReport
from vmbus.operations.save import SaveReport
from vmbus.operations.stop import StopFailed
from vmbus.vm.errors import MigrateFailed, RevertFailed, SaveFailed
from vmbus.vm.process import ProcessDied
from vmbus.vm.run_directory import RunDirectory
from vmbus.vm.sockets import Sockets


class DummyVm:
    """As much of a VirtualMachine as its supervisor uses."""

    def __init__(self, name: str = "demo") -> None:
        self.run_directory = RunDirectory.create(name)
        self.name = self.run_directory.name
        self.paths = Sockets(self.run_directory.path)
        self.programs = SimpleNamespace(qemu_version="11.1.3", accelerator="tcg", foreign=False)
        kinds = [SimpleNamespace(kind=kind, name=kind) for kind in ("echo", "burst", "echo")]
        self.description = SimpleNamespace(all_devices=[SimpleNamespace(providers=kinds)])
        self.in_doubt = False
        self.stop_error: VmbusError | None = None
        self.monitor = SimpleNamespace(running=self._running)
        self.agent = SimpleNamespace(request=self._request)
        self.end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.ended = False
        self.moved_to: str | None = None
        self.migrations: list[dict[str, Any]] = []
        self.migrate_error: VmbusError | None = None
        self.resolved: list[bool] = []
        self.saves: list[dict[str, Any]] = []
        self.save_error: VmbusError | None = None
        self.hold_save = False
        self.save_interrupted = False
        self.saving = asyncio.Event()

    async def _running(self) -> bool:
        return True

    async def _request(self, command: str, arguments: dict[str, Any], *, timeout: float) -> dict[str, Any]:
        return {"command": command, "arguments": arguments}

    async def command_provider(
        self, provider: str, command: str, arguments: dict[str, Any], *, timeout: float
    ) -> dict[str, Any]:
        return {"provider": provider, "command": command, "arguments": arguments, "timeout": timeout}

    async def guard(self, work: Awaitable[Any], what: str, timeout: float) -> Any:
        return await work

    async def wait_ended(self) -> str:
        return await asyncio.shield(self.end)

    async def save(self, directory: Path, *, live: bool, keep: bool, progress: Any) -> SaveReport:
        progress("ram")
        self.saving.set()
        if self.hold_save:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.save_interrupted = True
                raise
        if self.save_error is not None:
            raise self.save_error
        self.saves.append({"directory": str(directory), "live": live, "keep": keep})
        return SaveReport(
            directory=str(directory), live=live, phases={}, stopped_at=1.0, packets={"queued": 0, "sent": 0},
            incoming_held=0,
        )  # fmt: skip

    async def migrate(self, address: str, secret: bytes, *, progress: Any, **options: Any) -> MigrationReport:
        progress("ram")
        if self.migrate_error is not None:
            raise self.migrate_error
        self.migrations.append({"address": address, "secret": secret, **options})
        self.moved_to = address
        self.ended = True
        self.end.set_exception(ProcessDied("QEMU was killed by SIGKILL"))  # as a VM that leaves ends its processes
        return MigrationReport(
            migration="0" * 32, address=address, phases={}, downtime=0.2, downtime_qemu=0.1, downtime_device=0.1,
            spans={}, packets={"queued": 0, "sent": 0}, incoming_held=0, channels=2, ram_bytes=0, state_bytes=0,
            flushed_pages=0, flushed_bytes=0, attempts=1, multifd=0, asked=False,
        )  # fmt: skip

    async def resolve(self, *, run: bool) -> None:
        self.resolved.append(run)
        self.ended = not run

    async def power_off(self, timeout: float) -> None:
        if self.stop_error is not None:
            raise self.stop_error
        self.end.set_result("the guest powered off")

    async def kill(self) -> None:
        self.ended = True
        self.run_directory.remove()

    leave = kill


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@contextlib.asynccontextmanager
async def supervised(vm: DummyVm, notices: list[str] | None = None) -> AsyncIterator[asyncio.Task[str]]:
    async def console(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(console, path=str(vm.paths.console))
    supervisor = Supervisor(vm, (notices if notices is not None else []).append)  # type: ignore[arg-type]
    task = asyncio.create_task(supervisor.run())
    while not vm.paths.supervisor.exists():  # noqa: ASYNC110 - made by the task, within one turn of the loop
        await asyncio.sleep(0)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        server.close()


async def test_status_and_agent_requests() -> None:
    vm = DummyVm()
    async with supervised(vm):
        assert find_vm(None) == "demo"
        assert (await ask("demo", "status", timeout=10))["qemu"] == "11.1.3"
        found = await ask("demo", "agent", {"command": "echo", "arguments": {"data": 1}}, timeout=10)
        assert found == {"command": "echo", "arguments": {"data": 1}}
        wish = {"provider": "services", "command": "kvp-get", "arguments": {"key": "a"}, "seconds": 3.0}
        found = await ask("demo", "provider", wish, timeout=10)
        assert found == {"provider": "services", "command": "kvp-get", "arguments": {"key": "a"}, "timeout": 3.0}


async def test_a_save_ends_the_vm_unless_it_is_kept() -> None:
    vm, notices, steps = DummyVm(), [], []
    async with supervised(vm, notices) as task:
        kept = await ask("demo", "save", {"directory": "/a", "keep": True}, timeout=10, progress=steps.append)
        assert kept["directory"] == "/a" and not vm.ended
        await ask("demo", "save", {"directory": "/b", "live": True}, timeout=10)
        assert await asyncio.wait_for(task, 10) == "saved to /b"
    assert vm.ended
    assert [save["live"] for save in vm.saves] == [False, True]
    assert steps == ["ram"]
    assert notices == ["saving to /a ...", "saved to /a", "saving to /b ...", "saved to /b"]


async def test_a_migration_ends_the_vm_here(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_bytes(bytes(range(32)))
    arguments = {"address": "tcp:there:1", "secret_file": str(secret), "multifd": 2}

    vm, notices = DummyVm(), []
    async with supervised(vm, notices) as task:
        vm.migrate_error = MigrateFailed("migration failed: link cut; the VM runs on", source_alive=True)
        with pytest.raises(VmbusError, match="link cut; the VM runs on"):
            await ask("demo", "migrate", arguments, timeout=10)
        assert not vm.ended
        vm.migrate_error = None
        report = await ask("demo", "migrate", arguments, timeout=10)
        assert report["downtime"] == 0.2
        assert await asyncio.wait_for(task, 10) == "migrated to tcp:there:1"
    assert vm.migrations == [
        {
            "address": "tcp:there:1",
            "secret": bytes(range(32)),
            "tls": None,
            "multifd": 2,
            "timeout": None,
            "downtime_limit": None,
            "bandwidth": None,
        }
    ]
    assert notices[:2] == ["migrating to tcp:there:1 ...", "migration failed: link cut; the VM runs on"]


@pytest.mark.parametrize("choice", [True, False])
async def test_a_migration_in_doubt_waits_for_a_decision(choice: bool) -> None:
    vm = DummyVm()
    async with supervised(vm) as task:
        assert await ask("demo", "resolve", {"run": choice}, timeout=10) == {"runs": choice}
        assert vm.resolved == [choice]
        if choice:
            assert (await ask("demo", "status", timeout=10))["state"] == "running"
        else:
            assert "runs at its migration's destination" in await asyncio.wait_for(task, 10)


async def test_hanging_up_interrupts_a_save() -> None:
    vm = DummyVm()
    vm.hold_save = True
    async with supervised(vm):
        asking = asyncio.create_task(ask("demo", "save", {"directory": "/a"}, timeout=10))
        await vm.saving.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        while not vm.save_interrupted:  # noqa: ASYNC110 - bounded by the test's own limit
            await asyncio.sleep(0.001)
        assert not vm.ended
        assert (await ask("demo", "status", timeout=10))["state"] == "running"


async def test_the_vms_own_end() -> None:
    vm = DummyVm()
    async with supervised(vm) as task:
        vm.end.set_result("the guest powered off")
        assert await asyncio.wait_for(task, 10) == "the guest powered off"
    vm = DummyVm()
    async with supervised(vm) as task:
        vm.end.set_exception(ProcessDied("QEMU was killed by SIGKILL"))
        with pytest.raises(ProcessDied, match="SIGKILL"):
            await asyncio.wait_for(task, 10)
    assert vm.ended


async def test_stop_and_nonsense() -> None:
    vm = DummyVm()
    async with supervised(vm) as task:
        with pytest.raises(VmbusError, match="has no command 'fly'"):
            await ask("demo", "fly", timeout=10)
        with pytest.raises(VmbusError, match="directory"):
            await ask("demo", "save", {}, timeout=10)
        for garbage in (b"garbage\n", b"\xff\n", b"\n"):
            reader, writer = await asyncio.open_unix_connection(str(vm.paths.supervisor))
            writer.write(garbage)
            assert b'"error"' in await reader.readline()
            writer.close()
        assert await ask("demo", "stop", {"kill": True}, timeout=10) == {"powered_off": False}
        assert await asyncio.wait_for(task, 10) == "ended on request"


async def test_a_detached_vm_is_asked_to_power_off_and_runs_on_if_it_does_not() -> None:
    vm, notices = DummyVm(), []
    async with supervised(vm, notices) as task:
        vm.stop_error = StopFailed("the guest did not power off", source_alive=True)
        with pytest.raises(ReportedError, match="did not power off") as refused:
            await ask("demo", "stop", timeout=10)
        assert refused.value.status == 13 and not vm.ended
        vm.in_doubt = True
        assert (await ask("demo", "status", timeout=10))["state"] == "in doubt"
        with pytest.raises(ReportedError, match="waits for a decision") as refused:
            await ask("demo", "stop", {"kill": True}, timeout=10)
        assert refused.value.status == UsageError.status and not vm.ended
        vm.stop_error = None
        assert await ask("demo", "stop", timeout=10) == {"powered_off": True}
        assert await asyncio.wait_for(task, 10) == "the guest powered off"
    assert notices == ["the guest is asked to power off ..."] * 2


async def test_detached_vms_are_listed_with_what_is_to_be_said_of_them() -> None:
    vm = DummyVm()
    async with supervised(vm):
        found = await status_of("demo")
        assert (found.state, found.pid, found.device, found.qemu) == ("running", os.getpid(), "echo, burst", "11.1.3")
        assert found.since is not None and not found.detached and found.log is None
        RunDirectory.create("another")
        assert [(one.name, one.state) for one in await statuses()] == [("another", "starting"), ("demo", "running")]


async def test_cancelling_the_owner_tears_the_vm_down() -> None:
    vm = DummyVm()
    async with supervised(vm):
        pass
    assert vm.ended


def test_choosing_a_vm() -> None:
    with pytest.raises(UsageError, match="no VM is running"):
        find_vm(None)
    RunDirectory.create("one")
    assert find_vm(None) == "one"
    RunDirectory.create("two")
    with pytest.raises(UsageError, match=r"several VMs are running \(one, two\)"):
        find_vm(None)
    assert find_vm("two") == "two"
    with pytest.raises(UsageError, match="no VM 'three' is running; running: one, two"):
        find_vm("three")


async def test_an_owner_that_is_gone_or_silent(tmp_path: Path) -> None:
    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    (tmp_path / "vmbus").mkdir(mode=0o700)
    with pytest.raises(EnvironmentProblem, match="cannot talk to the owner"):
        await ask("absent", "status", timeout=10)
    (tmp_path / "vmbus" / "x").mkdir(parents=True)
    path = tmp_path / "vmbus" / "x" / "supervisor.sock"
    server = await asyncio.start_unix_server(mute, path=str(path))
    with pytest.raises(WaitTimeout, match="to perform 'status'"):
        await ask("x", "status", timeout=0.05)
    server.close()
    path.unlink()
    server = await asyncio.start_unix_server(hang_up, path=str(path))
    with pytest.raises(EnvironmentProblem, match=r"went away before|cannot talk"):
        await ask("x", "status", timeout=10)
    server.close()


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class WithCheckpoints(DummyVm):
    """Remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Any, ...]] = []

    async def checkpoint(self, tag: str, *, directory: Path | None, progress: Any) -> CheckpointReport:
        progress("ram")
        self.asked.append(("checkpoint", tag, directory))
        return CheckpointReport(
            tag=tag, directory=str(directory), phases={}, downtime=0.1, packets={"queued": 1, "sent": 2},
            incoming_held=3, state_bytes=4, vm_state_bytes=5,
        )  # fmt: skip

    async def revert(self, tag: str, *, directory: Path | None, progress: Any) -> RevertReport:
        self.asked.append(("revert", tag, directory))
        if tag == "half":
            self.ended = True
            raise RevertFailed("half way back", source_alive=False)
        if tag == "none":
            raise UsageError("there is no checkpoint 'none'")
        return RevertReport(
            tag=tag, directory="", phases={}, downtime=0.1, packets={"queued": 1, "sent": 2}, channels=2, pci_writes=7,
            forced=False,
        )  # fmt: skip

    async def delete_checkpoint(self, tag: str, *, directory: Path | None) -> None:
        self.asked.append(("delete", tag, directory))

    def checkpoints(self, *, directory: Path | None) -> list[Any]:
        self.asked.append(("list", directory))
        return []


async def test_checkpoints_and_reverts_over_the_supervisors_socket() -> None:
    vm = WithCheckpoints()
    async with supervised(vm) as running:
        steps: list[str] = []
        taken = await ask("demo", "checkpoint", {"tag": "a"}, timeout=10, progress=steps.append)
        assert taken["packets"] == {"queued": 1, "sent": 2} and steps == ["ram"]
        assert (await ask("demo", "revert", {"tag": "a", "directory": "/x"}, timeout=10))["channels"] == 2
        assert await ask("demo", "checkpoints", {"directory": None}, timeout=10) == {"checkpoints": []}
        assert await ask("demo", "delete-checkpoint", {"tag": "a"}, timeout=10) == {}
        for wrong in ({}, {"tag": 7}, {"tag": "a", "more": 1}):
            with pytest.raises(VmbusError):
                await ask("demo", "revert", wrong, timeout=10)
        with pytest.raises(VmbusError, match="no checkpoint 'none'"):
            await ask("demo", "revert", {"tag": "none"}, timeout=10)
        assert not running.done(), "a refusal is not the end"
        with pytest.raises(VmbusError, match="half way back"):
            await ask("demo", "revert", {"tag": "half"}, timeout=10)
        assert await running == "half way back"
    assert vm.asked[:4] == [
        ("checkpoint", "a", None),
        ("revert", "a", Path("/x")),
        ("list", None),
        ("delete", "a", None),
    ]


@pytest.mark.parametrize(
    "error", [StateError("damaged"), SaveFailed("full", source_alive=True, code=Code.DISK_FULL), WaitTimeout("it", 3)]
)
async def test_an_error_keeps_its_kind_and_code_over_the_socket(error: VmbusError) -> None:
    vm = DummyVm()
    vm.save_error = error
    async with supervised(vm):
        with pytest.raises(ReportedError) as caught:
            await ask("demo", "save", {"directory": "/x"}, timeout=10)
    told = caught.value
    assert (str(told), told.kind, told.code, told.status) == (str(error), error.kind, error.code, error.status)


# ---- what the owner's terminal hears ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["save", "checkpoint", "revert", "delete-checkpoint", "migrate"])
@pytest.mark.parametrize("refusal", [UsageError("refused"), EnvironmentProblem("refused")])
def test_fault_n25_what_was_refused_is_only_told_to_who_asked(
    command: str, refusal: VmbusError, tmp_path: Path
) -> None:
    async def refuses(*_: Any, **__: Any) -> Any:
        raise refusal

    async def body() -> list[str]:
        vm, notices = DummyVm(), []
        for name in ("save", "checkpoint", "revert", "delete_checkpoint", "migrate"):
            setattr(vm, name, refuses)
        secret = tmp_path / "secret"
        secret.write_bytes(b"0123456789abcdef" * 2)
        secret.chmod(0o600)
        arguments: dict[str, dict[str, Any]] = {
            "save": {"directory": "/x", "live": True, "keep": False},
            "migrate": {"address": "tcp:here:1", "secret_file": str(secret)},
        }
        async with supervised(vm, notices):
            with pytest.raises(VmbusError, match="refused"):
                await ask("demo", command, arguments.get(command, {"tag": "now"}), timeout=10)
        return notices

    assert asyncio.run(body()) == []


def test_fault_n25_what_failed_after_it_began_is_told_to_the_owner() -> None:
    async def body() -> list[str]:
        vm, notices = DummyVm(), []
        vm.save_error = VmbusError("the disk is full")
        async with supervised(vm, notices):
            with pytest.raises(VmbusError, match="full"):
                await ask("demo", "save", {"directory": "/x", "live": True, "keep": False}, timeout=10)
        return notices

    assert asyncio.run(body()) == ["saving to /x ...", "the disk is full"]


@pytest.mark.parametrize("accelerator", ["tcg", "kvm"])
async def test_fault_n10_a_jump_of_the_guests_clock_is_explained_where_it_is_seen(accelerator: str) -> None:
    vm, notices = DummyVm(), []
    vm.programs.accelerator = accelerator

    async def reverted(*_: Any, **__: Any) -> RevertReport:
        return RevertReport(
            tag="a", directory="/x", phases={}, downtime=0.1, packets={}, channels=2, pci_writes=1, forced=False
        )

    vm.revert = reverted  # type: ignore[attr-defined]
    async with supervised(vm, notices):
        await ask("demo", "revert", {"tag": "a"}, timeout=10)
    (told,) = notices
    assert told.startswith("taken back to checkpoint 'a'")
    assert ("soft lockup: it is none" in told) is (accelerator == "tcg")
    page = (Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md").read_text()  # noqa: ASYNC240 - quick
    assert "soft lockup - CPU#0 stuck for" in page
