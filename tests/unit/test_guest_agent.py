"""The guest's agent over a socket pair in place of the virtio-serial port, with scripts in place of test drivers."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.pace import until
from support.processes import alive
from vmbus_guest import agent as agent_module
from vmbus_guest import jobs, port, programs
from vmbus_guest.agent import Agent
from vmbus_guest.port import Port, find_port

DRIVER = """
import json, os, signal, sys, time
parameters = json.loads(sys.argv[3])
def report(event, **fields):
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\\n"); sys.stdout.flush()
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
act = parameters.get("act", "finish")
report("progress", sent=1)
if act == "hang":
    while not stopped:
        signal.pause()
    report("result", result={"stopped": True})
elif act == "talk":
    for line in sys.stdin:
        message = json.loads(line)
        if message["say"] == "nothing":
            break
        report("answer", id="nobody's", result=1)
        report("answer", id=message["id"], result={"said": message["say"]})
    report("result", result={"verdict": "passed"})
elif act == "crash":
    print("on the way down", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGSEGV)
elif act == "error":
    report("error", kind="PeerError", message="the other side is silent"); sys.exit(1)
elif act == "silent":
    pass
elif act == "number":
    report("result", result=7)
elif act == "flood":
    os.write(1, b"x" * (5 << 20)); os.write(1, b"y" * 100 + b"\\n\\0\\xff\\n")
    if parameters.get("end") == "nothing":
        sys.exit(0)
    report("result", result={"flooded": True})
elif act == "stray":
    print("not JSON"); print("[1]"); print('{"event": 7}')
    report("result", result={})
else:
    report("result", result={"driver": sys.argv[1], "parameters": parameters})
"""


class Host:
    """The host's end."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.connection.settimeout(20)
        self.file = connection.makefile("rb")
        self.events: list[dict[str, Any]] = []
        self.last = 0

    def line(self) -> dict[str, Any]:
        line = self.file.readline()
        assert line, "the agent closed the line"
        message: dict[str, Any] = json.loads(line)
        return message

    def post(self, command: str, identity: int | str | None = None, **arguments: Any) -> int | str:
        if identity is None:
            self.last += 1
            identity = self.last
        request = {"id": identity, "command": command, "arguments": arguments}
        self.connection.sendall(json.dumps(request).encode() + b"\n")
        return identity

    def answer(self, identity: int | str | None) -> dict[str, Any]:
        while True:
            message = self.line()
            if "event" in message:
                self.events.append(message)
            else:
                assert message["id"] == identity
                return message

    def call(self, command: str, identity: int | str | None = None, **arguments: Any) -> dict[str, Any]:
        answer = self.answer(self.post(command, identity, **arguments))
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def fail(self, command: str, **arguments: Any) -> dict[str, str]:
        error: dict[str, str] = self.answer(self.post(command, **arguments))["error"]
        return error


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    ours, theirs = socket.socketpair()
    off = threading.Event()
    agent = Agent(theirs.detach(), poweroff=off.set, runner=(sys.executable, "-I", "-S", str(script)))
    thread = threading.Thread(target=agent.serve, daemon=True)
    thread.start()
    host = Host(ours)
    yield host
    host.post("poweroff", "the end")
    assert off.wait(20), "the agent did not end"
    thread.join(20)
    ours.close()


def test_it_says_that_it_is_ready_and_what_it_can_run(host: Host) -> None:
    ready = host.line()
    assert ready["event"] == "ready"
    assert {"echo", "burst"} <= set(ready["drivers"])
    assert host.call("ping")["version"] == 1
    assert {"echo", "burst"} <= set(host.call("list")["drivers"])
    assert host.call("echo", data="x" * 64) == {"data": "x" * 64}


def test_a_job_is_started_polled_stopped_and_waited_for(host: Host) -> None:
    job = host.call("start", driver="burst", parameters={"act": "hang"})["job"]
    running = host.call("wait", job=job, timeout=0)
    assert running["state"] == "running"
    assert running["result"] is None
    while host.call("poll", job=job)["progress"] is None:
        pass  # from then on the driver heeds SIGTERM
    host.call("stop", job=job)
    assert host.call("wait", job=job, timeout=20)["result"] == {"stopped": True}
    assert host.call("wait", job=job)["state"] == "finished"
    assert [report["job"] for report in host.call("jobs")["jobs"]] == [job]


