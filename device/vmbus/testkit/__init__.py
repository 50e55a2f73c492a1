"""The test kit: a provider, a pretend host with virtual time, and scripted clients, in one thread and in milliseconds.

    with ProviderTest(Echo) as kit:
        guest = kit.open()
        request = guest.send(b"hello")
        kit.save_and_restore()
        kit.run()
        assert request.reply == b"hello"

No QEMU, no sockets, no libvfio-user: the provider runs on real channels over real rings (`vmbus.bus.local`), and a
save goes through the same chunks and the same callbacks as in a device server.

    kit.py      `ProviderTest`, what an author's test holds in its hand; `every_step`, a save at every step of a script
    client.py   the guest's end of a channel: requests, packets from the provider, memory
    host.py     the provider's host: virtual time, timers
    contract.py what is checked around a save, and `ContractViolation`

docs/writing-a-provider.md is the manual.
"""

from vmbus.testkit.client import Client, HostPacket, Memory, Request
from vmbus.testkit.contract import ContractViolation
from vmbus.testkit.kit import ProviderTest, every_step

__all__ = ["Client", "ContractViolation", "HostPacket", "Memory", "ProviderTest", "Request", "every_step"]
