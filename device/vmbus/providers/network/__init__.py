"""Network: a synthetic NIC, whose other end is an interface of the host's.

card.py       what every card has: the host's interface, the link, options; no protocol
provider.py   this one's: channels, messages, saved state
queue.py      one channel's frames to the guest: batches, the window, what is saved of a packet
interface.py  the host's end, a TAP device: made, configured and removed, in a network namespace if asked
veth.py       the same without a TAP device
"""

from vmbus.providers.network.provider import NetworkProvider

__all__ = ["NetworkProvider"]
