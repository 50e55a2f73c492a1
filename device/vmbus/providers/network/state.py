"""What is saved of a card."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from vmbus.providers.network import oids
from vmbus.providers.network.adapter import MOST_CONTROL
from vmbus.providers.network.spread import KEY_LIMIT
from vmbus.util.records import U16, U32, Count
from vmbus.wire import rndis
from vmbus.wire.ethernet import MTU_MAXIMUM, MTU_MINIMUM, OFFLOAD_SIZE, QUEUES_MAXIMUM

Station = Annotated[bytes, msgspec.Meta(min_length=6, max_length=6)]


class Buffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A buffer that the guest has lent. `size`: its bytes that are in use; `identifier`: the guest's number of it."""

    gpadl: U32
    identifier: U16
    size: U32


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is saved. `nvsp`: the version agreed upon, 0: none. `table`: queues by the hash of a flow; empty: the first.
    `key`, `types`: of the hash. `address`: that the guest uses.
    `control`: messages that wait for room; `backlog`: frames that the guest has not got."""

    version: Literal[1]
    mac: Station
    address: Station
    nvsp: U32
    mtu: Annotated[int, msgspec.Meta(ge=MTU_MINIMUM, le=MTU_MAXIMUM)]
    receive: Buffer | None
    send: Buffer | None
    initialized: bool
    filter: U32
    coalescing: bool
    queues: Annotated[int, msgspec.Meta(ge=1, le=QUEUES_MAXIMUM)]
    table: Annotated[
        list[Annotated[int, msgspec.Meta(ge=0, lt=QUEUES_MAXIMUM)]], msgspec.Meta(max_length=oids.RSS_ENTRIES)
    ]
    key: Annotated[bytes, msgspec.Meta(max_length=KEY_LIMIT)]
    types: U32
    link: bool
    link_told: bool
    control: Annotated[
        list[tuple[Literal[2, 3], Annotated[bytes, msgspec.Meta(max_length=2 * rndis.CONTROL_LIMIT)]]],
        msgspec.Meta(max_length=MOST_CONTROL),
    ]
    backlog: list[Annotated[bytes, msgspec.Meta(min_length=OFFLOAD_SIZE, max_length=1 << 17)]]
    counters: dict[str, Count]


DECODER = msgspec.msgpack.Decoder(State)
