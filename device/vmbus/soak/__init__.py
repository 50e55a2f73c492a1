"""Soak campaigns: long runs of random workloads and operations that can be replayed. See docs/soak.md."""
