"""Channels of Linux's own drivers over a real device server: what `inspect` calls their packets, what the auditor can
prove of them, what is in a capture, and whether it can be replayed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pcapng import FileScanner
from pcapng.blocks import EnhancedPacket, InterfaceDescription

from loopback.test_scsi_survives import OPTIONS, Churn
from support import storvsc
from support.captures import command, packets_of
from support.disk import Fault, FaultyBackend
from support.hv_utils import HvUtils
from support.network_guest import Ends, NetworkGuest
from support.nic import Cable, CablePort
from support.storage import Guest
from support.vsock import GuestSockets, accept, listen, take
from vmbus import providers
from vmbus.cli import main
from vmbus.device import saved
from vmbus.errors import UsageError
from vmbus.observe.audit.checker import check_paths
from vmbus.observe.audit.report import Report
from vmbus.observe.capture import record
from vmbus.observe.inspection.document import ChannelInfo
from vmbus.observe.inspection.target import Running
from vmbus.observe.inspection.tree import packet_text
from vmbus.providers.disk.backend import Backend
from vmbus.providers.disk.image import Image
from vmbus.providers.network import NetworkProvider
from vmbus.providers.network.interface import Port, Settings
from vmbus.providers.scsi import ScsiProvider
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.testkit.loopback.pair import DriverSide
from vmbus.testkit.replay import replay
from vmbus.testkit.replay_report import ReplayOptions
from vmbus.transport.library import Library
from vmbus.wire import nvsp
from vmbus.wire.ethernet import NO_OFFLOAD
from vmbus.wire.packet import PacketType
from vmbus.wire.storvsp import Direction
from vmbus_guest.driver import VmbusDriver

pytestmark = [
    pytest.mark.loopback,
    pytest.mark.filterwarnings("ignore:Field type should not be:DeprecationWarning"),  # of pcapng's own code
]

DISKS = describe("scsi", scsi=OPTIONS)


@pytest.fixture(autouse=True)
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMBUS_DISKS", str(tmp_path / "disks"))


@pytest.fixture
def cable(monkeypatch: pytest.MonkeyPatch) -> Cable:
    """The outer end of every card's interface."""
    found = Cable()

    class Wired(NetworkProvider):
        def make_port(self, settings: Settings) -> Port:
            return CablePort(found, settings)

    monkeypatch.setitem(providers.PROVIDERS, "network", Wired)
    return found


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Fault:
    """The next write to the second disk hangs until it may go on."""
    found = Fault("write", hang=True)

    class Faulty(ScsiProvider):
        def make_backend(self, image: Image) -> Backend:
            return FaultyBackend(image.backend, [found]) if image.path.name == "slow.img" else image.backend

    monkeypatch.setitem(providers.PROVIDERS, "scsi", Faulty)
    return found


def channel_of(server: LoopbackServer, name: str) -> ChannelInfo:
    async def ask() -> Any:
        return await Running("it", server.control_path).look()

    return next(one for one in asyncio.run(ask()).channels if one.name == name)


def checked(server: LoopbackServer, audit: Path) -> Report:
    server.command("audit")
    return check_paths([audit])


def comments(path: Path) -> list[str]:
    """What Wireshark shows beside each packet."""
    with path.open("rb") as file:
        blocks = [one for one in FileScanner(file) if isinstance(one, EnhancedPacket)]
    return [str(one.options.get("opt_comment", "")) for one in blocks if one.packet_data[1] == record.PACKET]


# ---- disks -----------------------------------------------------------------------------------------------------------


def test_a_request_that_hangs_has_a_name(libvfio_user: Library, fault: Fault) -> None:
    with LoopbackServer(DISKS, libvfio_user) as server:
        guest = Guest(server.function())
        sent = guest.send(storvsc.write_10(2048, 8, fua=True), 4096, lun=1, direction=Direction.TO_DEVICE)
        guest.bus.run_until(fault.begun.is_set, 10, "the write to hang")
        (packet,) = channel_of(server, "scsi").packets
        assert packet.words == f"WRITE(10) lba 2048, 8 blocks, FUA, lun 1, tag {packet.transaction}"
        assert packet.words in packet_text(packet).plain
        fault.go.set()
        sent.wait()
        assert not channel_of(server, "scsi").packets
        guest.close()


def test_the_hosts_half_of_a_disk_is_clean_over_restores(libvfio_user: Library, tmp_path: Path) -> None:
    audit = tmp_path / "audit"
    server = LoopbackServer(DISKS, libvfio_user, audit=audit)
    guest = Guest(server.function(), sub_channels=1)
    churn = Churn(guest)
    for generation in range(4):
        for _ in range(12):
            churn.some()
        assert checked(server, audit).clean, f"in mid-traffic: {checked(server, audit)}"
        copies = tmp_path / f"copies-{generation}"
        copies.mkdir()
        server.command("pause")
        state = tmp_path / f"state-{generation}"
        server.command("save", path=str(state), files=str(copies))
        config = bytes.fromhex(server.command("pci")["config"])
        server.stop()
        restored = saved.decode(state.read_bytes())
        server = LoopbackServer(DISKS, libvfio_user, restore=restored, files=copies, audit=audit)
        guest.function.reconnect(server.socket_path, config)
        server.command("restore-finish")
    churn.finish()
    report = checked(server, audit)
    assert report.clean and len(report.timeline) == 5, str(report)
    assert {(one.channel, one.driver, one.generations) for one in report.channels} == {
        ("scsi", "hv_storvsc", 5),
        ("scsi.1", "hv_storvsc", 5),
    }
    assert report.half_transactions >= churn.done > 100 and report.transactions == 0
    assert all(not one.in_flight for one in report.channels)
    print(f"\n{report}")
    guest.bus.close(graceful=False)
    server.stop()


