"""The block provider: joins the channel, the disk's core and the image. See docs/provider-block.md."""

import errno
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

import msgspec

from vmbus.complaints import bounded_log
from vmbus.errors import EnvironmentProblem, StateError, UsageError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.status import KmclError
from vmbus.providers.base import Bound, Host, Provider, Work
from vmbus.providers.block.backend import Backend
from vmbus.providers.block.core import Core, Geometry, Job, JobState, Outcome
from vmbus.providers.block.image import MEBIBYTE, Image, clone_directory, image_path, open_image, replace_content
from vmbus.wire.block import (
    BLOCK_TYPE,
    VERSION,
    Disk,
    Feature,
    Hello,
    Op,
    Request,
    Status,
    pack_status,
    parse_request,
)

log = bounded_log(__name__)

MAXIMUM_DATA = 1 << 20
MAXIMUM_RANGE = 64 << 20
PATIENCE = 2.0
"""Seconds that a reset of the device, or the guest that takes its memory back, waits for operations under way."""

FILE = "disk"
"""The image's name among the files of a snapshot."""

_FEATURES = Feature.FUA | Feature.DISCARD | Feature.WRITE_ZEROES
_HAS_DATA = frozenset({Op.READ, Op.WRITE})


class BlockOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See docs/provider-block.md."""

    image: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    size_mib: Annotated[int, msgspec.Meta(ge=1, le=1 << 26)] | None = None
    create: bool = False
    read_only: bool = False
    block_size: Literal[512, 4096] = 512
    queue_depth: Annotated[int, msgspec.Meta(ge=1, le=256)] = 64
    snapshot: Literal["copy", "shared"] = "copy"

    def __post_init__(self) -> None:
        if self.create and self.size_mib is None:
            raise ValueError("create = true needs size_mib")
        if self.create and self.read_only:
            raise ValueError("create = true makes an empty disk, and read_only = true lets nobody fill it")


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is saved. `features`: as agreed in the guest's HELLO; None before it. `stamp`: see `Image.stamp`."""

    version: Literal[1]
    features: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] | None
    size: Annotated[int, msgspec.Meta(gt=0, le=(1 << 63) - 1)]
    block_size: Literal[512, 4096]
    stamp: Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


_decoder = msgspec.msgpack.Decoder(_State)


class _Token(NamedTuple):
    """A request that is to be answered: its handle, and its memory."""

    completion: Completion
    views: Sequence[memoryview]


