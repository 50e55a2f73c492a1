"""What a campaign runs on, as far as it may matter for its result: versions and sizes, no names of machines."""

from __future__ import annotations

import os
import platform

import vmbus
from vmbus.provision import Provisioned
from vmbus.soak.records import Environment
from vmbus.soak.remote import code_digest


def describe_environment(provisioned: Provisioned) -> Environment:
    """This machine, and what the set-up found or made."""
    return Environment(
        project=f"{vmbus.__version__}, sources {code_digest()}",
        python=platform.python_version(),
        qemu=provisioned.qemu.version_text,
        libvfio_user=provisioned.libvfio_user_source,
        kernel=f"{platform.system()} {platform.release()}",
        guest_kernel=provisioned.kernel_version,
        accelerator=provisioned.accelerator.name,
        processors=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )
