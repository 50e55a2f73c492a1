"""Linux's own hv_sock: AF_VSOCK in the guest, unix sockets on the host."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support import pace, vsock_guest
from support.boot import boot
from support.in_guest import require_no_complaints, shell
from vmbus.errors import WaitTimeout
from vmbus.operations.machine import VirtualMachine
from vmbus.testkit.moving import move
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription, load_description

pytestmark = [pytest.mark.vm, pytest.mark.long]

Note = Callable[[str], None]

CHECKOUT = Path(__file__).resolve().parents[2]
SIZE = 4 << 20
PORT, GUEST_PORT = 1024, 2048
COMPLAINTS = "hv_sock:|vsock:"


def described(cpus: int) -> VmDescription:
    """The machine of qemu_configs with its sockets alone."""
    plain = msgspec.to_builtins(load_description(CHECKOUT / "qemu_configs" / "linux.toml"))
    plain["cpus"] = cpus
    plain["device"]["providers"] = [one for one in plain["device"]["providers"] if one["kind"] == "vsock"]
    return msgspec.convert(plain, VmDescription)


class Machine:
    """A VM, and programs of its host's and its guest's."""

    def __init__(self, vm: VirtualMachine) -> None:
        self.vm = vm

    async def status(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.vm.call_server("status"))["providers"]["vsock"]
        return found

    async def until(self, condition: Callable[[dict[str, Any]], bool], what: str, seconds: float = 30.0) -> None:
        async def met() -> bool:
            return condition(await self.status())

        await pace.eventually(met, what, seconds, every=0.05)

    async def nothing_is_left(self) -> None:
        await self.until(
            lambda status: not any(status[name] for name in ("connections", "connecting", "ending", "unreleased")),
            "the guest to let go of its connections",
        )

    async def install(self) -> None:
        text = Path(vsock_guest.__file__).read_text()  # noqa: ASYNC240
        done = await self.vm.run_in_guest(["/bin/sh", "-c", 'printf %s "$1" > /tmp/vsock.py', "sh", text])
        assert done.code == 0, done

    async def guest(self, what: str, *arguments: int, timeout: float = 60.0) -> list[dict[str, Any]]:
        """A program in the guest, to its end."""
        done = await self.vm.run_in_guest(["python3", "/tmp/vsock.py", what, *map(str, arguments)], timeout=timeout)
        assert done.code == 0, done
        return [json.loads(line) for line in done.output.splitlines()]

    async def start(self, what: str, *arguments: int) -> None:
        """One that runs on, over saves too; returns when it has said something."""
        words = " ".join(map(str, arguments))
        await shell(self.vm, f"python3 /tmp/vsock.py {what} {words} < /dev/null > /tmp/{what} 2>&1 &")
        await self.said(what, 1)

    async def said(self, what: str, lines: int, seconds: float = 60.0) -> list[dict[str, Any]]:
        """What such a program has said, once it is so much."""
        seconds = pace.seconds(seconds)
        deadline = time.monotonic() + seconds
        while len(text := (await shell(self.vm, f"cat /tmp/{what}")).splitlines()) < lines:
            if time.monotonic() > deadline:
                raise WaitTimeout(f"{lines} lines of the program {what!r} in the guest; it said {text}", seconds)
            await asyncio.sleep(0.1)
        return [json.loads(line) for line in text]

    async def listen(
        self, port: int, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]
    ) -> asyncio.Server:
        return await asyncio.start_unix_server(serve, f"{(await self.status())['socket']}_{port}")

    async def call(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
        """A program of the host's that connects to the guest; what it is told, too."""
        reader, writer = await asyncio.open_unix_connection((await self.status())["socket"])
        writer.write(b"CONNECT %d\n" % port)
        return reader, writer, await asyncio.wait_for(reader.readline(), pace.seconds(10))

    async def devices(self) -> list[str]:
        return (await shell(self.vm, "ls /sys/bus/vmbus/devices")).split()


async def send_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


async def bytes_both_ways(machine: Machine) -> str:
    """Some MiB each way, from both ends, with their sums."""
    down = hashlib.shake_256(b"host").digest(SIZE)
    got = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        got = await reader.read()  # to the end of the guest's half
        writer.write(down)
        await writer.drain()
        writer.close()

    async with await machine.listen(PORT, serve):
        (answer,) = await machine.guest("connect", PORT, SIZE)
    assert got == hashlib.shake_256(b"guest").digest(SIZE)
    assert (answer["bytes"], answer["sum"]) == (SIZE, hashlib.sha256(down).hexdigest())

    await machine.start("echo", GUEST_PORT, 1)
    reader, writer, said = await machine.call(GUEST_PORT)
    assert said.startswith(b"OK "), said
    start = time.monotonic()

    async def send() -> None:
        writer.write(down)
        await writer.drain()
        writer.write_eof()

    _, back = await asyncio.gather(send(), reader.read())
    seconds = time.monotonic() - start
    assert back == down
    writer.close()
    assert (await machine.said("echo", 2))[1] == {"bytes": SIZE}
    return (
        f"{SIZE >> 20} MiB to the host and back in {answer['seconds']:.1f} s, "
        f"{SIZE >> 20} MiB to the guest and back at once in {seconds:.1f} s"
    )


