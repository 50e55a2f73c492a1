"""A connection of the host's to a port of a guest, through a `vsock` provider's socket (docs/provider-vsock.md).

As a program it is what ssh starts as a ProxyCommand with ProxyUseFdpass: `python -m vmbus.vm.guest_socket PATH PORT`
gives ssh the connection, and ends.
"""

from __future__ import annotations

import socket
import sys

from vmbus.errors import EnvironmentProblem

ANSWER_TIMEOUT = 30.0
"""Seconds until the guest has taken the connection."""
_ANSWER_BYTES = 64


def connect_guest(path: str, port: int, timeout: float = ANSWER_TIMEOUT) -> socket.socket:
    """Return a connection to `port` of the guest behind the socket at `path`.

    Raises EnvironmentProblem if there is no such socket, or nobody listens in the guest.
    """
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        end.settimeout(timeout)
        end.connect(path)
        end.sendall(f"CONNECT {port}\n".encode())
        answer = b""
        # Byte by byte: what follows the line is the guest's.
        while not answer.endswith(b"\n") and len(answer) < _ANSWER_BYTES and (byte := end.recv(1)):
            answer += byte
        if not answer.startswith(b"OK ") or not answer.endswith(b"\n"):
            raise EnvironmentProblem(f"nobody listens at port {port} of the guest behind {path}")
        end.settimeout(None)
    except OSError as error:
        end.close()
        said = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise EnvironmentProblem(f"cannot connect to port {port} of the guest behind {path}: {said}") from error
    except BaseException:
        end.close()
        raise
    return end


def proxy_command(python: str, path: str, port: int) -> list[str]:
    """What ssh needs to be told for a connection to go this way: options of its command line."""
    return [
        *("-o", f'ProxyCommand="{python}" -m vmbus.vm.guest_socket "{path}" {port}', "-o", "ProxyUseFdpass=yes"),
        # Nobody but this user could be at the other end, and each VM has a key of its own.
        *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"),
    ]


def main() -> None:
    """Hand a connection to the program at our standard output, a socket."""
    try:
        end = connect_guest(sys.argv[1], int(sys.argv[2]))
    except EnvironmentProblem as error:
        sys.exit(f"error: {error}")
    with end, socket.socket(fileno=1) as asker:
        socket.send_fds(asker, [b"\0"], [end.fileno()])


if __name__ == "__main__":
    main()
