"""A network card of the host's in a Linux guest: ping and checked TCP streams in both directions, through saves and
restores in fresh processes and a checkpoint. No connection drops, every byte is right; retransmissions are counted."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.boot import boot
from support.crossing import GUEST, HOST, Traffic, moved, until
from support.namespace import Namespace, NotPermitted, namespace
from vmbus.errors import VmbusError, WaitTimeout
from vmbus.qemu.command_line import Programs
from vmbus.qemu.description import VmDescription, load_description
from vmbus.qemu.machine import VirtualMachine

pytestmark = [pytest.mark.vm, pytest.mark.long]

Run = Callable[[Coroutine[Any, Any, Any]], Any]
CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def outside() -> Iterator[Namespace]:
    try:
        with namespace() as found:
            yield found
            assert found.interfaces() == [], "an interface outlives the VM"
    except NotPermitted as error:
        pytest.skip(str(error))


def described(outside: Namespace, **options: Any) -> VmDescription:
    """The card of qemu_configs, in the test's namespace."""
    plain = msgspec.to_builtins(load_description(CHECKOUT / "qemu_configs" / "network.toml"))
    plain["device"]["providers"][0]["options"] |= {"namespace": outside.name, **options}
    return msgspec.convert(plain, VmDescription)


async def card(vm: VirtualMachine) -> dict[str, Any]:
    assert vm.control is not None
    return dict((await vm.control.call("status"))["providers"]["network"])


def test_network_survives_saves_restores_and_checkpoints(
    run: Run, programs: Programs, tmp_path: Path, outside: Namespace
) -> None:
    async def story() -> None:
        vm = await boot(described(outside), programs)
        in_flight = []
        async with vm:
            traffic = await Traffic.start(vm, outside)
            await moved(traffic.client, 1 << 20)
            report = await vm.save(tmp_path / "stopped", live=False)
            in_flight.append((report.packets["queued"], report.packets["sent"]))
        assert outside.interfaces() == []
        for generation in range(2):
            vm = await VirtualMachine.restore(tmp_path / ("stopped" if not generation else "live"), programs)
            async with vm:
                await moved(traffic.client, 1 << 20)
                if not generation:
                    report = await vm.save(tmp_path / "live", live=True)
                    in_flight.append((report.packets["queued"], report.packets["sent"]))
                    continue
                report = await vm.save(tmp_path / "checkpoint", live=True, keep=True)
                in_flight.append((report.packets["queued"], report.packets["sent"]))
                print(f"checkpoint: downtime {report.downtime:.3f} s")
                await moved(traffic.client, 1 << 20)
                state = await card(vm)
                await traffic.finish(vm)
                services = await vm.call_agent("poll", job=1)
        print(f"packets with frames in flight at the saves (queued, sent): {in_flight}")
        print(f"the card: {state}")
        print(f"the service: {services['progress']}")
        assert sum(map(sum, in_flight)) + state["drained"] > 0
        assert state["announced"] >= 3 and state["refused"] == 0
        assert services["progress"]["refused"] == services["progress"]["lost"] == 0

    run(story())


def test_network_survives_with_long_frames_and_several_queues(
    run: Run, programs: Programs, tmp_path: Path, outside: Namespace
) -> None:
    description = described(outside, mtu=9000, queues=3, offload=False)

    async def story() -> None:
        vm = await boot(description, programs)
        async with vm:
            await vm.wait_ready()
            await vm.call_agent("stop", job=1)
            await vm.call_agent("wait", job=1)
            service = {"service": "network", "queues": 3}
            job = int((await vm.call_agent("start", driver="services", parameters={"services": [service]}))["job"])
            traffic = await Traffic.start(vm, outside)
            await moved(traffic.client, 1 << 20)
            await vm.save(tmp_path / "save", live=True)
        vm = await VirtualMachine.restore(tmp_path / "save", programs)
        async with vm:
            await moved(traffic.client, 1 << 20)
            large = outside.start("ping", host=GUEST, count=5, size=8900)
            await until(lambda: large.process.poll() is not None, "large pings")
            assert large.result()["received"] == 5
            await traffic.finish(vm)
            state = await card(vm)
            report = await vm.call_agent("poll", job=job)
        print(f"the card: {state}")
        assert state["guest"] == {"features": 0, "mtu": 9000, "queues": 3, "in_use": 3}
        assert sum(queue["frames"] > 0 for queue in state["queues"]) > 1
        assert report["progress"]["mtu"] == 9000

    run(story())


