"""`vmbus serve` for somebody else's QEMU: by a path, by a descriptor, started by systemd; what it says of itself."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support import pace
from support.installed import CHECKOUT
from vmbus.cli.serve import CAPABILITIES, find_device
from vmbus.errors import UsageError
from vmbus.kmcl.status import Status
from vmbus.providers import PROVIDERS
from vmbus.testkit.loopback.function import LoopbackFunction
from vmbus.testkit.loopback.harness import describe
from vmbus.transport.library import Library
from vmbus.util.activation import handed_over
from vmbus.util.listening import inherited
from vmbus.vm.description import load_description
from vmbus.wire.workload import ECHO_TYPE, echo_request
from vmbus_guest.driver import VmbusDriver

SHARE = CHECKOUT / "share"
UNITS = SHARE / "vmbus-device" / "systemd"
AS_SYSTEMD_DOES = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Server:
    """`vmbus serve`; `before`: arguments of the interpreter that starts it."""

    def __init__(
        self,
        library: Library,
        *arguments: str,
        description: str = "echo",
        before: Sequence[str] = ("-m", "vmbus.cli.serve"),
        descriptors: Sequence[int] = (),
        **environment: str,
    ) -> None:
        found = [path for path in sys.path if path]
        command = [sys.executable, *before, description, *arguments, "--libvfio-user", str(library.path)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=descriptors,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(found)} | environment,
        )

    def listening(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.end()
        return dict(json.loads(line))

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=pace.seconds(20))
        return self.process.returncode, errors

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def transact(path: Path) -> None:
    """A guest comes, has an answer, and leaves."""
    function = LoopbackFunction(path)
    with VmbusDriver(function) as driver:
        channel = driver.client_channel(ECHO_TYPE)
        driver.enable(channel)
        answers: list[int] = []
        packet = channel.allocate_packet()
        packet.completion_routine = lambda packet, status, reply: answers.append(status)
        packet.send(echo_request(0, b"hello", inline=True))
        driver.run_until(lambda: bool(answers), 10, "an echo")
    assert answers == [Status.SUCCESS]
    function.close()


def status_at(path: Path) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(pace.seconds(10))
        control.connect(str(path))
        control.sendall(b'{"id": 1, "command": "status"}\n')
        return dict(json.loads(control.makefile("rb").readline())["result"])


def test_plugin_serve_at_a_path_takes_one_qemu_after_the_other(libvfio_user: Library, tmp_path: Path) -> None:
    path = tmp_path / "vmbus.sock"
    with Server(libvfio_user, "--socket", str(path), before=("-m", "vmbus", "serve")) as server:
        control = tmp_path / "vmbus.sock.control"
        assert server.listening() == {"event": "listening", "socket": str(path), "control": str(control)}
        assert path.stat().st_mode & 0o777 == control.stat().st_mode & 0o777 == 0o600
        for _ in range(2):
            transact(path)
        assert status_at(control)["description"]["providers"][0]["name"] == "echo"
        server.process.send_signal(signal.SIGTERM)
        assert server.end()[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_plugin_serve_once_ends_with_its_qemu(libvfio_user: Library, tmp_path: Path) -> None:
    path = tmp_path / "vmbus.sock"
    with Server(libvfio_user, "--socket-path", str(path), "--once") as server:
        server.listening()
        transact(path)
        assert server.end()[0] == 0


@pytest.mark.parametrize("connected", [False, True], ids=["listening", "connected"])
def test_plugin_serve_by_a_descriptor(libvfio_user: Library, tmp_path: Path, connected: bool) -> None:
    path, control = tmp_path / "vfio.sock", tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        if connected:
            # As a manager of VMs does it: QEMU gets one end of a connection, the server the other.
            import threading

            guest = threading.Thread(target=transact, args=(path,))
            guest.start()
            given, _ = listener.accept()
        else:
            given = listener
        fd = given.fileno()
        with Server(libvfio_user, "--fd", str(fd), "--control", str(control), descriptors=[fd]) as server:
            server.listening()
            if connected:
                given.close()
                guest.join(pace.seconds(20))
                assert server.end()[0] == 0, "its only client has gone"
                return
            transact(path)
            transact(path)
            server.process.send_signal(signal.SIGTERM)
            assert server.end()[0] == 0
        assert path.exists(), "the socket's file belongs to whoever made it"
        assert not control.exists()


def test_plugin_serve_is_started_by_systemd(libvfio_user: Library, tmp_path: Path) -> None:
    paths = {"control": tmp_path / "control.sock", "vfio": tmp_path / "vfio.sock"}
    listeners = []
    for path in paths.values():
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(4)
        listeners.append(listener)
    try:
        # Descriptors 3 and 4, whatever they were: a child of ours that is to become the service puts them there.
        fds = [one.fileno() for one in listeners]
        moved = f"import os\nfor i, fd in enumerate({fds}): os.dup2(fd, 60 + i)\n"
        moved += "for i in range(2): os.dup2(60 + i, 3 + i, inheritable=True)\n"
        server = Server(
            libvfio_user,
            before=("-c", moved + AS_SYSTEMD_DOES, "-m", "vmbus.cli.serve"),
            descriptors=fds,
            LISTEN_FDS="2",
            LISTEN_FDNAMES="control:vfio",
        )
        with server:
            assert server.listening()["socket"] == str(paths["vfio"])
            transact(paths["vfio"])
            assert status_at(paths["control"])["connected"] is False
            server.process.send_signal(signal.SIGTERM)
            assert server.end()[0] == 0
        assert all(path.exists() for path in paths.values())
    finally:
        for listener in listeners:
            listener.close()


def test_plugin_serve_with_systemds_own_activation(libvfio_user: Library, tmp_path: Path) -> None:
    """The server is started when QEMU comes, and ends with it; the next one has a new one."""
    program = shutil.which("systemd-socket-activate")
    if program is None:
        return  # the test above has done the same without it
    path, control = tmp_path / "vfio.sock", tmp_path / "control.sock"
    command = [program, "-l", str(path), "--fdname=vfio", "-E", f"PYTHONPATH={os.pathsep.join(filter(None, sys.path))}"]
    command += [sys.executable, "-m", "vmbus.cli.serve", "echo", "--once", "--control", str(control)]
    process = subprocess.Popen([*command, "--libvfio-user", str(libvfio_user.path)], stderr=subprocess.PIPE, text=True)
    try:
        pace.until(path.exists, "the socket", 10)
        transact(path)
        _, errors = process.communicate(timeout=pace.seconds(20))
        assert process.returncode == 0, errors
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "one of --socket PATH, --fd N and a socket handed over by systemd is needed"),
        (("--socket", "a", "--fd", "3"), "and only one"),
        (("--fd", "77"), "descriptor 77 is not a socket that was handed over"),
    ],
)
def test_plugin_serve_says_what_is_wrong(
    libvfio_user: Library, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    with Server(libvfio_user, *arguments) as server:
        status, errors = server.end()
    assert status == UsageError.status and words in errors and "Traceback" not in errors


def test_plugin_serve_takes_no_other_descriptor(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET) as internet, socket.socket(socket.AF_UNIX) as idle:
        for one, words in ((internet, "not a unix stream socket"), (idle, "neither listens nor is connected")):
            with pytest.raises(UsageError, match=words):
                inherited(one.fileno())
            assert one.fileno() >= 0
            one.getsockname()  # it is still there


def test_plugin_serve_reads_what_systemd_says() -> None:
    ours = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "3", "LISTEN_FDNAMES": "vfio::vfio"}
    assert handed_over(ours) == {"vfio": 3, "unknown": 4, "vfio-2": 5} and not ours
    assert handed_over({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) == {}
    for variables in ({"LISTEN_PID": "x", "LISTEN_FDS": "1"}, {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "-1"}):
        with pytest.raises(UsageError, match="LISTEN_"):
            handed_over(dict(variables))


def test_plugin_a_description_is_a_name_a_vm_or_a_device(tmp_path: Path) -> None:
    device = load_description(CHECKOUT / "qemu_configs" / "demo.toml").device
    file = tmp_path / "device.json"
    file.write_bytes(device.to_json())
    for text in ("demo", str(CHECKOUT / "qemu_configs" / "demo.toml"), str(file)):
        assert find_device(text) == device
    assert [one.kind for one in describe("echo").providers] == ["echo"]


def test_plugin_capabilities_and_descriptor(tmp_path: Path) -> None:
    descriptor = json.loads((SHARE / "qemu" / "vfio-user" / "50-vmbus.json").read_text())
    assert set(descriptor) == {"description", "type", "binary", "tags"}
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    # A descriptor's path is relative to its file: a wheel does not know where it will be installed.
    assert descriptor["binary"] == "../../../bin/vmbus-serve" and "vmbus-serve" in project["project"]["scripts"]
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]["share"] == "share"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-m", "vmbus.cli.serve", "--print-capabilities"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=pace.seconds(30),
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    found = json.loads(done.stdout)
    ours = sorted(kind for kind, one in PROVIDERS.items() if one.__module__.startswith("vmbus."))  # not those of tests
    assert found == CAPABILITIES | {"providers": ours} and found["type"] == descriptor["type"]


def test_plugin_systemd_units_are_units(tmp_path: Path) -> None:
    for kind in ("service", "socket"):
        unit = configparser.ConfigParser(strict=False, interpolation=None)
        unit.optionxform = str  # type: ignore[assignment,method-assign]
        unit.read(UNITS / f"vmbus@.{kind}")
        assert unit.has_section(kind.capitalize())
        shutil.copy(UNITS / f"vmbus@.{kind}", tmp_path / f"vmbus@demo.{kind}")
        if kind == "service":
            words = unit["Service"]["ExecStart"].split()
            assert words[:3] == ["/usr/bin/env", "vmbus", "serve"]
            assert {word[2:] for word in words if word.startswith("--")} <= set(CAPABILITIES["options"])
        assert (UNITS / f"vmbus@.{kind}").read_text() in (CHECKOUT / "docs" / "plugin.md").read_text()
    if (program := shutil.which("systemd-analyze")) is not None:
        units = [str(tmp_path / f"vmbus@demo.{kind}") for kind in ("service", "socket")]
        done = subprocess.run([program, "verify", *units], capture_output=True, text=True, timeout=pace.seconds(60))
        assert done.returncode == 0 and "vmbus@demo" not in done.stderr, done.stderr
