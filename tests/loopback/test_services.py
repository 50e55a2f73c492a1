"""Outside resources of a provider, and its work on other threads, on a real server."""

import asyncio
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support import pace
from support.outside import OUTSIDE_TYPE, OutsideProvider
from support.pace import until
from vmbus import providers
from vmbus.device.description import DeviceDescription
from vmbus.device.device import Device
from vmbus.errors import EnvironmentProblem, StateError, UsageError, WaitTimeout
from vmbus.server.services import Services
from vmbus.server.session import Session
from vmbus.server.timers import Timers
from vmbus.testkit.loopback.function import LoopbackFunction
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.testkit.loopback.pair import DriverSide
from vmbus.transport.library import Library
from vmbus.transport.migration import MigrationRefused, MigrationState
from vmbus_guest.driver import VmbusDriver


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(providers.PROVIDERS, "outside", OutsideProvider)
    yield
    for one in OutsideProvider.alive:
        one.go.set()
    OutsideProvider.alive.clear()
    OutsideProvider.fail.clear()


class Guest:
    """A driver with the provider's channel open."""

    def __init__(self, server: LoopbackServer) -> None:
        self.function: LoopbackFunction = server.function()
        self.driver = VmbusDriver(self.function)
        self.end = DriverSide(self.driver).open(OUTSIDE_TYPE, ring_pages=16, name="outside")
        self.send = self.end.send

    def request(self, text: bytes) -> bytes:
        return self.end.request(text).rstrip(b"\0")

    def close(self) -> None:
        self.driver.close(graceful=False)


def provider_of(server: LoopbackServer) -> OutsideProvider:
    found: Any = server.server.providers[0]
    assert isinstance(found, OutsideProvider)
    return found


