"""What an installed package may offer to soaks: entry points of it."""

from __future__ import annotations

from typing import Any

from vmbus.soak.figures import Figures
from vmbus.soak.stage import Stage

WORKLOAD = {"provider": "echo", "driver": "echo", "parameters": {"count": 0}, "share": 0.5}


async def knock(stage: Stage, parameters: dict[str, Any]) -> Figures:
    return Figures(message=stage.here.vm.name)