class BlockProvider(Provider):
    """See the package's text."""

    kind = "block"
    Options = BlockOptions

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        self.counters = {"requests": 0, "refused": 0, "errors": 0, "bytes_read": 0, "bytes_written": 0, "flushes": 0}
        self.core: Core | None = None
        self._image: Image | None = None
        self._backend: Backend | None = None
        self._features: int | None = None  # as agreed on with the guest; None before its HELLO
        self._left: int | None = None  # the image's stamp when it was closed last
        self._copy: Path | None = None
        self._directory: Path | None = None  # of the image, if it is not among the others
        self._restored: _State | None = None
        self._resting = False
        self._under_way = UnderWay()
        self._full = 0
        self._work: dict[Job, Work] = {}  # what was given to other threads on behalf of the present channel
        self.channel = ServerChannel(BLOCK_TYPE, instance, name=name)

    # ---- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        channel = self.channel
        channel.set_maximum_external_data(MAXIMUM_DATA)
        channel.set_process_packet_callbacks(self._process)
        channel.set_state_change_callbacks(
            opened=self._opened, closed=self._closed, started=self._started, suspend=self._suspend
        )
        channel.set_transaction_quota(self.options.queue_depth)
        self.host.add_channel(channel)
        channel.enable()
        channel.start()

    def activate(self) -> None:
        """Open and lock the image, after a restore with the content that it had at the save."""
        if self._image is not None:
            return
        options: BlockOptions = self.options
        create = None if options.size_mib is None or not options.create else options.size_mib * MEBIBYTE
        if self._copy is not None:
            create = create or 0
        image = open_image(options.image, read_only=options.read_only, create=create, directory=self._directory)
        if self._copy is not None:
            image = replace_content(image, self._copy)
        try:
            self._check_image(image)
        except BaseException:
            image.close()
            raise
        self._copy = self._restored = self._left = None
        if self.core is None:
            geometry = Geometry(image.size, options.block_size, MAXIMUM_DATA, MAXIMUM_RANGE, options.read_only)
            self.core = Core(geometry, self._features or 0)
        self._image = image
        self._backend = self.make_backend(image)

    def make_backend(self, image: Image) -> Backend:
        """What carries out the requests. Tests put faults in here."""
        return image.backend

    def _check_image(self, image: Image) -> None:
        """Raises EnvironmentProblem when this is not the disk that the description, the guest or the state knows."""
        options: BlockOptions = self.options
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
            raise EnvironmentProblem(
                f"{path} was written to after the VM was saved, so it does not fit the guest's memory any more; a "
                'snapshot that shall outlive its VM needs the image in it: snapshot = "copy"'
            )
        if self._left is not None and image.stamp != self._left:
            raise EnvironmentProblem(
                f"{path} was written to by somebody else while the device stood still: it does not fit the guest's "
                "memory any more"
            )

    def deactivate(self) -> None:
        """Close the image, and let go of its lock. Everything is on stable storage: `suspend` has seen to it."""
        image, self._image = self._image, None
        if image is not None:
            try:
                self._left = image.leave()
            finally:
                image.close()
                self._close()

    def stop(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._backend is not None:
            self._backend.close()
        if self._image is not None:
            self._image.close()
        self._image = self._backend = None

    # ---- the channel ---------------------------------------------------------------------------------------------

    def _opened(self, _: Channel) -> None:
        self._features = None

    def _closed(self, _: Channel) -> None:
        self._features = None
        if self.core is None:
            return
        self.core.forget(self._take_back)
        # The guest is about to use its memory for something else. What is taken back cannot be reached any more in any
        # case; but after a mere reset it can, and a write whose memory is gone in the middle would write zeroes.
        if not self._under_way.wait(PATIENCE):
            log.error("disk %s: after %g s there still run %s", self.name, PATIENCE, self.core.running)

    def _started(self, _: Channel) -> None:
        self._resting = False

    def _suspend(self, _: Channel) -> None:
        self._resting = True
        self._settle()

    def _settle(self) -> None:
        """At rest: when the last request has ended, bring everything to stable storage."""
        if self._resting and self.core is not None and self.core.only_flushes and self._backend is not None:
            self._carry_out(Outcome([], self.core.flush()))

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        core = self.core
        message = parse_request(payload)
        self.counters["requests"] += 1
        if message is None or core is None or self._backend is None:
            self._refuse(completion, Status.INVALID if message is None else Status.IO_ERROR)
        elif isinstance(message, Hello):
            self._hello(core, completion, message)
        elif self._features is None:
            self._refuse(completion, Status.NO_HELLO)
        else:
            self._request(core, completion, message)

    def _hello(self, core: Core, completion: Completion, hello: Hello) -> None:
        if hello.version < VERSION:
            self._refuse(completion, Status.UNSUPPORTED)
            return
        read_only = core.geometry.read_only
        features = int(hello.features & _FEATURES) if not read_only else 0
        core.features = self._features = features
        disk = Disk(
            status=Status.OK,
            version=VERSION,
            features=features | (Feature.READ_ONLY if read_only else 0),
            block_size=core.geometry.block_size,
            size=core.geometry.size,
            maximum_data=MAXIMUM_DATA,
            queue_depth=self.options.queue_depth,
            maximum_range=MAXIMUM_RANGE,
            identity=self.instance.bytes,
        )
        completion.complete(disk.pack())

    def _request(self, core: Core, completion: Completion, request: Request) -> None:
        status = core.check(request)
        views: Sequence[memoryview] = ()
        if status is Status.OK and request.op in _HAS_DATA:
            try:
                grant = completion.external_data(read_only=request.op == Op.WRITE)
            except KmclError as error:
                log.debug("disk %s: %s", self.name, error)
                status = Status.BAD_MEMORY
            else:
                views = grant.views
                if grant.size != request.length:
                    status = Status.BAD_MEMORY
        if status is not Status.OK:
            self._refuse(completion, status)
            return
        self._carry_out(core.accept(request, _Token(completion, views)))
        if core.under_way >= self.options.queue_depth:
            self._full += 1

    def _refuse(self, completion: Completion, status: Status) -> None:
        self.counters["refused"] += 1
        completion.complete(pack_status(status))

    def _carry_out(self, outcome: Outcome) -> None:
        backend = self._backend
        for job in outcome.jobs:
            assert backend is not None
            views = job.tokens[0].views if job.tokens else ()
            self._work[job] = self.host.run_blocking(
                partial(perform, self._under_way, backend, job, views), partial(self._done, job)
            )
        for token, status in outcome.answers:
            token.completion.complete(pack_status(status))

    def _take_back(self, job: Job) -> bool:
        """The channel is gone: whether a job was not begun, and will not be."""
        work = self._work.pop(job, None)
        return work is not None and work.cancel()

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

    # ---- save and restore ------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        core = self.core
        if self._restored is not None:
            return msgspec.msgpack.encode(self._restored)
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
        stamp = self._image.stamp if self._image is not None else self._left or 0
        return msgspec.msgpack.encode(
            _State(
                version=1,
                features=self._features,
                size=core.geometry.size,
                block_size=self.options.block_size,
                stamp=stamp,
            )
        )

    def _decoded(self, state: bytes) -> _State:
        saved = self.decoded(_decoder, state)
        if saved.block_size != self.options.block_size or saved.size % saved.block_size:
            raise StateError(
                f"the saved disk {self.name!r} has {saved.size} bytes in blocks of {saved.block_size}, and block_size "
                f"is {self.options.block_size} here"
            )
        if saved.features is not None and saved.features & ~int(_FEATURES):
            raise StateError(f"the saved disk {self.name!r} has features {saved.features:#x}; known: {_FEATURES:#x}")
        return saved

    def check(self, state: bytes) -> None:
        self._decoded(state)

    def restore(self, state: bytes) -> None:
        saved = self._decoded(state)
        self._restored = saved
        self._features = saved.features
        if self.core is not None:
            self.core.features = saved.features or 0

    def files(self) -> dict[str, Path]:
        options: BlockOptions = self.options
        if options.snapshot == "shared" or options.read_only:
            return {}
        return {FILE: image_path(options.image, self._directory)}

    def restore_files(self, files: Mapping[str, Path]) -> None:
        unknown = sorted(set(files) - {FILE})
        if unknown:
            raise StateError(f"disk {self.name!r} has one file, {FILE!r}; the snapshot has {unknown} too")
        self._copy = files.get(FILE)
        if self._copy is not None:
            self._directory = clone_directory()

    def status(self) -> dict[str, Any]:
        core = self.core
        return {
            "image": self.options.image,
            "size": None if core is None else core.geometry.size,
            "locked": self._image is not None,
            "open": self._features is not None,
            **self.counters,
            "running": [] if core is None else core.running,
            "waiting": 0 if core is None else core.count({JobState.WAITING}),
            "orphaned": 0 if core is None else core.count({JobState.ORPHANED}),
            "flush_failed": 0 if core is None else core.flush_failed,
        }

    def bounds(self) -> dict[str, Bound]:
        now = 0 if self.core is None else self.core.under_way
        return {"requests": Bound(now, self.options.queue_depth, self._full)}


class UnderWay:
    """Jobs that touch guest memory at this moment, on whatever threads."""

    def __init__(self) -> None:
        self._jobs: set[Job] = set()
        self._given_up: set[Job] = set()
        self._condition = threading.Condition()

    def __len__(self) -> int:
        return len(self._jobs)

    @contextmanager
    def __call__(self, job: Job) -> Iterator[None]:
        """One more for as long as the block runs."""
        with self._condition:
            self._jobs.add(job)
        try:
            yield
        finally:
            with self._condition:
                self._jobs.discard(job)
                self._given_up.discard(job)
                if self._jobs == self._given_up:
                    self._condition.notify_all()

    def wait(self, seconds: float) -> bool:
        """Block until there are none; returns whether that is so within `seconds`.

        Each is waited for once: a guest that resets the function again and again while a disk hangs must not make the
        server stand still all the time.
        """
        with self._condition:
            if not self._condition.wait_for(lambda: self._jobs == self._given_up, seconds):
                self._given_up = set(self._jobs)
            return not self._jobs


def perform(under_way: UnderWay, backend: Backend, job: Job, views: Sequence[memoryview]) -> None:
    """Do a job, on a thread. Touches nothing but the back-end, the job's own fields, and the guest's memory in `views`.

    Raises OSError.
    """
    if job.op == Op.FLUSH:
        backend.flush()
    elif job.orphaned:
        return  # its thread had just taken it
    elif job.op == Op.DISCARD:
        backend.discard(job.offset, job.length)
    elif job.op == Op.WRITE_ZEROES:
        backend.write_zeroes(job.offset, job.length, may_unmap=job.may_unmap, durable=job.durable)
    else:
        with under_way(job):
            # Looked at inside: whoever makes orphans waits for all that did not see it.
            if job.orphaned:
                return
            if job.op == Op.READ:
                backend.read(job.offset, views)
            else:
                backend.write(job.offset, views, durable=job.durable)
