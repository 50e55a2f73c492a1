"""QEMU's arguments, word by word."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from vmbus.errors import UsageError
from vmbus.vm.command_line import (
    Programs,
    kernel_arguments,
    machine_version,
    qemu_arguments,
    serves_machine,
    with_available_driver,
)
from vmbus.vm.description import GuestDescription, load_description

DEMO = load_description(Path(__file__).parents[2] / "qemu_configs" / "demo.toml")
PROGRAMS = Programs(
    qemu=("loader", "--library-path", "lib", "qemu"),
    qemu_version="11.1.3",
    accelerator="tcg",
    kernel=Path("/k/vmlinuz"),
    initramfs=Path("/k/initramfs"),
)
RUN = Path("/run/demo")


def options(arguments: list[str], name: str) -> list[str]:
    return [arguments[i + 1] for i, word in enumerate(arguments) if word == name]


def test_the_command_begins_with_the_programs_own_words() -> None:
    assert qemu_arguments(DEMO, PROGRAMS, RUN)[:4] == ["loader", "--library-path", "lib", "qemu"]


def test_memory_is_shared_and_used() -> None:
    arguments = qemu_arguments(DEMO, PROGRAMS, RUN)
    assert options(arguments, "-object") == ["memory-backend-memfd,id=mem,size=256M,share=on"]
    assert options(arguments, "-machine") == ["pc-q35-11.1,memory-backend=mem"]
    assert options(arguments, "-m") == ["256M"]


def test_the_iommu_comes_before_the_device() -> None:
    devices = options(qemu_arguments(DEMO, PROGRAMS, RUN), "-device")
    assert devices[0] == "intel-iommu,caching-mode=on,intremap=on"
    device = json.loads(devices[-1])
    assert device == {
        "driver": "vfio-user-pci",
        "id": "vmbus",
        "socket": {"type": "unix", "path": "/run/demo/vfio.sock"},
        "addr": "5",
        "rombar": 0,
    }


def test_the_slot_is_written_in_hex() -> None:
    at_29 = msgspec.structs.replace(DEMO, slot=29)
    assert json.loads(options(qemu_arguments(at_29, PROGRAMS, RUN), "-device")[-1])["addr"] == "1d"


def test_kvm_gets_a_split_irqchip() -> None:
    kvm = Programs(**{**PROGRAMS.__dict__, "accelerator": "kvm"})
    assert options(qemu_arguments(DEMO, kvm, RUN), "-machine")[0].endswith(",kernel-irqchip=split")


def test_the_agents_port_two_monitors_and_a_logged_console() -> None:
    arguments = qemu_arguments(DEMO, PROGRAMS, RUN)
    chardevs = {text.split(",")[1]: text for text in options(arguments, "-chardev")}
    assert set(chardevs) == {"id=console", "id=qmp", "id=qmp-tools", "id=agent"}
    assert all(text.endswith(",server=on,wait=off") or "logfile=" in text for text in chardevs.values())
    assert "logfile=/run/demo/console.log" in chardevs["id=console"]
    assert len(options(arguments, "-mon")) == 2
    assert any("name=org.vmbus.agent" in text for text in options(arguments, "-device"))


def test_a_handed_over_monitor_socket() -> None:
    arguments = qemu_arguments(DEMO, PROGRAMS, RUN, qmp="socket,id=qmp,fd=7,server=on,wait=off")
    assert "socket,id=qmp,fd=7,server=on,wait=off" in options(arguments, "-chardev")
    assert not any("qmp.sock" in word for word in arguments)


def test_commas_in_paths_are_escaped() -> None:
    arguments = qemu_arguments(DEMO, PROGRAMS, Path("/run/a,b"))
    assert any("path=/run/a,,b/agent.sock," in text for text in options(arguments, "-chardev"))
    assert json.loads(options(arguments, "-device")[-1])["socket"]["path"] == "/run/a,b/vfio.sock"  # JSON: as it is


def test_only_an_incoming_vm_waits() -> None:
    assert "-incoming" not in qemu_arguments(DEMO, PROGRAMS, RUN)
    arguments = qemu_arguments(DEMO, PROGRAMS, RUN, incoming=True)
    assert options(arguments, "-incoming") == ["defer"]
    assert "-S" in arguments


def test_saving_and_restoring_side_build_the_same_machine() -> None:
    launched = qemu_arguments(DEMO, PROGRAMS, RUN)
    restored = qemu_arguments(DEMO, PROGRAMS, RUN, incoming=True)
    assert restored == [*launched, "-S", "-incoming", "defer"]


@pytest.mark.parametrize(
    ("accelerator", "cpus", "spare_cpus", "expected"),
    [
        ("tcg", 1, None, "1,maxcpus=2"),
        ("tcg", 2, None, "2"),
        ("kvm", 1, None, "1"),
        ("tcg", 1, 0, "1"),  # as machines were made before, and as their snapshots want them
        ("tcg", 4, 3, "4,maxcpus=7"),
    ],
)
def test_an_emulated_machine_has_room_for_a_second_cpu(
    accelerator: str, cpus: int, spare_cpus: int | None, expected: str
) -> None:
    programs = Programs(**{**PROGRAMS.__dict__, "accelerator": accelerator})
    description = msgspec.structs.replace(DEMO, cpus=cpus)
    assert options(qemu_arguments(description, programs, RUN, spare_cpus=spare_cpus), "-smp") == [expected]


def test_kernel_arguments() -> None:
    words = kernel_arguments(msgspec.structs.replace(DEMO, guest=GuestDescription(16, ["debug"]))).split()
    assert {"console=ttyS0", "rdinit=/init", "intel_iommu=on", "hugepages=16", "debug"} <= set(words)


def test_linux_own_drivers_need_no_iommu_and_no_huge_pages() -> None:
    linux = msgspec.structs.replace(DEMO, guest=GuestDescription(driver="linux"))
    words = kernel_arguments(linux).split()
    assert {"vmbus.driver=linux", "vmbus_pci.function=0000:00:05.0"} <= set(words)
    assert not [word for word in words if "iommu" in word or "hugepages" in word]
    assert not any("intel-iommu" in option for option in options(qemu_arguments(linux, PROGRAMS, RUN), "-device"))
    assert any("intel-iommu" in option for option in options(qemu_arguments(DEMO, PROGRAMS, RUN), "-device"))


def test_both_drivers_need_everything() -> None:
    both = msgspec.structs.replace(DEMO, slot=9, guest=GuestDescription(driver="both"))
    words = kernel_arguments(both).split()
    assert {"vmbus.driver=both", "vmbus_pci.function=0000:00:09.0", "intel_iommu=on", "iommu=pt"} <= set(words)
    assert any("intel-iommu" in option for option in options(qemu_arguments(both, PROGRAMS, RUN), "-device"))


def test_a_machine_without_the_kernel_module_falls_back_and_says_so() -> None:
    linux = msgspec.structs.replace(DEMO, guest=GuestDescription(driver="linux"))
    without = replace(PROGRAMS, no_linux_driver="there is no compiler")
    assert with_available_driver(linux, PROGRAMS) == (linux, "")
    assert with_available_driver(DEMO, without) == (DEMO, "")
    found, notice = with_available_driver(linux, without)
    assert not found.guest.linux and found.device == linux.device
    assert "userspace driver" in notice and "there is no compiler" in notice


@pytest.mark.parametrize(("version", "machine"), [("11.1.3", "pc-q35-11.1"), ("10.2.0", "pc-q35-10.2")])
def test_machine_versions(version: str, machine: str) -> None:
    assert machine_version(version) == machine


@pytest.mark.parametrize(
    ("version", "machine", "served"),
    [
        ("11.1.3", "pc-q35-11.1", True),
        ("11.1.3", "pc-q35-10.2", True),
        ("12.0.0", "pc-q35-11.1", True),
        ("11.1.3", "pc-q35-11.2", False),
        ("10.2.0", "pc-q35-11.1", False),
        ("11.1.3", "pc-i440fx-11.1", False),
        ("11.1.3", "pc-q35-11.1,dump-guest-core=on", False),
    ],
)
def test_fault_m15_which_machines_a_qemu_has(version: str, machine: str, served: bool) -> None:
    assert serves_machine(version, machine) is served


def test_fault_m15_a_machine_is_made_as_it_was_made_once(tmp_path: Path) -> None:
    words = qemu_arguments(DEMO, PROGRAMS, tmp_path, machine_type="pc-q35-10.1", generation_id=False)
    assert words[words.index("-machine") + 1].startswith("pc-q35-10.1,")
    assert not any("vmgenid" in word for word in words)


def test_fault_m10_fault_m14_new_machines_reboot_and_have_a_generation_of_their_own(tmp_path: Path) -> None:
    words = qemu_arguments(DEMO, PROGRAMS, tmp_path)
    assert "-no-reboot" not in words and "vmgenid,guid=auto,id=generation" in words


def test_nonsense_is_no_version() -> None:
    with pytest.raises(UsageError, match="not a QEMU version"):
        machine_version("eleven")
