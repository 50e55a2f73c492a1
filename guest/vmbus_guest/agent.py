"""The guest's agent: runs test drivers for the host and reports on them, over one virtio-serial port.

JSON lines both ways. A request is `{"id": ID, "command": NAME, "arguments": {...}}`, its answer `{"id": ID, "result":
{...}}` or `{"id": ID, "error": {"kind": ..., "message": ...}}`. Lines with an `event` come unasked: `ready` when the
agent is up and whenever the host connects again, `progress` and `finished` of a job, `silent` when a job has reported
nothing for long.

Rules that make it survive a VM's save and restore, where the host's end of the port is torn away in mid-line:

* An id names one request for good: a number or string that the host uses once (with a random part, if several
  processes of the host come and go). A repeated id is answered again from a small cache, or joins the request that is
  still being worked on; it never runs twice. So the host simply repeats whatever got no answer.
* A line that is no request is answered with an error without an id, and forgotten: it is the rest of a line whose
  beginning went to the host before the save, or the other way round. A host begins with an empty line.
* Jobs belong to the agent, not to the connection.
* All buffers are bounded. While the host does not read, events are dropped first, then answers (ask again).

Every test driver runs in a process of its own, so that one can be killed in mid-traffic; its death is reported. So is
what it prints that is no report (`rubbish`), and for how long it has said nothing (`silent`); with `patience` one that
says nothing for so long is killed.

A user's own test drivers are installed at run time, with `install`.
"""

# Imports are kept few, os instead of pathlib and subprocess: each costs boot time in an emulated guest.
# ruff: noqa: PTH103, PTH104, PTH112, PTH123

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable

from vmbus_guest import audit_records, programs
from vmbus_guest.jobs import LONGEST_WAIT, Job, Jobs, RequestError
from vmbus_guest.port import Port, find_port
from vmbus_guest.testdrivers import CATALOGUE, NAME_RULE, directory, drivers, is_name

TYPE_CHECKING = False  # without `typing`, which costs a tenth of a second under TCG
if TYPE_CHECKING:
    from typing import Any

VERSION = 1

CACHED_ANSWERS = 64
KILL_PATIENCE = 10.0
"""Seconds that a killed process gets to be gone."""


_READ = 64 << 10

AUDIT_WORD = "vmbus.audit=on"
"""On the kernel's command line: test drivers keep audit records."""
AUDIT_DIRECTORY = "/run/vmbus-audit"


