"""The device server: one process, one PCI function, one event loop.

app.py       the server: transport, device, providers, and what tools may ask
control.py   the control socket: JSON lines, server and client
__main__.py  the command line
"""
