"""The whole catalogue of test drivers in one guest, saved and restored in the middle, and drivers of a user's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from support.boot import boot
from support.in_guest import until_all_have_moved
from vmbus.cli.drivers import Drive, jobs_for
from vmbus.errors import UsageError
from vmbus.operations.machine import VirtualMachine
from vmbus.testkit.driver_file import install, read_driver_file
from vmbus.vm.command_line import Programs
from vmbus.vm.description import load_description
from vmbus_guest.testdrivers import CATALOGUE

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = CHECKOUT / "docs" / "test-drivers.md"

# Small, since an emulated guest is slow and they share it; none has an end of its own.
PARAMETERS: dict[str, dict[str, Any]] = {
    "echo": {"count": 0, "window": 8, "external": 0.3},
    "burst": {"count": 0, "window": 16, "hold": 4, "ring_pages_in": 1, "size": 300},
    "bulk": {"count": 0, "window": 2, "size": 20_000},
    "remap": {"count": 0, "window": 8, "pace": 0.1},
    "many": {"count": 0, "channels": 6, "window": 2, "push": 4},
    "churn": {"count": 0, "requests": 4, "window": 8},
    "gpadl": {"count": 0, "live": 2, "size": 65_536},
    "hotplug": {"count": 0, "subchannels": 1, "requests": 4, "window": 4},
    "ring-full": {"count": 0, "window": 24, "size": 400, "pause_every": 50, "push": 16},
    "tiny-rings": {"count": 0, "window": 4},
    "maximum": {"count": 0, "external_size": 65_536, "pieces": 200, "size": 60_000},
    "pipe": {"count": 0, "window": 4},
    "sync": {"count": 0},
    "storm": {"count": 0},
    "idle": {"seconds": 0.0},
    "ping-pong": {"count": 0},
}

HANGS = """
import os, time
def run(context):
    context.parameters.check()
    os.write(1, b"this is rubbish\\n")
    time.sleep(3600)
"""
DIES = """
import os, sys
def run(context):
    context.parameters.check()
    os.write(1, b"no report\\n")
    print("on the way down", file=sys.stderr, flush=True)
    os.kill(os.getpid(), 11)
"""


async def test_the_whole_catalogue_in_one_guest_saved_and_restored(programs: Programs, tmp_path: Path) -> None:
    source = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)[0]  # the driver itself
    files = {"ping_pong": source, "hangs": HANGS, "dies": DIES, "does_not_load": "WORKLOAD = nothing\n"}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    own = {name: read_driver_file(tmp_path / f"{name}.py") for name in files}
    workloads = {name for name, entry in CATALOGUE.items() if entry.workload() is not None}
    assert workloads - {"raw-echo"} == set(PARAMETERS) - {"ping-pong"}, "a driver of the catalogue is missing here"
    [mixed] = jobs_for([Drive(name, values) for name, values in PARAMETERS.items()], [own["ping_pong"]])

    description = load_description(CHECKOUT / "qemu_configs" / "drivers.toml")
    async with await boot(description, programs) as vm:
        await install(vm, [own["ping_pong"], own["hangs"], own["dies"]])
        with pytest.raises(UsageError, match=r"'does-not-load' does not load in the guest: .*line 1: NameError"):
            await install(vm, [own["does_not_load"]])
        job = int((await vm.call_agent("start", driver=mixed.driver, parameters=mixed.parameters))["job"])
        hangs = int((await vm.call_agent("start", driver="hangs", patience=10.0))["job"])
        before = await until_all_have_moved(vm, job, {})
        saved = await vm.save(tmp_path / "snapshot")
    async with await VirtualMachine.restore(tmp_path / "snapshot", programs) as vm:
        await until_all_have_moved(vm, job, before)
        dies = await vm.call_agent("run", driver="dies", timeout=60.0)
        assert dies["state"] == "failed" and "signal SIGSEGV" in dies["error"]["message"]
        assert dies["rubbish"]["first"] == "b'no report'" and "on the way down" in dies["log"]
        await vm.call_agent("stop", job=job)
        report = await vm.call_agent("wait", job=job, timeout=60.0)
        assert report["state"] == "finished", report
        hung = await vm.call_agent("wait", job=hangs, timeout=60.0)
        assert (hung["state"], hung["error"]["kind"]) == ("failed", "hung"), hung
        found = await vm.call_agent("run", driver="catalogue", timeout=60.0)
        assert set(found["result"]["drivers"]) >= {*CATALOGUE, "ping-pong"}
        await vm.shutdown()
    assert saved.packets["queued"] + saved.packets["sent"] > 0
    result: dict[str, Any] = report["result"]
    result = result
    for part in result["workloads"]:
        print({key: part[key] for key in ("name", "verdict", "completed", "seconds")})
        assert part["verdict"] == "passed", part
        assert [part[name] for name in ("lost", "duplicated", "reordered", "corrupted")] == [0, 0, 0, 0]
    assert result["verdict"] == "passed"
