"""KMCL under its own names: the functions and callbacks of `VmbusKernelModeClientLibApi.h`, as thin functions over the
Pythonic API, so that a VSP or a VSC can be carried over line by line.

Handles are the library's own objects, so both faces can be mixed:

    VMBCHANNEL            `ServerChannel` or `ClientChannel`
    VMBPACKET             `Packet`
    VMBPACKETCOMPLETION   `Completion`
    PMDL, handed in       a chain of (I/O address, length in bytes) pairs
    PMDL, handed out      `Grant`: the memory as memoryviews
    VMBus handle          what has `add_channel`: a provider's `Host`, a `Device`
    parent of a client    what has `attach`: the guest's driver, a `LocalBus`

What became of C:

* A function that returns NTSTATUS returns a `Status`; its out-parameters follow in a tuple, in the header's order, 0 or
  None after a failure. The text of a failure goes to the log of this package at level INFO.
* A buffer knows its size, so sizes of buffers are no parameters. Callbacks do get them, as in C.
* A function that returns nothing in C can only fail by misuse, which raises (`ChannelStateError` names the channel, the
  packet and the call that was expected). Where a wait is bounded here and endless there, or where there is nothing to
  hand out, it returns a `Status` instead. The bound, in seconds, may be given behind the header's parameters.
* No failure that the contract documents leaves as an exception. Damaged state is DATA_ERROR, a wait that ran out
  CANCELLED. A server's function on a client channel, or the reverse, is INVALID_PARAMETER_1.

`FUNCTIONS` and `CALLBACKS` list everything, with the Pythonic counterpart and the deviations.

    header.py   what the header declares: flags, callbacks, structures
    table.py    the two lists, and how a row becomes a function
    rows.py     functions that only forward: one row each
    calls.py    functions that convert something

Source: the public WDK pages of the header.
"""

# ruff: noqa: F403 - the one place that puts the parts together

from vmbus.kmcl.ddi.calls import *
from vmbus.kmcl.ddi.header import *
from vmbus.kmcl.ddi.rows import *
from vmbus.kmcl.ddi.table import *
