"""Children that die with us and say why they died."""

from __future__ import annotations

import asyncio
import os
import re
import stat
from pathlib import Path

import pytest

from vmbus.errors import EnvironmentProblem, WaitTimeout
from vmbus.vm.process import Child, ProcessDied, log_tail

SHELL = "/bin/sh"


async def spawn(tmp_path: Path, script: str) -> Child:
    return await Child.spawn("the child", [SHELL, "-c", script], tmp_path / "child.log")


async def forever() -> None:
    await asyncio.Event().wait()


async def test_a_wait_ends_with_the_child_and_shows_its_last_words(tmp_path: Path) -> None:
    child = await spawn(tmp_path, "echo first; echo broken pipe of dreams >&2; exit 3")
    with pytest.raises(ProcessDied) as caught:
        await child.guard(forever(), "a sign of life", 30)
    assert "the child ended with status 3 while we waited for a sign of life" in str(caught.value)
    assert "broken pipe of dreams" in str(caught.value)


async def test_a_wait_is_bounded_and_says_for_what(tmp_path: Path) -> None:
    child = await spawn(tmp_path, "exec sleep 60")
    with pytest.raises(WaitTimeout, match="a sign of life"):
        await child.guard(forever(), "a sign of life", 0.05)
    await child.stop()
    assert not child.running


async def test_work_that_ends_gives_its_result_or_its_error(tmp_path: Path) -> None:
    async def fail() -> None:
        raise EnvironmentProblem("of its own")

    async def answer() -> int:
        return 42

    child = await spawn(tmp_path, "exec sleep 60")
    try:
        assert await child.guard(answer(), "an answer", 5) == 42
        with pytest.raises(EnvironmentProblem, match="of its own"):
            await child.guard(fail(), "a failure", 5)
    finally:
        await child.stop()


def test_a_broken_connection_is_explained_by_the_death_behind_it(tmp_path: Path) -> None:
    async def body() -> None:
        child = await spawn(tmp_path, "read x < gate; echo out of luck; kill -SEGV $$")

        async def connection() -> None:
            gate.write_text("\n")
            raise ConnectionResetError

        with pytest.raises(ProcessDied, match=r"was killed by SIGSEGV(.|\n)*out of luck") as caught:
            await child.guard(connection(), "an answer", 30)
        assert isinstance(caught.value.__cause__, ConnectionResetError)

    gate = tmp_path / "gate"
    os.mkfifo(gate)
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        asyncio.run(body())
    finally:
        os.chdir(before)


async def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    child = await Child.spawn("nothing", ["/no/such/program"], tmp_path / "log")
    with pytest.raises(ProcessDied, match="cannot start /no/such/program: No such file"):
        await child.guard(forever(), "a sign of life", 30)


async def test_logs_are_private(tmp_path: Path) -> None:
    child = await spawn(tmp_path, "umask")
    assert await child.exited == 0
    assert stat.S_IMODE((tmp_path / "child.log").stat().st_mode) == 0o600
    assert (tmp_path / "child.log").read_text() == "0077\n"


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {number}\n" for number in range(5000)))
    assert log_tail(log, 2) == "    line 4998\n    line 4999"
    assert log_tail(tmp_path / "absent") == ""


async def test_a_death_without_a_reason_of_its_own_is_explained_by_the_witness(tmp_path: Path) -> None:
    console = tmp_path / "console.log"
    console.write_text("Kernel panic - not syncing: out of tea\n")
    child = await spawn(tmp_path, "exit 0")
    child.witness = ("the guest's console", console)
    await child.exited
    assert re.search(r"ended with status 0(.|\n)*the guest's console:\n.*out of tea", str(child.death()))
    console.write_text("")
    assert "the guest's console is empty" in str(child.death())
