"""The examples at the end of each command's help."""

from __future__ import annotations

import click

from vmbus.places import spelled

EXAMPLES = {
    "agent": ("agent run echo count=1000", "agent jobs --json"),
    "attach": ("attach --qmp /tmp/qmp.sock --control /tmp/vmbus.sock.control --name mine",),
    "audit": ("audit /tmp/records",),
    "bench": ("bench --quick --only host --json figures.json",),
    "capture": ("capture -o traffic.pcapng --seconds 10",),
    "capture frames": ("capture frames traffic.pcapng -o frames.pcapng",),
    "capture record": ("capture record demo -o traffic.pcapng --packets 1000",),
    "capture replay": ("capture replay traffic.pcapng --provider echo --channel echo",),
    "capture show": ("capture show traffic.pcapng --count 20",),
    "certificates": ("certificates pki a,192.0.2.1 b,192.0.2.2",),
    "checkpoint": ("checkpoint before-upgrade", "checkpoint --list --json"),
    "completion": ("completion bash",),
    "console": ("console demo --read-only",),
    "demo": ("demo --packets 1000",),
    "inspect": ("inspect demo --channel echo", "inspect diff /tmp/before /tmp/after"),
    "list": ("list --json",),
    "migrate": ("migrate demo tcp:other.example:7000 --secret-file secret",),
    "network": ("network debian-network --user alice",),
    "new-provider": ("new-provider door_bell /tmp/door_bell",),
    "provider": ("provider services kvp-set key=role value=web",),
    "restore": ("restore /tmp/snapshot --detach", "restore /tmp/snapshot --count 3 --name clone"),
    "revert": ("revert before-upgrade",),
    "run-vm": ("run-vm linux --detach", "run-vm --drive echo:count=1000 --audit /tmp/records"),
    "save": ("save --live --keep /tmp/snapshot",),
    "serve": ("serve device.json --socket /tmp/vmbus.sock",),
    "setup": ("setup --check",),
    "soak": ("soak --for 8h --report night",),
    "ssh": ("ssh cat /etc/debian_version",),
    "stop": ("stop demo --timeout 120",),
}
"""By the command's name, words of it; each is called as it is here."""


def add_examples(command: click.Command, name: str) -> None:
    """Ends a command's help, and that of its commands, with their examples."""
    if isinstance(command, click.Group):
        for own, one in command.commands.items():
            add_examples(one, f"{name} {own}")
    lines = [f"  {spelled(f'scripts/{words}')}" for words in EXAMPLES.get(name, ())]
    if lines:
        command.epilog = "\n".join(["\b", "Example:" if len(lines) == 1 else "Examples:", *lines])
