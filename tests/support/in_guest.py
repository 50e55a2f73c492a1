"""What tests do in a running guest: shell commands, waits for what they print, a look at the kernel's complaints."""

from __future__ import annotations

import re
from typing import Any

from support import pace
from vmbus.operations.machine import VirtualMachine

COMPLAINTS = (
    r"WARNING:|BUG:|Call Trace|rcu_sched|soft lockup|general protection|blocked for more than|I/O error|"
    r"EXT4-fs error|EXT4-fs warning"
)
"""Words of a kernel that is not well."""


async def shell(vm: VirtualMachine, command: str, timeout: float = 60.0, *, check: bool = True) -> str:
    """What a shell command in the guest prints. It has to succeed, unless nobody checks that."""
    done = await vm.run_in_guest(["/bin/sh", "-c", command], timeout=timeout)  # which follows the machine itself
    assert done.code == 0 or not check, (command, done)
    return done.output.strip()


async def until_prints(vm: VirtualMachine, command: str, expected: str | None = None, seconds: float = 60.0) -> str:
    """Wait until a shell command in the guest prints this, or anything."""
    found = ""

    async def printed() -> bool:
        nonlocal found
        found = await shell(vm, command, check=False)
        return bool(found) if expected is None else found == expected

    await pace.eventually(printed, f"{command!r} in the guest to print {expected or 'something'}", seconds, every=0.05)
    return found


async def require_no_complaints(vm: VirtualMachine, more: str = "", *, but: str = r"^\b$") -> None:
    """The guest's kernel has nothing to complain of, and no task in it hangs. `more`: further patterns; `but`: lines
    that are fine."""
    words = f"{COMPLAINTS}|{more}" if more else COMPLAINTS
    lines = (await shell(vm, "dmesg")).splitlines()
    assert not [line for line in lines if re.search(words, line) and not re.search(but, line)], lines[-60:]


async def until_all_have_moved(vm: VirtualMachine, job: int, since: dict[str, int]) -> dict[str, int]:
    """Wait until each workload of a `mixed` job has completed more than it had; how much that is now."""
    now: dict[str, int] = {}

    async def moved() -> bool:
        nonlocal now
        report: dict[str, Any] = await vm.call_agent("poll", job=job)
        assert report["state"] == "running", report
        parts = (report["progress"] or {}).get("workloads", [])
        now = {part["name"]: int(part["completed"]) for part in parts}
        return bool(now) and all(now[name] > since.get(name, 0) for name in now)

    await pace.eventually(moved, f"progress from {since}", 90, every=0.1)
    return now
