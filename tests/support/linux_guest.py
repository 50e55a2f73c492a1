"""A guest with Linux's own VMBus drivers, and what a hostile device server could write into its memory."""

from __future__ import annotations

from pathlib import Path

import msgspec

from vmbus.operations.machine import VirtualMachine
from vmbus.vm.description import VmDescription, load_description

CHECKOUT = Path(__file__).resolve().parents[2]


def described(cpus: int, *kernel_arguments: str, driver: str = "linux") -> VmDescription:
    """The machine of qemu_configs with its integration services alone, and faster heartbeats."""
    plain = msgspec.to_builtins(load_description(CHECKOUT / "qemu_configs" / "linux.toml"))
    plain["cpus"] = cpus
    plain["guest"] |= {"driver": driver, "kernel_arguments": list(kernel_arguments)}
    plain["device"]["providers"] = [one for one in plain["device"]["providers"] if one["kind"] == "integration"]
    services = ["heartbeat", "shutdown", "time", "kvp"]
    plain["device"]["providers"][0]["options"] |= {"services": services, "heartbeat_seconds": 0.1}
    return msgspec.convert(plain, VmDescription)


class GuestMemory:
    """The guest's memory as the device server sees it: what is written here, a hostile server could write."""

    def __init__(self, vm: VirtualMachine) -> None:
        assert vm.qemu is not None
        folder = Path(f"/proc/{vm.qemu.process.pid}/fd")
        self.path = next(path for path in folder.iterdir() if "memory-backend-memfd" in str(path.readlink()))
        self.size = vm.description.memory_mib << 20
        assert self.path.stat().st_size == self.size <= 2 << 30, "below the hole, addresses are offsets"

    def write(self, address: int, data: bytes) -> None:
        assert 0 < address < self.size - len(data)
        with self.path.open("r+b", buffering=0) as file:
            file.seek(address)
            file.write(data)


async def message_page(vm: VirtualMachine) -> int:
    """Address of the page that the function writes its messages to."""
    return await _page(vm, "MESSAGE")


async def event_page(vm: VirtualMachine) -> int:
    """Address of the page with the event flags."""
    return await _page(vm, "EVENT")


async def _page(vm: VirtualMachine, name: str) -> int:
    registers = (await vm.call_server("inspect"))["synic"]["registers"]
    return int(registers[f"{name}_PAGE_LOW"] | registers[f"{name}_PAGE_HIGH"] << 32) & ~0xFFF
