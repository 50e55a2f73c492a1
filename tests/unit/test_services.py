"""Watched descriptors, work on other threads, activation, and files in a snapshot, each on its own."""

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.outside import OutsideProvider
from vmbus.errors import EnvironmentProblem, UsageError, WaitTimeout
from vmbus.providers.faults import Faults
from vmbus.server.activation import Activation
from vmbus.server.files import copy_file, copy_files, files_of, wanted_files
from vmbus.server.services import THREADS, ProviderServices, Services
from vmbus.testkit import ContractViolation, ProviderTest, every_step
from vmbus.util.watches import Watches


@pytest.fixture(autouse=True)
def no_provider_fails() -> Any:
    yield
    OutsideProvider.fail.clear()
    OutsideProvider.alive.clear()


# ---- watches -----------------------------------------------------------------------------------------------------


def test_a_call_comes_as_long_as_something_is_ready() -> None:
    watches = Watches()
    reader, writer = os.pipe()
    got: list[bytes] = []
    watches.add_reader(reader, lambda: got.append(os.read(reader, 1)))
    assert not watches.poll()
    os.write(writer, b"ab")
    assert watches.poll() and watches.poll() and not watches.poll()
    assert got == [b"a", b"b"]
    watches.add_writer(writer, lambda: got.append(b"room"))
    assert watches.poll()
    assert watches.remove_writer(writer) and not watches.remove_writer(writer)
    assert not watches.poll()
    os.close(writer)  # a hang-up is something to hear of
    assert watches.poll() and got[-1] == b""
    assert watches.remove_reader(reader)
    os.close(reader)
    watches.close()


def test_a_call_that_raises_is_not_made_again() -> None:
    watches = Watches()
    ours, theirs = socket.socketpair()
    other, _keep = socket.socketpair()
    calls: list[str] = []

    def bad() -> None:
        calls.append("bad")
        raise ValueError

    watches.add_reader(ours.fileno(), bad)
    watches.add_writer(other.fileno(), lambda: calls.append("good"))
    theirs.send(b"x")
    for _ in range(3):
        watches.poll()
    assert calls.count("bad") == 1 and calls.count("good") == 3
    assert watches.descriptors == [other.fileno()]


def test_what_cannot_be_watched_is_refused(tmp_path: Path) -> None:
    watches = Watches()
    (tmp_path / "plain").touch()
    with (tmp_path / "plain").open() as file, pytest.raises(UsageError, match="cannot be watched"):
        watches.add_reader(file.fileno(), lambda: None)
    with pytest.raises(UsageError, match="cannot be watched"):
        watches.add_reader(-1, lambda: None)
    assert not len(watches)


def test_a_descriptor_that_was_closed_and_opened_again() -> None:
    watches = Watches()
    first, _other = socket.socketpair()
    number = first.fileno()
    watches.add_reader(number, lambda: None)
    first.close()
    second, peer = socket.socketpair()
    os.dup2(second.fileno(), number)
    got: list[int] = []
    watches.add_reader(number, lambda: got.append(1))
    peer.send(b"x")
    assert watches.poll() and got == [1]
    os.close(number)
    assert watches.remove_reader(number)


# ---- work on other threads -----------------------------------------------------------------------------------------


def served(test: Callable[[Services, ProviderServices], Any]) -> None:
    async def run() -> None:
        services = Services(asyncio.get_running_loop())
        try:
            await test(services, ProviderServices(services, "one"))
        finally:
            services.close()

    asyncio.run(run())


