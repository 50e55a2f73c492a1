"""Lab: does what the guest's test drivers ask for. See `vmbus.wire.lab` and docs/test-drivers.md.

provider.py   the stations and pipes of one provider: options, commands, state
station.py    a channel with sub-channels, GPADLs, packets of the host's, all on request
pipe.py       a channel in pipe mode
"""

from vmbus.providers.lab.provider import LabProvider

__all__ = ["LabProvider"]