def description(path: Path, **options: Any) -> DeviceDescription:
    return describe("outside", outside={"path": str(path), **options})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file that the provider owns."""
    found = tmp_path / "data"
    found.write_bytes(b"content")
    return found


def locked(path: Path) -> bool:
    """Whether somebody has the file locked."""
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def test_resources_are_owned_only_while_the_device_runs(libvfio_user: Library, path: Path) -> None:
    with LoopbackServer(description(path), libvfio_user) as server:
        provider = provider_of(server)
        assert locked(path) and provider.calls == ["start", "activate"]
        guest = Guest(server)
        assert guest.request(b"read") == b"content"
        assert guest.request(b"raise") == b"ZeroDivisionError"
        provider.outside.send(b"one")
        until(lambda: provider.heard == [b"one"], "the loop to read from the provider's socket")
        server.command("pause")
        assert not locked(path)
        provider.outside.send(b"two")  # left for whoever runs the device next
        server.command("status")
        assert provider.heard == [b"one"]
        server.command("resume")
        assert locked(path)
        until(lambda: provider.heard == [b"one", b"two"], "what came during the pause")
        assert provider.calls == ["start", "activate", "started", "deactivate", "activate", "started"]
        assert guest.request(b"read") == b"content"
        # A call that raises harms nobody else.
        provider.outside.send(b"bad")
        assert guest.request(b"other") == b"other"
        guest.close()
    assert not locked(path) and provider.calls[-1] == "stop"


def test_a_snapshot_has_the_files_and_a_restore_uses_a_copy(libvfio_user: Library, path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"as saved")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    server = LoopbackServer(description(path), libvfio_user)
    guest = Guest(server)
    state = server.save(snapshot)
    assert {one.name: one.read_bytes() for one in snapshot.iterdir()} == {"file.outside.data": b"as saved"}
    config = bytes.fromhex(server.command("pci")["config"])
    server.command("resume")
    path.write_bytes(b"and then changed")
    # Started beside the one that still runs: nothing is taken before the restore is finished.
    restored = LoopbackServer(description(path), libvfio_user, restore=state, files=snapshot)
    assert provider_of(restored).calls == ["start"]
    server.stop()
    try:
        guest.function.reconnect(restored.socket_path, config)
        restored.command("restore-finish")
        assert provider_of(restored).calls == ["start", "activate", "started"]
        assert guest.request(b"read") == b"as saved"
        path.write_bytes(b"a new life")
        assert (snapshot / "file.outside.data").read_bytes() == b"as saved"
    finally:
        guest.close()
        restored.stop()


def test_files_that_nothing_takes_along_fail_the_save(libvfio_user: Library, path: Path, tmp_path: Path) -> None:
    with LoopbackServer(description(path), libvfio_user) as server:
        server.command("pause")
        with pytest.raises(UsageError, match="belong to the device's state, and nothing takes them along"):
            server.command("save", path=str(tmp_path / "state"))
        server.command("resume")
    with LoopbackServer(description(path, snapshot=False), libvfio_user) as server:
        server.save()


def test_a_provider_that_cannot_be_activated(libvfio_user: Library, path: Path) -> None:
    with LoopbackServer(description(path, snapshot=False), libvfio_user) as server:
        guest = Guest(server)
        state = server.save()
        config = bytes.fromhex(server.command("pci")["config"])
        # At a resume: the server stays paused, and resume can be tried again.
        OutsideProvider.fail.add("activate")
        with pytest.raises(EnvironmentProblem, match=r"provider 'outside' .* could not take over"):
            server.command("resume")
        assert server.command("status")["phase"] == "paused"
        OutsideProvider.fail.clear()
        server.command("resume")
        assert guest.request(b"read") == b"content"
        # At a power-on: there is no server. Here the file is locked by the one that runs.
        with pytest.raises(EnvironmentProblem, match="could not take over"):
            LoopbackServer(description(path), libvfio_user)
        # At a restore: it fails, and no channel is started.
        with LoopbackServer(description(path, snapshot=False), libvfio_user, restore=state) as second:
            guest.function.reconnect(second.socket_path, config)
            with pytest.raises(EnvironmentProblem, match="could not take over"):
                second.command("restore-finish")
            assert second.command("status")["phase"] == "restoring"
            assert "started" not in provider_of(second).calls
            guest.close()
        assert locked(path)


def test_a_destination_owns_nothing_before_the_source_gave_it_up(
    libvfio_user: Library, path: Path, tmp_path: Path
) -> None:
    """The steps of a live migration, with a file that both hosts share; docs/migration.md has who owns it when."""
    shared = description(path, snapshot=False)
    state = tmp_path / "state"
    source = LoopbackServer(shared, libvfio_user)
    destination = LoopbackServer(shared, libvfio_user, awaiting=True)
    try:
        guest = Guest(source)
        source.command("pause")
        report = source.command("save", path=str(state))
        config = bytes.fromhex(source.command("pci")["config"])
        destination.command("load", path=str(state), sha256=report["sha256"])
        assert not locked(path) and "activate" not in provider_of(destination).calls
        # It is given up: nobody has anything to wait for.
        source.command("resume")
        assert locked(path) and guest.request(b"read") == b"content"
        # Again, and this time it goes on at the destination, up to a source that wants it back.
        source.command("pause")
        state.unlink()
        report = source.command("save", path=str(state))
        destination.stop()
        destination = LoopbackServer(shared, libvfio_user, awaiting=True)
        destination.command("load", path=str(state), sha256=report["sha256"])
        guest.function.reconnect(destination.socket_path, config)
        destination.command("restore-finish")
        assert provider_of(destination).calls[-2:] == ["activate", "started"]
        with pytest.raises(EnvironmentProblem, match="could not take over"):
            source.command("resume", seconds=0.2)
        assert source.command("status")["phase"] == "paused"
        end = threading.Timer(0.2, destination.stop)
        end.start()
        source.command("resume", seconds=20)
        end.join()
        assert source.command("status")["phase"] == "running" and locked(path)
        guest.function.close()
    finally:
        destination.stop()
        source.stop()


def test_a_resume_that_waits_for_resources_gives_way_to_another(libvfio_user: Library, path: Path) -> None:
    with LoopbackServer(description(path, snapshot=False), libvfio_user) as server:
        server.command("pause")
        OutsideProvider.fail.add("activate")
        with ThreadPoolExecutor() as threads:
            first = threads.submit(server.command, "resume", seconds=20)
            until(lambda: provider_of(server).calls.count("activate") > 2, "several tries")
            assert not locked(path)
            OutsideProvider.fail.clear()
            first.result(10)
        assert server.command("status")["phase"] == "running" and locked(path)


def test_a_provider_that_hangs_in_deactivate_fails_the_pause(
    libvfio_user: Library, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the main thread, where the bound works: so with the life alone."""
    monkeypatch.setattr("vmbus.server.session._DEACTIVATE_SECONDS", 0.1)
    loop = asyncio.new_event_loop()
    life = Session(description(path), Device(lambda: None, lambda: None), Timers(loop), Services(loop))
    life.build(from_snapshot=False)
    life.activate()
    monkeypatch.setattr(OutsideProvider, "deactivate", lambda _: time.sleep(10))
    with pytest.raises(WaitTimeout, match="the providers to give up their outside resources; it was interrupted in"):
        life.deactivate()
    monkeypatch.undo()
    life.activate()
    life.end()
    loop.close()
    assert not locked(path)


def transition(server: LoopbackServer, *states: MigrationState) -> None:
    """What a client's requests lead to, without a library that has them."""
    for state in states:
        server.on_loop(lambda state=state: server.server.driven.transition(state))


