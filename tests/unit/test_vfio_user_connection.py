"""Our own end of the socket: what waits, who may connect, when time is up."""

from __future__ import annotations

import os
import select
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmbus.errors import EnvironmentProblem
from vmbus.transport.connection import Look, Timer, Waiting, bound_blocking, look
from vmbus.transport.protocol import FLAG_NO_REPLY, TYPE_REPLY, Command, encode
from vmbus.util.listening import Listener


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


Pair = tuple[socket.socket, socket.socket]


def test_look_takes_nothing(pair: Pair) -> None:
    ours, theirs = pair
    assert look(ours).waiting is Waiting.NOTHING
    theirs.send(encode(1, 9, b"body"))
    assert look(ours) == look(ours) == Look(Waiting.COMPLETE, 20, 1)
    assert ours.recv(100) == encode(1, 9, b"body")
    assert look(ours).waiting is Waiting.NOTHING


@pytest.mark.parametrize("length", range(1, 20))
def test_look_waits_for_the_whole_message(pair: Pair, length: int) -> None:
    ours, theirs = pair
    message = encode(1, 9, b"body")
    theirs.send(message[:length])
    assert look(ours).waiting is Waiting.PARTIAL
    theirs.send(message[length:])
    assert look(ours) == Look(Waiting.COMPLETE, 20, 1)


def test_look_counts_messages_up_to_an_incomplete_or_broken_one(pair: Pair) -> None:
    ours, theirs = pair
    theirs.send(encode(1, 9, b"body") + encode(2, 13, b"", flags=FLAG_NO_REPLY) + encode(3, 9, b"longer")[:18])
    assert look(ours) == Look(Waiting.COMPLETE, 20, 2)
    theirs.send(encode(3, 9, b"longer")[18:])
    theirs.send(b"\xff" * 16)
    assert look(ours) == Look(Waiting.COMPLETE, 20, 3)


def test_look_at_a_long_message(pair: Pair) -> None:
    ours, theirs = pair
    message = encode(1, 10, bytes(60000))
    theirs.send(message[:30000])
    assert look(ours).waiting is Waiting.PARTIAL
    theirs.send(message[30000:])
    assert look(ours) == Look(Waiting.COMPLETE, 60016, 1)


def test_look_at_a_message_with_descriptors(pair: Pair) -> None:
    ours, theirs = pair
    theirs.send(encode(1, 9, b"body"))
    with open(os.devnull) as file:  # noqa: PTH123 (a descriptor to send)
        socket.send_fds(theirs, [encode(2, 2, bytes(32))], [file.fileno()])
    assert look(ours).messages >= 1
    ours.recv(20)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (procfs)
    assert look(ours) == Look(Waiting.COMPLETE, 48, 1, Command.DMA_MAP)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 (procfs)


@pytest.mark.parametrize(
    "header",
    [
        encode(1, 9, b"", flags=TYPE_REPLY),
        b"\1\0\1\0" + (15).to_bytes(4, "little") + bytes(8),
        b"\1\0\1\0" + ((1 << 20) + 33).to_bytes(4, "little") + bytes(8),
    ],
)
def test_a_header_that_is_no_request(pair: Pair, header: bytes) -> None:
    ours, theirs = pair
    theirs.send(header)
    assert look(ours).waiting is Waiting.BROKEN


@pytest.mark.parametrize("sent", [b"", b"abc"])
def test_hanging_up(pair: Pair, sent: bytes) -> None:
    ours, theirs = pair
    theirs.send(sent)
    theirs.close()
    assert look(ours).waiting is Waiting.CLOSED


def test_a_last_message_before_hanging_up_is_complete(pair: Pair) -> None:
    ours, theirs = pair
    theirs.send(encode(1, 9, b"body"))
    theirs.close()
    assert look(ours).waiting is Waiting.COMPLETE


def test_bounded_blocking(pair: Pair) -> None:
    ours, _ = pair
    bound_blocking(ours, 0.05)
    with pytest.raises(BlockingIOError):
        ours.recv(1)


def test_only_the_owner_can_connect(tmp_path: Path) -> None:
    path = tmp_path / "new" / "socket"
    listener = Listener(path, make_directory=True)
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not os.get_inheritable(listener.socket.fileno())
    assert listener.accept() is None
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(path))
        accepted = listener.accept()
        assert accepted is not None
        accepted.close()
    listener.close()
    assert not path.exists()


def test_a_stale_socket_is_replaced_and_what_is_somebodys_is_not(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    first = Listener(path)
    with pytest.raises(EnvironmentProblem, match="another process"):
        Listener(path)
    path.unlink()
    second = Listener(path)
    first.close()
    assert path.exists(), "it is another one's by now"
    second.close()
    path.write_text("precious")
    for wrong, why in ((path, "not a socket"), (path / "socket", "cannot listen"), (tmp_path / ("x" * 108), "107")):
        with pytest.raises(EnvironmentProblem, match=why):
            Listener(wrong, make_directory=True)
    assert path.read_text() == "precious"


def test_timer() -> None:
    timer = Timer()
    poll = select.poll()
    poll.register(timer.fd, select.POLLIN)
    assert not poll.poll(0)
    timer.set(0.01)
    assert poll.poll(5000)
    timer.set(None)
    assert not poll.poll(20)
    timer.set(-1)
    assert poll.poll(5000)
    timer.set(100)
    assert not poll.poll(0)
    timer.close()
    timer.close()


@pytest.mark.parametrize("command", [3, 16])
def test_commands_that_are_looked_into_come_alone(pair: Pair, command: int) -> None:
    ours, theirs = pair
    plain, watched = encode(1, 9, b"body"), encode(2, command, bytes(24))
    theirs.send(plain + plain + watched + plain)
    assert look(ours) == Look(Waiting.COMPLETE, 20, 2, 0)
    ours.recv(40)
    assert look(ours) == Look(Waiting.COMPLETE, 40, 1, command)
    ours.recv(40)
    assert look(ours) == Look(Waiting.COMPLETE, 20, 1, 0)
    ours.recv(20)
    theirs.send(encode(3, command, bytes(5000)))
    assert look(ours) == Look(Waiting.COMPLETE, 5016, 1, command)
