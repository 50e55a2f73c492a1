"""A guest of one's own: what can be said of it, and what of that reaches QEMU's command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vmbus.cli.own_guest import parse_memory, with_options
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.snapshot.manifest import INITRAMFS, KERNEL, RAM, STATE, contents_of
from vmbus.vm.command_line import Programs, machine_of, qemu_arguments, with_available_driver
from vmbus.vm.description import VmDescription, load_description, parse_description
from vmbus.vm.own_guest import OwnDisk, OwnGuest, check_boot_files, parse_disk, parse_nic

CONFIGURATION = Path(__file__).parents[2] / "qemu_configs" / "demo.toml"
DEMO = load_description(CONFIGURATION)
PROGRAMS = Programs(
    qemu=("qemu",), qemu_version="11.1.3", accelerator="tcg", kernel=Path("/k/vmlinuz"), initramfs=Path("/k/initramfs")
)
RUN = Path("/run/demo")
NOTHING: dict[str, Any] = dict.fromkeys(("kernel", "initrd", "append", "memory", "cpus", "machine", "cpu", "gdb")) | {
    "disks": (),
    "nics": (),
    "qemu_args": (),
}


def own(**said: Any) -> VmDescription:
    """The demo with these options of run-vm."""
    return with_options(DEMO, NOTHING | said)


def options(words: list[str], name: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words) if word == name]


def blocks(words: list[str], name: str = "-device") -> list[dict[str, Any]]:
    return [json.loads(text) for text in options(words, name) if text.startswith("{")]


def test_own_guest_is_nothing_unless_it_is_asked_for() -> None:
    assert own() is DEMO and DEMO.own is msgspec.UNSET and not DEMO.foreign
    assert b"own" not in msgspec.json.encode(DEMO), "manifests of VMs without have the bytes that they always had"
    assert contents_of(DEMO) == (RAM, STATE, KERNEL, INITRAMFS)


def test_own_guest_kernel_has_its_own_command_line_and_no_initramfs_of_ours() -> None:
    vm = own(kernel="k/bzImage", append="root=/dev/vda console=ttyS0")
    assert vm.foreign and vm.mine.kernel == str(Path.cwd() / "k/bzImage")
    programs = Programs(**{**PROGRAMS.__dict__, "kernel": Path("/run/k,1"), "initramfs": None})
    words = qemu_arguments(vm, programs, RUN)
    assert options(words, "-kernel") == ["/run/k,1"] and "-initrd" not in words
    assert options(words, "-append") == ["root=/dev/vda console=ttyS0"]
    assert options(qemu_arguments(own(kernel="k"), programs, RUN), "-append") == ["console=ttyS0"]
    assert contents_of(vm) == (RAM, STATE, KERNEL)
    assert contents_of(own(kernel="k", initrd="i")) == contents_of(own(initrd="i")) == (RAM, STATE, KERNEL, INITRAMFS)


def test_own_guest_words_are_added_where_the_kernel_is_ours() -> None:
    vm = own(append="debug ignore_loglevel")
    assert not vm.foreign
    assert options(qemu_arguments(vm, PROGRAMS, RUN), "-append")[0].endswith(" debug ignore_loglevel")


def test_own_guest_initrd_escapes_what_would_end_its_name() -> None:
    programs = Programs(**{**PROGRAMS.__dict__, "initramfs": Path("/run/a,b")})
    assert options(qemu_arguments(own(initrd="a"), programs, RUN), "-initrd") == ["/run/a,,b"]


def test_own_guest_disks_and_cards_are_where_they_were_whatever_their_names() -> None:
    vm = own(
        disks=("/d/a,,b.img,snapshot=shared", "c.qcow2,bus=sata,read_only", "d,format=qcow2"),
        nics=("user,hostfwd=tcp::2222-:22,hostfwd=udp:0.0.0.0:53-10.0.2.15:53", "user,model=e1000e"),
    )
    words = qemu_arguments(vm, Programs(**{**PROGRAMS.__dict__, "kernel": None, "initramfs": None}), RUN)
    first, second, third = blocks(words, "-blockdev")
    assert first["file"]["filename"] == "/d/a,b.img" and first["driver"] == "raw"
    assert second["driver"] == "qcow2" and second["read-only"] and second["file"]["read-only"]
    assert second["file"]["filename"] == str(Path.cwd() / "c.qcow2") and third["driver"] == "qcow2"
    devices = [
        (one["driver"], one.get("addr"), one.get("bootindex")) for one in blocks(words) if "vfio" not in one["driver"]
    ]
    assert devices == [
        ("virtio-blk-pci", "1e", 1),
        ("ide-hd", None, 2),
        ("virtio-blk-pci", "1d", 3),
        ("virtio-net-pci", "1c", None),
        ("e1000e", "1b", None),
    ]
    assert blocks(words, "-netdev")[0]["hostfwd"] == [
        {"str": "tcp:127.0.0.1:2222-:22"},
        {"str": "udp:0.0.0.0:53-10.0.2.15:53"},
    ]
    assert "-kernel" not in words and "-append" not in words and vm.mine.by_firmware
    assert "graphics=off" in options(words, "-machine")[0], "the boot loader is on the console"
    assert contents_of(vm) == (RAM, STATE, "disk.2")
    at_30 = msgspec.structs.replace(vm, slot=30)
    assert [
        one["addr"] for one in blocks(qemu_arguments(at_30, PROGRAMS, RUN)) if one["driver"] == "virtio-blk-pci"
    ] == [
        "1d",
        "1c",
    ]


def test_own_guest_machine_cpu_and_size() -> None:
    vm = own(machine="pc-q35-10.2,smm=off", cpu="max,-avx512f", memory="1G", cpus=3)
    words = qemu_arguments(vm, PROGRAMS, RUN)
    assert options(words, "-machine") == ["pc-q35-10.2,memory-backend=mem,smm=off"]
    assert options(words, "-cpu") == ["max,-avx512f"]
    assert options(words, "-m") == ["1024M"] and options(words, "-smp") == ["3"]
    assert machine_of(own(machine="q35,smm=off"), "11.1.3") == machine_of(DEMO, "11.1.3") == "pc-q35-11.1"
    # A restore has the type that was recorded, and the properties that were said.
    restored = qemu_arguments(vm, PROGRAMS, RUN, machine_type="pc-q35-10.1")
    assert options(restored, "-machine") == ["pc-q35-10.1,memory-backend=mem,smm=off"]
    assert [parse_memory(text) for text in ("300", "512M", "2G", "4GiB")] == [300, 512, 2048, 4096]


def test_own_guest_gdb_and_words_for_qemu() -> None:
    vm = own(qemu_args=("-device", "virtio-rng-pci", "-drive", "file=x.iso,readonly=on"))
    words = qemu_arguments(vm, PROGRAMS, Path("/run/a,b"), gdb="socket")
    assert words[-6:] == [
        *("-gdb", "unix:/run/a,,b/gdb.sock,server=on,wait=off"),
        *("-device", "virtio-rng-pci", "-drive", "file=x.iso,readonly=on"),
    ]
    assert options(qemu_arguments(vm, PROGRAMS, RUN, gdb="1234"), "-gdb") == ["tcp:127.0.0.1:1234"]
    assert "-gdb" not in qemu_arguments(own(gdb="socket"), PROGRAMS, RUN), "of this run alone"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"machine": "pc"}, "allowed: q35"),
        ({"machine": "q35,kernel=/etc/shadow"}, "not its kernel: it is --kernel"),
        ({"machine": "q35,memory-backend=x"}, "the device server maps"),
        ({"cpu": "max,x y"}, "--cpu: "),
        ({"qemu_args": ("-m", "1G")}, "--memory"),
        ({"qemu_args": ("--daemonize",)}, "owns QEMU"),
        ({"qemu_args": ("-drive", "file=x,format=raw")}, "--disk FILE"),
        ({"qemu_args": ("virtio-rng-pci",)}, "begin with '-'"),
        ({"nics": ("user,guestfwd=tcp:10.0.2.1:1-cmd:sh",)}, "guestfwd"),
        ({"nics": ("user,hostfwd=tcp:2222:22",)}, "hostfwd"),
        ({"nics": ("tap",)}, "allowed: user"),
        ({"disks": ("a.img,cache=unsafe",)}, "cache"),
        ({"disks": ("a.img,format=vmdk",)}, "allowed: .*qcow2"),
        ({"disks": ("a.img,snapshot",)}, "KEY=VALUE"),
        ({"disks": ("a.img", "a.img")}, "two disks"),
        ({"disks": ("a.img",), "append": "quiet"}, "give a kernel"),
        ({"memory": "64"}, "--memory: .*128"),
        ({"memory": "lots"}, "--memory"),
        ({"gdb": "0.0.0.0:1"}, "--gdb"),
        ({"gdb": "70000"}, "65535"),
        ({"append": "a\nb"}, "--append"),
    ],
)
def test_own_guest_is_refused_with_the_option_and_what_is_allowed(said: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        own(**said)


GOOD = """
name = "mine"
[own]
kernel = "bzImage"
initrd = "sub/initrd.img"
cpu = "max"
[[own.disks]]
file = "../disk.qcow2"
[[own.nics]]
hostfwd = ["tcp::2222-:22"]
[device]
name = "vmbus0"
[[device.providers]]
kind = "echo"
name = "echo"
instance = "6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7a01"
"""


def test_own_guest_of_a_description_is_relative_to_it_and_options_win(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(GOOD)
    vm = load_description(tmp_path / "mine.toml")
    assert vm.mine.kernel == str(tmp_path / "bzImage") and vm.mine.initrd == str(tmp_path / "sub/initrd.img")
    assert Path(vm.mine.disks[0].file) == tmp_path / "../disk.qcow2"
    other = with_options(vm, NOTHING | {"kernel": "other", "disks": ("b.img",)})
    assert other.mine == OwnGuest(
        kernel=str(Path.cwd() / "other"),
        initrd=vm.mine.initrd,
        cpu="max",
        disks=[OwnDisk(str(Path.cwd() / "b.img"))],
        nics=vm.mine.nics,
    )
    assert msgspec.json.decode(msgspec.json.encode(other), type=VmDescription) == other
    with pytest.raises(UsageError, match=r"guest\.root and guest\.kernel_arguments"):
        parse_description(GOOD.replace("[own]", '[guest]\nkernel_arguments = ["x"]\n[own]'), "x")


def test_own_guest_boot_files_are_looked_at_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="there is no kernel"):
        check_boot_files(own(kernel=str(tmp_path / "absent")).mine)
    with pytest.raises(EnvironmentProblem, match="is no file"):
        check_boot_files(own(initrd=str(tmp_path)).mine)


def test_own_guest_has_whatever_drivers_it_has() -> None:
    linux = msgspec.structs.replace(own(initrd="i"), guest=msgspec.structs.replace(DEMO.guest, driver="linux"))
    without = Programs(**{**PROGRAMS.__dict__, "no_linux_driver": "there is no compiler"})
    assert with_available_driver(linux, without) == (linux, "")


def test_own_guest_disks_and_cards_as_they_are_written() -> None:
    assert parse_disk("a,,b.qcow2,snapshot=shared") == OwnDisk("a,b.qcow2", snapshot="shared")
    assert parse_disk("a.qcow2").driver == "qcow2" and parse_disk("a.img").driver == "raw"
    assert not parse_disk("a,read_only").contained and parse_disk("a").contained
    assert parse_nic("user").hostfwd == []
