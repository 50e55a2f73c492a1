"""A disk without a protocol: its image, what it decides, and the threads that do its work. Providers stand before it.

disk.py       the disk: activated and deactivated, its requests, what is saved of it
options.py    what a description says of it, and a saved state
request.py    what is asked of it, and how that ends
core.py       which requests are sound, in what order they run, when a flush is true; no I/O
conflicts.py  which jobs touch the same bytes, and wait for each other; no I/O
work.py       one job on a thread, and who waits for it to let go of guest memory
backend.py    preadv, pwritev, fdatasync, fallocate
at_once.py    what is done on the event loop, where that needs no waiting
prompt.py     whether a write is quick enough for the event loop at present
image.py      finding, making, locking and replacing an image
"""
