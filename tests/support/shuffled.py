"""A provider that works on several things at once: for each it sends packets in order, and in none among them."""

from __future__ import annotations

import random
import struct
from typing import Annotated, Any
from uuid import UUID

import msgspec

from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.server import ServerChannel
from vmbus.providers.base import Provider

SHUFFLED_TYPE = UUID("0d5c1c0e-8f3f-4f0e-9a57-1f5f6a8f2b77")
KEYS, EACH = 4, 10
PACKET = struct.Struct("<QQ")


class ShuffledOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`seed`: of the order. `late`: one packet comes before the one ahead of it."""

    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    late: bool = False


class Shuffled(Provider):
    """See the module's text. A packet is its key and its number."""

    kind = "shuffled"
    Options = ShuffledOptions

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.channel = ServerChannel(SHUFFLED_TYPE, self.instance, name=self.name)

    def start(self) -> None:
        self.channel.set_process_packet_callbacks(self._process)
        self.host.add_channel(self.channel)
        self.channel.enable()
        self.channel.start()

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        completion.complete(b"")
        order = [key for key in range(KEYS) for _ in range(EACH)]
        random.Random(self.options.seed).shuffle(order)
        sent = [0] * KEYS
        packets = []
        for key in order:
            packets.append(PACKET.pack(key, sent[key]))
            sent[key] += 1
        if self.options.late:
            first, second = [at for at, key in enumerate(order) if key == 2][4:6]
            packets[first], packets[second] = packets[second], packets[first]
        for packet in packets:
            self.channel.allocate_packet().send(packet, wait_for_completion=False)
