"""The loopback harness: the real transport with both ends on the host."""
