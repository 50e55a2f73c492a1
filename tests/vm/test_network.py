"""A network card that Linux's own driver drives: ping and checked TCP streams in both directions, through saves,
restores and a checkpoint, other MTUs, an interface that goes down, and a driver that lets go. The guest's kernel never
complains."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support import in_guest, pace
from support.boot import boot
from support.captures import said_in
from support.commands import spawn
from support.crossing import GUEST, HOST, Traffic, moved
from support.in_guest import shell
from support.locks import in_use
from support.namespace import Namespace, NotPermitted, namespace
from support.pace import eventually
from support.processes import command_lines
from vmbus.errors import VmbusError
from vmbus.observe.audit.checker import check_paths
from vmbus.observe.audit.guest import collect_audit
from vmbus.observe.capture.frames import export
from vmbus.operations.machine import VirtualMachine
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription, load_description
from vmbus.vm.run_directory import clean_stale, runtime_base

pytestmark = [pytest.mark.vm, pytest.mark.long]

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Note = Callable[[str], None]
CHECKOUT = Path(__file__).resolve().parents[2]
INSTANCE = "6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7d05"
COMPLAINTS = (
    "unable to add netvsc device|Invalid|Unknown nvsp packet|Recv_comp full|no rndis request found|error status|"
    "Ring buffer not empty|Unexpected VMBUS completion|unhandled rndis|nvsp_rndis_pkt"
)


@pytest.fixture
def outside() -> Iterator[Namespace]:
    try:
        with namespace() as found:
            yield found
            assert found.interfaces() == [], "an interface outlives the VM"
    except NotPermitted as error:
        pytest.skip(str(error))


def described(outside: Namespace, cpus: int = 2, **options: Any) -> VmDescription:
    """The machine of qemu_configs with a card in the test's namespace, and its integration services."""
    plain = msgspec.to_builtins(load_description(CHECKOUT / "qemu_configs" / "linux.toml"))
    plain["cpus"] = cpus
    card = {"namespace": outside.name, "interface": "host0", "address": f"{HOST}/24", **options}
    others = [one for one in plain["device"]["providers"] if one["kind"] == "integration"]
    first = {"kind": "network", "name": "card", "instance": INSTANCE, "options": card}
    plain["device"]["providers"] = [first, *others]
    return msgspec.convert(plain, VmDescription)


async def bring_up(vm: VirtualMachine) -> None:
    await shell(vm, f"ip link set eth0 up && ip addr replace {GUEST}/24 dev eth0")


async def card(vm: VirtualMachine) -> dict[str, Any]:
    return dict((await vm.call_server("status"))["providers"]["card"])


async def require_no_complaints(vm: VirtualMachine) -> None:
    """Neither the guest's kernel nor the card has anything to complain of."""
    await in_guest.require_no_complaints(vm, COMPLAINTS)
    state = await card(vm)
    assert state["refused"] == 0 and all(queue["lost"] == 0 for queue in state["queues"]), state


def in_flight(state: dict[str, Any]) -> int:
    return sum(queue["in_flight"] for queue in state["queues"])


