"""Integration services: heartbeat, time, shutdown, key-value exchange and the freezing of file systems, with the public
message formats.

exchange.py  one service's channel: versions, requests and answers, what is saved of them
parts.py     what each of the services does with its exchange
freezing.py  the same for the one that freezes file systems
provider.py  the provider: options, commands, state
"""

from vmbus.providers.integration.provider import IntegrationProvider

__all__ = ["IntegrationProvider"]
