"""The first process of a host: ``python -m vmbus.testbed.init --control FD OPTION...``.

It makes the host's namespaces and lives in them as process 1: when it ends, the kernel ends every process of the host
and takes its network and its mounts apart. It ends when its owner does, since FD (a SOCK_SEQPACKET socket, one JSON
message a packet) is then closed at the other end.

Messages to the owner: ``{"pid": N}`` (process 1 as seen from outside), ``{"ready": true}``, then one answer for each
request: ``{"result": {...}}`` (with a descriptor, where a socket was asked for) or ``{"error": MESSAGE}``. What the
machine does not let us make is answered with ``{"forbidden": MESSAGE}``.

--user PID joins the user namespace of that process, so that two hosts of one unprivileged user share one; 0 makes a new
one. --hide DIR puts a fresh tmpfs over a directory; --keep PATH leaves a file or directory below such a one visible.
Both may be given more than once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
from pathlib import Path
from typing import Any

import click

from vmbus.errors import VmbusError
from vmbus.testbed import namespaces
from vmbus.testbed.network import Interface, Network, NoTap

MESSAGE_LIMIT = 1 << 16


@click.command()
@click.option("--control", type=int, required=True)
@click.option("--user", type=int)
@click.option("--hide", "hidden", multiple=True, type=click.Path(path_type=Path))
@click.option("--keep", "kept", multiple=True, type=click.Path(path_type=Path))
def main(control: int, user: int | None, hidden: tuple[Path, ...], kept: tuple[Path, ...]) -> None:
    """See the module."""
    peer = socket.socket(fileno=control)
    peer.set_inheritable(False)
    try:
        _separate(user)
        child = namespaces.fork_tied()
        if child == 0:
            _furnish(hidden, kept)
            network = Network()
    except OSError as error:
        _send(peer, {"forbidden": error.strerror or str(error)})
        os._exit(1)
    except VmbusError as error:
        _send(peer, {"forbidden": str(error)})
        os._exit(1)
    if child:
        _send(peer, {"pid": child})
        peer.close()
        namespaces.exit_as(os.waitpid(child, 0)[1])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # process 1 inherits orphans: the kernel shall bury them
    _send(peer, {"ready": True})
    _serve(peer, network)


def _separate(user: int | None) -> None:
    """New namespaces; the process namespace is for our children only."""
    parent = os.getppid()
    if user == 0:
        own, group = os.getuid(), os.getgid()
        namespaces.unshare(namespaces.CLONE_NEWUSER, "user namespace")
        namespaces.stay_visible()
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{own} {own} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    elif user is not None:
        descriptor = os.open(f"/proc/{user}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        namespaces.enter(descriptor, "the other host's user namespace")
        os.close(descriptor)
        namespaces.stay_visible()
    namespaces.die_with_parent()
    if os.getppid() != parent:
        raise OSError("the owner ended")
    namespaces.unshare(namespaces.CLONE_NEWNET, "network namespace")
    namespaces.unshare(namespaces.CLONE_NEWNS, "mount namespace")
    namespaces.unshare(namespaces.CLONE_NEWPID, "process namespace")


def _furnish(hidden: tuple[Path, ...], kept: tuple[Path, ...]) -> None:
    """The host's own /proc, and its own empty directories, with what is kept put back into them."""
    namespaces.mount("none", "/", "", namespaces.MS_REC | namespaces.MS_PRIVATE)
    namespaces.mount("proc", "/proc", "proc")
    descriptors = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in kept}
    for path in hidden:
        if path.is_dir():  # one may lie in another that is hidden already
            mode = stat.S_IMODE(path.stat().st_mode)
            flags = namespaces.MS_NOSUID | namespaces.MS_NODEV
            namespaces.mount("tmpfs", str(path), "tmpfs", flags, f"mode={mode:o}")
    for path, descriptor in descriptors.items():
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                path.mkdir()
            else:
                path.touch()
            namespaces.mount(f"/proc/self/fd/{descriptor}", str(path), "", namespaces.MS_BIND | namespaces.MS_REC)
        os.close(descriptor)


def _serve(peer: socket.socket, network: Network) -> None:
    """Answers requests until the owner is gone."""
    interface: Interface | None = None
    while True:
        data, descriptors, _, _ = socket.recv_fds(peer, MESSAGE_LIMIT, 1)
        if not data:
            os._exit(0)
        try:
            request: dict[str, Any] = json.loads(data)
            command = request.pop("command")
            result: dict[str, int] = {}
            if command == "socket":
                _send(peer, {"result": result}, _socket(**request))
                continue
            if command == "plug":
                network.plug(descriptors[0])
            elif command == "configure":
                network.configure(**request)
                interface = network.interface()
            elif interface is None:
                raise VmbusError(f"{command!r} before there is a link")
            elif command == "shape":
                interface.shape(**request)
            else:
                interface.check()
                result = interface.counters()
            _send(peer, {"result": result})
        except NoTap as error:
            _send(peer, {"forbidden": str(error)})
        except (VmbusError, OSError) as error:
            _send(peer, {"error": str(error)})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def _socket(address: str | None = None, port: int = 0) -> socket.socket:
    """A TCP socket of this host's, wherever it is used: it listens at the address, if there is one."""
    return socket.socket() if address is None else socket.create_server((address, port))


def _send(peer: socket.socket, message: dict[str, Any], end: socket.socket | None = None) -> None:
    data = json.dumps(message).encode()
    try:
        if end is None:
            peer.sendall(data)
        else:
            with end:
                socket.send_fds(peer, [data], [end.fileno()])
    except OSError:
        os._exit(1)  # the owner is gone, and so are we


if __name__ == "__main__":
    main()
