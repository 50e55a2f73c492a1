"""The provider of sockets in the kit: its contract, its paths, its times; the host's ends are real unix sockets."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from support.vsock import accept, call, listen, take
from vmbus.bus.connects import CONNECTION_REFUSED
from vmbus.errors import UsageError
from vmbus.providers.vsock import VsockProvider
from vmbus.providers.vsock.provider import GUEST_SECONDS, HOST_SECONDS, LINE_SECONDS, MOST_CONNECTIONS
from vmbus.providers.vsock.streams import connect
from vmbus.testkit import ProviderTest
from vmbus.wire import hvsock

SERVICE = hvsock.service_of(80)


def path_of(kit: ProviderTest) -> Path:
    return Path(str(kit.provider.status()["socket"]))


def test_a_connection_of_the_guests() -> None:
    with ProviderTest(VsockProvider) as kit:
        assert kit.request_channel(UUID(int=1), UUID(int=2)) == CONNECTION_REFUSED
        assert kit.channels == []
        with listen(path_of(kit), 80) as listener:
            assert kit.request_channel(SERVICE, UUID(int=3)) is None
            (channel,) = kit.channels
            assert (channel.interface_type, channel.interface_instance) == (SERVICE, UUID(int=3))
            guest = kit.open(SERVICE)
            host = accept(listener)
            assert host is not None
        guest.send(hvsock.pack(b"hello"), wait_for_completion=False)
        kit.run()
        got = bytearray()
        assert take(host, got) and got == b"hello"
        host.sendall(b"hi")
        host.close()
        assert [hvsock.unpack(guest.receive().payload) for _ in range(2)] == [b"hi", b""]
        guest.send(hvsock.FIN, wait_for_completion=False)
        kit.advance(0.1)
        assert kit.channels == [] and not guest.is_open
        assert kit.provider.status()["unreleased"] == 0


def test_what_is_refused_is_counted() -> None:
    """A guest where nobody listens, a program where the guest does not, and lines that are none."""
    with ProviderTest(VsockProvider) as kit:
        assert kit.request_channel(SERVICE, UUID(int=3)) is None
        guest = kit.open(SERVICE)
        assert hvsock.unpack(guest.receive().payload) == b""
        guest.send(hvsock.FIN, wait_for_completion=False)
        lines = (b"\n", b"connect 1\n", b"CONNECT 4294967296\n", b"C" * 40)
        hosts = [call(path_of(kit), 4711), *(call(path_of(kit), line) for line in lines)]
        kit.advance(HOST_SECONDS + 0.1)
        assert not any(take(host, bytearray()) for host in hosts) and kit.channels == []
        counted = {name: kit.provider.status()[name] for name in ("refused_by_host", "refused_by_guest", "turned_away")}
        assert counted == {"refused_by_host": 1, "refused_by_guest": 1, "turned_away": len(lines)}
        for host in hosts:
            host.close()


def test_times() -> None:
    with ProviderTest(VsockProvider) as kit:
        host, silent = call(path_of(kit), 80), call(path_of(kit), b"CONN")
        kit.advance(HOST_SECONDS - 0.1)
        assert len(kit.channels) == 1 and take(host, bytearray())
        kit.advance(0.2)
        assert kit.channels == [] and not take(host, bytearray())
        assert kit.request_channel(SERVICE, uuid4()) is None
        kit.advance(GUEST_SECONDS - 0.1)
        assert len(kit.channels) == 1
        kit.advance(0.2)
        assert kit.channels == []
        kit.advance(LINE_SECONDS)
        assert not take(silent, bytearray())
        assert kit.provider.status()["connecting"] == kit.provider.status()["unreleased"] == 0
        host.close()
        silent.close()


def test_a_save_and_restore_with_everything_there_is() -> None:
    """The contract too: descriptors, timers, the same channels from the same options."""
    with ProviderTest(VsockProvider) as kit:
        host = call(path_of(kit), 80)
        kit.run()
        guest = kit.open(SERVICE)
        said = bytearray()
        assert take(host, said) and said.startswith(b"OK ")
        with guest.away():
            host.sendall(bytes(100_000))
            kit.run()
        kit.request_channel(hvsock.service_of(81), uuid4())
        waiting, silent = call(path_of(kit), 82), call(path_of(kit), b"C")
        kit.run()
        assert kit.provider.status()["connecting"] == 3
        assert kit.save_restore().state == b""
        assert not guest.is_open and kit.channels == []
        for end in (host, waiting, silent):
            assert not take(end, bytearray())
            end.close()
        assert path_of(kit).exists() and kit.provider.status()["connecting"] == 0
        assert kit.check_refuses(b"x")


def test_what_the_end_leaves() -> None:
    with ProviderTest(VsockProvider) as kit:
        ends = [call(path_of(kit), 80) for _ in range(5)] + [call(path_of(kit), b"") for _ in range(5)]
        kit.run()
        kit.open(kit.channels[0].interface_type if len(kit.channels) == 1 else 0)
        path = path_of(kit)
    assert not path.exists()
    for end in ends:
        got = bytearray()
        assert not take(end, got), "no descriptor is left open"
        end.close()


def test_as_many_as_there_may_be() -> None:
    with ProviderTest(VsockProvider) as kit:
        ends = []
        while len(ends) < MOST_CONNECTIONS + 10:
            ends += [call(path_of(kit), b"") for _ in range(50)]
            kit.run()
        assert kit.provider.bounds()["connections"][:2] == (MOST_CONNECTIONS, MOST_CONNECTIONS)
        assert kit.request_channel(SERVICE, uuid4()) == CONNECTION_REFUSED
        for end in ends:
            end.close()
        kit.run()
        assert kit.provider.status()["connecting"] == 0
        assert kit.request_channel(SERVICE, uuid4()) is None
        kit.advance(GUEST_SECONDS + 1)


# ---- paths -----------------------------------------------------------------------------------------------------------


def test_a_program_of_another_user_is_not_talked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "v.sock"
    assert connect(path, 80) is None
    with listen(path, 80) as listener:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        monkeypatch.setattr("vmbus.providers.vsock.streams._UCRED", Someone())
        assert connect(path, 80) is None
        taken = accept(listener)
        assert taken is not None and not take(taken, bytearray())
        taken.close()


class Someone:
    """Credentials of a user who is neither we nor root."""

    size = 12

    def unpack(self, data: bytes) -> tuple[int, int, int]:
        return 1, 4711, 4711


def test_options() -> None:
    with pytest.raises(UsageError, match="not an absolute one"):
        ProviderTest(VsockProvider, options={"path": "v.sock"})
    with pytest.raises(UsageError, match="107: choose a shorter `path`"):
        ProviderTest(VsockProvider, options={"path": "/" + 96 * "x"})
    with pytest.raises(UsageError, match="port"):
        ProviderTest(VsockProvider, options={"port": 7})
