"""Capture: a channel's packets in a pcapng file, and what can be done with such a file.

record.py    what is in one packet of the file: our header, the packet's own headers, payload, external data
pcapng.py    the blocks of the file: making them, and a strict reader
sink.py      the thread that writes them
capture.py   what a server's channels tell
frames.py    a network card's frames, for other tools
replay.py    a capture's guest, played to a provider once more
"""
