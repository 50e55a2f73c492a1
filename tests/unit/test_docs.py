"""What docs/ says about the code is true: registers, messages, fields, limits, names, paths, links, error messages."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest

from vmbus import kmcl
from vmbus.bus import gpadl, offers
from vmbus.bus.local import LocalBus
from vmbus.bus.synic import Synic
from vmbus.device import observing
from vmbus.device import saved as device_saved
from vmbus.device.pci import ConfigSpace
from vmbus.kmcl import saved, server
from vmbus.memory.guest import GuestMemory
from vmbus.providers.disk.disk import MAXIMUM_DATA, MAXIMUM_RANGE, PATIENCE
from vmbus.providers.network import oids
from vmbus.providers.network.card import ANNOUNCE_AFTER, CardOptions
from vmbus.providers.network.provider import CONTROL_BYTES, SEND_SECTION
from vmbus.providers.scsi.provider import ScsiOptions
from vmbus.providers.scsi.unit import UnitOptions
from vmbus.providers.vsock.connection import CHUNK, HIGH, LINGER_SECONDS
from vmbus.providers.vsock.provider import HOST_SECONDS, VsockOptions, VsockProvider
from vmbus.snapshot import manifest
from vmbus.soak import campaign as soak_campaign
from vmbus.soak import folder as soak_folder
from vmbus.soak import job as soak_job
from vmbus.soak import room as soak_room
from vmbus.soak import settings as soak_settings
from vmbus.soak.records import Report
from vmbus.testkit.host import Clock, FakeHost
from vmbus.util.listening import LONGEST_PATH
from vmbus.wire import hvsock, messages, nvsp, packet, scsi, storvsp, synic
from vmbus.wire.synic import PostStatus, Register

CHECKOUT = Path(__file__).resolve().parents[2]
DOCS = CHECKOUT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def page(name: str) -> str:
    return (DOCS / name).read_text()


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next heading of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE)
    assert found is not None, f"there is no section {heading!r}"
    return found[1]


def table(text: str, *columns: str) -> list[dict[str, str]]:
    """The rows of the first table whose header begins with these columns."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines()]
    for start, header in enumerate(rows):
        if tuple(header[: len(columns)]) == columns:
            body = []
            for cells in rows[start + 2 :]:
                if len(cells) != len(header):
                    break
                body.append(dict(zip(header, cells, strict=True)))
            assert body
            return body
    raise AssertionError(f"there is no table with the columns {columns}")


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


# ---- device-abi.md ---------------------------------------------------------------------------------------------------


class _Nothing:
    """Surroundings of a SynIC that do nothing."""

    def posted(self, connection_id: int, message: bytes) -> PostStatus:
        return PostStatus.SUCCESS

    def signalled(self, connection_id: int) -> None:
        pass

    def reset_requested(self) -> None:
        pass

    def interrupt(self) -> None:
        pass


def test_the_register_table() -> None:
    rows = table(page("device-abi.md"), "Offset", "Name", "Access")
    assert [(row["Name"], int(row["Offset"], 16)) for row in rows] == [(one.name, one.value) for one in Register]
    for row in rows:
        device = Synic(GuestMemory(), _Nothing())
        before = device.read(int(row["Offset"], 16), 4)
        device.write(int(row["Offset"], 16), b"\x00\x10\0\0")
        writable = device.bad_accesses == 0
        # CONTROL reads back what it did, not what was written.
        readable = row["Name"] == "CONTROL" or (before != bytes(4)) or not writable
        readable = readable or device.read(int(row["Offset"], 16), 4) != before
        assert row["Access"] == ("R" if readable else "") + ("W" if writable else ""), row["Name"]
    for name in ("MAGIC", "ABI_VERSION"):
        (row,) = (row for row in rows if row["Name"] == name)
        assert row["Meaning"].startswith(f"{getattr(synic, name):#010x}")


def test_the_first_line_names_the_abi() -> None:
    assert (
        page("device-abi.md").splitlines()[2].startswith(f"ABI {synic.ABI_VERSION >> 16}.{synic.ABI_VERSION & 0xFFFF}.")
    )


