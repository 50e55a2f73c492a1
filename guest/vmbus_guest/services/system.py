"""What the integration service does to the guest's system: its clock, its end, what is known about it."""

from __future__ import annotations

import os
import socket
import struct
import time

from vmbus.errors import EnvironmentProblem

_SIOCGIFADDR = 0x8915


class LinuxSystem:
    """The machine that this runs on. Made only in one of our guests: elsewhere it would be the user's own machine whose
    clock is set, and that is switched off.

    Raises EnvironmentProblem anywhere else.
    """

    def __init__(self, command_line: str | None = None) -> None:
        if command_line is None:
            with open("/proc/cmdline", encoding="ascii", errors="replace") as file:  # noqa: PTH123
                command_line = file.read()
        if "rdinit=/init" not in command_line.split():
            raise EnvironmentProblem("the integration service sets clocks and switches machines off: only in a guest")

    def now(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def set_clock(self, seconds: float) -> None:
        """Set the time of day. Raises OSError."""
        time.clock_settime(time.CLOCK_REALTIME, seconds)

    def end(self, *, restart: bool, force: bool) -> None:
        """Switch the machine off, or start it again. Returns; init does it in a moment, unless it is forced."""
        command = ["reboot" if restart else "poweroff"]
        if force:
            os.sync()
            command.append("-f")
        os.posix_spawn("/bin/busybox", command, os.environ)

    def facts(self) -> dict[str, str]:
        """What the host may know, under the names that Linux's own daemon uses."""
        uname = os.uname()
        major, _, minor = uname.release.partition(".")
        return {
            "FullyQualifiedDomainName": uname.nodename,
            "IntegrationServicesVersion": "1",
            "NetworkAddressIPv4": ";".join(_addresses_4()),
            "NetworkAddressIPv6": ";".join(_addresses_6()),
            "OSBuildNumber": uname.release,
            "OSName": uname.sysname,
            "OSMajorVersion": major,
            "OSMinorVersion": minor.partition(".")[0],
            "OSVersion": uname.version,
            "ProcessorArchitecture": uname.machine,
        }


def _addresses_4() -> list[str]:
    """Of all interfaces but the loopback; an interface without an address has none."""
    from fcntl import ioctl

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            address = socket.inet_ntoa(answer[20:24])
            if not address.startswith("127."):
                found.append(address)
    return found


def _addresses_6() -> list[str]:
    try:
        with open("/proc/net/if_inet6", encoding="ascii") as file:  # noqa: PTH123
            lines = [line.split() for line in file]
    except OSError:
        return []
    addresses = [socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line[0])) for line in lines if len(line) > 5]
    return [address for address in addresses if address != "::1"]
