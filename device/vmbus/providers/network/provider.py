"""The provider `network`: joins channels, a guest's driver and the host's interface. See docs/provider-network.md.

Whatever a guest sends is answered as its protocol has it, also what makes no sense: Linux waits for ever, with all its
networking, for an answer that does not come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from uuid import UUID

import msgspec

from vmbus.errors import PeerError, StateError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.status import KmclError
from vmbus.providers.base import Bound, Host
from vmbus.providers.network.adapter import ALL_COUNTERS, FAILED, MOST_CONTROL, Adapter
from vmbus.providers.network.card import DRAIN_BYTES
from vmbus.providers.network.lent import Arena, Lent
from vmbus.providers.network.queue import Kind, Parts, Queue, describe_saved
from vmbus.providers.network.spread import Spread
from vmbus.providers.network.state import DECODER, Buffer, State
from vmbus.util.complaints import bounded_log
from vmbus.wire import nvsp, rndis
from vmbus.wire.ethernet import (
    ETHERNET_SIZE,
    MTU_MINIMUM,
    OFFLOAD_SIZE,
    format_mac,
    frame_limit,
)
from vmbus.wire.packet import PacketType, RawPacket, parse_transfer_pages

log = bounded_log(__name__)

SEND_SECTION = 6144
"""Bytes of a section of the send buffer."""
CONTROL_BYTES = 64 << 10
"""Bytes of the receive buffer that are kept for control messages."""
MOST_DATA = 256 << 10
"""Bytes of RNDIS messages in one packet of the guest's, those in its section not counted."""
MAXIMUM_PACKET = 4 << 10
"""Bytes of one NVSP message."""
MESSAGE_ROOM = 128
"""What a frame's message has beside the frame, at most, in a section of the receive buffer."""


