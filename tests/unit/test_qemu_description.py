"""VM descriptions: what is accepted, and what the errors say."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from vmbus.device.description import DeviceDescription, load_device
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.vm.description import (
    VmDescription,
    find_description,
    load_description,
    parse_description,
    with_options,
)

CONFIGURATIONS = Path(__file__).parents[2] / "qemu_configs"

PROVIDER = """
[[device.providers]]
kind = "echo"
name = "echo"
instance = "6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7a01"
"""
GOOD = 'name = "one"\n[device]\nname = "vmbus0"\n' + PROVIDER


@pytest.mark.parametrize("path", sorted(CONFIGURATIONS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_description_of_the_project_is_good(path: Path) -> None:
    assert load_description(path).name == path.stem


def test_the_demo_has_what_the_demo_needs() -> None:
    demo = load_description(CONFIGURATIONS / "demo.toml")
    assert (demo.memory_mib, demo.cpus, demo.slot) == (256, 1, 5)
    assert [provider.kind for provider in demo.device.providers] == ["echo", "burst"]


def test_defaults() -> None:
    found = parse_description(GOOD, "x")
    assert (found.memory_mib, found.cpus, found.slot, found.guest.huge_pages) == (256, 1, 5, 8)


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        (GOOD.replace('name = "one"', 'name = "one"\ncpu = 2'), ["cpu"]),
        (GOOD.replace('name = "one"', 'name = "one"\ncpus = "two"'), ["cpus", "int"]),
        (GOOD.replace('name = "one"', 'name = "one"\nmemory_mib = 64'), ["memory_mib", ">= 128"]),
        (GOOD.replace('name = "one"', 'name = "one"\nslot = 31'), ["slot", "<= 30"]),
        (GOOD.replace('name = "one"', 'name = "../one"'), ["'name'", "allowed", "a-z"]),
        (GOOD.replace('name = "one"\n', ""), ["missing", "name"]),
        (GOOD.replace('kind = "echo"', 'kind = "Echo!"'), ["device.providers", "kind", "allowed"]),
        (GOOD.replace("6f1b4b0e-", "banana-"), ["instance", "GUID"]),
        (GOOD + PROVIDER, ["two providers", "name", "echo"]),
        (GOOD + PROVIDER.replace('name = "echo"', 'name = "other"'), ["two providers", "instance"]),
        (GOOD.replace("[device]", "[guest]\nhuge_pages = 100\n[device]"), ["huge_pages", "memory_mib", "up to 64"]),
        (GOOD.replace("[device]", '[guest]\nkernel_arguments = ["a b"]\n[device]'), ["guest.kernel_arguments"]),
        (GOOD.replace("[device]", '[guest]\nservices = ["block"]\n[device]'), ["guest.services", 'driver = "linux"']),
        (
            GOOD.replace("[device]", '[guest]\ndriver = "windows"\n[device]'),
            ["guest.driver", "windows", "allowed: both, linux, userspace"],
        ),
        ("name = ", ["not TOML"]),
        ('name = "one"\n[device]\nname = "d"\nproviders = []\n', ["device.providers", ">= 1"]),
    ],
)
def test_errors_name_the_file_the_field_and_what_is_allowed(text: str, mentions: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_description(text, "machine.toml")
    message = str(caught.value)
    assert message.startswith("machine.toml: ")
    for part in mentions:
        assert part in message
    assert "\n" not in message


def test_who_drives_the_device() -> None:
    """Not said: userspace, and manifests are as they were before there was a choice."""
    plain = parse_description(GOOD, "x")
    assert not plain.guest.linux
    assert b"driver" not in msgspec.json.encode(plain)
    linux = parse_description(GOOD.replace("[device]", '[guest]\ndriver = "linux"\n[device]'), "x")
    assert linux.guest.linux
    assert msgspec.json.decode(msgspec.json.encode(linux), type=VmDescription) == linux
    assert not parse_description(GOOD.replace("[device]", '[guest]\ndriver = "userspace"\n[device]'), "x").guest.linux
    # Huge pages are the userspace driver's.
    small = GOOD.replace("[device]", '[guest]\ndriver = "linux"\nhuge_pages = 100\n[device]')
    assert parse_description(small, "x").guest.linux


def test_options_of_a_provider_can_be_others() -> None:
    vm = parse_description(GOOD + "options = { hold = 1, hold_seconds = 2.0 }\n", "x")
    (other,) = with_options(vm, {"echo": {"hold": 3}}).device.providers
    assert other.options == {"hold": 3, "hold_seconds": 2.0} and vm.device.providers[0].options["hold"] == 1
    with pytest.raises(UsageError, match="there is no provider two"):
        with_options(vm, {"two": {}})


def test_a_missing_file_is_an_environment_problem(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"absent\.toml: No such file"):
        load_description(tmp_path / "absent.toml")


def test_names_are_looked_up_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(GOOD)
    assert find_description("a", tmp_path) == tmp_path / "a.toml"
    assert find_description("sub/b.toml", tmp_path) == Path("sub/b.toml")
    with pytest.raises(EnvironmentProblem, match="there: a;"):
        find_description("b", tmp_path)


def test_the_server_reads_the_same_description(tmp_path: Path) -> None:
    device = parse_description(GOOD.replace("kind =", "options = {window = 3}\nkind ="), "x").device
    (tmp_path / "device.json").write_bytes(device.to_json())
    assert load_device(tmp_path / "device.json") == device
    assert json.loads(device.to_json())["providers"][0]["options"] == {"window": 3}
    (tmp_path / "device.json").write_bytes(device.to_json().replace(b'"kind"', b'"kin"'))
    with pytest.raises(UsageError, match=r"device\.json: .*kin"):
        load_device(tmp_path / "device.json")


def test_a_description_survives_json() -> None:
    found = parse_description(GOOD, "x")
    assert msgspec.json.decode(msgspec.json.encode(found), type=VmDescription) == found
    assert isinstance(found.device, DeviceDescription)
