"""A VM for programs and tests that know nothing of asyncio: `BlockingVm`, whose calls return when they are done.

Behind it is a `VirtualMachine` on an event loop in a thread of its own (`LoopThread`). What replaces the VM's processes
(a restore, a migration) replaces the machine inside; the `BlockingVm` stays the same, and so do the test drivers' jobs.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vmbus.errors import EnvironmentProblem, UsageError, VmbusError, WaitTimeout
from vmbus.observe.audit.checker import check_paths
from vmbus.observe.audit.guest import collect_audit
from vmbus.observe.audit.report import Report
from vmbus.operations.checkpoint import CheckpointReport
from vmbus.operations.machine import VirtualMachine
from vmbus.operations.migration.report import MigrationReport
from vmbus.operations.restore import RestoreReport
from vmbus.operations.revert import RevertReport
from vmbus.operations.save import SaveReport
from vmbus.qemu.agent import AgentError, GuestOutput
from vmbus.testkit.driver_file import install, read_driver_file
from vmbus.testkit.moving import move
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.process import log_tail
from vmbus.vm.sockets import numbered

T = TypeVar("T")

OPERATION_TIMEOUT = 600.0
"""Seconds that any one call may take, whatever it waits for inside."""
_AGENT_WAIT = 30.0  # seconds of one wait for a job in the guest; it is repeated
_LOOK = 0.02  # seconds between two looks at what `wait_until` waits for


class DriverFailed(VmbusError):
    """A test driver in the guest did not pass. `report` is what the agent says of its job."""

    def __init__(self, name: str, report: dict[str, Any]) -> None:
        detail = report.get("error") or report.get("result")
        super().__init__(f"test driver {name!r} {report.get('state')}: {detail}")
        self.report = report


class LoopThread:
    """An event loop on a thread. The thread lasts until `close`: processes that it has started end with it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="VMs", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout: float = OPERATION_TIMEOUT) -> T:
        """The result of `work`, which is cancelled, and waited for, when the caller is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            if future.done():
                raise
            self._cancel(future)
            raise WaitTimeout(f"{getattr(work, '__qualname__', 'an operation')} to end", timeout) from None
        except BaseException:
            self._cancel(future)
            raise

    def _cancel(self, future: concurrent.futures.Future[Any]) -> None:
        if not future.done():
            future.cancel()
            with contextlib.suppress(BaseException):
                concurrent.futures.wait([future], 30.0)

    def close(self) -> None:
        """End the thread. Repeating it does nothing."""
        if self._loop.is_closed():
            return

        async def settle() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        with contextlib.suppress(VmbusError):
            self.run(settle(), 30.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30.0)
        if not self._thread.is_alive():
            self._loop.close()


class Operation(msgspec.Struct, kw_only=True):
    """What was done to a VM. Times in seconds."""

    kind: str
    seconds: float
    downtime: float | None = None
    packets: dict[str, int] = {}
    """Outgoing packets in flight at that moment: ``queued`` and ``sent``."""


class Job:
    """A test driver that runs in the guest. It goes where the VM goes."""

    def __init__(self, vm: BlockingVm, name: str, number: int) -> None:
        self.vm = vm
        self.name = name
        self.number = number

    def report(self) -> dict[str, Any]:
        """What the agent says of it now: `state` (running, finished, failed, killed), `progress`, `result`, `error`."""
        return self.vm.agent("poll", job=self.number)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return bool(self.report().get("state") == "running")

    def wait(self, timeout: float = 120.0) -> dict[str, Any]:
        """Its result, once it has ended. Raises DriverFailed unless it passed, WaitTimeout."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                report = self.vm.agent("wait", timeout=min(left, _AGENT_WAIT), job=self.number)
            except AgentError as error:
                if error.code != "timeout":
                    raise
                continue
            except WaitTimeout:
                continue
            if report.get("state") != "running":
                return self._judged(report)
        raise WaitTimeout(f"test driver {self.name!r} (job {self.number}) in VM {self.vm.name!r} to end", timeout)

    def stop(self, timeout: float = 60.0) -> dict[str, Any]:
        """Ask it to come to its end, and wait for that. Raises as `wait`."""
        with contextlib.suppress(AgentError):  # it may have ended by itself just now
            self.vm.agent("stop", job=self.number)
        return self.wait(timeout)

    def _judged(self, report: dict[str, Any]) -> dict[str, Any]:
        result = report.get("result") or {}
        if report.get("state") != "finished" or result.get("verdict", "passed") != "passed":
            raise DriverFailed(self.name, report)
        self.vm.transactions += _transactions(result)
        return dict(result)


