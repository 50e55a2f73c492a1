"""Writes golden state: python tests/golden/make.py [DIRECTORY]   (with device, guest and tests on PYTHONPATH)

Each shape is two files: NAME.state.bin, the device state file exactly as the server writes it, and NAME.memory.bin, the
guest's memory at that moment (zlib), since rings lie there. Everything is deterministic: two runs of one version of the
program write the same state.

The directories here are history: v1 was written by the first program with format version 1 and is never written
again; tests/unit/test_golden.py restores it with today's program. A program with a new format version gets a new
directory. Files that exist are never overwritten.
"""

import hashlib
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from support.device import BASE, CONFIG, PAGE, Machine, connect, open_echo
from vmbus.device import saved
from vmbus.kmcl.client import ClientChannel
from vmbus.wire import messages as m
from vmbus.wire.gpa import pack_ranges, range_for
from vmbus.wire.workload import BURST_TYPE, BurstStart, echo_request
from vmbus_guest.driver import VmbusDriver

ECHO_OPTIONS = {"hold": 5}
REQUESTS = 30
BURST = BurstStart(size=50, packets=200, window=100)


def idle() -> Machine:
    """A device that no driver has touched."""
    return Machine(echo=ECHO_OPTIONS)


def connected() -> Machine:
    """A guest knows the offers and has opened nothing."""
    machine = idle()
    connect(machine)
    return machine


def opened() -> Machine:
    """Both channels are open, and nothing moves."""
    machine = idle()
    _open(machine)
    return machine


def traffic() -> Machine:
    """Outgoing packets queued and in the ring; incoming packets in the ring that the device has not taken."""
    machine = idle()
    _, echo, burst = _open(machine)
    burst.allocate_packet().send(BURST.pack())
    machine.serve()
    _request(echo, 0, REQUESTS)
    return machine


def completions() -> Machine:
    """Answers that find no room in the ring, since the guest takes none."""
    machine = idle()
    _, echo, _ = _open(machine)
    for batch in range(3):
        _request(echo, batch * REQUESTS, REQUESTS)
        machine.serve()
    return machine


def partial() -> Machine:
    """A GPADL of which one body has come and others have not."""
    machine = idle()
    driver = connect(machine)
    relid = next(iter(driver.bus.offers))
    # Pages that do not follow each other, each a range of its own: a long list.
    ranges = [range_for(BASE + 2 * PAGE * number, PAGE) for number in range(60)]
    messages = m.gpadl_messages(relid, 0x77, pack_ranges(ranges), len(ranges))
    assert len(messages) > 3
    for message in messages[:2]:
        driver._post(driver.bus.connection_id, message)
    return machine


def undelivered() -> Machine:
    """Messages that wait because the guest has not emptied its slot."""
    machine = idle()
    driver = connect(machine)
    for number in range(5):
        buffer = driver.allocate(PAGE)
        driver.bus.create_gpadl(1 + number % 2, [range_for(buffer.iova, PAGE)])
    return machine


SHAPES: dict[str, Callable[[], Machine]] = {
    shape.__name__: shape for shape in (idle, connected, opened, traffic, completions, partial, undelivered)
}


def _open(machine: Machine) -> tuple[VmbusDriver, ClientChannel, ClientChannel]:
    driver = connect(machine)
    echo = open_echo(driver, ring_pages_in=1, ring_pages_out=1)
    burst = driver.client_channel(BURST_TYPE, name="burst", ring_pages_in=1, ring_pages_out=1)
    driver.enable(burst)
    machine.serve()
    return driver, echo, burst  # type: ignore[return-value]


def _request(echo: ClientChannel, first: int, count: int) -> None:
    for number in range(first, first + count):
        echo.allocate_packet().send(echo_request(number, b"data", inline=True))


def _not_random(counter: list[int]) -> Callable[[int], bytes]:
    def produce(count: int) -> bytes:
        counter[0] += 1
        return hashlib.shake_128(counter[0].to_bytes(8, "little")).digest(count)

    return produce


def make(shape: str) -> tuple[bytes, bytes]:
    """The state file of a shape, and the guest's memory up to the last page in use."""
    with mock.patch("os.urandom", _not_random([0])):
        machine = SHAPES[shape]()
        state = machine.save()
        assert state.config == CONFIG
        return saved.encode(state), bytes(machine.ram).rstrip(b"\0")


def main(directory: Path) -> None:
    """Write the shapes that are not there yet."""
    directory.mkdir(parents=True, exist_ok=True)
    for shape in SHAPES:
        for kind, data in zip(("state", "memory"), make(shape), strict=True):
            path = directory / f"{shape}.{kind}.bin"
            if path.exists():
                print(f"{path} is there already, and stays")
                continue
            path.write_bytes(zlib.compress(data, 9) if kind == "memory" else data)
            print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    default = Path(__file__).parent / f"v{saved.FORMAT_VERSION}"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
