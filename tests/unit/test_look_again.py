"""The belt beside the fences: an end that went idle with transactions under way looks again, once."""

from __future__ import annotations

from support.device import Machine, connect, open_echo
from vmbus.kmcl import Channel
from vmbus.wire.workload import BURST_TYPE, ECHO_TYPE, BurstStart, echo_request
from vmbus_guest.driver import VmbusDriver


def lost_signal(machine: Machine) -> tuple[VmbusDriver, Channel]:
    """The guest answers packets of the host, and its signal is lost."""
    driver = connect(machine)
    burst = driver.client_channel(BURST_TYPE, name="burst", ring_pages_in=1, ring_pages_out=1)
    burst.set_process_packet_callbacks(lambda _, completion, payload: completion.complete(bytes(24)))
    driver.enable(burst)
    burst.allocate_packet().send(BurstStart(100, 3, 3).pack())
    machine.serve()
    burst.link.signal = lambda: None  # type: ignore[method-assign, union-attr]
    driver.step(0.0)
    machine.serve()
    return driver, burst


class WithoutTheBelt(Machine):
    later = None


def test_the_host_looks_again_when_a_signal_was_lost() -> None:
    machine = Machine(["burst"])
    _, burst = lost_signal(machine)
    server = machine.channel("burst")
    assert server.packets_sent == 3 and burst.counters["answered"] == 3
    assert machine.fire_timers(), "somebody wants to look again"
    machine.serve()
    assert server.packets_sent == 0 or server.counters["completed"] >= 3


def test_without_the_belt_it_waits_for_ever() -> None:
    machine = WithoutTheBelt(["burst"])
    lost_signal(machine)
    machine.fire_timers()
    machine.serve()
    assert machine.channel("burst").packets_sent == 3


def test_the_host_looks_once_and_not_for_ever() -> None:
    machine = Machine(["burst"])
    driver = connect(machine)
    burst = driver.client_channel(BURST_TYPE, name="burst")
    held: list = []
    burst.set_process_packet_callbacks(lambda _, completion, payload: held.append(completion))
    driver.enable(burst)
    burst.allocate_packet().send(BurstStart(100, 3, 3).pack())
    driver.step(0.0)
    driver.step(0.0)
    assert len(held) == 3
    looks = 0
    while machine.fire_timers():
        machine.serve()
        looks += 1
    assert looks == 1 and machine.channel("burst").packets_sent == 3


def test_the_guest_looks_again_when_an_interrupt_was_lost() -> None:
    machine = Machine(["echo"])
    driver = connect(machine)
    echo = open_echo(driver)
    answers: list[bytes] = []
    packet = echo.allocate_packet()
    packet.completion_routine = lambda packet, status, reply: answers.append(reply)
    packet.send(echo_request(0, b"hello", inline=True))
    driver.step(0.0)
    machine.device.synic.raise_event = lambda relid: None  # type: ignore[method-assign]
    machine.serve()
    driver.run_until(lambda: bool(answers), 5, "the answer")
    assert machine.channel("echo").counters["answered"] == 1 and ECHO_TYPE
