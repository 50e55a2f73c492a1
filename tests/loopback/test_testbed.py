"""Two hosts: they reach each other and nothing else; the link can be shaped and cut; nothing is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import pace
from support.pace import eventually
from vmbus.errors import EnvironmentProblem, WaitTimeout
from vmbus.testbed.hosts import Forbidden, Host, TwoHosts
from vmbus.vm.process import Child, ProcessDied

CHECKOUT = Path(__file__).resolve().parents[2]
PEER = CHECKOUT / "tests" / "support" / "peer.py"
PORT = 4000
SHELL = "/bin/sh"

Story = Callable[[TwoHosts], Coroutine[Any, Any, None]]


def with_hosts(story: Story, base: Path, *, timeout: float = 90.0, **options: Any) -> None:
    """Run a story on two fresh hosts; skip, with the reason, where there cannot be any."""

    async def body() -> None:
        async with await TwoHosts.create(base=base, **options) as hosts, asyncio.timeout(timeout):
            await story(hosts)

    try:
        asyncio.run(body())
    except Forbidden as error:
        pytest.skip(str(error))
    assert list(base.iterdir()) == []


async def server(host: Host) -> Child:
    child = await host.spawn("the peer", [sys.executable, "-I", "-S", str(PEER), "serve", str(PORT)])

    async def listens() -> bool:
        return "listening" in child.log.read_text()

    await child.guard(eventually(listens, "the peer to listen", 20), "the peer to listen", 21)
    return child


async def talk(host: Host, peer: Host, *words: str) -> Any:
    """What the peer program measured, from `host` to the server at `peer`."""
    command = [sys.executable, "-I", "-S", str(PEER), words[0], peer.address, str(PORT), *words[1:]]
    return json.loads(await host.run(command, timeout=60))


async def round_trip(host: Host, peer: Host, count: int = 20) -> float:
    return statistics.median(await talk(host, peer, "trips", str(count)))


def members(host: Host) -> set[int]:
    """Every process that lives in a host's network, as seen from outside."""
    wanted = (Path("/proc") / str(host.pid) / "ns" / "net").stat().st_ino
    return in_network(wanted)


@contextlib.contextmanager
def held(processes: Iterable[int]) -> Iterator[list[int]]:
    """The networks of processes by number, held open: else a new one, of another test's, could get the same number."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((Path("/proc") / str(pid) / "ns" / "net").open("rb")) for pid in processes]
        yield [os.fstat(file.fileno()).st_ino for file in files]


def in_network(inode: int) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "ns" / "net").stat().st_ino == inode:
                    found.add(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.parametrize("user_namespace", [None, True], ids=["as we are", "user namespace"])
def test_the_hosts_reach_each_other(tmp_path: Path, user_namespace: bool | None) -> None:
    async def story(hosts: TwoHosts) -> None:
        for here, there in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
            await server(there)
            trip = await round_trip(here, there)
            seconds = await talk(here, there, "send", "50000000")
            print(f"{here.name} to {there.name}: {1e6 * trip:.0f} us a round trip, {50 / seconds:.0f} MB/s")
            assert trip < 0.02
        # The fast link and a slow one, whatever made it slow.
        await hosts.shape(latency=0.03, rate=20e6, loss=0.01)
        assert await round_trip(hosts.a, hosts.b) > 0.06
        sent, received = await hosts.a.counters(), await hosts.b.counters()
        assert min(sent["sent"], received["received"]) > 50_000_000

    with_hosts(story, tmp_path, user_namespace=user_namespace)


def test_nothing_but_the_link_leads_out(tmp_path: Path) -> None:
    """A server on the machine itself is out of reach: of a host's loopback, and of its link."""

    async def story(hosts: TwoHosts) -> None:
        outside = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        port = outside.sockets[0].getsockname()[1]
        try:
            attempt = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
            with pytest.raises(ProcessDied, match="refused"):
                await hosts.a.run([sys.executable, "-I", "-S", "-c", attempt])
        finally:
            outside.close()
        interfaces = await hosts.a.run([SHELL, "-c", "tail -n +3 /proc/net/dev | cut -d: -f1"])
        assert sorted(interfaces.split()) == ["eth0", "lo"]

    with_hosts(story, tmp_path)


