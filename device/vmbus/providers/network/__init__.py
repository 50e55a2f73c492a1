"""The host's end of a network card.

card.py       what every card has: the host's interface, the link, options; no protocol
interface.py  the interface, a TAP device: made, configured and removed, in a network namespace if asked
veth.py       the same without a TAP device
"""
