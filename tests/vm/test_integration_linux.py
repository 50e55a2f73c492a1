"""The integration services with Linux's own driver and daemon: hv_utils and hv_kvp_daemon of Debian."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support import pace
from support.in_guest import shell
from vmbus.errors import VmbusError, WaitTimeout
from vmbus.operations.machine import VirtualMachine
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription, load_description

pytestmark = [pytest.mark.vm, pytest.mark.long]

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Note = Callable[[str], None]
CHECKOUT = Path(__file__).resolve().parents[2]
AWAY = 5.0
"""Seconds that pass between a save and its restore, on purpose."""
ECHO = "6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7d0e"
CLOSE = 1.5
"""Seconds by which two clocks may differ here: one is asked for over a slow line."""


def described(sync_seconds: float) -> VmDescription:
    """The machine of qemu_configs, with values for the guest."""
    plain = msgspec.to_builtins(load_description(CHECKOUT / "qemu_configs" / "linux.toml"))
    services = next(one for one in plain["device"]["providers"] if one["kind"] == "integration")
    # The other is there for when this one is not: a device has at least one provider.
    plain["device"]["providers"] = [services, {"kind": "echo", "name": "echo", "instance": ECHO}]
    services["options"] |= {
        "services": ["heartbeat", "shutdown", "time", "kvp", "vss"],
        "heartbeat_seconds": 0.2,
        "time_seconds": 1,
        "sync_seconds": sync_seconds,
        "values": {"role": "example"},
    }
    return msgspec.convert(plain, VmDescription)


async def part(vm: VirtualMachine, name: str) -> dict[str, Any]:
    """What the provider says about one of its services."""
    return dict((await vm.call_server("status"))["providers"]["services"][name])


async def wrong_by(vm: VirtualMachine) -> float:
    """Seconds between the guest's clock and ours, as far as that can be known from here."""
    started = time.time()
    guest = int(await shell(vm, "date +%s"))
    return max(0.0, started - guest - 1, guest - time.time())


async def until_right(vm: VirtualMachine, seconds: float) -> float:
    """Wait for the guest's clock to be right; how long it was not."""
    start = time.monotonic()
    while (wrong := await wrong_by(vm)) > CLOSE:
        if time.monotonic() - start > seconds:
            raise WaitTimeout(f"the guest's clock to be right; it is wrong by {wrong:.0f} s", seconds)
        await asyncio.sleep(0.1)
    return time.monotonic() - start


async def until_beats(vm: VirtualMachine, count: int) -> None:
    """Wait for so many heartbeats more than there are."""
    wanted = (await part(vm, "heartbeat"))["beats"] + count

    async def beaten() -> bool:
        return bool((await part(vm, "heartbeat"))["beats"] >= wanted)

    await pace.eventually(beaten, f"{wanted} heartbeats", 60, every=0.05)
    heartbeat = await part(vm, "heartbeat")
    assert heartbeat["alive"] and heartbeat["wrong"] == heartbeat["stray"] == 0, heartbeat


async def until_negotiated(vm: VirtualMachine, after: int) -> None:
    """Wait for the key-value service to be there, with more answers than that."""

    async def negotiated() -> bool:
        kvp = await part(vm, "kvp")
        return bool(kvp["phase"] == "ready" and kvp["answered"] > after)

    await pace.eventually(negotiated, "the daemon", 60, every=0.1)


def with_a_disk(programs: Programs, image: Path) -> Programs:
    """A disk of QEMU's own in the machine, to have a file system on."""
    with image.open("wb") as file:
        file.truncate(16 << 20)
    extra = (
        *("-blockdev", f"driver=raw,node-name=base,file.driver=file,file.aio=threads,file.filename={image}"),
        *("-device", "virtio-blk-pci,drive=base,addr=0x8"),
    )
    return dataclasses.replace(programs, extra=extra)


def is_clean(image: Path) -> bool:
    """Whether the ext4 file system in an image needs no recovery, as its superblock says."""
    with image.open("rb") as file:
        file.seek(1024 + 0x60)
        return not int.from_bytes(file.read(4), "little") & 4


MOUNT = """
while read -r name needed; do
    case $name in crc16|crc32c_generic|mbcache|jbd2|ext4|virtio_blk) insmod /lib/modules/$name.ko ;; esac
done < /lib/modules/order
/usr/sbin/mke2fs -q -F -t ext4 /dev/vda && mount /dev/vda /mnt && echo mounted
"""