def _transactions(result: dict[str, Any]) -> int:
    parts = result.get("workloads")
    if isinstance(parts, list):
        return sum(_transactions(part) for part in parts if isinstance(part, dict))
    completed = result.get("completed", 0)
    return completed if isinstance(completed, int) else 0


class BlockingVm:
    """A running VM. Made by `launch` or `restored_from`; end it with `kill`, or use it as a context manager.

    Attributes:
        machine: the `VirtualMachine`, another one after each restore or migration. Its methods are coroutines: `call`.
        operations: what was done to it, in order.
        transactions: completed by test drivers that were waited for.
        audit: the directory of audit records, if any.
    """

    def __init__(
        self, thread: LoopThread, machine: VirtualMachine, programs: Programs, *, audit: Path | None = None
    ) -> None:
        """Use `launch` or `restored_from`."""
        self.thread = thread
        self.machine = machine
        self.programs = programs
        self.audit = audit
        self.audit_before: list[Path] = []
        self.operations: list[Operation] = []
        self.transactions = 0
        self.provider_errors: list[str] = []

    @classmethod
    def launch(
        cls,
        thread: LoopThread,
        description: VmDescription,
        programs: Programs,
        *,
        audit: Path | None = None,
        capture: Path | None = None,
        ready: float = 120.0,
    ) -> BlockingVm:
        """Boot a VM, and wait until its guest's agent answers. Raises what `VirtualMachine.launch` raises."""
        work = VirtualMachine.launch(description, programs, audit=audit, capture=capture)
        return cls(thread, thread.run(work), programs, audit=audit)._ready(ready)

    @classmethod
    def restored_from(
        cls,
        thread: LoopThread,
        snapshot: Path,
        programs: Programs,
        *,
        audit: Path | None = None,
        capture: Path | None = None,
        clone: bool = False,
    ) -> BlockingVm:
        """A VM from a snapshot, which is not needed any more when this returns. Raises as `VirtualMachine.restore`."""
        work = VirtualMachine.restore(snapshot, programs, audit=audit, capture=capture, clone=clone)
        vm = cls(thread, thread.run(work), programs, audit=audit)._ready(60.0)
        vm.machine.programs = programs  # the same files as the snapshot's
        return vm

    def _ready(self, timeout: float) -> BlockingVm:
        try:
            self.wait_ready(timeout)
        except BaseException:
            self.kill()
            raise
        return self

    def __enter__(self) -> BlockingVm:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def name(self) -> str:
        """Tools on the command line know it by this name."""
        return self.machine.name

    def call(self, work: Coroutine[Any, Any, T], timeout: float = OPERATION_TIMEOUT) -> T:
        """Run a coroutine of `machine`, and return its result."""
        return self.thread.run(work, timeout)

    # ---- the guest -------------------------------------------------------------------------------------------------

    def wait_ready(self, timeout: float = 120.0) -> None:
        """Wait until the guest's agent answers."""
        self.call(self.machine.wait_ready(timeout))

    def agent(self, command: str, /, *, timeout: float = 30.0, **arguments: Any) -> dict[str, Any]:
        """Ask the guest's agent. Raises AgentError with its answer."""
        return self.call(self.machine.call_agent(command, timeout=timeout, **arguments))

    def run_in_guest(self, argv: Sequence[str], *, timeout: float = 60.0) -> GuestOutput:
        """Run a program in the guest; its exit status and output. Raises AgentError, WaitTimeout."""
        return self.call(self.machine.run_in_guest(argv, timeout=timeout))

    def install(self, file: Path) -> str:
        """Put a test driver of your own into the guest; returns its name. Raises EnvironmentProblem, UsageError."""
        driver = read_driver_file(file)
        self.call(install(self.machine, [driver]))
        return driver.name

    def start(self, driver: str, /, **parameters: Any) -> Job:
        """Start a test driver in the guest, with its parameters (docs/test-drivers.md)."""
        started = self.agent("start", driver=driver, parameters=parameters)
        return Job(self, driver, int(started["job"]))

    def run(self, driver: str, /, *, timeout: float = 120.0, **parameters: Any) -> dict[str, Any]:
        """Run a test driver to its end; its result. Raises DriverFailed unless it passed."""
        return self.start(driver, **parameters).wait(timeout)

    # ---- the device ------------------------------------------------------------------------------------------------

    def status(self, device: int = 0) -> dict[str, Any]:
        """A device server's status: phase, packets, providers. `device`: which one of several; the first is 0."""
        return self.call(self.machine.call_servers("status"))[device]

    def note_provider_errors(self) -> list[str]:
        """What callbacks of providers have raised so far, also on the servers before this one."""
        with contextlib.suppress(VmbusError, OSError):
            for status in self.call(self.machine.call_servers("status")):
                for provider, found in status.get("faults", {}).items():
                    texts = [f"provider {provider}: {one['callback']} raised {one['error']}" for one in found["errors"]]
                    self.provider_errors += [text for text in texts if text not in self.provider_errors]
        return self.provider_errors

    def inspect(self, device: int = 0) -> dict[str, Any]:
        """All that a device server can tell."""
        return self.call(self.machine.call_servers("inspect"))[device]

    def in_flight(self) -> dict[str, int]:
        """Packets in flight: `queued` and `sent` by the device (all devices together, if there are several), and
        `held`, the guest's that it has not answered."""
        found = self.call(self.machine.call_servers("status"))
        packets = {key: sum(int(one["packets"][key]) for one in found) for key in ("queued", "sent")}
        return {**packets, "held": sum(int(one["incoming_held"]) for one in found)}

    def provider(self, name: str, command: str, /, **arguments: Any) -> dict[str, Any]:
        """Give a provider a command of its own."""
        return self.call(self.machine.command_provider(name, command, arguments))

    def wait_until(self, condition: Callable[[], bool], timeout: float = 30.0, what: str = "a condition") -> None:
        """Wait until `condition()` holds, which is looked at again and again. Raises WaitTimeout naming `what`."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise WaitTimeout(f"{what} (VM {self.name!r})", timeout)
            time.sleep(_LOOK)

    def wait_in_flight(self, timeout: float = 30.0, **at_least: int) -> dict[str, int]:
        """Wait until so many packets are in flight, such as `queued=1, sent=1`, or `held=1`; what there were."""
        wanted = at_least or {"sent": 1}
        seen: dict[str, int] = {}

        def enough() -> bool:
            seen.update(self.in_flight())
            return all(seen.get(name, 0) >= count for name, count in wanted.items())

        self.wait_until(enough, timeout, f"{wanted} packets in flight")
        return seen

    @contextlib.contextmanager
    def capture(self, path: Path, *, channels: Sequence[str] = (), **options: int) -> Iterator[Path]:
        """Capture the device's packets into the new file `path` while the block runs (docs/capture.md). It ends early
        when the device server does, so before a restore or a migration is over."""
        control = self.machine.control
        assert control is not None
        settings = {"channels": list(channels), **options}
        self.call(control.call("capture-start", path=str(path.absolute()), options=settings))
        try:
            yield path
        finally:
            if self.machine.control is control and not self.machine.ended:
                with contextlib.suppress(EnvironmentProblem):  # the server is gone, and the file is complete up to then
                    self.call(control.call("capture-stop"))

    # ---- operations ------------------------------------------------------------------------------------------------

    def _did(self, kind: str, began: float, downtime: float | None, packets: dict[str, int]) -> None:
        self.operations.append(
            Operation(kind=kind, seconds=time.monotonic() - began, downtime=downtime, packets=packets)
        )

    def save(self, directory: Path, *, live: bool = False) -> SaveReport:
        """Save the VM into the new snapshot `directory`; it runs on."""
        began = time.monotonic()
        report = self.call(self.machine.save(directory, live=live, keep=True))
        self._did("save", began, report.downtime, report.packets)
        return report

    def save_restore(self, *, live: bool = False) -> tuple[SaveReport, RestoreReport]:
        """Save the VM, end its processes, and bring it back in fresh ones."""
        self.note_provider_errors()
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="vmbus-save-") as directory:
            snapshot = Path(directory) / "saved"
            saved, machine = self.call(self._save_restore(snapshot, live))
        self.machine = machine
        restored = machine.restored
        assert restored is not None
        self._did("save_restore", began, restored.running_at - saved.stopped_at, saved.packets)
        return saved, restored

    async def _save_restore(self, snapshot: Path, live: bool) -> tuple[SaveReport, VirtualMachine]:
        saved = await self.machine.save(snapshot, live=live)
        await self.machine.kill()
        machine = await VirtualMachine.restore(snapshot, self.programs, audit=self.audit, clone=self.machine.clone)
        try:
            await machine.wait_ready()
        except BaseException:
            await machine.kill()
            raise
        machine.programs = self.programs
        return saved, machine

    def migrate(self, **options: Any) -> MigrationReport:
        """Migrate the running VM to a second one on this host, which takes its place here.

        `options`: `multifd`, `downtime_limit`, `timeout` of `VirtualMachine.migrate`. Raises MigrateFailed, whose
        `source_alive` tells whether the VM runs on as before.
        """
        self.note_provider_errors()
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="vmbus-migrate-") as directory:
            address = f"unix:{directory}/m.sock"
            work = move(self.machine, address, programs=self.programs, audit=self.audit, **options)
            machine, report = self.call(work)
        self.machine = machine
        self._did("migrate", began, report.downtime, report.packets)
        return report

    def checkpoint(self, tag: str) -> CheckpointReport:
        """Note this moment under a name; checkpoints end with the VM's processes."""
        began = time.monotonic()
        report = self.call(self.machine.checkpoint(tag))
        self._did("checkpoint", began, report.downtime, report.packets)
        return report

    def revert(self, tag: str) -> RevertReport:
        """Go back to a checkpoint: what happened since then is undone. Jobs that were started since then are gone."""
        began = time.monotonic()
        report = self.call(self.machine.revert(tag))
        self.wait_ready()
        self._did("revert", began, report.downtime, report.packets)
        return report

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The vCPUs stand still while the block runs."""
        began = time.monotonic()
        self.call(self.machine.stop())
        try:
            yield
        finally:
            if not self.machine.ended:
                self.call(self.machine.cont())
        seconds = time.monotonic() - began
        self._did("pause", began, seconds, {})

    def check_audit(self) -> Report:
        """Check the audit records up to now: `clean` if each packet was there exactly once and in order.

        Raises UsageError if none are kept.
        """
        if self.audit is None:
            raise UsageError(f"VM {self.name!r} keeps no audit records: ask for them when it is started")
        for path in self.audit.glob("guest-*"):
            path.unlink()  # they are fetched anew, and whole
        self.call(collect_audit(self.machine))
        leaves = [str(one["uid"]) for one in self.call(self.machine.call_servers("audit"))]
        return check_paths([*self.audit_before, self.audit], leaf=leaves)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def logs(self, lines: int = 30) -> dict[str, str]:
        """The ends of the logs: of the device server, of QEMU, and the guest's console."""
        folder = self.machine.run_directory.path
        paths = {
            **{
                f"device server{f' {index + 1}' if index else ''}": folder / numbered("server.log", index)
                for index in range(len(self.machine.devices))
            },
            "QEMU": folder / "qemu.log",
            "guest's console": self.machine.paths.console_log,
        }
        return {name: text for name, path in paths.items() if (text := log_tail(path, lines))}

    def kill(self) -> None:
        """End the VM. Repeating it does nothing."""
        self.call(self.machine.kill(), 60.0)
