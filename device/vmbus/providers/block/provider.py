"""The block provider: a channel and its protocol in front of a disk. See docs/provider-block.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

import msgspec

from vmbus.complaints import bounded_log
from vmbus.errors import StateError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.status import KmclError
from vmbus.providers.base import Bound, Host, Provider
from vmbus.providers.disk.backend import Backend
from vmbus.providers.disk.core import Core
from vmbus.providers.disk.disk import MAXIMUM_DATA, MAXIMUM_RANGE, Disk, DiskOptions, DiskRecord
from vmbus.providers.disk.image import Image
from vmbus.wire.block import (
    BLOCK_TYPE,
    VERSION,
    Feature,
    Hello,
    Op,
    Request,
    Status,
    pack_status,
    parse_request,
)
from vmbus.wire.block import Disk as Description

log = bounded_log(__name__)

FILE = "disk"
"""The image's name among the files of a snapshot."""

_FEATURES = Feature.FUA | Feature.DISCARD | Feature.WRITE_ZEROES
_HAS_DATA = frozenset({Op.READ, Op.WRITE})


class BlockOptions(DiskOptions, frozen=True, forbid_unknown_fields=True):
    """See docs/provider-block.md."""

    queue_depth: Annotated[int, msgspec.Meta(ge=1, le=256)] = 64


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is saved. `features`: as agreed in the guest's HELLO; None before it. The others: see `DiskRecord`."""

    version: Literal[1]
    features: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] | None
    size: Annotated[int, msgspec.Meta(gt=0, le=(1 << 63) - 1)]
    block_size: Literal[512, 4096]
    stamp: Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
    identity: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{32})?$")] = ""


_decoder = msgspec.msgpack.Decoder(_State)


class _Token(NamedTuple):
    """A request that is to be answered: its handle, and its memory."""

    completion: Completion
    views: Sequence[memoryview]


def _answer(token: _Token, status: Status) -> None:
    token.completion.complete(pack_status(status))


class BlockProvider(Provider):
    """See the package's text."""

    kind = "block"
    Options = BlockOptions

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        self.counters = {"requests": 0, "refused": 0}
        self.disk = Disk(host, name, self.options, _answer, self.make_backend)
        self._features: int | None = None  # as agreed on with the guest; None before its HELLO
        self._full = 0
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
        self.disk.activate()

    def make_backend(self, image: Image) -> Backend:
        """What carries out the requests. Tests put faults in here."""
        return image.backend

    def deactivate(self) -> None:
        self.disk.deactivate()

    def stop(self) -> None:
        self.disk.close()

    # ---- the channel ---------------------------------------------------------------------------------------------

    def _opened(self, _: Channel) -> None:
        self._features = None

    def _closed(self, _: Channel) -> None:
        self._features = None
        self.disk.forget()

    def _started(self, _: Channel) -> None:
        self.disk.go()

    def _suspend(self, _: Channel) -> None:
        self.disk.rest()

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        core = self.disk.core
        message = parse_request(payload)
        self.counters["requests"] += 1
        if message is None or core is None or not self.disk.active:
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
        disk = Description(
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
        self.disk.submit(request, _Token(completion, views))
        if core.under_way >= self.options.queue_depth:
            self._full += 1

    def _refuse(self, completion: Completion, status: Status) -> None:
        self.counters["refused"] += 1
        completion.complete(pack_status(status))

    # ---- save and restore ------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        disk = self.disk.save()
        return msgspec.msgpack.encode(_State(1, self._features, disk.size, disk.block_size, disk.stamp, disk.identity))

    def _decoded(self, state: bytes) -> _State:
        saved = self.decoded(_decoder, state)
        self.disk.check(_record(saved))
        if saved.features is not None and saved.features & ~int(_FEATURES):
            raise StateError(f"the saved disk {self.name!r} has features {saved.features:#x}; known: {_FEATURES:#x}")
        return saved

    def check(self, state: bytes) -> None:
        self._decoded(state)

    def restore(self, state: bytes) -> None:
        saved = self._decoded(state)
        self.disk.restore(_record(saved))
        self._features = saved.features
        self.disk.features = saved.features or 0

    def files(self) -> dict[str, Path]:
        file = self.disk.file
        return {} if file is None else {FILE: file}

    def restore_files(self, files: Mapping[str, Path]) -> None:
        unknown = sorted(set(files) - {FILE})
        if unknown:
            raise StateError(f"disk {self.name!r} has one file, {FILE!r}; the snapshot has {unknown} too")
        self.disk.restore_file(files.get(FILE))

    def status(self) -> dict[str, Any]:
        return {**self.disk.status(), "open": self._features is not None, **self.counters}

    def bounds(self) -> dict[str, Bound]:
        now = 0 if self.disk.core is None else self.disk.core.under_way
        return {"requests": Bound(now, self.options.queue_depth, self._full)}


def _record(saved: _State) -> DiskRecord:
    return DiskRecord(saved.size, saved.block_size, saved.stamp, saved.identity)
