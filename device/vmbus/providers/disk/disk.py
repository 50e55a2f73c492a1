"""A disk: its image, what it decides, and the threads that do its work. The protocol of guests is in front of it.

Made once, then activated and deactivated by turns. Between two of these the image's descriptor stays, without the lock:
so the disk is the file that was opened, whatever is done to its name meanwhile.
"""

import errno
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from vmbus.errors import EnvironmentProblem, StateError, UsageError
from vmbus.providers.base import Host, Work
from vmbus.providers.disk.at_once import AtOnce
from vmbus.providers.disk.backend import Backend, Movable
from vmbus.providers.disk.core import Core, Geometry, Job, JobState, Outcome
from vmbus.providers.disk.image import (
    MEBIBYTE,
    Image,
    clone_directory,
    image_path,
    open_image,
    replace_content,
    require_own,
)
from vmbus.providers.disk.options import DiskOptions, DiskRecord
from vmbus.providers.disk.request import Op, Request, Status
from vmbus.providers.disk.work import UnderWay, perform
from vmbus.util.complaints import bounded_log

log = bounded_log(__name__)

MAXIMUM_DATA = 1 << 20
MAXIMUM_RANGE = 64 << 20
PATIENCE = 2.0
"""Seconds that a reset of the device, or the guest that takes its memory back, waits for operations under way."""
MOST_AT_ONCE = 4 << 20
"""Bytes that are read and written on the event loop, in one turn, for requests that waited for one that has ended."""
MOST_JOBS = 8
"""Jobs of one disk that are given to threads at the same time."""


class Token(Protocol):
    """A request that is to be answered: `views` is its memory, in order."""

    @property
    def views(self) -> Sequence[memoryview]:
        """The memory to be read into, or written from."""


