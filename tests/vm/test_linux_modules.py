"""Conformance: every module of the guest's kernel that binds to VMBus devices, and which of them we offer."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

import vmbus.wire
from vmbus.providers import PROVIDERS
from vmbus.provision import provision
from vmbus.provision.cache import Cache
from vmbus.provision.guest_files import LINUX_DRIVERS, find_kernel

pytestmark = pytest.mark.vm  # no VM, but its kernel

PAGE = Path(__file__).resolve().parents[2] / "docs/linux-guest.md"
ROW = re.compile(r"^\| `(\w+)` \| ([0-9a-f-]{36}) \| [^|]+ \| (?:`(\w+)` )?\|$", re.MULTILINE)


def our_types() -> dict[str, str]:
    """GUIDs of the channels that we have protocols for, and the modules in `vmbus.wire` that say so."""
    found = {}
    for info in pkgutil.iter_modules(vmbus.wire.__path__):
        module = importlib.import_module(f"vmbus.wire.{info.name}")
        for value in vars(module).values():
            for one in value if isinstance(value, tuple) else (value,):
                guid = getattr(one, "interface_type", one)
                if isinstance(guid, UUID):
                    found[str(guid)] = info.name
    return found


def test_linux_guest_modules_and_what_is_offered_to_them(note: Callable[[str], None]) -> None:
    provision()
    kernel = find_kernel(Cache())
    rows = ROW.findall(PAGE.read_text())
    listed = {(module, guid) for module, guid, _ in rows}
    assert len(listed) == len(rows)
    assert listed == {(module, guid) for module, guids in kernel.vmbus.items() for guid in guids}
    ours = our_types()
    for module, guid, provider in rows:
        assert bool(provider) == (guid in ours), f"{module} {guid}: {ours.get(guid, 'nobody')} has it"
        if provider:
            assert provider in PROVIDERS and module in LINUX_DRIVERS, (module, provider)
    offered = {module for module, _, provider in rows if provider}
    note(
        f"{len(kernel.vmbus)} modules of Linux {kernel.version} bind to {len(rows)} VMBus devices; we offer: {offered}"
    )
    assert offered >= {"hv_utils"}
