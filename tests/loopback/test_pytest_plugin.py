"""The pytest plugin, as a user has it: a run of its own, in a directory of its own, of what docs/pytest.md shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from support import pace
from vmbus.cli.new_provider import create

CHECKOUT = Path(__file__).resolve().parents[2]
PLUGIN = "vmbus.pytest_plugin"


def example(word: str) -> str:
    """The example of the page in which a word stands."""
    page = (CHECKOUT / "docs" / "pytest.md").read_text()
    (found,) = (
        block for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE) if word in block
    )
    return str(found)


def run(folder: Path, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_mine.py").write_text(text)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=result.xml", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=pace.seconds(200),
    )


def properties(folder: Path) -> dict[str, dict[str, str]]:
    """The properties in the report, by test."""
    root = ElementTree.parse(folder / "result.xml")
    return {
        str(case.get("name")): {str(one.get("name")): str(one.get("value")) for one in case.iter("property")}
        for case in root.iter("testcase")
    }


MORE = """

from vmbus.testkit.loopback.harness import describe
from vmbus.wire.workload import BURST_TYPE, ECHO_TYPE, BurstStart


def test_memory(vmbus_loopback, tmp_path):
    pair = vmbus_loopback(describe("echo", "burst"))
    guest = pair.open(ECHO_TYPE)
    memory = guest.memory(b"x" * 5000)
    with pair.capture(tmp_path / "packets.pcapng"):
        guest.request(echo_request(3, b"x" * 5000, inline=False), external=memory)
    assert memory.data == transform(b"x" * 5000, 3)
    assert (tmp_path / "packets.pcapng").stat().st_size > 5000
    assert pair.server.command("status")["phase"] == "running"


def test_packets(vmbus_loopback):
    pair = vmbus_loopback("burst")
    guest = pair.open(BURST_TYPE)
    guest.send(BurstStart(32, 2, 1).pack())
    assert len(guest.receive().payload) >= 32


def test_nothing():
    pass


def test_kit(vmbus_kit):
    vmbus_kit("echo").open().send(echo_request(3, b"x", inline=True))


def test_kit_that_is_not_finished(vmbus_kit):
    kit = vmbus_kit("echo")
    kit.provider.host.call_later(5, print)
"""


def test_the_example_passes_and_the_report_has_the_figures(tmp_path: Path) -> None:
    """Also when the plugin is asked for twice."""
    (tmp_path / "conftest.py").write_text(f'pytest_plugins = ["{PLUGIN}"]\n')
    done = run(tmp_path, example("vmbus_loopback(") + MORE, "-p", PLUGIN, "--strict-markers")
    assert "6 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "stop() of provider echo leaves a timer that runs out in 5 s" in done.stdout
    assert properties(tmp_path) == {
        "test_kit": {},
        "test_kit_that_is_not_finished": {},
        "test_requests_go_over_a_restore": {"vmbus_save_restores": "1", "vmbus_packets": "4"},
        "test_memory": {"vmbus_save_restores": "0", "vmbus_packets": "1"},
        "test_packets": {"vmbus_save_restores": "0", "vmbus_packets": "2"},
        "test_nothing": {},
    }
    entry = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert entry == {PLUGIN: PLUGIN}, "under another name, pytest would refuse the second one"


def test_the_example_of_a_provider_of_ones_own_three_ways(tmp_path: Path) -> None:
    """In a VM it is run by tests/vm/test_one_way.py."""
    create("door_bell", tmp_path)
    done = run(
        tmp_path, example("getfixturevalue"), "-p", PLUGIN, "--strict-markers", "-k", "not vmbus_qemu", "test_mine.py"
    )
    assert "2 passed, 1 deselected" in done.stdout, done.stdout + done.stderr


def test_a_test_that_fails_leaves_nothing_and_the_next_one_passes(tmp_path: Path) -> None:
    text = """
import threading
from vmbus.wire.workload import ECHO_TYPE, echo_request

def test_fails(vmbus_loopback):
    pair = vmbus_loopback("echo", options={"hold": 4, "hold_seconds": 5})
    guest = pair.open(ECHO_TYPE)
    guest.send(echo_request(0, b"held", inline=True)).wait(timeout=0.1)

def test_passes(vmbus_loopback):
    assert not [thread.name for thread in threading.enumerate() if thread.name == "device-server"]
    pair = vmbus_loopback("echo")
    pair.open(ECHO_TYPE).request(echo_request(0, b"hello", inline=True))
"""
    done = run(tmp_path, text, "-p", PLUGIN)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "packet 1 (b'" in done.stdout and "of channel echo is not completed" in done.stdout


CARELESS = """
import pytest
from vmbus import providers
from vmbus.kmcl.server import ServerChannel
from vmbus.providers import Provider
from vmbus.wire.workload import ECHO_TYPE

class Careless(Provider):
    kind = "careless"

    def start(self):
        self.channel = ServerChannel(ECHO_TYPE, self.instance, name=self.name)
        self.channel.set_process_packet_callbacks(self.process)
        self.host.add_channel(self.channel)
        self.channel.enable()
        self.channel.start()

    def process(self, channel, completion, payload):
        def done(result, error):
            raise ValueError("T1")
        if payload[:1] == b"x":
            self.host.run_blocking(lambda: None, done)
        else:
            completion.complete(payload)

providers.PROVIDERS["careless"] = Careless

def ask(vmbus_loopback, payload):
    pair = vmbus_loopback("careless")
    request = pair.open(ECHO_TYPE).send(payload)
    pair.wait_until(lambda: request.done)

def test_raises(vmbus_loopback):
    ask(vmbus_loopback, b"x")

@pytest.mark.vmbus_errors
def test_says_so(vmbus_loopback):
    ask(vmbus_loopback, b"x")

@pytest.mark.vmbus_errors(match="T1")
def test_says_which(vmbus_loopback, vmbus_provider_errors):
    ask(vmbus_loopback, b"x")
    assert "done of run_blocking" in vmbus_provider_errors.texts[0]

@pytest.mark.vmbus_errors(match="T2")
def test_says_another(vmbus_loopback):
    ask(vmbus_loopback, b"x")

@pytest.mark.vmbus_errors
def test_says_and_has_none(vmbus_loopback):
    ask(vmbus_loopback, b"y")

def test_has_none(vmbus_loopback):
    ask(vmbus_loopback, b"y")
"""


def test_an_error_of_a_provider_fails_the_test_unless_it_is_expected(tmp_path: Path) -> None:
    done = run(tmp_path, CARELESS, "-p", PLUGIN, "--strict-markers", "-rA")
    found = dict(re.findall(r"^(?:ERROR) test_mine.py::(\w+) - (.*)$", done.stdout, re.MULTILINE))
    assert set(found) == {"test_raises", "test_says_another", "test_says_and_has_none"}, done.stdout + done.stderr
    assert "6 passed, 3 errors" in done.stdout
    assert (
        "provider careless: done of run_blocking (Careless.process.<locals>.done) raised ValueError('T1')"
        in done.stdout
    )
    assert "a callback of a provider was to raise" in done.stdout
