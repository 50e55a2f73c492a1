"""The test drivers that the agent runs: each in a process of its own, watched until it ends."""

# Imports are kept few, os instead of pathlib and subprocess: each costs boot time in an emulated guest.

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable

from vmbus_guest.testdrivers import CATALOGUE, drivers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Tell = Callable[[dict[str, Any]], None]

MAXIMUM_REPORT = 1 << 20
"""Bytes of one line of a test driver."""
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
MAXIMUM_MESSAGE = 48 << 10
"""Bytes of one line to a test driver: less than its pipe holds, so that writing never waits."""
RUBBISH_SHOWN = 200
"""Bytes of the first line that is no report."""

_READ = 64 << 10


class RequestError(Exception):
    """A request that cannot be served. `kind` is for programs, the message for people."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Job:
    """One test driver in a process of its own."""

    def __init__(self, number: int, driver: str, pid: int, output: int, log: int, input_: int) -> None:
        self.number = number
        self.driver = driver
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.output = output  # the pipe with JSON lines; -1 once it ended
        self.log = log  # the pipe with standard error; -1 once it ended
        self.input = input_  # the pipe with lines of the host's
        self.asked: set[int | str] = set()  # requests for which it has no answer yet
        self.answers: list[tuple[int | str, Any]] = []
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

    @property
    def running(self) -> bool:
        return self.state == "running"

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it runs."""
        if self.running:
            signal.pidfd_send_signal(self.pidfd, number)

    def ask(self, identity: int | str, message: dict[str, Any]) -> None:
        """Hand it a line, which it answers with an event `answer` of the same `id`. Raises RequestError."""
        if not self.running:
            raise RequestError("not-running", f"job {self.number} has ended: it is {self.state}")
        line = json.dumps({**message, "id": identity}).encode() + b"\n"
        if len(line) > MAXIMUM_MESSAGE:
            raise RequestError("bad-argument", f"a message of {len(line)} bytes; at most {MAXIMUM_MESSAGE} are taken")
        try:
            whole = os.write(self.input, line) == len(line)
        except OSError as error:
            raise RequestError("busy", f"job {self.number} takes no message: {error}") from error
        if not whole:  # the rest would be lost, and the line would spoil the next one
            self.signal(signal.SIGKILL)
            raise RequestError("busy", f"job {self.number} has not read its messages for too long, and is killed")
        self.asked.add(identity)

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Take bytes of the driver's report; returns the new progress reports."""
        self._line += data
        reports: list[dict[str, Any]] = []
        *lines, rest = bytes(self._line).split(b"\n")
        if lines and self._skipping:
            self._skipping = False
            del lines[0]
        if len(rest) > MAXIMUM_REPORT:
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
            elif event == "answer" and report.get("id") in self.asked:
                self.asked.discard(report["id"])
                self.answers.append((report["id"], report.get("result")))
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
        report: dict[str, Any] = {
            "job": self.number,
            "driver": self.driver,
            "pid": self.pid,
            "state": self.state,
            "seconds": round(time.monotonic() - self.started if self.running else self.seconds, 3),
            "progress": self.progress,
            "result": self.result,
        }
        if self.error is not None:
            report["error"] = self.error
        if self.rubbish:
            report["rubbish"] = {"lines": self.rubbish, "first": self.first_rubbish}
        if self.running and self.quiet >= LOOK_EVERY:
            report["silent"] = round(self.quiet, 1)
        if self.status is not None:
            report["exit"] = _describe_status(self.status)
        if self.state == "failed" and self._tail:
            report["log"] = self._tail.decode(errors="replace")
        return report


