"""Certificates for migrations, the rules of a destination, and the messages that TLS adds."""

from __future__ import annotations

import ssl
import stat
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from click.testing import CliRunner

from support.migration import DEVICE
from vmbus.cli.commands import main
from vmbus.device import saved
from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.errors import EnvironmentProblem, StateError, UsageError
from vmbus.operations.migration.accept import EVERYTHING, Accept
from vmbus.operations.migration.certificates import make_authority, make_host
from vmbus.operations.migration.messages import Prepared, decode, encode
from vmbus.operations.migration.tls import for_destination, for_source
from vmbus.providers.disk.options import DiskRecord
from vmbus.providers.scsi import provider as controllers
from vmbus.providers.scsi.handshake import Phase
from vmbus.providers.scsi.unit import UnitOptions, UnitState
from vmbus.vm.description import FurtherDevice, VmDescription
from vmbus.vm.own_guest import OwnDisk, OwnGuest, OwnNic

NAMES = {
    "ca-cert.pem": 0o600, "client-cert.pem": 0o600, "client-key.pem": 0o600, "server-cert.pem": 0o600,
    "server-key.pem": 0o600,
}  # fmt: skip
INSTANCE = "6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7a0{}"


# --- certificates -----------------------------------------------------------------------------------------------------


def test_a_set_of_certificates_has_qemus_names_and_is_its_owners_alone(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    done = CliRunner().invoke(main, ["certificates", str(pki), "a,192.0.2.1,a.example", "b,2001:db8::2"])
    assert done.exit_code == 0, done.output
    assert "for a, 192.0.2.1, a.example" in done.output
    assert stat.S_IMODE(pki.stat().st_mode) == 0o700 and stat.S_IMODE((pki / "ca-key.pem").stat().st_mode) == 0o600
    for host in ("a", "b"):
        assert {one.name: stat.S_IMODE(one.stat().st_mode) for one in (pki / host).iterdir()} == NAMES
        assert for_source(pki / host).fingerprint != for_destination(pki / host).fingerprint
    told: dict[str, Any] = ssl._ssl._test_decode_cert(str(pki / "b" / "server-cert.pem"))  # type: ignore[attr-defined]
    assert ("DNS", "b") in told["subjectAltName"] and ("IP Address", "2001:DB8:0:0:0:0:0:2") in told["subjectAltName"]
    # Another host later, of the same CA.
    assert CliRunner().invoke(main, ["certificates", str(pki), "c"]).exit_code == 0
    assert (pki / "c" / "ca-cert.pem").read_bytes() == (pki / "a" / "ca-cert.pem").read_bytes()


def test_certificates_in_a_place_that_is_named_from_here(tmp_path: Path, monkeypatch: Any) -> None:
    """As the page has it, `certificates pki a`; and what could not be made is not in the way of another attempt."""
    monkeypatch.chdir(tmp_path)
    make_authority(Path("pki"))
    assert {file.name for file in make_host(Path("pki"), "a").iterdir()} >= {"server-cert.pem", "client-cert.pem"}
    key = (tmp_path / "pki/ca-key.pem").rename(tmp_path / "key")
    with pytest.raises(EnvironmentProblem, match="openssl made no certificate"):
        make_host(Path("pki"), "b")
    key.rename(tmp_path / "pki/ca-key.pem")
    make_host(Path("pki"), "b")


def test_certificates_are_not_made_twice_nor_for_what_is_no_host(tmp_path: Path, monkeypatch: Any) -> None:
    make_authority(tmp_path)
    with pytest.raises(UsageError, match="there is a CA"):
        make_authority(tmp_path)
    make_host(tmp_path, "a")
    with pytest.raises(UsageError, match="there already"):
        make_host(tmp_path, "a")
    for name in ("../x", "x y", "", "a,b", "-a", "a/b"):
        with pytest.raises(UsageError, match="neither a host's name nor its address"):
            make_host(tmp_path, name)
        with pytest.raises(UsageError, match="neither a host's name nor its address"):
            make_host(tmp_path, "z", [name])
    assert {one.name for one in tmp_path.iterdir()} == {"a", "ca-cert.pem", "ca-key.pem"}
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(EnvironmentProblem, match="install openssl"):
        make_authority(tmp_path / "other")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run-vm", "--receive", "tcp:here:0"], "or certificates (--tls)"),
        (["run-vm", "--receive", "tcp:here:0", "--tls", "/x"], "cannot read the certificates in /x"),
        (["run-vm", "--receive", "tcp:here:0", "--secret-file", "/x", "--peer", "a"], "--peer goes with --tls"),
        (["run-vm", "--receive", "tcp:here:0", "--tls", "/x", "--stream-port", "5"], "--stream-port does not go with"),
        (["run-vm", "--tls", "/x"], "--tls goes with --receive"),
        (["run-vm", "--peer", "x"], "--peer goes with --receive"),
        (["run-vm", "--accept", "x"], "--accept goes with --receive"),
        (["migrate", "a", "tcp:there:1"], "no VM 'a' is running"),
    ],
)
def test_tls_on_the_command_line(words: list[str], message: str) -> None:
    done = CliRunner().invoke(main, words)
    assert done.exit_code != 0 and done.output.startswith("error: ") and message in done.output, done.output


# --- what a destination takes -----------------------------------------------------------------------------------------


def vm(*providers: tuple[str, dict[str, Any]]) -> VmDescription:
    described = [
        ProviderDescription(kind, f"p{number}", INSTANCE.format(number), options)
        for number, (kind, options) in enumerate(providers)
    ]
    return VmDescription("demo", DeviceDescription("vmbus0", described) if described else DEVICE)


DISKS = ("scsi", {"luns": [{"lun": 0, "image": "web-1.img"}, {"lun": 1, "image": "data.img"}]})
CARD = ("network", {"interface": "tap7", "bridge": "br0"})
VETH = ("network", {"end": "veth", "namespace": "blue"})
SOCKETS = ("vsock", {"path": "/run/guest.sock"})


@pytest.mark.parametrize(
    ("providers", "rules", "missing"),
    [
        ([], ["demo"], None),
        ([], ["vm:d*"], None),
        ([], ["other", "disk:*"], "sends VM 'demo'"),
        ([DISKS], ["demo"], "disk 'web-1.img'"),
        ([DISKS], ["demo", "disk:web-*"], "disk 'data.img'"),
        ([DISKS], ["demo", "disk:web-*", "disk:data.img"], None),
        ([CARD], ["demo", "network:br0"], "network 'tap7'"),
        ([CARD], ["demo", "network:tap?"], "network 'br0'"),
        ([CARD], ["demo", "network:tap?", "network:br0"], None),
        ([VETH], ["demo", "network:vmnet"], "network 'blue'"),
        ([VETH], ["demo", "network:vmnet", "network:blue"], None),
        ([SOCKETS], ["demo"], "socket '/run/guest.sock'"),
        ([SOCKETS], ["demo", "socket:/run/*"], None),
        ([("vsock", {})], ["demo"], None),
        ([("my.module:Thing", {})], ["demo"], "provider 'my.module:Thing'"),
        ([("my.module:Thing", {})], ["demo", "provider:my.module:Thing"], None),
    ],
)
def test_accept_takes_what_a_rule_names_and_nothing_else(
    providers: list[tuple[str, dict[str, Any]]], rules: list[str], missing: str | None
) -> None:
    wanted = vm(*providers)
    EVERYTHING.check(wanted, "the source")
    if missing is None:
        Accept(rules).check(wanted, "the source")
        return
    with pytest.raises(StateError, match="which is not accepted here") as refused:
        Accept(rules).check(wanted, "the source")
    assert missing in str(refused.value)
    # The hint is a rule that lets it in.
    hint = str(refused.value).partition("--accept ")[2].removesuffix(" would)")
    with pytest.raises(StateError) as again:
        Accept([*rules, hint, "vm:never"]).check(vm(*providers, ("vsock", {"path": "/else"})), "the source")
    assert missing not in str(again.value)


