"""Two hosts on one machine, for tests of whatever happens between machines: `TwoHosts`.

hosts        what a test uses: two hosts, the link between them, commands in them
init         the first process of a host: makes the host's namespaces, serves requests about its network
enter        starts a program inside a host
network      the host's end of the link, over netlink
line         a delay line: latency and loss
namespaces   the few system calls that Python lacks

A host is a network, a mount and a process namespace. None of them has a name outside, so the kernel takes a host apart
with its first process, whatever else became of us: addresses, link, files on its own tmpfs, and every process in it.
"""