def test_the_configuration_space_table() -> None:
    rows = table(page("device-abi.md"), "Offset", "Bytes", "Field", "After reset")
    fresh, ones = ConfigSpace(), ConfigSpace()
    ones.write(0, b"\xff" * 256)
    listed = set()
    for row in rows:
        offset, size = int(row["Offset"], 16), int(row["Bytes"])
        value = int.from_bytes(fresh.read(offset, size), "little")
        changed = value ^ int.from_bytes(ones.read(offset, size), "little")
        assert (value, changed) == (int(row["After reset"], 16), int(row["Writable bits"], 16)), row["Field"]
        listed |= set(range(offset, offset + size))
    for offset in set(range(256)) - listed:
        assert fresh.read(offset, 1) == ones.read(offset, 1) == b"\0", hex(offset)


def test_the_message_table() -> None:
    rows = table(page("device-abi.md"), "Number", "Message")
    told = [(row["Number"], row["Message"], row["Direction"], row["Bytes"].split()[0], row["Since"]) for row in rows]
    real = [
        (
            str(row.number),
            row.message.__name__,
            row.direction.value,
            str(messages.HEADER_SIZE + row.fields.size),
            f"{row.since >> 16}.{row.since & 0xFFFF}" if row.since else "always",
        )
        for row in messages.MESSAGES.values()
    ]
    assert told == real


def test_the_versions_and_packet_types() -> None:
    text = page("device-abi.md")
    names = [f"{version >> 16}.{version & 0xFFFF}" for version in messages.Version]
    assert f"Protocol versions {', '.join(names[:-1])} and {names[-1]}." in text
    taken = re.search(r"Taken from the guest: (.*?)\.", text, re.DOTALL)
    sent = re.search(r"Sent to the guest: (.*?)\.", text, re.DOTALL)
    assert taken is not None and sent is not None
    kinds = [{int(number) for number in re.findall(r"\((\d+)\)", found[1])} for found in (taken, sent)]
    assert kinds == [set(packet.PacketType) - {7}, set(packet.PacketType) - {9}]


def test_the_post_statuses() -> None:
    rows = table(page("device-abi.md"), "Value", "Name")
    assert [(int(row["Value"]), row["Name"]) for row in rows] == [(one.value, one.name) for one in PostStatus]


def test_the_slot_and_the_post_block() -> None:
    text = page("device-abi.md")
    for columns, layout in (
        (("Offset in the slot", "Bytes"), synic.SLOT_HEADER),
        (("Offset", "Bytes", "Field"), synic.POST_HEADER),
    ):
        heading = "Messages to the guest: the slot" if "slot" in columns[0] else None
        part = section(text, heading or "Messages from the guest: the post-message block")
        rows = [(int(row[columns[0]]), int(row["Bytes"])) for row in table(part, *columns)]
        sizes = [{"I": 4, "B": 1, "H": 2, "Q": 8}[kind] for kind in layout.format.lstrip("<")]
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        assert rows == [*zip(starts, sizes, strict=True), (layout.size, messages.MAX_MESSAGE_SIZE)]
    assert f"256-byte slot at offset {synic.SLOT_OFFSET} of the message page" in text
    assert synic.SLOT_SIZE == synic.POST_SIZE == 256


# ---- state-format.md -------------------------------------------------------------------------------------------------

