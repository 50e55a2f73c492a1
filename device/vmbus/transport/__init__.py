"""The transport: vfio-user through libvfio-user, both generations in the field.

`library`  finds the shared library and tells its generation.
`bindings` its functions, structures and constants, in one table.
`mapping`  guest memory that stays safe to touch after the guest has taken it back.
`pci`      a model of the function's configuration space, and the writes that put it back.
`context`  one device on one socket: what a server uses.
`protocol` the messages, for our own client.
`client`   a vfio-user client on the host (the loopback harness).
"""
