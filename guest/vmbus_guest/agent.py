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
# ruff: noqa: PTH103, PTH104, PTH112, PTH123, PTH208

from __future__ import annotations

import errno
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable

from vmbus_guest import programs
from vmbus_guest.testdrivers import CATALOGUE, NAME_RULE, directory, drivers, is_name

TYPE_CHECKING = False  # without `typing`, which costs a tenth of a second under TCG
if TYPE_CHECKING:
    from typing import Any

PORT_NAME = "org.vmbus.agent"
VERSION = 1

MAXIMUM_LINE = 1 << 20
"""Bytes of one line, either way."""
MAXIMUM_OUTPUT = 4 << 20
"""Bytes waiting for the host to read them; beyond that, lines are dropped."""
MAXIMUM_EVENTS = 256 << 10
"""Bytes waiting beyond which no event is added."""
CACHED_ANSWERS = 64
FINISHED_JOBS = 32
RUNNING_JOBS = 16
LOG_TAIL = 8 << 10
"""Bytes of a test driver's standard error that are kept."""
LONGEST_WAIT = 3600.0
"""Seconds."""
LOOK_EVERY = 2.0
"""Seconds between two looks at who says nothing."""
SILENT_AFTER = 20.0
"""Seconds without a report after which the host is told. Test drivers report twice a second."""
RUBBISH_SHOWN = 200
"""Bytes of the first line that is no report."""
KILL_PATIENCE = 10.0
"""Seconds that a killed process gets to be gone."""


_READ = 64 << 10

AUDIT_WORD = "vmbus.observe.audit=on"
"""On the kernel's command line: test drivers keep audit records."""
AUDIT_DIRECTORY = "/run/vmbus-audit"
AUDIT_PIECE = 512 << 10
"""Bytes of a record in one answer; in base64 they still fit into a line."""


