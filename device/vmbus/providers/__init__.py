"""Providers (VSPs): what a device does with its channels.

base.py        what every provider has, and what it may ask of its host
disk/          a disk in a raw file, without a protocol: `scsi` stands before it
echo.py        answers each request with a transform of it
integration/   heartbeat, time, shutdown, key-value exchange
lab/           does what the guest's test drivers ask for: sub-channels, hot plug, GPADLs, pipes
network/       a network card for Linux's own driver, hv_netvsc, with an interface of the host's
vsock/         AF_VSOCK between programs of the guest and of the host
scsi/          disks for Linux's own driver, hv_storvsc
burst.py       the host sends, as fast as the guest takes it
ddi_sample.py  burst once more, written against `vmbus.kmcl.ddi` alone
loading.py     finds a provider by its kind, also in the modules of authors
"""

from vmbus.providers.base import Host, Provider
from vmbus.providers.burst import BurstProvider
from vmbus.providers.ddi_sample import DdiBurstProvider
from vmbus.providers.echo import EchoProvider
from vmbus.providers.integration import IntegrationProvider
from vmbus.providers.lab import LabProvider
from vmbus.providers.loading import find_provider
from vmbus.providers.network import NetworkProvider
from vmbus.providers.scsi import ScsiProvider
from vmbus.providers.vsock import VsockProvider

PROVIDERS: dict[str, type[Provider]] = {
    provider.kind: provider
    for provider in (
        EchoProvider,
        BurstProvider,
        DdiBurstProvider,
        IntegrationProvider,
        LabProvider,
        NetworkProvider,
        VsockProvider,
        ScsiProvider,
    )
}


def provider_class(kind: str, *, from_snapshot: bool = False) -> type[Provider]:
    """The provider of that kind; `package.module:Class` is an author's own (see loading.py).

    Raises UsageError saying what there is, or what is wrong with the module.
    """
    return find_provider(kind, PROVIDERS, from_snapshot=from_snapshot)


__all__ = ["PROVIDERS", "Host", "Provider", "provider_class"]
