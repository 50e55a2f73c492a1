"""The auditor has no false alarm: every shipped description is audited under every shipped driver that it has channels
for, without and with a restore in mid-traffic."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.hv_utils import HvUtils
from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.observe.audit.checker import check_paths
from vmbus.observe.audit.files import recorder_in
from vmbus.observe.audit.report import Report
from vmbus.places import DESCRIPTIONS as CONFIGURATIONS
from vmbus.testkit.loopback.restoring import Servers
from vmbus.transport.library import Library
from vmbus.vm.description import load_description
from vmbus_guest.driver import VmbusDriver
from vmbus_guest.testdrivers import CATALOGUE
from vmbus_guest.testdrivers.context import Context

pytestmark = [pytest.mark.loopback, pytest.mark.long]

SHIPPED = sorted(path.stem for path in CONFIGURATIONS.glob("*.toml"))
WORKLOADS: dict[str, dict[str, dict[str, Any]]] = {
    "echo": {"echo": {"count": 600}, "raw-echo": {"count": 200}, "bulk": {"count": 20}, "remap": {"count": 20}},
    "burst": {"burst": {"count": 300}, "storm": {"count": 100}},
    "lab": {
        "many": {"channels": 4, "count": 20},
        "churn": {"count": 6},
        "gpadl": {"count": 10},
        "hotplug": {"count": 3},
        "ring-full": {"count": 300, "pause_every": 100, "pause_seconds": 0.005},
        "tiny-rings": {"count": 200},
        "maximum": {"count": 3},
        "pipe": {"count": 60, "window": 8},
        "sync": {"count": 30, "nested_every": 4},
        "idle": {"seconds": 0.2, "interval": 0.05},
    },
}
"""For each kind of provider the drivers that use it, and for how long."""
SAME = {"ddi-burst": "burst"}
ELSEWHERE = {
    "scsi": "tests/vm/test_scsi.py",
    "vsock": "tests/loopback/test_vsock.py",
    "network": "tests/vm/test_network.py",
}
"""Kinds whose guest is not set up here, and where they are audited."""


def _device(name: str) -> DeviceDescription:
    """The description's device with what is audited here."""
    device = load_description(CONFIGURATIONS / f"{name}.toml").device
    known = {*WORKLOADS, *SAME, "integration"}
    assert {one.kind for one in device.providers} <= known | ELSEWHERE.keys(), "who audits this kind?"
    return DeviceDescription(name=device.name, providers=[_quick(one) for one in device.providers if one.kind in known])


def _quick(provider: ProviderDescription) -> ProviderDescription:
    """The same without long waits."""
    short = {"heartbeat_seconds": 0.02, "hold_seconds": 0.02}
    options = {key: short.get(key, value) for key, value in provider.options.items()}
    return msgspec.structs.replace(provider, options=options)


def _workloads(device: DeviceDescription) -> list[dict[str, Any]]:
    kinds = {SAME.get(one.kind, one.kind) for one in device.providers}
    return [{"driver": name, **settings} for kind in kinds for name, settings in WORKLOADS.get(kind, {}).items()]


def _reported(directory: Path) -> Report:
    return check_paths([directory])


def _run(device: DeviceDescription, library: Library, audit: Path, workloads: list[dict[str, Any]], *, at: int) -> int:
    """Let them run, one after the other where the device has one channel for several; the restores that there were."""
    with Servers(device, library, [at] if at else [], audit=audit) as servers:
        for number, one in enumerate(workloads):
            context = Context({"workloads": [{"stall_seconds": 20.0, **one}]}, servers.function)
            context.keep_record(str(audit), f"mixed-{number}")
            try:
                result = CATALOGUE["mixed"].load()(context)
            finally:
                context.end_record()
            assert result["verdict"] == "passed", result
        servers.now.command("audit")
        return servers.restores


def test_fault_n2_every_shipped_driver_is_audited_here() -> None:
    here = {name for drivers in WORKLOADS.values() for name in drivers}
    assert here == {name for name, entry in CATALOGUE.items() if entry.workload()}, "a workload without an audit"
    assert SHIPPED and all(tomllib.loads((CONFIGURATIONS / f"{name}.toml").read_text()) for name in SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_fault_n2_every_shipped_description_under_every_driver_is_clean(
    name: str, libvfio_user: Library, tmp_path: Path
) -> None:
    device = _device(name)
    workloads = _workloads(device)
    if workloads:
        _run(device, libvfio_user, tmp_path / "quiet", workloads, at=0)
        report = _reported(tmp_path / "quiet")
        assert report.clean and report.transactions > 0, f"{name}:\n{report}"
        restores = sum(
            _run(device, libvfio_user, tmp_path / f"restored-{one['driver']}", [one], at=4) for one in workloads
        )
        assert restores > 0
        for one in workloads:
            report = _reported(tmp_path / f"restored-{one['driver']}")
            assert report.clean, f"{name}, {one['driver']}, restored in mid-traffic:\n{report}"
    if any(one.kind == "integration" for one in device.providers):
        _answered(device, libvfio_user, tmp_path / "services")


@pytest.mark.parametrize("recorded", [True, False], ids=["both ends", "the host's half"])
def test_fault_n2_answers_that_carry_the_hosts_numbers_are_clean(
    libvfio_user: Library, tmp_path: Path, recorded: bool
) -> None:
    _answered(_device("linux"), libvfio_user, tmp_path / "audit", recorded=recorded)


def _until_beats(driver: VmbusDriver, linux: HvUtils, beats: int) -> None:
    driver.run_until(lambda: linux.heartbeats >= beats, 30, "heartbeats")


def _answered(device: DeviceDescription, library: Library, audit: Path, *, recorded: bool = True) -> None:
    """Integration services whose answers carry the numbers of the host's requests."""
    with Servers(device, library, audit=audit) as servers:
        function = servers.function()
        recorder = recorder_in(audit, "guest", "hv_utils") if recorded else None
        with VmbusDriver(function, recorder=recorder) as driver:
            linux = HvUtils(driver)
            for beats in (2, 4):
                _until_beats(driver, linux, beats)
                for _ in range(2):
                    servers.now.command("audit")
                    if recorder is not None:
                        recorder.flush("fetched")
                report = _reported(audit)
                assert report.clean, str(report)
                assert (report.packets if recorded else report.half_packets) > 0
                servers.move(function)
