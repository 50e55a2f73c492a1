"""Integration services: heartbeat, time, shutdown and key-value exchange, with the public message formats.

exchange.py  one service's channel: versions, requests and answers, what is saved of them
parts.py     what each of the services does with its exchange
provider.py  the provider: options, commands, state
"""

from vmbus.providers.integration.provider import IntegrationProvider

__all__ = ["IntegrationProvider"]
