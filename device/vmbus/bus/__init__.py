"""The bus: versions, offers, GPADLs, opening and closing of channels. Pure state machines over messages.

server.py   the host's end
gpadl.py    the host's table of GPADLs
client.py   the guest's end
loopback.py both ends in one process, without a guest
"""