def test_accept_of_a_guest_of_ones_own() -> None:
    mine = OwnGuest(
        disks=[OwnDisk(file="/srv/disk.img")],
        nics=[OwnNic(hostfwd=["tcp::2222-:22"])],
        qemu_args=["-device", "pvpanic"],
    )
    wanted = msgspec.structs.replace(vm(), own=mine)
    with pytest.raises(StateError, match=r"with the qemu-arg '-device'.*--accept qemu-arg:-device"):
        EVERYTHING.check(wanted, "the source")
    Accept(["qemu-arg:*"]).check(wanted, "the source")
    rules = ["demo"]
    for rule in ("file:/srv/*", "network:user", "port:tcp:*", "qemu-arg:-device", "qemu-arg:pvpanic"):
        with pytest.raises(StateError, match=f"with the {rule.partition(':')[0]} "):
            Accept(rules).check(wanted, "the source")
        rules.append(rule)
    Accept(rules).check(wanted, "the source")


def test_accept_looks_at_every_device() -> None:
    further = FurtherDevice("vmbus1", [ProviderDescription("scsi", "more", INSTANCE.format(9), DISKS[1])], slot=6)
    wanted = msgspec.structs.replace(vm(), devices=[further])
    with pytest.raises(StateError, match=r"with the disk 'web-1\.img'"):
        Accept(["demo"]).check(wanted, "the source")
    Accept(["demo", "disk:*"]).check(wanted, "the source")


def test_accept_looks_into_options_that_are_none() -> None:
    with pytest.raises(StateError, match="options of provider 'p0'"):
        Accept(["demo"]).check(vm(("scsi", {"luns": "all"})), "the source")


@pytest.mark.parametrize("rule", ["", ":x", "disk:", "colour:blue"])
def test_what_is_no_rule(rule: str) -> None:
    with pytest.raises(UsageError, match="--accept"):
        Accept([rule])


def test_accept_looks_at_disks_in_the_saved_state(tmp_path: Path) -> None:
    golden = Path(__file__).resolve().parents[1] / "golden" / "v1"
    before = saved.decode(next(iter(sorted(golden.glob("*.state.bin")))).read_bytes())
    disk = DiskRecord(1 << 20, 512, 0)
    units = [UnitState(UnitOptions(image=image, lun=lun), disk, False) for lun, image in enumerate(("web", "data"))]
    controller = msgspec.msgpack.encode(controllers._State(1, next(iter(Phase)), 0, 0, [], units))
    record = saved.ProviderRecord("scsi", "disks", UUID(int=5).bytes, controller)
    state = tmp_path / "state"
    state.write_bytes(saved.encode(msgspec.structs.replace(before, providers=[record])))
    Accept(["demo", "disk:web", "disk:data"]).check_saved(DEVICE, state, "the source")
    with pytest.raises(StateError, match="with the disk 'data'"):
        Accept(["demo", "disk:web"]).check_saved(DEVICE, state, "the source")
    broken = tmp_path / "broken"
    broken.write_bytes(b"no state")
    EVERYTHING.check_saved(DEVICE, broken, "the source")
    with pytest.raises(StateError):
        Accept(["demo"]).check_saved(DEVICE, broken, "the source")


# --- messages ---------------------------------------------------------------------------------------------------------


def test_without_tls_the_words_are_those_of_before() -> None:
    assert msgspec.msgpack.decode(encode(Prepared(stream=5))) == {"type": "Prepared", "stream": 5}
    for message in (Prepared(stream="/x"), Prepared(key=bytes(32))):
        assert decode(encode(message), "peer") == message
