"""Fixtures of the loopback tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmbus.vfio_user.library import ENVIRONMENT_VARIABLE, Library, load


@pytest.fixture(scope="session")
def libvfio_user() -> Library:
    """The library that VMBUS_LIBVFIO_USER names, else the one that set-up has built. Fails, never skips."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return load(Path(named))
    try:
        from vmbus.provision.libvfio_user import find_library
    except ImportError as error:
        pytest.fail(f"no libvfio-user: {ENVIRONMENT_VARIABLE} is not set, and there is no set-up ({error})")
    return load(find_library())
