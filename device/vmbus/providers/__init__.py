"""Providers (VSPs): what a device does with its channels.

base.py    what every provider has, and what it may ask of its host
echo.py    answers each request with a transform of it
burst.py   the host sends, as fast as the guest takes it
"""

from vmbus.errors import UsageError
from vmbus.providers.base import Host, Provider
from vmbus.providers.burst import BurstProvider
from vmbus.providers.echo import EchoProvider

PROVIDERS: dict[str, type[Provider]] = {provider.kind: provider for provider in (EchoProvider, BurstProvider)}


def provider_class(kind: str) -> type[Provider]:
    """The provider of that kind. Raises UsageError naming those that exist."""
    try:
        return PROVIDERS[kind]
    except KeyError:
        raise UsageError(
            f"there is no provider of kind {kind!r}; known kinds: {', '.join(sorted(PROVIDERS))}"
        ) from None


__all__ = ["PROVIDERS", "Host", "Provider", "provider_class"]