def test_files_sockets_and_processes_are_a_hosts_own(tmp_path: Path) -> None:
    async def story(hosts: TwoHosts) -> None:
        for directory in ("/tmp", "$TMPDIR", "$XDG_RUNTIME_DIR", "/var/tmp"):
            await hosts.a.run([SHELL, "-c", f"echo secret > {directory}/mine; test -e {directory}/mine"])
            await hosts.b.run([SHELL, "-c", f"test ! -e {directory}/mine"])
        assert hosts.a.path("/tmp/mine").read_text() == "secret\n"
        # What the machine has in its own directory for temporary files is out of their sight.
        await hosts.a.run([SHELL, "-c", f"test ! -e {tmp_path}"])
        # Programs and caches are the machine's.
        await hosts.a.run([sys.executable, "-c", "import msgspec, pyroute2"])
        sleeper = await hosts.a.spawn("a sleeper", ["/bin/sleep", "1000"])
        await eventually(lambda: _count(hosts.a, "sleep 1000", 1), "the program to run", 10)
        look = [SHELL, "-c", "grep -l sleep /proc/[0-9]*/comm || true"]
        assert [len((await host.run(look)).split()) for host in hosts.hosts] == [1, 0]
        assert sleeper.running

    with_hosts(story, tmp_path)
    assert not Path("/tmp/mine").exists()


def test_a_kept_path_is_seen_in_a_hidden_directory(tmp_path: Path) -> None:
    kept, base = tmp_path / "kept", tmp_path / "base"
    base.mkdir()
    kept.mkdir()
    (kept / "file").write_text("for all")

    async def story(hosts: TwoHosts) -> None:
        for host in hosts.hosts:
            assert await host.run(["/bin/cat", str(kept / "file")]) == "for all"
            await host.run([SHELL, "-c", f"test ! -e {base}"])

    with_hosts(story, base, keep=[kept])


def test_a_unix_socket_in_a_host_is_reached_from_outside(tmp_path: Path) -> None:
    program = (
        "import os, socket; s = socket.socket(socket.AF_UNIX); s.bind(os.environ['XDG_RUNTIME_DIR'] + '/s'); "
        "s.listen(); c, _ = s.accept(); c.sendall(b'hello'); c.close()"
    )

    async def story(hosts: TwoHosts) -> None:
        child = await hosts.b.spawn("a server", [sys.executable, "-I", "-S", "-c", program])
        path = hosts.b.path("/tmp/run/s")

        async def connects() -> bool:
            try:
                reader, writer = await asyncio.open_unix_connection(str(path))
            except OSError:
                return False
            assert await reader.read() == b"hello"
            writer.close()
            return True

        await child.guard(eventually(connects, "the socket", 20), "the socket", 21)

    with_hosts(story, tmp_path)


def test_latency_is_added_in_each_direction(tmp_path: Path) -> None:
    async def story(hosts: TwoHosts) -> None:
        await server(hosts.b)
        fast = min([await round_trip(hosts.a, hosts.b) for _ in range(5)])
        await hosts.shape(latency=0.05)
        slow = min([await round_trip(hosts.a, hosts.b, 5) for _ in range(5)])
        seconds = await talk(hosts.a, hosts.b, "send", "20000000")
        await hosts.shape()
        again = min([await round_trip(hosts.a, hosts.b) for _ in range(5)])
        print(
            f"round trip {1e3 * fast:.2f} ms, with 50 ms each way {1e3 * slow:.1f} ms (20 MB in {seconds:.2f} s), "
            f"then {1e3 * again:.2f} ms"
        )
        assert fast < 0.05 and again < 0.05
        assert 0.1 <= slow < 0.2
        assert seconds < pace.seconds(30)

    with_hosts(story, tmp_path)


