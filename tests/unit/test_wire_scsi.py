"""StorVSP's packets and SCSI's data: what is packed is read again, and nothing that a guest sends is too odd for it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmbus.wire import scsi, storvsp
from vmbus.wire.scsi import Extent, Limits, Opcode, Sense
from vmbus.wire.storvsp import Operation, Srb

LIMITS = Limits(2048, 131072, 64, 8, 131072)
u8 = st.integers(0, 0xFF)
u32 = st.integers(0, 0xFFFF_FFFF)
srbs = st.builds(
    Srb,
    length=st.integers(0, 0xFFFF),
    srb_status=u8,
    scsi_status=u8,
    port=u8,
    path=u8,
    target=u8,
    lun=u8,
    cdb_length=u8,
    sense_length=u8,
    direction=u8,
    reserved=u8,
    data_length=u32,
    cdb=st.binary(min_size=20, max_size=20),
    reserve=st.integers(0, 0xFFFF),
    queue_tag=u8,
    queue_action=u8,
    srb_flags=u32,
    timeout=u32,
    sort_key=u32,
)


@given(srbs)
def test_a_request_block_is_read_as_it_was_packed(srb: Srb) -> None:
    packet = storvsp.pack_request(Operation.EXECUTE_SRB, srb.pack())
    assert len(packet) == 64
    assert storvsp.parse_operation(packet) == Operation.EXECUTE_SRB and storvsp.parse_srb(packet) == srb


@given(srbs)
def test_a_command_block_is_zero_behind_its_end(srb: Srb) -> None:
    command = srb.command
    if not 6 <= srb.cdb_length <= 16:
        assert command is None
    else:
        assert command == srb.cdb[: srb.cdb_length].ljust(16, b"\0")


@given(srbs, st.integers(0, 0xFFFF_FFFF))
def test_the_quick_answer_is_the_other_one(srb: Srb, moved: int) -> None:
    packet = storvsp.pack_request(Operation.EXECUTE_SRB, srb.pack())
    assert storvsp.pack_good(packet, moved) == storvsp.pack_answer(srb, storvsp.SrbStatus.SUCCESS, length=moved)


@given(srbs, st.builds(Sense, u8, u8, u8))
def test_an_answer_with_sense(srb: Srb, sense: Sense) -> None:
    reply = storvsp.pack_answer(srb, storvsp.SrbStatus.ERROR, 2, sense=sense.pack())
    assert len(reply) == 64 and storvsp.parse_head(reply) == (Operation.COMPLETE_IO, 0, 0)
    answer = storvsp.parse_srb(reply)
    assert (answer.srb_status, answer.scsi_status, answer.sense_length, answer.data_length) == (0x84, 2, 18, 0)
    assert (answer.cdb[0], answer.cdb[2], answer.cdb[7], answer.cdb[12], answer.cdb[13]) == (
        0x70,
        sense.key,
        10,
        sense.asc,
        sense.ascq,
    )
    assert answer._replace(srb_status=0, scsi_status=0, sense_length=0, data_length=0, cdb=b"") == srb._replace(
        srb_status=0, scsi_status=0, sense_length=0, data_length=0, cdb=b""
    )


@given(st.binary(max_size=80))
def test_any_bytes_have_an_operation(payload: bytes) -> None:
    operation = storvsp.parse_operation(payload)
    assert operation == (int.from_bytes(payload[:4], "little") if len(payload) >= 64 else 0)


@given(st.integers(0, 0xFFFF), u32)
def test_properties(channels: int, maximum: int) -> None:
    reply = storvsp.pack_properties(channels, maximum)
    assert len(reply) == 64
    assert storvsp.parse_properties(reply) == (channels, 1 if channels else 0, maximum)


@given(st.sampled_from(Opcode), st.binary(min_size=15, max_size=15))
def test_every_command_block_has_an_extent(opcode: Opcode, rest: bytes) -> None:
    extent = scsi.parse_extent(bytes([opcode]) + rest)
    assert extent.first >= 0 and extent.blocks >= 0


def test_extents_of_each_form() -> None:
    def cdb(text: str) -> bytes:
        return bytes.fromhex(text).ljust(16, b"\0")

    assert scsi.parse_extent(cdb("08 ff 02 03 04 00")) == (0x1F0203, 4)
    assert scsi.parse_extent(cdb("0a 00 00 01 00 00")) == (1, 256)
    assert scsi.parse_extent(cdb("28 00 01020304 00 0506 00")) == (0x01020304, 0x0506)
    assert scsi.parse_extent(cdb("a8 00 01020304 05060708 00 00")) == (0x01020304, 0x05060708)
    assert scsi.parse_extent(cdb("8a 00 0102030405060708 090a0b0c 00 00")) == (0x0102030405060708, 0x090A0B0C)


@given(st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.integers(1, 0xFFFF_FFFF)), max_size=20))
def test_an_unmap_list_is_read_as_it_was_packed(extents: list[tuple[int, int]]) -> None:
    data = scsi.pack_unmap([Extent(*one) for one in extents])
    assert scsi.parse_unmap(data, 20) == extents
    if len(extents) > 1:
        assert scsi.parse_unmap(data, len(extents) - 1) == scsi.INVALID_FIELD_IN_PARAMETERS
        assert scsi.parse_unmap(data[:-1], 20) == scsi.PARAMETER_LIST_LENGTH_ERROR


@given(st.binary(max_size=200))
def test_an_unmap_list_of_any_bytes(data: bytes) -> None:
    found = scsi.parse_unmap(data, 8)
    assert isinstance(found, Sense) or len(found) <= 8


@given(u8, st.binary(min_size=16, max_size=16), st.booleans())
def test_pages_of_vital_product_data(page: int, identity: bytes, thin: bool) -> None:
    data = scsi.vpd_page(page, identity, LIMITS, thin=thin)
    assert (data is None) == (page not in (0, 0x80, 0x83, 0xB0, 0xB1, 0xB2))
    if data is not None:
        assert data[1] == page and int.from_bytes(data[2:4], "big") == len(data) - 4


def test_what_linux_reads_of_the_pages() -> None:
    identity = bytes(range(16))
    limits = scsi.vpd_page(0xB0, identity, LIMITS, thin=True)
    assert limits is not None and len(limits) == 64
    assert int.from_bytes(limits[8:12], "big") == LIMITS.transfer
    assert int.from_bytes(limits[20:24], "big") == LIMITS.unmap
    assert int.from_bytes(limits[24:28], "big") == LIMITS.unmap_descriptors
    assert int.from_bytes(limits[28:32], "big") == LIMITS.granularity
    assert int.from_bytes(limits[36:44], "big") == LIMITS.write_same
    rotation = scsi.vpd_page(0xB1, identity, LIMITS, thin=True)
    assert rotation is not None and rotation[4:6] == b"\0\1" and len(rotation) > 8
    for thin, flags in ((True, 0x80), (False, 0)):
        provisioning = scsi.vpd_page(0xB2, identity, LIMITS, thin=thin)
        assert provisioning is not None and provisioning[5] & 0x80 == flags
    assert scsi.standard_inquiry(True)[0] == 0 and scsi.standard_inquiry(False)[0] == 0x7F
    assert len(scsi.standard_inquiry(True)) == 36


@given(st.sampled_from([Opcode.MODE_SENSE_6, Opcode.MODE_SENSE_10]), st.binary(min_size=15, max_size=15), st.booleans())
def test_mode_sense_of_any_block(opcode: Opcode, rest: bytes, read_only: bool) -> None:
    found = scsi.mode_sense(bytes([opcode]) + rest, read_only=read_only)
    if isinstance(found, bytes):
        short = opcode == Opcode.MODE_SENSE_6
        assert (found[0] + 1 if short else int.from_bytes(found[:2], "big") + 2) == len(found)
        assert bool(found[2 if short else 3] & 0x80) == read_only