def test_a_running_driver_is_asked_and_answers(host: Host) -> None:
    job = host.call("start", driver="echo", parameters={"act": "talk"})["job"]
    assert host.call("ask", "once", job=job, message={"say": "hello"}) == {"said": "hello"}
    assert host.call("ask", "once", job=job, message={"say": "hello"}) == {"said": "hello"}, "not asked again"
    assert host.fail("ask", job=job, message="hello")["kind"] == "bad-argument"
    assert host.fail("ask", job=job, message={"say": "x" * jobs.MAXIMUM_MESSAGE})["kind"] == "bad-argument"
    assert host.fail("ask", job=job, message={"say": "nothing"})["kind"] == "not-running", (
        "it ends, and has not answered"
    )
    report = host.call("wait", job=job)
    assert report["state"] == "finished" and report["rubbish"]["lines"] == 1, "answers to what nobody has asked"
    assert host.fail("ask", job=job, message={"say": "hello"})["kind"] == "not-running"


def test_a_driver_that_reads_no_messages_is_given_up(host: Host) -> None:
    job = host.call("start", driver="echo", parameters={"act": "hang"})["job"]
    asked = [host.post("ask", job=job, message={"say": "x" * 30_000}) for _ in range(3)]
    errors = [host.answer(identity)["error"]["kind"] for identity in (asked[2], *asked[:2])]
    assert errors == ["busy", "not-running", "not-running"] and host.call("wait", job=job)["state"] == "failed"


def test_a_driver_is_killed_in_the_middle_of_its_work(host: Host) -> None:
    job = host.call("start", driver="burst", parameters={"act": "hang"})["job"]
    report = host.call("kill", job=job)
    assert report["state"] == "killed"
    assert report["exit"] == "was killed by signal SIGKILL"
    assert not alive(report["pid"])
    assert host.call("kill", job=job)["state"] == "killed"


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        ("crash", "died", "was killed by signal SIGSEGV"),
        ("error", "PeerError", "the other side is silent"),
        ("silent", "died", "exited with status 0"),
    ],
)
def test_the_death_of_a_driver_is_reported(host: Host, act: str, kind: str, message: str) -> None:
    report = host.call("run", driver="echo", parameters={"act": act})
    assert report["state"] == "failed"
    assert report["error"]["kind"] == kind
    assert message in report["error"]["message"]
    if act == "crash":
        assert "on the way down" in report["log"]


def test_stray_output_of_a_driver_does_no_harm(host: Host) -> None:
    report = host.call("run", driver="echo", parameters={"act": "stray"})
    assert report["state"] == "finished"
    assert report["rubbish"] == {"lines": 3, "first": "b'not JSON'"}
    assert "rubbish" not in host.call("run", driver="echo")


def test_rubbish_without_end_is_told_and_the_agent_goes_on(host: Host) -> None:
    report = host.call("run", driver="echo", parameters={"act": "flood"})
    assert report["state"] == "finished" and report["result"] == {"flooded": True}
    assert report["rubbish"]["lines"] >= 2 and report["rubbish"]["first"].startswith("b'xxx")
    report = host.call("run", driver="echo", parameters={"act": "flood", "end": "nothing"})
    assert report["state"] == "failed" and len(report["log"]) <= jobs.LOG_TAIL
    message = report["error"]["message"]
    assert "exited with status 0 without a result; it printed " in message and "lines that are no reports" in message
    report = host.call("run", driver="echo", parameters={"act": "number"})
    assert (report["state"], report["result"]) == ("failed", None)
    assert report["error"] == {"kind": "bad-report", "message": "its result is no JSON object, but '7'"}
    host.call("ping")


def test_a_driver_that_says_nothing_is_told_and_killed_if_so_wished(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "SILENT_AFTER", 0.1)
    report = host.call("run", driver="echo", parameters={"act": "hang"}, patience=0.6)
    assert (report["state"], report["error"]["kind"]) == ("failed", "hung")
    assert report["error"]["message"] == "the test driver reported nothing for 0.6 s, and was killed"
    # The last one: a driver that takes long to start on a busy machine is told of once before.
    silent = [event for event in host.events if event["event"] == "silent"][-1]
    assert silent["job"] == report["job"] and silent["seconds"] >= 0.1
    assert host.call("run", driver="echo", patience=5)["state"] == "finished", "one that ends is left alone"
    for patience in (-1, "1", True):
        assert host.fail("start", driver="echo", patience=patience)["kind"] == "bad-argument"


def test_a_jump_of_the_clock_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    agent = Agent(theirs.detach(), poweroff=lambda: None, runner=(sys.executable, "-c", "input()"))
    job = agent._jobs.launch({"driver": "echo", "patience": 60})
    agent._jobs.look_for_silence(agent._jobs._looked + 1000.0)
    assert 0 < job.quiet <= 2 * jobs.LOOK_EVERY and not job.hung
    os.kill(job.pid, 9)
    os.waitpid(job.pid, 0)
    ours.close()


