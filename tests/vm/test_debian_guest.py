"""A Debian whose root file system is on our SCSI disk: boots, is saved with people logged in, and ends cleanly."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support import pace, wheelhouse
from support.in_guest import require_no_complaints, shell
from support.namespace import Namespace, NotPermitted, namespace
from vmbus.cli.keys import with_keys
from vmbus.cli.ssh import PORT
from vmbus.errors import WaitTimeout
from vmbus.operations.machine import VirtualMachine
from vmbus.providers.network.interface import NAMESPACES
from vmbus.provision import provision_debian
from vmbus.provision.cache import Cache, remove
from vmbus.provision.debian_system import LABEL, TOOLS_RECIPE, DebianSystem
from vmbus.provision.guest_files import PYTHON
from vmbus.provision.report import SilentReporter
from vmbus.provision.roots import RootRecipe, find_root, make_root
from vmbus.provision.sources import SUITE
from vmbus.qemu.archive import archive_for
from vmbus.testkit.moving import move
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription, load_description
from vmbus.vm.guest_socket import proxy_command

pytestmark = [pytest.mark.vm, pytest.mark.long, pytest.mark.timeout(1500)]  # with making the image, where it is not

Run = Callable[..., Any]
Note = Callable[[str], None]
CHECKOUT = Path(__file__).resolve().parents[2]
WHEELS = "wheels.img"
SOURCES = "/etc/apt/sources.list.d/debian.sources"
GUEST = "192.0.2.2"
"""Its address in qemu_configs/debian-network.toml."""


@pytest.fixture(scope="module")
def debian(note: Note) -> DebianSystem:
    start = time.monotonic()
    system = provision_debian()
    seconds = time.monotonic() - start
    if seconds > 5:
        size = system.image.stat().st_blocks * 512 / 1e6
        note(f"Debian was made in {seconds:.0f} s: {len(system.packages)} packages, {size:.0f} MB")
    return system


_DIAL = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.setns(os.open(sys.argv[1], os.O_RDONLY), 0x40000000):
    sys.exit(os.strerror(ctypes.get_errno()))
with socket.create_connection((sys.argv[2], 22), 60) as end, socket.socket(fileno=1) as asker:
    end.settimeout(None)
    socket.send_fds(asker, [b"\\0"], [end.fileno()])
"""
"""Connects to the guest's ssh from the namespace argv[1], and gives the connection to ssh."""


@pytest.fixture
def outside() -> Iterator[Namespace | None]:
    """Where the other end of the guest's card is; None: it has none, since that may not be made here."""
    try:
        with namespace() as found:
            yield found
            assert found.interfaces() == [], "an interface outlives the VM"
    except NotPermitted:
        yield None


