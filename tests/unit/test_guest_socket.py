"""The host's way to a port of a guest: the word that is said first, its answers, and ssh as who asks."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmbus.errors import EnvironmentProblem
from vmbus.vm.guest_socket import connect_guest, proxy_command


@contextmanager
def guest(path: Path, answer: bytes, asked: list[bytes]) -> Iterator[None]:
    """Something at `path` that answers one connection, as the provider does, and then is its guest."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            end, _ = listener.accept()
            with end:
                asked.append(end.recv(100))
                end.sendall(answer)
                if answer.startswith(b"OK"):
                    asked.append(end.recv(100))

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join(10)
        assert not thread.is_alive()


def test_what_follows_the_answer_is_the_guests(tmp_path: Path) -> None:
    asked: list[bytes] = []
    with guest(tmp_path / "s", b"OK 1073741824\nSSH-2.0", asked), connect_guest(str(tmp_path / "s"), 22) as end:
        assert end.recv(100) == b"SSH-2.0"
        end.sendall(b"hello")
    assert asked == [b"CONNECT 22\n", b"hello"]


@pytest.mark.parametrize("answer", [b"", b"NO\n", b"x" * 100, b"O"])
def test_a_refusal_is_said(tmp_path: Path, answer: bytes) -> None:
    with (
        guest(tmp_path / "s", answer, []),
        pytest.raises(EnvironmentProblem, match="nobody listens at port 22"),
    ):
        connect_guest(str(tmp_path / "s"), 22)
    with pytest.raises(EnvironmentProblem, match="cannot connect"):
        connect_guest(str(tmp_path / "none"), 22)


def test_the_program_hands_the_connection_over(tmp_path: Path) -> None:
    asked: list[bytes] = []
    here, there = socket.socketpair()
    with guest(tmp_path / "s", b"OK 9\nwelcome", asked), here:
        argv = [sys.executable, "-m", "vmbus.vm.guest_socket", str(tmp_path / "s"), "22"]
        with there:
            subprocess.run(argv, stdout=there, check=True, timeout=30, env={"PYTHONPATH": ":".join(sys.path)})
        data, descriptors, _, _ = socket.recv_fds(here, 1, 1)
        assert data == b"\0"
        with socket.socket(fileno=descriptors[0]) as end:
            assert end.recv(100) == b"welcome"
            end.sendall(b"bye")
    assert asked[1] == b"bye"
    (proxy,) = [word for word in proxy_command("/a b/python", "/run/x.sock", 22) if word.startswith("ProxyCommand=")]
    assert proxy == 'ProxyCommand="/a b/python" -m vmbus.vm.guest_socket "/run/x.sock" 22'
