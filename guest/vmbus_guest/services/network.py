"""Service `network`: a network card of the host's appears as an interface of the kernel's, for whatever programs run.

Frames of the interface go to the host in packets, several in one, and the host's come back the same way. Name, address
and MTU are the host's; link state is mirrored. When the host withdraws the card the interface stays, without a link.

Parameters, besides the common ones of `Workload`:

    interface    its name, instead of the host's
    address      its IPv4 address with the prefix's length ("192.0.2.2/24"), or "none", instead of the host's proposal
    gateway      where everything else is sent, instead of the host's proposal
    mtu          the largest MTU wanted; 0: the host's
    queues       channels wanted
    offload      whether frames may be longer than the MTU on their way to and from the host
    window_kib   KiB of frames that may be on their way to the host
"""

from __future__ import annotations

import socket
from functools import partial
from typing import Any, Protocol

from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.status import Status as PacketStatus
from vmbus.tap import Tap
from vmbus.wire.ethernet import MTU_MAXIMUM, QUEUES_MAXIMUM, flow_hash
from vmbus.wire.network import (
    BATCH_BYTES,
    FRAMES_MAXIMUM,
    MESSAGE_LIMIT,
    NETWORK_TYPE,
    Feature,
    Frames,
    Hello,
    Link,
    Nic,
    Queues,
    Status,
    message_size,
    pack_frames,
    pack_reply,
    parse,
    parse_nic,
    parse_status,
)
from vmbus_guest.interface import Interface, load_module
from vmbus_guest.services.service import Service
from vmbus_guest.testdrivers.context import Parameters

RING_PAGES = 64
"""Data pages of each ring, unless the parameters say otherwise: room for the longest frame, and some more."""
_PER_TURN = 32  # frames read from the kernel before the host's get their turn


class Network(Protocol):
    """What the service needs of the kernel's interface; see `vmbus_guest.interface.Interface`."""

    tap: Tap
    name: str

    def configure(self, mac: bytes, mtu: int) -> None: ...

    def set_address(self, address: bytes, prefix: int) -> None: ...

    def set_gateway(self, gateway: bytes) -> None: ...

    def close(self) -> None: ...


