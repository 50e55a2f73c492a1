"""Every cell of the failure matrix, with real owners and real device servers, and a program in QEMU's place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.failure_bench import Bench, stand_in
from support.failure_matrix import CELLS, Cell, Failure, Outcome
from vmbus.provision.libvfio_user import find_library

pytestmark = [pytest.mark.loopback, pytest.mark.long]

# Those that leave the source running come first, one after the other in the same VM.
ORDER = sorted(CELLS, key=lambda cell: (cell.outcome is not Outcome.SOURCE, cell.failure is Failure.SOURCE_OWNER))


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        try:
            bench = Bench(stand_in(Path(find_library())), patch)
        except PermissionError as error:
            pytest.skip(str(error))
        yield bench
        bench.close()


@pytest.mark.parametrize("cell", ORDER, ids=lambda cell: cell.name)
def test_failure_matrix(bench: Bench, cell: Cell) -> None:
    bench.run(bench.cell(cell))
