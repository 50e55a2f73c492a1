"""`vmbus-guest`: the agent and the test drivers in a guest that has a system of its own, where pip has installed us.

`install` gives the agent to systemd: udev starts it when the host's port is there, so a machine without one is none the
worse. `check` says what the test drivers would miss. `dkms` puts the sources of the kernel module where DKMS wants
them, for Linux's own VMBus drivers. `test` runs a test driver by hand.

Every file that is written is ours alone, so that `uninstall` can take it away.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import vmbus_guest
from vmbus.errors import EnvironmentProblem, VmbusError
from vmbus.provision.kernel_module import NAME as MODULE
from vmbus.provision.kernel_module import SERIES, source_folder
from vmbus.provision.programs import ask, said
from vmbus_guest import testdrivers
from vmbus_guest.huge_pages import MAXIMUM_PHYSICAL_PAGES
from vmbus_guest.kernel_files import link_name, read_text
from vmbus_guest.port import PORT_NAME, find_port
from vmbus_guest.testdrivers.__main__ import main as run_test_driver
from vmbus_guest.vfio import DEVICE_ID, KERNEL_DRIVER, VENDOR_ID, find_functions

UNIT = "etc/systemd/system/vmbus-agent.service"
RULE = "etc/udev/rules.d/60-vmbus-agent.rules"
MODULES = "etc/modules-load.d/vmbus-guest.conf"
SETTINGS = "etc/sysctl.d/60-vmbus-guest.conf"

COMMAND_TIMEOUT = 600.0
"""Seconds that systemd, udev or DKMS may take."""

_IOMMU = "intel-iommu,caching-mode=on,intremap=on"
_KERNEL_WORDS = "intel_iommu=on iommu=pt"


def files(python: str, packages: Path, huge_pages: int) -> dict[str, str]:
    """What `install` writes, by path below the root: the agent is run by `python`, which finds us in `packages`.
    `huge_pages`: of 2 MiB each, kept for the test drivers; 0 for none, and no module of VFIO's."""
    host_port = f"dev-virtio\\x2dports-{PORT_NAME}.device"
    found = {
        UNIT: f"""\
[Unit]
Description=Agent of this machine's host
BindsTo={host_port}
After={host_port}

[Service]
Environment=PYTHONPATH={packages} PYTHONDONTWRITEBYTECODE=1 HOME=/root
ExecStart={python} -S -m vmbus_guest.agent
Restart=on-failure
RestartSec=2
""",
        RULE: f"""\
SUBSYSTEM=="virtio-ports", ATTR{{name}}=="{PORT_NAME}", TAG+="systemd", ENV{{SYSTEMD_WANTS}}+="vmbus-agent.service"
""",
    }
    if huge_pages:
        found |= {MODULES: "vfio-pci\n", SETTINGS: f"vm.nr_hugepages = {huge_pages}\n"}
    return found


def install(root: Path, huge_pages: int, say: Callable[[str], None]) -> None:
    """Write the files below `root`; on the machine itself, use them at once. Raises EnvironmentProblem."""
    packages = Path(vmbus_guest.__file__).parents[1]
    if any(letter.isspace() or letter in '"%\\' for letter in f"{packages}{sys.executable}"):
        raise EnvironmentProblem(f"a systemd unit cannot name {packages}; install the package in a plainer place")
    for name, text in files(sys.executable, packages, huge_pages).items():
        path = root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            raise EnvironmentProblem(f"cannot write {path}: {error.strerror}; this is for root") from error
        say(f"wrote {path}")
    if root != Path("/"):
        return
    _run("systemctl", "daemon-reload")
    _run("udevadm", "control", "--reload")
    if huge_pages:
        _run("modprobe", "vfio-pci")
        _run("sysctl", "--quiet", "--load", f"/{SETTINGS}")
    if Path("/dev/virtio-ports", PORT_NAME).exists():
        _run("systemctl", "restart", "vmbus-agent.service")
        say("the agent runs")
    else:
        say("the agent will run when this machine has the host's port")


def uninstall(root: Path, say: Callable[[str], None]) -> None:
    """Take away what `install` wrote, and end the agent. Raises EnvironmentProblem."""
    if root == Path("/"):
        _run("systemctl", "stop", "vmbus-agent.service")
    for name in (UNIT, RULE, MODULES, SETTINGS):
        path = root / name
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise EnvironmentProblem(f"cannot remove {path}: {error.strerror}; this is for root") from error
        say(f"removed {path}")
    if root == Path("/"):
        _run("systemctl", "daemon-reload")


