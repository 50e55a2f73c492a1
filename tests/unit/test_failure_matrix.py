"""The failure matrix is complete, and the docs have it as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.failure_matrix import (
    CELLS,
    GAPS,
    IN_QEMU,
    PHASES,
    PHASES_OF,
    TABLE,
    Failure,
    Operation,
    Outcome,
    markdown,
)
from vmbus.qemu import machine, save
from vmbus.qemu.moments import Moment

pytestmark = pytest.mark.unit

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migration.md"


def test_the_failure_matrix_leaves_nothing_out_without_a_reason() -> None:
    assert len(TABLE) == len(Operation) * len(PHASES) * len(Failure)
    assert set(PHASES) == set(Moment) - {Moment.AFTER_GO}  # the source's view of the same moment as BEFORE_CONT
    assert {cell.key for cell in CELLS} | GAPS.keys() == TABLE.keys() and len(CELLS) + len(GAPS) == len(TABLE)
    assert all(reason for reason in GAPS.values())
    for operation, phases in PHASES_OF.items():
        for phase in phases:
            assert any(cell.key[:2] == (operation, phase) for cell in CELLS), (operation, phase)


def test_the_failure_matrix_says_why_nobody_runs_a_vm_and_what_the_error_says() -> None:
    for cell in CELLS:
        assert bool(cell.why) == (cell.outcome in (Outcome.NOBODY, Outcome.SNAPSHOT)), cell.name
        re.compile(cell.says)
        # Who is killed, or has hung up, says nothing; and who has moved has nothing to complain about.
        silent = cell.failure in (Failure.SOURCE_OWNER, Failure.DESTINATION_OWNER, Failure.ASKER)
        assert cell.says or silent or cell.outcome is Outcome.DESTINATION, cell.name


def test_the_failure_matrix_has_its_decisive_cells_in_qemu() -> None:
    assert {cell.key for cell in CELLS} >= IN_QEMU
    assert 12 <= len(IN_QEMU) <= 16
    assert {key[2] for key in IN_QEMU} >= {Failure.DESTINATION_QEMU, Failure.LINK_CUT, Failure.SOURCE_DISK}


def test_the_failure_matrix_in_the_docs_is_this_one() -> None:
    page = PAGE.read_text()
    same = page.endswith("\n" + markdown())
    assert same, "docs/migration.md is out of date: replace its tables by what python -m support.failure_matrix prints"
    for seconds in (save.PROVIDERS_TIMEOUT, machine.CONTROL_TIMEOUT):
        assert seconds == 30.0
    assert save.SAVE_TIMEOUT == 60.0
    assert "with 30 seconds and" in page and "after 60 seconds, waits for the server another 30 seconds" in page