def test_network_survives_saves_restores_and_checkpoints(
    run: Run, programs: Programs, tmp_path: Path, outside: Namespace, note: Note
) -> None:
    audit, captured = tmp_path / "audit", tmp_path / "card.pcapng"

    async def story() -> None:
        flight = []
        vm = await boot(described(outside, queues=2), programs, records=audit)
        async with vm:
            await vm.wait_ready()
            await bring_up(vm)
            assert (await shell(vm, "ls -d /sys/class/net/eth0/queues/rx-* | wc -l")) == "2"
            assert (await shell(vm, "cat /sys/class/net/eth0/ifalias")) == "card"
            assert (await shell(vm, "cat /sys/class/net/eth0/carrier")) == "1"
            assert (await shell(vm, "cat /sys/class/net/eth0/speed")) == "10000"
            traffic = await Traffic.start(vm, outside)
            await moved(traffic.client, 1 << 20)
            report = await vm.save(tmp_path / "stopped", live=False)
            flight.append((report.packets["queued"], report.packets["sent"]))
        assert outside.interfaces() == []
        for generation in range(2):
            saved = tmp_path / ("stopped" if not generation else "live")
            vm = await VirtualMachine.restore(saved, programs, audit=audit, capture=captured if generation else None)
            async with vm:
                await moved(traffic.client, 1 << 20)
                if not generation:
                    report = await vm.save(tmp_path / "live", live=True)
                    flight.append((report.packets["queued"], report.packets["sent"]))
                    continue
                report = await vm.save(tmp_path / "checkpoint", live=True, keep=True)
                flight.append((report.packets["queued"], report.packets["sent"]))
                await moved(traffic.client, 1 << 20)
                await require_no_complaints(vm)
                state = await card(vm)
                await traffic.finish(vm)
                await collect_audit(vm)
        note(
            f"hv_netvsc: packets in flight at the saves (queued, sent) {flight}, frames taken along "
            f"{state['drained']}, to the guest {state['to_guest']}, to the host {state['to_host']}"
        )
        assert state["announced"] >= 3 and state["guest"]["long_frames"] and state["guest"]["queues"] == 2

    run(story())
    halves = check_paths([audit])
    assert halves.clean and {one.driver for one in halves.channels} == {"hv_netvsc", "hv_utils"}, str(halves)
    assert len(halves.timeline) == 4 and halves.half_transactions > 1000
    said = set(said_in(captured))
    assert not [one for one in said if not one or "does not have" in one], said
    assert any("of the receive buffer" in one for one in said) and any("RNDIS data, a frame of" in one for one in said)
    assert export(captured, tmp_path / "frames.pcapng").frames > 100
    note(f"hv_netvsc: {halves.half_transactions} packets completed once each, by the host's half of the records")


def test_network_survives_what_people_do_with_the_card(
    run: Run, programs: Programs, tmp_path: Path, outside: Namespace, note: Note
) -> None:
    """MTU, down and up, a cable that is pulled, unbind and bind, a card that is taken away and put in again, all under
    load; a save of what came of it, a checkpoint under a download, a revert, and a server that is killed."""
    description = described(outside, cpus=1, mtu=9000, offload=False)
    served = tmp_path / "served"
    served.mkdir()
    content = os.urandom(4 << 20)
    (served / "file").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    fetch = f"wget -q -O - http://{HOST}:8000/file | sha256sum"

    async def story() -> None:
        vm = await boot(description, programs)
        async with vm:
            await vm.wait_ready()
            await bring_up(vm)
            traffic = await Traffic.start(vm, outside)
            await moved(traffic.client, 1 << 18)
            await shell(vm, "ip link set eth0 down && sleep 0.3 && ip link set eth0 up")
            await moved(traffic.client, 1 << 18)
            for mtu in (1280, 9000):
                await shell(vm, f"ip link set eth0 mtu {mtu}")
                await moved(traffic.client, 1 << 18)
                assert (await card(vm))["guest"]["mtu"] == mtu
            large = outside.start("ping", host=GUEST, count=5, size=8900)
            await eventually(lambda: large.process.poll() is not None, "large pings", 60)
            assert large.result()["received"] == 5
            await vm.command_provider("card", "link", {"state": "down"})
            await carrier(vm, "0")
            await vm.command_provider("card", "link", {"state": "up"})
            await carrier(vm, "1")
            await moved(traffic.client, 1 << 18)
            driver = "/sys/bus/vmbus/drivers/hv_netvsc"
            await shell(vm, f"echo {INSTANCE} > {driver}/unbind && ! test -e /sys/class/net/eth0")
            assert (await card(vm))["guest"]["receive_buffer"] == 0
            await shell(vm, f"echo {INSTANCE} > {driver}/bind")
            await until_shell(vm, "test -e /sys/class/net/eth0")
            await bring_up(vm)
            await moved(traffic.client, 1 << 18)
            assert (await vm.control.call("rescind", name="card"))["released"], "RTNL is held for ever"
            await vm.control.call("offer", provider=msgspec.to_builtins(description.device.providers[0]))
            await until_shell(vm, "test -e /sys/class/net/eth0")
            await bring_up(vm)
            await moved(traffic.client, 1 << 18)
            await vm.save(tmp_path / "saved", live=True)
        async with await VirtualMachine.restore(tmp_path / "saved", programs) as vm:
            await moved(traffic.client, 1 << 18)
            await shell(vm, f"({fetch} > /tmp/sum) > /dev/null 2>&1 &")
            await vm.checkpoint("here")
            await until_shell(vm, f"grep {digest} /tmp/sum")
            await moved(traffic.client, 1 << 18)
            await require_no_complaints(vm)
            state = await card(vm)
            await traffic.finish(vm)
            note(f"hv_netvsc, handled: {state['to_guest']} frames to the guest, {state['control']} control messages")
            # What it had under way there has no other end any more; the card goes on.
            await vm.revert("here")
            await until_shell(vm, f"{fetch} | grep {digest}")
            ping = outside.start("ping", host=GUEST, count=5)
            await eventually(lambda: ping.process.poll() is not None, "pings", 60)
            assert ping.result()["received"] == 5
            assert vm.server is not None
            os.kill(vm.server.process.pid, signal.SIGKILL)
            with pytest.raises(VmbusError):
                await vm.wait_ended()
            await eventually(lambda: outside.interfaces() == [], "the interface to be gone with its server")

    server = outside.serve_files(served, 8000)
    try:
        run(story())
    finally:
        server.kill()
        server.wait()