@pytest.mark.parametrize("latency", [0.0, 0.01], ids=["rate alone", "rate and latency"])
def test_the_rate_is_limited(tmp_path: Path, latency: float) -> None:
    async def story(hosts: TwoHosts) -> None:
        await server(hosts.b)
        free = await talk(hosts.a, hosts.b, "send", "4000000")
        await hosts.shape(rate=2e6, latency=latency)
        limited = await talk(hosts.a, hosts.b, "send", "4000000")
        print(f"4 MB in {free:.3f} s, and in {limited:.3f} s at 2 MB/s")
        assert free < 1
        assert 1.4 < limited < 6

    with_hosts(story, tmp_path)


def test_losses_are_made_good_by_tcp_and_cost_time(tmp_path: Path) -> None:
    async def story(hosts: TwoHosts) -> None:
        await server(hosts.b)
        await hosts.shape(loss=0.05, rate=20e6)
        sent = (await hosts.a.counters())["sent"]
        await talk(hosts.a, hosts.b, "send", "2000000")
        received = (await hosts.b.counters())["received"]
        assert received >= 2_000_000
        assert (await hosts.a.counters())["sent"] > sent
        lossless = await talk(hosts.a, hosts.b, "trips", "100")
        assert max(lossless) > 0.05, "none of 200 packets was lost"

    with_hosts(story, tmp_path)


@pytest.mark.parametrize("latency", [0.0, 0.01], ids=["plain", "through the delay line"])
def test_a_cut_link_stops_every_byte_and_a_mended_one_goes_on(tmp_path: Path, latency: float) -> None:
    async def story(hosts: TwoHosts) -> None:
        await server(hosts.b)
        await hosts.shape(rate=10e6, latency=latency)
        transfer = asyncio.create_task(talk(hosts.a, hosts.b, "send", "12000000"))

        async def received() -> int:
            return (await hosts.b.counters())["received"]

        async def beyond(mark: int) -> bool:
            return await received() > mark

        await eventually(lambda: beyond(2_000_000), "bytes to arrive", 20)
        await hosts.cut()
        mark = await received()
        await asyncio.sleep(0.5)  # the time in which 5 MB would have come
        assert await received() == mark
        assert not transfer.done()
        await hosts.mend()
        await eventually(lambda: beyond(mark + 100_000), "bytes to arrive again", 30)
        print(f"cut at {mark} bytes; all arrived after {await transfer:.2f} s")

    with_hosts(story, tmp_path)


def test_a_program_ends_as_it_wants_and_with_its_host(tmp_path: Path) -> None:
    async def story(hosts: TwoHosts) -> None:
        with pytest.raises(ProcessDied, match=r"(?s)sh in host 'a' ended with status 7.*last straw"):
            await hosts.a.run([SHELL, "-c", "echo last straw; exit 7"])
        with pytest.raises(ProcessDied, match="killed by SIGSEGV"):
            await hosts.a.run([SHELL, "-c", "kill -SEGV $$"])
        with pytest.raises(ProcessDied, match="cannot start /no/such/program"):
            await hosts.a.run(["/no/such/program"])
        with pytest.raises(WaitTimeout, match="sleep 1000 to end"):
            await hosts.a.run(["/bin/sleep", "1000"], timeout=0.3)
        polite = await hosts.a.spawn(
            "polite", [SHELL, "-c", "trap 'exit 5' TERM; echo up; while :; do sleep 0.1; done"]
        )
        await eventually(lambda: _says(polite, "up"), "the program to run", 10)
        await polite.stop(grace=10)
        assert polite.exited.result() == 5
        # Killed from outside, it takes the program with it.
        other = await hosts.a.spawn("other", ["/bin/sleep", "1001"])
        await eventually(lambda: _count(hosts.a, "sleep 1001", 1), "the program to run", 10)
        os.kill(other.pid, signal.SIGKILL)
        await eventually(lambda: _count(hosts.a, "sleep 1001", 0), "the program to end", 10)
        # A host that ends takes everything in it along, daemons too.
        await hosts.b.run([SHELL, "-c", "setsid sleep 1002 > /dev/null 2>&1 &"])
        await eventually(lambda: _count(hosts.b, "sleep 1002", 1), "the daemon to run", 10)
        last = await hosts.b.spawn("last", ["/bin/sleep", "1003"])
        with held([hosts.b.pid]) as (network,):
            await hosts.b.end()
            assert in_network(network) == set()
        await asyncio.wait_for(asyncio.shield(last.exited), pace.seconds(10))
        with pytest.raises(EnvironmentProblem, match="host 'b'"):
            await hosts.b.counters()

    with_hosts(story, tmp_path)


