"""Test driver `disk-writer`: makes an ext4 file system on a block device, writes to it, and proves what it holds.

Write number i goes to slot i * STRIDE mod `slots` of the data files and consists of its own number and bytes that
follow from it: so whatever is found in a slot tells which write it is of, and whether it is whole. After every `batch`
writes the files are synced; from then on these writes are *acknowledged*. How many are is reported, and also kept in a
file `journal`, which is replaced by a rename each time, so that metadata is busy too.

Parameters:

    device        the block device
    mode          "write": as above, then verify everything, unmount, check the file system.
                  "check": mount what is there, and verify that nothing was lost of `acknowledged` writes
    make          whether to make a file system first (mode "write")
    count         writes in all; 0: until stopped
    slots, batch  see above
    pace          seconds to wait between two batches
    verify_every  batches after which the caches are dropped and all slots are read again; 0: only at the end
    seed          of the data
    acknowledged  mode "check": how many writes must be there
    appear_seconds   how long to wait for the device to be there
"""

# os instead of pathlib: this is a guest with little time.
# ruff: noqa: PTH103, PTH104, PTH110, PTH112, PTH119, PTH123

from __future__ import annotations

import os
import signal
import struct
import time
from typing import Any

from vmbus.errors import EnvironmentProblem, UsageError, WaitTimeout
from vmbus.wire.workload import Pattern
from vmbus_guest.testdrivers.context import Context

MOUNT_POINT = "/run/disk-writer"
RECORD = 4096
STRIDE = 7919  # a prime, so that with any number of slots below it all get their turn
PER_FILE = 256
_HEAD = struct.Struct("<8sQQ")
_MAGIC = b"written!"
_TOOL_SECONDS = 120.0


class ToolFailed(EnvironmentProblem):
    """A program of the guest ended with a status that means trouble."""


def insert_module(name: str) -> None:
    """Have a module of the kernel's, which is beside the others in our own guest, and where Linux has them elsewhere.
    Raises as `run_tool`."""
    if not os.path.isdir(f"/sys/module/{name}"):
        path = f"/lib/modules/{name}.ko"
        run_tool(*(("insmod", path) if os.path.exists(path) else ("modprobe", name)))


def run_tool(*arguments: str, good: tuple[int, ...] = (0,)) -> str:
    """Run a program; returns what it printed. Raises ToolFailed, WaitTimeout."""
    reader, writer = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, writer, 1), (os.POSIX_SPAWN_DUP2, writer, 2)]
    try:
        pid = os.posix_spawnp(arguments[0], list(arguments), dict(os.environ), file_actions=actions)
    except OSError as error:
        raise EnvironmentProblem(f"cannot run {arguments[0]}: {error.strerror}") from error
    finally:
        os.close(writer)
    deadline = time.monotonic() + _TOOL_SECONDS
    output = b""
    with os.fdopen(reader, "rb", buffering=0) as file:
        os.set_blocking(reader, False)
        while True:
            data = file.read(65536)
            if data == b"":
                break
            if data is None:
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    raise WaitTimeout(f"{' '.join(arguments)} to end; it said {output[-500:]!r}", _TOOL_SECONDS)
                time.sleep(0.01)
                continue
            output = (output + data)[-8192:]
    _, status = os.waitpid(pid, 0)
    text = output.decode(errors="replace").strip()
    if os.waitstatus_to_exitcode(status) not in good:
        raise ToolFailed(f"{' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}: {text[-1000:]}")
    return text


class Books:
    """What was written where. `written` and `acknowledged` count writes; nothing else needs to be remembered."""

    def __init__(self, slots: int, seed: int) -> None:
        self.slots = slots
        self.seed = seed
        self.written = 0
        self.acknowledged = 0
        self._pattern = Pattern(seed)
        self._inverse = pow(STRIDE, -1, slots) if slots > 1 else 0

    def slot(self, number: int) -> int:
        """Where a write goes."""
        return number * STRIDE % self.slots

    def record(self, number: int) -> bytes:
        """What it consists of."""
        return _HEAD.pack(_MAGIC, number, self.seed) + self._pattern.data(number, RECORD - _HEAD.size)

    def newest(self, slot: int, count: int) -> int | None:
        """The last of the first `count` writes that went to a slot."""
        first = slot * self._inverse % self.slots
        return None if first >= count else first + (count - 1 - first) // self.slots * self.slots

    def judge(self, slot: int, data: bytes, acknowledged: int, written: int | None) -> str | None:
        """What is wrong with a slot's content, if anything: it must be that of its newest acknowledged write, or of a
        later one (below `written`, if that is known)."""
        least = self.newest(slot, acknowledged)
        if len(data) < RECORD or data == bytes(RECORD):
            return None if least is None else f"slot {slot} is empty; write {least} was acknowledged"
        magic, number, _ = _HEAD.unpack_from(data)
        if magic != _MAGIC or number % self.slots != slot * self._inverse % self.slots or data != self.record(number):
            return f"slot {slot} holds bytes that were never written to it: {data[:32].hex()}"
        if least is not None and number < least:
            return f"slot {slot} holds write {number}; write {least} was acknowledged"
        if written is not None and number >= written:
            return f"slot {slot} holds write {number}, which has not been made yet"
        return None