STRUCTURES: dict[str, type[msgspec.Struct]] = {
    name: value
    for module in (device_saved, saved, manifest, gpadl, offers, observing)
    for name, value in vars(module).items()
    if isinstance(value, type)
    and issubclass(value, msgspec.Struct)
    and not name.startswith("_")
    and name not in {"Struct", "VmDescription", "Counts", "SavedPacket"}  # described elsewhere, or never stored
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_fields_of(name: str) -> None:
    rows = table(section(page("state-format.md"), name), "Field", "Type")
    assert [row["Field"].strip("`") for row in rows] == list(STRUCTURES[name].__struct_fields__)


def test_the_tags_of_chunks() -> None:
    for chunk in (saved.ChannelChunk, saved.PacketChunk, saved.CompletionChunk):
        tag = chunk.__struct_config__.tag
        assert f"`type` is `{tag}`" in section(page("state-format.md"), chunk.__name__)


def test_the_bounds_of_bytes() -> None:
    text = page("state-format.md")
    most = packet.MAX_PACKET_SIZE
    assert f"bytes, up to {most + 256} |" in section(text, "PacketChunk")
    assert f"bytes, up to {most} |" in section(text, "CompletionChunk")
    assert f"bytes, up to {most} |" in section(text, "LibBuf")
    assert "at most 1 GiB" in text and device_saved.MAX_BODY == 1 << 30


def test_the_head_and_the_versions() -> None:
    text = page("state-format.md")
    rows = table(text, "Offset", "Bytes", "Field")
    assert [(int(row["Offset"]), int(row["Bytes"])) for row in rows] == [(0, 8), (8, 4), (12, 4), (16, 8), (24, 32)]
    assert f"The head has {device_saved._HEAD.size} bytes" in text
    assert f"`{device_saved.MAGIC.decode()}`" in rows[0]["Field"]
    assert rows[1]["Field"] == f"format version, {device_saved.FORMAT_VERSION}"
    assert device_saved.OLDEST_VERSION == device_saved.FORMAT_VERSION == 1, "docs say: today both are 1"
    for name in ("ChannelChunk", "LibBuf"):
        assert table(section(text, name), "Field")[0]["Type"] == str(saved.VERSION)
    fields = {row["Field"].strip("`"): row["Type"] for row in table(section(text, "Manifest"), "Field")}
    assert (fields["format"].strip("`"), fields["version"]) == (manifest.FORMAT, str(manifest.VERSION))


def test_the_files_of_a_snapshot() -> None:
    rows = table(page("state-format.md"), "File", "Written by")
    assert [row["File"].strip("`") for row in rows] == [manifest.MANIFEST, *manifest.CONTENTS]


def test_the_messages_of_refusals_exist() -> None:
    sources = "".join(path.read_text() for path in (CHECKOUT / "device" / "vmbus").rglob("*.py"))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # literals that go on in the next line
    rows = table(page("state-format.md"), "By", "What is wrong")
    fragments = [fragment for row in rows for fragment in code_spans(row["The message says"])]
    assert len(fragments) > 30
    assert [fragment for fragment in fragments if fragment not in sources] == []


# ---- provider-scsi.md ------------------------------------------------------------------------------------------------


def test_the_tables_of_the_scsi_provider() -> None:
    text = page("provider-scsi.md")
    options = {row["Option"].strip("`"): row["Default"] for row in table(text, "Option", "Default")}
    fields = {field.name: field.default for field in msgspec.structs.fields(ScsiOptions)}
    assert list(options) == list(fields)
    assert options == {name: "none" if name == "luns" else str(default) for name, default in fields.items()}
    units = {row["Of a unit"].strip("`"): row["Default"] for row in table(text, "Of a unit", "Default")}
    fields = {field.name: field.default for field in msgspec.structs.fields(UnitOptions)}
    assert set(units) == set(fields)
    for name, default in fields.items():
        if name not in ("image", "size_mib"):
            assert units[name] == str(default).lower(), name
    for limit in (f"up to {MAXIMUM_DATA >> 20} MiB", f"up to {MAXIMUM_RANGE >> 20} MiB", f"{PATIENCE:g} s at most"):
        assert limit in text
    assert str(storvsp.STORVSP_TYPE) in text
    versions = [f"{version >> 8}.{version & 0xFF}" for version in storvsp.VERSIONS]
    assert f"{', '.join(versions[:-1])} and {versions[-1]}" in text
    told = {code for row in table(text, "What went wrong") for code in row["Sense (key, code)"].split(" or ")}
    senses = [one for name, one in vars(scsi).items() if name.isupper() and isinstance(one, scsi.Sense)]
    for sense in senses:
        code = f"{sense.asc:02X}/{sense.ascq:02X}"
        if sense not in (scsi.NO_SENSE, scsi.SAVING_NOT_SUPPORTED):
            assert any(code in one for one in told), sense


# ---- provider-vsock.md -----------------------------------------------------------------------------------------------


def test_the_tables_of_the_sockets(tmp_path: Path) -> None:
    text = page("provider-vsock.md")
    options = [row["Option"].strip("`") for row in table(text, "Option", "Default")]
    assert options == [field.name for field in msgspec.structs.fields(VsockOptions)]
    provider = VsockProvider(FakeHost(Clock(), LocalBus(), "", tmp_path), "vsock", UUID(int=1), {})
    told = [name for row in table(text, "Field", "Meaning") for name in code_spans(row["Field"])]
    assert sorted(told) == sorted(provider.status())
    assert str(hvsock.service_of(0))[8:] in text and f"at most {LONGEST_PATH - 11} here" in text
    assert f"Up to {hvsock.MAX_DATA} bytes are taken, and at most {CHUNK}" in text
    assert f"fills {HIGH >> 10} KiB here" in text and f"read for {LINGER_SECONDS:g} s" in text
    assert f"after {HOST_SECONDS:g} s: a guest" in text


# ---- provider-network.md ---------------------------------------------------------------------------------------------


def test_the_tables_of_the_network_provider() -> None:
    text = page("provider-network.md")
    options = {row["Option"].strip("`"): row["Default"].strip("`") for row in table(text, "Option", "Default")}
    fields = {field.name: field.default for field in msgspec.structs.fields(CardOptions)}
    assert list(options) == list(fields)
    for name, default in fields.items():
        if default is not None:
            assert options[name] == str(default).lower(), name
    served = {row["Message"]: int(row["Number"]) for row in table(text, "Message", "Number")}
    assert served == {kind.name: kind.value for kind in nvsp.Type}
    asked = {int(row["OID"], 16) for row in table(text, "OID", "Answer")}
    assert asked == set(oids._QUERIES)
    taken = {int(row["OID"], 16) for row in table(text, "OID", "Taken for")}
    assert taken == {
        oids.PACKET_FILTER,
        oids.OFFLOAD_PARAMETERS,
        oids.RSS_PARAMETERS,
        oids.CONFIG_PARAMETER,
        oids.CURRENT_ADDRESS,
        oids.MULTICAST_LIST,
    }
    assert f"{ANNOUNCE_AFTER[-1]:g} s" in text and len(ANNOUNCE_AFTER) == 5 and "and four more" in text
    assert str(nvsp.NVSP_TYPE) in text and f"{SEND_SECTION}" in text and f"{CONTROL_BYTES >> 10} KiB" in text


# ---- soak.md ---------------------------------------------------------------------------------------------------------


def test_the_example_report_is_what_the_readme_says() -> None:
    """A campaign of 20 minutes that passed; nothing in it tells of the machine."""
    folder = DOCS / "examples" / "soak"
    report = msgspec.json.decode((folder / "report.json").read_bytes(), type=Report)
    assert report.verdict == "passed" and not report.failures and report.seconds >= 1200
    moved = sum(report.by_kind[kind].get("done", 0) for kind in ("save_restore", "save_restore_live", "migrate"))
    assert moved >= 60
    assert report.environment.kernel == "" and report.environment.memory_bytes == 0
    html = (folder / "report.html").read_text()
    assert f"seed {report.seed}" in html and f"{report.transactions:,}" in html
    numbers = (f"{moved} save", f"{report.packets:,} packets", f"{report.transactions:,} transactions")
    assert all(number in page("soak.md") for number in numbers), numbers


def test_the_tables_of_the_soak() -> None:
    text = page("soak.md")
    soak_command = importlib.import_module("vmbus.cli.soak")  # the package has the command by that name
    told = {row["Setting"].strip("`"): row["Default"] for row in table(text, "Setting", "Default")}
    defaults = msgspec.to_builtins(soak_settings.Settings())
    assert {name: json.loads(default) for name, default in told.items()} == defaults
    weights = {row["Operation"].strip("`"): float(row["Weight"]) for row in table(text, "Operation", "Weight")}
    assert weights == soak_settings.WEIGHTS
    options = {row["Option"].strip("`").split()[0] for row in table(text, "Option", "Meaning")}
    known = {option for parameter in soak_command.soak.params for option in parameter.opts}
    assert options <= known and known - options == {"--seconds"}
    statuses = {int(row["Exit status"]): row["Meaning"].split(":")[0] for row in table(text, "Exit status", "Meaning")}
    assert set(statuses) == {
        soak_command.PASSED,
        soak_command.FAILED,
        soak_command.CANNOT,
        soak_command.INTERRUPTED,
    }
    assert {statuses[number] for number in soak_command.STATUS.values()} == set(soak_command.STATUS)
    assert f"{soak_room.ROOM_FOR_AN_EPISODE >> 30} GiB free" in text
    assert f"{soak_room.ROOM_FOR_RECORDS >> 20} MiB)" in text
    assert f"a reserve of {soak_folder.RESERVE >> 20} MiB" in text
    limits, bounds = soak_campaign.Limits(), soak_job.Bounds()
    assert limits.failures == 25 and "After 25 failures" in text
    assert limits.keep_bytes == 256 << 20 and "(default: 256)" in text
    assert limits.wait_for_room == 600 and "for up to 10 minutes" in text
    assert limits.attempts == 3 and "three times in all" in text
    assert (bounds.silence, bounds.longest) == (300, 3600)


# ---- all pages -------------------------------------------------------------------------------------------------------


def resolve(dotted: str) -> Any:
    """What a dotted name means: `vmbus.x.y`, or a class of KMCL and its attribute."""
    first, *rest = dotted.split(".")
    if first not in ("vmbus", "vmbus_guest"):
        found = getattr(kmcl if hasattr(kmcl, first) else server, first)
        for name in rest:
            found = getattr(found, name)
        return found
    found = importlib.import_module(first)
    for index, name in enumerate(rest):
        if not hasattr(found, name):
            importlib.import_module(".".join([first, *rest[: index + 1]]))
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_names_of_code_exist(path: Path) -> None:
    pattern = re.compile(r"(?:vmbus|vmbus_guest|Channel|ServerChannel|Packet|PacketState|Completion)\.[\w.]+")
    for span in code_spans(path.read_text()):
        if pattern.fullmatch(span):
            try:
                resolve(span)
            except (AttributeError, ImportError) as error:
                # Instance attributes without slots exist in the source only.
                assert re.search(rf"\bself\.{span.rpartition('.')[2]}\b", _source_of(span)), f"{span}: {error}"


def _source_of(dotted: str) -> str:
    owner = resolve(dotted.rpartition(".")[0])
    modules = {one.__module__ for one in getattr(owner, "__mro__", ())} - {"builtins", "vmbus.native._core"}
    names = modules or {getattr(owner, "__module__", owner.__name__)}
    return "".join(Path(importlib.import_module(name).__file__ or "").read_text() for name in sorted(names))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_paths_and_tests_exist(path: Path) -> None:
    for span in code_spans(path.read_text()):
        if re.match(r"(device|guest|tests|scripts|docs|qemu_configs|bench)/", span):
            name, _, test = span.partition("::")
            assert (CHECKOUT / name).exists(), span
            assert not test or f"def {test}(" in (CHECKOUT / name).read_text(), span


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", path.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_nothing_of_one_machine_is_in_the_docs(path: Path) -> None:
    text = path.read_text()
    for pattern in (r"/work\b", r"\bshared/", r"/home/", r"/root\b", r"/tmp/", r"https?://", r"\b(mirror|proxy)\."):
        assert re.search(pattern, text) is None, pattern
    assert "\t" not in text and not re.search(r" +$", text, re.MULTILINE)


def test_the_code_in_packet_42_is_the_providers() -> None:
    (block,) = re.findall(r"^ *```python\n(.*?)^ *```", page("packet-42.md"), re.DOTALL | re.MULTILINE)
    real = (CHECKOUT / "device" / "vmbus" / "providers" / "burst.py").read_text()
    for line in block.splitlines():
        assert line.split("#")[0].strip() in real, line


def test_python_examples_are_python() -> None:
    for path in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
            compile(block, str(path), "exec")


def test_the_events_of_the_device_are_bytes() -> None:
    """The decision that the docs explain: one byte per relid, at the relid's own offset."""
    ram = bytearray(8192)
    memory = GuestMemory()
    memory.map(0, memoryview(ram), True)
    device = Synic(memory, _Nothing())
    for register, value in ((Register.MESSAGE_PAGE_LOW, 1), (Register.EVENT_PAGE_LOW, 4097), (Register.CONTROL, 1)):
        device.write(register, value.to_bytes(4, "little"))
    device.raise_event(1234)
    assert [index for index, byte in enumerate(ram) if byte] == [4096 + 1234] and ram[4096 + 1234] == 1
