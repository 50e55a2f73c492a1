"""QEMU from outside: what to start, how to talk to it, and how to save and restore it with its device server."""
