"""The device's side of a migration that the client drives through the vfio-user protocol.

The state that is read and written here is the very one of the command `save` (`vmbus.device.saved.encode`). What makes
the difference is who asks, and when: the client's requests come one at a time and are answered when they are done, so
stopping the device means waiting for its providers *in* the request. Their timers run meanwhile; the event loop and
the control socket do not.

State machine: `_STEPS`. The library lets through only those steps, and leads from one state to a remote one by several.

| from | to | what happens |
| --- | --- | --- |
| RUNNING | STOP | channels are quiesced, providers complete what they hold and give up what they own outside |
| RUNNING | PRE_COPY | nothing: guest memory is the client's, and our own state is only taken when nothing moves |
| PRE_COPY | RUNNING | nothing |
| PRE_COPY | STOP_COPY | as RUNNING to STOP, then as STOP to STOP_COPY; if the second fails, the device runs on |
| STOP | STOP_COPY | the state is saved, to be read |
| STOP_COPY | STOP | it is forgotten |
| STOP | RESUMING | a state is expected |
| RESUMING | STOP | it is checked; only if it is good, a new device takes the present one's place |
| STOP | RUNNING | providers take what they own outside, channels go on; after RESUMING, rings and packets come first |

A device whose providers have files that belong to its state is not saved in this way: the client would not take them
along. Rings and packets are put back that late because only then guest memory is complete for certain.

A step that fails changes nothing: the client gets an errno, our log the reason. So a source on which anything failed
is told to go back to RUNNING, and runs on.
"""

from __future__ import annotations

import errno
import logging
import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmbus.device import saved
from vmbus.device.pci import ConfigSpace
from vmbus.errors import EnvironmentProblem, PeerError, StateError, UsageError, VmbusError, WaitTimeout
from vmbus.memory.guest import DirtyLogBroken
from vmbus.server.files import wanted_files
from vmbus.server.phase import NEXT, Phase, Step
from vmbus.transport.context import ResetKind
from vmbus.transport.migration import MigrationRefused, MigrationState
from vmbus.transport.protocol import DeviceState
from vmbus.util.complaints import bounded_log

if TYPE_CHECKING:
    from vmbus.server.app import DeviceServer

log = bounded_log(__name__)

STOP_SECONDS = 4.0
"""How long providers may take to complete what they hold. QEMU waits for an answer for 5 s."""

# Without timers or work that ends, we look again after this many seconds: a completion may also come from elsewhere.
_LONGEST_NAP = 0.05


