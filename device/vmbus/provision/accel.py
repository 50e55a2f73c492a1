"""Which accelerator a virtual machine gets: KVM only if it demonstrably runs a guest, else TCG.

`/dev/kvm` may exist, open, and even create a virtual machine, and still be of no use: a nested or emulated KVM may
die on the first instruction that it cannot handle, or never get anywhere. So a kernel is booted under it, with the
machine type and virtual IOMMU that are used later, and has to start a program within a bounded time. The outcome is
remembered until the next boot of the host.

`VMBUS_ACCELERATOR=tcg` settles the matter without a trial; `kvm` makes a failing trial an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from vmbus.errors import EnvironmentProblem, WaitTimeout
from vmbus.provision.cache import Cache, digest, publish_bytes
from vmbus.provision.guest_files import Kernel
from vmbus.provision.programs import ProgramFailed, run_lines
from vmbus.provision.qemu import QemuProgram
from vmbus.provision.report import Reporter, SilentReporter
from vmbus.provision.roots import Root
from vmbus.util.boot import boot_id

KVM_DEVICE = Path("/dev/kvm")
TRIAL_SECONDS = 20.0
"""A working KVM needs 1 to 2 s for the trial; a nested one on a loaded machine a few more."""

MARKER = "vmbus-guest-runs"

_INIT = f"""#!/bin/busybox sh
i=0
while [ $i -lt 2000 ]; do i=$((i + 1)); done
echo {MARKER}
exec /bin/busybox poweroff -f
"""


@dataclass(frozen=True)
class Accelerator:
    """The choice, and why."""

    name: str
    """`kvm` or `tcg`."""
    reason: str

    @property
    def arguments(self) -> tuple[str, ...]:
        """QEMU arguments that select it."""
        return ("-accel", self.name)

    @property
    def machine_options(self) -> str:
        """What the `-machine` argument needs in addition: interrupt remapping wants a split irqchip under KVM."""
        return ",kernel-irqchip=split" if self.name == "kvm" else ""


def choose_accelerator(
    qemu: QemuProgram,
    kernel: Kernel,
    userland: Root | None,
    cache: Cache | None = None,
    reporter: Reporter | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Accelerator:
    """Return the accelerator for this host, tried now unless the outcome of this boot is in the cache. Without our
    `userland` there is nothing to try it with, and the setting is taken as it is.

    Raises EnvironmentProblem if `VMBUS_ACCELERATOR` is neither `kvm` nor `tcg`, or `kvm` where that runs no guest.
    """
    explicit = environment.get("VMBUS_ACCELERATOR", "").strip()
    if explicit:
        if explicit not in ("kvm", "tcg"):
            raise EnvironmentProblem(f"VMBUS_ACCELERATOR is {explicit!r}; it can be kvm or tcg")
        if explicit == "tcg":
            return Accelerator("tcg", "VMBUS_ACCELERATOR")
    if userland is None:
        if explicit:
            return Accelerator(explicit, "VMBUS_ACCELERATOR, untried")
        return Accelerator("tcg", "with VMBUS_INITRAMFS, KVM is used if VMBUS_ACCELERATOR is kvm")
    choice = _tried(qemu, kernel, userland, cache or Cache(), reporter or SilentReporter())
    if explicit == "kvm" and choice.name != "kvm":
        raise EnvironmentProblem(
            f"VMBUS_ACCELERATOR is kvm, but KVM runs no guest here: {choice.reason}; unset it to use TCG"
        )
    return choice


def _tried(qemu: QemuProgram, kernel: Kernel, userland: Root, cache: Cache, reporter: Reporter) -> Accelerator:
    """What a trial showed, now or earlier in this boot of the host."""
    if not KVM_DEVICE.exists():
        return Accelerator("tcg", f"there is no {KVM_DEVICE}")
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return Accelerator("tcg", f"{KVM_DEVICE} may not be opened by this user (the group kvm usually may)")
    record = cache.path("accelerator", digest(1, boot_id(), qemu.argv, qemu.version, kernel.version) + ".json")
    try:
        known = json.loads(record.read_bytes())
        return Accelerator(str(known["name"]), str(known["reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    reporter.begin("Trying KVM")
    failure = try_accelerator("kvm", qemu, kernel, userland, cache)
    choice = Accelerator("kvm", "it ran a guest") if failure is None else Accelerator("tcg", f"KVM: {failure}")
    publish_bytes(record, (json.dumps(asdict(choice)) + "\n").encode())
    reporter.end("works" if failure is None else failure)
    return choice


def try_accelerator(
    name: str, qemu: QemuProgram, kernel: Kernel, userland: Root, cache: Cache, seconds: float = TRIAL_SECONDS
) -> str | None:
    """Boot a kernel under an accelerator; return None if it ran a program, else in a few words what went wrong."""
    from vmbus_guest import newc  # its package imports this one

    initramfs = newc.write(
        [
            newc.file("bin/busybox", (userland.path / "usr/bin/busybox").read_bytes(), 0o755),
            newc.file("init", _INIT.encode(), 0o755),
            newc.character_device("dev/console", 5, 1),
        ]
    )
    machine = "q35" + Accelerator(name, "on trial").machine_options
    with cache.scratch() as scratch:
        image = Path(scratch) / "trial.cpio"
        image.write_bytes(initramfs)
        return boot_trial(
            [
                *qemu.argv,
                *("-accel", name, "-machine", machine, "-m", "256"),
                *("-device", "intel-iommu,caching-mode=on,intremap=on"),
                *("-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"),
                *("-kernel", str(kernel.image), "-initrd", str(image)),
                *("-append", "console=ttyS0 rdinit=/init panic=-1 quiet intel_iommu=on iommu=pt"),
            ],
            seconds,
        )


class _Settled(Exception):
    """The trial has an outcome, and QEMU is not needed any more."""

    def __init__(self, problem: str | None) -> None:
        self.problem = problem


def boot_trial(argv: list[str], seconds: float) -> str | None:
    """Run QEMU until its guest prints the marker; return None then, else in a few words what went wrong."""
    said: list[str] = []

    def on_line(line: str) -> None:
        if MARKER in line:
            raise _Settled(None)
        # QEMU then stands still with a paused guest, for somebody to look at.
        if "KVM internal error" in line:
            raise _Settled("the guest died of a KVM internal error")
        said.extend([line] if line.strip() else [])

    try:
        run_lines(argv, "a trial of the accelerator", seconds, on_line)
    except _Settled as settled:
        return settled.problem
    except WaitTimeout:
        return f"the guest did not run a program within {seconds:g} s"
    except ProgramFailed:
        pass
    return f"QEMU ended: {said[-1][:200]}" if said else "QEMU ended without a word"
