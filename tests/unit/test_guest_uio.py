"""The guest's access through Linux's UIO driver: files of sysfs, memory with physical addresses, mapped rings."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

import support.sysfs
from support.bus import Joined, one_range
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.kmcl.client import ClientChannel
from vmbus.ring import pure as ring_pure
from vmbus.wire import messages as m
from vmbus.wire.workload import ECHO_TYPE
from vmbus_guest import huge_pages, uio
from vmbus_guest.huge_pages import HUGE_PAGE, PhysicalMemory, physical_address
from vmbus_guest.uio import UioDevice, UioDriver
from vmbus_guest.vmbus_devices import bind_device, bus_is_there, find_devices, give_back, map_size, reserve

PAGE = 4096
TYPE, OTHER = UUID(int=0xA), UUID(int=0xB)


class Sysfs(support.sysfs.Sysfs):
    """A tree like /sys with Linux's VMBus."""

    def device(self, number: int, kind: UUID, relid: int, driver: str = "") -> Path:
        texts = {"device_id": f"{{{UUID(int=number)}}}", "class_id": f"{{{kind}}}", "id": str(relid)}
        folder = self.add(str(UUID(int=number)), **texts)
        if driver:
            (folder / "driver").symlink_to(self.driver(driver))
        return folder


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path / "sys", "vmbus")


# ---- devices


def test_devices_are_found_by_their_type_in_the_order_of_their_offers(sysfs: Sysfs) -> None:
    assert not bus_is_there(str(sysfs)) and not bus_is_there(f"{sysfs}/nowhere")
    sysfs.device(1, TYPE, 9)
    sysfs.device(2, OTHER, 3)
    sysfs.device(3, TYPE, 4)
    (sysfs.devices / "no-device").mkdir()
    (sysfs.device(4, TYPE, 5) / "id").write_text("soon\n")
    assert bus_is_there(str(sysfs))
    assert [(one.instance.int, one.relid) for one in find_devices(TYPE, sysfs=str(sysfs))] == [(3, 4), (1, 9)]
    assert [one.relid for one in find_devices(sysfs=str(sysfs))] == [3, 4, 9]
    with pytest.raises(EnvironmentProblem, match=r'driver = "linux"'):
        find_devices(sysfs=f"{sysfs}/nowhere")


def test_a_device_is_one_process_s(sysfs: Sysfs) -> None:
    sysfs.device(1, TYPE, 1)
    [device] = find_devices(sysfs=str(sysfs))
    first = reserve(device)
    assert first is not None and reserve(device) is None
    os.close(first)
    again = reserve(device)
    assert again is not None
    os.close(again)


def test_a_device_is_bound_and_given_back(sysfs: Sysfs) -> None:
    folder = sysfs.device(1, TYPE, 1)
    [device] = find_devices(sysfs=str(sysfs))
    give_back(device, sysfs=str(sysfs))  # nothing to do
    with pytest.raises(EnvironmentProblem, match="uio_hv_generic is not loaded"):
        bind_device(device, sysfs=str(sysfs))
    driver = sysfs.driver("uio_hv_generic")
    with pytest.raises(EnvironmentProblem, match="did not take VMBus device"):
        bind_device(device, sysfs=str(sysfs))  # nothing reacts here
    assert (folder / "driver_override").read_text() == "uio_hv_generic"
    assert (driver / "bind").read_text() == folder.name
    (folder / "driver").symlink_to(driver)
    (folder / "uio/uio7").mkdir(parents=True)
    (driver / "bind").write_text("")
    assert bind_device(device, sysfs=str(sysfs)) == "uio7"
    assert (driver / "bind").read_text() == "", "it was bound already"
    give_back(device, sysfs=str(sysfs))
    assert (driver / "unbind").read_text() == folder.name
    assert (folder / "driver_override").read_text() == "\n"


def test_a_device_of_another_driver_is_left_alone(sysfs: Sysfs) -> None:
    folder = sysfs.device(1, TYPE, 1, "hv_storvsc")
    [device] = find_devices(sysfs=str(sysfs))
    with pytest.raises(EnvironmentProblem, match="in use by Linux's driver hv_storvsc"):
        bind_device(device, sysfs=str(sysfs))
    give_back(device, sysfs=str(sysfs))
    assert (folder / "driver/unbind").read_text() == "" and (folder / "driver_override").read_text() == ""


def test_the_size_of_a_map_is_read(sysfs: Sysfs) -> None:
    folder = sysfs.root / "class/uio/uio0/maps/map0"
    folder.mkdir(parents=True)
    (folder / "size").write_text("0x0000000000024000\n")
    assert map_size("uio0", 0, sysfs=str(sysfs)) == 36 * PAGE
    with pytest.raises(EnvironmentProblem, match="no map 4"):
        map_size("uio0", 4, sysfs=str(sysfs))


# ---- memory


def test_physical_addresses_are_those_of_the_kernel_s_table(tmp_path: Path) -> None:
    table = tmp_path / "pagemap"
    table.write_bytes(struct.pack("<4Q", 0, 1 << 63 | 0x1234, 1 << 63, 0x99))
    assert physical_address(PAGE + 5, str(table)) == 0x1234 * PAGE + 5
    for virtual in (0, 2 * PAGE, 3 * PAGE, 4 * PAGE):  # not there; not told; not present; beyond the end
        with pytest.raises(EnvironmentProblem, match="needs root"):
            physical_address(virtual, str(table))


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[PhysicalMemory]:
    memory = PhysicalMemory(str(tmp_path), physical=lambda virtual: virtual)
    yield memory
    memory.close()


