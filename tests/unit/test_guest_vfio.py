"""The VFIO driver without a device: the allocator of DMA memory, finding and binding a function in a made-up sysfs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

import support.sysfs
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus_guest import vfio
from vmbus_guest.huge_pages import Extents
from vmbus_guest.vfio import VfioFunction, bind_function, choose_function, find_functions, iommu_group

SIZE = 64


class ExtentsMachine(RuleBasedStateMachine):
    """The allocator against a bitmap."""

    taken = Bundle("taken")

    def __init__(self) -> None:
        super().__init__()
        self.extents = Extents(SIZE)
        self.used = [False] * SIZE

    @rule(target=taken, length=st.integers(1, SIZE))
    def take(self, length: int) -> tuple[int, int] | None:
        start = self.extents.take(length)
        free = [at for at in range(SIZE - length + 1) if not any(self.used[at : at + length])]
        assert start == (free[0] if free else None), "first fit"
        if start is None:
            return None
        self.used[start : start + length] = [True] * length
        return start, length

    @rule(extent=consumes(taken))
    def give(self, extent: tuple[int, int] | None) -> None:
        if extent is not None:
            self.extents.give(*extent)
            self.used[extent[0] : extent[0] + extent[1]] = [False] * extent[1]

    @rule(start=st.integers(-2, SIZE + 2), length=st.integers(-1, SIZE))
    def give_what_is_not_taken(self, start: int, length: int) -> None:
        inside = length > 0 and start >= 0 and start + length <= SIZE
        if not inside or not all(self.used[start : start + length]):
            with pytest.raises(UsageError):
                self.extents.give(start, length)

    @invariant()
    def agrees(self) -> None:
        assert self.extents.free_bytes == self.used.count(False)
        runs = "".join("x" if used else " " for used in self.used).split("x")
        assert self.extents.largest == max(map(len, runs))


TestExtents = ExtentsMachine.TestCase


@given(st.lists(st.integers(1, 10), max_size=20), st.randoms(use_true_random=False))
def test_neighbours_merge_whatever_the_order_of_the_frees(lengths: list[int], random: object) -> None:
    extents = Extents(1000)
    taken = [(extents.take(length), length) for length in lengths]
    random.shuffle(taken)  # type: ignore[attr-defined]
    for start, length in taken:
        assert start is not None
        extents.give(start, length)
    assert extents.largest == 1000


class Sysfs(support.sysfs.Sysfs):
    """A tree like /sys with one IOMMU and PCI functions."""

    def function(self, address: str, vendor: int, device: int, group: int | None = 3) -> Path:
        folder = self.add(address, vendor=f"{vendor:#06x}", device=f"{device:#06x}")
        if group is not None:
            target = self.root / f"kernel/iommu_groups/{group}"
            target.mkdir(parents=True, exist_ok=True)
            (folder / "iommu_group").symlink_to(target)
        return folder


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    found = Sysfs(tmp_path / "sys", "pci")
    (found.root / "bus/pci/drivers_probe").touch()
    return found


def test_functions_are_found_by_their_ids(sysfs: Sysfs) -> None:
    sysfs.function("0000:00:06.0", 0x5642, 0x4D56)
    sysfs.function("0000:00:05.0", 0x5642, 0x4D56)
    sysfs.function("0000:00:04.0", 0x5642, 0x4D57)
    assert find_functions(0x5642, 0x4D56, sysfs=str(sysfs)) == ["0000:00:05.0", "0000:00:06.0"]
    assert find_functions(0x8086, 0x100E, sysfs=str(sysfs)) == []
    with pytest.raises(EnvironmentProblem, match="is sysfs mounted"):
        find_functions(1, 2, sysfs=str(sysfs) + "/nowhere")


def test_own_guest_two_devices_are_told_apart(sysfs: Sysfs, tmp_path: Path) -> None:
    for slot in ("05", "06"):
        sysfs.function(f"0000:00:{slot}.0", 0x5642, 0x4D56)
    words = tmp_path / "cmdline"
    words.write_text("quiet vmbus.functions=gone@07,vmbus1@06,vmbus0@05 panic=-1\n")

    def choose(which: str) -> str:
        return choose_function(which, sysfs=str(sysfs), command_line=str(words))

    assert (choose("vmbus1"), choose("0000:00:05.0")) == ("0000:00:06.0", "0000:00:05.0")
    assert choose("") == "0000:00:06.0", "the first device of those that there are, in whatever slot"
    words.write_text("quiet")
    assert choose_function("", sysfs=str(sysfs), command_line=str(words)) is None, "the only one"
    words.write_text("vmbus.functions=vmbus1@06,vmbus0@05,gone@07")
    for wrong in ("vmbus2", "gone", "0000:00:07.0"):
        with pytest.raises(EnvironmentProblem, match=rf"no VMBus function '{wrong}'.*there: 0000:00:05.0.*vmbus1"):
            choose(wrong)


def test_a_bound_function_is_left_alone(sysfs: Sysfs) -> None:
    function = sysfs.function("0000:00:05.0", 1, 2)
    (function / "driver").symlink_to(sysfs.driver("vfio-pci"))
    bind_function("0000:00:05.0", sysfs=str(sysfs))
    assert (function / "driver_override").read_text() == ""


def test_a_function_is_taken_from_its_driver(sysfs: Sysfs) -> None:
    function = sysfs.function("0000:00:05.0", 1, 2)
    other = sysfs.driver("e1000")
    (function / "driver").symlink_to(other)
    sysfs.driver("vfio-pci")
    with pytest.raises(EnvironmentProblem, match=r"vfio-pci did not take .* \(its driver now: e1000\)"):
        bind_function("0000:00:05.0", sysfs=str(sysfs))  # nothing reacts here
    assert (function / "driver_override").read_text() == "vfio-pci"
    assert (other / "unbind").read_text() == "0000:00:05.0"
    assert (sysfs.root / "bus/pci/drivers_probe").read_text() == "0000:00:05.0"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("device", "no PCI function 5642:4d56"),
        ("linux", r"0000:00:05\.0 is driven by Linux's own VMBus drivers"),
        ("iommu", "no IOMMU group.*intel-iommu"),
        ("driver", "vfio-pci driver is not loaded"),
        ("nodes", "modules are not loaded"),
    ],
)
def test_what_is_missing_is_named(sysfs: Sysfs, tmp_path: Path, what: str, message: str) -> None:
    if what != "device":
        function = sysfs.function("0000:00:05.0", 0x5642, 0x4D56, None if what == "iommu" else 3)
        if what == "nodes":
            (function / "driver").symlink_to(sysfs.driver("vfio-pci"))
        elif what == "linux":
            (function / "driver").symlink_to(sysfs.driver("vmbus_pci"))
    with pytest.raises(EnvironmentProblem, match=message):
        VfioFunction.open(sysfs=str(sysfs), dev=str(tmp_path))


def test_a_function_that_linux_has_is_left_to_it(sysfs: Sysfs, tmp_path: Path) -> None:
    first = sysfs.function("0000:00:05.0", 0x5642, 0x4D56)
    (first / "driver").symlink_to(sysfs.driver("vmbus_pci"))
    sysfs.function("0000:00:06.0", 0x5642, 0x4D56, None)
    with pytest.raises(EnvironmentProblem, match=r"0000:00:06\.0 is in no IOMMU group"):
        VfioFunction.open(sysfs=str(sysfs), dev=str(tmp_path))


def test_the_group_is_the_links_name(sysfs: Sysfs) -> None:
    sysfs.function("0000:00:05.0", 1, 2, 17)
    assert iommu_group("0000:00:05.0", sysfs=str(sysfs)) == "17"


def test_ioctl_structures_have_the_kernels_sizes() -> None:
    # sizeof of the structures in include/uapi/linux/vfio.h, as a C compiler lays them out on x86-64.
    assert vfio._REGION_INFO.size == 32
    assert vfio._IRQ_INFO.size == 16
    assert vfio._IRQ_SET.size == 20
    assert vfio._DMA_MAP.size == 32
    assert vfio._DMA_UNMAP.size == 24
    assert (vfio._GET_API_VERSION, vfio._DEVICE_SET_IRQS, vfio._IOMMU_MAP_DMA) == (0x3B64, 0x3B6E, 0x3B71)
