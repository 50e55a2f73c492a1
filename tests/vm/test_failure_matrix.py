"""The decisive cells of the failure matrix in real QEMU: one guest goes through all of them with its traffic."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import pace
from support.failure_bench import Bench
from support.failure_matrix import CELLS, IN_QEMU, Cell, Outcome
from vmbus.errors import WaitTimeout
from vmbus.operations.machine import VirtualMachine
from vmbus.testkit.story import Story, finish, until_in_flight
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription, load_description

CHECKOUT = Path(__file__).resolve().parents[2]
STORY = Story(packets=256, stall_seconds=60.0).endless()
# Cells that leave the source running first. Then the one that leaves a snapshot only: the VM of the last ones comes
# from it, and so its guest has been through everything.
ORDER = sorted(
    (cell for cell in CELLS if cell.key in IN_QEMU),
    key=lambda cell: (Outcome.SOURCE, Outcome.SNAPSHOT, Outcome.DESTINATION).index(cell.outcome),
)


class QemuBench(Bench):
    """A bench with the real QEMU, and the test drivers in the guest. `job`: the one that runs there; `kept`: that of
    the snapshot which a source comes from, once there is one."""

    job = kept = 0

    def description(self) -> VmDescription:
        demo = load_description(CHECKOUT / "qemu_configs" / "demo.toml")
        faulty = super().description().device.providers[-1]
        device = type(demo.device)(demo.device.name, [*demo.device.providers, faulty])
        return VmDescription(demo.name, device, demo.memory_mib, demo.cpus, demo.slot, demo.guest)

    async def launch(self) -> VirtualMachine:
        self.job = self.kept
        if (self.root / "whole").exists():
            return await VirtualMachine.restore(self.root / "whole", self.programs)
        vm = await super().launch()
        await vm.wait_ready()
        return vm

    async def in_flight(self, vm: VirtualMachine) -> None:
        while True:
            if not self.job or not await self._under_way(vm):
                self.job = int((await vm.call_agent("start", driver="mixed", parameters=STORY.workloads()))["job"])
            try:
                await until_in_flight(vm, self.job, STORY)
                return
            except WaitTimeout:
                if await self._under_way(vm):
                    raise

    async def _under_way(self, vm: VirtualMachine) -> bool:
        """Whether the job runs; if it has ended, it has ended well."""
        report = await vm.call_agent("poll", job=self.job)
        if report["state"] == "running":
            return True
        assert report["result"]["verdict"] == "passed", report
        return False

    async def source(self) -> VirtualMachine:
        vm = await super().source()
        await self.in_flight(vm)
        return vm

    async def goes_on(self, vm: VirtualMachine) -> None:
        assert not vm.ended and await vm.monitor.running(), "the vCPUs stand"

        async def progress() -> int:
            status = await vm.call_server("status")
            assert status["phase"] == "running", status["phase"]
            tallies = [status["providers"][name]["tally"] for name in ("echo", "burst")]
            wrong = ("lost", "duplicated", "reordered", "corrupted")
            assert not any(tally[kind] for tally in tallies for kind in wrong), tallies
            return sum(tally["completed"] for tally in tallies)

        deadline = time.monotonic() + pace.seconds(30)
        before = await progress()
        while await self._under_way(vm) and await progress() < before + 500:
            assert time.monotonic() < deadline, "the workload does not go on"

    async def arrived_runs(self, vm: VirtualMachine) -> None:
        assert await vm.monitor.running()
        await self.books(vm)

    async def books(self, vm: VirtualMachine) -> None:
        report = await finish(vm, self.job, stop=True)
        assert report["result"]["verdict"] == "passed", report
        tallies: dict[str, Any] = (await vm.call_server("status"))["providers"]
        print({name: one["tally"] for name, one in tallies.items() if "tally" in one})

    def keep(self, folder: Path) -> None:
        shutil.move(folder, self.root / "whole")
        self.kept = self.job


@pytest.fixture(scope="module")
def bench(programs: Programs) -> Iterator[QemuBench]:
    with pytest.MonkeyPatch.context() as patch:
        try:
            bench = QemuBench(lambda _: programs, patch)
        except PermissionError as error:
            pytest.skip(str(error))
        yield bench
        bench.close()


@pytest.fixture(autouse=True)
def nothing_outlives_the_test() -> None:
    """The bench looks after its processes itself: the source lives on from one cell to the next."""


@pytest.mark.parametrize("cell", ORDER, ids=lambda cell: cell.name)
def test_failure_matrix(bench: QemuBench, cell: Cell) -> None:
    start = time.monotonic()
    bench.run(bench.cell(cell))
    print(f"{time.monotonic() - start:.1f} s, life {bench.lives} of the source")