class Agent:
    """Serves one port until `poweroff`."""

    def __init__(
        self,
        descriptor: int,
        *,
        poweroff: Callable[[], None],
        runner: tuple[str, ...] = (sys.executable, "-S", "-m", "vmbus_guest.testdrivers"),
        audit: str | None = None,
    ) -> None:
        """`audit`: the directory in which test drivers keep audit records; None: they keep none."""
        self._audit_directory = audit
        self._port = Port(descriptor)
        self._poweroff = poweroff
        self._answers: dict[int | str, dict[str, Any]] = {}
        self._open: set[int | str] = set()  # ids that are still being worked on
        self._waits: list[tuple[float, int, int | str]] = []  # deadline, job, id of the request
        self._running = True
        self._epoll = select.epoll()
        self._jobs = Jobs(
            self._epoll, runner, audit, lambda event: self._port.send(event, event=True), self._job_ended, self._answer
        )
        self._programs: dict[int, programs.Program] = {}  # by each of their descriptors
        self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        self._commands: dict[str, Callable[[int | str, dict[str, Any]], dict[str, Any] | None]] = {
            "ping": self._ping,
            "list": self._list,
            "install": self._install,
            "start": self._start,
            "run": self._run,
            "wait": self._wait,
            "poll": self._poll,
            "ask": self._ask,
            "stop": self._stop,
            "kill": self._kill,
            "jobs": self._list_jobs,
            "execute": self._execute,
            "audit": self._audit,
            "audit-read": self._audit_read,
            "echo": self._echo,
            "serial-echo": self._serial_echo,
            "poweroff": self._power_off,
        }

    def serve(self) -> None:
        """Work until the host asks for poweroff; then call the function given for it."""
        self._greet()
        while self._running:
            for descriptor, events in self._epoll.poll(self._timeout()):
                if descriptor == self._port.descriptor:
                    self._port_events(events)
                elif descriptor in self._programs:
                    self._program_events(descriptor)
                else:
                    self._jobs.events(descriptor)
            self._expire()
        deadline = time.monotonic() + 2.0
        while not self._port.flush() and time.monotonic() < deadline:
            self._epoll.poll(0.05)
        for job in self._jobs.running:
            job.signal(signal.SIGKILL)
        for program in self._programs.values():
            program.kill()
        self._poweroff()

    # The port

    def _greet(self) -> None:
        with open("/proc/uptime", encoding="ascii") as file:
            uptime = float(file.read().split()[0])
        self._port.send(
            {
                "event": "ready",
                "version": VERSION,
                "python": sys.version.split()[0],
                "kernel": os.uname().release,
                "uptime": uptime,
                "drivers": sorted(drivers()),
                "jobs": sorted(self._jobs.all),
            },
            event=True,
        )

    def _port_events(self, events: int) -> None:
        if not events & select.EPOLLHUP and not self._port.connected:
            self._port.connected = True
            self._greet()
        if events & select.EPOLLIN:
            for line in self._port.receive():
                self._request(line)
                if not self._running:
                    break
        if events & select.EPOLLHUP:
            self._port.forget()
            self._port.connected = False
        else:
            self._port.flush()

    def _request(self, line: bytes) -> None:
        identity: int | str | None = None
        try:
            try:
                request = json.loads(line)
            except (ValueError, RecursionError):
                raise RequestError("bad-request", f"not a line of JSON: {line[:80]!r}") from None
            if not isinstance(request, dict) or type(request.get("id")) not in (int, str):
                raise RequestError("bad-request", "a request is an object with an 'id' (number or string)")
            identity = request["id"]
            assert identity is not None
            if identity in self._answers:
                self._port.send(self._answers[identity])
                return
            if identity in self._open:
                return  # the answer comes when it is ready, once
            command = request.get("command")
            arguments = request.get("arguments", {})
            handler = self._commands.get(command) if isinstance(command, str) else None
            if handler is None:
                raise RequestError("unknown-command", f"no command {command!r}; there are {sorted(self._commands)}")
            if not isinstance(arguments, dict):
                raise RequestError("bad-request", f"the arguments of '{command}' are not an object")
            self._open.add(identity)
            result = handler(identity, arguments)
            if result is not None:
                self._answer(identity, {"result": result})
        except RequestError as error:
            self._answer(identity, {"error": {"kind": error.kind, "message": str(error)}})

    def _answer(self, identity: int | str | None, content: dict[str, Any]) -> None:
        answer = {"id": identity, **content}
        if identity is not None:
            self._open.discard(identity)
            self._answers[identity] = answer
            while len(self._answers) > CACHED_ANSWERS:
                del self._answers[next(iter(self._answers))]
        self._port.send(answer)

    # Commands

    def _ping(self, identity: int | str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"version": VERSION, "dropped": self._port.dropped}

    def _list(self, identity: int | str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The names and what they are for; what parameters they take, the test driver `catalogue` says."""
        return {"drivers": {name: entry.summary for name, entry in sorted(drivers().items())}}

    def _install(self, identity: int | str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Take a test driver of a user's: its `name`, and the `source` of its module. One of that name is replaced."""
        name, source = arguments.get("name"), arguments.get("source")
        if not is_name(name) or name in CATALOGUE:
            raise RequestError("bad-argument", f"a test driver cannot be called {name!r}: a new name, {NAME_RULE}")
        if not isinstance(source, str):
            raise RequestError("bad-argument", "'source' is the text of a Python module")
        path = f"{directory()}/{name}.py"
        try:
            os.makedirs(directory(), mode=0o700, exist_ok=True)
            with open(f"{path}.new", "w", encoding="utf-8") as file:
                file.write(source)
            os.rename(f"{path}.new", path)
        except (OSError, ValueError) as error:
            raise RequestError("cannot-install", f"test driver '{name}': {error}") from error
        return {"name": name}

    def _list_jobs(self, identity: int | str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"jobs": [job.report() for job in self._jobs.all.values()]}

    def _start(self, identity: int | str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"job": self._jobs.launch(arguments).number}

    def _run(self, identity: int | str, arguments: dict[str, Any]) -> None:
        timeout = _seconds(arguments, LONGEST_WAIT)
        self._await(self._jobs.launch(arguments), identity, timeout)

    def _wait(self, identity: int | str, arguments: dict[str, Any]) -> None:
        timeout = _seconds(arguments, 60.0)
        self._await(self._jobs.find(arguments), identity, timeout)

    def _poll(self, identity: int | str, arguments: dict[str, Any]) -> dict[str, Any]:
        return self._jobs.find(arguments).report()

    def _ask(self, identity: int | str, arguments: dict[str, Any]) -> None:
        """Hand a running job the object `message`; answered when it answers."""
        message = arguments.get("message")
        if not isinstance(message, dict):
            raise RequestError("bad-argument", "'message' is an object for the test driver")
        self._jobs.find(arguments).ask(identity, message)

    def _stop(self, identity: int | str, arguments: dict[str, Any]) -> dict[str, Any]:
        job = self._jobs.find(arguments)
        job.stop_requested = True
        job.signal(signal.SIGTERM)
        return job.report()

    def _kill(self, identity: int | str, arguments: dict[str, Any]) -> None:
        job = self._jobs.find(arguments)
        if job.running:
            job.kill_requested = True
            job.signal(signal.SIGKILL)
        self._await(job, identity, KILL_PATIENCE)

    def _execute(self, identity: int | str, arguments: dict[str, Any]) -> None:
        """Run the program `argv` for at most `timeout` seconds. Answered when it has ended: see `programs.Program`."""
        argv = arguments.get("argv")
        timeout = _seconds(arguments, 60.0)
        if not programs.is_argv(argv):
            raise RequestError("bad-argument", "'argv' is a list of texts: a program and its arguments")
        assert isinstance(argv, list)
        if len(set(map(id, self._programs.values()))) >= programs.MOST_PROGRAMS:
            raise RequestError("too-many-programs", f"{programs.MOST_PROGRAMS} programs are running already")
        try:
            program = programs.Program(identity, argv, programs.deadline(timeout))
        except (OSError, ValueError) as error:
            raise RequestError("cannot-start", f"program {argv[0]!r}: {error}") from error
        for descriptor in (program.output, program.pidfd):
            self._programs[descriptor] = program
            self._epoll.register(descriptor, select.EPOLLIN)

    def _program_events(self, descriptor: int) -> None:
        program = self._programs[descriptor]
        program.read()
        if descriptor != program.pidfd:
            if program.ended:
                self._epoll.unregister(descriptor)
            return
        # What it has left running keeps the output open, and is not waited for.
        _, status = os.waitpid(program.pid, 0)
        for other in (program.output, program.pidfd):
            if self._programs.pop(other, None) is not None and not (other == program.output and program.ended):
                self._epoll.unregister(other)
        program.close()
        self._answer(program.identity, {"result": program.report(status)})

    def _echo(self, identity: int | str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"data": arguments.get("data")}

    def _serial_echo(self, identity: int | str, arguments: dict[str, Any]) -> None:
        """Send raw bytes back for a while, for the benchmark: answer first, then `bytes` bytes, then requests again."""
        total = arguments.get("bytes")
        if type(total) is not int or total <= 0:
            raise RequestError("bad-argument", "'serial-echo' needs a positive number of 'bytes'")
        patience = _seconds(arguments, 10.0)
        self._answer(identity, {"result": {"bytes": total}})
        port = self._port.descriptor
        os.set_blocking(port, True)
        poll = select.poll()
        poll.register(port, select.POLLIN)
        try:
            while total > 0 and poll.poll(patience * 1000):
                data = os.read(port, min(_READ, total))
                if not data:
                    break
                total -= len(data)
                while data:
                    data = data[os.write(port, data) :]
        finally:
            os.set_blocking(port, False)

    def _audit(self, identity: int | str, arguments: dict[str, Any]) -> dict[str, Any]:
        return audit_records.flush(self._audit_directory, arguments, {job.pid for job in self._jobs.running})

    def _audit_read(self, identity: int | str, arguments: dict[str, Any]) -> dict[str, Any]:
        return audit_records.read(self._audit_directory, arguments)

    def _power_off(self, identity: int | str, arguments: dict[str, Any]) -> dict[str, Any]:
        self._running = False
        return {}

    # Waiting

    def _await(self, job: Job, identity: int | str, timeout: float) -> None:
        if job.running:
            self._waits.append((time.monotonic() + timeout, job.number, identity))
        else:
            self._answer(identity, {"result": job.report()})

    def _job_ended(self, job: Job) -> None:
        for wait in [wait for wait in self._waits if wait[1] == job.number]:
            self._waits.remove(wait)
            self._answer(wait[2], {"result": job.report()})

    def _timeout(self) -> float | None:
        due = [deadline for deadline, _, _ in self._waits]
        due += [program.deadline for program in self._programs.values() if not program.expired]
        if (look := self._jobs.next_look) is not None:
            due.append(look)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _expire(self) -> None:
        now = time.monotonic()
        self._jobs.look_for_silence(now)
        for program in self._programs.values():
            program.expire(now)
        for wait in [wait for wait in self._waits if wait[0] <= now]:
            self._waits.remove(wait)
            self._answer(wait[2], {"result": self._jobs.all[wait[1]].report()})


def _seconds(arguments: dict[str, Any], default: float) -> float:
    timeout = arguments.get("timeout", default)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 <= timeout <= LONGEST_WAIT:
        raise RequestError("bad-argument", f"'timeout' is a number of seconds from 0 to {LONGEST_WAIT:g}")
    return float(timeout)


def main() -> None:
    """Serve the port until the host asks for poweroff, then switch the machine off."""

    def poweroff() -> None:
        if os.path.isdir("/run/systemd/system"):  # the root file system is a disk's
            os.execv("/usr/bin/systemctl", ["systemctl", "poweroff"])
        os.sync()
        os.execv("/bin/busybox", ["poweroff", "-f"])

    try:
        descriptor = os.open(find_port(), os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, TimeoutError) as error:
        sys.exit(f"agent: {error}")
    with open("/proc/cmdline", encoding="ascii", errors="replace") as file:
        command_line = file.read()
    audit = AUDIT_DIRECTORY if AUDIT_WORD in command_line.split() else None
    Agent(descriptor, poweroff=poweroff, audit=audit).serve()


if __name__ == "__main__":
    main()