def test_a_users_driver_is_installed_and_known(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VMBUS_DRIVERS", str(tmp_path / "drivers"))
    assert host.fail("start", driver="mine")["kind"] == "unknown-driver"
    assert host.call("install", name="mine", source="text") == {"name": "mine"}
    assert (tmp_path / "drivers" / "mine.py").read_text() == "text"
    assert (tmp_path / "drivers").stat().st_mode & 0o777 == 0o700
    assert host.call("list")["drivers"]["mine"] == "your own, from mine.py"
    assert host.call("run", driver="mine")["result"]["driver"] == "mine"
    assert host.call("install", name="mine", source="other") == {"name": "mine"}
    for name in ("echo", "../x", "", 7, "Mine", "x" * 33):
        assert "a test driver cannot be called" in host.fail("install", name=name, source="")["message"]
    assert host.fail("install", name="mine", source=7)["kind"] == "bad-argument"
    (tmp_path / "drivers" / "mine.py").unlink()
    (tmp_path / "drivers").rmdir()
    (tmp_path / "drivers").write_text("a file")
    assert host.fail("install", name="mine", source="")["kind"] == "cannot-install"


def test_a_repeated_id_is_answered_again_and_does_not_run_twice(host: Host) -> None:
    first = host.call("start", "once", driver="echo")
    assert host.call("start", "once", driver="echo") == first
    assert len(host.call("jobs")["jobs"]) == 1


def test_a_repeated_id_joins_the_request_in_progress(host: Host) -> None:
    job = host.call("start", driver="burst", parameters={"act": "hang"})["job"]
    host.post("wait", "joined", job=job, timeout=60)
    host.post("wait", "joined", job=job, timeout=60)
    host.post("kill", "after", job=job)
    assert host.answer("joined")["result"]["state"] == "killed"
    assert host.answer("after")["result"]["state"] == "killed"


def test_the_cache_of_answers_is_bounded(host: Host) -> None:
    first = host.call("start", "first", driver="echo")["job"]
    for _ in range(agent_module.CACHED_ANSWERS):
        host.call("ping")
    assert host.call("start", "first", driver="echo")["job"] != first


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b"{}", b'{"id": true, "command": "ping"}', b'{"id": 1.5}', b"\xff\xfe", b"[" * 100_000, b"7"],
)
def test_a_line_that_is_no_request_is_answered_and_forgotten(host: Host, line: bytes) -> None:
    host.connection.sendall(line + b"\n\n")
    assert host.answer(None)["error"]["kind"] == "bad-request"
    host.call("ping")


def test_a_line_without_end_is_skipped(host: Host) -> None:
    host.connection.sendall(b"x" * (3 * port.MAXIMUM_LINE) + b'\n{"id": "after", "command": "ping"}\n')
    assert host.answer(None)["error"]["kind"] == "bad-request"
    assert host.answer("after")["result"]


def test_requests_that_cannot_be_served_say_why(host: Host) -> None:
    assert host.fail("dance")["kind"] == "unknown-command"
    assert host.fail("start", driver="nothing")["kind"] == "unknown-driver"
    assert host.fail("start", driver="echo", parameters=[])["kind"] == "bad-argument"
    assert host.fail("poll", job=99)["kind"] == "unknown-job"
    assert host.fail("poll", job=[])["kind"] == "unknown-job"
    assert host.fail("start", driver=["echo"])["kind"] == "unknown-driver"
    job = host.call("start", driver="echo", parameters={})["job"]
    for timeout in (-1, "1", True, float("inf")):
        assert host.fail("wait", job=job, timeout=timeout)["kind"] == "bad-argument"


def test_the_number_of_jobs_is_bounded(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "RUNNING_JOBS", 2)
    started = [host.call("start", driver="burst", parameters={"act": "hang"})["job"] for _ in range(2)]
    assert host.fail("start", driver="burst")["kind"] == "too-many-jobs"
    host.call("kill", job=started[0])
    monkeypatch.setattr(jobs, "FINISHED_JOBS", 3)
    for _ in range(5):
        host.call("run", driver="echo")
    assert len(host.call("jobs")["jobs"]) <= 5


def test_raw_bytes_come_back_and_then_requests_are_served_again(host: Host) -> None:
    assert host.call("serial-echo", bytes=128) == {"bytes": 128}
    for _ in range(2):
        host.connection.sendall(b"\n" * 64)
        assert host.file.read(64) == b"\n" * 64
    host.call("ping")


class Pipe:
    """A port whose host end we hold."""

    def __init__(self) -> None:
        self.host, guest = socket.socketpair()
        for end in (self.host, guest):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.port = Port(guest.detach())


