"""A provider that is written against `vmbus.kmcl.ddi` alone, through a live save and a restore in fresh processes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from support.boot import boot
from vmbus.device import saved
from vmbus.kmcl.saved import PacketChunk, decode_chunk
from vmbus.snapshot.manifest import STATE
from vmbus.testkit.story import Story, run_story
from vmbus.vm.command_line import Programs
from vmbus.vm.description import load_description

pytestmark = pytest.mark.vm

CHECKOUT = Path(__file__).resolve().parents[2]
Run = Callable[[Coroutine[Any, Any, Any]], Any]


def test_a_provider_on_the_ddi_survives_a_live_save_and_a_restore(run: Run, programs: Programs, tmp_path: Path) -> None:
    description = load_description(CHECKOUT / "qemu_configs" / "ddi.toml")
    story = Story(packets=256, live=True, echo_count=4_000, burst_count=12_000)
    figures = run(run_story(story, description, programs, tmp_path / "snapshot", boot=boot))
    print(
        f"in flight {figures.in_flight}, restored {figures.restored_by_state}; {figures.transactions} transactions, "
        f"{figures.completed} completed, {figures.lost} lost, {figures.duplicated} duplicated, "
        f"{figures.reordered} reordered, {figures.corrupted} corrupted; seconds {figures.seconds}"
    )
    assert figures.verdict == "pass", figures.reasons
    assert min(figures.in_flight["queued"], figures.in_flight["sent"]) >= 256
    # Each packet went through EvtVmbChannelSavePacket, and each came back through EvtVmbChannelRestorePacket.
    state = saved.decode((tmp_path / "snapshot" / STATE).read_bytes())
    assert {record.name: record.kind for record in state.providers}["burst"] == "ddi-burst"
    chunks = [decode_chunk(chunk) for record in state.channels for chunk in record.chunks]
    assert {len(chunk.save) for chunk in chunks if isinstance(chunk, PacketChunk)} == {24}
    assert figures.rebuilt_by_provider == figures.packets_saved
    assert figures.completed == figures.transactions > 16_000
    assert not (figures.lost or figures.duplicated or figures.reordered or figures.corrupted)
    assert figures.flushed_pages > 0