def twice(server: LoopbackServer) -> None:
    channel = server.server.device.channels[0]

    def again() -> None:
        channel.outgoing.reply(1, bytes(64))
        channel.outgoing.publish()

    server.on_loop(again)


def never(server: LoopbackServer) -> None:
    """What the provider has is taken from it: it completes it, and nothing happens."""
    flow = server.server.device.channels[0].flow
    server.on_loop(lambda: flow.outstanding.clear())


@pytest.mark.parametrize(("how", "kind"), [(twice, "doubled"), (never, "lost")])
def test_sabotage_of_a_completion_is_named_by_the_hosts_half(
    libvfio_user: Library, tmp_path: Path, fault: Fault, how: Callable[[LoopbackServer], None], kind: str
) -> None:
    audit = tmp_path / "audit"
    with LoopbackServer(DISKS, libvfio_user, audit=audit) as server:
        guest = Guest(server.function())
        sent = guest.send(storvsc.write_10(0, 8), 4096, lun=1, direction=Direction.TO_DEVICE)
        guest.bus.run_until(fault.begun.is_set, 10, "the write to hang")
        assert checked(server, audit).clean
        number = channel_of(server, "scsi").packets[0].transaction
        how(server)
        fault.go.set()
        if how is twice:
            guest.bus.run_until(lambda: sent.done, 10, "the end of the write")
        report = checked(server, audit)
        assert report.verdict == "broken", str(report)
        (problem,) = report.problems
        assert (problem.kind, problem.of, problem.channel) == (kind, "completion", "scsi"), str(report)
        assert problem.first == (1 if how is twice else number)
        guest.bus.close(graceful=False)


def test_a_capture_of_a_disk_is_in_words_and_can_be_replayed(libvfio_user: Library, tmp_path: Path) -> None:
    path = tmp_path / "disk.pcapng"
    with LoopbackServer(DISKS, libvfio_user, capture=path) as server:
        guest = Guest(server.function())
        assert guest.write(2048, bytes(range(256)) * 16).good
        assert guest.read(2048, 4096) == bytes(range(256)) * 16
        assert guest.unmap((2048, 8)).good
        guest.close()
    said = comments(path)
    first = next(one for one in said if one.startswith("WRITE(10)"))
    assert first.startswith("WRITE(10) lba 2048, 8 blocks, lun 0, tag ")
    assert any(one.startswith("READ(10) success, 4096 bytes") for one in said)
    assert any(one.startswith("UNMAP lba 2048, 8 blocks") for one in said)
    assert said[0] == "BEGIN_INITIALIZATION" and "" not in said
    shown = command("show", path)
    assert shown.exit_code == 0 and "READ(10) lba 2048, 8 blocks, lun 0, tag" in shown.stdout, shown.output
    fresh = {"luns": [{"lun": 0, "image": "fresh.img", "size_mib": 8, "create": True}]}
    report = replay([path], "scsi", libvfio_user, provider_options=fresh, options=ReplayOptions(timeout=5.0))
    assert report.same and report.answers == len(said) // 2, str(report)


# ---- cards -----------------------------------------------------------------------------------------------------------


