"""docs/kmcl-map.md: a true row for every function and callback of the contract, and a test for every row."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from pathlib import Path

import pytest

from vmbus.kmcl import ddi

TESTS = Path(__file__).parent
PAGE = TESTS.parents[1] / "docs" / "kmcl-map.md"
COLUMNS = ["Name", "End", "Python", "Shown by", "Deviation"]

# The contract: every name that KMCL has, by endpoint. Written down here so that nothing can be dropped unnoticed.
NAMES = {
    "B": """
        VmbChannelAllocate VmbChannelInitSetFlags VmbChannelInitSetMaximumPacketSize
        VmbChannelInitSetMaximumExternalData VmbChannelInitSetClientContextSize
        VmbChannelInitSetProcessPacketCallbacks VmbChannelInitSetStateChangeCallbacks VmbChannelInitSetFriendlyName
        VmbChannelEnable VmbChannelDisable VmbChannelStart VmbChannelPause VmbChannelCleanup
        VmbChannelSetPointer VmbChannelGetPointer VmbChannelSetTransactionQuota
        VmbChannelSetIncomingProcessingAtPassive VmbChannelGetInterfaceInstance VmbChannelSizeofPacket
        VmbPacketAllocate VmbPacketInitialize VmbPacketFree VmbPacketSetPointer VmbPacketGetPointer
        VmbPacketGetChannel VmbPacketSetCompletionRoutine VmbPacketSend VmbPacketSendWithExternalMdl
        VmbPacketSendWithExternalPfns VmbChannelSendSynchronousRequest
        VmbChannelPacketComplete VmbChannelPacketFail VmbChannelPacketDeferToPassive VmbChannelPacketGetExternalData
        EvtVmbChannelOpened EvtVmbChannelClosed EvtVmbChannelSuspend EvtVmbChannelStarted EvtVmbChannelPostStarted
        EvtVmbChannelProcessPacket EvtVmbChannelProcessingComplete EvtVmbPacketCompletionRoutine""",
    "S": """
        VmbServerChannelInitSetFlags VmbServerChannelInitSetMmioMegabytes VmbServerChannelInitSetTargetInterfaceId
        VmbServerChannelInitSetTargetVtl VmbServerChannelInitSetSaveRestorePacketCallbacks
        VmbServerChannelInitSetVmbusHandle VmbConvertVmbusHandleToKernelHandle
        VmbPacketRestore VmbChannelMapGpadl VmbChannelUnmapGpadl
        VmbChannelSaveBegin VmbChannelSaveContinue VmbChannelSaveEnd VmbChannelRestoreFromBuffer
        EvtVmbChannelSavePacket EvtVmbChannelRestorePacket""",
    "C": """
        VmbClientChannelInitSetTargetPnp VmbClientChannelInitSetRingBufferPageCount VmbChannelSetInterruptLatency
        VmbChannelGetMmioSpace
        VmbChannelCreateGpadlFromBuffer VmbChannelCreateGpadlFromMdl VmbChannelDeleteGpadl
        EvtVmbChannelPnpFailure""",
}
ENDPOINTS = {name: end for end, names in NAMES.items() for name in names.split()}
ENTRIES = {**ddi.FUNCTIONS, **ddi.CALLBACKS}


@cache
def rows() -> dict[str, dict[str, str]]:
    """The page's rows by name."""
    found: dict[str, dict[str, str]] = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            assert len(cells) == len(COLUMNS), line
            row = dict(zip(COLUMNS, cells, strict=True))
            name = row["Name"].strip("`")
            assert name not in found, f"{name} has two rows"
            found[name] = row
    return found


@cache
def functions_of(file: str) -> set[str]:
    """The test functions in a file of this directory."""
    tree = ast.parse((TESTS / file).read_text())
    return {one.name for one in tree.body if isinstance(one, ast.FunctionDef) and one.name.startswith("test_")}


def test_nothing_of_the_contract_is_missing_and_nothing_else_there() -> None:
    assert set(rows()) == set(ENTRIES) == set(ENDPOINTS)
    defined = {name for name, one in vars(ddi).items() if name.startswith("Vmb") and inspect.isfunction(one)}
    assert defined == set(ddi.FUNCTIONS)


@pytest.mark.parametrize("name", ENDPOINTS)
def test_a_row_says_what_the_code_says_and_has_tests_that_exist(name: str) -> None:
    row, entry = rows()[name], ENTRIES[name]
    assert row["End"] == entry.endpoint == ENDPOINTS[name]
    assert row["Python"].replace("`", "") == entry.counterpart
    assert row["Deviation"] == (entry.deviation or "none")
    assert getattr(ddi, name) is not None
    assert name.startswith("Evt") == (name in ddi.CALLBACKS)
    for shown in row["Shown by"].split(", "):
        file, _, test = shown.strip("`").partition("::")
        assert file in ("test_kmcl.py", "test_kmcl_calls.py", "test_ddi.py")
        assert test in functions_of(file), f"{file} has no {test}"