async def until_shell(vm: VirtualMachine, command: str, seconds: float = 30.0) -> None:
    await in_guest.until_prints(vm, f"{{ {command}; }} > /dev/null 2>&1 && echo so", "so", seconds)


async def carrier(vm: VirtualMachine, wanted: str) -> None:
    await until_shell(vm, f"test $(cat /sys/class/net/eth0/carrier) = {wanted}")


def test_nothing_of_network_and_disk_outlives_their_owner(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    outside: Namespace,
) -> None:
    """scripts/run-vm with both devices is killed in mid-traffic: no interface, no lock, no process is left, and no file
    but the image."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("r")))  # short: sockets are in there
    monkeypatch.setenv("VMBUS_DISKS", str(tmp_path / "disks"))
    image = tmp_path / "disks" / "linux.img"
    config = tmp_path / "both.toml"
    options = {"interface": "host0", "address": f"{HOST}/24", "namespace": outside.name}
    inline = ", ".join(f'{key} = "{value}"' for key, value in options.items())
    config.write_text(
        (CHECKOUT / "qemu_configs" / "linux.toml").read_text()
        + f'\n[[device.providers]]\nkind = "network"\nname = "card"\ninstance = "{INSTANCE}"\n'
        + f"options = {{ {inline} }}\n"
    )
    log = tmp_path / "owner.log"
    drives = [f"interface:interface=eth0,address={GUEST}/24", "disk-writer:device=/dev/sda,count=0"]
    words = ["run-vm", str(config), "--name", "both", *(word for one in drives for word in ("--drive", one))]
    with log.open("wb") as output:
        owner = spawn(*words, stdout=output)
    try:
        # As booted: the command that people use is under test.
        ping = outside.start("ping", host=GUEST, count=0, appear_seconds=150)

        async def story() -> None:
            await eventually(
                lambda: ping.progress().get("received", 0) > 3 or owner.poll() is not None, "pings to come back", 150
            )
            assert owner.poll() is None, log.read_text()
            assert outside.interfaces() == ["host0"] and in_use(image)
            directory = str(runtime_base() / "both")
            owner.kill()
            await eventually(lambda: owner.poll() is not None, "the owner's end", 60)
            await eventually(lambda: outside.interfaces() == [], "the interface to be gone")
            await eventually(lambda: not in_use(image), "the lock to be gone")

            def processes() -> list[str]:
                lines = list(command_lines().values())
                return [line for line in lines if directory in line]

            await eventually(lambda: not processes(), "the processes' end")

        asyncio.run(asyncio.wait_for(story(), pace.seconds(240)))
        clean_stale(runtime_base())  # as the next start of a VM does
        assert not any(runtime_base().glob("[!.]*"))
        assert [one.name for one in image.parent.iterdir()] == [image.name]
    finally:
        owner.kill()
        owner.wait()