class Jobs:
    """All of them. `tell` takes events for the host, `ended` a job that has ended, `answered` what one says to a
    request; `audit` is the directory in which test drivers keep audit records, None if they keep none."""

    def __init__(
        self,
        epoll: select.epoll,
        runner: tuple[str, ...],
        audit: str | None,
        tell: Tell,
        ended: Callable[[Job], None],
        answered: Callable[[int | str, dict[str, Any]], None],
    ) -> None:
        self._epoll = epoll
        self._runner = runner
        self._audit = audit
        self._tell = tell
        self._ended = ended
        self._answered = answered
        self._next = 1
        self._looked = time.monotonic()
        self._by_descriptor: dict[int, Job] = {}
        self.all: dict[int, Job] = {}

    @property
    def running(self) -> list[Job]:
        return [job for job in self.all.values() if job.running]

    def find(self, arguments: dict[str, Any]) -> Job:
        """The one that a request names. Raises RequestError."""
        number = arguments.get("job")
        job = self.all.get(number) if type(number) is int else None
        if job is None:
            raise RequestError("unknown-job", f"no job {number!r}; there are {sorted(self.all)}")
        return job

    def launch(self, arguments: dict[str, Any]) -> Job:
        """Start one. Raises RequestError."""
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
        if len(self.running) >= RUNNING_JOBS:
            raise RequestError("too-many-jobs", f"{RUNNING_JOBS} test drivers are running already")
        output, output_end = os.pipe2(os.O_CLOEXEC)
        log, log_end = os.pipe2(os.O_CLOEXEC)
        input_end, input_ = os.pipe2(os.O_CLOEXEC)
        try:
            pid = os.posix_spawn(
                self._runner[0],
                [
                    *self._runner,
                    driver,
                    "--parameters",
                    json.dumps(parameters),
                    *([] if self._audit is None else ["--audit", self._audit]),
                ],
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, input_end, 0),
                    (os.POSIX_SPAWN_DUP2, output_end, 1),
                    (os.POSIX_SPAWN_DUP2, log_end, 2),
                ],
            )
        except OSError as error:
            for descriptor in (output, log, input_):
                os.close(descriptor)
            raise RequestError("cannot-start", f"test driver '{driver}': {error}") from error
        finally:
            for descriptor in (output_end, log_end, input_end):
                os.close(descriptor)
        job = Job(self._next, driver, pid, output, log, input_)
        os.set_blocking(input_, False)
        job.patience = float(patience)
        self._next += 1
        self.all[job.number] = job
        for descriptor in (output, log, job.pidfd):
            os.set_blocking(descriptor, False)
            self._by_descriptor[descriptor] = job
            self._epoll.register(descriptor, select.EPOLLIN)
        finished = [number for number, other in self.all.items() if not other.running]
        for number in finished[:-FINISHED_JOBS]:
            del self.all[number]
        return job

    def events(self, descriptor: int) -> None:
        """Something happened at a descriptor of a job's."""
        job = self._by_descriptor.get(descriptor)
        if job is None:
            return  # it ended while this round's earlier events were handled
        if descriptor == job.pidfd:
            self._read_pipes(job)  # the last words are in the pipes before the process is gone
            _, status = os.waitpid(job.pid, 0)
            for other in (job.output, job.log, job.pidfd):
                self._drop(other)
            os.close(job.input)
            job.end(status)
            for identity in job.asked:
                error = {"kind": "not-running", "message": f"job {job.number} has ended: it is {job.state}"}
                self._answered(identity, {"error": error})
            self._tell({"event": "finished", "job": job.number, "state": job.state})
            self._ended(job)
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
                        self._tell({"event": "progress", "job": job.number, "progress": progress})
                    for identity, result in job.answers:
                        self._answered(identity, {"result": result})
                    job.answers.clear()

    def _drop(self, descriptor: int) -> None:
        if self._by_descriptor.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)
            os.close(descriptor)

    @property
    def next_look(self) -> float | None:
        """When `look_for_silence` is due; None while nobody could be silent."""
        interval = self.look_interval()
        return None if interval is None else self._looked + interval

    def look_interval(self) -> float | None:
        """Seconds between two looks at who says nothing; None while nobody could."""
        running = self.running
        return min([LOOK_EVERY, *(job.patience / 4 for job in running if job.patience)]) if running else None

    def look_for_silence(self, now: float) -> None:
        """Tell of those that have said nothing for long, and end those that may not."""
        interval = self.look_interval()
        elapsed = now - self._looked
        if interval is None:
            self._looked = now
        elif elapsed >= interval:
            self._looked = now
            for job in self.running:
                # The clock of a guest that is taken back to a checkpoint jumps: that is no silence.
                job.quiet += min(elapsed, 2 * interval)
                if job.patience and job.quiet >= job.patience and not job.hung:
                    job.hung = True
                    job.signal(signal.SIGKILL)
                elif job.quiet >= SILENT_AFTER and not job.quiet_told:
                    job.quiet_told = True
                    seconds = round(job.quiet, 1)
                    self._tell({"event": "silent", "job": job.number, "seconds": seconds})


def _describe_status(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"was killed by signal {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exited with status {os.waitstatus_to_exitcode(status)}"