def test_a_client_that_drives_the_device_stops_it_without_resources(libvfio_user: Library, path: Path) -> None:
    shared = description(path, snapshot=False)
    with LoopbackServer(shared, libvfio_user) as server:
        guest = Guest(server)
        provider = provider_of(server)
        # Work under way is waited for, with a bound, and what is held goes on if it is in vain.
        server.server.driven.stop_seconds = 0.2
        assert guest.request(b"orphan") == b"orphan"
        with pytest.raises(MigrationRefused, match=r"work that providers have done .*; the device runs on"):
            transition(server, MigrationState.STOP)
        assert locked(path) and server.command("status")["phase"] == "running"
        server.server.driven.stop_seconds = 10
        threading.Timer(0.1, provider.go.set).start()
        transition(server, MigrationState.STOP)
        assert "orphan done" in provider.calls and provider.calls[-1] == "deactivate" and not locked(path)
        # Back again; a provider that cannot take its resources leaves the device stopped.
        OutsideProvider.fail.add("activate")
        with pytest.raises(MigrationRefused, match="could not take over"):
            transition(server, MigrationState.RUNNING)
        assert server.command("status")["phase"] == "driven"
        OutsideProvider.fail.clear()
        transition(server, MigrationState.RUNNING)
        assert locked(path) and guest.request(b"read") == b"content"
        # The way to another server.
        transition(server, MigrationState.PRE_COPY, MigrationState.STOP_COPY)
        driven = server.server.driven
        data = server.on_loop(lambda: driven.read_data(1 << 20))
        transition(server, MigrationState.STOP)
        config = bytes.fromhex(server.command("pci")["config"])
        with LoopbackServer(shared, libvfio_user) as other:
            assert locked(path)
            transition(other, MigrationState.STOP, MigrationState.RESUMING)
            other.on_loop(lambda: other.server.driven.write_data(data))
            transition(other, MigrationState.STOP)
            assert not locked(path)
            guest.function.reconnect(other.socket_path, config)
            # The client has left with the state: the device may live elsewhere, and what it owned is not taken again.
            until(lambda: server.command("status")["phase"] == "paused", "the source to see its client go")
            assert not locked(path)
            # Back at the start, as a client that leaves before its migration has ended finds it.
            until(lambda: other.command("status")["phase"] == "driven", "the destination to be driven")
            transition(other, MigrationState.RUNNING)
            assert provider_of(other).calls[-2:] == ["activate", "started"] and locked(path)
            assert guest.request(b"read") == b"content"
            guest.close()


def test_files_that_the_client_does_not_take_along_fail_its_save(libvfio_user: Library, path: Path) -> None:
    with LoopbackServer(description(path), libvfio_user) as server:
        with pytest.raises(MigrationRefused, match="the client does not take them along"):
            transition(server, MigrationState.PRE_COPY, MigrationState.STOP_COPY)
        assert server.command("status")["phase"] == "running" and locked(path)


def test_a_life_that_is_discarded_gives_its_files_to_the_next(
    libvfio_user: Library, path: Path, tmp_path: Path
) -> None:
    """A revert: the copy that belongs to the checkpoint takes the place of what became of the file."""
    directory = tmp_path / "checkpoint"
    path.write_bytes(b"as saved")
    directory.mkdir()
    state = directory / "state"
    with LoopbackServer(description(path), libvfio_user) as server:
        guest = Guest(server)
        server.command("pause")
        report = server.command("save", path=str(state), files=str(directory))
        assert report["files"] == {"file.outside.data": 8}
        config = bytes.fromhex(server.command("pci")["config"])
        for text in (b"another life", b"and another"):
            server.command("resume")
            path.write_bytes(text)
            with pytest.raises(UsageError, match="field 'files'"):
                server.command("load", path=str(state), sha256=report["sha256"], files=7)
            server.command("load", path=str(state), sha256=report["sha256"], files=str(directory), check=True)
            assert locked(path), "a check takes nothing from the present life"
            server.command("pause")
            ram = bytes(guest.function._ram)
            guest.function.reset()
            guest.function._ram[:] = ram
            server.command("load", path=str(state), sha256=report["sha256"], files=str(directory))
            assert not locked(path) and path.read_bytes() == text
            guest.function.replay(config)
            server.command("restore-finish")
            assert locked(path) and path.read_bytes() == b"as saved"
            server.command("pause")
        server.command("resume")
        # Once, at the end: the guest's own memory does not go back in this test, so its rings must not have moved on.
        assert guest.request(b"read") == b"as saved"
        guest.close()


