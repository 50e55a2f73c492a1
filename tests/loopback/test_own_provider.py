"""A provider of `new-provider` in a real server: started by its description, and restored only when that is allowed."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support import pace
from vmbus.cli.new_provider import create
from vmbus.errors import UsageError
from vmbus.providers import provider_class
from vmbus.providers.loading import ALLOW_VARIABLE, PATH_VARIABLE
from vmbus.testkit.loopback.harness import LoopbackServer
from vmbus.transport.library import Library
from vmbus.vm.description import load_description
from vmbus_guest.driver import VmbusDriver

pytestmark = pytest.mark.loopback

KIND = "door_bell:DoorBell"


def test_an_own_provider_is_served_saved_and_restored(
    libvfio_user: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create("door_bell", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path))
    monkeypatch.delenv(ALLOW_VARIABLE, raising=False)
    description = load_description(tmp_path / "door_bell.toml").device
    server = LoopbackServer(description, libvfio_user)
    function = server.function()
    driver = VmbusDriver(function)
    notices: list[Any] = []
    replies: list[bytes] = []
    channel = driver.client_channel(sys.modules["door_bell"].INTERFACE_TYPE, name="door-bell")
    channel.set_process_packet_callbacks(lambda _, completion, payload: notices.append((completion, payload)))
    driver.enable(channel)

    def request(text: bytes) -> None:
        packet = channel.allocate_packet()
        packet.completion_routine = lambda packet, status, reply: replies.append(reply.rstrip(b"\0"))
        packet.send(text)

    for text in (b"one", b"two", b"three"):
        request(text)
    driver.run_until(lambda: len(replies) == 3 and len(notices) == 1, 10, "three answers and a notice")
    state = server.save()
    config = bytes.fromhex(server.command("pci")["config"])
    server.stop()
    try:
        with pytest.raises(UsageError, match=f"a snapshot may not choose the code that runs.*{ALLOW_VARIABLE}={KIND}"):
            LoopbackServer(description, libvfio_user, restore=state)
        monkeypatch.setenv(ALLOW_VARIABLE, KIND)
        assert provider_class(KIND, from_snapshot=True) is sys.modules["door_bell"].DoorBell
        server = LoopbackServer(description, libvfio_user, restore=state)
        function.reconnect(server.socket_path, config)
        assert server.command("restore-finish")["packets"] == {"queued": 0, "sent": 1}
        for completion, _ in notices:
            completion.complete()
        request(b"four")
        driver.run_until(lambda: len(replies) == 4, 10, "the fourth answer")
        assert replies == [b"ONE", b"TWO", b"THREE", b"FOUR"]
        deadline = time.monotonic() + pace.seconds(10)
        while (status := server.command("status")["providers"]["door-bell"])["acknowledged"] != 3:
            assert time.monotonic() < deadline, status
        assert status == {"served": 4, "acknowledged": 3}
    finally:
        driver.close(graceful=False)
        server.stop()
