"""Which of Linux's own drivers takes a channel, by its interface type."""

from functools import lru_cache
from uuid import UUID

from vmbus.wire.hvsock import port_of
from vmbus.wire.ic import SERVICES
from vmbus.wire.nvsp import NVSP_TYPE
from vmbus.wire.storvsp import STORVSP_TYPE

STORVSC, NETVSC, SOCK, UTILS = "hv_storvsc", "hv_netvsc", "hv_sock", "hv_utils"

_DRIVERS = {
    STORVSP_TYPE: STORVSC,
    NVSP_TYPE: NETVSC,
    **{service.interface_type: UTILS for service in SERVICES},
}


@lru_cache(maxsize=1024)
def driver_of(interface_type: UUID) -> str | None:
    """The driver's name; None: none of those that are served here."""
    driver = _DRIVERS.get(interface_type)
    return SOCK if driver is None and port_of(interface_type) is not None else driver
