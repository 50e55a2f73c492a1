"""One direction of a channel: a ring of packets in memory that both sides map.

Layout: a 4096-byte header page (write index @0, read index @4, interrupt mask @8, pending send size @12, feature bits
@64), then the data area. Indices are byte offsets into the data area, multiples of 8, below its size; equal indices
mean empty, and at least 8 bytes always stay free. The writer owns write index and pending send size, the reader owns
read index and mask. Each end keeps its own index in private memory and only publishes it; what the peer owns is
loaded once, checked, and used from the copy.

Who signals whom, and the fences that keep a wake-up from being lost (each pairs with another):

===== ============================ ======= ====================================================================
rule  when                         by      what
===== ============================ ======= ====================================================================
S1    packets were published       writer  store write index; fence; signal if unmasked and the ring was empty
S2    packets were consumed        reader  store read index; fence; signal if the free space passed what the
                                           writer waits for
S3    the reader goes idle         reader  clear mask; fence; look again
S4    the writer is blocked        writer  store pending send size; fence; look again
===== ============================ ======= ====================================================================

"Come back later" (no packet, no room) is a return value; a peer that breaks the rules is a `RingCorrupt` exception.

The two ends exist twice: in C (`vmbus/native`) and in Python (`vmbus.ring.pure`, whose classes say what each call
does). Which of them these names are is chosen in `vmbus.native.choice`.
"""

from typing import TYPE_CHECKING

from vmbus.native.choice import core
from vmbus.ring.pure import (
    DEFAULT_BATCH,
    FEATURE_BITS,
    FEATURE_PENDING_SEND_SIZE,
    HEADER_SIZE,
    INTERRUPT_MASK,
    PENDING_SEND_SIZE,
    READ_INDEX,
    WRITE_INDEX,
    RingCorrupt,
    RingReader,
    RingWriter,
)

if not TYPE_CHECKING and core is not None:
    RingReader, RingWriter = core.RingReader, core.RingWriter

__all__ = [
    "DEFAULT_BATCH",
    "FEATURE_BITS",
    "FEATURE_PENDING_SEND_SIZE",
    "HEADER_SIZE",
    "INTERRUPT_MASK",
    "PENDING_SEND_SIZE",
    "READ_INDEX",
    "WRITE_INDEX",
    "RingCorrupt",
    "RingReader",
    "RingWriter",
]