class Console:
    """The shell on a VM's console, for one person after the other."""

    def __init__(self, vm: VirtualMachine) -> None:
        self._path = str(vm.paths.console)
        self._seen = ""

    async def __aenter__(self) -> Console:
        self._reader, self._writer = await asyncio.open_unix_connection(self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def type(self, line: str, answer: str, seconds: float = 60.0) -> None:
        """Type a line; `answer` has to come."""
        self._writer.write(line.encode() + b"\r")
        try:
            async with asyncio.timeout(pace.seconds(seconds)):
                while answer not in self._seen:
                    self._seen += (await self._reader.read(65536)).decode(errors="replace")
        except TimeoutError:
            raise WaitTimeout(f"{answer!r} on the console, which said {self._seen[-500:]!r}", seconds) from None
        self._seen = self._seen.partition(answer)[2]


async def require_health(vm: VirtualMachine) -> None:
    assert await shell(vm, "systemctl is-system-running --wait", 120) == "running", await shell(
        vm, "systemctl --failed"
    )
    await require_no_complaints(vm)


async def disk(vm: VirtualMachine, lun: int) -> str:
    """Its device file. Which of several is `sda` is settled by who answers Linux first."""
    found = await shell(vm, f"basename /sys/bus/vmbus/drivers/hv_storvsc/*/host*/target*/*:{lun}/block/*")
    assert found.startswith("sd")
    return f"/dev/{found}"


async def until_ended(vm: VirtualMachine, seconds: float = 90.0) -> None:
    assert vm.qemu is not None
    async with asyncio.timeout(pace.seconds(seconds)):
        await vm.qemu.process.wait()


@contextmanager
def machine(folder: Path, outside: Namespace | None, patch: pytest.MonkeyPatch) -> Iterator[VmDescription]:
    """The machine of qemu_configs, with a card if there may be one; its disk is in a folder of the test's, and sound in
    the end."""
    patch.setenv("VMBUS_DISKS", str(folder))
    name = "debian.toml" if outside is None else "debian-network.toml"
    plain = msgspec.to_builtins(load_description(CHECKOUT / "qemu_configs" / name))
    for one in plain["device"]["providers"]:
        if one["name"] == "card":
            assert outside is not None
            one["options"]["namespace"] = outside.name
        if one["kind"] == "scsi":
            one["options"]["luns"].append({"lun": 1, "image": WHEELS, "read_only": True})
    tools = find_root(Cache(), TOOLS_RECIPE)
    assert tools is not None
    wheelhouse.fill(folder / "wheels", PYTHON.removeprefix("python"))
    argv = [*tools.program("usr/sbin/mke2fs"), "-q", "-t", "ext4", "-d", folder / "wheels", folder / WHEELS, "32M"]
    subprocess.run(argv, check=True)
    yield msgspec.convert(plain, VmDescription)
    for program, option, expected in (("e2fsck", "-fn", LABEL), ("dumpe2fs", "-h", "Filesystem state:         clean")):
        argv = [*tools.program(f"usr/sbin/{program}"), option, folder / "debian.img"]
        result = subprocess.run(argv, capture_output=True, text=True)
        assert result.returncode == 0 and expected in result.stdout, result


class Client:
    """Debian's ssh with a key of its own, whatever the host has."""

    def __init__(self, folder: Path) -> None:
        cache = Cache()
        with cache.lock():
            self._root = make_root(cache, RootRecipe("ssh", (SUITE,), ("openssh-client",)), SilentReporter())
            remove(cache.path("apt"))
        folder.mkdir()
        self._key = folder / "key"
        make = [*self._root.program("usr/bin/ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", self._key]
        subprocess.run(make, check=True)
        self.public = folder / "key.pub"
        self._dial = folder / "dial.py"
        self._dial.write_text(_DIAL)

    async def _start(self, options: list[str], command: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self._root.program("usr/bin/ssh"),
            *("-F", "none", "-i", str(self._key), "-o", "BatchMode=yes", "-o", "ConnectTimeout=60"),
            *options,
            "root@guest",
            command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )

    async def run(self, vm: VirtualMachine, command: str, *, code: int = 0) -> str:
        """What a command in the guest prints, by way of the socket that scripts/ssh uses; `code`: as ssh shall end."""
        (path,) = [one["socket"] for one in (await vm.call_server("status"))["providers"].values() if "socket" in one]
        process = await self._start(proxy_command(sys.executable, path, PORT), command)
        async with asyncio.timeout(pace.seconds(90)):
            output, _ = await process.communicate()
        assert process.returncode == code, output
        return output.decode().strip()

    @asynccontextmanager
    async def session(self, outside: Namespace | None) -> AsyncIterator[Session | None]:
        """A session over the card, if there is one, for as long as the block runs."""
        if outside is None:
            yield None
            return
        dial = f"{sys.executable} {self._dial} {NAMESPACES / outside.name} {GUEST}"
        options = proxy_command(sys.executable, "", PORT)
        options[options.index(next(word for word in options if word.startswith("ProxyCommand=")))] = (
            f"ProxyCommand={dial}"
        )
        process = await self._start(options, "cat")
        try:
            yield Session(process)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


class Session:
    """Somebody who has logged in, and says something now and then."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def say(self, word: str) -> None:
        """What is said comes back."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{word}\n".encode())
        async with asyncio.timeout(pace.seconds(120)):
            line = await self._process.stdout.readline()
        assert line.decode().strip() == word, (word, line)


def test_linux_guest_debian_over_saves_and_moves_with_own_guest_package(
    run: Run,
    programs: Programs,
    debian: DebianSystem,
    outside: Namespace | None,
    tmp_path: Path,
    note: Note,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One boot, in which the package is installed from its wheel, and its agent takes the place of the host's: a shell
    on the console, one over ssh and the card, a service and the file system go on over a live save
    and a migration; the disk is in the snapshot, and is handed over in the migration."""
    programs = dataclasses.replace(programs, debian=debian.image)
    client, stranger = Client(tmp_path / "client"), Client(tmp_path / "stranger")
    seconds: dict[str, float] = {}
    lives: list[str] = []

    async def still_there(vm: VirtualMachine, session: Session | None, after: str) -> None:
        """The shells that somebody logged in to, the service, and the machine are the ones from before, and one can
        log in by the socket again."""
        if session is not None:
            await session.say(after)
        assert await client.run(vm, "cat /etc/hostname") == "debian"
        async with Console(vm) as console:
            await console.type('echo "$word-$((1 + 1))"', "kept-2")
        lives.append(await shell(vm, "cat /proc/sys/kernel/random/boot_id"))
        count = "$(wc -l < /var/tmp/count)"
        await shell(vm, f"before={count}; until [ {count} -gt $((before + 3)) ]; do sleep 0.1; done")
        await require_health(vm)

    async def story(description: VmDescription) -> None:
        description, _ = with_keys(description, [client.public])
        start = time.monotonic()
        vm = await VirtualMachine.launch(description, programs)  # as booted: it is saved below
        async with vm:
            await vm.wait_ready(pace.seconds(120))
            seconds["agent"] = time.monotonic() - start
            await require_health(vm)
            seconds["running"] = time.monotonic() - start
            assert await shell(vm, "findmnt -no SOURCE /") == await disk(vm, 0)
            assert await shell(vm, ". /etc/os-release; echo $VERSION_CODENAME; dpkg --audit") == "trixie"
            modes = await shell(vm, "stat -c %U:%G:%a /usr/bin/su /etc/shadow /root | xargs")
            assert modes == "root:root:4755 root:shadow:640 root:root:700"
            assert await client.run(vm, "id -un; systemctl is-active hv-kvp-daemon ssh") == "root\nactive\nactive"
            assert "Permission denied" in await stranger.run(vm, "true", code=255)
            await own_package(vm)
            await shell(vm, "systemd-run --unit counter sh -c 'while sleep 0.2; do echo x >> /var/tmp/count; done'")
            await shell(vm, "until [ -s /var/tmp/count ]; do sleep 0.1; done")
            async with Console(vm) as console:
                await console.type("word=kept; echo begin-$((20 + 22))", "begin-42")
            async with client.session(outside) as session:
                await still_there(vm, session, "booted")
                saved = await vm.save(tmp_path / "saved", live=True)
                await vm.kill()
                vm = await VirtualMachine.restore(tmp_path / "saved", programs)
                async with vm:
                    await vm.wait_ready()
                    assert vm.restored is not None
                    seconds["away"] = vm.restored.running_at - saved.stopped_at
                    await still_there(vm, session, "saved and restored")
                    moved, report = await move(vm, programs=programs)
                    seconds["moving"] = report.downtime
                async with moved as vm:
                    await still_there(vm, session, "migrated")
                    assert len(set(lives)) == 1, lives
                    if outside is not None:
                        await many_addresses(vm)
                    await finish(vm)
        note(
            f"Debian: agent after {seconds['agent']:.1f} s, all services {seconds['running']:.1f} s, off in "
            f"{seconds['off']:.1f} s; stood still for {seconds['away']:.1f} s over a live save and a restore, and for "
            f"{seconds['moving']:.2f} s in a migration; our package was installed in {seconds['package']:.0f} s"
        )

    async def own_package(vm: VirtualMachine) -> None:
        """As docs/guest-package.md has it, but for the network: pip and all wheels are on a disk."""
        start = time.monotonic()
        bin_ = "/opt/vmbus/bin"
        await shell(vm, f"mount -o ro {await disk(vm, 1)} /mnt && {PYTHON} -m venv --without-pip /opt/vmbus")
        pip = f"PYTHONPATH=$(echo /mnt/pip-*.whl) {PYTHON} -m pip --python {bin_}/python install -q --no-compile"
        await shell(vm, f"{pip} --no-index --find-links /mnt 'vmbus-device[guest]'", 240)
        assert "nothing is missing" in await shell(vm, f"env -u PYTHONPATH {bin_}/vmbus-guest check")
        # The agent that is asked would end with its own unit: so somebody at the console does it.
        async with Console(vm) as console:
            await console.type(f"{bin_}/vmbus-guest install --huge-pages 0; echo ended-$?", "ended-0")
        await vm.wait_ready(pace.seconds(60))
        main = "$(systemctl show --property MainPID --value vmbus-agent)"
        assert bin_ in (await shell(vm, f"tr '\\0' ' ' < /proc/{main}/cmdline"))
        assert "echo" in (await vm.call_agent("list"))["drivers"]
        seconds["package"] = time.monotonic() - start

    async def many_addresses(vm: VirtualMachine) -> None:
        """More than a value of the key-value exchange has room for: the daemon cuts them, and all else is listed."""
        await shell(
            vm, "for i in $(seq 80); do ip addr add fd00:1234:5678:9abc:def0:1234:5678:$i/64 dev eth0 nodad; done"
        )
        for _ in range(2):
            facts = (await vm.command_provider("services", "kvp-list", {"pool": "auto"}))["values"]
            assert len(facts) == 10 and len(facts["NetworkAddressIPv6"]) > 500, facts

    async def finish(vm: VirtualMachine) -> None:
        """Its apt reaches the archive, and it ends as machines do."""
        async with archive_for(vm, note) as archive:
            assert archive is not None
            # One small suite: the whole index takes an emulated CPU half a minute.
            await shell(vm, f"sed 's/^Suites:.*/Suites: {SUITE}-updates/' {SOURCES} > /run/small.sources")
            options = "-o Dir::Etc::sourceparts=/dev/null -o Dir::Etc::sourcelist=/run/small.sources"
            await shell(vm, f"apt-get -q {options} -o APT::Update::Error-Mode=any update", 120)
            assert archive.served >= 2 and not archive.refused
        await shell(vm, "systemctl stop counter")
        start = time.monotonic()
        await vm.call_agent("poweroff")
        await until_ended(vm)
        seconds["off"] = time.monotonic() - start

    with machine(tmp_path / "disks", outside, monkeypatch) as description:
        run(story(description), 900)
