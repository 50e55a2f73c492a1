"""A provider that answers at once: what a transaction costs where its provider costs next to nothing.

It takes the place of `echo`, and gives each request back as it came: nothing is unpacked, checked or counted.
"""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.server import ServerChannel
from vmbus.providers.base import Host, Provider
from vmbus.wire.workload import ECHO_TYPE

KIND = f"{__name__}:AnsweringProvider"
"""What a description calls it."""


class AnsweringProvider(Provider):
    """See the module's text."""

    kind = KIND

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        self.channel = ServerChannel(ECHO_TYPE, instance, name=name)

    def start(self) -> None:
        self.channel.set_process_packet_callbacks(_answer)
        self.host.add_channel(self.channel)
        self.channel.enable()
        self.channel.start()


def _answer(_: Channel, completion: Completion, payload: bytes) -> None:
    completion.complete(payload)