def test_memory_is_zeroed_contiguous_and_taken_back(pool: PhysicalMemory, tmp_path: Path) -> None:
    whole = pool.allocate(HUGE_PAGE)
    small = pool.allocate(1)
    assert (whole.size, small.size, len(small.view)) == (HUGE_PAGE, PAGE, PAGE)
    assert small.iova % PAGE == 0 and not whole.iova <= small.iova < whole.iova + HUGE_PAGE
    whole.view[:4] = small.view[:4] = b"mark"
    pool.free(whole)
    again = pool.allocate(HUGE_PAGE)
    assert again.iova == whole.iova and bytes(again.view[:4]) == bytes(4)
    assert len(list(tmp_path.iterdir())) == 2
    pool.free(again)
    with pytest.raises(UsageError, match="freed twice"):
        pool.free(again)
    with pytest.raises(UsageError, match="not of this pool"):
        pool.free(huge_pages.Buffer(5, PAGE, memoryview(bytes(PAGE))))
    for size, kind in ((0, UsageError), (HUGE_PAGE + 1, EnvironmentProblem)):
        with pytest.raises(kind):
            pool.allocate(size)


def test_processes_share_the_pool_and_no_page_of_it(pool: PhysicalMemory, tmp_path: Path) -> None:
    other = PhysicalMemory(str(tmp_path), physical=lambda virtual: virtual)
    first = [pool.allocate(HUGE_PAGE) for _ in range(2)]
    second = other.allocate(HUGE_PAGE)
    assert len(list(tmp_path.iterdir())) == 3
    second.view[:4] = b"mine"
    assert all(bytes(one.view[:4]) == bytes(4) for one in first)
    del first, second
    other.close()
    # What a process leaves behind is its successor's: it was never anybody else's memory.
    rest = [pool.allocate(HUGE_PAGE) for _ in range(huge_pages.MAXIMUM_PHYSICAL_PAGES - 2)]
    assert not any(bytes(one.view[:4]) == b"mine" for one in rest)
    with pytest.raises(EnvironmentProblem, match="all 12 huge pages"):
        pool.allocate(PAGE)
    assert len(list(tmp_path.iterdir())) == huge_pages.MAXIMUM_PHYSICAL_PAGES


# ---- rings


@pytest.fixture(params=["chosen", "pure"])
def rings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pure":
        monkeypatch.setattr(uio, "RingReader", ring_pure.RingReader)
        monkeypatch.setattr(uio, "RingWriter", ring_pure.RingWriter)
    return str(request.param)


def mappings(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def test_nothing_of_a_closed_channel_stays_mapped(sysfs: Sysfs, tmp_path: Path, rings: str) -> None:
    """A mapping that is left would keep the channel open: then nobody could open it anew."""
    node = tmp_path / "uio0"
    node.write_bytes(bytes(36 * PAGE))
    folder = sysfs.device(1, ECHO_TYPE, 1, "uio_hv_generic")
    (folder / "uio/uio0").mkdir(parents=True)
    maps = sysfs.root / "class/uio/uio0/maps/map0"
    maps.mkdir(parents=True)
    (maps / "size").write_text(f"{36 * PAGE:#x}\n")

    class Device(UioDevice):
        """A file cannot be waited for; an eventfd can."""

        def __init__(self, path: str, ring_bytes: int) -> None:
            super().__init__(path, ring_bytes)
            assert mappings(node) == 1
            self._file, self.fd = self.fd, os.eventfd(0, os.EFD_NONBLOCK)

        def close(self) -> None:
            super().close()
            os.close(self._file)

    driver = UioDriver(sysfs=str(sysfs), dev=str(tmp_path), open_device=Device, physical=PhysicalMemory(str(tmp_path)))
    for _ in range(3):
        channel = driver.client_channel(ECHO_TYPE)
        driver.enable(channel)
        packet = channel.allocate_packet()
        packet.send(b"hello")
        channel.process()
        # The writer's index, in the first of the two rings.
        assert struct.unpack_from("<I", node.read_bytes(), 0) != (0,)
        driver.close_channel(channel)
        assert mappings(node) == 0
        node.write_bytes(bytes(36 * PAGE))  # as the kernel makes the rings anew
    assert isinstance(channel, ClientChannel)
    driver.close()
    assert (sysfs.root / "bus/vmbus/drivers/uio_hv_generic/unbind").read_text() == folder.name


def test_what_is_no_such_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"cannot open .*nowhere, and with it the channel"):
        UioDevice(str(tmp_path / "nowhere"), 8 * PAGE)
    for size in (0, 2 * PAGE, 5 * PAGE, 8 * PAGE + 1):
        with pytest.raises(EnvironmentProblem, match="has rings of"):
            UioDevice(str(tmp_path / "nowhere"), size)


# ---- what the kernel's driver asks of the host


def test_gpadls_of_uio_hv_generic_on_a_closed_channel_are_taken() -> None:
    """It lends 31 MiB and 16 MiB of scattered pages as it is bound, whatever the device is; the rings come later, and
    more than once."""
    bus = Joined()
    bus.connect()
    for handle, mib in ((7, 31), (8, 16)):
        pages = (mib << 20) // PAGE
        messages = m.gpadl_messages(1, handle, one_range(pages, first=0x4_0000), 1)
        answers = [answer for message in messages for answer in bus.say(message)]
        assert answers == [m.GpadlCreated(1, handle, 0)], mib
    for handle in (9, 10):
        bus.gpadl(pages=36, handle=handle)
        assert bus.open(handle=handle) == [m.OpenResult(1, 99, 0)]
        bus.say(m.CloseChannel(1))
        assert bus.say(m.GpadlTeardown(1, handle)) == [m.GpadlTorndown(handle)]
    for handle in (8, 7):
        assert bus.say(m.GpadlTeardown(1, handle)) == [m.GpadlTorndown(handle)]
    assert not bus.bus.gpadls.complete
