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
HELP = "Ctrl-] then q ends the VM, z suspends this command, Ctrl-] twice sends one"
_LOOK = 0.5
"""Seconds between looks whether the terminal is ours again, after another job had it."""


class EscapeFilter:
    """Takes typed bytes and separates what the guest gets from the escape sequences.

    ``Ctrl-] q`` asks for the end, ``Ctrl-] z`` sets `suspend`; ``Ctrl-] Ctrl-]`` is one Ctrl-] for the guest; any other
    key after Ctrl-] is dropped with it.
    """

    def __init__(self) -> None:
        self._escaped = False
        self.suspend = False

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Returns the bytes for the guest and whether the end was asked for."""
        out = bytearray()
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte in b"qQ":
                    return bytes(out), True
                self.suspend = self.suspend or byte in b"zZ"
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


def another_jobs() -> bool:
    """Whether standard input is our terminal with another job in its foreground."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.tcgetpgrp(sys.stdin.fileno()) != os.getpgrp()
    return False


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


class Keys:
    """The terminal's keys, for as long as they are ours: while we are in its foreground, and run.

    Ctrl-Z is the guest's; ``Ctrl-] z`` stops us as Ctrl-Z does other programs, and so does a SIGTSTP from elsewhere:
    the terminal is as it was meanwhile. After a `bg` the console is shown only, and after an `fg` the keys are ours
    again.
    """

    def __init__(self, on_typed: Callable[[bytes], None]) -> None:
        """`on_typed` gets what was typed."""
        self._on_typed = on_typed
        self._loop = asyncio.get_running_loop()
        self._ours: contextlib.ExitStack | None = None
        self._look: asyncio.TimerHandle | None = None
        self._controlled = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Keys:
        if self._controlled:
            self._loop.add_signal_handler(signal.SIGTSTP, self.stop)
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()
        if self._controlled:
            self._loop.remove_signal_handler(signal.SIGTSTP)

    def stop(self, *, group: bool = False) -> None:
        """Stops this process, or its whole group as the terminal would, until a SIGCONT."""
        self._leave()
        self._loop.remove_signal_handler(signal.SIGTSTP)
        os.kill(0 if group else os.getpid(), signal.SIGTSTP)
        self._loop.call_soon(self._go_on)  # we go on: or never stopped, where no shell could let us

    def _go_on(self) -> None:
        self._loop.add_signal_handler(signal.SIGTSTP, self.stop)
        self._take()

    def _take(self) -> None:
        """Takes the keys, if they are ours; looks again in a moment if they are another job's."""
        if self._ours is not None:
            return
        source = own_terminal()
        if source is not None:
            self._ours = contextlib.ExitStack()
            self._ours.enter_context(raw_terminal(source))
            self._loop.add_reader(source, self._read, source)
            self._ours.callback(self._loop.remove_reader, source)
        elif another_jobs():
            self._look = self._loop.call_later(_LOOK, self._take)

    def _leave(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None
        ours, self._ours = self._ours, None
        if ours is not None:
            ours.close()

    def _read(self, source: int) -> None:
        data = b""
        with contextlib.suppress(OSError):  # it is gone, or we are in the background now
            data = os.read(source, 4096)
        if data:
            self._on_typed(data)
            return
        self._leave()
        if another_jobs():
            self._look = self._loop.call_later(_LOOK, self._take)


async def attach(
    path: Path,
    on_escape: Callable[[], None],
    write: Callable[[bytes], None] | None = None,
    *,
    read_only: bool = False,
) -> None:
    """Connects our terminal to a console's socket until the socket closes or this is cancelled.

    Without a terminal on standard input that is ours (`own_terminal`), the console is only shown. `on_escape` is called
    when the user asks for the end; `read_only`, the guest gets nothing else. Raises `EnvironmentProblem` if the socket
    cannot be reached.
    """
    output = write or write_stdout
    with os_error(f"cannot connect to the console {path}"):
        reader, writer = await asyncio.open_unix_connection(str(path))
    filter_ = EscapeFilter()

    def typed(data: bytes) -> None:
        out, leave = filter_.feed(data)
        # Else the guest does not read its console.
        if out and not read_only and writer.transport.get_write_buffer_size() < MOST_TYPED:
            writer.write(out)
        if filter_.suspend:
            filter_.suspend = False
            keys.stop(group=True)
        if leave:
            on_escape()

    try:
        with Keys(typed) as keys, contextlib.suppress(OSError):
            while data := await reader.read(65536):
                output(data)
    finally:
        writer.close()


def write_stdout(data: bytes) -> None:
    """Show what came from the guest, as it is."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
