"""The guest's side of the integration services: the pools, the system, and what it makes of the host's bytes."""

from __future__ import annotations

import json
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.integration import make_service
from vmbus.errors import EnvironmentProblem, PeerError, UsageError
from vmbus.wire import ic
from vmbus_guest.services.integration import ANSWERED, IntegrationService
from vmbus_guest.services.kvp import MOST_KEYS, Store, main
from vmbus_guest.services.system import LinuxSystem
from vmbus_guest.testdrivers.context import Context, Parameters
from vmbus_guest.testdrivers.kvp import run

pytestmark = pytest.mark.unit


def test_nothing_is_done_to_a_machine_that_is_not_a_guest() -> None:
    with pytest.raises(EnvironmentProblem, match="only in a guest"):
        IntegrationService(Parameters({}))
    with pytest.raises(EnvironmentProblem, match="only in a guest"):
        LinuxSystem("BOOT_IMAGE=/vmlinuz root=/dev/sda1")
    facts = LinuxSystem("console=ttyS0 rdinit=/init").facts()
    assert facts["OSName"] == "Linux" and all(isinstance(value, str) for value in facts.values())
    assert all("127.0.0.1" not in value for value in facts.values())


def test_pools_are_files_that_programs_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(str(tmp_path / "kvp"), lambda: {"OSName": "Test"})
    assert store.values("guest") == {} and store.values("auto") == {"OSName": (1, "Test")}
    assert main(["set", "role", "db"], store) == 0
    assert main(["set", "größe", "x", "external"], store) == 0
    assert store.values("guest") == {"role": (1, "db")}
    assert main(["get", "größe"], store) == 0 and capsys.readouterr().out == "x\n"
    assert main(["list", "guest"], store) == 0 and capsys.readouterr().out == "role=db\n"
    assert main(["list", "auto"], store) == 0 and capsys.readouterr().out == "OSName=Test\n"
    assert main(["get", "role"], store) == 1  # of another pool
    assert main(["delete", "role"], store) == 0 and main(["delete", "role"], store) == 1
    assert main(["set", "x"], store) == 2 and main([], store) == 2
    assert main(["set", "x", "y", "auto"], store) == 1 and main(["list", "moon"], store) == 1
    assert "system's own" in capsys.readouterr().err
    with pytest.raises(UsageError, match="at most 1023"):
        store.set("guest", "x", "y" * 1024)
    mode = (tmp_path / "kvp").stat().st_mode & 0o777
    assert mode == 0o700


def test_a_pool_has_a_limit_and_damage_is_mended(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (tmp_path / "pool-guest.json").write_text(json.dumps({str(number): [1, "x"] for number in range(MOST_KEYS)}))
    with pytest.raises(UsageError, match="is full"):
        store.set("guest", "one more", "x")
    store.set("guest", "0", "changed")
    assert store.values("guest")["0"] == (1, "changed")
    for damage in ("", "[]", "{", '{"a": 1}', '{"a": ["x", 2]}'):
        (tmp_path / "pool-guest.json").write_text(damage)
        assert store.values("guest") == {}
        store.set("guest", "a", "b")
        assert store.values("guest") == {"a": (1, "b")}


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    def write(name: str) -> None:
        store = Store(str(tmp_path))
        for number in range(50):
            store.set("guest", f"{name}{number}", "x")

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(Store(str(tmp_path)).values("guest")) == 100


def test_the_test_driver_is_a_program_of_the_guest(tmp_path: Path) -> None:
    def drive(**parameters: str) -> dict[str, object]:
        return run(Context({"directory": str(tmp_path), **parameters}, lambda: pytest.fail("no device is needed")))

    assert drive(pool="guest", set="a", value="1")["values"] == {"a": "1"}
    assert drive(pool="guest", get="a") == {"values": {"a": "1"}, "value": "1", "verdict": "passed"}
    assert drive(get="a")["verdict"] == "failed"


@given(st.sampled_from(ANSWERED), st.integers(0, 8), st.binary(max_size=3000))
def test_no_bytes_of_the_host_raise_anything_else(service: ic.Service, kind: int, body: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        guest = make_service(Path(directory))
        guest._versions = {one.name: (ic.Version(3, 0), one.versions[0]) for one in ANSWERED}
        try:
            answer = guest._answer(service, ic.Message(kind, body))
        except PeerError:
            return
    assert answer.flags == ic.Flag.TRANSACTION | ic.Flag.RESPONSE and len(answer.body) >= len(body)


def test_requests_before_versions_are_agreed_on_and_of_other_services(tmp_path: Path) -> None:
    guest = make_service(tmp_path)
    request = ic.Message(ic.MessageType.SHUTDOWN, ic.shutdown(ic.Shutdown()))
    assert guest._answer(ic.SHUTDOWN, request).status == ic.IcStatus.NOT_SUPPORTED
    guest._versions["heartbeat"] = (ic.Version(3, 0), ic.Version(3, 0))
    assert guest._answer(ic.HEARTBEAT, request).status == ic.IcStatus.NOT_SUPPORTED
    guest.tick(0)
    assert guest.fake.ends == []


def test_a_clock_that_is_right_is_left_alone(tmp_path: Path) -> None:
    guest = make_service(tmp_path)
    guest._versions["time"] = (ic.Version(3, 0), ic.Version(3, 0))
    for seconds, flag in ((1_000_000.2, 1), (999_999.8, 1), (1_000_000.4, 2), (1_000_000.3, 1)):
        body = ic.time_sync(ic.TimeSync(seconds, flag), ic.Version(3, 0))
        assert guest._answer(ic.TIME, ic.Message(ic.MessageType.TIME, body)).status == ic.IcStatus.OK
    assert guest.fake.sets == [1_000_000.3]
    assert (guest.done["syncs"], guest.done["samples"]) == (3, 1)


def test_the_time_of_a_foolish_host_is_refused(tmp_path: Path) -> None:
    guest = make_service(tmp_path)
    guest._versions["time"] = (ic.Version(3, 0), ic.Version(3, 0))
    body = ic.time_sync(ic.TimeSync(1.5e12, ic.TimeFlag.SYNC), ic.Version(3, 0))
    assert guest._answer(ic.TIME, ic.Message(ic.MessageType.TIME, body)).status == ic.IcStatus.FAIL
    assert guest.fake.sets == []
