"""Fetching the guest's records: the agent's two commands, and what the host does with them; a real agent."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unit.test_guest_agent import Host
from vmbus.errors import UsageError
from vmbus.observe.audit.checker import check_paths
from vmbus.observe.audit.files import guest_recorder, recorder_in
from vmbus.observe.audit.guest import collect_audit
from vmbus.observe.audit.records import Mark, Record
from vmbus_guest import audit_records
from vmbus_guest.agent import Agent

DRIVER = """
import json, os, sys, time
assert sys.argv[4] == "--audit"
directory = sys.argv[5]
path = f"{directory}/guest-{sys.argv[1]}-{os.getpid()}-{'0' * 32}.audit"
open(path, "wb").write(b"begun")
print(json.dumps({"event": "progress"}), flush=True)
while not os.path.exists(f"{directory}/flush"):
    time.sleep(0.01)
token = open(f"{directory}/flush").read()
open(path, "ab").write(json.dumps({"reason": token}).encode())
while not os.path.exists(f"{directory}/end"):
    time.sleep(0.01)
print(json.dumps({"event": "result", "result": {}}))
"""


class Guest(Host):
    """The agent with its directory."""

    def __init__(self, directory: Path | None, script: Path) -> None:
        ours, theirs = socket.socketpair()
        super().__init__(ours)
        self.off = threading.Event()
        agent = Agent(
            theirs.detach(),
            poweroff=self.off.set,
            runner=(sys.executable, "-I", "-S", str(script)),
            audit=None if directory is None else str(directory),
        )
        self.thread = threading.Thread(target=agent.serve, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.post("poweroff")
        assert self.off.wait(20)
        self.thread.join(20)
        self.connection.close()


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    (tmp_path / "records").mkdir()
    guest = Guest(tmp_path / "records", script)
    yield guest
    (tmp_path / "records" / "end").touch()
    guest.close()


class Vm:
    """What `collect` needs of a VM: the agent's answers, and a server that says where its record is."""

    def __init__(self, guest: Guest, *, on: bool = True) -> None:
        self.guest = guest
        self.on = on
        self.asked: list[str] = []

    async def call_agent(self, command: str, /, *, timeout: float = 30.0, **arguments: Any) -> dict[str, Any]:
        self.asked.append(command)
        return self.guest.call(command, **arguments)

    async def call_servers(self, command: str) -> list[dict[str, Any]]:
        self.asked.append(f"server {command}")
        return [{"on": self.on, "uid": "ab" * 16, "position": 7 + len(self.asked)}]


def test_a_running_driver_is_asked_to_write_and_waited_for(guest: Guest, tmp_path: Path) -> None:
    job = guest.call("start", driver="echo")["job"]
    while guest.call("poll", job=job)["progress"] is None:
        pass
    (first,) = guest.call("audit", token="first")["records"]
    assert first["running"] and first["name"].startswith("guest-echo-")
    while not first["flushed"]:
        (first,) = guest.call("audit", token="first")["records"]
    assert not guest.call("audit", token="second")["records"][0]["flushed"]
    (tmp_path / "records" / "end").touch()
    guest.call("wait", job=job)
    assert not guest.call("audit", token="third")["records"][0]["running"]


def test_records_are_fetched_whole_and_marked(guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_records, "AUDIT_PIECE", 100)
    recorder = guest_recorder(str(tmp_path / "records"), "mixed-12")
    for number in range(20):
        recorder.flush(f"reason {number}")
    target = tmp_path / "fetched"
    vm = Vm(guest)
    (path,) = asyncio.run(collect_audit(vm, target))
    assert vm.asked[0] == vm.asked[-1] == "server audit"
    assert path.stat().st_mode & 0o777 == 0o600 and target.stat().st_mode & 0o777 == 0o700
    record = Record(path.read_bytes(), "it")
    assert record.collected == Mark("ab" * 16, 8) and record.uid == recorder.uid and record.complete
    assert len(record.events) == recorder.position
    recorder.close()
    assert asyncio.run(collect_audit(vm, target)) == [path], "the newer one takes its place"
    assert len(Record(path.read_bytes(), "it").events) == recorder.position
    recorder_in(target, "host", "vmbus0").flush("x")
    assert check_paths([target]).clean, "two records of nothing"


def test_a_vm_without_records_says_so(guest: Guest, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not keep audit records"):
        asyncio.run(collect_audit(Vm(guest, on=False), tmp_path / "fetched"))


def test_an_agent_that_keeps_none_has_none(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    guest = Guest(None, script)
    assert guest.call("audit", token="x") == {"on": False, "records": []}
    assert guest.fail("audit-read", name="a.audit")["kind"] == "bad-argument"
    guest.close()


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("audit", {}),
        ("audit", {"token": "../x"}),
        ("audit", {"token": 7}),
        ("audit-read", {}),
        ("audit-read", {"name": "../../etc/passwd"}),
        ("audit-read", {"name": "passwd"}),
        ("audit-read", {"name": "nothing.audit"}),
        ("audit-read", {"name": "nothing.audit", "offset": -1}),
    ],
)
def test_wrong_requests_are_refused(guest: Guest, command: str, arguments: dict[str, Any]) -> None:
    assert guest.fail(command, **arguments)["kind"] == "bad-argument"
