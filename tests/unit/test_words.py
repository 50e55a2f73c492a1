"""The words for packets of Linux's own drivers: what they say, and that any bytes give some, short and printable."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import storvsc
from vmbus.kmcl.pipe import frame
from vmbus.observe import words
from vmbus.observe.inspection.parts import words_of
from vmbus.observe.words import Seen, describe
from vmbus.observe.words.seen import LONGEST
from vmbus.wire import hvsock, ic, nvsp, rndis, scsi, storvsp
from vmbus.wire.gpa import range_for
from vmbus.wire.linux import driver_of
from vmbus.wire.nvsp import NVSP_TYPE
from vmbus.wire.packet import PacketType, TransferPages, gpa_direct_body, transfer_pages_body
from vmbus.wire.storvsp import STORVSP_TYPE, Operation, SrbStatus, parse_srb

INBAND, PAGES, DIRECT, DONE = PacketType.INBAND, PacketType.TRANSFER_PAGES, PacketType.GPA_DIRECT, PacketType.COMPLETION
SOCKET = hvsock.service_of(22)
ECHO = UUID("5a2f2c7e-3d0e-4c43-9b58-6f0d2f1e0001")
TYPES = [STORVSP_TYPE, NVSP_TYPE, SOCKET, *(service.interface_type for service in ic.SERVICES)]


def told(type_: UUID, payload: bytes, *, kind: int = INBAND, to_guest: bool = False, **more: bytes) -> str:
    return describe(type_, Seen(to_guest, kind, 17, more.get("body", b""), payload, more.get("external", b"")))


def padded(data: bytes) -> bytes:
    """As a ring has it."""
    return data + bytes(-len(data) % 8)


# ---- SCSI ------------------------------------------------------------------------------------------------------------

SAME = storvsc.long_form(scsi.Opcode.WRITE_SAME_16, 1 << 33, 1, scsi.UNMAP_BIT)
UNMAP = scsi.pack_unmap([scsi.Extent(8, 16), scsi.Extent(64, 1)])


@pytest.mark.parametrize(
    ("cdb", "external", "expected"),
    [
        (storvsc.read_10(2048, 8), b"", "READ(10) lba 2048, 8 blocks"),
        (storvsc.write_10(0, 1, fua=True), b"", "WRITE(10) lba 0, 1 block, FUA"),
        (SAME, b"", "WRITE SAME(16) lba 8589934592, 1 block, unmap"),
        (bytes([scsi.Opcode.READ_6, 0, 1, 0, 0, 0]), b"", "READ(6) lba 256, 256 blocks"),
        (storvsc.SYNCHRONIZE, b"", "SYNCHRONIZE CACHE(10)"),
        (storvsc.inquiry(36), b"", "INQUIRY 36 bytes"),
        (storvsc.inquiry(255, 0x83), b"", "INQUIRY page 0x83, 255 bytes"),
        (storvsc.unmap_cdb(40), UNMAP, "UNMAP lba 8, 16 blocks and 1 more"),
        (storvsc.unmap_cdb(40), b"", "UNMAP 40 bytes of list"),
        (storvsc.unmap_cdb(40), UNMAP[:20], "UNMAP 40 bytes of list"),
        (bytes([0x9E, 0x10]).ljust(16, b"\0"), b"", "READ CAPACITY(16)"),
        (bytes([0xEE]).ljust(16, b"\0"), b"", "command 0xee"),
        (storvsc.READY, b"", "TEST UNIT READY"),
    ],
)
def test_a_command_block_in_words(cdb: bytes, external: bytes, expected: str) -> None:
    payload = storvsc.request(cdb, 4096, lun=3)
    assert told(STORVSP_TYPE, payload, kind=DIRECT, external=external) == f"{expected}, lun 3, tag 17"


def test_the_rest_of_what_storvsc_says() -> None:
    read = storvsc.request(storvsc.read_10(2048, 8), 4096)
    assert told(STORVSP_TYPE, storvsc.request(storvsc.READY, path=1, target=2)).endswith(
        "path 1, target 2, lun 0, tag 17"
    )
    assert told(STORVSP_TYPE, storvsp.pack_request(Operation.QUERY_PROTOCOL_VERSION, b"\2\6")) == (
        "QUERY_PROTOCOL_VERSION 6.2"
    )
    assert told(STORVSP_TYPE, storvsp.pack_request(Operation.CREATE_SUB_CHANNELS, b"\3\0")) == (
        "CREATE_SUB_CHANNELS, 3 of them"
    )
    answers = {"kind": DONE, "to_guest": True}
    assert told(STORVSP_TYPE, storvsp.pack_good(read, 4096), **answers) == (  # type: ignore[arg-type]
        "READ(10) success, 4096 bytes, lun 0, tag 17"
    )
    failed = storvsp.pack_answer(parse_srb(read), SrbStatus.ERROR, 2, sense=scsi.LBA_OUT_OF_RANGE.pack())
    assert told(STORVSP_TYPE, failed, **answers) == (  # type: ignore[arg-type]
        "error, sense 5/21/00 lba out of range, lun 0, tag 17"
    )
    assert told(STORVSP_TYPE, storvsp.pack_packet(Operation.COMPLETE_IO, storvsp.Status.NOT_SUPPORTED), **answers) == (  # type: ignore[arg-type]
        "NOT_SUPPORTED"
    )
    assert told(STORVSP_TYPE, storvsp.pack_packet(Operation.ENUMERATE_BUS), to_guest=True) == "ENUMERATE_BUS"
    assert told(STORVSP_TYPE, b"short") == "a packet of 5 bytes that storvsc does not have"


# ---- network ---------------------------------------------------------------------------------------------------------


def test_what_hv_netvsc_says() -> None:
    assert told(NVSP_TYPE, nvsp.pack_message(nvsp.Init(2, 0x60001))) == "INIT, versions 0x2 to 0x60001"
    assert told(NVSP_TYPE, nvsp.pack_message(nvsp.ReceiveBuffer(0xE1E10, 0xCAFE))) == "RECEIVE_BUFFER in GPADL 0xe1e10"
    assert told(NVSP_TYPE, nvsp.pack_message(nvsp.PdApi(4))) == "PD_API, operation 4"
    data = nvsp.pack_message(nvsp.Rndis(nvsp.DATA_CHANNEL, 3, 1514))
    assert told(NVSP_TYPE, data) == "RNDIS data, 1514 bytes in section 3"
    memory = nvsp.pack_message(nvsp.Rndis(nvsp.DATA_CHANNEL, nvsp.NO_SECTION, 0))
    body = gpa_direct_body([range_for(0x1000, 100), range_for(0x3000, 1000)], b"")[0]
    assert told(NVSP_TYPE, memory, kind=DIRECT, body=body) == "RNDIS data, 1100 bytes in 2 ranges of memory"
    assert told(NVSP_TYPE, memory, kind=DIRECT, body=b"") == "RNDIS data, malformed ranges"
    frames = [rndis.packet_header(len(one)) + one for one in (bytes(60), bytes(1514))]
    assert told(NVSP_TYPE, memory, kind=DIRECT, external=frames[0]) == "RNDIS data, a frame of 60 bytes"
    assert told(NVSP_TYPE, memory, kind=DIRECT, external=b"".join(frames)) == "RNDIS data, 2 frames of 1574 bytes"
    control = nvsp.pack_message(nvsp.Rndis(nvsp.CONTROL_CHANNEL, nvsp.NO_SECTION, 0))
    query = rndis.query(5, 0x1010101)
    assert told(NVSP_TYPE, control, kind=DIRECT, external=query) == "RNDIS control, QUERY OID 0x01010101, request 5"
    cut = told(NVSP_TYPE, control, kind=DIRECT, external=query[:20], body=body)
    assert cut == "RNDIS control, 1100 bytes in 2 ranges of memory"


def test_what_the_card_says() -> None:
    pages, _ = transfer_pages_body(TransferPages(0xCAFE, [(0x1A00, 1514), (0x2000, 60)]), b"")
    payload = nvsp.rndis(nvsp.DATA_CHANNEL)
    assert told(NVSP_TYPE, payload, kind=PAGES, to_guest=True, body=pages) == (
        "RNDIS data, 2 messages, 1574 bytes at 0x1a00 of the receive buffer"
    )
    two = b"".join(rndis.packet_header(one) + bytes(one) for one in (1514, 60))
    assert told(NVSP_TYPE, payload, kind=PAGES, to_guest=True, body=pages, external=two) == (
        "RNDIS data, 2 frames of 1574 bytes at 0x1a00 of the receive buffer"
    )
    control = nvsp.rndis(nvsp.CONTROL_CHANNEL)
    for message, expected in (
        (rndis.query_complete(7, 0, bytes(4)), "QUERY_COMPLETE, request 7"),
        (rndis.indicate(rndis.Status.MEDIA_CONNECT), "INDICATE MEDIA_CONNECT"),
        (rndis.indicate(77), "2 messages, 1574 bytes"),
        (rndis.reset_complete(), "RESET_COMPLETE"),
        (b"\xff" * 7, "2 messages, 1574 bytes"),
    ):
        assert told(NVSP_TYPE, control, kind=PAGES, to_guest=True, body=pages, external=message) == (
            f"RNDIS control, {expected} at 0x1a00 of the receive buffer"
        )
    answers = {
        nvsp.init_complete(0x60001, 1): "INIT_COMPLETE success, version 0x60001",
        nvsp.receive_buffer_complete(1, 1728, 100): "RECEIVE_BUFFER_COMPLETE success, 100 sections of 1728 bytes",
        nvsp.send_buffer_complete(2): "SEND_BUFFER_COMPLETE failure, sections of 0 bytes",
        nvsp.rndis_complete(5): "RNDIS_COMPLETE invalid_rndis",
        nvsp.sub_channels_complete(1, 3): "SUB_CHANNELS success, 3 granted",
        nvsp.pd_api_complete(4, 2): "PD_API failure, operation 4",
    }
    for answer, expected in answers.items():
        assert told(NVSP_TYPE, answer, kind=DONE, to_guest=True) == expected
    assert told(NVSP_TYPE, nvsp.rndis_complete(1), kind=DONE) == "RNDIS_COMPLETE success"
    assert told(NVSP_TYPE, nvsp.indirection_table([0] * 16), to_guest=True) == "INDIRECTION_TABLE, 16 entries"


# ---- sockets and services --------------------------------------------------------------------------------------------


def test_what_a_socket_says() -> None:
    assert told(SOCKET, padded(hvsock.pack(b"secret"))) == "6 bytes of the guest's stream"
    assert told(SOCKET, padded(hvsock.FIN), to_guest=True) == "FIN, the end of the host's stream"
    assert told(SOCKET, b"\1\0\0\0\xff\0\0\0") == "a packet of 8 bytes that sock does not have"


@pytest.mark.parametrize(
    ("kind", "body", "expected"),
    [
        (ic.MessageType.HEARTBEAT, ic.heartbeat(41), "HEARTBEAT request 9, sequence 41"),
        (ic.MessageType.SHUTDOWN, ic.shutdown(ic.Shutdown(3)), "SHUTDOWN request 9, force, restart"),
        (ic.MessageType.VSS, ic.vss(ic.VssOperation.FREEZE), "VSS request 9, FREEZE"),
        (
            ic.MessageType.NEGOTIATE,
            ic.negotiation(ic.FRAMEWORK_VERSIONS, ic.VSS.versions),
            "NEGOTIATE request 9, framework 3.0 1.0, messages 5.0",
        ),
        (
            ic.MessageType.TIME,
            ic.time_sync(ic.TimeSync(1e9, ic.TimeFlag.SYNC), ic.Version(4, 0)),
            "TIME request 9, SYNC 2001-09-09 01:46:40.000",
        ),
        (
            ic.MessageType.KVP,
            ic.kvp(ic.Kvp(ic.KvpOperation.ENUMERATE, ic.Pool.AUTO, position=3)),
            "KVP request 9, ENUMERATE pool AUTO index 3",
        ),
        (
            ic.MessageType.KVP,
            ic.kvp(ic.Kvp(ic.KvpOperation.SET, ic.Pool.EXTERNAL, "role", "secret")),
            "KVP request 9, SET pool EXTERNAL key role",
        ),
        (
            ic.MessageType.KVP,
            ic.kvp(ic.Kvp(ic.KvpOperation.DELETE, ic.Pool.EXTERNAL, "a\x1b[31m\u202eb")),
            "KVP request 9, DELETE pool EXTERNAL key a\\x1b[31m\\u202eb",
        ),
        (ic.MessageType.KVP, b"x", "KVP request 9, a body of 1 bytes that it does not have"),
    ],
)
def test_what_an_integration_service_says(kind: int, body: bytes, expected: str) -> None:
    message = ic.Message(kind, body, ic.Version(3, 0), ic.Version(4, 0), 0, 9)
    type_ = ic.KVP.interface_type
    assert told(type_, padded(frame(message.pack())), to_guest=True) == expected
    answer = message._replace(flags=ic.Flag.TRANSACTION | ic.Flag.RESPONSE, status=ic.IcStatus.FAIL)
    text = told(type_, padded(frame(answer.pack())))
    assert text.startswith(expected.partition(" ")[0] + " answer 9") and text.endswith(", FAIL")


def test_what_waits_for_room_is_named_by_its_saved_bytes() -> None:
    body, offset8 = transfer_pages_body(TransferPages(0xCAFE, [(64, 1514)]), nvsp.rndis(nvsp.DATA_CHANNEL))
    assert words_of(NVSP_TYPE, PAGES, 5, offset8, body) == (
        "RNDIS data, 1 message, 1514 bytes at 0x40 of the receive buffer"
    )
    assert words_of(STORVSP_TYPE, INBAND, 5, 2, storvsp.pack_packet(Operation.ENUMERATE_BUS)) == "ENUMERATE_BUS"


def test_sabotage_text_that_is_not_cleaned_would_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    message = ic.Message(ic.MessageType.KVP, ic.kvp(ic.Kvp(ic.KvpOperation.DELETE, ic.Pool.EXTERNAL, "\x1b[2J" * 40)))
    payload = padded(frame(message.pack()))
    text = told(ic.KVP.interface_type, payload)
    assert "\x1b" not in text and len(text) <= LONGEST
    monkeypatch.setattr(words, "clean", str)
    text = told(ic.KVP.interface_type, payload)
    assert "\x1b" in text and len(text) > LONGEST


# ---- whatever comes --------------------------------------------------------------------------------------------------


def heads() -> st.SearchStrategy[bytes]:
    """Beginnings that get further than chance does."""
    small = st.integers(0, 140).map(lambda number: number.to_bytes(4, "little"))
    message = st.builds(
        lambda kind, body, flags: frame(ic.Message(kind, body, transaction=1, flags=flags).pack()),
        st.integers(0, 6),
        st.binary(max_size=40) | st.just(ic.kvp(ic.Kvp(3, 1, "k" * 255, "v" * 1000))),
        st.integers(0, 255),
    )
    srb = st.builds(
        lambda cdb, lun: storvsc.request(cdb, 512, lun=lun), st.binary(min_size=6, max_size=16), st.integers(0, 255)
    )
    rndis_heads = st.builds(lambda kind, size: kind + size, small, small)
    return st.one_of(st.just(b""), small, message, srb, rndis_heads)


@given(
    st.sampled_from(TYPES),
    st.booleans(),
    st.sampled_from([INBAND, PAGES, DIRECT, DONE]),
    st.binary(max_size=64),
    heads(),
    st.binary(max_size=200),
    heads(),
    st.binary(max_size=200),
)
def test_any_bytes_give_a_short_printable_text(
    type_: UUID, to_guest: bool, kind: int, body: bytes, head: bytes, rest: bytes, before: bytes, external: bytes
) -> None:
    text = describe(type_, Seen(to_guest, kind, 2**64 - 1, body, head + rest, before + external))
    assert 0 < len(text) <= LONGEST and text.isascii() and text.isprintable(), text


def test_other_protocols_have_no_words() -> None:
    assert driver_of(ECHO) is None and told(ECHO, bytes(64)) == ""
    assert [driver_of(one) for one in TYPES[:4]] == ["hv_storvsc", "hv_netvsc", "hv_sock", "hv_utils"]
