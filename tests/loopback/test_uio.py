"""The guest's access through Linux's UIO driver, without a kernel: what the driver does with the rings of channels that
somebody else opens and closes for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from support.linux_bus import Kernel, uio_context, uio_driver
from vmbus.errors import UsageError, WaitTimeout
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.status import KmclError
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.transport.library import Library
from vmbus.wire.lab import LAB_TYPE
from vmbus.wire.workload import ECHO_TYPE, echo_request
from vmbus_guest.testdrivers import CATALOGUE

RUNS: dict[str, dict[str, Any]] = {
    "echo": {"count": 2000, "window": 100, "size": 900, "minimum_size": 1, "external": 0.3},
    "burst": {"count": 2000, "window": 200, "size": 300, "hold": 20},
    "bulk": {"count": 200},
    "ring-full": {"count": 3000, "window": 1000},
    "churn": {"count": 25},
    "sync": {"count": 150},
    "raw-echo": {"count": 500},
    "storm": {"count": 300},
    "idle": {"seconds": 0.3},
}


@pytest.fixture
def server(libvfio_user: Library) -> Iterator[LoopbackServer]:
    with LoopbackServer(describe("echo", "burst", "lab", lab={"stations": 3, "pipes": 1}), libvfio_user) as server:
        yield server


@pytest.fixture
def kernel(server: LoopbackServer, tmp_path: Path) -> Iterator[Kernel]:
    kernel = Kernel(server.function(), tmp_path / "sys")
    yield kernel
    kernel.close(graceful=False)


def test_offers_have_no_monitor_page(kernel: Kernel) -> None:
    """With one Linux would set a bit in that page instead of signalling."""
    assert kernel.bus.offers and not any(offer.monitor_allocated for offer in kernel.bus.offers.values())


@pytest.mark.parametrize("name", RUNS)
def test_uio_carries_the_test_drivers(kernel: Kernel, name: str) -> None:
    result = CATALOGUE[name].load()(uio_context(kernel, RUNS[name]))
    assert result["verdict"] == "passed", result
    assert kernel.opens == (RUNS[name]["count"] if name == "churn" else 1) and not kernel.opened
    if name == "ring-full":
        assert result["queued"] > 0, "the rings were never full"


def test_uio_carries_several_at_once_and_two_runs(kernel: Kernel, server: LoopbackServer) -> None:
    names = ("echo", "burst", "ring-full", "churn", "sync")
    for _ in range(2):
        workloads = [{"driver": name, **RUNS[name], "access": "uio"} for name in names]
        result = CATALOGUE["mixed"].load()(uio_context(kernel, {"workloads": workloads}))
        assert result["verdict"] == "passed", result


def test_what_cannot_be_done_over_uio_is_said(kernel: Kernel) -> None:
    workloads = [{"driver": "echo", "access": "uio"}, {"driver": "burst", "access": "vfio"}]
    with pytest.raises(UsageError, match="in one way"):
        CATALOGUE["mixed"].load()(uio_context(kernel, {"workloads": workloads}))
    with pytest.raises(UsageError, match="'access' is one of auto, vfio, uio"):
        CATALOGUE["echo"].load()(uio_context(kernel, {"access": "ndis"}))
    for name in ("many", "gpadl", "hotplug", "pipe"):
        try:
            result = CATALOGUE[name].load()(uio_context(kernel, {}))
        except UsageError as error:
            trouble = str(error)
        else:
            assert result["verdict"] == "failed"
            trouble = str(result["trouble"])
        assert "access 'vfio'" in trouble, (name, trouble)
    with uio_driver(kernel) as driver:
        channel = driver.client_channel(ECHO_TYPE, instance=UUID(int=5))
        with pytest.raises(WaitTimeout, match="an offer for channel"):
            driver.enable(channel, 0.1)
        assert channel.state is ChannelState.DISABLED
        with pytest.raises(UsageError, match=r"enable\(\)"):
            channel.enable()
        lab = driver.client_channel(LAB_TYPE)
        driver.enable(lab)
        with pytest.raises(KmclError, match="lets no program lend memory"):
            lab.create_gpadl([(0, 4096)])
        # Every device is used by one process at a time, and one driver's users are told so as well.
        other = uio_driver(kernel)
        taken = [one for one in (other.claim(LAB_TYPE) for _ in range(2)) if one]
        assert driver.instance_of(lab) not in taken and len(set(taken)) == 2
        with pytest.raises(UsageError, match="in use by workloads"):
            other.claim(LAB_TYPE)
        other.close()


def test_a_channel_that_is_withdrawn_is_noticed(kernel: Kernel, server: LoopbackServer) -> None:
    with uio_driver(kernel) as driver:
        channel = driver.client_channel(ECHO_TYPE, name="echo")
        ended: list[int] = []
        driver.enable(channel)
        gone: list[object] = []
        driver.on_rescind = gone.append
        for number in range(3):
            packet = channel.allocate_packet()
            packet.completion_routine = lambda packet, status, reply: ended.append(status)
            packet.send(echo_request(number, b"once", inline=True))
        future = asyncio.run_coroutine_threadsafe(server.server.command("rescind", {"name": "echo"}), server._loop)
        driver.run_until(lambda: bool(gone) and future.done(), 10, "the withdrawal")
        assert gone == [channel] and channel.state is ChannelState.DISABLED and len(ended) == 3
        assert not kernel.opened
