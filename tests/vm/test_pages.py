"""What the pages type on a guest's console is typed there: it succeeds, and prints what they say."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from support.console_lines import CHECKOUT, PROMPT, Story, shape, stories
from vmbus.errors import WaitTimeout
from vmbus.operations.machine import VirtualMachine
from vmbus.vm.command_line import Programs
from vmbus.vm.description import load_description
from vmbus.vm.run_directory import RunDirectory

BY_VM = {
    name: [story for story in stories() if story.name == name]
    for name in sorted({story.name for story in stories() if not story.sudo})
}
"""What needs root needs an interface of the host's, too: the tests of the card have their own."""


class Console:
    """The shell on a VM's console."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._seen = ""

    async def _until(self, text: str, seconds: float = 60.0) -> str:
        try:
            async with asyncio.timeout(seconds):
                while text not in self._seen:
                    self._seen += (await self._reader.read(65536)).decode(errors="replace").replace("\r", "")
        except TimeoutError:
            raise WaitTimeout(f"{text!r} on the console, which said {self._seen[-1000:]!r}", seconds) from None
        before, _, self._seen = self._seen.partition(text)
        return before

    async def begin(self) -> None:
        """Take the shell, whatever it has printed until now."""
        self._writer.write(b"echo begin-$((20 + 22))\r")
        await self._until("begin-42")
        await self._until(PROMPT)

    async def run(self, command: str) -> tuple[int, list[str]]:
        """Type a line as it stands there; its status and what it printed."""
        # What is typed is shown, too, in lines as long as the terminal's; the prompt comes behind what it printed.
        self._writer.write(command.encode() + b"\r")
        printed = await self._until(PROMPT)
        self._writer.write(b'echo "status=$?"\r')
        told = await self._until(PROMPT)
        status = re.search(r"^status=(\d+)", told, re.MULTILINE)
        assert status is not None, (printed, told)
        return int(status[1]), printed.splitlines()


async def _typed(console: Console, story: Story) -> None:
    for line in story.lines:
        status, printed = await console.run(line.command)
        assert status == 0, f"{story.page}: {line.command}: status {status}: {printed}"
        shapes = {shape(one) for one in printed}
        missing = [one for one in line.prints if shape(one) not in shapes]
        assert not missing, f"{story.page}: {line.command} did not print {missing}, but {printed}"


@pytest.mark.parametrize("name", BY_VM)
async def test_fault_n3_what_a_page_types_in_a_guest_is_right(
    name: str, programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMBUS_DISKS", str(tmp_path))
    description = load_description(CHECKOUT / "qemu_configs" / f"{name}.toml")

    directory = RunDirectory.create(description.name)
    # as booted: the pages start it so, and look at what its kernel has said
    async with await VirtualMachine.launch(description, programs, directory) as vm:  # as booted: as the pages do
        reader, writer = await asyncio.open_unix_connection(str(vm.paths.console))
        console = Console(reader, writer)
        await vm.wait_ready()
        await console.begin()
        for story in BY_VM[name]:
            await _typed(console, story)
        writer.close()
