"""Sockets: AF_VSOCK between programs of the guest and programs of the host, whose ends are unix sockets.

provider.py     options, what is offered and asked for, bounds, status
connection.py   one connection: a channel joined with a stream, both ways, to its end
states.py       the states of a connection
streams.py      the host's ends: the socket that programs connect to, and sockets of programs that listen
"""

from vmbus.providers.vsock.provider import VsockProvider

__all__ = ["VsockProvider"]
