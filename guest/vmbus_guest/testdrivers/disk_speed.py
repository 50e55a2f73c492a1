"""Test driver `disk-speed`: reads or writes a block device past the page cache, for the benchmark. No channels.

Parameters:

    device      the block device; its content is overwritten when `write`
    module      a kernel module to insert first, such as virtio_blk
    write       write instead of reading
    random      places all over the device instead of one after the other
    size        bytes in a request, a multiple of 4096
    count       requests
    depth       requests in flight, each on a thread of its own
    span_mib    how much of the device is used
"""

# os instead of pathlib: this is a guest with little time.

from __future__ import annotations

import itertools
import mmap
import os
import random
import threading
import time
from typing import Any

from vmbus.errors import EnvironmentProblem
from vmbus_guest.testdrivers.context import Context
from vmbus_guest.testdrivers.disk_writer import insert_module, wait_for_device


def run(context: Context) -> dict[str, Any]:
    """See the module's text."""
    get = context.parameters.get
    device = get("device", "/dev/sda")
    module = get("module", "")
    write = get("write", False)
    anywhere = get("random", False)
    size = get("size", 4096, minimum=4096, maximum=1 << 20)
    count = get("count", 1000, minimum=1)
    depth = get("depth", 1, minimum=1, maximum=64)
    span = get("span_mib", 32, minimum=1) << 20
    context.parameters.check()
    if module:
        insert_module(module)
    wait_for_device(device, 30.0)
    fd = os.open(device, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    places = list(range(0, span - size + 1, size))
    if anywhere:
        random.Random(1).shuffle(places)
    numbers = iter(itertools.islice(itertools.cycle(places), count))
    lock = threading.Lock()
    trips: list[float] = []
    failures: list[str] = []

    def work() -> None:
        buffer = mmap.mmap(-1, size)  # O_DIRECT wants whole pages
        buffer.write(os.urandom(size))
        while not failures:
            with lock:
                place = next(numbers, None)
            if place is None:
                return
            started = time.perf_counter()
            try:
                moved = os.pwritev(fd, [buffer], place) if write else os.preadv(fd, [buffer], place)
            except OSError as error:
                failures.append(f"{error.strerror} at {place}")
                return
            trips.append(time.perf_counter() - started)
            if moved != size:
                failures.append(f"{moved} of {size} bytes were moved at {place}")

    threads = [threading.Thread(target=work) for _ in range(depth)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    os.close(fd)
    if failures:
        raise EnvironmentProblem(f"{device}: {failures[0]}")
    return {
        "requests": len(trips),
        "per_second": round(len(trips) / seconds, 2),
        "mib_per_second": round(len(trips) * size / seconds / (1 << 20), 3),
        "median": sorted(trips)[len(trips) // 2],
        "seconds": round(seconds, 3),
        "verdict": "passed",
    }