def test_integration_service_of_linux_over_a_restore(run: Run, programs: Programs, tmp_path: Path, note: Note) -> None:
    def ask(vm: VirtualMachine, command: str, **arguments: Any) -> Coroutine[Any, Any, dict[str, Any]]:
        return vm.command_provider("services", command, arguments)

    async def samples_alone_set_no_clock(vm: VirtualMachine) -> None:
        """Else what follows would prove nothing."""
        await shell(vm, "date -s 2001-01-01")
        samples = (await part(vm, "time"))["samples"]
        deadline = time.monotonic() + pace.seconds(60)
        while (await part(vm, "time"))["samples"] < samples + 3:
            assert time.monotonic() < deadline, "no samples"
            await asyncio.sleep(0.2)
        assert await wrong_by(vm) > 1e6
        await ask(vm, "time-sync")
        await until_right(vm, 10)

    async def keys_and_values(vm: VirtualMachine) -> None:
        facts = (await ask(vm, "kvp-list", pool="auto"))["values"]
        assert facts["FullyQualifiedDomainName"] == "vmbus-guest" and "cloud" in facts["OSBuildNumber"], facts
        assert len(facts) == 10
        assert await ask(vm, "kvp-set", key="number", value=4711, type="u32") == {"told": True}
        values = (await ask(vm, "kvp-list", pool="external"))["values"]
        assert values == {"role": "example", "early": "x", "number": "4711"}
        assert "role" in await shell(vm, "tr -d '\\0' < /var/lib/hyperv/.kvp_pool_0")

    image = tmp_path / "disk.img"
    programs = with_a_disk(programs, image)

    async def writes(vm: VirtualMachine, name: str) -> bool:
        """Whether a program that writes to the disk gets on, within a second."""
        script = f"(echo x > /mnt/{name}; echo > /run/{name}) > /dev/null 2>&1 & sleep 1; ls /run/{name}"
        return await shell(vm, script, check=False) == f"/run/{name}"

    async def until_written(vm: VirtualMachine, name: str) -> None:
        deadline = time.monotonic() + pace.seconds(30)
        while await shell(vm, f"ls /run/{name}", check=False) != f"/run/{name}":
            assert time.monotonic() < deadline, "it still waits"
            await asyncio.sleep(0.1)

    async def freezing(vm: VirtualMachine) -> None:
        assert (await shell(vm, MOUNT)).endswith("mounted")
        assert await writes(vm, "free") and not is_clean(image)
        assert await ask(vm, "freeze", seconds=120) == {"frozen": True}
        assert is_clean(image), "all is on the disk"
        assert not await writes(vm, "held"), "nobody writes"
        assert await ask(vm, "thaw") == {"thawed": True}
        await until_written(vm, "held")
        assert await ask(vm, "freeze", seconds=1) == {"frozen": True}
        await writes(vm, "briefly")
        await until_written(vm, "briefly")  # thawed by itself
        with pytest.raises(VmbusError, match="are not frozen"):
            await ask(vm, "thaw")

    async def story() -> None:
        vm = await VirtualMachine.launch(described(0), programs)  # as booted: it is saved and restored further down
        async with vm:
            assert await ask(vm, "kvp-set", key="early", value="y") == {"told": False}, "its kernel boots"
            await vm.wait_ready()
            await samples_alone_set_no_clock(vm)
            # The provider goes, and another comes: the driver's channels, and its daemon, go and come with them.
            await until_negotiated(vm, 1)
            await vm.control.call("rescind", name="services")
            again = described(4).device.providers[0]
            await vm.control.call("offer", provider=msgspec.to_builtins(again))
            assert await ask(vm, "kvp-set", key="early", value="x") == {"told": False}, "its driver is not there yet"
            await until_negotiated(vm, 1)
            await until_beats(vm, 5)
            await keys_and_values(vm)
            # Whatever its clock did, in either direction.
            took = []
            for date in ("2001-01-01", "2091-01-01"):
                await shell(vm, f"date -s {date}")
                took.append(await until_right(vm, 60))
            await freezing(vm)
            # Frozen, saved: the one that is restored finds itself thawed.
            assert await ask(vm, "freeze", seconds=600) == {"frozen": True}
            assert not await writes(vm, "saved")
            syncs = (await part(vm, "time"))["syncs"]
            await vm.save(tmp_path / "0", live=True)
        await asyncio.sleep(AWAY)
        async with await VirtualMachine.restore(tmp_path / "0", programs) as vm:
            await vm.wait_ready()
            took.append(await until_right(vm, 60))
            assert (await part(vm, "time"))["syncs"] > syncs
            await until_beats(vm, 5)
            await until_written(vm, "saved")
            assert await ask(vm, "thaw") == {"thawed": True}, "it was frozen until the save"
            found = await ask(vm, "kvp-get", key="number", pool="external")
            assert found == {"value": "4711", "type": "string"}
            # A daemon that ends, and another in its place; then the same with the driver.
            await shell(vm, "killall hv_kvp_daemon; while ! pidof hv_kvp_daemon; do sleep 0.1; done")
            assert (await ask(vm, "kvp-get", key="role", pool="external"))["value"] == "example"
            again = (
                "cd /sys/bus/vmbus/drivers/hv_utils; for i in *-*; do echo $i > unbind; echo $i > bind; done; ls -d *-*"
            )
            assert len((await shell(vm, again)).split()) == 5
            await until_negotiated(vm, 0)
            await until_beats(vm, 5)
            assert (await ask(vm, "kvp-get", key="role", pool="external"))["value"] == "example"
            for name in ("heartbeat", "shutdown", "time", "kvp", "vss"):
                status = await part(vm, name)
                assert status["stray"] == 0 and status["phase"] == "ready", status
            # A checkpoint stops the guest for a moment, too: it is told the time.
            syncs = (await part(vm, "time"))["syncs"]
            await vm.save(tmp_path / "1", keep=True)
            await until_beats(vm, 5)
            assert (await part(vm, "time"))["syncs"] > syncs
            trouble = await shell(vm, "dmesg | grep -E 'WARNING|BUG|blocked for|Call Trace|Stale'", check=False)
            assert trouble == "", trouble
            started = time.monotonic()
            assert await ask(vm, "shutdown", text="maintenance") == {"accepted": True, "status": 0}
            await asyncio.wait_for(vm.wait_ended(), pace.seconds(60))
            off = time.monotonic() - started
        note(
            f"Linux's hv_utils: a clock set to 2001, to 2091, and restored {AWAY:g} s after its save was right after "
            f"{[round(one, 1) for one in took]} s; the guest was off {off:.1f} s after it was asked"
        )

    run(story())