def missing(sysfs: str = "/sys", memory: str = "/proc/sys/vm/nr_hugepages") -> list[str]:
    """What the agent and the test drivers would miss on this machine, a sentence each, with what to do."""
    found = []
    try:
        find_port(timeout=0.0, sysfs=sysfs)
    except TimeoutError:
        found.append(
            f"the host has no port {PORT_NAME} in this machine, so nobody can reach the agent; QEMU makes one with "
            f"'-device virtserialport,chardev=...,name={PORT_NAME}'"
        )
    functions = find_functions(VENDOR_ID, DEVICE_ID, sysfs=sysfs)
    if not functions:
        found.append(f"there is no PCI function {VENDOR_ID:04x}:{DEVICE_ID:04x}: the machine has no device of ours")
    for address in functions:
        device = f"{sysfs}/bus/pci/devices/{address}"
        if link_name(f"{device}/driver") == KERNEL_DRIVER:
            continue  # Linux's own drivers have it, and need nothing more
        if link_name(f"{device}/iommu_group") is None:
            found.append(
                f"{address} is behind no IOMMU: give QEMU '-device {_IOMMU}' ahead of it, and the kernel "
                f"'{_KERNEL_WORDS}'"
            )
        if not Path(sysfs, "bus/pci/drivers/vfio-pci").is_dir():
            found.append(f"{address} cannot be driven from here: the module vfio-pci is not loaded (modprobe vfio-pci)")
        if int(read_text(memory) or 0) == 0:
            found.append(f"{address} needs huge pages: 'sysctl vm.nr_hugepages=8', or 'hugepages=8' for the kernel")
    return found


def dkms(folder: Path, *, build: bool, say: Callable[[str], None]) -> None:
    """Put the kernel module's sources into `folder` (as a rule `/usr/src`) as DKMS wants them, and have it `build` and
    install the module for the running kernel. Raises EnvironmentProblem."""
    release = version("vmbus-device")
    target = folder / f"{MODULE}-{release}"
    try:
        shutil.copytree(source_folder(), target, dirs_exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {target}: {error}; this is for root") from error
    say(f"wrote {target}")
    if build:
        _run("dkms", "install", f"{MODULE}/{release}", "--force")
        say(f"{MODULE} is installed; it is there after the next start, and Linux's own drivers with it")
    else:
        say(f"next: dkms install {MODULE}/{release}   (Linux {SERIES})")


def _run(*argv: str) -> None:
    name = f"'{' '.join(argv)}'"
    done = ask(argv, name, COMMAND_TIMEOUT)
    if done.returncode:
        raise EnvironmentProblem(f"{name} failed with status {done.returncode}: {said(done)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vmbus-guest", description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("install", "have systemd run the agent"), ("uninstall", "undo that")):
        one = commands.add_parser(name, help=text)
        one.add_argument("--root", type=Path, default=Path("/"), help="the system's root, to prepare an image")
        if name == "install":
            one.add_argument(
                "--huge-pages",
                type=int,
                default=8,
                choices=range(MAXIMUM_PHYSICAL_PAGES + 1),
                metavar="N",
                help="of 2 MiB, for the test drivers (default 8); 0: none, for Linux's own drivers",
            )
    commands.add_parser("check", help="say what the agent and the test drivers would miss here")
    one = commands.add_parser("dkms", help=f"the kernel module's sources, for DKMS (Linux {SERIES})")
    one.add_argument("--into", type=Path, default=Path("/usr/src"), help="where DKMS looks for sources")
    one.add_argument("--build", action="store_true", help="have DKMS build and install it, too")
    one = commands.add_parser("test", help="run a test driver by hand; without a name: the list of them")
    one.add_argument("arguments", nargs=argparse.REMAINDER, help="NAME [--parameters JSON]")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 if `check` misses something, else as everywhere (`vmbus.errors`)."""
    wish = _parser().parse_args(argv)
    try:
        if wish.command == "install":
            install(wish.root, wish.huge_pages, print)
        elif wish.command == "uninstall":
            uninstall(wish.root, print)
        elif wish.command == "dkms":
            dkms(wish.into, build=wish.build, say=print)
        elif wish.command == "test":
            return run_test_driver(wish.arguments)
        else:
            lacks = missing()
            print("\n".join(lacks) or f"nothing is missing; test drivers: {', '.join(sorted(testdrivers.drivers()))}")
            return 1 if lacks else 0
    except VmbusError as error:
        print(f"vmbus-guest: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
