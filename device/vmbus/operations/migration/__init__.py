"""Live migration: a running VM moves to another QEMU and another device server, there or on another host.

`ownership` says who owns the VM at each moment; `source` and `destination` are the two sides; `channel` is the
authenticated connection between them, `messages` what they say over it, `link` how each notices that the other is gone.
docs/migration.md tells the whole story.
"""
