"""The integration services in a real guest: over saves and restores, the clock after one, keys and values both ways,
the end on request, and a service that is killed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.boot import boot
from vmbus.errors import VmbusError, WaitTimeout
from vmbus.qemu.command_line import Programs
from vmbus.qemu.description import VmDescription, load_description
from vmbus.qemu.machine import VirtualMachine

pytestmark = pytest.mark.vm

Run = Callable[[Coroutine[Any, Any, Any]], Any]
CHECKOUT = Path(__file__).resolve().parents[2]
AWAY = 3.0
"""Seconds that pass between a save and its restore, on purpose."""
JOB = 1
"""The services are the first job of the agent."""


def described(*services: str) -> VmDescription:
    """The machine of qemu_configs with faster heartbeats, and the time told only when the device begins to run."""
    plain = msgspec.to_builtins(load_description(CHECKOUT / "qemu_configs" / "services.toml"))
    plain["device"]["providers"][0]["options"] |= {"heartbeat_seconds": 0.2, "time_seconds": 0}
    plain["guest"]["services"] = list(services)
    return msgspec.convert(plain, VmDescription)


async def part(vm: VirtualMachine, name: str) -> dict[str, Any]:
    """What the provider says about one of its services."""
    assert vm.control is not None
    return dict((await vm.control.call("status"))["providers"]["services"][name])


async def until_beats(vm: VirtualMachine, count: int, seconds: float = 60.0) -> dict[str, Any]:
    """Wait for so many heartbeats more than there are."""
    deadline = time.monotonic() + seconds
    wanted = (await part(vm, "heartbeat"))["beats"] + count
    while (heartbeat := await part(vm, "heartbeat"))["beats"] < wanted:
        if time.monotonic() > deadline:
            raise WaitTimeout(f"{wanted} heartbeats; {heartbeat}, {await vm.call_agent('jobs')}", seconds)
        await asyncio.sleep(0.02)
    assert heartbeat["alive"] and heartbeat["wrong"] == heartbeat["stray"] == heartbeat["unanswered"] == 0, heartbeat
    return heartbeat


async def service(vm: VirtualMachine, job: int, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """A report of the guest's service that was made from now on, and meets a condition."""
    seen: asyncio.Queue[tuple[float, dict[str, Any]]] = asyncio.Queue()

    def listen(event: dict[str, Any]) -> None:
        if event.get("event") == "progress" and event.get("job") == job:
            seen.put_nowait((time.time(), event["progress"]))

    vm.on_agent_event = listen
    try:
        async with asyncio.timeout(60):
            while True:
                at, report = await seen.get()
                if condition(report):
                    return report | {"behind": at - report["clock"]}
    except TimeoutError:
        raise WaitTimeout("a report of the guest's service", 60) from None
    finally:
        vm.on_agent_event = None


async def kvp_program(vm: VirtualMachine, **parameters: str) -> dict[str, Any]:
    """A program in the guest reads or writes the pools."""
    report = await vm.call_agent("run", driver="kvp", parameters=parameters)
    return dict(report["result"])


def test_integration_service_over_saves_and_restores(run: Run, programs: Programs, tmp_path: Path) -> None:
    async def story() -> list[dict[str, Any]]:
        reports = []
        vm = await boot(described("integration"), programs)
        async with vm:
            await vm.wait_ready()
            before = await until_beats(vm, 5)
            ask = vm.command_provider
            assert (await kvp_program(vm, get="role"))["value"] == "example"
            await ask("services", "kvp-set", {"key": "colour", "value": "blue"})
            assert (await kvp_program(vm, get="colour"))["value"] == "blue"
            await kvp_program(vm, pool="guest", set="answer", value="42")
            assert await ask("services", "kvp-get", {"key": "answer"}) == {"value": "42", "type": "string"}
            facts = (await ask("services", "kvp-list", {"pool": "auto"}))["values"]
            assert facts["FullyQualifiedDomainName"] == "vmbus-guest" and "cloud" in facts["OSBuildNumber"], facts
            reports.append(await service(vm, JOB, lambda report: True))
            await vm.save(tmp_path / "0", live=True)
        for number in range(2):
            await asyncio.sleep(AWAY)
            syncs = reports[-1]["syncs"]
            async with await VirtualMachine.restore(tmp_path / str(number), programs) as vm:
                reports.append(await service(vm, JOB, lambda report, syncs=syncs: report["syncs"] > syncs))
                after = await until_beats(vm, 5)
                assert after["sequence"] > before["sequence"], "the numbers go on"
                before = after
                # Nothing was lost: each heartbeat of the host's was answered once.
                heard = (await service(vm, JOB, lambda report: True))["heartbeats"]
                assert abs(heard - (await part(vm, "heartbeat"))["beats"]) <= 3
                assert (await vm.command_provider("services", "kvp-get", {"key": "answer"}))["value"] == "42"
                if number == 0:
                    await vm.save(tmp_path / "1")
                    continue
                # A checkpoint stops the guest for a moment, too: it is told the time.
                syncs = (await part(vm, "time"))["syncs"]
                await vm.save(tmp_path / "2", keep=True)
                await until_beats(vm, 2)
                assert (await part(vm, "time"))["syncs"] == syncs + 1
                await vm.shutdown()
        return reports

    reports = run(story())
    for report in reports:
        print({key: report[key] for key in ("heartbeats", "syncs", "last_offset", "largest_offset", "behind")})
    first, *restored = reports
    assert abs(first["behind"]) < 1
    for report in restored:
        assert report["last_offset"] > AWAY, "the guest was told a time later by what it was away"
        assert abs(report["behind"]) < 1, "and has it"


def test_integration_service_that_sets_no_clock_is_noticed(run: Run, programs: Programs, tmp_path: Path) -> None:
    """The same with a guest that does not do what it is told: else the test above would prove nothing."""

    async def story() -> dict[str, Any]:
        vm = await boot(described(), programs)
        async with vm:
            await vm.wait_ready()
            parameters = {"services": [{"service": "integration", "set_clock": False}]}
            job = int((await vm.call_agent("start", driver="services", parameters=parameters))["job"])
            await until_beats(vm, 2)
            await vm.save(tmp_path / "0")
        await asyncio.sleep(AWAY)
        async with await VirtualMachine.restore(tmp_path / "0", programs) as vm:
            report = await service(vm, job, lambda report: report["syncs"] >= 2)
            # A service that is killed is another matter: the host sees it go, and its successor come.
            await vm.call_agent("kill", job=job)
            with pytest.raises(VmbusError, match="is not there: it has not opened the channel"):
                await vm.command_provider("services", "shutdown")
            parameters = {"services": ["integration"]}
            job = int((await vm.call_agent("start", driver="services", parameters=parameters))["job"])
            await until_beats(vm, 2)
            right = await service(vm, job, lambda report: report["syncs"] >= 1)
            assert abs(right["behind"]) < 1, right
            await vm.shutdown()
            return report

    report = run(story())
    print(report)
    assert report["behind"] > AWAY and report["last_offset"] > AWAY


def test_integration_service_powers_the_guest_off(run: Run, programs: Programs) -> None:
    async def story() -> float:
        async with await boot(described("integration"), programs) as vm:
            await vm.wait_ready()
            await until_beats(vm, 2)
            started = time.monotonic()
            answer = await vm.command_provider("services", "shutdown", {"text": "maintenance"})
            assert answer == {"accepted": True, "status": 0}
            await asyncio.wait_for(vm.wait_ended(), 60)
            return time.monotonic() - started

    print(f"the guest was off {run(story()):.2f} s after it was asked")