def test_network_survives_a_guest_driver_and_a_server_that_are_killed(
    run: Run, programs: Programs, tmp_path: Path, outside: Namespace
) -> None:
    """The guest's interface goes with its driver, and comes back with the next one; the host's goes with its server."""

    async def story() -> None:
        vm = await boot(described(outside), programs)
        async with vm:
            traffic = await Traffic.start(vm, outside)
            await moved(traffic.client, 1 << 18)
            assert (await vm.call_agent("kill", job=1))["state"] == "killed"
            deadline = time.monotonic() + 30
            while (await card(vm))["guest"] is not None:
                assert time.monotonic() < deadline, "the card still has a guest"
                await asyncio.sleep(0.1)
            await vm.call_agent("start", driver="services", parameters={"services": ["network"]})
            await moved(traffic.client, 1 << 18)
            await traffic.finish(vm)
            assert vm.server is not None
            os.kill(vm.server.process.pid, signal.SIGKILL)
            with pytest.raises(VmbusError):
                await vm.wait_ended()
            await until(lambda: outside.interfaces() == [], "the interface to be gone")

    run(story())


class Console:
    """The shell on the guest's console."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.text = ""

    @classmethod
    async def open(cls, vm: VirtualMachine) -> Console:
        return cls(*await asyncio.open_unix_connection(str(vm.paths.console)))

    async def read_until(self, wanted: str, seconds: float = 60.0) -> str:
        async def read() -> None:
            while wanted not in self.text:
                data = await self.reader.read(4096)
                assert data, "the console is gone"
                self.text += data.decode(errors="replace").replace("\r", "")

        try:
            await asyncio.wait_for(read(), seconds)
        except TimeoutError:
            raise WaitTimeout(f"{wanted!r} on the console, which shows {self.text[-1000:]!r}", seconds) from None
        found, _, self.text = self.text.partition(wanted)
        return found

    def type(self, line: str) -> None:
        self.writer.write(line.encode() + b"\n")


def test_network_survives_a_checkpoint_under_ordinary_programs(
    run: Run, programs: Programs, tmp_path: Path, outside: Namespace
) -> None:
    """busybox' ping and wget, typed on the guest's console."""
    served = tmp_path / "served"
    served.mkdir()
    content = os.urandom(8 << 20)
    (served / "file").write_bytes(content)

    async def story() -> tuple[str, str]:
        vm = await boot(described(outside), programs)
        async with vm:
            await vm.wait_ready()
            console = await Console.open(vm)
            # What is typed is echoed: the quotes keep it from being taken for the answer.
            console.type(f"until ping -c 1 -W 1 {HOST} > /dev/null 2>&1; do sleep 0.1; done; echo 'the''re'")
            await console.read_until("there")
            console.type(f"ping -c 40 -i 0.1 {HOST}; echo 'pin''ged'")
            await console.read_until("seq=5 ")
            await vm.save(tmp_path / "one", live=True, keep=True)
            pinged = await console.read_until("pinged")
            console.type(f"wget -q -O - http://{HOST}:8000/file | sha256sum; echo 'go''t it'")
            await asyncio.sleep(0.3)
            await vm.save(tmp_path / "two", live=True, keep=True)
            got = await console.read_until("got it")
            console.writer.close()
            return pinged, got

    server = outside.serve_files(served, 8000)
    try:
        pinged, got = run(story())
    finally:
        server.kill()
        server.wait()
    print(pinged[-400:])
    assert "40 packets transmitted, 40 packets received, 0% packet loss" in pinged
    assert hashlib.sha256(content).hexdigest() in got, got
