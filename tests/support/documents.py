"""The keys of what commands print with `--json`, as docs/command-line.md has them."""

from __future__ import annotations

import msgspec

from vmbus.cli.asking import Status
from vmbus.observe.audit.report import Report as AuditReport
from vmbus.observe.inspection.difference import Difference
from vmbus.observe.inspection.document import Inspection
from vmbus.operations.checkpoint import CheckpointReport
from vmbus.operations.migration.report import MigrationReport
from vmbus.operations.revert import RevertReport
from vmbus.operations.save import SaveReport
from vmbus.soak.records import Report as SoakReport
from vmbus.testkit.replay_report import ReplayReport
from vmbus.testkit.story import Figures
from vmbus_bench.figures import Report as BenchReport

STATUS = Status.__struct_fields__
"""Of each VM in `vms`."""


def documents() -> dict[str, tuple[str, ...]]:
    """The keys of every document, as the page has them."""
    structures: dict[str, type[msgspec.Struct]] = {
        "audit": AuditReport,
        "bench": BenchReport,
        "capture replay": ReplayReport,
        "checkpoint": CheckpointReport,
        "demo": Figures,
        "inspect": Inspection,
        "inspect diff": Difference,
        "migrate": MigrationReport,
        "revert": RevertReport,
        "save": SaveReport,
        "soak": SoakReport,
    }
    others = {
        "capture frames": ("file", "frames", "missing"),
        "capture record": ("path", "running", "ended", "full", "bytes", "packets", "dropped", "channels", "gone"),
        "capture show": ("records", "torn"),
        "certificates": ("certificates",),
        "checkpoint --delete": ("name", "deleted"),
        "checkpoint --list": ("checkpoints",),
        "list": ("vms",),
        "migrate --resolve": ("name", "runs"),
        "network": ("interfaces", "there", "user"),
        "new-provider": ("name", "files"),
        "restore --detach": ("vms",),
        "run-vm --detach": ("vms",),
        "run-vm --list-drivers": ("drivers", "own"),
        "setup --check": ("findings",),
        "setup --clean": ("cache", "freed"),
        "stop": ("name", "powered_off"),
    }
    found = {name: structure.__struct_fields__ for name, structure in structures.items()} | others
    found["bench"] += ("targets",)
    return dict(sorted(found.items()))
