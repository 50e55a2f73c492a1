"""The guest's console on our terminal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

from vmbus.errors import os_error

ESCAPE = 0x1D  # Ctrl-]
MOST_TYPED = 64 << 10
"""Bytes that wait for a guest which does not read them; what is typed then is lost, but for the escape sequences."""
HELP = "Ctrl-] then q ends the VM, Ctrl-] twice sends one"


class EscapeFilter:
    """Takes typed bytes and separates what the guest gets from the escape sequences.

    ``Ctrl-] q`` asks for the end; ``Ctrl-] Ctrl-]`` is one Ctrl-] for the guest; any other key after Ctrl-] is dropped
    with it.
    """

    def __init__(self) -> None:
        self._escaped = False

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Returns the bytes for the guest and whether the end was asked for."""
        out = bytearray()
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte in b"qQ":
                    return bytes(out), True
                if byte == ESCAPE:
                    out.append(byte)
            elif byte == ESCAPE:
                self._escaped = True
            else:
                out.append(byte)
        return bytes(out), False


def own_terminal() -> int | None:
    """The descriptor of standard input if it is a terminal whose keys are for us: we are in its foreground.

    In the background (`timeout 60 scripts/run-vm`, or with an `&`) who reads from it or sets it is stopped.
    """
    try:
        descriptor = sys.stdin.fileno()
        if not os.isatty(descriptor):
            return None
    except (OSError, ValueError, AttributeError):  # there is none
        return None
    with contextlib.suppress(OSError):  # a terminal that does not control us stops nobody
        if os.tcgetpgrp(descriptor) != os.getpgrp():
            return None
    return descriptor


@contextlib.contextmanager
def raw_terminal(descriptor: int) -> Iterator[None]:
    """Every key goes to us unchanged, Ctrl-C included; output still gets its carriage returns.

    It is put back as it was also if we are in the background by then, and nothing stops us meanwhile.
    """
    before = termios.tcgetattr(descriptor)
    main = threading.current_thread() is threading.main_thread()  # nobody else may set what a signal does
    numbers = (signal.SIGTTOU, signal.SIGTTIN) if main else ()
    stops = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        tty.setraw(descriptor)
        mode = termios.tcgetattr(descriptor)
        mode[1] |= termios.OPOST | termios.ONLCR
        termios.tcsetattr(descriptor, termios.TCSADRAIN, mode)
        yield
    finally:
        with contextlib.suppress(termios.error):  # it is gone
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        for number, handler in stops.items():
            signal.signal(number, handler)


async def attach(path: Path, on_escape: Callable[[], None], write: Callable[[bytes], None] | None = None) -> None:
    """Connects our terminal to the console's socket until the socket closes or this is cancelled.

    Without a terminal on standard input that is ours (`own_terminal`), the console is only shown. `on_escape` is called
    when the user asks for the end. Raises `EnvironmentProblem` if the socket cannot be reached.
    """
    output = write or write_stdout
    with os_error(f"cannot connect to the console {path}"):
        reader, writer = await asyncio.open_unix_connection(str(path))
    loop = asyncio.get_running_loop()
    source = own_terminal()
    filter_ = EscapeFilter()

    def typed() -> None:
        assert source is not None
        data = b""
        with contextlib.suppress(OSError):  # it is gone, or we are in the background now
            data = os.read(source, 4096)
        if not data:
            loop.remove_reader(source)
            return
        out, leave = filter_.feed(data)
        if out and writer.transport.get_write_buffer_size() < MOST_TYPED:  # else the guest does not read its console
            writer.write(out)
        if leave:
            on_escape()

    with contextlib.ExitStack() as stack:
        stack.callback(writer.close)
        if source is not None:
            stack.enter_context(raw_terminal(source))
            loop.add_reader(source, typed)
            stack.callback(loop.remove_reader, source)
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                output(data)


def write_stdout(data: bytes) -> None:
    """Show what came from the guest, as it is."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
