"""The test kit: a provider, a pretend host with virtual time, and a scripted guest, in one thread and in milliseconds.

    with ProviderTest(Echo) as kit:
        guest = kit.open()
        request = guest.send(b"hello")
        kit.save_restore()
        assert request.wait() == b"hello..."

No QEMU, no sockets, no libvfio-user: the provider runs on real channels over real rings (`vmbus.bus.local`), and a
save goes through the same chunks and the same callbacks as in a device server.

    device.py     `DeviceUnderTest`: what a test can do with a device, here, over a device server and in a VM
    guest.py      the guest's end of a channel: requests, packets from the provider, memory
    kit.py        `ProviderTest`, what an author's test holds in its hand
    steps.py      `every_step`: a save at every step of a script
    hosted.py     the provider on its host: started, saved, restored, stopped
    host.py       the provider's host: virtual time, timers
    contract.py   what is checked around a save, and `ContractViolation`
    loopback/, vm.py, blocking.py: the same over a device server in this process, and in a VM

docs/writing-a-provider.md and docs/pytest.md are the manual.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmbus.testkit.contract import ContractViolation
    from vmbus.testkit.device import DeviceUnderTest, InFlight
    from vmbus.testkit.guest import Guest, HostPacket, Memory, Request
    from vmbus.testkit.kit import ProviderTest
    from vmbus.testkit.steps import every_step

__all__ = [
    "ContractViolation",
    "DeviceUnderTest",
    "Guest",
    "HostPacket",
    "InFlight",
    "Memory",
    "ProviderTest",
    "Request",
    "every_step",
]
_PLACES = {"ContractViolation": "contract", "DeviceUnderTest": "device", "InFlight": "device", "ProviderTest": "kit"}
_PLACES |= dict.fromkeys(("Guest", "HostPacket", "Memory", "Request"), "guest") | {"every_step": "steps"}


def __getattr__(name: str) -> Any:
    """What is named is imported then: whoever needs a part of the kit, as the demo does, need not have all of it."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