async def refusals(machine: Machine) -> str:
    (answer,) = await machine.guest("refused", 9999)
    assert answer.get("bytes") == 0 and answer["seconds"] < pace.seconds(1.5), answer
    start = time.monotonic()
    _, writer, said = await machine.call(9999)
    seconds = time.monotonic() - start
    assert said == b"" and 1.5 < seconds < pace.seconds(4)
    writer.close()
    return f"refusals after {answer['seconds'] * 1000:.0f} ms by the host, {seconds:.1f} s by the guest"


async def many_connections(machine: Machine, count: int) -> str:
    """As many each way; then nothing is there that was not before."""
    await machine.nothing_is_left()
    before = await machine.devices()
    start = time.monotonic()
    async with await machine.listen(PORT, send_back):
        assert await machine.guest("many", PORT, count, timeout=120) == [{"right": count}]
    await machine.start("echo", GUEST_PORT, count)
    for number in range(count):
        reader, writer, said = await machine.call(GUEST_PORT)
        assert said.startswith(b"OK "), (number, said)
        writer.write(b"%d" % number)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), pace.seconds(20)) == b"%d" % number
        writer.close()
    await machine.said("echo", 2)
    await machine.nothing_is_left()
    deadline = time.monotonic() + pace.seconds(20)
    while sorted(await machine.devices()) != sorted(before):
        assert time.monotonic() < deadline, await machine.devices()
        await asyncio.sleep(0.1)
    return f"{2 * count} connections in {time.monotonic() - start:.1f} s"


class Held:
    """A connection each way, held by a program of the guest's."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.ends: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def begin(self) -> Held:
        machine = self.machine
        arrived = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.ends.append((reader, writer))
            arrived.set()

        async with await machine.listen(PORT, serve):
            await machine.start("hold", PORT, GUEST_PORT)
            await asyncio.wait_for(arrived.wait(), pace.seconds(20))
        reader, writer, said = await machine.call(GUEST_PORT)
        assert said.startswith(b"OK "), said
        self.ends.append((reader, writer))
        await machine.said("hold", 2)
        await self.talk(b"hello")
        return self

    async def talk(self, word: bytes) -> None:
        """They are alive."""
        for reader, writer in self.ends:
            writer.write(word)
            assert await asyncio.wait_for(reader.readexactly(len(word)), pace.seconds(20)) == word

    async def talk_until(self, work: asyncio.Task[Any]) -> int:
        """Bytes there and back on all connections until something else is done; how many."""
        count = 0
        while not work.done():
            word = random.Random(count).randbytes(100_000)
            await self.talk(word)
            count += len(word) * len(self.ends)
        await work
        return count

    async def end_at_the_host(self) -> None:
        for reader, writer in self.ends:
            assert await asyncio.wait_for(reader.read(), pace.seconds(20)) == b""
            writer.close()

    @staticmethod
    async def end_in_the_guest(machine: Machine) -> None:
        """Its program has read the end of both, and could send no more."""
        assert (await machine.said("hold", 4))[2:] == [{"ended": True, "error": "BrokenPipeError"}] * 2
        await machine.nothing_is_left()


async def still_works(machine: Machine) -> None:
    async with await machine.listen(PORT, send_back):
        assert await machine.guest("many", PORT, 5) == [{"right": 5}]
    await machine.start("echo", GUEST_PORT, 1)
    reader, writer, said = await machine.call(GUEST_PORT)
    writer.write(b"again")
    writer.write_eof()
    assert said.startswith(b"OK ") and await asyncio.wait_for(reader.read(), pace.seconds(20)) == b"again"
    writer.close()
    await machine.said("echo", 2)


async def test_vsock_of_linux(programs: Programs, tmp_path: Path, note: Note) -> None:
    async with await boot(described(2), programs) as vm:
        machine = Machine(vm)
        await machine.install()
        told = [await bytes_both_ways(machine), await refusals(machine), await many_connections(machine, 250)]
        held = await Held(machine).begin()
        moved = await held.talk_until(asyncio.create_task(vm.save(tmp_path / "live", live=True, keep=True)))
        await held.talk(b"the VM that runs on keeps its connections")
        told.append(f"{moved} bytes there and back during a live save")
        assert moved > 0
        await require_no_complaints(vm, COMPLAINTS)
    await held.end_at_the_host()

    async with await VirtualMachine.restore(tmp_path / "live", programs) as vm:
        await vm.wait_ready()
        machine = Machine(vm)
        await held.end_in_the_guest(machine)
        again = await Held(machine).begin()
        report = await vm.save(tmp_path / "stopped")
    await again.end_at_the_host()
    assert report.packets == {"queued": 0, "sent": 0}

    async with await VirtualMachine.restore(tmp_path / "stopped", programs) as vm:
        await vm.wait_ready()
        machine = Machine(vm)
        await again.end_in_the_guest(machine)
        third = await Held(machine).begin()
        destination, _ = await move(vm, programs=programs)
    await third.end_at_the_host()

    async with destination as vm:
        machine = Machine(vm)
        await third.end_in_the_guest(machine)
        await shell(vm, "rmmod hv_sock && insmod /lib/modules/hv_sock.ko")
        await still_works(machine)
        await require_no_complaints(vm, COMPLAINTS)
        status = await machine.status()
        assert status["wrong"] == status["lingered"] == 0
    note(f"hv_sock: {'; '.join(told)}; over a live save, a save and a live migration: closed at both ends")
