"""The auditor: each end records what happens to its packets, and a checker proves exactly once and in order from that.

    format.py    what a record is, byte by byte (both ends)
    recorder.py  what the channels call; no I/O (both ends)
    store.py     where a record is kept: a file (both ends)
    records.py   reading records, and joining those of many processes into the timeline of one VM
    lanes.py     one direction of a channel at one end, and how two records of it differ
    order.py     an end puts its packets in the order in which it accepted them
    pair.py      one life of a channel, as both ends saw it; half.py: as one of them did
    checker.py   the proof, or the first transaction that breaks it
    report.py    its result, for programs and for people

The recorder and the store also run in the guest, so they need nothing but the standard library. See docs/audit.md.
"""
