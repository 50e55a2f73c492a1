"""Hostile guests of the devices that people use: bad GPADLs for their buffers, and a guest that goes on with nonsense
while the device is saved. Each harms its own channel at most, and no save."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import pytest

from support import storvsc
from support.namespace import Namespace, NotPermitted, namespace
from support.network_guest import UP, Ends, NetworkGuest
from support.pace import until
from support.storage import Controller
from vmbus.bus.server import REFUSED
from vmbus.device import saved
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.pipe import frame, unframe
from vmbus.kmcl.settings import FLAG_IS_PIPE
from vmbus.providers.network import oids
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.testkit.loopback.pair import DriverSide
from vmbus.transport.library import Library
from vmbus.wire import ic, nvsp, rndis, scsi
from vmbus.wire.gpa import range_for
from vmbus.wire.storvsp import STORVSP_TYPE, Operation, pack_request
from vmbus_guest.driver import VmbusDriver

PAGE = 4096
MIB = 1 << 20
SIZE = 2 * MIB
NOWHERE = 0x7_0000_0000
READ_ONLY = 0x9_0000_0000
KEPT = b"what nonsense must not change..." * 128
"""The disk's first page."""


class Kind(NamedTuple):
    """One of the devices: the channel's type, and pages of each of its rings."""

    interface_type: UUID
    ring_pages: int


KINDS = {
    "network_survives": Kind(nvsp.NVSP_TYPE, 32),
    "scsi_survives": Kind(STORVSP_TYPE, 4),
    "integration_service": Kind(ic.HEARTBEAT.interface_type, 4),
}


@pytest.fixture
def outside() -> Iterator[Namespace]:
    try:
        with namespace() as found:
            yield found
            assert found.interfaces() == [], "an interface outlives its device"
    except NotPermitted as error:
        pytest.skip(str(error))


