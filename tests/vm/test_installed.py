"""The demo, as somebody runs it who has installed the wheel: without a checkout."""

from __future__ import annotations

import json
from pathlib import Path

from support.installed import install, run
from vmbus.vm.command_line import Programs


def test_fault_p5_the_demo_from_a_wheel(programs: Programs, tmp_path: Path) -> None:
    modules = install(tmp_path / "site-packages")
    figures = tmp_path / "figures.json"
    done = run(modules, "-m", "vmbus.cli", "demo", "--json", str(figures), cwd=tmp_path, timeout=250)
    print(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_bytes())
    assert found["verdict"] == "pass" and found["completed"] == found["transactions"] > 45_000
    assert min(found["in_flight"].values()) > 0
    assert "PASS" in done.stdout and "scripts/" not in done.stdout + done.stderr
