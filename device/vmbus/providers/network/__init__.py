"""Network: a synthetic network card for Linux's own driver, hv_netvsc. See docs/provider-network.md.

provider.py   the channels and what NVSP says on them, the guest's buffers, saved state
adapter.py    the card as RNDIS has it: control messages, filter, frames
state.py      what is saved
spread.py     which queue a frame for the guest goes to
card.py       the card without its protocol: the host's interface, the link, options
lent.py       the guest's two buffers, and which parts of one are in its hands
backlog.py    frames that wait over a pause
queue.py      one channel's frames and replies on their way to the guest, and what is saved of a packet
oids.py       what the card answers to questions, by table
departure.py  how it takes leave of its guest
offload.py    checksums and segmentation: between what a guest asks for and what a kernel takes
interface.py  the host's end, a TAP device: made, configured and removed, in a network namespace if asked
tap.py        the TAP device
watch.py      what others do to the interface meanwhile
mending.py    getting it back
veth.py       the same without a TAP device
"""

from vmbus.providers.network.provider import NetworkProvider

__all__ = ["NetworkProvider"]
