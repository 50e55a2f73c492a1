"""Channels joined within one process: packets, sub-channels, GPADLs, saves, and what goes wrong."""

from uuid import UUID

import pytest

from vmbus.bus.local import LocalBus
from vmbus.errors import StateError, UsageError
from vmbus.kmcl import ChannelState, ClientChannel, Completion, KmclError, Packet
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.server import ServerChannel
from vmbus.memory.guest import MemoryRevoked

TYPE = UUID("00000000-0000-4000-8000-000000000001")
INSTANCE = UUID("00000000-0000-4000-8000-000000000002")
PAGE = 4096


class Server:
    """Answers each packet with the same bytes; with `hold`, when told."""

    def __init__(self, bus: LocalBus, *, subchannel: int = 0, hold: bool = False, force_new: bool = False) -> None:
        self.channel = ServerChannel(TYPE, INSTANCE, name=f"server {subchannel}", subchannel_index=subchannel)
        self.held: list[tuple[Completion, bytes]] = []
        self.hold = hold
        self.events: list[str] = []
        self.finished: list[bytes] = []
        self.channel.set_process_packet_callbacks(self._process)
        self.channel.set_state_change_callbacks(
            opened=lambda _: self.events.append("opened"),
            closed=lambda _: self.events.append("closed"),
            suspend=self._suspend,
        )
        self.channel.set_save_restore_packet_callbacks(self._save, self._restore)
        if force_new:
            self.channel.set_server_flags(8)
        bus.offer(self.channel)
        self.channel.enable()
        self.channel.start()

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        self.held.append((completion, payload))
        if not self.hold:
            self.answer()

    def answer(self) -> None:
        while self.held:
            completion, payload = self.held.pop(0)
            if completion.has_external_data:
                for view in completion.external_data().views:
                    view[:] = bytes(view)[::-1]
            completion.complete(payload)

    def _suspend(self, _: Channel) -> None:
        self.events.append("suspend")
        self.answer()

    def send(self, payload: bytes) -> None:
        packet = self.channel.allocate_packet()
        packet.pointer = payload
        packet.completion_routine = self._completed
        packet.send(payload)

    def _completed(self, packet: Packet, status: int, reply: bytes) -> None:
        self.finished.append(packet.pointer)

    def _save(self, _: ServerChannel, packet: Packet, buffer: memoryview) -> int:
        if len(buffer):
            buffer[: len(packet.pointer)] = packet.pointer
        return len(packet.pointer)

    def _restore(self, channel: ServerChannel, lib: bytes, save: bytes) -> None:
        packet = channel.allocate_packet()
        packet.pointer = bytes(save)
        packet.completion_routine = self._completed
        channel.restore_packet(packet, lib)


class Client:
    def __init__(self, bus: LocalBus, *, subchannel: int = 0, pages: int = 1) -> None:
        self.bus = bus
        self.channel = ClientChannel(
            TYPE, name=f"client {subchannel}", ring_pages_in=pages, ring_pages_out=pages, subchannel_index=subchannel
        )
        self.got: list[bytes] = []
        self.replies: list[tuple[int, bytes]] = []
        self.channel.set_process_packet_callbacks(self._process)

    def open(self) -> "Client":
        self.bus.open(self.channel)
        return self

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        self.got.append(payload)
        completion.complete()

    def send(self, payload: bytes, **arguments) -> None:
        packet = self.channel.allocate_packet()
        packet.completion_routine = lambda packet, status, reply: self.replies.append((status, reply))
        packet.send(payload, **arguments)


@pytest.fixture
def bus() -> LocalBus:
    return LocalBus()


def payloads(count: int) -> list[bytes]:
    return [number.to_bytes(8, "little") * 20 for number in range(count)]


def test_nothing_to_open(bus: LocalBus) -> None:
    client = Client(bus)
    with pytest.raises(UsageError, match="nothing that channel client 0 could open"):
        client.open()
    assert client.channel.state is ChannelState.DISABLED
    Server(bus)
    client.open()
    with pytest.raises(UsageError, match="nothing that"):
        Client(bus).open()
    with pytest.raises(UsageError, match="offered already"):
        Server(bus)


def test_enabling_an_attached_client_opens_it_when_the_offer_comes(bus: LocalBus) -> None:
    client = Client(bus)
    bus.attach(client.channel)
    client.channel.enable()
    bus.run()
    assert client.channel.state is ChannelState.CLOSED
    server = Server(bus)
    bus.run()
    assert client.channel.state is server.channel.state is ChannelState.ACTIVE
    client.channel.disable()
    assert client.channel.state is ChannelState.DISABLED and server.channel.state is ChannelState.CLOSED
    client.channel.enable()
    bus.run()
    server.channel.disable()
    assert client.channel.state is server.channel.state is ChannelState.DISABLED


# ---- sub-channels ----------------------------------------------------------------------------------------------------


def test_subchannels_live_on_an_open_primary(bus: LocalBus) -> None:
    server = Server(bus)
    with pytest.raises(UsageError, match="primary is not open"):
        Server(bus, subchannel=1)
    client = Client(bus).open()
    sub_server, sub_client = Server(bus, subchannel=1), Client(bus, subchannel=1).open()
    client.send(b"primary ")
    sub_client.send(b"sub one ")
    bus.run()
    assert client.replies == [(0, b"primary ")] and sub_client.replies == [(0, b"sub one ")]
    bus.close(client.channel)
    assert sub_client.channel.state is ChannelState.DISABLED
    assert sub_server.channel.state is server.channel.state is ChannelState.CLOSED


# ---- GPADLs ----------------------------------------------------------------------------------------------------------


def test_a_gpadl_as_a_window() -> None:
    work: list = []
    bus = LocalBus(idle=lambda: bool(work) and (work.pop()() or True))
    server, client = Server(bus), Client(bus).open()
    buffer = bus.allocate(4 * PAGE)
    handle = client.channel.create_gpadl([(buffer.iova + 2 * PAGE, 2 * PAGE), (buffer.iova, PAGE)])
    window = server.channel.open_gpadl(handle, 3 * PAGE)
    window.write(2 * PAGE - 2, b"abcd")
    assert window.size == 3 * PAGE and window.read(2 * PAGE - 2, 4) == b"abcd"
    assert buffer.view[4 * PAGE - 2 :] == b"ab" and buffer.view[:2] == b"cd"
    for again in (lambda: server.channel.open_gpadl(handle, 3 * PAGE), lambda: server.channel.map_gpadl(handle)):
        with pytest.raises(KmclError, match="mapped already"):
            again()
    work.append(lambda: server.channel.unmap_gpadl(handle))
    client.channel.delete_gpadl(handle)
    with pytest.raises(MemoryRevoked):
        window.write(0, b"x")
    large = client.channel.create_gpadl([(buffer.iova, 2 * PAGE)])
    with pytest.raises(KmclError, match="8191 are taken"):
        server.channel.open_gpadl(large, 2 * PAGE - 1)
    odd = client.channel.create_gpadl([(buffer.iova + 4, PAGE)])
    with pytest.raises(KmclError, match="aligned"):
        server.channel.open_gpadl(odd, PAGE)
    client.channel.delete_gpadl(odd)


# ---- save and restore ------------------------------------------------------------------------------------------------


def test_restored_at_every_step(bus: LocalBus) -> None:
    servers = [Server(bus)]
    client = Client(bus).open()

    def again() -> None:
        servers.append(Server(bus))

    for payload in payloads(60):
        servers[-1].send(payload)
        client.send(payload)
        bus.save_and_restore(again)
        bus.service()
        bus.save_and_restore(again)
    bus.run()
    assert client.got == payloads(60)
    assert client.replies == [(0, payload) for payload in payloads(60)]
    assert [payload for server in servers for payload in server.finished] == payloads(60)
    events = [event for server in servers for event in server.events]
    assert events.count("opened") == 1 and "closed" not in events


def test_a_returned_channel_is_offered_and_enabled(bus: LocalBus) -> None:
    Server(bus)
    client = Client(bus).open()
    got: list[bytes] = []

    def make() -> ServerChannel:
        channel = ServerChannel(TYPE, INSTANCE, name="new")
        channel.set_process_packet_callbacks(
            lambda c, completion, payload: (got.append(payload), completion.complete())
        )
        return channel

    bus.save_and_restore(make)
    client.send(b"to a new")
    bus.run()
    assert got == [b"to a new"]


def test_an_open_channel_has_to_be_made_again(bus: LocalBus) -> None:
    Server(bus)
    Client(bus).open()
    with pytest.raises(StateError, match="was not made again"):
        bus.save_and_restore(lambda: None)


def test_held_packets_are_named(bus: LocalBus) -> None:
    server, client = Server(bus, hold=True), Client(bus).open()
    server.answer = lambda: None  # type: ignore[method-assign]
    client.send(b"12345678")
    bus.run()
    with pytest.raises(UsageError, match=r"incoming packets \{'server 0': \[1\]\}"):
        bus.save_and_restore(lambda: None)
    server.held.pop()[0].complete(b"late")
    bus.run()
    assert client.replies == [(0, b"late\0\0\0\0")]


def test_force_new_channel(bus: LocalBus) -> None:
    servers = [Server(bus, force_new=True)]
    client = Client(bus).open()
    rescinded: list[ClientChannel] = []
    bus.on_rescind = rescinded.append
    servers[0].send(b"is lost.")
    client.send(b"as well.")
    bus.save_and_restore(lambda: servers.append(Server(bus, force_new=True)))
    assert rescinded == [client.channel] and client.channel.state is ChannelState.DISABLED
    client.open()
    servers[1].send(b"arrives.")
    bus.run()
    assert client.got == servers[1].finished == [b"arrives."]
    assert servers[1].events == ["opened"]
