"""Programs read it: every command that needs a VM, asked of one, with standard output in a file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support import pace
from support.documents import STATUS, documents
from support.owners import nothing_runs_on as nothing_runs_on
from support.owners import until
from support.processes import alive
from vmbus.vm.run_directory import running_vms

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("nothing_runs_on")]


class Shell:
    """Calls commands, with standard output in a file, and notes which."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.called: set[str] = set()

    def text(self, *words: str, status: int = 0) -> tuple[str, str]:
        """What is on standard output, and on standard error."""
        with (self._folder / "out").open("w+") as out, (self._folder / "err").open("w+") as err:
            line = [sys.executable, "-m", "vmbus", *words]
            done = subprocess.run(line, stdout=out, stderr=err, timeout=pace.seconds(120))
            out.seek(0)
            err.seek(0)
            found = out.read(), err.read()
        assert done.returncode == status, (words, found)
        return found

    def document(self, name: str, *words: str, status: int = 0) -> dict[str, Any]:
        """The one document on standard output; its keys are those of the page (`name` in its table; "": not there)."""
        out, _ = self.text(*words, "--json", status=status)
        found = json.loads(out)
        if name:
            assert tuple(found) == documents()[name], (words, found)
            self.called.add(name)
        return dict(found)


def test_machine_readable_results_of_a_vm_are_alone_on_standard_output(tmp_path: Path) -> None:
    shell, begun = Shell(tmp_path), time.monotonic()
    (vm,) = shell.document("run-vm --detach", "run-vm", "--detach", "--audit", str(tmp_path / "records"))["vms"]
    assert tuple(vm) == STATUS and (vm["name"], vm["state"], vm["detached"]) == ("demo", "running", True)
    assert shell.document("list", "list")["vms"] == [vm]
    # The agent's answers are JSON always; this one comes when the guest is up.
    assert json.loads(shell.text("agent", "list")[0]) == shell.document("", "agent", "list")
    shell.document("", "agent", "start", "echo", "count=200000")
    capture = str(tmp_path / "a.pcapng")
    taken = shell.document("capture record", "capture", "-o", capture, "--packets", "50", "--seconds", "20")
    assert taken["packets"] >= 50
    shown = shell.document("capture show", "capture", "show", capture, "--count", "20")
    assert [one["number"] for one in shown["records"]] == list(range(1, 21))
    shell.document("capture frames", "capture", "frames", capture, "-o", str(tmp_path / "frames.pcapng"))
    for tag in ("a", "b"):
        shell.document("checkpoint", "checkpoint", tag)
    (one, other) = shell.document("checkpoint --list", "checkpoint", "--list")["checkpoints"]
    assert (one["tag"], other["tag"]) == ("a", "b")
    shell.document("checkpoint --delete", "checkpoint", "--delete", "a")
    assert shell.document("revert", "revert", "b")["tag"] == "b"
    assert shell.document("", "revert", "a", status=2)["error"]["kind"] == "usage"
    shell.document("inspect", "inspect", "demo")
    assert shell.document("audit", "audit", "--vm", "demo")["verdict"] == "clean"
    # As text: results here, and what happens meanwhile there.
    for words, progress in (
        (["list"], ""),
        (["checkpoint", "c"], "guest memory and machine state written"),
        (["revert", "c"], "device state taken"),
        (["save", "--keep", "--live", str(tmp_path / "kept")], "digests, manifest"),
    ):
        out, err = shell.text(*words)
        assert out.count("\n") >= 2 and progress in err, (words, out, err)
        assert not progress or (progress not in out and out.splitlines()[-1] not in err)
    refused = shell.document("", "save", str(tmp_path / "kept"), status=2)["error"]
    assert "exists already" in refused["message"] and refused["status"] == 2
    assert shell.document("save", "save", str(tmp_path / "last"))["directory"] == str(tmp_path / "last")
    until(lambda: not running_vms(), "the VM to be gone")
    shell.document("inspect diff", "inspect", "diff", str(tmp_path / "kept"), str(tmp_path / "last"), status=1)
    assert shell.document("", "stop", status=2)["error"]["message"].startswith("no VM is running")
    (tmp_path / "last" / "manifest.json").write_bytes(b"{}")
    assert shell.document("", "restore", "--detach", str(tmp_path / "last"), status=11)["error"]["kind"] == "state"
    clones = shell.document("restore --detach", "restore", "--detach", "--count", "2", str(tmp_path / "kept"))["vms"]
    assert [one["name"] for one in clones] == ["demo", "demo-2"] and clones[0]["pid"] == clones[1]["pid"]
    for one in clones:
        assert shell.document("stop", "stop", "--kill", one["name"]) == {"name": one["name"], "powered_off": False}
    until(lambda: not alive(clones[0]["pid"]), "the owner of both to end")
    print(f"documents of a real VM: {', '.join(sorted(shell.called))} in {time.monotonic() - begun:.1f} s")