def test_a_card_is_named_audited_and_captured(libvfio_user: Library, tmp_path: Path, cable: Cable) -> None:
    audit, path = tmp_path / "audit", tmp_path / "card.pcapng"
    with LoopbackServer(describe("network"), libvfio_user, audit=audit, capture=path) as server:
        driver = VmbusDriver(server.function())
        ends = Ends(DriverSide(driver))
        guest = NetworkGuest(ends)
        sent = bytes(6) + bytes([2] * 6) + bytes([8, 0]) + bytes(range(250))
        for shape in (1, 2, 3):
            assert guest.send(sent, shape=shape) == 1
        for section, size in ((0xFFFFFFFE, 60), (3, 1 << 31), (11, 60)):
            assert guest.send_rndis(nvsp.DATA_CHANNEL, section, size, None) != nvsp.Status.SUCCESS
        guest.holding = True
        frame = bytes([255] * 6) + bytes([2] * 6) + bytes([8, 0]) + bytes(500)
        cable.push(NO_OFFLOAD + frame)
        driver.run_until(lambda: bool(guest.held), 10, "a frame")
        (packet,) = (one for one in channel_of(server, "network").packets if one.state == "sent")
        assert packet.words.startswith("RNDIS data, 1 messages, ") and "of the receive buffer" in packet.words
        report = checked(server, audit)
        assert report.clean, str(report)
        (card,) = report.channels
        assert card.driver == "hv_netvsc" and card.in_flight == {"not completed (to the guest)": [packet.transaction]}
        guest.holding = False
        guest.release()
        driver.run_until(lambda: not channel_of(server, "network").packets, 10, "the completion")
        report = checked(server, audit)
        assert report.clean and not report.channels[0].in_flight, str(report)
        driver.close(graceful=False)
    said = comments(path)
    assert "" not in said and not any("does not have" in one for one in said)
    assert any(one.startswith("RNDIS data, a frame of 514 bytes at 0x") and "receive buffer" in one for one in said)
    assert any(one.startswith("RNDIS control, QUERY OID") for one in said), said
    assert any(one.startswith("RNDIS control, QUERY_COMPLETE, request ") for one in said), said
    kinds = {one.kind for one in packets_of(path)}
    assert kinds == {PacketType.INBAND, PacketType.TRANSFER_PAGES, PacketType.GPA_DIRECT, PacketType.COMPLETION}
    # The frames are there as they were, whether in a section of a lent buffer, in memory, or in parts of the other one.
    (received,) = (one for one in packets_of(path) if one.external.endswith(frame) and one.direction == record.TO_GUEST)
    assert received.external_size == len(received.external) and received.kind == PacketType.TRANSFER_PAGES
    assert sum(one.external.endswith(sent) for one in packets_of(path)) == 3
    # A stock reader finds them in a file of their own.
    done = CliRunner().invoke(main, ["capture", "frames", str(path), "-o", str(tmp_path / "frames")])
    assert done.exit_code == 0 and ": 4 frames; those of 3 packets were" in done.output, done.output
    with (tmp_path / "frames").open("rb") as file:
        blocks = list(FileScanner(file))
    (interface,) = (block for block in blocks if isinstance(block, InterfaceDescription))
    assert interface.link_type == 1 and interface.options["if_name"] == "network"
    assert [block.packet_data for block in blocks if isinstance(block, EnhancedPacket)] == [sent] * 3 + [frame]
    with pytest.raises(UsageError, match="its guest has lent"):
        replay([path], "network", libvfio_user)


# ---- sockets and services --------------------------------------------------------------------------------------------


def test_sockets_have_no_ids_and_are_clean_nevertheless(libvfio_user: Library, tmp_path: Path) -> None:
    audit, path = tmp_path / "audit", tmp_path / "sockets.pcapng"
    with LoopbackServer(describe("vsock"), libvfio_user, audit=audit, capture=path) as server:
        driver = VmbusDriver(server.function())
        sockets = GuestSockets(driver)
        listener = listen(server.directory / "vsock.sock", 5000)
        for number in range(3):
            guest = sockets.connect(5000)
            ends: list[Any] = []

            def there(ends: list[Any] = ends) -> bool:
                end = accept(listener)
                ends.extend([] if end is None else [end])
                return bool(ends)

            sockets.run_until(there, "a connection")
            for _ in range(20):
                guest.send(b"a line\n")
            said = bytearray()
            sockets.run_until(lambda end=ends[0], said=said: take(end, said) and len(said) == 140, "its lines")
            if number < 2:
                ends[0].close()
                guest.end()
                sockets.run_until(lambda guest=guest: guest.closed, "the end")
        report = checked(server, audit)
        assert report.clean, str(report)
        assert {one.driver for one in report.channels} == {"hv_sock"} and len(report.channels) == 3
        assert sum(one.to_host for one in report.channels) >= 60
        ends[0].close()
        listener.close()
        driver.close(graceful=False)
    said_in_words = comments(path)
    assert said_in_words.count("7 bytes of the guest's stream") == 60
    assert "FIN, the end of the host's stream" in said_in_words
    with pytest.raises(UsageError, match="when programs ask"):
        replay([path], "vsock", libvfio_user)


def test_services_are_named_audited_and_captured(libvfio_user: Library, tmp_path: Path) -> None:
    audit, path = tmp_path / "audit", tmp_path / "services.pcapng"
    options = {"heartbeat_seconds": 0.02, "values": {"role": "test"}}
    with LoopbackServer(
        describe("integration", integration=options), libvfio_user, audit=audit, capture=path
    ) as server:
        driver = VmbusDriver(server.function())
        HvUtils(driver)
        until = time.monotonic() + 1.0
        driver.run_until(lambda: time.monotonic() > until, 10, "some heartbeats")
        report = checked(server, audit)
        assert report.clean and {one.driver for one in report.channels} == {"hv_utils"}, str(report)
        driver.close(graceful=False)
    said = comments(path)
    assert any(one.startswith("HEARTBEAT request ") for one in said)
    assert any(one.startswith("HEARTBEAT answer ") for one in said)
    assert any(one.startswith("KVP request") for one in said), sorted({one.split()[0] for one in said})
    assert not any("does not have" in one for one in said), sorted(set(said))
