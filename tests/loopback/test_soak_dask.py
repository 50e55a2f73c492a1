"""A soak campaign on the machines of a Dask scheduler: the same records, whatever happens to a machine."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from support import pace
from support.dask_cluster import Checkout, Cluster
from support.pace import eventually
from support.processes import alive
from support.soak import Script, Sitting, episodes, events, read
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.soak import remote
from vmbus.soak.dask import DaskEngine
from vmbus.soak.folder import read_state
from vmbus.soak.records import EpisodeRecord, OperationRecord

GOOD: list[list[Any]] = [["phase", "boot"], ["operation"], ["sample"], ["event", "hello"], ["operation"]]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def cluster(tmp_path: Path, checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(remote, "code_digest", lambda: checkout.digest)
    return Cluster(tmp_path, checkout)


async def connect(cluster: Cluster) -> DaskEngine:
    return await DaskEngine.connect(cluster.address, beat=0.2, patience=3.0)


async def sit(folder: Path, cluster: Cluster, row: Script) -> str:
    engine = await connect(cluster)
    try:
        return await Sitting(folder, row, engine=engine)()
    finally:
        await engine.close()


def operations(folder: Path) -> list[tuple[int, int]]:
    return sorted((record.episode, record.number) for record in read(folder, OperationRecord))


def test_a_campaign_over_two_workers(tmp_path: Path, cluster: Cluster) -> None:
    """Passes, failures with their files, and nothing twice."""
    folder = tmp_path / "campaign"
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    failing = [["operation"], ["file", "a.log", 5000], ["log", "last words"], ["fail", "a packet was lost"]]
    row = Script(
        [["touch", here], ["wait-for", there], *GOOD],
        [["touch", there], ["wait-for", here], *GOOD],
        failing,
        [["operation"], ["die", "SIGKILL"]],
        GOOD,
    )

    async def body() -> str:
        async with cluster:
            await cluster.worker()
            await cluster.worker()
            return await sit(folder, cluster, row)

    assert asyncio.run(body()) == "failed"
    found = episodes(folder)
    assert [found[number].verdict for number in range(5)] == ["passed", "passed", "failed", "failed", "passed"]
    assert {record.where for record in found.values()} == {"worker-0", "worker-1"}
    assert operations(folder) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0), (4, 0), (4, 1)]
    assert events(folder).count("hello") == 3
    assert found[2].failure == "a packet was lost" and "was killed by SIGKILL" in found[3].failure
    kept = folder / found[2].kept
    assert (kept / "a.log").stat().st_size == 5000 and (kept / "worker.log").read_text() == "last words\n"
    assert (kept / "a.log").stat().st_mode & 0o777 == 0o600
    assert not any((tmp_path / "vmbus-soak").iterdir())  # nothing is left there


def test_a_worker_that_is_killed_costs_nothing(tmp_path: Path, cluster: Cluster) -> None:
    """Its episode is run again elsewhere; what it had said is kept, and is not there twice."""
    folder, marker, go = tmp_path / "campaign", tmp_path / "marker", tmp_path / "go"
    row = Script([*GOOD, ["pid", str(marker)], ["wait-for", str(go)], ["operation"]])

    async def body() -> str:
        async with cluster:
            first = await cluster.worker()
            running = asyncio.create_task(sit(folder, cluster, row))
            await eventually(marker.exists, "the episode's marker")
            await eventually(lambda: len(operations(folder)) == 2, "the operations, live")
            process = int(marker.read_text())
            os.kill(first.pid, signal.SIGKILL)
            await eventually(lambda: not alive(process), "the end of the episode's process")
            go.touch()
            await cluster.worker()
            return await asyncio.wait_for(running, pace.seconds(60))

    assert asyncio.run(body()) == "passed"
    assert [record.where for record in read(folder, EpisodeRecord)] == ["worker-1"]
    assert set(operations(folder)) == {(0, 0), (0, 1), (0, 2)}


def test_interrupted_gone_on_with_and_gone(tmp_path: Path, cluster: Cluster) -> None:
    """Nobody tells the worker of a campaign that is gone: that its sign of life is missing has to be enough."""
    folder, marker, go = tmp_path / "campaign", tmp_path / "marker", tmp_path / "go"
    row = Script(GOOD, [["operation"], ["touch", str(marker)], ["wait-for", str(go)], ["operation"]])

    async def interrupted() -> None:
        engine = await connect(cluster)
        sitting = Sitting(folder, row, engine=engine)
        running = asyncio.create_task(sitting())
        await eventually(marker.exists, "the episode's marker")
        sitting.run.interrupt()
        assert await asyncio.wait_for(running, pace.seconds(30)) == "interrupted"
        await engine.close()
        assert [record.verdict for record in read(folder, EpisodeRecord)] == ["passed", "interrupted"]

    async def gone() -> None:
        pid = tmp_path / "pid"
        engine = await connect(cluster)
        sitting = Sitting(tmp_path / "gone", Script([["pid", str(pid)], ["hang"]]), engine=engine)
        running = asyncio.create_task(sitting())
        await eventually(pid.exists, "the episode's process")
        assert engine._beating is not None
        engine._beating.cancel()  # as if it were killed
        await eventually(lambda: not alive(int(pid.read_text())), "the end of the episode's process", 20)
        running.cancel()
        await asyncio.wait({running}, timeout=pace.seconds(30))
        await engine.close()

    async def body() -> None:
        async with cluster:
            await cluster.worker()
            await interrupted()
            go.touch()
            assert await sit(folder, cluster, row) == "passed"
            await gone()

    asyncio.run(body())
    assert {number: record.verdict for number, record in episodes(folder).items()} == {0: "passed", 1: "passed"}


def test_a_scheduler_that_dies_is_an_interruption(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmbus.soak.dask.CONNECT_TIMEOUT", 5.0)
    folder, marker = tmp_path / "campaign", tmp_path / "marker"
    row = Script(GOOD, [["operation"], ["touch", str(marker)], ["hang"]])

    async def body() -> str:
        async with cluster:
            await cluster.worker()
            running = asyncio.create_task(sit(folder, cluster, row))
            await eventually(marker.exists, "the episode's marker")
            assert cluster.scheduler is not None
            os.kill(cluster.scheduler.pid, signal.SIGKILL)
            return await asyncio.wait_for(running, pace.seconds(90))

    assert asyncio.run(body()) == "interrupted"
    assert [record.verdict for record in read(folder, EpisodeRecord)] == ["passed"]
    assert re.search(
        r"the Dask scheduler tcp://127.0.0.1:\d+ (has lost episode 1|does not answer)", read_state(folder).reason
    )


def test_workers_that_cannot_do_it_are_refused(cluster: Cluster) -> None:
    async def body() -> None:
        async with cluster:
            worker = await cluster.worker(project=False)
            with pytest.raises(EnvironmentProblem, match=r"cannot import the project .*start it in a checkout"):
                await connect(cluster)
            await worker.stop(10)
            await cluster.worker()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(remote, "code_digest", lambda: "0123")
                with pytest.raises(
                    EnvironmentProblem, match=r"runs other sources of the project .* than this campaign \(0123\)"
                ):
                    await connect(cluster)

    asyncio.run(body())


def test_no_scheduler_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmbus.soak.dask.CONNECT_TIMEOUT", 1.0)
    with pytest.raises(EnvironmentProblem, match=r"cannot connect to the Dask scheduler tcp://127\.0"):
        asyncio.run(DaskEngine.connect("tcp://127.0.0.1:1"))
    with pytest.raises(EnvironmentProblem, match="cannot connect to the Dask scheduler nonsense://"):
        asyncio.run(DaskEngine.connect("nonsense://x"))


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", ""])
def test_a_file_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="outside of its folder"):
        remote.unpack([remote.File(name, b"")], tmp_path)