async def _says(child: Child, word: str) -> bool:
    return word in child.log.read_text()


async def _count(host: Host, command: str, count: int) -> bool:
    return _running(host, command) == count


def _running(host: Host, command: str) -> int:
    found = 0
    for pid in members(host):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        found += line.startswith((f"/bin/{command}", command))
    return found


# ---- what a crash leaves ---------------------------------------------------------------------------------------------

OWNER = """
import asyncio, json, pathlib, sys
from vmbus.testbed.hosts import TwoHosts

async def main():
    hosts = await TwoHosts.create(base=pathlib.Path(sys.argv[1]))
    await hosts.a.spawn("a sleeper", ["/bin/sleep", "1000"])
    await hosts.b.run(["/bin/sh", "-c", "setsid sleep 1000 > /dev/null 2>&1 &"])
    await hosts.shape(latency=0.01)
    print(json.dumps([host.pid for host in hosts.hosts]), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_nothing_survives_an_owner_that_is_killed(tmp_path: Path) -> None:
    with_hosts(_slow_link, tmp_path)  # or this test is skipped, with the reason
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, start_new_session=True
    )
    with contextlib.ExitStack() as stack:
        try:
            assert owner.stdout is not None
            networks = stack.enter_context(held(json.loads(owner.stdout.readline())))
            assert all(len(in_network(inode)) >= 2 for inode in networks)
        finally:
            owner.kill()
            owner.wait(pace.seconds(10))
            if owner.stdout is not None:
                owner.stdout.close()
        deadline = time.monotonic() + pace.seconds(20)
        while left := set().union(*map(in_network, networks)):
            assert time.monotonic() < deadline, f"these processes survive their owner: {left}"
            time.sleep(0.01)
    # Its logs are still there, for whoever wants to know; the next start clears them away.
    (stale,) = tmp_path.iterdir()
    assert (stale / "owner.json").exists()
    (stale / "relic").touch()

    async def story(hosts: TwoHosts) -> None:
        assert not (stale / "relic").exists()
        assert json.loads((hosts.directory / "owner.json").read_bytes())["pid"] == os.getpid()

    with_hosts(story, tmp_path)


def test_two_pairs_of_hosts_at_a_time(tmp_path: Path) -> None:
    async def story(first: TwoHosts) -> None:
        async with await TwoHosts.create(base=tmp_path) as second:
            assert first.directory.path.exists() and first.directory.path != second.directory.path
            await server(second.b)
            assert await round_trip(second.a, second.b) < 0.1
            with pytest.raises(ProcessDied, match="refused"):  # the same address, on another link
                await talk(first.a, first.b, "trips", "1")

    with_hosts(story, tmp_path)


async def _nothing(hosts: TwoHosts) -> None:
    pass


async def _slow_link(hosts: TwoHosts) -> None:
    await hosts.shape(latency=0.01)


FORBIDDEN = """
import asyncio, ctypes, os, pathlib, sys
if len(sys.argv) == 2:  # no right to make namespaces from the next program on
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(24, 21, 0, 0, 0) != 0:
        sys.exit("cannot drop CAP_SYS_ADMIN")
    os.execv(sys.executable, [sys.executable, "-c", sys.orig_argv[2], sys.argv[1], "again"])
from vmbus.testbed.hosts import Forbidden, TwoHosts
try:
    asyncio.run(TwoHosts.create(base=pathlib.Path(sys.argv[1]), user_namespace=False))
except Forbidden as error:
    print(error)
"""


def test_a_machine_that_forbids_namespaces_is_told_apart(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORBIDDEN, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=pace.seconds(60),
    )
    assert "does not let us make host 'a': new network namespace: Operation not permitted" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []
