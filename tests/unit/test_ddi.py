"""KMCL under its own names: every function and callback, every status from the condition that the contract names."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from struct import Struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.device import Machine, connect
from support.endpoints import Bench
from support.pair import INSTANCE, PAGE, TYPE, PairLink
from support.traffic import Traffic
from vmbus.bus.local import LocalBus
from vmbus.errors import StateError
from vmbus.kmcl import ChannelState, ChannelStateError, KmclError, Status, ddi
from vmbus.kmcl.saved import decode_chunk, decode_lib
from vmbus.kmcl.saving import split_frames

WAIT = ddi.VMBUS_CHANNEL_FORMAT_FLAG_WAIT_FOR_COMPLETION
FORCE = ddi.VMBUS_CHANNEL_FORMAT_FLAG_FORCE_MDL_LENGTH
NUMBER = Struct("<Q")
SPARE = 0x80000  # guest memory apart from the rings


class World(Bench):
    """A VSP and a VSC made with the DDI alone. It is the VMBus handle of both, and how they wait."""

    def __init__(self, *, spare_pages: int = 4, **pages: int) -> None:
        super().__init__(**pages)
        self.spare = SPARE
        self.memory = bytearray(spare_pages * PAGE)
        self.bound: list = []
        self.events: list[str] = []
        self.incoming: list[tuple] = []
        self.batches: list[int] = []
        self.answers: list[tuple[int, int, bytes]] = []
        self.held: list[tuple] = []
        self.saves: list[tuple[int, int]] = []
        self.next = 0
        self.refuse_open = Status.SUCCESS
        self.server = self.make_server()
        status, client = ddi.VmbChannelAllocate(self, False)
        assert status == Status.SUCCESS
        self.client = client
        client.waiter = self.wait
        assert ddi.VmbChannelInitSetFriendlyName(client, "client") == Status.SUCCESS
        assert ddi.VmbClientChannelInitSetTargetPnp(client, TYPE) == Status.SUCCESS
        assert ddi.VmbChannelInitSetProcessPacketCallbacks(client, self.take) == Status.SUCCESS

    def make_server(self, **replaced):
        status, server = ddi.VmbChannelAllocate(None, True)
        assert status == Status.SUCCESS
        server.waiter = self.wait
        callbacks = ddi.VMB_CHANNEL_STATE_CHANGE_CALLBACKS()
        ddi.VMB_CHANNEL_STATE_CHANGE_CALLBACKS_INIT(callbacks)
        callbacks.EvtChannelOpened = self.opened
        callbacks.EvtChannelClosed = lambda _: self.events.append("closed")
        callbacks.EvtChannelSuspend = lambda _: self.events.append("suspend")
        callbacks.EvtChannelStarted = lambda _: self.events.append("started")
        callbacks.EvtChannelPostStarted = lambda _: self.events.append("post started")
        save, restore = replaced.get("save", self.save), replaced.get("restore", self.restore)
        for status in (
            ddi.VmbChannelInitSetFriendlyName(server, "server"),
            ddi.VmbChannelInitSetStateChangeCallbacks(server, callbacks),
            ddi.VmbChannelInitSetProcessPacketCallbacks(server, self.process, self.batch_done),
            ddi.VmbServerChannelInitSetTargetInterfaceId(server, TYPE, INSTANCE),
            ddi.VmbServerChannelInitSetSaveRestorePacketCallbacks(server, save, restore),
            ddi.VmbServerChannelInitSetVmbusHandle(server, self),
        ):
            assert status == Status.SUCCESS
        return server

    # the bus

    def add_channel(self, channel) -> None:
        self.bound.append(channel)
        channel.bind(lambda one: self.events.append("offered"), lambda one: self.events.append("withdrawn"))

    def attach(self, client) -> None:
        self.bound.append(client)
        client.bind(lambda one: self.events.append("enabled"))

    def link(self, side: str) -> PairLink:
        link = super().link(side)
        link.memory.map(SPARE, memoryview(self.memory), True)
        return link

    def open(self) -> None:
        for start in (0, (self.up_pages + 1) * PAGE):
            self.ram[start + 64] = 1
        assert ddi.VmbChannelEnable(self.server) == Status.SUCCESS
        assert ddi.VmbChannelEnable(self.client) == Status.SUCCESS
        self.server_link = self.link("server")
        self.client_link = self.link("client")
        self.server.open(self.server_link)
        self.client.open(self.client_link)
        self.client.activate()
        assert ddi.VmbChannelStart(self.server) == Status.SUCCESS

    # the VSP

    def opened(self, channel) -> int:
        self.events.append("opened")
        return self.refuse_open

    def process(self, channel, completion, buffer: bytes, length: int, flags: int) -> None:
        assert channel is self.server and length == len(buffer)
        self.incoming.append((completion, buffer, flags))

    def batch_done(self, channel, count: int) -> None:
        self.batches.append(count)

    def send(self, count: int = 1, flags: int = WAIT) -> Status:
        status = Status.SUCCESS
        for _ in range(count):
            packet = ddi.VmbPacketAllocate(self.server)
            ddi.VmbPacketSetPointer(packet, self.next)
            ddi.VmbPacketSetCompletionRoutine(packet, self.completed)
            status = ddi.VmbPacketSend(packet, NUMBER.pack(self.next), None, flags)
            self.next += 1
        return status

    def completed(self, packet, status: int, buffer: bytes, length: int) -> None:
        assert length == len(buffer)
        self.answers.append((ddi.VmbPacketGetPointer(packet), status, buffer))

    def save(self, channel, packet, save_buf: memoryview, save_buf_size: int) -> tuple[int, int]:
        number = ddi.VmbPacketGetPointer(packet)
        self.saves.append((number, save_buf_size))
        assert len(save_buf) == save_buf_size
        if number % 3 == 0:
            return Status.SUCCESS, 0
        if save_buf_size < 8:
            return Status.BUFFER_TOO_SMALL, 8
        NUMBER.pack_into(save_buf, 0, number)
        return Status.SUCCESS, 8

    def restore(self, channel, lib_buf, lib_buf_size: int, save_buf, save_buf_size: int) -> int:
        assert (lib_buf_size, save_buf_size) == (len(lib_buf), len(save_buf))
        packet = ddi.VmbPacketAllocate(channel)
        status = ddi.VmbPacketRestore(packet, lib_buf)
        # A packet whose number divides by 3 saved nothing: its number follows from its transaction.
        number = NUMBER.unpack(save_buf)[0] if save_buf_size else packet.transaction - 1
        ddi.VmbPacketSetPointer(packet, number)
        ddi.VmbPacketSetCompletionRoutine(packet, self.completed)
        return status

    # the VSC

    def take(self, channel, completion, buffer: bytes, length: int, flags: int) -> None:
        self.held.append((completion, buffer))

    def answer(self, count: int | None = None) -> None:
        count = len(self.held) if count is None else count
        for completion, buffer in self.held[:count]:
            ddi.VmbChannelPacketComplete(completion, buffer[:8] + b"answered")
        del self.held[:count]

    def request(self, **arguments) -> list[tuple[int, bytes]]:
        """One packet of the VSC; where its completion goes."""
        packet = ddi.VmbPacketAllocate(self.client)
        outcome: list[tuple[int, bytes]] = []
        ddi.VmbPacketSetCompletionRoutine(packet, lambda _, status, buffer, length: outcome.append((status, buffer)))
        assert ddi.VmbPacketSend(packet, b"request!", flags=WAIT, **arguments) == Status.SUCCESS
        return outcome


@pytest.fixture
def world() -> World:
    return World()


def answered(number: int) -> tuple[int, int, bytes]:
    return number, Status.SUCCESS, NUMBER.pack(number) + b"answered"


def allocate(is_server: bool):
    status, channel = ddi.VmbChannelAllocate(None, is_server)
    assert status == Status.SUCCESS
    return channel


# ---- the table -------------------------------------------------------------------------------------------------------

MODULES = {
    "Channel": "vmbus.kmcl.channel",
    "ClientChannel": "vmbus.kmcl.client",
    "ServerChannel": "vmbus.kmcl.server",
    "Packet": "vmbus.kmcl.packet",
    "Completion": "vmbus.kmcl.completion",
}


@pytest.mark.parametrize("entry", [*ddi.FUNCTIONS.values(), *ddi.CALLBACKS.values()], ids=lambda entry: entry.name)
def test_every_counterpart_exists(entry: ddi.Entry) -> None:
    objects = {"Channel": World().client, "Packet": ddi.VmbPacketAllocate(World().client)}
    for counterpart in entry.counterpart.split(" / "):
        kind, _, member = counterpart.partition(".")
        owner = getattr(importlib.import_module(MODULES[kind]), kind)
        if member:
            # Attributes exist on objects only, methods on the class.
            assert hasattr(owner, member) or hasattr(objects[kind], member), counterpart


def test_a_row_has_the_name_and_the_text_of_its_function() -> None:
    for name in ddi.FUNCTIONS:
        function = getattr(ddi, name)
        assert (function.__name__, bool(function.__doc__)) == (name, True)
    assert "_2: unknown bits" in ddi.VmbChannelInitSetFlags.__doc__


def test_a_row_that_is_bound_to_no_name_is_found_at_once() -> None:
    from vmbus.kmcl.ddi.table import CHANNEL, Rows, enter

    row = CHANNEL.reads("pointer", "Nobody's.")
    try:
        with pytest.raises(KeyError):
            enter({"VmbNothing": None})
    finally:
        Rows._unnamed.clear()
    assert row(allocate(False)) is None


def test_a_guest_without_msgspec_has_the_clients_functions() -> None:
    program = (
        "import sys; sys.modules['msgspec'] = None\n"
        "from vmbus.kmcl import ddi\n"
        "print(*map(int, (ddi.VmbChannelSaveBegin(ddi.VmbChannelAllocate(None, False)[1]),)))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ran.stdout.strip(), ran.stderr) == (str(int(Status.INVALID_PARAMETER_1)), "")


def test_every_function_is_called_by_a_test() -> None:
    text = Path(__file__).read_text()
    assert not [name for name in ddi.FUNCTIONS if not re.search(rf"ddi\.{name}[,(]", text)]


def test_wrong_statuses_are_not_success() -> None:
    assert ddi.NT_SUCCESS(Status.SUCCESS) and ddi.NT_SUCCESS(Status.PENDING)
    assert not ddi.NT_SUCCESS(Status.BUFFER_OVERFLOW) and not ddi.NT_SUCCESS(Status.UNSUCCESSFUL)


# ---- set-up ----------------------------------------------------------------------------------------------------------


def initialized() -> ddi.VMB_CHANNEL_STATE_CHANGE_CALLBACKS:
    callbacks = ddi.VMB_CHANNEL_STATE_CHANGE_CALLBACKS()
    ddi.VMB_CHANNEL_STATE_CHANGE_CALLBACKS_INIT(callbacks)
    return callbacks


def some_process(*_) -> None: ...


SET_UP = {
    "VmbChannelInitSetFlags": ("B", (0,)),
    "VmbChannelInitSetMaximumPacketSize": ("B", (64,)),
    "VmbChannelInitSetMaximumExternalData": ("B", (64, 1)),
    "VmbChannelInitSetClientContextSize": ("B", (64,)),
    "VmbChannelInitSetProcessPacketCallbacks": ("B", (some_process,)),
    "VmbChannelInitSetStateChangeCallbacks": ("B", (initialized(),)),
    "VmbChannelInitSetFriendlyName": ("B", ("friend",)),
    "VmbServerChannelInitSetFlags": ("S", (0x1E,)),
    "VmbServerChannelInitSetMmioMegabytes": ("S", (0, 8)),
    "VmbServerChannelInitSetTargetInterfaceId": ("S", (TYPE, INSTANCE)),
    "VmbServerChannelInitSetTargetVtl": ("S", (0,)),
    "VmbServerChannelInitSetSaveRestorePacketCallbacks": ("S", (some_process, some_process)),
    "VmbServerChannelInitSetVmbusHandle": ("S", ("the bus",)),
    "VmbClientChannelInitSetTargetPnp": ("C", (TYPE, INSTANCE, some_process)),
    "VmbClientChannelInitSetRingBufferPageCount": ("C", (4, 4)),
}


def call_set_up(world: World, name: str, channel) -> Status:
    arguments = [world if one == "the bus" else one for one in SET_UP[name][1]]
    return getattr(ddi, name)(channel, *arguments)


def test_the_table_of_set_up_calls_is_complete() -> None:
    assert set(SET_UP) == {name for name in ddi.FUNCTIONS if "InitSet" in name}


@pytest.mark.parametrize("name", SET_UP)
@pytest.mark.parametrize("is_server", [True, False], ids=["server", "client"])
def test_set_up_is_for_its_endpoint_and_for_a_disabled_channel(world: World, name: str, is_server: bool) -> None:
    channel = world.server if is_server else world.client
    if SET_UP[name][0] not in ("B", "S" if is_server else "C"):
        assert call_set_up(world, name, channel) == Status.INVALID_PARAMETER_1
        return
    assert call_set_up(world, name, channel) == Status.SUCCESS
    fresh = World()
    fresh.open()
    channel = fresh.server if is_server else fresh.client
    assert call_set_up(fresh, name, channel) == Status.INVALID_PARAMETER_1
    channel.close(lambda: None)  # closed is not disabled
    assert call_set_up(fresh, name, channel) == Status.INVALID_PARAMETER_1


@pytest.mark.parametrize(
    ("call", "arguments", "status"),
    [
        (ddi.VmbChannelInitSetFlags, (0x2,), Status.INVALID_PARAMETER_2),
        (ddi.VmbChannelInitSetMaximumPacketSize, (0,), Status.INVALID_PARAMETER_2),
        (ddi.VmbChannelInitSetMaximumExternalData, (0, 1), Status.INVALID_PARAMETER_2),
        (ddi.VmbChannelInitSetMaximumExternalData, (1, 0), Status.INVALID_PARAMETER_3),
        (ddi.VmbChannelInitSetClientContextSize, (-1,), Status.INVALID_PARAMETER_2),
        (ddi.VmbChannelSetTransactionQuota, (0,), Status.INVALID_PARAMETER_2),
        (ddi.VmbServerChannelInitSetFlags, (0x20,), Status.INVALID_PARAMETER_2),
        (ddi.VmbServerChannelInitSetMmioMegabytes, (0, 0), Status.INVALID_PARAMETER),
        (ddi.VmbServerChannelInitSetMmioMegabytes, (0x10000,), Status.INVALID_PARAMETER),
        (ddi.VmbServerChannelInitSetTargetVtl, (1,), Status.INVALID_PARAMETER_2),
        (ddi.VmbServerChannelInitSetVmbusHandle, (object(),), Status.INVALID_PARAMETER_2),
        (ddi.VmbClientChannelInitSetRingBufferPageCount, (0, 1), Status.INVALID_PARAMETER),
        (ddi.VmbClientChannelInitSetRingBufferPageCount, (1, 0), Status.INVALID_PARAMETER),
    ],
)
def test_wrong_parameters_of_set_up_have_the_documented_status(world: World, call, arguments, status) -> None:
    channel = world.client if "VmbClient" in call.__name__ else world.server
    assert call(channel, *arguments) == status


@pytest.mark.parametrize("field", ["Version", "Size"])
@pytest.mark.parametrize("change", [-1, 1])
def test_state_callbacks_of_another_version_or_size(world: World, field: str, change: int) -> None:
    callbacks = initialized()
    setattr(callbacks, field, getattr(callbacks, field) + change)
    assert ddi.VmbChannelInitSetStateChangeCallbacks(world.server, callbacks) == Status.INVALID_PARAMETER_2
    uninitialized = ddi.VMB_CHANNEL_STATE_CHANGE_CALLBACKS()
    assert ddi.VmbChannelInitSetStateChangeCallbacks(world.server, uninitialized) == Status.INVALID_PARAMETER_2


def test_what_was_set_up_is_what_is_offered(world: World) -> None:
    server = world.server
    assert ddi.VmbServerChannelInitSetFlags(server, 0x1F) == Status.SUCCESS
    assert server.force_new_channel and server.loopback_offer and server.offer_flags
    assert ddi.VmbServerChannelInitSetFlags(server, 0) == Status.SUCCESS
    assert not (server.force_new_channel or server.loopback_offer or server.offer_flags)
    assert ddi.VmbServerChannelInitSetMmioMegabytes(server, 8, 16) == Status.SUCCESS
    assert (server.mmio_megabytes, server.mmio_megabytes_optional) == (8, 16)
    assert (server.name, server.interface_type, server.interface_instance) == ("server", TYPE, INSTANCE)
    assert ddi.VmbClientChannelInitSetRingBufferPageCount(world.client, 3, 5) == Status.SUCCESS
    assert (world.client.ring_pages_in, world.client.ring_pages_out) == (3, 5)


def test_the_bus_of_a_channel(world: World) -> None:
    # A client's comes with the allocation, a server's with its own call.
    assert world.bound == [world.server, world.client]
    assert ddi.VmbConvertVmbusHandleToKernelHandle(world) == (Status.SUCCESS, world)
    assert ddi.VmbConvertVmbusHandleToKernelHandle(17) == (Status.INVALID_PARAMETER_1, None)


def test_a_channel_without_a_target_cannot_be_enabled() -> None:
    for is_server in (True, False):
        channel = allocate(is_server)
        assert ddi.VmbChannelGetInterfaceInstance(channel) == (Status.INVALID_DEVICE_STATE, None)
        assert ddi.VmbChannelEnable(channel) == Status.INVALID_DEVICE_STATE
    unbound = allocate(True)
    assert ddi.VmbServerChannelInitSetTargetInterfaceId(unbound, TYPE, INSTANCE) == Status.SUCCESS
    assert ddi.VmbChannelGetInterfaceInstance(unbound) == (Status.SUCCESS, INSTANCE)
    assert ddi.VmbChannelEnable(unbound) == Status.INVALID_DEVICE_STATE


def test_pointers_are_the_callers(world: World) -> None:
    assert ddi.VmbChannelGetPointer(world.server) is None
    ddi.VmbChannelSetPointer(world.server, world)
    assert ddi.VmbChannelGetPointer(world.server) is world
    packet = ddi.VmbPacketAllocate(world.server)
    assert ddi.VmbPacketGetPointer(packet) is None
    ddi.VmbPacketSetPointer(packet, world)
    assert ddi.VmbPacketGetPointer(packet) is world
    assert ddi.VmbPacketGetChannel(packet) is world.server


# ---- life ------------------------------------------------------------------------------------------------------------


def test_state_callbacks_come_in_the_order_of_the_contract(world: World) -> None:
    world.open()
    world.run()
    assert ddi.VmbChannelPause(world.server) == Status.SUCCESS
    assert ddi.VmbChannelStart(world.server) == Status.SUCCESS
    world.server.close(lambda: world.events.append("done"))
    assert ddi.VmbChannelDisable(world.server) == Status.SUCCESS
    started = ["started", "post started"]
    assert world.events == [
        *["offered", "enabled", "opened", *started, "suspend", *started, "suspend", "closed", "done"],
        "withdrawn",
    ]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [(Status.INSUFFICIENT_RESOURCES, Status.INSUFFICIENT_RESOURCES), (0xC0FFEE00, Status.UNSUCCESSFUL)],
)
def test_a_failure_of_opened_rolls_the_open_back(world: World, returned: int, expected: Status) -> None:
    world.refuse_open = returned
    with pytest.raises(KmclError) as caught:
        world.open()
    assert caught.value.status is expected
    assert world.server.state is ChannelState.CLOSED
    world.refuse_open = Status.SUCCESS
    world.server.open(world.link("server"))
    assert world.events.count("opened") == 2


def test_start_and_pause_are_refused_where_the_contract_forbids_them(world: World) -> None:
    assert ddi.VmbChannelStart(world.server) == Status.INVALID_DEVICE_STATE
    inside = []

    def opened(channel) -> int:
        inside.extend([ddi.VmbChannelStart(channel), ddi.VmbChannelPause(channel), ddi.VmbChannelDisable(channel)])
        return Status.SUCCESS

    callbacks = initialized()
    callbacks.EvtChannelOpened = opened
    assert ddi.VmbChannelInitSetStateChangeCallbacks(world.server, callbacks) == Status.SUCCESS
    world.open()
    assert inside == [Status.INVALID_DEVICE_STATE] * 3
    assert ddi.VmbChannelEnable(world.server) == Status.INVALID_DEVICE_STATE
    assert ddi.VmbChannelCleanup(world.server) == Status.INVALID_DEVICE_STATE


def test_pause_waits_for_what_is_held_and_gives_up_in_time(world: World) -> None:
    world.open()
    world.request()
    world.run()
    assert ddi.VmbChannelPause(world.server) == Status.CANCELLED
    assert world.server.state is ChannelState.OPENED
    # Somebody completes while it waits: then it ends well.
    world.server.waiter = lambda condition, timeout, what: ddi.VmbChannelPacketComplete(world.incoming[0][0])
    assert ddi.VmbChannelPause(world.server) == Status.SUCCESS


def test_interrupt_latency_is_for_an_open_client(world: World) -> None:
    assert ddi.VmbChannelSetInterruptLatency(world.client, 10) == (Status.INVALID_DEVICE_STATE, 0)
    world.open()
    assert ddi.VmbChannelSetInterruptLatency(world.client, 10) == (Status.SUCCESS, 0)
    assert ddi.VmbChannelSetInterruptLatency(world.client, 20) == (Status.SUCCESS, 10)
    assert ddi.VmbChannelSetInterruptLatency(world.client, -1) == (Status.INVALID_PARAMETER_2, 0)
    world.client.close(lambda: None)
    assert ddi.VmbChannelSetInterruptLatency(world.client, 20) == (Status.INVALID_DEVICE_STATE, 0)


def test_there_is_no_mmio_space_and_an_open_client_is_told_so(world: World) -> None:
    assert ddi.VmbServerChannelInitSetMmioMegabytes(world.server, 8) == Status.SUCCESS
    assert ddi.VmbChannelGetMmioSpace(world.client) == (Status.INVALID_DEVICE_STATE, 0, 0)
    world.open()
    assert ddi.VmbChannelGetMmioSpace(world.client) == (Status.INSUFFICIENT_RESOURCES, 0, 0)
    world.client.close(lambda: None)
    assert ddi.VmbChannelGetMmioSpace(world.client) == (Status.INVALID_DEVICE_STATE, 0, 0)


# ---- sending ---------------------------------------------------------------------------------------------------------


def test_statuses_of_send(world: World) -> None:
    ddi.VmbChannelInitSetMaximumPacketSize(world.server, 64)
    assert world.send() == Status.INVALID_DEVICE_STATE
    world.open()
    packet = ddi.VmbPacketAllocate(world.server)
    assert ddi.VmbPacketSend(packet, bytes(65), None, WAIT) == Status.INVALID_PARAMETER
    assert ddi.VmbPacketSend(packet, b"x", None, 0x8) == Status.INVALID_PARAMETER
    # External data needs WAIT_FOR_COMPLETION, however it is described.
    mdl, own = [(world.spare, 8)], ddi.VmbPacketAllocate(world.client)
    assert ddi.VmbPacketSend(own, b"x", mdl, 0) == Status.INVALID_PARAMETER
    assert ddi.VmbPacketSendWithExternalMdl(own, b"x", mdl, 0, 0, 0) == Status.INVALID_PARAMETER
    assert ddi.VmbPacketSendWithExternalPfns(own, b"x", [world.spare >> 12], 1, 0) == Status.INVALID_PARAMETER
    assert ddi.VmbPacketSend(packet, b"x", mdl, WAIT) == Status.INVALID_DEVICE_REQUEST
    paged = WAIT | ddi.VMBUS_CHANNEL_FORMAT_FLAG_PAGED_BUFFER
    assert ddi.VmbPacketSend(packet, memoryview(bytearray(b"x")), None, paged) == Status.SUCCESS
    assert ddi.VmbPacketSend(packet, b"x", None, WAIT) == Status.INVALID_DEVICE_REQUEST
    with pytest.raises(ChannelStateError, match="packet 1 of channel server is sent"):
        ddi.VmbPacketFree(packet)
    world.server.close(lambda: None)
    assert packet.state.value == "freed", "the default completion routine frees"
    assert ddi.VmbPacketSend(packet, b"x", None, WAIT) == Status.INVALID_DEVICE_REQUEST


def test_caller_owned_packets(world: World) -> None:
    needed = ddi.VmbChannelSizeofPacket(world.server)
    assert needed > world.server.maximum_packet_size
    assert ddi.VmbPacketInitialize(world.server, needed - 1) == (Status.INVALID_PARAMETER_3, None)
    status, packet = ddi.VmbPacketInitialize(world.server, needed)
    assert status == Status.SUCCESS
    world.open()
    assert ddi.VmbPacketSend(packet, b"12345678", None, WAIT) == Status.INVALID_DEVICE_REQUEST
    ddi.VmbPacketSetPointer(packet, 0)
    ddi.VmbPacketSetCompletionRoutine(packet, world.completed)
    for _ in range(2):
        assert ddi.VmbPacketSend(packet, NUMBER.pack(0), None, WAIT) == Status.SUCCESS
        world.run()
        world.answer()
        world.run()
    assert world.answers == [answered(0)] * 2
    ddi.VmbPacketFree(packet)


# A chain with a gap and an odd start.
def chain(world: World) -> list[tuple[int, int]]:
    return [(world.spare + 100, 300), (world.spare + 5000, 200), (world.spare + PAGE * 2, 500)]


@given(offset=st.integers(-5, 1010), length=st.integers(-5, 1010))
def test_any_part_of_an_mdl_chain_can_be_sent(offset: int, length: int) -> None:
    world = World()
    world.memory[:] = bytes(index * 7 & 0xFF for index in range(4 * PAGE))
    world.open()
    mdl = chain(world)
    whole = b"".join(bytes(world.memory[address - SPARE : address - SPARE + size]) for address, size in mdl)
    packet = ddi.VmbPacketAllocate(world.client)
    status = ddi.VmbPacketSendWithExternalMdl(packet, b"request!", mdl, offset, length, WAIT)
    if offset < 0 or length < 0 or offset >= 1000 or offset + length > 1000:
        assert status == Status.INVALID_PARAMETER
        return
    assert status == Status.SUCCESS
    world.run()
    completion, buffer, flags = world.incoming[0]
    assert buffer[:8] == b"request!"
    assert flags == ddi.VMBUS_CHANNEL_PROCESS_PACKET_FLAG_EXTERNAL_DATA
    status, memory = ddi.VmbChannelPacketGetExternalData(completion, 0)
    assert status == Status.SUCCESS
    assert b"".join(bytes(view) for view in memory.views) == whole[offset : offset + length if length else None]


def test_a_forced_length_goes_to_the_end_of_the_page_and_uses_the_first_mdl_only(world: World) -> None:
    world.open()
    packet = ddi.VmbPacketAllocate(world.client)
    send = ddi.VmbPacketSendWithExternalMdl
    to_the_end = PAGE - 100
    assert send(packet, b"x", chain(world), 0, to_the_end + 1, WAIT | FORCE) == Status.INVALID_PARAMETER
    assert send(packet, b"x", chain(world), 60, to_the_end - 59, WAIT | FORCE) == Status.INVALID_PARAMETER
    assert send(packet, b"x", chain(world), 0, 0, WAIT | FORCE) == Status.INVALID_PARAMETER
    assert send(packet, b"x", [], 0, 0, WAIT) == Status.INVALID_PARAMETER
    assert send(packet, b"x", chain(world), 0, 0, WAIT | 0x10) == Status.INVALID_PARAMETER
    assert send(packet, b"x", chain(world), 60, to_the_end - 60, WAIT | FORCE) == Status.SUCCESS
    world.run()
    _, memory = ddi.VmbChannelPacketGetExternalData(world.incoming[0][0])
    assert memory.size == to_the_end - 60


def test_external_pages_by_number(world: World) -> None:
    world.open()
    packet = ddi.VmbPacketAllocate(world.client)
    send = ddi.VmbPacketSendWithExternalPfns
    pages = [world.spare // PAGE + 2, world.spare // PAGE, world.spare // PAGE + 1]
    assert send(packet, b"x", pages, 4, WAIT) == Status.INVALID_PARAMETER
    assert send(packet, b"x", pages, 0, WAIT) == Status.INVALID_PARAMETER
    assert send(packet, b"x", pages, 2, WAIT) == Status.SUCCESS
    world.memory[2 * PAGE] = 0x22
    world.memory[0] = 0x11
    world.run()
    _, memory = ddi.VmbChannelPacketGetExternalData(world.incoming[0][0], 0)
    data = b"".join(bytes(view) for view in memory.views)
    assert (len(data), data[0], data[PAGE]) == (2 * PAGE, 0x22, 0x11)
    server_packet = ddi.VmbPacketAllocate(world.server)
    assert send(server_packet, b"x", pages, 2, WAIT) == Status.INVALID_DEVICE_REQUEST


# ---- synchronous requests --------------------------------------------------------------------------------------------


class Answering(World):
    """A VSP that answers at once, unless it is told to be silent."""

    silent = False

    def process(self, channel, completion, buffer: bytes, length: int, flags: int) -> None:
        super().process(channel, completion, buffer, length, flags)
        if not self.silent:
            ddi.VmbChannelPacketComplete(completion, buffer[:8] + b"answered")


def test_statuses_of_a_synchronous_request() -> None:
    world = Answering()
    send = ddi.VmbChannelSendSynchronousRequest
    assert send(world.client, b"question", None, WAIT, bytearray(16)) == (Status.DEVICE_REMOVED, 0)
    world.open()
    room = bytearray(24)
    assert send(world.client, b"question", None, WAIT, room) == (Status.SUCCESS, 16)
    assert bytes(room) == b"questionanswered" + bytes(8)
    assert send(world.client, b"question", None, WAIT, memoryview(room)[:16], -15_000_000) == (Status.SUCCESS, 16)
    assert world.waits[-1][0] == 1.5, "100 ns units, negative: relative"
    assert send(world.client, b"question", None, WAIT, bytearray(17)) == (Status.INVALID_PARAMETER, 0)
    assert send(world.client, b"question", None, WAIT, bytearray(8)) == (Status.BUFFER_TOO_SMALL, 16)
    assert send(world.client, b"question", None, WAIT, room, 1) == (Status.INVALID_PARAMETER, 0)
    assert send(world.client, b"question", None, 0x8, room) == (Status.INVALID_PARAMETER, 0)
    world.silent = True
    assert send(world.client, b"question", None, WAIT, room, -1) == (Status.CANCELLED, 0)


# ---- receiving -------------------------------------------------------------------------------------------------------


def test_packets_come_with_their_length_and_batches_end(world: World) -> None:
    assert ddi.VmbChannelInitSetClientContextSize(world.server, 24) == Status.SUCCESS
    world.open()
    for _ in range(3):
        world.request()
    world.run()
    assert [(buffer[:8], flags) for _, buffer, flags in world.incoming] == [(b"request!", 0)] * 3
    assert sum(world.batches) == 3
    contexts = [completion.context for completion, _, _ in world.incoming]
    contexts[0][:3] = b"abc"
    assert [len(context) for context in contexts] == [24] * 3
    assert bytes(contexts[1]) == bytes(24)


def test_a_malformed_packet_stops_the_channel(world: World) -> None:
    world.open()
    world.request()
    world.run()
    ddi.VmbChannelPacketFail(world.incoming[0][0])
    assert "VmbChannelPacketFail" in world.server_link.failures[0]
    assert not world.server.active


def test_a_deferred_packet_comes_again_once(world: World) -> None:
    statuses = []

    def process(channel, completion, buffer, length, flags) -> None:
        statuses.append(ddi.VmbChannelPacketDeferToPassive(completion))
        if len(statuses) == 2:
            ddi.VmbChannelPacketComplete(completion, b"later")

    assert ddi.VmbChannelInitSetProcessPacketCallbacks(world.server, process) == Status.SUCCESS
    world.open()
    outcome = world.request()
    world.run()
    assert statuses == [Status.SUCCESS, Status.INVALID_DEVICE_REQUEST]
    assert outcome[0][1].rstrip(b"\0") == b"later"


def test_processing_at_passive(world: World) -> None:
    assert ddi.VmbChannelSetIncomingProcessingAtPassive(world.server, True) == Status.SUCCESS
    world.open()
    for _ in range(3):
        world.request()
    world.run()
    assert len(world.incoming) == 3
    assert world.batches == [1, 1, 1]
    assert ddi.VmbChannelSetIncomingProcessingAtPassive(world.server, False) == Status.SUCCESS


def test_statuses_of_external_data(world: World) -> None:
    world.open()
    world.request()
    world.request(external_data_mdl=[(0x9999000, 16)])
    world.request(external_data_mdl=[(world.spare, 16)])
    world.run()
    plain, foreign, good = (completion for completion, _, _ in world.incoming)
    get = ddi.VmbChannelPacketGetExternalData
    assert get(plain, 0) == (Status.INVALID_DEVICE_REQUEST, None)
    assert get(foreign, 0) == (Status.DATA_ERROR, None)
    assert get(good, 0x2) == (Status.INVALID_PARAMETER_2, None)
    status, memory = get(good, ddi.VMBUS_CHANNEL_PACKET_EXTERNAL_DATA_FLAG_READ_ONLY)
    assert status == Status.SUCCESS and memory.views[0].readonly
    ddi.VmbChannelPacketComplete(good)
    assert get(world.incoming[0][0], 1)[0] == Status.INVALID_DEVICE_REQUEST


# ---- GPADLs ----------------------------------------------------------------------------------------------------------


class GuestBuffer:
    def __init__(self, iova: int, size: int) -> None:
        self.iova = iova
        self.size = size


def test_statuses_of_gpadls(world: World) -> None:
    buffer = GuestBuffer(world.spare, PAGE)
    create, from_mdl = ddi.VmbChannelCreateGpadlFromBuffer, ddi.VmbChannelCreateGpadlFromMdl
    assert create(world.client, 0, buffer, 100) == (Status.INVALID_DEVICE_STATE, 0)
    assert ddi.VmbChannelDeleteGpadl(world.client, 1) == Status.INVALID_DEVICE_STATE
    assert ddi.VmbChannelMapGpadl(world.server, 0, 1) == (Status.INVALID_DEVICE_STATE, None)
    assert ddi.VmbChannelUnmapGpadl(world.server, 1) == Status.INVALID_DEVICE_STATE
    world.open()
    assert create(world.client, 2, buffer, 100) == (Status.INVALID_PARAMETER_2, 0)
    assert from_mdl(world.client, 2, chain(world), 0, 100) == (Status.INVALID_PARAMETER_2, 0)
    assert ddi.VmbChannelMapGpadl(world.server, 2, 1) == (Status.INVALID_PARAMETER_2, None)
    for length in (0, PAGE + 1):
        assert create(world.client, 0, buffer, length) == (Status.INVALID_PARAMETER, 0)
        assert from_mdl(world.client, 0, [(world.spare, PAGE)], 0, length) == (Status.INVALID_PARAMETER, 0)
    big = GuestBuffer(world.spare, 2 << 20)
    assert create(world.client, 0, big, big.size) == (Status.INSUFFICIENT_RESOURCES, 0)
    assert not world.gpadls


# ---- over a bus ------------------------------------------------------------------------------------------------------


class LocalHost:
    """A VMBus handle for servers over a local bus."""

    def __init__(self) -> None:
        self.bus = LocalBus()

    def add_channel(self, channel) -> None:
        self.bus.offer(channel)


def over_a_bus(opened=lambda _: Status.SUCCESS, pnp_failure=None, process=some_process):
    """Both endpoints on a local bus, enabled in the order that a VM has: the offer first."""
    host = LocalHost()
    server = allocate(True)
    callbacks = initialized()
    callbacks.EvtChannelOpened = opened
    _, client = ddi.VmbChannelAllocate(host.bus, False)
    for status in (
        ddi.VmbChannelInitSetStateChangeCallbacks(server, callbacks),
        ddi.VmbServerChannelInitSetTargetInterfaceId(server, TYPE, INSTANCE),
        ddi.VmbServerChannelInitSetVmbusHandle(server, host),
        ddi.VmbChannelInitSetProcessPacketCallbacks(server, process),
        ddi.VmbClientChannelInitSetTargetPnp(client, TYPE, INSTANCE, pnp_failure),
        ddi.VmbChannelEnable(client),
        ddi.VmbChannelEnable(server),
        ddi.VmbChannelStart(server),
    ):
        assert status == Status.SUCCESS
    assert not client.active, "enabling returns at once, opening comes later"
    host.bus.run()
    return host.bus, server, client


def test_both_endpoints_over_a_bus_to_the_end() -> None:
    def process(channel, completion, buffer, length, flags) -> None:
        ddi.VmbChannelPacketComplete(completion, buffer[::-1])

    _, server, client = over_a_bus(process=process)
    room = bytearray(8)
    assert ddi.VmbChannelSendSynchronousRequest(client, b"question", None, WAIT, room) == (Status.SUCCESS, 8)
    assert bytes(room) == b"noitseuq"
    assert ddi.VmbChannelDisable(client) == Status.SUCCESS
    assert server.state is ChannelState.CLOSED
    assert ddi.VmbChannelDisable(server) == Status.SUCCESS
    for channel in (server, client):
        assert ddi.VmbChannelCleanup(channel) == Status.SUCCESS


def test_a_server_that_refuses_is_a_pnp_failure_of_the_client() -> None:
    seen = []
    _, server, client = over_a_bus(
        opened=lambda _: Status.INSUFFICIENT_RESOURCES, pnp_failure=lambda channel, status: seen.append(status)
    )
    assert seen == [Status.INSUFFICIENT_RESOURCES]
    assert server.state is ChannelState.CLOSED
    assert not client.active


def test_gpadls_over_a_bus() -> None:
    bus, server, client = over_a_bus()
    buffer = bus.allocate(2 * PAGE)
    status, handle = ddi.VmbChannelCreateGpadlFromBuffer(client, 0, buffer, 2 * PAGE)
    assert status == Status.SUCCESS
    status, memory = ddi.VmbChannelMapGpadl(server, 0, handle)
    assert status == Status.SUCCESS
    memory.views[0][:5] = b"hello"
    assert bytes(buffer.view[:5]) == b"hello"
    assert ddi.VmbChannelMapGpadl(server, 0, handle) == (Status.INVALID_PARAMETER, None)
    assert ddi.VmbChannelDeleteGpadl(client, handle) == Status.CANCELLED, "it is mapped"
    assert ddi.VmbChannelUnmapGpadl(server, handle) == Status.SUCCESS
    assert ddi.VmbChannelDeleteGpadl(client, 0x7777) == Status.INVALID_PARAMETER
    status, handle = ddi.VmbChannelCreateGpadlFromMdl(client, 1, [(buffer.iova + 100, 200)], 50, 100)
    status, memory = ddi.VmbChannelMapGpadl(server, 1, handle)
    assert (status, memory.size, memory.views[0].readonly) == (Status.SUCCESS, 100, True)
    assert ddi.VmbChannelUnmapGpadl(server, handle) == Status.SUCCESS
    assert ddi.VmbChannelDeleteGpadl(client, handle) == Status.SUCCESS


# ---- the endpoints ---------------------------------------------------------------------------------------------------


def test_calls_of_the_other_endpoint_are_refused(world: World) -> None:
    world.open()
    server, client = world.server, world.client
    refused = Status.INVALID_PARAMETER_1
    assert ddi.VmbChannelSaveBegin(client) == refused
    assert ddi.VmbChannelSaveContinue(client, bytearray(8)) == (refused, 0, 0)
    assert ddi.VmbChannelSaveEnd(client) == refused
    assert ddi.VmbChannelRestoreFromBuffer(client, b"") == refused
    assert ddi.VmbPacketRestore(ddi.VmbPacketAllocate(client), b"") == refused
    assert ddi.VmbChannelMapGpadl(client, 0, 1) == (refused, None)
    assert ddi.VmbChannelUnmapGpadl(client, 1) == refused
    assert ddi.VmbChannelCreateGpadlFromBuffer(server, 0, GuestBuffer(0, PAGE), 8) == (refused, 0)
    assert ddi.VmbChannelCreateGpadlFromMdl(server, 0, [(0, 8)], 0, 8) == (refused, 0)
    assert ddi.VmbChannelDeleteGpadl(server, 1) == refused
    assert ddi.VmbChannelSetInterruptLatency(server, 1) == (refused, 0)
    assert ddi.VmbChannelGetMmioSpace(server) == (refused, 0, 0)


# ---- save and restore ------------------------------------------------------------------------------------------------


def fill(world: World, count: int = 400) -> None:
    """Packets in every state: completed, taken and held by the guest, in the ring, queued. Paused."""
    world.open()
    world.send(count)
    world.turn("client")
    world.answer(5)
    world.turn("server")
    world.server.quiesce()
    assert world.server.packets_queued and world.server.packets_sent


def save_with(channel, size: int) -> list[bytes]:
    """A whole save with buffers of one size."""
    assert ddi.VmbChannelSaveBegin(channel) == Status.SUCCESS
    pieces, required = [], 0
    while True:
        buffer = bytearray(b"\xee" * size)
        status, filled, next_required = ddi.VmbChannelSaveContinue(channel, buffer)
        assert buffer[filled:] == b"\xee" * (size - filled), "written beyond what was said"
        assert filled >= required
        pieces.append(bytes(buffer[:filled]))
        if status == Status.SUCCESS:
            assert next_required == 0
            break
        assert status == Status.BUFFER_OVERFLOW and filled
        required = next_required
    assert ddi.VmbChannelSaveEnd(channel) == Status.SUCCESS
    return pieces


def replace(world: World, pieces: list[bytes], **callbacks) -> Status:
    """A fresh VSP in the place of the old one, restored piece by piece; the last status."""
    world.ready.discard("server")
    world.server = world.make_server(**callbacks)
    assert ddi.VmbChannelEnable(world.server) == Status.SUCCESS
    world.server_link = world.link("server")
    world.server.reopen(world.server_link)
    for number, piece in enumerate(pieces):
        status = ddi.VmbChannelRestoreFromBuffer(world.server, piece)
        if number < len(pieces) - 1 and status != Status.MORE_PROCESSING_REQUIRED:
            return status
    if status == Status.SUCCESS:
        assert ddi.VmbChannelStart(world.server) == Status.SUCCESS
        world.ready |= {"server", "client"}
    return status


def play_to_the_end(world: World, count: int) -> None:
    for _ in range(1000):
        if len(world.answers) == count:
            break
        world.run()
        world.answer()
    assert world.answers == [answered(number) for number in range(count)]


def test_the_save_callback_is_called_twice_with_a_size_of_zero_first(world: World) -> None:
    fill(world)
    pieces = save_with(world.server, 1 << 20)
    assert len(pieces) == 1
    expected = []
    for number in range(5, 400):
        # Those whose number divides by 3 have nothing to save and say so at once.
        expected += [(number, 0)] if number % 3 == 0 else [(number, 0), (number, 8)]
    assert world.saves == expected
    libs = [decode_chunk(chunk) for chunk in split_frames(pieces[0])[1:]]
    assert [len(chunk.save) for chunk in libs] == [0 if number % 3 == 0 else 8 for number in range(5, 400)]
    assert [decode_lib(chunk.lib).transaction for chunk in libs] == list(range(6, 401))


def test_saved_with_small_buffers_and_restored_from_them_exactly_once(world: World) -> None:
    fill(world)
    before = world.server.packets_queued + world.server.packets_sent
    pieces = save_with(world.server, 128)
    assert replace(world, [b"".join(pieces)[:-1]]) == Status.DATA_ERROR
    assert replace(world, pieces[::-1]) == Status.DATA_ERROR, "the channel's own chunk comes first"
    assert replace(world, pieces) == Status.SUCCESS
    assert world.server.packets_queued + world.server.packets_sent == before
    world.send(1)
    play_to_the_end(world, 401)


def test_a_buffer_too_small_for_one_chunk_makes_no_progress(world: World) -> None:
    fill(world)
    (whole,) = save_with(world.server, 1 << 20)
    first, second = (4 + len(chunk) for chunk in split_frames(whole)[:2])
    assert ddi.VmbChannelSaveBegin(world.server) == Status.SUCCESS
    for size in (0, 1, first - 1):
        assert ddi.VmbChannelSaveContinue(world.server, bytearray(size)) == (Status.BUFFER_TOO_SMALL, 0, first)
    buffer = bytearray(first)
    assert ddi.VmbChannelSaveContinue(world.server, buffer) == (Status.BUFFER_OVERFLOW, first, second)
    assert ddi.VmbChannelSaveContinue(world.server, bytearray(second - 1)) == (Status.BUFFER_TOO_SMALL, 0, second)
    rest = bytearray(len(whole))
    status, filled, required = ddi.VmbChannelSaveContinue(world.server, memoryview(rest))
    assert (status, filled, required) == (Status.SUCCESS, len(whole) - first, 0)
    assert bytes(buffer + rest[:filled]) == whole
    assert ddi.VmbChannelSaveContinue(world.server, bytearray(8)) == (Status.SUCCESS, 0, 0)
    assert ddi.VmbChannelSaveEnd(world.server) == Status.SUCCESS


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([(Status.INSUFFICIENT_RESOURCES, 0)], Status.INSUFFICIENT_RESOURCES),
        ([(Status.BUFFER_TOO_SMALL, 8), (Status.DATA_ERROR, 8)], Status.DATA_ERROR),
        ([(0xC0FFEE00, 0)], Status.UNSUCCESSFUL),
    ],
)
def test_a_failing_save_callback_fails_the_save(results: list[tuple[int, int]], expected: Status) -> None:
    world = World()
    replies = iter(results)
    world.server = world.make_server(save=lambda *_: next(replies))
    fill(world)
    assert ddi.VmbChannelSaveBegin(world.server) == expected
    world.server.unquiesce()
    play_to_the_end(world, 400)


def test_a_failing_restore_callback_fails_the_restore_with_its_status(world: World) -> None:
    fill(world)
    pieces = save_with(world.server, 1 << 20)
    calls = []

    def restore(*arguments) -> int:
        calls.append(arguments)
        return Status.INSUFFICIENT_RESOURCES if len(calls) > 7 else World.restore(world, *arguments)

    assert replace(world, pieces, restore=restore) == Status.INSUFFICIENT_RESOURCES
    assert world.server.packets_queued == world.server.packets_sent == 0


def test_a_restore_callback_that_restores_nothing_or_the_wrong_packet(world: World) -> None:
    fill(world)
    pieces = save_with(world.server, 1 << 20)
    assert replace(world, pieces, restore=lambda *_: Status.SUCCESS) == Status.UNSUCCESSFUL

    seen = []

    def misuse(channel, lib_buf, *_) -> int:
        used = ddi.VmbPacketAllocate(channel)
        seen.append(ddi.VmbPacketRestore(used, b"not a packet"))
        seen.append(ddi.VmbPacketRestore(ddi.VmbPacketAllocate(world.client), lib_buf))
        seen.append(ddi.VmbPacketRestore(used, lib_buf))
        seen.append(ddi.VmbPacketRestore(used, lib_buf))
        seen.append(ddi.VmbPacketRestore(ddi.VmbPacketAllocate(channel), lib_buf))
        return seen[-1]

    assert replace(world, pieces, restore=misuse) == Status.DATA_ERROR
    in_use, foreign = Status.INVALID_PARAMETER_1, Status.INVALID_PARAMETER_1
    assert seen == [Status.DATA_ERROR, foreign, Status.SUCCESS, in_use, Status.DATA_ERROR]


def test_a_packet_is_restored_only_inside_the_callback(world: World) -> None:
    world.open()
    packet = ddi.VmbPacketAllocate(world.server)
    assert ddi.VmbPacketRestore(packet, b"") == Status.INVALID_DEVICE_REQUEST


# ---- the sample provider ---------------------------------------------------------------------------------------------


def test_the_sample_provider_uses_the_ddi_alone() -> None:
    import vmbus.providers.ddi_sample as sample

    text = inspect.getsource(sample)
    used = set(re.findall(r"self\.channel\.(\w+)|packet\.(\w+)\(|completion\.(\w+)", text))
    assert not used, f"Pythonic calls in it: {used}"
    assert {"ServerChannel", "ClientChannel"}.isdisjoint(vars(sample))


def test_the_sample_provider_refuses_a_second_run_and_foreign_state() -> None:
    machine = Machine(("echo", "ddi-burst"))
    with pytest.raises(StateError, match="ddi-burst"):
        machine.providers[1].restore(b"nonsense")
    traffic = Traffic(connect(machine))
    traffic.start(1, 50)
    outcome: list[bytes] = []
    packet = traffic.burst.channel.allocate_packet()
    packet.completion_routine = lambda _, status, reply: outcome.append(reply)
    packet.send(b"no request")
    traffic.finish()
    assert outcome[0][:4] == b"\2\0\0\0"