class _Files:
    def __init__(self, books: Books) -> None:
        self._books = books
        count = -(-books.slots // PER_FILE)
        self._fds = [
            os.open(f"{MOUNT_POINT}/data-{index:04}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            for index in range(count)
        ]
        self._directory = os.open(MOUNT_POINT, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def write(self) -> None:
        """The next write."""
        books = self._books
        slot = books.slot(books.written)
        data = books.record(books.written)
        if os.pwrite(self._fds[slot // PER_FILE], data, slot % PER_FILE * RECORD) != RECORD:
            raise EnvironmentProblem(f"write {books.written} to slot {slot} was cut short")
        books.written += 1

    def sync(self, since: int) -> None:
        """Everything written up to here is on stable storage; `since`: the first write that may not have been."""
        books = self._books
        for fd in {self._fds[books.slot(number) // PER_FILE] for number in range(since, books.written)}:
            os.fdatasync(fd)
        name = f"{MOUNT_POINT}/journal"
        fd = os.open(f"{name}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, f"{books.written}\n".encode())
            os.fsync(fd)
        finally:  # if the disk is gone, too: what is open keeps the file system mounted, and the disk's channel
            os.close(fd)
        os.rename(f"{name}.new", name)
        os.fsync(self._directory)
        books.acknowledged = books.written

    def verify(self, acknowledged: int, written: int | None) -> list[str]:
        """Read everything from the disk; returns what is wrong."""
        with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
            file.write("3")
        faults = []
        for slot in range(self._books.slots):
            data = os.pread(self._fds[slot // PER_FILE], RECORD, slot % PER_FILE * RECORD)
            reason = self._books.judge(slot, data, acknowledged, written)
            if reason is not None:
                faults.append(reason)
        return faults

    def close(self) -> None:
        for fd in (*self._fds, self._directory):
            os.close(fd)


def wait_for_device(device: str, seconds: float) -> None:
    """Return when the device is there, with a size. Raises WaitTimeout."""
    name = os.path.basename(device)
    deadline = time.monotonic() + seconds
    while True:
        try:
            with open(f"/sys/block/{name}/size", encoding="ascii") as file:
                if int(file.read()):
                    return
        except (OSError, ValueError):
            pass  # not yet
        if time.monotonic() > deadline:
            raise WaitTimeout(f"block device {device} to appear", seconds)
        time.sleep(0.05)


def _queue(device: str, name: str) -> int:
    """What the kernel says about the device's queue."""
    try:
        with open(f"/sys/block/{os.path.basename(device)}/queue/{name}", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def _journal() -> int:
    try:
        with open(f"{MOUNT_POINT}/journal", encoding="ascii") as file:
            return int(file.read())
    except FileNotFoundError:
        return 0


def run(context: Context) -> dict[str, Any]:
    """See the module's text."""
    get = context.parameters.get
    device = get("device", "/dev/sda")
    mode = get("mode", "write")
    make = get("make", True)
    count = get("count", 1000, minimum=0)
    slots = get("slots", 256, minimum=1, maximum=STRIDE - 1)
    batch = get("batch", 16, minimum=1, maximum=4096)
    pace = get("pace", 0.0, minimum=0, maximum=10)
    verify_every = get("verify_every", 0, minimum=0)
    acknowledged = get("acknowledged", 0, minimum=0)
    books = Books(slots, get("seed", 1))
    appear = get("appear_seconds", 30.0, minimum=0)
    context.parameters.check()
    if mode not in ("write", "check"):
        raise UsageError(f"parameter 'mode' is 'write' or 'check', not '{mode}'")
    wait_for_device(device, appear)
    if mode == "write" and make:
        run_tool("mke2fs", "-q", "-F", "-t", "ext4", device)
    os.makedirs(MOUNT_POINT, exist_ok=True)
    run_tool("mount", "-t", "ext4", device, MOUNT_POINT)
    faults: list[str] = []
    verified = 0
    result: dict[str, Any] = {}
    started = time.monotonic()
    try:
        files = _Files(books)
        try:
            if mode == "write":
                while not context.stop_requested and (not count or books.written < count):
                    since = books.written
                    for _ in range(min(batch, count - since) if count else batch):
                        files.write()
                    files.sync(since)
                    if verify_every and books.written // batch % verify_every == 0:
                        faults += files.verify(books.acknowledged, books.written)
                        verified += 1
                    context.report(
                        "progress", written=books.written, acknowledged=books.acknowledged, wrong=len(faults)
                    )
                    if pace:
                        time.sleep(pace)
                faults += files.verify(books.acknowledged, books.written)
            else:
                books.acknowledged = journal = _journal()
                if journal < acknowledged:
                    faults.append(f"the journal says {journal} writes; {acknowledged} were acknowledged")
                faults += files.verify(max(acknowledged, journal), None)
            verified += 1
        finally:
            files.close()
    finally:
        run_tool("umount", MOUNT_POINT)
    seconds = time.monotonic() - started
    try:
        result["fsck"] = run_tool("e2fsck", "-f", "-n", device).splitlines()[-1]
    except ToolFailed as error:
        faults.append(str(error))
    return {
        "queue": {name: _queue(device, name) for name in ("fua", "discard_max_bytes", "write_zeroes_max_bytes")},
        "written": books.written,
        "acknowledged": books.acknowledged,
        "verified": verified,
        "wrong": len(faults),
        "reasons": faults[:10],
        "seconds": round(seconds, 3),
        **result,
        "verdict": "failed" if faults else "passed",
    }