def test_a_pause_waits_for_work_and_is_bounded(libvfio_user: Library, path: Path) -> None:
    with LoopbackServer(description(path), libvfio_user) as server:
        guest = Guest(server)
        provider = provider_of(server)
        assert guest.request(b"orphan") == b"orphan"  # its work goes on
        with pytest.raises(WaitTimeout, match=r"work that providers have done on other threads to end .*'outside': 1"):
            server.command("pause", seconds=0.05)
        assert server.command("status")["phase"] == "running" and locked(path)
        with pytest.raises(WaitTimeout, match="work that providers have done"):
            server.command("offer", provider={"kind": "echo", "name": "echo", "instance": "0" * 31 + "1"})
            server.command("rescind", name="outside", seconds=0.05)
        assert guest.request(b"read") == b"content"
        stay = guest.send(b"stay")
        guest.driver.step(0.01)
        threading.Timer(0.1, provider.go.set).start()
        server.command("pause", seconds=10)
        assert provider.calls[-1] == "deactivate" and "orphan done" in provider.calls
        server.command("resume")
        assert stay.wait().rstrip(b"\0") == b"went"
        server.command("rescind", name="outside", seconds=0.2)  # the guest does not look, so it releases nothing
        assert provider.calls[-2:] == ["deactivate", "stop"] and not locked(path)
        guest.close()


def test_sabotage_a_pause_that_does_not_wait_gives_files_up_under_work(
    libvfio_user: Library, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def at_once(*_: object) -> None:
        pass

    with LoopbackServer(description(path), libvfio_user) as server:
        guest = Guest(server)
        provider = provider_of(server)
        assert guest.request(b"orphan") == b"orphan"
        monkeypatch.setattr(server.server.services, "idle", at_once)
        server.command("pause")
        assert provider.calls[-1] == "deactivate" and "orphan done" not in provider.calls
        provider.go.set()
        server.command("resume")
        guest.close()


def test_a_resume_calls_a_pause_off_that_waits_for_work(libvfio_user: Library, path: Path) -> None:
    with LoopbackServer(description(path), libvfio_user) as server:
        guest = Guest(server)
        provider = provider_of(server)
        assert guest.request(b"orphan") == b"orphan"
        failed: list[BaseException] = []

        def pause() -> None:
            try:
                server.command("pause", seconds=10)
            except UsageError as error:
                failed.append(error)

        thread = threading.Thread(target=pause)
        thread.start()
        until(lambda: server.command("status")["phase"] == "pausing", "the pause to begin")
        server.command("resume")
        provider.go.set()
        thread.join(pace.seconds(10))
        assert "called off" in str(failed[0])
        assert server.command("status")["phase"] == "running" and "deactivate" not in provider.calls
        guest.close()


def test_the_end_of_the_server_waits_for_work(libvfio_user: Library, path: Path) -> None:
    server = LoopbackServer(description(path), libvfio_user)
    guest = Guest(server)
    provider = provider_of(server)
    assert guest.request(b"orphan") == b"orphan"
    guest.close()
    threading.Timer(0.1, provider.go.set).start()
    server.stop()
    assert provider.calls[-2:] == ["orphan done", "stop"]


def test_commands_of_providers(libvfio_user: Library) -> None:
    with LoopbackServer(describe("outside", "echo"), libvfio_user) as server:
        ask = server.command
        assert ask("provider", name="outside", command="hello", arguments={"who": "me"}) == {"hello": "me"}
        assert ask("provider", name="outside", command="later") == {"late": True}
        with pytest.raises(WaitTimeout, match="the answer of provider 'outside' to 'never'"):
            ask("provider", name="outside", command="never", seconds=0.01)
        for wrong, message in (
            ({"name": "outside", "command": "what"}, "no command 'what'"),
            ({"name": "echo", "command": "what"}, r"provider 'echo' \(echo\) has no commands"),
            ({"name": "nobody", "command": "what"}, "there is no provider 'nobody'"),
            ({"name": "outside", "command": 3}, "field 'command'"),
            ({"name": "outside", "command": "hello", "arguments": []}, "field 'arguments'"),
        ):
            with pytest.raises(UsageError, match=message):
                ask("provider", **wrong)
        ask("pause")
        with pytest.raises(UsageError, match="needs a server that is running"):
            ask("provider", name="outside", command="hello")


def test_a_save_that_the_provider_refuses(libvfio_user: Library, tmp_path: Path) -> None:
    with LoopbackServer(describe("outside"), libvfio_user) as server:
        guest = Guest(server)
        OutsideProvider.fail.add("save")
        server.command("pause")
        with pytest.raises((OSError, StateError), match="save fails on purpose"):
            server.command("save", path=str(tmp_path / "state"))
        server.command("resume")
        assert guest.request(b"other") == b"other"
        assert not (tmp_path / "state").exists()
        guest.close()