def test_a_host_that_does_not_read_costs_bounded_memory() -> None:
    pipe = Pipe()
    for number in range(3000):
        pipe.port.send({"event": "progress", "number": number, "filler": "x" * 400}, event=True)
    assert pipe.port.dropped > 0
    dropped = pipe.port.dropped
    pipe.port.send({"id": 1, "result": {}})  # answers have room left when events have not
    assert pipe.port.dropped == dropped
    for _ in range(100):
        pipe.port.send({"id": 2, "result": "x" * 100_000})
    assert pipe.port.dropped > dropped
    received = b""
    while not pipe.port.flush():
        received += pipe.host.recv(1 << 16)
    pipe.host.setblocking(False)
    try:
        while data := pipe.host.recv(1 << 20):
            received += data
    except BlockingIOError:
        pass
    lines = [json.loads(line) for line in received.splitlines()]
    assert lines[0]["number"] == 0
    assert len(received) <= port.MAXIMUM_OUTPUT


def test_a_host_that_is_gone_is_noticed_and_forgotten() -> None:
    pipe = Pipe()
    pipe.port.send({"id": 1, "result": "x" * 500_000})
    assert not pipe.port.flush()
    pipe.host.close()
    assert list(pipe.port.receive()) == []
    assert not pipe.port.flush()
    pipe.port.forget()
    assert pipe.port.flush()


def test_an_agent_without_host_does_not_spin() -> None:
    ours, theirs = socket.socketpair()
    agent = Agent(theirs.detach(), poweroff=lambda: None)
    ours.close()
    [(descriptor, events)] = agent._epoll.poll(0)
    assert events & select.EPOLLHUP
    agent._port_events(events)
    assert agent._epoll.poll(0) == [], "the hang-up is reported again and again"
    assert not agent._port.connected
    os.close(descriptor)


def test_the_port_is_found_by_its_name(tmp_path: Path) -> None:
    for node, name in (("vport1p1", "org.qemu.guest_agent.0"), ("vport1p2", "org.vmbus.agent")):
        folder = tmp_path / "class/virtio-ports" / node
        folder.mkdir(parents=True)
        (folder / "name").write_text(name + "\n")
    assert find_port(sysfs=str(tmp_path), dev="/dev") == "/dev/vport1p2"
    with pytest.raises(TimeoutError, match=r"no virtio-serial port 'other'"):
        find_port("other", sysfs=str(tmp_path), timeout=0)


def test_a_late_port_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "class/virtio-ports/vport0p1"

    def appear(seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "name").write_text("org.vmbus.agent\n")

    sleep: Callable[[float], None] = appear
    monkeypatch.setattr(time, "sleep", sleep)
    assert find_port(sysfs=str(tmp_path)) == "/dev/vport0p1"


def test_a_program_is_run_and_its_output_bounded(host: Host) -> None:
    done = host.call("execute", argv=["/bin/sh", "-c", "echo one; echo two >&2; exit 7"])
    assert done == {"code": 7, "output": "one\ntwo\n", "bytes": 8, "expired": False}
    much = host.call("execute", argv=["/bin/sh", "-c", "head -c 1000000 /dev/zero | tr '\\0' x"])
    assert (much["code"], much["bytes"], much["output"]) == (0, 1_000_000, "x" * programs.MOST_OUTPUT)
    assert host.call("execute", argv=["/bin/sh", "-c", "kill -9 $$"])["code"] == -9
    # What it leaves running keeps its output open, and nobody waits for that.
    assert host.call("execute", argv=["/bin/sh", "-c", "sleep 100 & echo $!"])["code"] == 0


def test_a_program_whose_time_is_up_is_ended_with_all_it_started(host: Host, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    done = host.call("execute", argv=["/bin/sh", "-c", f"echo begun; sleep 100 & echo $! > {pid}; wait"], timeout=0.5)
    assert (done["code"], done["expired"], done["output"]) == (-9, True, "begun\n")
    assert done["expired"]
    until(lambda: not alive(int(pid.read_text())), "what the program started to end")


@pytest.mark.parametrize("argv", [None, [], [""], "ls", [1], ["ls", "a\0b"], ["x"] * 300])
def test_what_is_no_program_is_refused(host: Host, argv: object) -> None:
    assert host.fail("execute", argv=argv)["kind"] == "bad-argument"


def test_a_program_that_is_not_there_and_too_many_of_them(host: Host) -> None:
    assert host.fail("execute", argv=["/no/such/program"])["kind"] == "cannot-start"
    posted = [host.post("execute", argv=["/bin/sleep", "100"], timeout=1.0) for _ in range(programs.MOST_PROGRAMS)]
    assert host.fail("execute", argv=["/bin/true"])["kind"] == "too-many-programs"
    assert {host.line()["result"]["expired"] for _ in posted} == {True}
    assert host.call("execute", argv=["/bin/true"])["code"] == 0