class Disk:
    """One disk.

    Attributes:
        name: for messages. core: None before the first `activate`. counters: what happened so far.
        most_jobs: how many may be with threads at a time.
        on_idle: called once, when nothing runs or waits any more; then it is forgotten.
    """

    def __init__(
        self,
        host: Host,
        name: str,
        options: DiskOptions,
        answer: Callable[[Any, Status], None],
        make_backend: Callable[[Image], Backend],
    ) -> None:
        """`answer(token, status)`: a request that was submitted is done."""
        self._host = host
        self.name = name
        self.options = options
        self._answer = answer
        self._make_backend = make_backend
        self.counters = {"errors": 0, "bytes_read": 0, "bytes_written": 0, "flushes": 0}
        self.core: Core | None = None
        self.most_jobs = MOST_JOBS
        self.on_idle: Callable[[], None] | None = None
        self.under_way = UnderWay()
        self._image: Image | None = None
        self._active = False
        self.backend: Backend | None = None
        self._at_once: AtOnce | None = None
        self._left: int | None = None  # the image's stamp when it was given up last
        self._copy: Path | None = None
        self._directory: Path | None = None  # of the image, if it is not among the others
        self._restored: DiskRecord | None = None
        self._resting = False
        self._ready: dict[Job, None] = {}  # that may begin, and wait for others to end; in their order
        self._work: dict[Job, Work] = {}  # what was given to other threads

    # ---- the image -----------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        return self._active

    def activate(self) -> None:
        """Open and lock the image, after a restore with the content that it had at the save. Raises EnvironmentProblem;
        nothing is taken then."""
        if self._active:
            return
        if self._image is not None:
            self._take_again(self._image)
            return
        options = self.options
        create = None if options.size_mib is None or not options.create else options.size_mib * MEBIBYTE
        if self._copy is not None:
            create = create or 0
        elif self._restored is not None:
            create = None  # an empty one would not be the guest's disk
            path = image_path(options.image, self._directory)
            if not path.exists():
                raise EnvironmentProblem(f"there is no disk image {path}: who goes on with a VM needs the same image")
        image = open_image(options.image, read_only=options.read_only, create=create, directory=self._directory)
        if self._copy is not None:
            image = self._with_copy(image, self._copy)
        elif self._restored is None and not options.read_only and image.identity == "":
            image.mark(uuid4().hex)
        try:
            self._check_image(image)
        except BaseException:
            image.close()
            raise
        self._copy = self._restored = None
        if self.core is None:
            geometry = Geometry(image.size, options.block_size, MAXIMUM_DATA, MAXIMUM_RANGE, options.read_only)
            self.core = Core(geometry)
        self._image = image
        self._active = True
        self.backend = self._make_backend(image)
        self._at_once = AtOnce(self.backend, self.core, self.counters)

    def _with_copy(self, image: Image, copy: Path) -> Image:
        """With the content that came with the snapshot."""
        identity = "" if self._restored is None else self._restored.identity
        try:
            require_own(image, identity)
        except BaseException:
            image.close()
            raise
        return replace_content(image, copy, identity)

    def _take_again(self, image: Image) -> None:
        image.lock(read_only=self.options.read_only)
        try:
            self._check_image(image)
        except BaseException:
            image.unlock()
            raise
        self._left = None
        self._active = True

    def _check_image(self, image: Image) -> None:
        """Raises EnvironmentProblem when this is not the disk that the description, the guest or the state knows."""
        options = self.options
        path = image.path
        if not image.size or image.size % options.block_size:
            raise EnvironmentProblem(
                f"{path} has {image.size} bytes; a disk has a multiple of its block_size ({options.block_size}), not 0"
            )
        wanted = None if options.size_mib is None else options.size_mib * MEBIBYTE
        if self._restored is not None:
            wanted = self._restored.size
        if self.core is not None:
            wanted = self.core.geometry.size
        if wanted is not None and image.size != wanted:
            raise EnvironmentProblem(f"{path} has {image.size} bytes, and the disk {self.name!r} has {wanted}")
        if self._copy is not None:
            return
        if self._restored is not None and image.stamp != self._restored.stamp:
            hint = 'a snapshot that shall outlive its VM needs the image in it: snapshot = "copy"'
            if options.snapshot == "copy":
                hint = "both hosts have to reach the same image"
            raise EnvironmentProblem(
                f"{path} was written to after the VM was saved, or is another disk, so it does not fit the guest's "
                f"memory; {hint}"
            )
        if self._left is not None and image.stamp != self._left:
            raise EnvironmentProblem(
                f"{path} was written to by somebody else while the device stood still: it does not fit the guest's "
                "memory any more"
            )

    def deactivate(self) -> None:
        """Let go of the image's lock. Everything is on stable storage: `rest` has seen to it."""
        if self._active:
            assert self._image is not None
            self._active = False
            try:
                self._left = self._image.settle()
            except OSError as error:
                self.lost(error)
                raise
            finally:
                self._image.unlock()

    def lost(self, error: BaseException | None) -> None:
        """Something that is no request has asked for stable storage, and failed. That may have been the kernel's only
        report of lost pages: no later flush says that all is well."""
        if self.core is not None and isinstance(error, OSError) and error.errno == errno.EIO:
            self.core.flush_failed = self.core.flush_failed or errno.EIO

    def close(self) -> None:
        """Close the image, which ends the lock once no operation on it is under way. Repeating it does nothing."""
        if self.backend is not None:
            self.backend.close()
        if self._image is not None:
            self._image.close()
        self._image = self.backend = self._at_once = None
        self._active = False

    def grow(self, size: int | None) -> Callable[[], int]:
        """The work, for a thread, of making the image `size` bytes long; None: to see how long it is now. It returns
        the size, which `resized` is to be told. Raises UsageError."""
        image, core = self._image, self.core
        if image is None or core is None or not self._active:
            raise UsageError(f"disk {self.name!r} has no image at the moment")
        if size is not None and size < core.geometry.size:
            raise UsageError(
                f"disk {self.name!r} has {core.geometry.size} bytes; it can become larger, and {size} is less"
            )
        if size is not None and self.options.read_only:
            raise UsageError(f"disk {self.name!r} is read-only: its image cannot be changed")
        return partial(image.grow, size)

    def resized(self, size: int) -> bool:
        """What `grow` has found; whether it is another size than before. Raises UsageError for one that cannot be."""
        core = self.core
        assert core is not None
        if size < core.geometry.size or size % core.geometry.block_size:
            raise UsageError(
                f"the image of disk {self.name!r} has {size} bytes now, which is less than the disk's "
                f"{core.geometry.size}, or no multiple of its block_size"
            )
        changed = size != core.geometry.size
        core.geometry = core.geometry._replace(size=size)
        return changed

    # ---- requests ------------------------------------------------------------------------------------------------

    def submit(self, request: Request, token: Token) -> None:
        """Do a request that `Core.check` found OK; `answer` is called once, perhaps at once."""
        core = self.core
        assert core is not None
        op, flags, offset, length = request
        now = self._at_once if core.undisturbed and not flags else None
        if now is not None and now.transfer(op, offset, length, token.views):
            self._answer(token, Status.OK)
        else:
            self._carry_out(core.accept(request, token))

    def move(self, memory: Movable, offset: int, length: int, *, write: bool) -> bool:
        """Do a read or a write (not one with FUA) of which everything is known to be right, here and now; whether it is
        done. If not, it is as if it had not been tried: `submit` it."""
        return self._at_once is not None and self._at_once.move(memory, offset, length, write=write)

    def _carry_out(self, outcome: Outcome) -> None:
        core = self.core
        assert core is not None
        todo = [outcome]
        now, left = self._at_once, MOST_AT_ONCE
        while todo:
            answers, jobs = todo.pop()
            for token, status in answers:
                self._answer(token, status)
            for job in jobs:
                short = not job.durable and bool(job.tokens) and job.length <= left
                if short and now is not None and now.transfer(job.op, job.offset, job.length, job.tokens[0].views):
                    left -= job.length
                    todo.append(core.finished(job))
                else:
                    self._ready[job] = None
        self._begin()

    def _begin(self) -> None:
        """Give threads what they may have."""
        while self._ready and len(self._work) < self.most_jobs and self.backend is not None:
            job = next(iter(self._ready))
            del self._ready[job]
            views = job.tokens[0].views if job.tokens and job.op != Op.FLUSH else ()
            self._work[job] = self._host.run_blocking(
                partial(perform, self.under_way, self.backend, job, views), partial(self._done, job)
            )

    def _done(self, job: Job, _: None, error: BaseException | None) -> None:
        self._work.pop(job, None)
        core = self.core
        assert core is not None
        number = 0
        if error is not None:
            number = (error.errno if isinstance(error, OSError) else 0) or errno.EIO
            self.counters["errors"] += 1
            log.error("disk %s: %r failed: %s", self.name, job, error)
        elif job.op == Op.READ:
            self.counters["bytes_read"] += job.length
        elif job.op == Op.WRITE:
            self.counters["bytes_written"] += job.length
        elif job.op == Op.FLUSH:
            self.counters["flushes"] += 1
        self._carry_out(core.finished(job, number))
        self._settle()

    def forget(self, gone: Callable[[Any], bool] = lambda token: True) -> None:
        """The channel over which requests came is closed: nobody waits for those whose tokens are `gone`.

        Blocks until none of them touches guest memory any more, `PATIENCE` at most.
        """
        core = self.core
        if core is None:
            return
        self._ready.update(dict.fromkeys(core.forget(self._take_back, gone)))
        # The guest is about to use its memory for something else. What is taken back cannot be reached any more in any
        # case; but after a mere reset it can, and a write whose memory is gone in the middle would write zeroes.
        if not self.under_way.wait(PATIENCE):
            log.error("disk %s: after %g s there still run %s", self.name, PATIENCE, core.running)
        self._begin()
        self._settle()

    def _take_back(self, job: Job) -> bool:
        """Whether a job was not begun, and will not be."""
        if job in self._ready:
            del self._ready[job]
            return True
        work = self._work.get(job)
        if work is None or not work.cancel():
            return False
        del self._work[job]
        return True

    # ---- rest ----------------------------------------------------------------------------------------------------

    def go(self) -> None:
        """The device runs: what is written may stay in the host's memory."""
        self._resting = False

    def rest(self) -> None:
        """No more requests come: when the last one has ended, bring everything to stable storage."""
        self._resting = True
        self._settle()

    def _settle(self) -> None:
        core = self.core
        if self._resting and core is not None and core.only_flushes and self.backend is not None:
            self._carry_out(Outcome([], core.flush()))
        if self.on_idle is not None and self.idle:
            call, self.on_idle = self.on_idle, None
            call()

    @property
    def idle(self) -> bool:
        return self.core is None or self.core.idle

    # ---- save and restore ----------------------------------------------------------------------------------------

    def save(self) -> DiskRecord:
        """What is saved of it. Raises EnvironmentProblem and UsageError that say why it cannot be."""
        core = self.core
        if self._restored is not None:
            return self._restored
        if core is None:
            raise UsageError(f"disk {self.name!r} has not been opened yet: there is nothing to save")
        if core.flush_failed:
            raise EnvironmentProblem(
                f"disk {self.name!r}: the host could not bring data to stable storage (errno {core.flush_failed}, "
                f"{errno.errorcode.get(core.flush_failed)}), so nobody knows what the image {self.options.image} "
                "holds; no snapshot can be made of it"
            )
        if not core.idle:
            raise EnvironmentProblem(f"disk {self.name!r} still works on {core.running}")
        image = self._image
        if image is not None and not self._contained and not image.still_there:
            raise EnvironmentProblem(
                f"{image.path} is not the file any more that disk {self.name!r} has open: it was renamed, replaced or "
                "removed; a snapshot that does not contain the image could not be restored"
            )
        stamp = self._left if self._left is not None else image.stamp if image is not None else 0
        identity = "" if image is None else image.identity or ""
        return DiskRecord(core.geometry.size, self.options.block_size, stamp, identity)

    def check(self, saved: DiskRecord) -> None:
        """Raises StateError when `restore` will not take this."""
        if saved.block_size != self.options.block_size or saved.size % saved.block_size:
            raise StateError(
                f"the saved disk {self.name!r} has {saved.size} bytes in blocks of {saved.block_size}, and block_size "
                f"is {self.options.block_size} here"
            )

    def restore(self, saved: DiskRecord) -> None:
        """It again, before it is activated."""
        self.close()
        self.core = self._left = None
        self._restored = saved

    @property
    def _contained(self) -> bool:
        return self.options.snapshot == "copy" and not self.options.read_only

    @property
    def file(self) -> Path | None:
        """What a snapshot has to contain: the very file that is open, whatever has its name now; None: nothing."""
        if not self._contained:
            return None
        image = self._image
        return image_path(self.options.image, self._directory) if image is None else image.opened_path

    @property
    def shared(self) -> bool:
        """Whether whoever goes on with it can find the very image by its name, and tell that it is. A clone's images
        are its own, and a block device does not say when it was written to."""
        image = self._image
        return self._directory is None and image is not None and image.regular and image.still_there

    def restore_file(self, copy: Path | None) -> None:
        """Where the copy is that a snapshot contains. In a clone the disk gets an image of its own."""
        self._copy = copy
        if copy is not None:
            self._directory = clone_directory()

    # ---- inspection ----------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        core = self.core
        return {
            "image": self.options.image,
            "size": None if core is None else core.geometry.size,
            "locked": self._active,
            **self.counters,
            "running": [] if core is None else core.running,
            "waiting": 0 if core is None else core.count({JobState.WAITING}),
            "orphaned": 0 if core is None else core.count({JobState.ORPHANED}),
            "flush_failed": 0 if core is None else core.flush_failed,
        }
