"""What the harness of "save at every step" drives: providers that use everything that a channel offers, and the guest's
end of them. Nothing in them is random, and all that they keep books of is in their saved state.

Requests on a packet channel, `4 bytes of command, u64 number, data`; each is answered with `number, transformed data`:

    ask_   answer it; external data is transformed in place
    hold   answer it when a timer runs out, or when the channel is suspended
    push   send (data: u32 count, u32 size, u32 kind) packets on this channel; kind 0 wants completions, 1 none
    subs   make `number` more sub-channels          drop   withdraw the newest sub-channel
    map_   map GPADL `number` and write into it     umap   end the mapping
    away   disable the primary channel; a timer enables it again
    rest   pause the channel; a timer starts it again
    refu   refuse the next `number` opens
    fail   fail the packet, and with it the channel
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import cache
from struct import Struct
from typing import Any
from uuid import UUID

import msgspec

from support import pace
from vmbus.errors import StateError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.pipe import Pipe, PipeMode
from vmbus.kmcl.server import (
    SERVER_FLAG_FORCE_NEW_CHANNEL,
    SERVER_FLAG_LOOPBACK_OFFER,
    SERVER_FLAG_OFFER_AS_PIPE,
    ServerChannel,
)
from vmbus.kmcl.status import KmclError, Status
from vmbus.memory.guest import Grant
from vmbus.providers import Host, Provider
from vmbus_guest.driver import VmbusDriver

STEP_TYPE = UUID("3c6d1c5e-7d0a-4b56-9b0f-6a1d8f2f4b01")
PIPE_TYPE = UUID("3c6d1c5e-7d0a-4b56-9b0f-6a1d8f2f4b02")
BACK_TYPE = UUID("3c6d1c5e-7d0a-4b56-9b0f-6a1d8f2f4b03")
FRONT_TYPE = UUID("3c6d1c5e-7d0a-4b56-9b0f-6a1d8f2f4b04")

REQUEST = Struct("<4sQ")
NUMBER = Struct("<Q")
PUSH = Struct("<III")
SAVED = Struct("<QI")


def transform(data: bytes, number: int) -> bytes:
    """What an answer makes of a request's data; of its own inverse nothing is left if it is done twice."""
    return bytes((byte * 3 + number + index) & 0xFF for index, byte in enumerate(data))


@cache
def pushed(number: int, size: int) -> bytes:
    """The payload of a packet of the host: `size` bytes (a multiple of 8) that depend on its number."""
    return NUMBER.pack(number) + bytes((number * 7 + index) & 0xFF for index in range(size - 8))


def answer_to(payload: bytes) -> bytes:
    """What the guest completes a packet of the host with."""
    return NUMBER.pack(NUMBER.unpack_from(payload)[0]) + payload[8:16][::-1]


class _State(msgspec.Struct, frozen=True):
    asked: list[int]
    sent: int
    completed: list[tuple[int, bytes]]
    cancelled: list[int]
    subs: int
    mapped: list[int]
    away: int
    dropping: bool
    resting: bool
    refusals: int


class StepOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`quota`: most requests taken at a time; `passive`, `defer`: how they are processed; `force_new`: see KMCL;
    `patient`: what is held is not answered when the channel is suspended."""

    quota: int = 0
    passive: bool = False
    defer: bool = False
    force_new: bool = False
    patient: bool = False


class StepProvider(Provider):
    """See the module's text. `completed` has (number, answer) of the host's packets, in the order of their ends."""

    kind = "steps"
    Options = StepOptions
    tick = 1.0  # seconds

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        self.subs: list[ServerChannel] = []
        self.asked: list[int] = []
        self.sent = 0
        self.completed: list[tuple[int, bytes]] = []
        self.cancelled: list[int] = []
        self.mapped: list[int] = []
        self.away = 0  # 1: about to go, 2: gone
        self.dropping = False
        self.resting = False
        self.refusals = 0
        self.held: list[tuple[Completion, bytes]] = []
        self.channel = self._make(0)

    def _make(self, index: int) -> ServerChannel:
        channel = ServerChannel(STEP_TYPE, self.instance, name=f"{self.name}.{index}", subchannel_index=index)
        channel.set_process_packet_callbacks(self._process)
        channel.set_state_change_callbacks(opened=self._opened, closed=self._closed, suspend=self._suspend)
        channel.set_save_restore_packet_callbacks(self._save_packet, self._restore_packet)
        channel.set_incoming_processing_at_passive(self.options.passive)
        if self.options.quota:
            channel.set_transaction_quota(self.options.quota)
        if self.options.force_new and not index:
            channel.set_server_flags(SERVER_FLAG_FORCE_NEW_CHANNEL)
        return channel

    def start(self) -> None:
        self._go(self.channel)

    def _go(self, channel: ServerChannel) -> None:
        self.host.add_channel(channel)
        channel.enable()
        channel.start()

    def _opened(self, _: Channel) -> None:
        if self.refusals:
            self.refusals -= 1
            raise KmclError("not now", Status.INSUFFICIENT_RESOURCES)

    def _closed(self, channel: Channel) -> None:
        if channel is self.channel:
            self.mapped.clear()  # unmapped with it

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _process(self, channel: Channel, completion: Completion, payload: bytes) -> None:
        command, number = REQUEST.unpack_from(payload)
        if self.options.defer and number % 2 and not completion.deferred:
            completion.defer_to_passive()
            return
        self.asked.append(number)
        if command == b"hold":
            self.held.append((completion, payload))
            if len(self.held) == 1:
                self.host.call_later(1.0 * self.tick, self._release)
            return
        if command == b"fail":
            completion.fail("asked for")
            return
        try:
            self._obey(channel, command, number, payload)
            self._answer(completion, payload)
        except KmclError as error:
            completion.complete(NUMBER.pack(number) + NUMBER.pack(error.status))

    def _obey(self, channel: Channel, command: bytes, number: int, payload: bytes) -> None:
        assert isinstance(channel, ServerChannel)
        if command == b"push":
            count, size, kind = PUSH.unpack_from(payload, REQUEST.size)
            for _ in range(count):
                self._push(channel, size, kind == 0)
        elif command == b"subs":
            self._add_subs(number)
        elif command == b"drop":
            self.dropping = True
            self.host.call_soon(self._drop)
        elif command == b"map_":
            self._map(number).views[0][:8] = NUMBER.pack(number)
        elif command == b"umap":
            if number not in self.mapped:
                raise KmclError("not mapped", Status.INVALID_PARAMETER)
            self.mapped.remove(number)
            # A restore answers a teardown that waits for this: then there is nothing left to be unmapped.
            with contextlib.suppress(KmclError):
                self.channel.unmap_gpadl(number)
        elif command == b"refu":
            self.refusals = number
        elif command == b"away":
            self.away = 1
            self.host.call_soon(self._go_away)
        elif command == b"rest":
            self.resting = True
            self.host.call_soon(self._rest)

    def _map(self, handle: int) -> Grant:
        grant = self.channel.map_gpadl(handle)
        self.mapped.append(handle)
        return grant

    def _answer(self, completion: Completion, payload: bytes) -> None:
        number = REQUEST.unpack_from(payload)[1]
        if completion.has_external_data:
            done = 0
            views = completion.external_data().views
            data = transform(b"".join(bytes(view) for view in views), number)
            for view in views:
                view[:] = data[done : done + len(view)]
                done += len(view)
            completion.complete(NUMBER.pack(number))
        else:
            completion.complete(NUMBER.pack(number) + transform(payload[REQUEST.size :], number))

    def _release(self) -> None:
        held, self.held = self.held, []
        for completion, payload in held:
            self._answer(completion, payload)

    def _suspend(self, _: Channel) -> None:
        if not self.options.patient:
            self._release()

    def _rest(self) -> None:
        self.channel.begin_pause()
        self.host.call_later(2.0 * self.tick, self._work_again)

    def _work_again(self) -> None:
        self.resting = False
        self.channel.start()

    def _go_away(self) -> None:
        self.away = 2
        self.channel.disable()
        self.host.call_later(3.0 * self.tick, self._come_back)

    def _come_back(self) -> None:
        self.away = 0
        self.channel.enable()
        self.channel.start()

    def _add_subs(self, count: int) -> None:
        for index in range(len(self.subs) + 1, len(self.subs) + 1 + count):
            self.subs.append(self._make(index))
            self._go(self.subs[-1])

    def _drop(self) -> None:
        self.dropping = False
        if self.subs:
            self.subs.pop().disable()

    # ---- packets of the host -----------------------------------------------------------------------------------------

    def _push(self, channel: ServerChannel, size: int, wait: bool) -> None:
        packet = channel.allocate_packet()
        packet.pointer = (self.sent, size)
        self.sent += 1
        packet.completion_routine = self._completed
        packet.send(pushed(*packet.pointer), wait_for_completion=wait)

    def _completed(self, packet: Packet, status: int, reply: bytes) -> None:
        number = packet.pointer[0]
        if status:
            self.cancelled.append(number)
        elif packet.flags:
            self.completed.append((number, reply))
        # One without completion has ended as soon as it is in the ring; whether it arrives, the guest's books tell.
        packet.free()

    def _save_packet(self, _: ServerChannel, packet: Packet, buffer: memoryview) -> int:
        if buffer:
            SAVED.pack_into(buffer, 0, *packet.pointer)
        return SAVED.size

    def _restore_packet(self, channel: ServerChannel, lib: bytes, save: bytes) -> None:
        packet = channel.allocate_packet()
        packet.pointer = SAVED.unpack(save)
        packet.completion_routine = self._completed
        channel.restore_packet(packet, lib)

    # ---- its own state -----------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        return msgspec.msgpack.encode(
            _State(
                self.asked,
                self.sent,
                self.completed,
                self.cancelled,
                len(self.subs),
                self.mapped,
                self.away,
                self.dropping,
                self.resting,
                self.refusals,
            )
        )

    @staticmethod
    def empty() -> bytes:
        """The state of a provider that has seen nothing."""
        return msgspec.msgpack.encode(_State([], 0, [], [], 0, [], 0, False, False, 0))

    def restore(self, state: bytes) -> None:
        try:
            saved = msgspec.msgpack.decode(state, type=_State)
        except msgspec.MsgspecError as error:
            raise StateError(f"provider {self.name}: {error}") from error
        self.asked, self.sent = saved.asked, saved.sent
        self.completed, self.cancelled = saved.completed, saved.cancelled
        self.refusals = saved.refusals
        self.resting = saved.resting
        if self.resting:
            self.host.call_soon(self._rest)
        self._add_subs(saved.subs)
        self.away = saved.away
        if self.away == 1:
            self.host.call_soon(self._go_away)
        elif self.away:
            self._go_away()
        self.dropping = saved.dropping
        if self.dropping:
            self.host.call_soon(self._drop)
        for handle in saved.mapped:
            try:
                self._map(handle)
            except KmclError:
                self.mapped.append(handle)  # the guest is getting it back

    def status(self) -> dict[str, Any]:
        """The books."""
        return {
            # Where packets are put off, it depends on the turns which ones are overtaken.
            "asked": sorted(self.asked) if self.options.defer else list(self.asked),
            "sent": self.sent,
            "completed": [(number, reply.hex()) for number, reply in self.completed],
            "cancelled": list(self.cancelled),
            "subs": len(self.subs),
            "mapped": list(self.mapped),
            "resting": self.resting,
        }


class PipeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    byte_mode: bool = False


class PipeProvider(Provider):
    """Sends back what comes, transformed."""

    kind = "step-pipe"
    Options = PipeOptions

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        self.channel = ServerChannel(PIPE_TYPE, instance, name=name)
        self.channel.set_server_flags(SERVER_FLAG_OFFER_AS_PIPE)
        mode = PipeMode.BYTE if self.options.byte_mode else PipeMode.MESSAGE
        self.pipe = Pipe(self.channel, mode, self._data)
        self.channel.set_save_restore_packet_callbacks(lambda *_: 0, self._restore_packet)
        self.bytes = 0

    def start(self) -> None:
        self.host.add_channel(self.channel)
        self.channel.enable()
        self.channel.start()

    def _data(self, data: bytes) -> None:
        answer = bytes((byte ^ (self.bytes + index)) & 0xFF for index, byte in enumerate(data))
        self.bytes += len(data)
        self.pipe.write(answer)

    def _restore_packet(self, channel: ServerChannel, lib: bytes, _: bytes) -> None:
        channel.restore_packet(channel.allocate_packet(), lib)

    def save(self) -> bytes:
        return NUMBER.pack(self.bytes)

    def restore(self, state: bytes) -> None:
        (self.bytes,) = NUMBER.unpack(state)

    def status(self) -> dict[str, Any]:
        """The books."""
        return {"bytes": self.bytes}


class BackProvider(Provider):
    """Offered inside the server alone: answers each request of another provider with its transform."""

    kind = "step-back"

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        self.channel = ServerChannel(BACK_TYPE, instance, name=name)
        self.channel.set_server_flags(SERVER_FLAG_LOOPBACK_OFFER)
        self.channel.set_process_packet_callbacks(self._process)
        self.answered = 0

    def start(self) -> None:
        self.host.add_channel(self.channel)
        self.channel.enable()
        self.channel.start()

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        self.answered += 1
        completion.complete(transform(payload, 0))

    def save(self) -> bytes:
        return NUMBER.pack(self.answered)

    def restore(self, state: bytes) -> None:
        (self.answered,) = NUMBER.unpack(state)

    def status(self) -> dict[str, Any]:
        """The books."""
        return {"answered": self.answered}


class FrontProvider(Provider):
    """Offered to the guest: has each request answered by the provider at the other end of a local offer, and holds
    it until then."""

    kind = "step-front"

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        self.channel = ServerChannel(FRONT_TYPE, instance, name=name)
        self.channel.set_process_packet_callbacks(self._process)
        self.client = ClientChannel(BACK_TYPE, name=f"{name}.client", ring_pages_in=1, ring_pages_out=1)
        self.client.set_state_change_callbacks(started=self._connected)
        self.waiting: list[tuple[Completion, bytes]] = []

    def start(self) -> None:
        self.host.add_client(self.client)
        self.client.enable()
        self.host.add_channel(self.channel)
        self.channel.enable()
        self.channel.start()

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        self.waiting.append((completion, payload))
        if self.client.state is ChannelState.ACTIVE:
            self._connected(self.client)

    def _connected(self, _: Channel) -> None:
        waiting, self.waiting = self.waiting, []
        for completion, payload in waiting:
            packet = self.client.allocate_packet()
            packet.pointer = completion
            packet.completion_routine = self._answered
            packet.send(payload)

    def _answered(self, packet: Packet, status: int, reply: bytes) -> None:
        if not status:
            packet.pointer.complete(reply)
        packet.free()


# ---- the guest's end -------------------------------------------------------------------------------------------------


class GuestEnd:
    """One channel of the guest, with its books. `hold`: packets of the host are kept until `complete`."""

    def __init__(
        self,
        driver: VmbusDriver,
        *,
        instance: UUID | None = None,
        index: int = 0,
        kind: UUID = STEP_TYPE,
        pages: int = 1,
    ) -> None:
        self.driver = driver
        self.channel: ClientChannel = driver.client_channel(
            kind,
            instance=instance,
            name=f"guest {index}",
            ring_pages_in=pages,
            ring_pages_out=pages,
            subchannel_index=index,
        )
        self.packets: list[bytes] = []
        self.answers: dict[int, list[tuple[int, bytes]]] = {}
        self.order: list[int] = []
        self.hold = False
        self.held: list[tuple[Completion, bytes]] = []
        self.next = 0
        self.channel.set_process_packet_callbacks(self._process)

    def enable(self) -> GuestEnd:
        self.driver.enable(self.channel)
        return self

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        self.packets.append(payload)
        if not completion.wanted or not self.hold:
            completion.complete(answer_to(payload))
        else:
            self.held.append((completion, payload))

    def complete(self, which: Callable[[int], bool] = lambda _: True) -> None:
        """Complete held packets, of which `which(position)` is true."""
        chosen = [one for position, one in enumerate(self.held) if which(position)]
        self.held = [one for one in self.held if one not in chosen]
        for completion, payload in chosen:
            completion.complete(answer_to(payload))

    def send(
        self,
        command: bytes,
        number: int | None = None,
        data: bytes = b"",
        external: list[tuple[int, int]] | None = None,
        *,
        wait: bool = True,
    ) -> int:
        """Send a request without waiting; returns its number in the books. Without `wait` no answer is asked for."""
        key = self.next
        self.next += 1
        packet = self.channel.allocate_packet()
        packet.pointer = key
        packet.completion_routine = self._answered
        packet.send(
            REQUEST.pack(command, key if number is None else number) + data, external=external, wait_for_completion=wait
        )
        return key

    def _answered(self, packet: Packet, status: int, reply: bytes) -> None:
        self.answers.setdefault(packet.pointer, []).append((status, reply))
        self.order.append(packet.pointer)
        packet.free()

    def ask(self, command: bytes, number: int | None = None, data: bytes = b"") -> bytes:
        """Send a request and wait for its answer."""
        key = self.send(command, number, data)
        self.driver.run_until(lambda: key in self.answers, pace.seconds(5), f"the answer to {command!r}")
        return self.answers[key][0][1]

    def push(self, count: int, size: int = 200, *, wait: bool = True) -> None:
        """Have packets sent by the host."""
        self.send(b"push", data=PUSH.pack(count, size, 0 if wait else 1))

    def books(self) -> dict[str, Any]:
        """What this end has seen. Every number once, or the run is wrong."""
        return {
            "packets": [payload.hex() for payload in self.packets],
            "answers": {
                number: [(s, reply.hex()) for s, reply in given] for number, given in sorted(self.answers.items())
            },
            "unanswered": [number for number in range(self.next) if number not in self.answers],
            "held": len(self.held),
        }


class PipeEnd:
    """The guest's end of a pipe."""

    def __init__(self, driver: VmbusDriver, *, byte_mode: bool = False) -> None:
        self.driver = driver
        self.channel = driver.client_channel(PIPE_TYPE, name="pipe", ring_pages_in=1, ring_pages_out=1)
        self.got: list[bytes] = []
        mode = PipeMode.BYTE if byte_mode else PipeMode.MESSAGE
        self.byte_mode = byte_mode
        self.pipe = Pipe(self.channel, mode, self.got.append)
        driver.enable(self.channel)

    def books(self) -> dict[str, Any]:
        """What has come; in byte mode packet boundaries mean nothing."""
        return {"got": b"".join(self.got).hex() if self.byte_mode else [data.hex() for data in self.got]}