class Incoming:
    """A state that is being written, piece by piece. It is judged as early as possible, and never longer than said."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._expected: int | None = None
        self._state: saved.DeviceState | None = None

    def __len__(self) -> int:
        return len(self._data)

    @property
    def complete(self) -> bool:
        """Whether a whole state is there, intact and decoded."""
        return self._state is not None

    def add(self, data: bytes) -> None:
        """The next piece. Raises StateError if this cannot become a state any more.

        The last one has the whole looked at, so that a client hears of damage while it still loads.
        """
        head = bytes(self._data[: saved.HEAD_SIZE]) + data[: max(0, saved.HEAD_SIZE - len(self._data))]
        if self._expected is None and len(head) == saved.HEAD_SIZE:
            self._expected = saved.expected_size(head)
        if self._expected is not None and len(self._data) + len(data) > self._expected:
            raise StateError(
                f"{len(self._data) + len(data)} bytes of device state were written, more than the {self._expected} "
                "that its head announces"
            )
        self._data += data
        if len(self._data) == self._expected:
            self._state = saved.decode(bytes(self._data))

    def finish(self) -> tuple[saved.DeviceState, bytes]:
        """What was written, decoded, and its bytes. Raises StateError."""
        data = bytes(self._data)
        return self._state or saved.decode(data), data


class Driven:
    """Implements `MigrationHandler`. One per server; a new client finds it as at the start.

    Attributes:
        state: where the client has led the device. stop_seconds: see STOP_SECONDS.
        held: packets from the guest that providers held when the device was last stopped.
    """

    def __init__(self, server: DeviceServer, *, stop_seconds: float = STOP_SECONDS) -> None:
        self._server = server
        self.stop_seconds = stop_seconds
        self.state = MigrationState.RUNNING
        self.held = 0
        self._stopped_from = Phase.RUNNING
        self._outgoing: memoryview | None = None
        self._read = 0
        self._given: bytes | None = None
        self._incoming = Incoming()
        # Checked and in place, but not restored: its packets and rings wait for RUNNING.
        self._loaded: tuple[saved.DeviceState, bytes] | None = None
        self._logging = False

    @property
    def given(self) -> bytes | None:
        """The state that the client reads or has read, until the device runs on."""
        return self._given

    @property
    def complete(self) -> bool:
        """Whether the client has written a whole state that is intact; whether it fits is judged when it is done."""
        return self._loaded is not None or self._incoming.complete

    # ---- what the client asks ------------------------------------------------------------------------------------

    def transition(self, state: MigrationState) -> None:
        """One step of `_STEPS`. Raises MigrationRefused; the state is as before then."""
        step = _STEPS.get((self.state, state))
        if step is None:
            raise MigrationRefused(f"the device cannot go from {self.state.name} to {state.name}", errno.EINVAL)
        started = time.monotonic()
        try:
            step(self)
        except MigrationRefused as refusal:
            raise MigrationRefused(f"{self.state.name} to {state.name}: {refusal}", refusal.errno) from refusal
        log.info("the client's migration: %s to %s in %.3f s", self.state.name, state.name, time.monotonic() - started)
        self.state = state

    def about_to_go(self, target: DeviceState) -> None:
        """Refuses to end a save for which the client does not have all of guest memory."""
        if self.state is not MigrationState.STOP_COPY or target is not DeviceState.STOP or self._outgoing is None:
            return
        pages = self._server.device.memory.log.pages if self._logging and self._server.device.memory.log else ()
        if pages and self._read == len(self._outgoing):
            raise MigrationRefused(
                f"STOP_COPY to STOP: the state was read, and {len(pages)} pages that the device had written were never "
                "reported: a copy of guest memory without them does not belong to this state; ask for LOGGING_REPORT "
                "of every region first (or go to RUNNING, to give the migration up)",
                errno.EBUSY,
            )

    def read_data(self, size: int) -> bytes:
        """The next piece of the saved state; nothing while the device runs."""
        if self._outgoing is None:
            return b""
        piece = bytes(self._outgoing[self._read : self._read + size])
        self._read += len(piece)
        return piece

    def write_data(self, data: bytes) -> None:
        """The next piece of the state to be restored. After a refusal the client may begin anew."""
        try:
            self._incoming.add(data)
        except StateError as error:
            written, self._incoming = len(self._incoming), Incoming()
            raise MigrationRefused(
                f"the state is refused after {written} bytes: {error}; what was written is forgotten", errno.EINVAL
            ) from error

    def log_start(self) -> None:
        if self._logging:
            return
        memory = self._server.device.memory
        if memory.log is not None:
            raise MigrationRefused(
                "LOGGING_START: a dirty log is running already, started by a command on the control socket; end that "
                "first (log-stop)",
                errno.EBUSY,
            )
        memory.start_log()
        self._logging = True

    def log_stop(self) -> None:
        """End the log, if the client started it."""
        if not self._logging:
            return
        self._logging = False
        memory = self._server.device.memory
        if self.state is MigrationState.STOP_COPY and memory.log is not None and memory.log.pages:
            log.warning(
                "the client's migration: logging ends with %d written pages not reported, while the state is saved",
                len(memory.log.pages),
            )
        memory.stop_log()

    def log_take(self, iova: int, size: int, *, unmapping: bool) -> list[tuple[int, int]]:
        """The logged pages in a piece of guest memory."""
        if not self._logging:
            if unmapping:
                return []  # the library refuses
            raise MigrationRefused("LOGGING_REPORT: no log is running; LOGGING_START comes first", errno.EINVAL)
        goes_on = not unmapping and self._server.phase is not Phase.DRIVEN
        try:
            return self._server.device.memory.take_dirty(iova, size, written_on=goes_on)
        except DirtyLogBroken as error:
            raise MigrationRefused(f"the log of written memory is lost: {error}", errno.EIO) from error

    def reset(self, kind: ResetKind) -> None:
        """The function was reset. A lost client also leaves its migration behind: the next begins in RUNNING.

        If it has read a whole state, the device may live on elsewhere: ours then stays paused until `resume`.
        """
        if kind is not ResetKind.LOST_CONNECTION:
            return
        if self.state is not MigrationState.RUNNING:
            # In STOP is how the source of a migration is left when all went well.
            level = logging.INFO if self.state is MigrationState.STOP else logging.WARNING
            log.log(level, "the client left in migration state %s; the device was reset", self.state.name)
        self.log_stop()
        self.state = MigrationState.RUNNING
        gone = self._given is not None and self._read == len(self._given)
        self._outgoing = self._loaded = self._given = None
        self._incoming = Incoming()
        if self._server.phase is Phase.DRIVEN:
            if self._stopped_from is Phase.AWAITING:
                self._server.step(Step.AWAIT)
            elif gone:
                # The device may live on elsewhere by now, and what our providers owned outside with it.
                self._server.step(Step.KEEP)
                log.info("the client left with the device's state; the device stays paused until the command resume")
            else:
                self._run_without_client()

    def _run_without_client(self) -> None:
        try:
            self._server.run_on()
        except VmbusError as error:
            self._server.step(Step.KEEP)
            log.error("the device stays paused until the command resume: %s", error)

    # ---- steps ---------------------------------------------------------------------------------------------------

    def _nothing(self) -> None:
        pass

    def _stop(self) -> None:
        server = self._server
        if server.phase not in NEXT[Step.DRIVE]:
            raise MigrationRefused(
                f"the device server is {server.phase.value}: commands on its control socket have the device; let them "
                "finish, or resume it",
                errno.EBUSY,
            )
        if server.changing:
            raise MigrationRefused("providers are just being added or withdrawn; try again", errno.EBUSY)
        if server.phase is Phase.RUNNING:
            self._come_to_rest()
        self._stopped_from = server.phase
        server.step(Step.DRIVE)

    def _come_to_rest(self) -> None:
        """Quiesce all channels until their owners have completed what they hold. In vain: everything runs on."""
        server = self._server
        channels = server.device.channels
        self.held = sum(len(channel.outstanding) for channel in channels)
        server.device.freeze()
        for channel in channels:
            channel.quiesce()
        # Nothing to wait on: what we wait for happens in our own timers.
        nap = select.poll()
        nap.register(server.services.fileno(), select.POLLIN)
        deadline = time.monotonic() + self.stop_seconds
        causes: list[BaseException] = []
        with server.ends_with_faults(causes.append):
            while server.services.busy or not all(channel.quiescent for channel in channels):
                if causes:
                    break
                left = deadline - time.monotonic()
                if left <= 0:
                    missing = {channel.name: channel.outstanding[:8] for channel in channels if channel.outstanding}
                    what = f"the owners of channels to complete incoming packets {missing}"
                    if not missing:
                        what = f"work that providers have done on other threads to end {server.services.busy}"
                    server.run_on()
                    raise MigrationRefused(
                        f"{WaitTimeout(what, self.stop_seconds)}; the device runs on", errno.ETIMEDOUT
                    )
                due = server.timers.next_in()
                nap.poll(1000 * min(left, _LONGEST_NAP if due is None else due))
                server.timers.run_due()
                server.services.run_ready()
                if server.device.local_bus.busy:
                    server.device.local_bus.service()
        if causes:
            server.run_on()
            raise MigrationRefused(f"{causes[0]}; the device runs on", errno.EIO)
        try:
            server.deactivate()
        except VmbusError as error:
            self._go_on()
            raise MigrationRefused(f"{error}; the device runs on", errno.EIO) from error

    def _go_on(self) -> None:
        """As before the stop. Raises MigrationRefused if a provider cannot take back what it gave up."""
        try:
            self._server.run_on()
        except VmbusError as error:
            raise MigrationRefused(f"{error}; try again", errno.EAGAIN) from error

    def _save(self) -> None:
        self._check_log()
        if self._loaded is not None:
            data = self._loaded[1]  # it never ran here: what came in goes out again
        elif self._stopped_from is Phase.AWAITING:
            raise MigrationRefused("this server awaits a state and has none to give", errno.EINVAL)
        else:
            data = self._saved()
        self._given, self._outgoing, self._read = data, memoryview(data), 0

    def _saved(self) -> bytes:
        server = self._server
        try:
            if wanted := wanted_files(server.providers):
                raise UsageError(
                    f"the files {sorted(map(str, wanted.values()))} of providers belong to the device's state, and the "
                    "client does not take them along; keep them where both hosts reach them, and say so in the "
                    "provider's options"
                )
            state = saved.save_device(
                server.description.name, server.config.snapshot(), server.device, server.providers
            )
            data = saved.encode(state)
            saved.verify(data, server.providers)
            return data
        except VmbusError as error:
            raise MigrationRefused(f"the device cannot be saved: {error}", errno.EIO) from error
        except Exception as error:
            log.exception("a provider could not be saved")
            raise MigrationRefused(f"the device cannot be saved: {error!r}", errno.EIO) from error

    def _check_log(self) -> None:
        memory = self._server.device.memory
        if self._logging and memory.log is not None and memory.log.broken is not None:
            raise MigrationRefused(
                f"{memory.log.broken} and not reported, so no copy of guest memory can be complete; start again: "
                "LOGGING_STOP, LOGGING_START, and copy all of it",
                errno.EIO,
            )

    def _stop_and_save(self) -> None:
        self._check_log()
        self._stop()
        try:
            self._save()
        except BaseException:
            if self._stopped_from is Phase.AWAITING:
                self._server.step(Step.AWAIT)
            else:
                self._go_on()
            raise

    def _forget_outgoing(self) -> None:
        self._outgoing = None

    def _expect_state(self) -> None:
        if self._server.device.memory.log is not None:
            raise MigrationRefused("a dirty log is running, so the device is being saved; stop that first", errno.EBUSY)
        self._incoming = Incoming()

    def _take_state(self) -> None:
        written, self._incoming = self._incoming, Incoming()
        try:
            state, data = written.finish()
            saved.count_packets(state)
            fresh = ConfigSpace()
            fresh.load(state.config)
            self._server.change_session(state)
        except VmbusError as error:
            raise MigrationRefused(
                f"the state of {len(written)} bytes is refused: {error}; what was written is forgotten: write another, "
                "or hang up",
                errno.EINVAL,
            ) from error
        self._server.config.load(state.config)
        self._loaded = state, data

    def _run(self) -> None:
        server = self._server
        if self._loaded is not None:
            state, _ = self._loaded
            try:
                restored = saved.restore_device(state, server.device, server.providers, before_start=server.activate)
            except EnvironmentProblem as error:
                raise MigrationRefused(f"the device cannot be restored: {error}", errno.EIO) from error
            except (StateError, PeerError) as error:
                raise MigrationRefused(
                    f"{error}; guest memory has to be there before the device runs", errno.EINVAL
                ) from error
            except Exception as error:
                log.exception("a provider could not be restored")
                raise MigrationRefused(f"the device cannot be restored: {error!r}", errno.EIO) from error
            self._loaded = None
            log.info(
                "the client's migration: restored with %d packets queued and %d sent",
                restored.packets.queued,
                restored.packets.sent,
            )
        elif self._stopped_from is Phase.AWAITING:
            raise MigrationRefused("this server awaits a state, and none was written", errno.EINVAL)
        self._go_on()
        self._given = None


_STEPS: dict[tuple[MigrationState, MigrationState], Callable[[Driven], None]] = {
    (MigrationState.RUNNING, MigrationState.STOP): Driven._stop,
    (MigrationState.RUNNING, MigrationState.PRE_COPY): Driven._nothing,
    (MigrationState.PRE_COPY, MigrationState.RUNNING): Driven._nothing,
    (MigrationState.PRE_COPY, MigrationState.STOP_COPY): Driven._stop_and_save,
    (MigrationState.STOP, MigrationState.STOP_COPY): Driven._save,
    (MigrationState.STOP_COPY, MigrationState.STOP): Driven._forget_outgoing,
    (MigrationState.STOP, MigrationState.RESUMING): Driven._expect_state,
    (MigrationState.RESUMING, MigrationState.STOP): Driven._take_state,
    (MigrationState.STOP, MigrationState.RUNNING): Driven._run,
}
