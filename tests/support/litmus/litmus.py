"""Test driver `litmus`: the guest's side of litmus.c, in a page that the host finds by its number.

Parameters:

    library     litmus.c, compiled, in base64
    rounds      of store and load
    increments  of the counter
"""

import base64
import ctypes
import mmap
from pathlib import Path

PAGE = 4096
HUGE_PAGE = 2 << 20
FRAME = (1 << 55) - 1
"""The bits of an entry of /proc/self/pagemap that are the page's number."""
MAP_HUGETLB = 0x40000


def run(context):
    library = base64.b64decode(context.parameters.get("library", ""))
    rounds = context.parameters.get("rounds", 0, minimum=0)
    increments = context.parameters.get("increments", 0, minimum=0)
    context.parameters.check()
    path = Path("/tmp/litmus.so")
    path.write_bytes(library)
    # A huge page: it stays where it is.
    memory = mmap.mmap(-1, HUGE_PAGE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_HUGETLB)
    memory[:PAGE] = bytes(PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(address // PAGE * 8)
        frame = int.from_bytes(pagemap.read(8), "little") & FRAME
    context.progress(address=frame * PAGE)
    play = ctypes.CDLL(str(path)).guest
    play.argtypes, play.restype = (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64), None
    play(address, rounds, increments)
    return {"verdict": "passed"}
