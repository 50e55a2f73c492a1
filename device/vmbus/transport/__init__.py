"""The transport: vfio-user through libvfio-user, both generations in the field.

`library`         finds the shared library and tells its generation; `bindings` are its functions and structures.
`handler`         what a device has to do for the transport.
`context`         one device on one socket: what a server uses. Its parts: `doorway` (clients before their handshake),
                  `requests` (of the one that is attached), `library_context`, `callbacks`.
`mapping`         guest memory that stays safe to touch after the guest has taken it back; `offers`: what there is.
`migration`       what a client that migrates the device itself may ask.
`connection`      sockets and timers; `protocol`: the messages.
"""
