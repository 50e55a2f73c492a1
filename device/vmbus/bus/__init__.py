"""The bus: versions, offers, GPADLs, opening and closing of channels. Pure state machines over messages.

server.py     the host's end
offers.py     channels as the guest and their owners see them, and the table by which they move
gpadl.py      the host's table of GPADLs
desk.py       what the guest and owners ask about GPADLs
saved.py      the bus in a saved state; adoption.py puts its offers back
client.py     the guest's end
loopback.py   both ends in one process, without a guest; connection.py is one channel of it
"""