class NetworkService(Service):
    """See the module's text."""

    name = "network"
    interface_type = NETWORK_TYPE

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._pages_in = parameters.get("ring_pages_in", RING_PAGES)
        self._pages_out = parameters.get("ring_pages_out", RING_PAGES)
        self._name = parameters.get("interface", "")
        self._address = parse_address(parameters.get("address", ""))
        self._gateway = parameters.get("gateway", "")
        self._mtu = parameters.get("mtu", 0, minimum=0, maximum=MTU_MAXIMUM)
        self._wanted = parameters.get("queues", 1, minimum=1, maximum=QUEUES_MAXIMUM)
        self._offload = parameters.get("offload", True)
        self._window = parameters.get("window_kib", 512, minimum=64, maximum=16384) << 10
        self._nic: Nic | None = None
        self._interface: Network | None = None
        self._ready = False
        self._link = False
        self._reading = False
        self._in_use = 1
        self._outstanding = 0
        self._subs: dict[int, ClientChannel] = {}
        self._tally = dict.fromkeys(
            ("to_host", "to_host_bytes", "from_host", "from_host_bytes", "refused", "not_taken", "lost"), 0
        )

    # ---- channels ------------------------------------------------------------------------------------------------

    def make_interface(self, name: str) -> Network:
        """The kernel's interface."""
        load_module()
        return Interface(name)

    def prepare(self) -> None:
        """The primary channel."""
        self._set_callbacks(self.channel)

    def _set_callbacks(self, channel: ClientChannel) -> None:
        channel.set_maximum_packet_size(MESSAGE_LIMIT)
        channel.set_process_packet_callbacks(self._process)
        channel.set_state_change_callbacks(started=self._started, suspend=self._suspend)

    def _started(self, channel: Channel) -> None:
        if channel is not self.channel:
            self._use_queues()
            return
        packet = channel.allocate_packet()
        packet.completion_routine = self._greeted
        features = Feature.OFFLOAD if self._offload else 0
        packet.send(Hello(features=int(features), mtu=self._mtu, queues=self._wanted).pack())

    def _suspend(self, channel: Channel) -> None:
        self._in_use = 1
        if channel is self.channel:
            self._ready = False
            self._show_link()

    def _greeted(self, packet: Packet, status: int, reply: bytes) -> None:
        packet.free()
        if status != PacketStatus.SUCCESS:
            return
        nic = parse_nic(reply)
        if nic is None:
            self.trouble.append(f"the host's answer to HELLO makes no sense: {reply[:64].hex()}")
            return
        try:
            self._set_up(nic)
        except (EnvironmentProblem, UsageError, OSError) as error:
            self.trouble.append(str(error))
            return
        self._ready = True
        self._link = nic.link
        instance = self.driver.instance_of(self.channel)
        for index in range(1, nic.queues):
            if index not in self._subs:
                sub = self.make_channel(NETWORK_TYPE, f"{self.name}.{index}", instance, subchannel_index=index)
                self._set_callbacks(sub)
                self._subs[index] = sub
                self.channels.append(sub)
                sub.enable()
        self._show_link()
        self._use_queues()

    def _set_up(self, nic: Nic) -> None:
        interface = self._interface
        if interface is None:
            interface = self._interface = self.make_interface(self._name or nic.interface)
        interface.tap.set_carrier(False)
        interface.tap.set_offload(bool(nic.features & Feature.OFFLOAD))
        if self._nic is None or (nic.mac, nic.mtu) != (self._nic.mac, self._nic.mtu):
            interface.configure(nic.mac, nic.mtu)
        if self._nic is None:
            address = self._address or ((nic.address, nic.prefix) if nic.address else None)
            if address is not None and address[0]:
                interface.set_address(*address)
                gateway = socket.inet_aton(self._gateway) if self._gateway else nic.gateway
                if gateway:
                    interface.set_gateway(gateway)
        self._nic = nic

    def _use_queues(self) -> None:
        """Tell the host when all channels are there."""
        nic = self._nic
        if not self._ready or nic is None or nic.queues == 1:
            return
        if all(index in self._subs and self._subs[index].active for index in range(1, nic.queues)):
            packet = self.channel.allocate_packet()
            packet.completion_routine = partial(self._queues_used, nic.queues)
            packet.send(Queues(nic.queues).pack())

    def _queues_used(self, count: int, packet: Packet, status: int, reply: bytes) -> None:
        packet.free()
        if status == PacketStatus.SUCCESS and parse_status(reply) == Status.OK:
            self._in_use = count

    def _show_link(self) -> None:
        """The interface has a link when the host says so, and the host is there."""
        if self._interface is None:
            return
        up = self._ready and self._link
        self._interface.tap.set_carrier(up)
        if up:
            self._read_on()
        else:
            self._stop_reading()

    # ---- from the host -------------------------------------------------------------------------------------------

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        message = parse(payload)
        if isinstance(message, Frames):
            tally, interface = self._tally, self._interface
            if interface is not None:
                tap = interface.tap
                for frame in message.frames:
                    if tap.write(frame):
                        tally["from_host"] += 1
                        tally["from_host_bytes"] += len(frame)
                    else:
                        tally["not_taken"] += 1
            completion.complete()
        elif isinstance(message, Link):
            self._link = message.up
            self._show_link()
            completion.complete()
        else:
            self._tally["refused"] += 1
            completion.complete(pack_reply(Status.INVALID))

    # ---- to the host ---------------------------------------------------------------------------------------------

    def _read_on(self) -> None:
        if not self._reading and self._interface is not None and self._ready and self._link:
            self._reading = True
            self.driver.watch(self._interface.tap.fd, self._readable)

    def _stop_reading(self) -> None:
        if self._reading and self._interface is not None:
            self._reading = False
            self.driver.unwatch(self._interface.tap.fd)

    def _readable(self) -> None:
        assert self._interface is not None
        read = self._interface.tap.read
        batches: dict[ClientChannel, _Batch] = {}
        for _ in range(_PER_TURN):
            frame = read()
            if frame is None:
                break
            channel = self._channel_for(frame)
            batch = batches.get(channel)
            if batch is None:
                batch = batches[channel] = _Batch()
            elif not batch.has_room(len(frame), channel.largest_payload):
                self._send(channel, batch)
                batch = batches[channel] = _Batch()
            batch.add(frame)
            self._outstanding += len(frame)
            if self._outstanding >= self._window:
                self._stop_reading()
                break
        for channel, batch in batches.items():
            self._send(channel, batch)

    def _channel_for(self, frame: bytes) -> ClientChannel:
        index = flow_hash(frame) % self._in_use if self._in_use > 1 else 0
        return self._subs[index] if index else self.channel

    def _send(self, channel: ClientChannel, batch: _Batch) -> None:
        self._tally["to_host"] += len(batch.frames)
        self._tally["to_host_bytes"] += batch.size
        if not channel.active:
            self._outstanding -= batch.size
            self._tally["lost"] += len(batch.frames)
            return
        packet = channel.allocate_packet()
        packet.pointer = batch
        packet.completion_routine = self._sent
        packet.send(pack_frames(batch.frames))

    def _sent(self, packet: Packet, status: int, reply: bytes) -> None:
        batch: _Batch = packet.pointer
        packet.free()
        self._outstanding -= batch.size
        if status != PacketStatus.SUCCESS:
            self._tally["lost"] += len(batch.frames)
        elif parse_status(reply) != Status.OK:
            self._tally["refused"] += 1
        if not self._reading and self._outstanding < self._window:
            self._read_on()

    # ---- the end -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Remove the interface."""
        self._stop_reading()
        if self._interface is not None:
            self._interface.close()
            self._interface = None
        super().close()

    def counts(self) -> dict[str, Any]:
        """What went through, and how it stands."""
        nic = self._nic
        return {
            **super().counts(),
            **self._tally,
            "interface": None if self._interface is None else self._interface.name,
            "link": self._ready and self._link,
            "mtu": None if nic is None else nic.mtu,
            "queues": self._in_use,
            "outstanding": self._outstanding,
        }


class _Batch:
    """Frames that travel together."""

    __slots__ = ("frames", "size")

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.size = 0

    def has_room(self, size: int, largest: int) -> bool:
        count = len(self.frames) + 1
        return count <= FRAMES_MAXIMUM and message_size(count, self.size + size) <= min(BATCH_BYTES, largest)

    def add(self, frame: bytes) -> None:
        self.frames.append(frame)
        self.size += len(frame)


def parse_address(text: str) -> tuple[bytes, int] | None:
    """("192.0.2.2/24"); None without a wish, no bytes for "none"."""
    if not text:
        return None
    if text == "none":
        return b"", 0
    address, _, prefix = text.partition("/")
    try:
        length = int(prefix)
        if not 0 <= length <= 32:
            raise ValueError
        return socket.inet_aton(address), length
    except (OSError, ValueError):
        raise UsageError(f"parameter 'address' is like 192.0.2.2/24, not '{text}'") from None