def test_work_is_done_elsewhere_and_told_on_the_loop() -> None:
    async def test(services: Services, owner: ProviderServices) -> None:
        here = threading.get_ident()
        results: list[Any] = []

        def done(result: Any, error: BaseException | None) -> None:
            assert threading.get_ident() == here
            results.append(result if error is None else error)

        for number in range(50):
            owner.run_blocking(lambda number=number: (number, threading.get_ident()), done)  # type: ignore[misc]
        owner.run_blocking(lambda: 1 // 0, done)
        assert services.busy == {"one": 51}
        await services.idle(10)
        assert sorted(one[0] for one in results if isinstance(one, tuple)) == list(range(50))
        threads = {one[1] for one in results if isinstance(one, tuple)}
        assert here not in threads and 1 <= len(threads) <= THREADS
        assert [one for one in results if isinstance(one, ZeroDivisionError)]

    served(test)


def test_waiting_for_work_has_a_bound_and_names_its_owner() -> None:
    async def test(services: Services, owner: ProviderServices) -> None:
        other = ProviderServices(services, "other")
        go = threading.Event()
        told: list[str] = []
        for _ in range(THREADS + 3):
            owner.run_blocking(lambda: go.wait(20), lambda result, error: told.append("one"))
        # One provider's work that hangs leaves another's alone.
        other.run_blocking(lambda: None, lambda result, error: told.append("other"))
        await services.idle(10, other)
        assert told == ["other"]
        with pytest.raises(WaitTimeout, match=r"work that providers .*'one': 11"):
            await services.idle(0.01)
        assert not services.finish(0.01)
        assert services.busy == {"one": THREADS}  # what was not begun is given up
        go.set()
        assert services.finish(10)
        assert told.count("one") == THREADS

    served(test)


def test_nobody_is_told_after_the_release() -> None:
    async def test(services: Services, owner: ProviderServices) -> None:
        go = threading.Event()
        told: list[str] = []
        owner.run_blocking(lambda: go.wait(20), lambda result, error: told.append("done"))
        ours, theirs = socket.socketpair()
        owner.add_reader(ours.fileno(), lambda: told.append("read"))
        owner.active = True
        owner.release()
        theirs.send(b"x")
        go.set()
        after = ProviderServices(services, "after")
        after.run_blocking(lambda: None, lambda result, error: None)
        await services.idle(10)
        await asyncio.sleep(0)
        assert told == []
        assert not owner.remove_reader(ours.fileno())
        with pytest.raises(UsageError, match="is gone"):
            owner.run_blocking(lambda: None, lambda result, error: None)

    served(test)


def test_descriptors_are_looked_at_only_while_active() -> None:
    async def test(services: Services, owner: ProviderServices) -> None:
        ours, theirs = socket.socketpair()
        heard: list[bytes] = []
        owner.add_reader(ours.fileno(), lambda: heard.append(ours.recv(8)))
        theirs.send(b"early")
        assert not services.run_ready() and not heard
        owner.active = True
        assert services.run_ready() and heard == [b"early"]
        owner.active = False
        theirs.send(b"late")
        assert not services.run_ready()
        owner.active = True
        for _ in range(100):
            if len(heard) == 2:
                break
            await asyncio.sleep(0.001)  # the loop looks by itself
        assert heard == [b"early", b"late"]

    served(test)


# ---- activation ------------------------------------------------------------------------------------------------


class Recorder:
    kind = "recorder"

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name = name
        self.calls = calls
        self.fail: set[str] = set()

    def _call(self, what: str) -> None:
        self.calls.append(f"{what} {self.name}")
        if what in self.fail:
            raise OSError(f"no {what}")

    def activate(self) -> None:
        self._call("activate")

    def deactivate(self) -> None:
        self._call("deactivate")


class Flag:
    def __init__(self) -> None:
        self.active = False
        self.faults = Faults("flag")


def test_activation_is_all_or_nothing_and_repeatable() -> None:
    calls: list[str] = []
    a, b, c = (Recorder(name, calls) for name in "abc")
    flags = {name: Flag() for name in "abc"}
    activation = Activation(flags)  # type: ignore[arg-type]
    b.fail.add("activate")
    with pytest.raises(EnvironmentProblem, match=r"provider 'b' \(recorder\) could not take over .*: no activate"):
        activation.activate([a, b, c])  # type: ignore[list-item]
    assert calls == ["activate a", "activate b", "deactivate a"] and not flags["a"].active
    b.fail.clear()
    calls.clear()
    for _ in range(2):
        activation.activate([a, b, c])  # type: ignore[list-item]
    assert calls == ["activate a", "activate b", "activate c"] and all(flag.active for flag in flags.values())
    b.fail.add("deactivate")
    with pytest.raises(EnvironmentProblem, match=r"provider 'b' .* could not give up"):
        activation.deactivate()
    assert calls[3:] == ["deactivate c", "deactivate b", "deactivate a"]
    assert not any(flag.active for flag in flags.values())
    activation.activate([b])  # type: ignore[list-item]
    activation.leave(b)  # type: ignore[arg-type]
    activation.leave(a)  # type: ignore[arg-type]
    assert calls[6:] == ["activate b", "deactivate b"]


# ---- files -----------------------------------------------------------------------------------------------------


class Filed:
    name = "disk"
    kind = "filed"

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files
        self.shared: list[str] = []

    def shared_files(self) -> list[str]:
        return self.shared

    def files(self) -> dict[str, Path]:
        return self._files


def test_files_are_copied_with_their_holes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.write(b"head")
        file.seek(8 << 20)
        file.write(b"middle")
        file.truncate(32 << 20)
    assert copy_file(source, tmp_path / "copy") == 32 << 20
    copy = tmp_path / "copy"
    assert copy.read_bytes() == source.read_bytes()
    assert copy.stat().st_mode & 0o777 == 0o600
    assert copy.stat().st_blocks <= source.stat().st_blocks + 16
    with pytest.raises(FileExistsError):
        copy_file(source, copy)


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1")
    wanted = wanted_files([Filed({"a": tmp_path / "one", "b": tmp_path / "missing"})])  # type: ignore[list-item]
    assert list(wanted) == ["file.disk.a", "file.disk.b"]
    moved = Filed({"a": tmp_path / "one", "b": tmp_path / "missing"})
    moved.shared = ["b"]
    assert list(wanted_files([moved], moving=True)) == ["file.disk.a"]  # type: ignore[list-item]
    assert wanted_files([moved]) == wanted  # type: ignore[list-item]
    target = tmp_path / "snapshot"
    target.mkdir()
    with pytest.raises(EnvironmentProblem, match=r"cannot copy .*missing"):
        copy_files(wanted, target)
    assert not list(target.iterdir())
    with pytest.raises(UsageError, match=r"calls a file '\.\./x'"):
        wanted_files([Filed({"../x": tmp_path})])  # type: ignore[list-item]


def test_a_provider_sees_only_its_own_files(tmp_path: Path) -> None:
    for name in ("file.disk.image", "file.disk.b.image", "file.diskette.image", "device.state"):
        (tmp_path / name).touch()
    assert files_of(Filed({}), tmp_path) == {"image": tmp_path / "file.disk.image"}  # type: ignore[arg-type]
    assert files_of(Filed({}), None) == {}  # type: ignore[arg-type]


# ---- in the test kit -------------------------------------------------------------------------------------------


def test_the_kit_has_the_same_services(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"content.")

    def script(kit: ProviderTest) -> object:
        guest = kit.open()
        replies = [guest.request(text).rstrip(b"\0") for text in (b"read....", b"read", b"raise", b"other")]
        return replies, kit.command("hello", who="me"), kit.command("later")

    assert every_step(script, OutsideProvider, options={"path": str(path)}) > 5
    assert all(one.calls[-1] == "stop" for one in OutsideProvider.alive if "started" in one.calls)


def test_the_kit_keeps_the_order_of_calls(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"content.")
    with ProviderTest(OutsideProvider, options={"path": str(path)}) as kit:
        guest = kit.open()
        first = kit.provider
        assert isinstance(first, OutsideProvider)
        first.outside.send(b"hear")
        kit.run()
        assert first.heard == [b"hear"]
        kit.save_restore()
        second = kit.provider
        assert isinstance(second, OutsideProvider)
        assert first.calls[:3] == ["start", "activate", "started"]
        assert first.calls[3] == "deactivate" and set(first.calls[4:-1]) == {"save"} and first.calls[-1] == "stop"
        assert [call for call in second.calls if call != "save"] == ["start", "activate", "started"]
        assert guest.request(b"read").rstrip(b"\0") == b"content."
        with pytest.raises(ContractViolation, match="command 'never'"):
            kit.command("never")


def test_the_kit_finds_descriptors_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OutsideProvider, "stop", lambda self: None)
    kit = ProviderTest(OutsideProvider)
    with pytest.raises(ContractViolation, match=r"leaves descriptors \[.*\] watched"):
        kit.finish()


def test_a_provider_may_refuse_a_save() -> None:
    with pytest.raises(OSError, match="save fails on purpose"), ProviderTest(OutsideProvider) as kit:
        kit.open()
        OutsideProvider.fail.add("save")
        kit.save_restore()
