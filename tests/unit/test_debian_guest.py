"""The recipe of the Debian for guests, the copies that VMs get, and the keys that open them."""

from __future__ import annotations

import asyncio
import base64
import re
import stat
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from support.debs import make_deb
from vmbus.cli.keys import MOST_CHARACTERS, keys_word, public_keys, read_keys, with_keys
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.provision import debian_system
from vmbus.provision.accel import Accelerator
from vmbus.provision.cache import Cache, publish_bytes
from vmbus.provision.debian_system import ARCHIVE_PORT, FILES, IMAGE, KEYS_CREDENTIAL, LABEL
from vmbus.provision.guest_files import Kernel
from vmbus.provision.programs import ProgramFailed
from vmbus.provision.qemu import QemuProgram
from vmbus.provision.report import SilentReporter
from vmbus.provision.roots import InstalledPackage, Root, write_record
from vmbus.vm.command_line import Programs, kernel_arguments, with_available_driver
from vmbus.vm.description import VmDescription, load_description, parse_description
from vmbus.vm.root import copy_image, missing_root, prepare_root
from vmbus_guest import newc

KERNEL = Kernel(Path("/k/vmlinuz"), "6.12.1-cloud-amd64", {}, "6.12.1-1")
ECHO = Path(__file__).parents[2] / "qemu_configs" / "echo.toml"
ED25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExample"
RSA = "ssh-rsa " + "A" * 700


def described(**guest: object) -> VmDescription:
    plain = msgspec.to_builtins(load_description(ECHO))
    return msgspec.convert({**plain, "guest": {"driver": "linux", "root": "debian.img", **guest}}, VmDescription)


# --- the recipe ------------------------------------------------------------------------------------------------


def test_the_key_follows_what_goes_into_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {debian_system.key(KERNEL), debian_system.key(replace(KERNEL, package="6.12.1-2"))}
    monkeypatch.setattr(debian_system, "PACKAGES", (*debian_system.PACKAGES, "vim"))
    keys.add(debian_system.key(KERNEL))
    monkeypatch.setattr(debian_system, "FILES", {**FILES, "etc/more": "x"})
    keys.add(debian_system.key(KERNEL))
    monkeypatch.setattr(debian_system, "_script", lambda name: "other")
    keys.add(debian_system.key(KERNEL))
    assert len(keys) == 5