class RequestError(Exception):
    """A request that cannot be served. `kind` is for programs, the message for people."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Job:
    """One test driver in a process of its own."""

    def __init__(self, number: int, driver: str, pid: int, output: int, log: int) -> None:
        self.number = number
        self.driver = driver
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.output = output  # the pipe with JSON lines; -1 once it ended
        self.log = log  # the pipe with standard error; -1 once it ended
        self.state = "running"  # then finished, failed or killed
        self.started = time.monotonic()
        self.seconds = 0.0
        self.progress: dict[str, Any] | None = None
        self.result: Any = None
        self.error: dict[str, str] | None = None
        self.status: int | None = None  # as of waitpid
        self.kill_requested = False
        self.stop_requested = False
        self.patience = 0.0  # seconds; 0: endless
        self.quiet = 0.0  # seconds since the last report
        self.quiet_told = False
        self.hung = False
        self.rubbish = 0  # lines that are no reports
        self.first_rubbish = ""
        self._line = bytearray()
        self._skipping = False  # the rest of a line that was too long
        self._tail = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Take bytes of the driver's report; returns the new progress reports."""
        self._line += data
        reports: list[dict[str, Any]] = []
        *lines, rest = bytes(self._line).split(b"\n")
        if lines and self._skipping:
            self._skipping = False
            del lines[0]
        if len(rest) > MAXIMUM_LINE:
            self._take_rubbish(rest)
            rest, self._skipping = b"", True
        self._line = bytearray() if self._skipping else bytearray(rest)
        for line in lines:
            try:
                report = json.loads(line)
                event = report.pop("event")
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                self._take_rubbish(line)  # a stray print
                continue
            if event == "progress":
                self.progress = report
                reports.append(report)
            elif event == "result":
                self.result = report.get("result")
            elif event == "error":
                self.error = {key: str(report.get(key)) for key in ("kind", "message")}
            else:
                self._take_rubbish(line)
                continue
            self.quiet, self.quiet_told = 0.0, False
        return reports

    def _take_rubbish(self, line: bytes) -> None:
        self.rubbish += 1
        self.first_rubbish = self.first_rubbish or repr(line[:RUBBISH_SHOWN])
        self.feed_log(line[:LOG_TAIL] + b"\n")

    def feed_log(self, data: bytes) -> None:
        self._tail += data
        del self._tail[:-LOG_TAIL]

    def end(self, status: int) -> None:
        """The process is gone and its pipes are read to their ends."""
        self.status = status
        self.seconds = time.monotonic() - self.started
        if self.hung:
            self.state = "failed"
            message = f"the test driver reported nothing for {self.patience:g} s, and was killed"
            self.error = {"kind": "hung", "message": message}
        elif self.kill_requested and os.WIFSIGNALED(status):
            self.state = "killed"
        elif status == 0 and self.error is None and isinstance(self.result, dict):
            self.state = "finished"
        else:
            self.state = "failed"
            if self.error is None and status == 0 and self.result is not None:
                message = f"its result is no JSON object, but {str(self.result)[:RUBBISH_SHOWN]!r}"
                self.error = {"kind": "bad-report", "message": message}
                self.result = None
            elif self.error is None:
                without = " without a result" if status == 0 else ""
                message = f"the test driver {_describe_status(status)}{without}"
                if self.rubbish:
                    message += (
                        f"; it printed {self.rubbish} lines that are no reports, the first of them {self.first_rubbish}"
                    )
                self.error = {"kind": "died", "message": message}

    def report(self) -> dict[str, Any]:
        """What the host is told about the job."""
        running = self.state == "running"
        report: dict[str, Any] = {
            "job": self.number,
            "driver": self.driver,
            "pid": self.pid,
            "state": self.state,
            "seconds": round(time.monotonic() - self.started if running else self.seconds, 3),
            "progress": self.progress,
            "result": self.result,
        }
        if self.error is not None:
            report["error"] = self.error
        if self.rubbish:
            report["rubbish"] = {"lines": self.rubbish, "first": self.first_rubbish}
        if running and self.quiet >= LOOK_EVERY:
            report["silent"] = round(self.quiet, 1)
        if self.status is not None:
            report["exit"] = _describe_status(self.status)
        if self.state == "failed" and self._tail:
            report["log"] = self._tail.decode(errors="replace")
        return report


