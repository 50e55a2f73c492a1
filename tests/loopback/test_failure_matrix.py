"""Every cell of the failure matrix, with real owners and real device servers, and a program in QEMU's place."""

from __future__ import annotations

import pytest

from support.failure_bench import Bench
from support.failure_bench import bench as bench
from support.failure_matrix import CELLS, Cell, Failure, Outcome

pytestmark = [pytest.mark.loopback, pytest.mark.long]

# Those that leave the source running come first, one after the other in the same VM.
ORDER = sorted(CELLS, key=lambda cell: (cell.outcome is not Outcome.SOURCE, cell.failure is Failure.SOURCE_OWNER))


@pytest.mark.parametrize("cell", ORDER, ids=lambda cell: cell.name)
def test_failure_matrix(bench: Bench, cell: Cell) -> None:
    bench.run(bench.cell(cell))
