"""Providers that are slow to let go: `support.stubborn:Late` and `support.stubborn:Never`."""

import struct
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.server import ServerChannel
from vmbus.memory.guest import Grant
from vmbus.providers import Host, Provider
from vmbus.providers.base import NoOptions

STUBBORN_TYPE = UUID("5b0c8a3e-3d5b-4b39-9a86-0d5b6c0f3b11")
ANSWER = b"late"
_COUNT = struct.Struct("<I")


class Late(Provider):
    """Keeps all requests back. When it is to stop, it answers them one after another, each by a timer of its own.

    External data it takes when the request comes, and fills it with ANSWER when it answers.
    """

    kind = "support.stubborn:Late"
    Options = NoOptions

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        self.held: list[tuple[Completion, Grant | None]] = []
        self.fail_in_save = False
        self.channel = ServerChannel(STUBBORN_TYPE, instance, name=name)

    def start(self) -> None:
        self.channel.set_process_packet_callbacks(self._process)
        self.channel.set_state_change_callbacks(suspend=self._suspend)
        self.host.add_channel(self.channel)
        self.channel.enable()
        self.channel.start()

    def stop(self) -> None:
        pass

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        self.held.append((completion, completion.external_data() if completion.has_external_data else None))

    def _suspend(self, _: Channel) -> None:
        if self.held:
            self.host.call_later(0.01, self._answer)

    def _answer(self) -> None:
        self._complete_one()
        if self.held:
            self.host.call_later(0.01, self._answer)

    def _complete_one(self) -> None:
        completion, grant = self.held.pop(0)
        for view in grant.views if grant is not None else ():
            view[:] = (ANSWER * len(view))[: len(view)]
        completion.complete(ANSWER)

    def save(self) -> bytes:
        if self.fail_in_save:
            raise RuntimeError("a defect in save")
        return _COUNT.pack(len(self.held))

    def restore(self, state: bytes) -> None:
        assert _COUNT.unpack(state) == (0,)

    def status(self) -> dict[str, Any]:
        return {"held": len(self.held)}


class Never(Late):
    """The same, but it does not answer when it is to stop."""

    kind = "support.stubborn:Never"

    def _suspend(self, _: Channel) -> None:
        pass

    def release(self) -> None:
        while self.held:
            self._complete_one()