class Port:
    """The agent's end of the line to the host: a non-blocking descriptor, lines in, lines out.

    For epoll it is edge-triggered: while nobody is at the host's end, the descriptor reports a hang-up without end.
    """

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self.connected = True
        self.dropped = 0
        self._input = bytearray()
        self._skipping = False  # the rest of a line that was too long
        self._lines: list[bytes] = []
        self._waiting = 0
        self._partial = b""

    def receive(self) -> Iterable[bytes]:
        """Read what is there. Yields whole lines; an empty line for one that was too long."""
        while True:
            try:
                data = os.read(self.descriptor, _READ)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EIO, errno.ENODEV, errno.ECONNRESET):
                    raise
                data = b""
            if not data:  # nobody there
                self._input.clear()
                self._skipping = False
                return
            self._input += data
            while (end := self._input.find(b"\n")) >= 0:
                line = bytes(self._input[:end])
                del self._input[: end + 1]
                if self._skipping or len(line) > MAXIMUM_LINE:
                    self._skipping = False
                    yield b"\0"
                elif line.strip():
                    yield line
            if len(self._input) > MAXIMUM_LINE:
                self._input.clear()
                self._skipping = True

    def send(self, message: dict[str, Any], *, event: bool = False) -> None:
        """Queue one line and write what the host takes."""
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        if self._waiting + len(line) > (MAXIMUM_EVENTS if event else MAXIMUM_OUTPUT):
            self.dropped += 1
            return
        self._lines.append(line)
        self._waiting += len(line)
        self.flush()

    def flush(self) -> bool:
        """Write what the host takes. True if nothing is left."""
        while self._lines or self._partial:
            if not self._partial:
                self._partial = b"".join(self._lines)
                self._lines.clear()
            try:
                written = os.write(self.descriptor, self._partial)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EIO, errno.ENODEV, errno.ECONNRESET):
                    raise
                return False
            self._partial = self._partial[written:]
            self._waiting -= written
        return True

    def forget(self) -> None:
        """The host is gone: what it did not read would reach its successor from the middle of a line on."""
        self._lines.clear()
        self._partial = b""
        self._waiting = 0


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
        self._runner = runner
        self._jobs: dict[int, Job] = {}
        self._next_job = 1
        self._answers: dict[int | str, dict[str, Any]] = {}
        self._open: set[int | str] = set()  # ids that are still being worked on
        self._waits: list[tuple[float, int, int | str]] = []  # deadline, job, id of the request
        self._running = True
        self._looked = time.monotonic()
        self._epoll = select.epoll()
        self._by_descriptor: dict[int, Job] = {}
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
                    self._job_events(descriptor)
            self._expire()
        deadline = time.monotonic() + 2.0
        while not self._port.flush() and time.monotonic() < deadline:
            self._epoll.poll(0.05)
        for job in self._jobs.values():
            if job.state == "running":
                self._signal(job, signal.SIGKILL)
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
                "jobs": sorted(self._jobs),
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
        return {"jobs": [job.report() for job in self._jobs.values()]}

    def _start(self, identity: int | str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"job": self._launch(arguments).number}

    def _run(self, identity: int | str, arguments: dict[str, Any]) -> None:
        timeout = _seconds(arguments, LONGEST_WAIT)
        self._await(self._launch(arguments), identity, timeout)

    def _wait(self, identity: int | str, arguments: dict[str, Any]) -> None:
        timeout = _seconds(arguments, 60.0)
        self._await(self._job(arguments), identity, timeout)

    def _poll(self, identity: int | str, arguments: dict[str, Any]) -> dict[str, Any]:
        return self._job(arguments).report()

    def _stop(self, identity: int | str, arguments: dict[str, Any]) -> dict[str, Any]:
        job = self._job(arguments)
        job.stop_requested = True
        self._signal(job, signal.SIGTERM)
        return job.report()

    def _kill(self, identity: int | str, arguments: dict[str, Any]) -> None:
        job = self._job(arguments)
        if job.state == "running":
            job.kill_requested = True
            self._signal(job, signal.SIGKILL)
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
        """Ask running test drivers to write their records, and list all records.

        `flushed` tells whether a record has everything up to the first request with this `token`.
        """
        directory = self._audit_directory
        token = arguments.get("token")
        if not isinstance(token, str) or not token.isalnum() or len(token) > 64:
            raise RequestError("bad-argument", "'token' is a word of letters and digits")
        if directory is None or not os.path.isdir(directory):
            return {"on": directory is not None, "records": []}
        request = f"{directory}/flush"
        with open(f"{request}.new", "w", encoding="ascii") as file:
            file.write(token)
        os.rename(f"{request}.new", request)
        running = {job.pid for job in self._jobs.values() if job.state == "running"}
        records = []
        for name in sorted(os.listdir(directory)):
            if not name.endswith(".audit"):
                continue
            with open(f"{directory}/{name}", "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 256))
                flushed = f'"{token}"'.encode() in file.read()
            owner = name.split("-")[-2]  # guest-DRIVER-PID-UID.audit
            alive = owner.isdigit() and int(owner) in running
            records.append({"name": name, "size": size, "flushed": flushed, "running": alive})
        return {"on": True, "records": records}

    def _audit_read(self, identity: int | str, arguments: dict[str, Any]) -> dict[str, Any]:
        """A piece of a record, as base64; empty at its end."""
        import base64

        name, offset = arguments.get("name"), arguments.get("offset", 0)
        if not isinstance(name, str) or "/" in name or not name.endswith(".audit") or self._audit_directory is None:
            raise RequestError("bad-argument", f"no audit record {name!r}")
        if type(offset) is not int or offset < 0:
            raise RequestError("bad-argument", "'offset' is a number of bytes")
        try:
            with open(f"{self._audit_directory}/{name}", "rb") as file:
                file.seek(offset)
                return {"data": base64.b64encode(file.read(AUDIT_PIECE)).decode()}
        except OSError as error:
            raise RequestError("bad-argument", f"cannot read audit record {name!r}: {error}") from error

    def _power_off(self, identity: int | str, arguments: dict[str, Any]) -> dict[str, Any]:
        self._running = False
        return {}

    # Jobs

    def _job(self, arguments: dict[str, Any]) -> Job:
        number = arguments.get("job")
        job = self._jobs.get(number) if type(number) is int else None
        if job is None:
            raise RequestError("unknown-job", f"no job {number!r}; there are {sorted(self._jobs)}")
        return job

    def _launch(self, arguments: dict[str, Any]) -> Job:
        driver = arguments.get("driver")
        parameters = arguments.get("parameters", {})
        patience = arguments.get("patience", 0)
        known = CATALOGUE if isinstance(driver, str) and driver in CATALOGUE else drivers()
        if not isinstance(driver, str) or driver not in known:
            raise RequestError("unknown-driver", f"no test driver {driver!r}; there are {sorted(known)}")
        if isinstance(patience, bool) or not isinstance(patience, int | float) or not 0 <= patience <= LONGEST_WAIT:
            raise RequestError("bad-argument", f"'patience' is a number of seconds from 0 to {LONGEST_WAIT:g}")
        if not isinstance(parameters, dict):
            raise RequestError("bad-argument", f"the parameters of test driver '{driver}' are not an object")
        if sum(job.state == "running" for job in self._jobs.values()) >= RUNNING_JOBS:
            raise RequestError("too-many-jobs", f"{RUNNING_JOBS} test drivers are running already")
        output, output_end = os.pipe2(os.O_CLOEXEC)
        log, log_end = os.pipe2(os.O_CLOEXEC)
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            pid = os.posix_spawn(
                self._runner[0],
                [
                    *self._runner,
                    driver,
                    "--parameters",
                    json.dumps(parameters),
                    *([] if self._audit_directory is None else ["--audit", self._audit_directory]),
                ],
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, null, 0),
                    (os.POSIX_SPAWN_DUP2, output_end, 1),
                    (os.POSIX_SPAWN_DUP2, log_end, 2),
                ],
            )
        except OSError as error:
            os.close(output)
            os.close(log)
            raise RequestError("cannot-start", f"test driver '{driver}': {error}") from error
        finally:
            for descriptor in (output_end, log_end, null):
                os.close(descriptor)
        job = Job(self._next_job, driver, pid, output, log)
        job.patience = float(patience)
        self._next_job += 1
        self._jobs[job.number] = job
        for descriptor in (output, log, job.pidfd):
            os.set_blocking(descriptor, False)
            self._by_descriptor[descriptor] = job
            self._epoll.register(descriptor, select.EPOLLIN)
        finished = [number for number, other in self._jobs.items() if other.state != "running"]
        for number in finished[:-FINISHED_JOBS]:
            del self._jobs[number]
        return job

    def _signal(self, job: Job, number: signal.Signals) -> None:
        if job.state == "running":
            signal.pidfd_send_signal(job.pidfd, number)

    def _job_events(self, descriptor: int) -> None:
        job = self._by_descriptor.get(descriptor)
        if job is None:
            return  # it ended while this round's earlier events were handled
        if descriptor == job.pidfd:
            self._read_pipes(job)  # the last words are in the pipes before the process is gone
            _, status = os.waitpid(job.pid, 0)
            for other in (job.output, job.log, job.pidfd):
                self._drop(other)
            job.end(status)
            self._port.send({"event": "finished", "job": job.number, "state": job.state}, event=True)
            for wait in [wait for wait in self._waits if wait[1] == job.number]:
                self._waits.remove(wait)
                self._answer(wait[2], {"result": job.report()})
        else:
            self._read_pipes(job)

    def _read_pipes(self, job: Job) -> None:
        """Read what is in a job's pipes, at most a bounded share of each."""
        for name in ("output", "log"):
            for _ in range(4):
                descriptor: int = getattr(job, name)
                if descriptor < 0:
                    break
                try:
                    data = os.read(descriptor, _READ)
                except (BlockingIOError, InterruptedError):
                    break
                if not data:
                    setattr(job, name, -1)
                    self._drop(descriptor)
                elif name == "log":
                    job.feed_log(data)
                else:
                    for progress in job.feed(data):
                        self._port.send({"event": "progress", "job": job.number, "progress": progress}, event=True)

    def _drop(self, descriptor: int) -> None:
        if self._by_descriptor.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)
            os.close(descriptor)

    # Waiting

    def _await(self, job: Job, identity: int | str, timeout: float) -> None:
        if job.state == "running":
            self._waits.append((time.monotonic() + timeout, job.number, identity))
        else:
            self._answer(identity, {"result": job.report()})

    def _timeout(self) -> float | None:
        due = [deadline for deadline, _, _ in self._waits]
        due += [program.deadline for program in self._programs.values() if not program.expired]
        if (look := self._look_interval()) is not None:
            due.append(self._looked + look)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _look_interval(self) -> float | None:
        """Seconds between two looks at who says nothing; None while nobody could."""
        running = [job for job in self._jobs.values() if job.state == "running"]
        if not running:
            return None
        return min([LOOK_EVERY, *(job.patience / 4 for job in running if job.patience)])

    def _look_for_silence(self, now: float) -> None:
        interval = self._look_interval()
        elapsed = now - self._looked
        if interval is None:
            self._looked = now
        elif elapsed >= interval:
            self._looked = now
            for job in self._jobs.values():
                if job.state != "running":
                    continue
                # The clock of a guest that is taken back to a checkpoint jumps: that is no silence.
                job.quiet += min(elapsed, 2 * interval)
                if job.patience and job.quiet >= job.patience and not job.hung:
                    job.hung = True
                    self._signal(job, signal.SIGKILL)
                elif job.quiet >= SILENT_AFTER and not job.quiet_told:
                    job.quiet_told = True
                    seconds = round(job.quiet, 1)
                    self._port.send({"event": "silent", "job": job.number, "seconds": seconds}, event=True)

    def _expire(self) -> None:
        now = time.monotonic()
        self._look_for_silence(now)
        for program in self._programs.values():
            program.expire(now)
        for wait in [wait for wait in self._waits if wait[0] <= now]:
            self._waits.remove(wait)
            self._answer(wait[2], {"result": self._jobs[wait[1]].report()})


def find_port(name: str = PORT_NAME, *, timeout: float = 30.0, sysfs: str = "/sys", dev: str = "/dev") -> str:
    """Return the device node of the virtio-serial port with this name; the kernel learns of it a little after boot.

    Raises `TimeoutError` if it does not appear within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    root = f"{sysfs}/class/virtio-ports"
    while True:
        for node in os.listdir(root) if os.path.isdir(root) else ():
            try:
                with open(f"{root}/{node}/name", encoding="utf-8") as file:
                    if file.read().strip() == name:
                        return f"{dev}/{node}"
            except OSError:
                continue  # unnamed, or gone again
        if time.monotonic() >= deadline:
            raise TimeoutError(f"no virtio-serial port '{name}' in {root} within {timeout:g} s; does the VM have one?")
        time.sleep(0.02)


def _seconds(arguments: dict[str, Any], default: float) -> float:
    timeout = arguments.get("timeout", default)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 <= timeout <= LONGEST_WAIT:
        raise RequestError("bad-argument", f"'timeout' is a number of seconds from 0 to {LONGEST_WAIT:g}")
    return float(timeout)


def _describe_status(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"was killed by signal {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exited with status {os.waitstatus_to_exitcode(status)}"


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