def test_an_image_is_found_whole_or_not_at_all(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    directory = debian_system.own_cache(cache).path("image", debian_system.key(KERNEL))
    assert debian_system.find(cache, KERNEL) is None
    publish_bytes(directory / IMAGE, b"x")
    assert debian_system.find(cache, KERNEL) is None  # without a record it was not finished
    write_record(directory, [InstalledPackage("bash", "5.2", "amd64")], ("trixie",))
    found = debian_system.find(cache, KERNEL)
    assert found is not None and found.packages == {"bash": "5.2"}


def test_nothing_in_the_image_names_a_mirror_or_a_key() -> None:
    for name, text in FILES.items():
        assert "http://" not in text or "http://localhost:" in text, name
        assert "ssh-ed25519" not in text and not name.startswith("/"), name
    assert f"LABEL={LABEL} / ext4" in FILES["etc/fstab"]


# --- the copy --------------------------------------------------------------------------------------------------


def test_the_guest_is_told_the_file_systems_label() -> None:
    assert f"vmbus.root={LABEL}" in kernel_arguments(described()).split()
    assert "vmbus.root" not in kernel_arguments(load_description(ECHO))
    with pytest.raises(UsageError, match="root"):
        parse_description('name = "a"\n[guest]\nroot = "../x"\n[device]\nname="d"\nproviders=[]', "t")


def test_a_guest_on_a_disk_does_not_go_without_linuxs_own_drivers() -> None:
    programs = Programs(("q",), "11.1.3", "tcg", Path("/k"), Path("/i"), no_linux_driver="no compiler")
    with pytest.raises(EnvironmentProblem, match="no compiler"):
        with_available_driver(described(), programs)


def test_a_vm_gets_a_copy_of_its_own_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMBUS_DISKS", str(tmp_path / "disks"))
    template = tmp_path / "template"
    with template.open("wb") as file:
        file.truncate(1 << 24)
        file.write(b"begin")
    template.chmod(0o400)
    description = described()
    image = missing_root(description)
    assert image == tmp_path / "disks" / "debian.img"
    with pytest.raises(EnvironmentProblem, match="scripts/setup --debian"):
        asyncio.run(prepare_root(description, None))
    asyncio.run(prepare_root(description, template))
    assert missing_root(description) is None
    assert image.read_bytes() == template.read_bytes()
    assert stat.S_IMODE(image.stat().st_mode) == 0o600 and image.stat().st_blocks < 1 << 12
    image.write_bytes(b"the user's")
    asyncio.run(prepare_root(description, template))  # there already
    copy_image(template, image)  # somebody else was faster
    assert image.read_bytes() == b"the user's" and [path.name for path in (tmp_path / "disks").iterdir()] == [
        "debian.img"
    ]


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMBUS_DISKS", str(tmp_path / "disks"))

    def full(*_: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vmbus.vm.root.copy_content", full)
    (tmp_path / "template").write_bytes(b"x")
    with pytest.raises(EnvironmentProblem, match="No space left"):
        asyncio.run(prepare_root(described(), tmp_path / "template"))
    assert not list((tmp_path / "disks").iterdir())


# --- keys ------------------------------------------------------------------------------------------------------


def test_keys_are_the_users_without_their_comments(tmp_path: Path) -> None:
    ssh = tmp_path / ".ssh"
    ssh.mkdir()
    (ssh / "id_ed25519.pub").write_text(f"{ED25519} me@home\n")
    (ssh / "id_ed25519").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    (ssh / "other.pub").write_text("not a key\n# ssh-rsa AAAA\n")
    assert read_keys([], tmp_path) == [ED25519]
    assert public_keys(f'command="x" {ED25519}\n{RSA}\n') == [RSA]  # what restricts a key is not dropped from it
    with pytest.raises(UsageError, match="has no public ssh key"):
        read_keys([ssh / "other.pub"])
    with pytest.raises(EnvironmentProblem, match="cannot read"):
        read_keys([ssh / "none.pub"])


def test_the_guest_gets_as_many_as_there_is_room_for(tmp_path: Path) -> None:
    word, left = keys_word([RSA, RSA + "B", ED25519, ED25519])
    assert len(word) <= MOST_CHARACTERS and left == 1
    name, _, data = word.removeprefix("systemd.set_credential_binary=").partition(":")
    assert name == KEYS_CREDENTIAL
    assert base64.b64decode(data).decode().splitlines() == [ED25519, RSA]
    assert KEYS_CREDENTIAL in FILES["etc/ssh/sshd_config.d/owner.conf"]
    (tmp_path / "k.pub").write_text(ED25519)
    given, notice = with_keys(described(kernel_arguments=["ip=off"]), [tmp_path / "k.pub"])
    assert notice == "" and given.guest.kernel_arguments[0] == "ip=off" and len(given.guest.kernel_arguments) == 2
    assert len(kernel_arguments(given)) < 2048


def test_without_a_key_there_is_a_hint(tmp_path: Path) -> None:
    given, notice = with_keys(described(), [], tmp_path)
    assert given == described() and "ssh-keygen" in notice and "--ssh-key" in notice


# --- making it -------------------------------------------------------------------------------------------------


def tools(folder: Path, says: str) -> debian_system.Tools:
    """A set-up whose QEMU says something and ends."""
    folder.mkdir(exist_ok=True)
    qemu = folder / "qemu"
    qemu.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/arguments\nprintf "{says}"\n')
    qemu.chmod(0o755)
    busybox = folder / "usr/bin/busybox"
    busybox.parent.mkdir(parents=True, exist_ok=True)
    busybox.write_bytes(b"busybox")
    modules = folder / "modules"
    modules.mkdir(exist_ok=True)
    for name in ("virtio_blk", "virtio"):
        (modules / f"{name}.ko").write_bytes(name.encode())
    kernel = Kernel(folder / "vmlinuz", "6.12.1-cloud-amd64", {"virtio": (), "virtio_blk": ("virtio",)}, "6.12.1-1")
    program = QemuProgram((str(qemu),), (10, 1, 0), "a test")
    return debian_system.Tools(program, kernel, Root(folder, {}), Accelerator("tcg", "a test"))


def test_the_machine_that_completes_the_image_has_to_say_so(tmp_path: Path) -> None:
    (tmp_path / "root.img").write_bytes(b"")
    setting_up = "Setting up bash (5.2) ...\\n"
    done = tools(tmp_path / "done", setting_up + f"{debian_system._COMPLETE}\\r\\n")
    debian_system.configure(tmp_path / "root.img", done, tmp_path, 1, SilentReporter())
    arguments = (tmp_path / "done/arguments").read_text().splitlines()
    assert f"file={tmp_path}/root.img,format=raw,if=virtio,cache=unsafe,discard=unmap" in arguments
    assert not [word for word in arguments if word.startswith(("-net", "user", "-nic"))]
    # Ended well, by its own account; but the packages are not configured.
    failed = tools(tmp_path / "failed", setting_up + "dpkg: error processing package dbus\\n")
    with pytest.raises(EnvironmentProblem, match="error processing package dbus"):
        debian_system.configure(tmp_path / "root.img", failed, tmp_path, 1, SilentReporter())


def test_its_initial_file_system_has_what_the_disk_needs(tmp_path: Path) -> None:
    found = {entry.name: entry.data for entry in newc.read(debian_system._initramfs(tools(tmp_path / "t", "")))}
    assert found["modules/order"] == b"virtio\nvirtio_blk\n" and found["modules/virtio.ko"] == b"virtio"
    assert debian_system._COMPLETE.encode() in found["init"] and b"@complete@" not in found["init"]
    assert b"dpkg --audit" in found["configure"]


class _Archive:
    """An apt with one package, and the guest's kernel or not."""

    def __init__(self, folder: Path, kernel: bool) -> None:
        self.folder = folder
        self.kernel = kernel

    def install_closure(self, packages: Sequence[str]) -> list[Path]:
        assert "openssh-server" in packages
        return [make_deb(self.folder, "base-files", {"etc/debian_version": "13"}, {})]

    def download(self, packages: Sequence[str]) -> list[Path]:
        assert packages == ["linux-image-6.12.1-cloud-amd64=6.12.1-1"]
        if not self.kernel:
            raise ProgramFailed("E: Version '6.12.1-1' was not found")
        files = {"lib/modules/6.12.1/a.ko": "module", "boot/vmlinuz": "kernel"}
        return [make_deb(self.folder, "linux-image", files, {}, version="6.12.1-1")]


@pytest.mark.parametrize("kernel", [True, False])
def test_an_image_is_published_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool
) -> None:
    cache = Cache(tmp_path / "cache")
    made: list[list[str]] = []

    def make_file_system(_: Root, tree: Path, image: Path) -> None:
        with tarfile.open(tree) as tar:
            made.append(tar.getnames())
        image.write_bytes(b"image")

    def configure(image: Path, *_: object) -> None:
        with cache.lock(timeout=1.0):  # others may set up meanwhile, and do not take what is made here for remains
            pass
        assert image.is_file()
        if len(made) == 1:
            raise EnvironmentProblem("no")

    monkeypatch.setattr(debian_system, "make_root", lambda *_: Root(tmp_path, {}))
    monkeypatch.setattr(debian_system, "make_file_system", make_file_system)
    monkeypatch.setattr(debian_system, "configure", configure)
    given = tools(tmp_path / "t", "")
    for attempt in range(2):
        folder = tmp_path / f"debs{attempt}"
        folder.mkdir()
        archive = _Archive(folder, kernel)
        monkeypatch.setattr(debian_system, "Apt", lambda *_, archive=archive, **__: archive)
        if not attempt:
            with pytest.raises(EnvironmentProblem):
                debian_system.make(cache, given, SilentReporter())
            assert not list(cache.path("debian", "image").iterdir())
        else:
            system = debian_system.make(cache, given, SilentReporter())
    assert system == debian_system.find(cache, given.kernel) and system.packages == {"base-files": "1.0"}
    assert stat.S_IMODE(system.image.stat().st_mode) == 0o400
    assert set(FILES) < set(made[-1]) and "etc/debian_version" in made[-1]
    assert ("usr/lib/modules/6.12.1/a.ko" in made[-1]) is kernel and "boot/vmlinuz" not in made[-1]


# --- in the guest ----------------------------------------------------------------------------------------------

ROOTFS = Path(newc.__file__).parent / "rootfs"


def test_the_scripts_are_shell_and_name_what_there_is() -> None:
    switch = ROOTFS / "usr/sbin/vmbus-switch-root"
    templates = Path(debian_system.__file__).parents[1] / "templates"
    for script in (switch, ROOTFS / "init", *templates.glob("debian-*.sh")):
        subprocess.run(["sh", "-n", script], check=True)
    units = {path.name for path in (ROOTFS / "etc/vmbus-units").iterdir()}
    wanted = set(re.findall(r"\bvmbus-[a-z]+\.(?:service|socket)", switch.read_text()))
    assert wanted == {name for name in units if "@" not in name}
    # A socket that takes connections starts the template of the same name.
    started = {name.replace(".socket", "@.service") for name in wanted if name.endswith(".socket")}
    assert started == {name for name in units if "@" in name}
    archive = (ROOTFS / "etc/vmbus-units/vmbus-archive.socket").read_text()
    assert f"ListenStream=127.0.0.1:{ARCHIVE_PORT}\n" in archive
    assert f"vmbus_guest.relay {ARCHIVE_PORT}\n" in (ROOTFS / "etc/vmbus-units/vmbus-archive@.service").read_text()