class Device:
    """How the device is described: all three kinds on one."""

    def __init__(self, outside: Namespace, disks: Path, library: Library) -> None:
        self.library = library
        self.image = disks / "disk.img"
        self.description = describe(
            "network",
            "scsi",
            "integration",
            network={"interface": "host0", "namespace": outside.name, "queues": 2, "address": "192.0.2.1/24"},
            scsi={"luns": [{"image": self.image.name, "size_mib": SIZE // MIB, "create": True}]},
            integration={"heartbeat_seconds": 0.02, "services": ["heartbeat", "kvp"]},
        )

    def serve(self, **more: Any) -> LoopbackServer:
        return LoopbackServer(self.description, self.library, **more)


@pytest.fixture
def device(outside: Namespace, libvfio_user: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setenv("VMBUS_DISKS", str(tmp_path / "disks"))
    return Device(outside, tmp_path / "disks", libvfio_user)


def settle(driver: VmbusDriver) -> None:
    """Let the server handle all that was said, and hear the answers."""
    driver.function.barrier()
    while driver.step(0.0):
        driver.function.barrier()


def serves(driver: VmbusDriver, name: str) -> None:
    """A fresh channel of this kind does its work."""
    if name == "scsi_survives":
        controller = Controller(driver, memory=PAGE)
        intact = controller.read(0, PAGE) == KEPT
        assert intact, "the disk holds other bytes than were written"
        assert controller.write(MIB // 512, bytes(PAGE)).good
        give_back(controller)
        return
    if name == "network_survives":
        guest = NetworkGuest(Ends(DriverSide(driver)))
        assert guest.send(b"\xff" * 6 + bytes(54)) == nvsp.Status.SUCCESS
        guest.shut_down()
        return
    beats: list[ic.Message] = []

    def take(channel: Channel, completion: Completion, payload: bytes) -> None:
        beats.append(ic.parse(unframe(payload)))
        completion.complete()

    kind = KINDS[name]
    channel = driver.client_channel(
        kind.interface_type, ring_pages_in=kind.ring_pages, ring_pages_out=kind.ring_pages, name=name
    )
    channel.set_flags(FLAG_IS_PIPE)
    channel.set_process_packet_callbacks(take)
    driver.enable(channel)
    driver.run_until(lambda: bool(beats), 10, "the host to negotiate versions")
    driver.close_channel(channel)


def write_kept(driver: VmbusDriver) -> None:
    controller = Controller(driver, memory=PAGE)
    assert controller.write(0, KEPT).good
    give_back(controller)


def give_back(controller: Controller) -> None:
    controller.bus.close_channel(controller.ports[0].channel)
    controller.bus.free(controller.memory.memory.pages.buffer)


# ---- buffers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_bad_gpadls_for_its_buffers(device: Device, name: str) -> None:
    with device.serve() as server:
        driver = VmbusDriver(server.function())
        write_kept(driver)
        offers = driver.bus.offers
        relid = next(one.relid for one in offers.values() if one.interface_type == KINDS[name].interface_type)
        other = next(one.relid for one in offers.values() if one.relid != relid)
        pages = 2 * (KINDS[name].ring_pages + 1)
        half = pages // 2
        good = driver.allocate(pages * PAGE)
        driver.function.map(READ_ONLY, pages * PAGE, good.file_pages[0] * PAGE, writable=False)

        def opened(gpadl: int, split: int) -> bool:
            settle(driver)
            if driver.bus.created.get(gpadl, 0) == REFUSED:
                return False
            driver.bus.open_channel(relid, gpadl, split)
            settle(driver)
            return driver.bus.open_results[relid] == 0

        whole = range_for(good.iova, good.size)
        for ranges, split, what in (
            ([range_for(NOWHERE, good.size)], half, "memory that is not there"),
            ([range_for(good.iova, 4 * PAGE), range_for(NOWHERE, good.size - 4 * PAGE)], half, "partly not there"),
            ([range_for(READ_ONLY, good.size)], half, "memory that may not be written to"),
            ([range_for(good.iova + 8, good.size - 16)], half, "not whole pages"),
            ([range_for(good.iova, PAGE)], 1, "no room for two rings"),
            ([whole], 0, "no room for the ring to the host"),
            ([whole], pages, "no room for the ring to the guest"),
            ([whole], 0xFFFF_FFFF, "a ring beyond all memory"),
        ):
            assert not opened(driver.bus.create_gpadl(relid, ranges), split), what
        foreign = driver.bus.create_gpadl(other, [whole])
        assert not opened(foreign, half), "lent to another channel"
        assert not opened(0xABCDE, half), "a GPADL that was never made"
        # The good one opens it. Taken back under the open channel it costs the channel, which is offered anew.
        ours = driver.bus.create_gpadl(relid, [whole])
        assert opened(ours, half)
        withdrawn = len(driver.rescinded)
        driver.bus.teardown_gpadl(relid, ours)
        driver.run_until(lambda: ours in driver.bus.torndown, 10, "its memory to be given back")
        driver.run_until(lambda: len(driver.rescinded) > withdrawn, 10, "the rescind")
        assert len(driver.rescinded) == withdrawn + 1
        for one in KINDS:
            serves(driver, one)
        driver.close(graceful=False)


# ---- while a save is in progress -------------------------------------------------------------------------------------


class Hostile:
    """A guest that asks for nonsense on all channels, without end, on a thread of its own, whose the channels are.

    What would change the disk's first half is left out; of the rest nothing is sacred. Attributes: said: messages so
    far. trouble: what ended the thread.
    """

    def __init__(self, driver: VmbusDriver, seed: int) -> None:
        self.driver = driver
        self.choose = random.Random(seed)
        self.said = 0
        self.reopened = 0
        self.trouble: list[BaseException] = []
        self.memory = driver.allocate(64 * PAGE)
        self._end = threading.Event()
        self._held: list[Completion] = []
        self._lent: dict[ClientChannel, int] = {}
        self._channels: dict[str, ClientChannel] = {}
        self._thread = ThreadPoolExecutor(1, "guest")
        self._running: Future[None]
        self.call(self._open)
        self.go_on()

    def call(self, call: Callable[[], None]) -> None:
        """On its thread, while that does nothing else."""
        self._thread.submit(call).result(20)

    def _open(self) -> None:
        driver = self.driver
        for name, kind in KINDS.items():
            channel = driver.client_channel(
                kind.interface_type, ring_pages_in=kind.ring_pages, ring_pages_out=kind.ring_pages, name=name
            )
            if name == "integration_service":
                channel.set_flags(FLAG_IS_PIPE)
            channel.set_process_packet_callbacks(self._take)
            driver.enable(channel)
            self._channels[name] = channel
        driver.on_rescind = lambda channel: channel.enable()

    def go_on(self) -> None:
        """After `halt`."""
        self._end.clear()
        self._running = self._thread.submit(self._run)

    def halt(self) -> None:
        """Leave everything as it is at this moment."""
        self._end.set()
        self._running.result(20)
        assert not self.trouble, self.trouble

    def close(self) -> None:
        """The guest ends."""
        self.call(lambda: self.driver.close(graceful=False))
        self._thread.shutdown()

    def _take(self, channel: Channel, completion: Completion, payload: bytes) -> None:
        if self.choose.random() < 0.5 or len(self._held) > 50:
            completion.complete(self.choose.randbytes(self.choose.choice([0, 8, 2000])))
        else:
            self._held.append(completion)

    def _run(self) -> None:
        try:
            while not self._end.is_set():
                for name, channel in self._channels.items():
                    if channel.state is not ChannelState.ACTIVE:
                        continue
                    if channel.packets_sent < 50:
                        self.said += 1
                        getattr(self, name)(channel)
                if self.choose.random() < 0.01 and self._held:
                    self._held.clear()  # never answered
                self.driver.step(0.001)
        except BaseException as error:
            self.trouble.append(error)

    def _send(self, channel: ClientChannel, message: bytes, **more: Any) -> None:
        packet = channel.allocate_packet()
        packet.completion_routine = lambda packet, *_: packet.free()
        packet.send(message, **more)

    def network_survives(self, channel: ClientChannel) -> None:
        choose = self.choose
        if channel not in self._lent:
            self._lent[channel] = channel.create_gpadl([(self.memory.iova, self.memory.size)])
        gpadl = choose.choice([self._lent[channel], self._lent[channel], 0, 0xFFFF_FFFF])
        control = rndis.set_oid(choose.randrange(100), oids.PACKET_FILTER, choose.choice([UP, 0]).to_bytes(4, "little"))
        data = choose.choice(
            (
                rndis.initialize(1),
                rndis.query(2, choose.choice([*oids._QUERIES, 0xFFFF_FFFF])),
                control,
                rndis.halt(3),
                (rndis.packet_header(60) + b"\xff" * 6 + bytes(58)) * choose.randint(1, 20),
                rndis.packet_header(60)[:8] + choose.randbytes(100),
                choose.randbytes(choose.randrange(8, 200)),
            )
        )
        self.memory.view[:4096] = data.ljust(4096, b"\0")[:4096]
        external = choose.choice(
            ([(self.memory.iova, len(data))], None, [(NOWHERE, PAGE)], [(self.memory.iova, 5 * PAGE)])
        )
        message = choose.choice(
            (
                nvsp.Init(nvsp.VERSION_6_1, nvsp.VERSION_6_1),
                nvsp.NdisConfig(choose.choice([0, 20, 82, 1014, 1514, 0xFFFF_FFFF]), 0),
                nvsp.ReceiveBuffer(gpadl, nvsp.RECEIVE_BUFFER_ID),
                nvsp.SendBuffer(gpadl, 0),
                *[
                    nvsp.Rndis(channel, section, choose.choice([0, 60, 1 << 31]))
                    for channel in (nvsp.DATA_CHANNEL, nvsp.CONTROL_CHANNEL)
                    for section in (nvsp.NO_SECTION, 0, 0xFFFF_FFFE)
                ],
                nvsp.SubChannels(1, choose.choice([0, 1, 0xFFFF_FFFF])),
            )
        )
        if choose.random() < 0.02:
            message = choose.choice((nvsp.RevokeReceiveBuffer(nvsp.RECEIVE_BUFFER_ID), nvsp.RevokeSendBuffer(0)))
        whole = nvsp.pack_message(message)
        self._send(channel, choose.choice([whole, whole, whole, whole[:8]]), external=external)

    def scsi_survives(self, channel: ClientChannel) -> None:
        choose = self.choose
        length = choose.choice([0, 1, 512, PAGE, MIB, SIZE, 0xFFFF_FFFF])
        first = choose.choice([0, 1, PAGE, 2 * PAGE, 0xFFFF_FFFF, 1 << 40, (1 << 64) - 1])
        opcode = choose.choice([*scsi.Opcode, choose.randrange(256)])
        if opcode not in (scsi.Opcode.READ_10, scsi.Opcode.READ_16):
            first = max(first, MIB // 512)  # what changes the disk
        if opcode in (scsi.Opcode.WRITE_6, scsi.Opcode.UNMAP):
            opcode = scsi.Opcode.INQUIRY  # has no room for such a place, or has it in its data
        cdb = bytes([opcode, 0]) + min(first, 0xFFFF_FFFF).to_bytes(4, "big") + choose.randbytes(4)
        if opcode >> 5 == 4:  # the group of those that are longer
            cdb = storvsc.long_form(opcode, first, choose.choice([0, 1, 8, 0xFFFF_FFFF]), choose.randrange(256))
        external = choose.choice(
            (
                None,
                [(self.memory.iova, length % (64 * PAGE))] if length % (64 * PAGE) else None,
                [(self.memory.iova, PAGE)],
                [(NOWHERE, PAGE)],
                [((1 << 64) - PAGE, PAGE)],
            )
        )
        message = storvsc.request(cdb, length, lun=choose.choice([0, 0, 0, 9]), direction=choose.randrange(3))
        if choose.random() < 0.1:
            message, external = pack_request(choose.choice([*Operation, 99]), choose.randbytes(8)), None
        if choose.random() < 0.1:
            for step in storvsc.HANDSHAKE:
                self._send(channel, step)
        self._send(channel, message[: choose.choice([64, 64, 64, 48, 8])], external=external)

    def integration_service(self, channel: ClientChannel) -> None:
        choose = self.choose
        if choose.random() < 0.9:
            kind = choose.choice([ic.MessageType.HEARTBEAT, ic.MessageType.SHUTDOWN])
            data = frame(ic.Message(kind, b"", transaction=choose.randrange(1, 256), flags=5).pack())
        else:
            data = frame(b"\xff" * choose.randrange(100))  # it costs the channel
            self.reopened += 1
        channel.allocate_packet().send(data, wait_for_completion=False)


def test_nonsense_while_a_save_is_in_progress(device: Device, tmp_path: Path) -> None:
    """Fifteen saves of a device whose guest does not stop, then a restore of the last one, where it goes on."""
    server = device.serve()
    try:
        function = server.function()
        driver = VmbusDriver(function)
        write_kept(driver)
        hostile = Hostile(driver, 5)
        held = 0
        for number in range(15):
            said = hostile.said
            until(lambda said=said: hostile.said >= said + 50 or hostile.trouble, "the guest to say something", 20)
            directory = tmp_path / f"save-{number}"
            directory.mkdir()
            held += server.command("pause", seconds=10.0)["incoming_held"]
            if number == 14:
                hostile.halt()
            server.command("save", path=str(directory / "state"), files=str(directory))
            assert (directory / "file.scsi.lun-0").read_bytes()[:PAGE] == KEPT
            state = saved.decode((directory / "state").read_bytes())
            if number < 14:
                server.command("resume")
        config = bytes.fromhex(server.command("pci")["config"])
        server.stop()
        server = device.serve(restore=state, files=directory)
        function.reconnect(server.socket_path, config)
        server.command("restore-finish")
        said = hostile.said
        hostile.go_on()
        until(lambda: hostile.said >= said + 500 or hostile.trouble, "the guest to say something", 20)
        hostile.halt()
        print(f"{hostile.said} messages, {held} of them held at a save; {len(driver.rescinded)} channels lost")
        status = server.command("status")["providers"]
        assert status["network"]["refused"] > 0 and status["scsi"]["luns"][0]["errors"] == 0
        hostile.close()
        again = VmbusDriver(server.function())
        for one in KINDS:
            serves(again, one)
        again.close(graceful=False)
    finally:
        server.stop()
    assert device.image.read_bytes()[:PAGE] == KEPT