class NetworkProvider(Adapter):
    """See the package's text. What the guest has set up goes with the primary channel's close."""

    kind = "network"

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        # One message, of a section's size at the most, has the longest frame.
        longest = frame_limit(self.options.mtu, self.options.offload) - OFFLOAD_SIZE + MESSAGE_ROOM
        self.section = -(-longest // 128) * 128
        self._spare: list[Queue] = []  # sub-channels that are not offered
        self.queues = [self._make_queue(0)]

    # ---- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._offer(self.queues[0])

    def _make_queue(self, index: int) -> Queue:
        channel = ServerChannel(
            nvsp.NVSP_TYPE,
            self.instance,
            name=f"{self.name}.{index}" if index else self.name,
            subchannel_index=index,
        )
        queue = Queue(index, channel, self._completed)
        channel.set_maximum_packet_size(MAXIMUM_PACKET)
        channel.set_maximum_external_data(MOST_DATA)
        channel.set_process_packet_callbacks(partial(self._process, queue))
        channel.set_state_change_callbacks(opened=self._opened, closed=self._closed, started=self._started)
        channel.set_save_restore_packet_callbacks(queue.save_packet, queue.restore_packet)
        channel.lent = self._referred_to
        return queue

    def _offer(self, queue: Queue) -> None:
        self.host.add_channel(queue.channel)
        queue.channel.enable()
        queue.channel.start()

    def _add_queues(self, count: int) -> None:
        """Offer sub-channels until there are so many channels."""
        while len(self.queues) < count:
            queue = self._spare.pop() if self._spare else self._make_queue(len(self.queues))
            self.queues.append(queue)
            self._give_parts(queue)
            self._offer(queue)

    def _withdraw(self) -> None:
        """The sub-channels were for a guest that is gone: the next one gets them when it asks for them."""
        if self._version:
            return
        while len(self.queues) > 1:
            queue = self.queues.pop()
            self._spare.append(queue)  # there is one for each index, and the last is needed first
            queue.channel.disable()

    def deactivate(self) -> None:
        super().deactivate()
        self._withdraw()  # what was to be done soon: they cannot be restored without their primary channel

    def _opened(self, channel: Channel) -> None:
        if channel is self.queues[0].channel:
            self._forget()

    def _closed(self, channel: Channel) -> None:
        if channel is self.queues[0].channel:
            self._revoke_receive()
            self._revoke_send()
            self._forget()
            self._update()
            if len(self.queues) > 1:
                self.host.call_soon(self._withdraw)

    def _started(self, channel: Channel) -> None:
        if channel is self.queues[0].channel:
            self._tell_link()
            self._send_control()
            self._deliver_backlog()
            self._update()

    # ---- the guest ---------------------------------------------------------------------------------------------------

    def _process(self, queue: Queue, _: Channel, completion: Completion, payload: bytes) -> None:
        self._heard += 1
        message = nvsp.parse(payload)
        if isinstance(message, nvsp.Rndis):
            self._rndis(completion, message)
        elif message is None or queue.index:
            self._refuse(completion, b"", "a message that makes no sense")
        else:
            _HANDLERS[type(message)](self, completion, message)

    def _init(self, completion: Completion, message: nvsp.Init) -> None:
        """A guest that gets a refusal asks for an older version."""
        version = message.highest
        if self._version or message.lowest != version or version not in nvsp.VERSIONS:
            self.counters["refused"] += 1
            completion.complete(nvsp.init_complete(0, nvsp.Status.NONE))
            return
        self._version = version
        completion.complete(nvsp.init_complete(version, nvsp.Status.SUCCESS))

    def _configure(self, completion: Completion, message: nvsp.NdisConfig) -> None:
        mtu = min(self.options.mtu, message.mtu - ETHERNET_SIZE)
        if not self._version or mtu < MTU_MINIMUM:
            self._refuse(completion, b"", f"MTU of {message.mtu}")
            return
        self._mtu = mtu
        self._change_mtu(mtu)
        completion.complete()

    def _ignore(self, completion: Completion, _: nvsp.Message) -> None:
        completion.complete()

    def _other(self, completion: Completion, message: nvsp.Other) -> None:
        """Known, and not served: the answers that a guest takes for a no."""
        query = message.type is nvsp.Type.OID_QUERY
        completion.complete(nvsp.oid_query_complete(rndis.Status.NOT_SUPPORTED) if query else b"")

    def _packet_direct(self, completion: Completion, message: nvsp.PdApi) -> None:
        completion.complete(nvsp.pd_api_complete(message.operation, nvsp.Status.FAILURE))

    def _sub_channels(self, completion: Completion, message: nvsp.SubChannels) -> None:
        """Exactly as many are offered as were granted: the guest waits for each of them."""
        granted = 0 if self._receive is None else min(message.wanted, self._queues_for(self._receive_size) - 1)
        if message.operation != 1 or granted < 1 or self._version < nvsp.VERSION_5 or len(self.queues) > 1:
            refusal = nvsp.sub_channels_complete(nvsp.Status.FAILURE, 0)
            self._refuse(completion, refusal, f"wish for {message.wanted} channels")
            return
        completion.complete(nvsp.sub_channels_complete(nvsp.Status.SUCCESS, granted))
        self._add_queues(granted + 1)

    # ---- its buffers -------------------------------------------------------------------------------------------------

    def _lend_receive(self, completion: Completion, message: nvsp.ReceiveBuffer) -> None:
        refusal = nvsp.receive_buffer_complete(nvsp.Status.FAILURE)
        if not self._version or self._receive is not None:
            self._refuse(completion, refusal, "receive buffer, out of turn,")
            return
        lent = Lent(self.queues[0].channel, message.gpadl)
        try:
            size = lent.open().size
        except (KmclError, PeerError) as error:
            self._refuse(completion, refusal, f"receive buffer ({error})")
            return
        if self._queues_for(size) < len(self.queues):
            lent.close()
            self._refuse(completion, refusal, f"receive buffer of {size} bytes")
            return
        self._take_receive(lent, message.identifier, size)
        count = size // self.section
        completion.complete(nvsp.receive_buffer_complete(nvsp.Status.SUCCESS, self.section, count))
        self._update()

    def _queues_for(self, size: int) -> int:
        """Queues that get a longest frame each in a receive buffer of so many bytes, control messages beside them."""
        queues: int = self.options.queues
        return min(queues, (size // self.section * self.section - CONTROL_BYTES) // self.section)

    def _take_receive(self, lent: Lent, identifier: int, size: int) -> None:
        """Cut it into parts: one for control messages, and one for each queue that there may be."""
        self._receive, self._page_set, self._receive_size = lent, identifier, size
        for queue in self.queues:
            self._give_parts(queue)

    def _give_parts(self, queue: Queue) -> None:
        lent = self._receive
        if lent is None:
            queue.forget()
            return
        count = self._receive_size // self.section
        share = (count * self.section - CONTROL_BYTES) // self._queues_for(self._receive_size)
        share = min(share, max(self.options.window_kib << 10, 2 * self.section)) & ~7
        control = Arena(0, 0 if queue.index else CONTROL_BYTES)
        queue.parts = Parts(lent, self._page_set, Arena(CONTROL_BYTES + queue.index * share, share), control)
        queue.limit = min(self.section, share)
        queue.most_packets = count

    def _lend_send(self, completion: Completion, message: nvsp.SendBuffer) -> None:
        refusal = nvsp.send_buffer_complete(nvsp.Status.FAILURE)
        if not self._version or self._send is not None:
            self._refuse(completion, refusal, "send buffer, out of turn,")
            return
        lent = Lent(self.queues[0].channel, message.gpadl)
        try:
            size = lent.open().size
        except (KmclError, PeerError) as error:
            self._refuse(completion, refusal, f"send buffer ({error})")
            return
        self._send, self._send_id, self._send_size = lent, message.identifier, size
        completion.complete(nvsp.send_buffer_complete(nvsp.Status.SUCCESS, SEND_SECTION))

    def _take_back_receive(self, completion: Completion, message: nvsp.RevokeReceiveBuffer) -> None:
        if self._receive is None or message.identifier != self._page_set:
            self._refuse(completion, b"", "wish for a receive buffer that it has not lent")
            return
        self._revoke_receive()
        self._update()
        completion.complete()

    def _take_back_send(self, completion: Completion, message: nvsp.RevokeSendBuffer) -> None:
        if self._send is None or message.identifier != self._send_id:
            self._refuse(completion, b"", "wish for a send buffer that it has not lent")
            return
        self._revoke_send()
        completion.complete()

    def _revoke_receive(self) -> None:
        """Never touched again: packets in flight know their part of it, and nobody gets that any more."""
        lent, self._receive = self._receive, None
        for queue in self.queues:
            queue.forget()
        if lent is not None:
            lent.close()

    def _revoke_send(self) -> None:
        lent, self._send = self._send, None
        if lent is not None:
            lent.close()

    def _referred_to(self, packet: RawPacket, most: int) -> tuple[int, bytes] | None:
        """RNDIS messages in the two buffers, for observers: see `vmbus.kmcl.observer.Lent`."""
        if packet.kind == PacketType.TRANSFER_PAGES:
            lent, ranges = self._receive, parse_transfer_pages(packet.body).ranges
        else:
            message = nvsp.parse(packet.payload)
            if not isinstance(message, nvsp.Rndis) or message.section == nvsp.NO_SECTION:
                return None
            if message.size > SEND_SECTION:
                raise PeerError(f"{message.size} bytes of a section")
            lent, ranges = self._send, [(message.section * SEND_SECTION, message.size)]
        if lent is None:
            return None
        left, found = most, []
        for offset, length in ranges:
            found.append(lent.look(offset, min(left, length)))
            left -= len(found[-1])
        return sum(length for _, length in ranges), b"".join(found)

    # ---- RNDIS -------------------------------------------------------------------------------------------------------

    def _gather(self, completion: Completion, message: nvsp.Rndis) -> bytes:
        """All bytes of a packet's RNDIS messages, copied once. Raises KmclError, PeerError or ValueError."""
        data = b""
        if message.section != nvsp.NO_SECTION:
            if self._send is None or message.size > SEND_SECTION:
                raise ValueError(f"{message.size} bytes of section {message.section}")
            data = self._send.read(message.section * SEND_SECTION, message.size)
        if completion.has_external_data:
            data = b"".join([data, *completion.external_data(read_only=True).views])
        return data

    def _rndis(self, completion: Completion, message: nvsp.Rndis) -> None:
        try:
            data = self._gather(completion, message)
        except (KmclError, PeerError, ValueError) as error:
            self._refuse(completion, FAILED, f"packet ({error})")
            return
        if message.channel == nvsp.CONTROL_CHANNEL:
            self._take_control(completion, data)
            return
        self._take_frames(completion, data)

    # ---- save and restore --------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        receive, send = self._receive, self._send
        return msgspec.msgpack.encode(
            State(
                version=1,
                mac=self.mac,
                nvsp=self._version,
                mtu=self._mtu,
                receive=None if receive is None else Buffer(receive.gpadl, self._page_set, self._receive_size),
                send=None if send is None else Buffer(send.gpadl, self._send_id, self._send_size),
                initialized=self._initialized,
                filter=self._filter,
                coalescing=self._coalescing,
                queues=len(self.queues),
                table=list(self._spread.table),
                key=self._spread.key,
                types=self._spread.types,
                address=self.address,
                link=self._link,
                link_told=self._link_told,
                control=[(kind.value, message) for kind, message in self._control],  # type: ignore[misc]
                backlog=list(self.backlog),
                counters=self.counters,
            )
        )

    def _decoded(self, state: bytes) -> State:
        options = self.options
        what = f"the saved state of network {self.name!r}"
        saved = self.decoded(DECODER, state)
        if saved.mac != self.mac:
            raise StateError(f"{what} has the address {format_mac(saved.mac)}, and here it is {format_mac(self.mac)}")
        if saved.queues > options.queues or saved.mtu > options.mtu or (saved.coalescing and not options.offload):
            raise StateError(
                f"{what} has {saved.queues} queues, an MTU of {saved.mtu} and long frames: {saved.coalescing}; here "
                f"there are {options.queues} queues, an MTU of {options.mtu}, and offloads: {options.offload}"
            )
        if saved.nvsp and saved.nvsp not in nvsp.VERSIONS:
            raise StateError(f"{what} has NVSP version {saved.nvsp:#x}")
        if not saved.nvsp and (saved.receive or saved.send):
            raise StateError(f"{what} has buffers, and no version was agreed upon")
        if saved.receive is not None and self._queues_for(saved.receive.size) < saved.queues:
            raise StateError(f"{what} has a receive buffer of {saved.receive.size} bytes, and a section {self.section}")
        if sum(map(len, saved.backlog[:-1])) >= DRAIN_BYTES:
            raise StateError(f"{what} has {len(saved.backlog)} frames of more than {DRAIN_BYTES} bytes")
        if any(index >= saved.queues for index in saved.table):
            raise StateError(f"{what} spreads frames over more than its {saved.queues} queues")
        if saved.address[0] & 1 or not any(saved.address):
            raise StateError(f"{what} has {format_mac(saved.address)}, which is no station, for the guest's address")
        if set(saved.counters) - set(ALL_COUNTERS):
            raise StateError(f"{what} has unknown counters {sorted(set(saved.counters) - set(ALL_COUNTERS))}")
        return saved

    def check(self, state: bytes) -> None:
        self._decoded(state)

    def restore(self, state: bytes) -> None:
        saved = self._decoded(state)
        self.counters |= saved.counters
        self._version = saved.nvsp
        self._mtu = saved.mtu
        self._initialized = saved.initialized
        self._filter = saved.filter
        self._coalescing = saved.coalescing
        self._spread = Spread(saved.table, saved.key, saved.types)
        self._use_address(saved.address)
        self._link = saved.link
        self._link_told = saved.link_told
        self._control.extend((Kind(kind), message) for kind, message in saved.control)
        self._link_in_flight = any(kind is Kind.LINK for kind, _ in self._control)
        for frame in saved.backlog:
            self.backlog.append(frame)
        channel = self.queues[0].channel
        if saved.receive is not None:
            self._take_receive(Lent(channel, saved.receive.gpadl), saved.receive.identifier, saved.receive.size)
        if saved.send is not None:
            self._send = Lent(channel, saved.send.gpadl)
            self._send_id, self._send_size = saved.send.identifier, saved.send.size
        self._add_queues(saved.queues)

    def name_packet(self, packet: Packet) -> str:
        return str(packet.pointer)

    @classmethod
    def describe_packet(cls, saved: bytes) -> dict[str, Any]:
        return describe_saved(saved)

    def status(self) -> dict[str, Any]:
        return {
            **super().status(),
            "guest": {
                "nvsp": f"{self._version >> 16}.{self._version & 0xFFFF}" if self._version else None,
                "mtu": self._mtu,
                "address": format_mac(self.address),
                "initialized": self._initialized,
                "filter": self._filter,
                "long_frames": self._coalescing,
                "receive_buffer": 0 if self._receive is None else self._receive_size,
                "send_buffer": 0 if self._send is None else self._send_size,
                "queues": len(self._in_use),
            },
            "backlog": len(self.backlog),
            "queues": [{**queue.counters, "in_flight": queue.in_flight, "used": queue.used} for queue in self.queues],
        }

    def bounds(self) -> dict[str, Bound]:
        found = {
            f"bytes to the guest, queue {queue.index}": Bound(queue.used, queue.window, queue.filled)
            for queue in self.queues
        }
        return found | {"control messages": Bound(len(self._control), MOST_CONTROL, 0)}


_HANDLERS: dict[type[nvsp.Message], Callable[[NetworkProvider, Completion, Any], None]] = {
    nvsp.Init: NetworkProvider._init,
    nvsp.NdisVersion: NetworkProvider._ignore,
    nvsp.NdisConfig: NetworkProvider._configure,
    nvsp.ReceiveBuffer: NetworkProvider._lend_receive,
    nvsp.SendBuffer: NetworkProvider._lend_send,
    nvsp.RevokeReceiveBuffer: NetworkProvider._take_back_receive,
    nvsp.RevokeSendBuffer: NetworkProvider._take_back_send,
    nvsp.SubChannels: NetworkProvider._sub_channels,
    nvsp.PdApi: NetworkProvider._packet_direct,
    nvsp.Other: NetworkProvider._other,
}
