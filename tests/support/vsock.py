"""The guest's half of hv_sock over our client channels, as Linux has it, and the host's programs."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from support import pace
from vmbus.errors import WaitTimeout
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.settings import FLAG_IS_PIPE
from vmbus.ring.pure import PENDING_SEND_SIZE
from vmbus.wire import hvsock
from vmbus.wire import messages as m
from vmbus_guest.channel_driver import SteadyClock
from vmbus_guest.driver import VmbusDriver

CHUNK = 4088
RING_PAGES = 6
SECONDS = 20


class GuestSocket:
    """One connection in the guest. `got`: what was received; `fins`: how often the host has ended its direction."""

    def __init__(self, driver: VmbusDriver, offer: m.OfferChannel, ring_pages: int = RING_PAGES) -> None:
        self.driver = driver
        self.offer = offer
        self.got = bytearray()
        self.fins = 0
        self.largest = 0
        self.closed = False
        self.reading = True
        self._held: list[Completion] = []
        self.channel: ClientChannel = driver.client_channel(
            offer.interface_type,
            instance=offer.interface_instance,
            ring_pages_in=ring_pages,
            ring_pages_out=ring_pages,
        )
        self.channel.set_flags(FLAG_IS_PIPE)
        self.channel.set_process_packet_callbacks(self._process)
        self.channel.set_state_change_callbacks(closed=self._closed)
        self.channel.set_transaction_quota(1)

    def open(self) -> GuestSocket:
        self.driver.enable(self.channel)
        # From here on it always wants to hear of room for a packet: which also says that it is ready.
        self.driver.link_of(self.channel).writer.header.store32(PENDING_SEND_SIZE, CHUNK + 32)
        return self

    @property
    def peer(self) -> int:
        return hvsock.peer_port(self.offer.interface_instance)

    @property
    def ended(self) -> bool:
        """Whether a program in the guest would read the end."""
        return bool(self.fins) or self.closed

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        data = hvsock.unpack(payload)
        assert not self.fins, "the host sent something behind its FIN"
        if data:
            assert len(payload) == hvsock.HEADER.size + -(-len(data) // 8) * 8
            self.largest = max(self.largest, len(data))
            self.got += data
        else:
            assert len(payload) == hvsock.HEADER.size, "a FIN is 32 bytes in the ring"
            self.fins += 1
        if self.reading:
            completion.complete()
        else:
            self._held.append(completion)  # the quota is one: nothing more is read

    def read_on(self) -> None:
        """The program reads again."""
        self.reading = True
        held, self._held = self._held, []
        for completion in held:
            completion.complete()

    def _closed(self, _: Channel) -> None:
        self.closed = True

    def packet(self, payload: bytes) -> None:
        """A packet of any bytes. Linux numbers none, which an auditor of the guest's half could not follow."""
        packet = self.channel.allocate_packet()
        packet.send(payload, wait_for_completion=False, transaction=None if self.driver.recorder else 0)

    def send(self, data: bytes) -> None:
        """Queued in order while the ring is full, as a program that blocks."""
        chunk = min(CHUNK, self.channel.largest_payload - hvsock.HEADER.size)
        for start in range(0, len(data), chunk):
            self.packet(hvsock.pack(data[start : start + chunk]))

    def end(self) -> None:
        """shutdown(SHUT_WR), or close."""
        self.packet(hvsock.FIN)

    def until(self, condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> None:
        self.driver.run_until(lambda: bool(condition()), pace.seconds(seconds), what)


class GuestSockets:
    """The guest's hv_sock. `listening`: ports, and what becomes of their connections; `accepted`: those so far.

    Offers for a listener are opened as they come. What is in a ring is read before a RESCIND counts, as Linux does it.
    """

    def __init__(self, driver: VmbusDriver) -> None:
        self.driver = driver
        self.listening: dict[int, Callable[[GuestSocket], None]] = {}
        self.accepted: list[GuestSocket] = []
        self._new: list[m.OfferChannel] = []
        self.seen = 0
        driver.bus.on_offer = self._offered
        driver.bus.on_rescind = self._rescinded

    def _offered(self, offer: m.OfferChannel) -> None:
        assert offer.flags & m.OfferFlag.TLNPI_PROVIDER_OFFER and offer.flags & m.OfferFlag.NAMED_PIPE_MODE
        assert not offer.monitor_allocated
        self.seen += 1
        if hvsock.is_from_host(offer.user_defined):
            self._new.append(offer)

    def _rescinded(self, offer: m.OfferChannel) -> None:
        link = self.driver._links.get(offer.relid)
        if link is not None and link.channel.state is ChannelState.ACTIVE:
            while link.channel.process():
                pass
        self.driver._rescinded(offer)

    def run_until(self, condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> None:
        """Pump, and accept."""

        def met() -> bool:
            while self._new:
                offer = self._new.pop(0)
                listener = self.listening.get(hvsock.port_of(offer.interface_type) or 0)
                if listener is not None and offer.relid in self.driver.bus.offers:
                    accepted = GuestSocket(self.driver, offer).open()
                    self.accepted.append(accepted)
                    listener(accepted)
            return bool(condition())

        clock, seconds = SteadyClock(), pace.seconds(seconds)
        while not met():
            if clock.elapsed() > seconds:
                raise WaitTimeout(what, seconds)
            self.driver.step(0.005)  # what the host's programs see raises no interrupt

    def request(self, port: int, endpoint: UUID | None = None) -> UUID:
        """Ask for a connection to a port of the host's; its endpoint."""
        endpoint = endpoint or uuid4()
        self.driver.bus.connect(endpoint, hvsock.service_of(port))
        return endpoint

    def find(self, endpoint: UUID) -> m.OfferChannel | None:
        for relid, offer in self.driver.bus.offers.items():
            if offer.interface_instance == endpoint and relid not in self.driver.bus.rescinded:
                return offer
        return None

    def connect(self, port: int, ring_pages: int = RING_PAGES) -> GuestSocket:
        """connect() to a port of the host's; it returns when the channel is open."""
        endpoint = self.request(port)
        self.run_until(lambda: self.find(endpoint), f"an offer for port {port}")
        offer = self.find(endpoint)
        assert offer is not None and offer.interface_type == hvsock.service_of(port)
        assert not hvsock.is_from_host(offer.user_defined)
        return GuestSocket(self.driver, offer, ring_pages).open()

    def refused(self, endpoint: UUID, port: int) -> int | None:
        """The status with which the host has refused a request."""
        return self.driver.bus.connect_results.get((endpoint, hvsock.service_of(port)))


def listen(path: Path, port: int, backlog: int = 128) -> socket.socket:
    """A program of the host's that listens for the guest."""
    end = socket.socket(socket.AF_UNIX)
    end.bind(f"{path}_{port}")
    end.listen(backlog)
    end.setblocking(False)
    return end


def call(path: Path, port: int | bytes) -> socket.socket:
    """A program of the host's that connects to the guest (`port`: or the whole line)."""
    end = socket.socket(socket.AF_UNIX)
    end.connect(str(path))
    end.sendall(port if isinstance(port, bytes) else b"CONNECT %d\n" % port)
    end.setblocking(False)
    return end


def take(end: socket.socket, into: bytearray) -> bool:
    """What is there now; False at the end of the stream."""
    while True:
        try:
            data = end.recv(1 << 16)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        if not data:
            return False
        into += data


def accept(end: socket.socket) -> socket.socket | None:
    """The next connection of a listener's, if there is one."""
    try:
        taken, _ = end.accept()
    except BlockingIOError:
        return None
    taken.setblocking(False)
    return taken
