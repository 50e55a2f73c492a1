"""What crosses the boundary: channel messages, packets and GPA ranges, as bytes and as named tuples.

Pure functions over bytes. All integers are little-endian. Nothing here trusts a length that it was told.
"""
