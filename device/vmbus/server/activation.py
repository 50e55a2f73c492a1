"""Which providers own their outside resources (files, interfaces, locks) at the moment.

At any time one host at most may own them, though for a while two have the device: one that saved it, and one that
restores it. So a provider takes them when its device begins to run, and gives them up when it has come to rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vmbus.errors import EnvironmentProblem, VmbusError
from vmbus.providers import Provider
from vmbus.server.services import ProviderServices
from vmbus.util.complaints import bounded_log

log = bounded_log(__name__)


class Activation:
    """Activates and deactivates providers, each once. `services`: of each provider, by name; looked at when needed."""

    def __init__(self, services: Mapping[str, ProviderServices]) -> None:
        self._services = services
        self._active: list[Provider] = []

    def activate(self, providers: Sequence[Provider]) -> None:
        """Activate those that are not, in order. Raises EnvironmentProblem naming the one that fails; those that were
        activated here are then deactivated again."""
        taken: list[Provider] = []
        for provider in providers:
            if provider in self._active:
                continue
            try:
                provider.activate()
            except Exception as error:
                self._note(provider, "activate", error)
                for other in reversed(taken):
                    self._deactivate(other, [])
                raise EnvironmentProblem(
                    f"provider {provider.name!r} ({provider.kind}) could not take over its outside resources: {error}"
                ) from error
            taken.append(provider)
            self._active.append(provider)
            self._services[provider.name].active = True

    def deactivate(self) -> None:
        """Deactivate all, the last one first. Raises EnvironmentProblem naming those that fail, once all were told."""
        failures: list[str] = []
        for provider in reversed(list(self._active)):
            self._deactivate(provider, failures)
        if failures:
            raise EnvironmentProblem("; ".join(failures))

    def leave(self, provider: Provider) -> None:
        """One provider goes: deactivate it, if it is active; an error is only logged."""
        if provider in self._active:
            failures: list[str] = []
            self._deactivate(provider, failures)
            for failure in failures:
                log.error("%s", failure)

    def _deactivate(self, provider: Provider, failures: list[str]) -> None:
        self._active.remove(provider)
        try:
            provider.deactivate()
        except Exception as error:
            self._note(provider, "deactivate", error)
            failures.append(
                f"provider {provider.name!r} ({provider.kind}) could not give up its outside resources: {error}"
            )
        finally:
            self._services[provider.name].active = False

    def _note(self, provider: Provider, callback: str, error: Exception) -> None:
        """Errors of ours are a refusal, and whoever asked is told; any other is one of the provider's code."""
        if not isinstance(error, VmbusError):
            self._services[provider.name].faults.seen(callback, error)
