"""Services: who starts them, what they share, and that they outlive their host."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from vmbus.errors import UsageError
from vmbus.qemu.command_line import kernel_arguments
from vmbus.qemu.description import parse_description
from vmbus_guest.agent import Agent
from vmbus_guest.services import CATALOGUE, wanted_services
from vmbus_guest.services.service import Service
from vmbus_guest.testdrivers.context import Parameters

pytestmark = pytest.mark.unit

DESCRIPTION = """
name = "one"
[guest]
services = ["integration", "block"]
kernel_arguments = ["vmbus.services=block,more", "loglevel=3"]
[device]
name = "vmbus0"
[[device.providers]]
kind = "echo"
name = "echo"
instance = "6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7a01"
"""


def test_the_kernels_command_line_says_which() -> None:
    assert wanted_services("console=ttyS0 quiet") == []
    assert wanted_services("a vmbus.services=integration,block b vmbus.services=block,,x\n") == [
        "integration",
        "block",
        "x",
    ]
    line = kernel_arguments(parse_description(DESCRIPTION, "test"))
    assert "vmbus.services=integration,block " in line
    assert wanted_services(line) == ["integration", "block", "more"]
    with pytest.raises(UsageError, match="services"):
        parse_description(DESCRIPTION.replace('"block"]', '"a b"]'), "test")


def test_a_name_stands_for_an_object_without_parameters() -> None:
    parameters = Parameters({"services": ["integration", {"service": "block", "size": 1}]})
    assert parameters.objects("services", "service") == [{"service": "integration"}, {"service": "block", "size": 1}]
    with pytest.raises(UsageError, match="list of objects"):
        Parameters({"services": ["integration"]}).objects("services")


def test_every_service_of_the_catalogue_is_one() -> None:
    for name, entry in CATALOGUE.items():
        kind = entry.load()
        assert issubclass(kind, Service) and kind.name == name and kind.lasting and entry.summary


STAND_IN = """
import os, signal, sys, time
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
if os.path.exists({crash!r}):
    os.remove({crash!r})
    sys.exit(3)
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
while True:
    signal.pause()
"""


def test_the_agent_starts_them_and_starts_them_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmbus_guest.agent.RESTART_DELAYS", (0.01, 0.1))
    log, crash = tmp_path / "log", tmp_path / "crash"
    script = tmp_path / "driver.py"
    script.write_text(STAND_IN.format(log=str(log), crash=str(crash)))
    crash.touch()
    ours, theirs = socket.socketpair()
    off = threading.Event()
    agent = Agent(
        theirs.detach(),
        poweroff=off.set,
        services=["integration"],
        runner=(sys.executable, "-I", "-S", str(script)),
    )
    thread = threading.Thread(target=agent.serve, daemon=True)
    thread.start()

    def starts() -> int:
        return len(log.read_text().splitlines()) if log.exists() else 0

    def until(count: int) -> None:
        deadline = time.monotonic() + 20
        while starts() < count:
            assert time.monotonic() < deadline, f"{starts()} starts, not {count}"
            time.sleep(0.01)

    until(2)  # the first one has failed
    assert log.read_text().splitlines()[0] == 'services --parameters {"services": ["integration"]}'
    ours.sendall(b'{"id": 1, "command": "stop", "arguments": {"job": 2}}\n')
    ours.sendall(b'{"id": 2, "command": "wait", "arguments": {"job": 2}}\n')
    ours.settimeout(20)
    received = b""
    while b'"id":2' not in received:
        received += ours.recv(65536)
    ours.sendall(b'{"id": 3, "command": "poweroff"}\n')
    assert off.wait(20)
    thread.join(20)
    assert starts() == 2, "services that were stopped stay stopped"
    ours.close()
    assert not os.path.exists(crash)  # noqa: PTH110 - as the script looks
