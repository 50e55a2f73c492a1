"""Where the sockets and logs of a VM are, for its owner and for tools that only talk to it."""

from __future__ import annotations

from pathlib import Path

from vmbus.vm.description import MOST_DEVICES


def numbered(file: str, index: int) -> str:
    """What a file of the first device (0) is called for the device of that number: ``server-2.log``."""
    stem, dot, suffix = file.rpartition(".")
    return file if index == 0 else f"{stem}-{index + 1}{dot}{suffix}" if dot else f"{file}-{index + 1}"


class Sockets:
    """Paths of a VM's sockets and logs in its run directory; `vfio` and `control` are the first device's. `stream`:
    QEMU's, of a VM that arrives there; `tunnel`: where QEMU's goes in when it leaves by TLS; `viewers`: the console for
    any number of them, where its owner serves it."""

    def __init__(self, run_directory: Path) -> None:
        self.vfio = run_directory / "vfio.sock"
        self.control = run_directory / "control.sock"
        self.qmp = run_directory / "qmp.sock"
        self.qmp_tools = run_directory / "qmp-tools.sock"
        self.agent = run_directory / "agent.sock"
        self.console = run_directory / "console.sock"
        self.console_log = run_directory / "console.log"
        self.stream = run_directory / "stream.sock"
        self.tunnel = run_directory / "tunnel.sock"
        self.supervisor = run_directory / "supervisor.sock"
        self.gdb = run_directory / "gdb.sock"
        self.viewers = run_directory / "viewers.sock"

    def vfio_of(self, index: int) -> Path:
        """Where QEMU has the device of that number."""
        return self.vfio.with_name(numbered(self.vfio.name, index))

    def control_of(self, index: int) -> Path:
        """Where tools have its server."""
        return self.control.with_name(numbered(self.control.name, index))

    @property
    def controls(self) -> list[Path]:
        """Those of a VM that runs, the first device's first."""
        found = map(self.control_of, range(MOST_DEVICES))
        return [path for path in found if path.is_socket()]
