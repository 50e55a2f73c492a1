"""The machine of an episode, its workloads and their providers, as drawn."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.soak.draw import Draw, drawn
from vmbus.soak.plan import WorkloadPlan
from vmbus.soak.settings import LOSE_ONE_IN_A_THOUSAND, Settings
from vmbus.soak.workloads import LAB, LAB_OPTIONS, RECIPES, STOCK_RECIPES
from vmbus.testkit.driver_file import read_driver_file
from vmbus.vm.description import GuestDescription, VmDescription, named_description
from vmbus_guest.testdrivers import CATALOGUE

LOSSY_PROVIDER = "vmbus.soak.lossy:LossyBurst"
"""The burst provider of a sabotaged campaign."""

MOST_OPTIONAL = 3
"""Workloads of a share below 1 that run at once: with more, each of them comes to very little."""

STOCK_CPUS = (1, 2, 4)
"""CPUs of a guest with Linux's own drivers. A disk and a card have as many channels, up to their own bounds."""


@functools.cache
def description_of(name: str) -> VmDescription:
    """The machine that settings name. Raises UsageError, EnvironmentProblem."""
    if name:
        return named_description(name)
    # A device needs a provider; this one is a workload's, or idle.
    first = ProviderDescription("echo", "echo", str(_instance("echo")))
    return VmDescription("soak", DeviceDescription("vmbus0", [first]), guest=GuestDescription(huge_pages=24))


def _instance(name: str) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_URL, f"vmbus-soak:{name}")


def machine(settings: Settings, draw: Draw) -> tuple[VmDescription, list[WorkloadPlan]]:
    """Without Linux's own drivers. Raises UsageError, EnvironmentProblem."""
    vm = description_of(settings.description)
    providers = _Providers(vm.device.providers)
    workloads = []
    # All is drawn, also for those that do not run: so a share that is changed leaves the others as they were.
    found = {
        name: (
            draw.chance(settings.share(name)),
            draw.number(0, 1),
            recipe.options(draw),
            recipe.parameters(draw, settings.packets),
        )
        for name, recipe in RECIPES.items()
    }
    optional = [name for name in RECIPES if found[name][0] and settings.share(name) < 1]
    left_out = sorted(optional, key=lambda name: found[name][1])[MOST_OPTIONAL:]
    for name, recipe in RECIPES.items():
        runs, _, options, parameters = found[name]
        if not runs or name in left_out:
            continue
        common: dict[str, Any] = {"stall_seconds": settings.stall_seconds}
        if recipe.provider == LAB:
            provider = providers.shared(LAB, LAB_OPTIONS)
        else:
            sabotaged = settings.sabotage == LOSE_ONE_IN_A_THOUSAND and recipe.provider == "burst"
            kind = LOSSY_PROVIDER if sabotaged else recipe.provider
            provider = providers.own(name, recipe.provider, options, kind)
            common = {"instance": provider.instance, **common}
        workloads.append(WorkloadPlan(driver=name, provider=provider.name, parameters={**common, **parameters}))
    workloads += _own(settings, draw, providers, stock=False)
    return providers.put_into(vm), workloads


def stock_machine(settings: Settings, draw: Draw) -> tuple[VmDescription, list[WorkloadPlan]]:
    """With Linux's own drivers: each workload has a provider, one of the description's own if it has such a one. Raises
    UsageError, EnvironmentProblem."""
    cpus = draw.one_of(STOCK_CPUS)
    vm = description_of(settings.description)
    if not settings.description:
        guest = GuestDescription(driver="linux")
        vm = msgspec.structs.replace(vm, guest=guest, memory_mib=512, cpus=cpus)
    providers = _Providers(vm.device.providers if settings.description else [])
    workloads = []
    for name, recipe in STOCK_RECIPES.items():
        runs = draw.chance(settings.share(name))
        options, parameters = recipe.options(draw), recipe.parameters(draw, settings.packets)
        if runs:
            provider = providers.own(name, recipe.provider, options)
            workloads.append(WorkloadPlan(driver=name, provider=provider.name, parameters=parameters))
    workloads += _own(settings, draw, providers, stock=True)
    return providers.put_into(vm), workloads


def _own(settings: Settings, draw: Draw, providers: _Providers, *, stock: bool) -> list[WorkloadPlan]:
    """The user's workloads. Raises EnvironmentProblem and UsageError for driver files that cannot be had."""
    workloads = []
    for entry in settings.own_workloads():
        if entry.stock != stock:
            continue
        runs = draw.chance(settings.share(entry.name))
        options, parameters = drawn(entry.options, draw), drawn(entry.parameters, draw)
        if not runs:
            continue
        provider = None if entry.provider is None else providers.own(entry.name, entry.provider, options)
        driver, source, alone = entry.driver, "", True
        if entry.driver_file:
            file = read_driver_file(Path(entry.driver_file))
            driver, source, alone = file.name, file.source, not file.workload
        elif entry.command:
            driver, parameters = "command", {**parameters, "argv": entry.command}
        else:
            alone = CATALOGUE[driver].workload() is None
        if not alone:
            parameters = {"stall_seconds": settings.stall_seconds, **parameters}
        if provider is not None and not alone:
            parameters = {"instance": provider.instance, **parameters}
        workloads.append(
            WorkloadPlan(
                driver=entry.name,
                provider="" if provider is None else provider.name,
                parameters=parameters,
                runs=driver,
                source=source,
                alone=alone,
                verdict=entry.verdict,
            )
        )
    return workloads


class _Providers:
    """The providers of a machine in the making: those of its description, which workloads take one after the other,
    and those that are added for them."""

    def __init__(self, there: Sequence[ProviderDescription]) -> None:
        self._all = list(there)
        self._free = {provider.name for provider in there}

    def own(self, name: str, kind: str, options: dict[str, Any], instead: str = "") -> ProviderDescription:
        """One of this kind that nobody else has; of the kind `instead`, if that is given."""
        at = next((at for at, one in enumerate(self._all) if one.kind == kind and one.name in self._free), None)
        if at is None:
            return self._add(name, instead or kind, options)
        found = self._all[at]
        found = msgspec.structs.replace(found, kind=instead or kind, options={**found.options, **options})
        self._all[at] = found
        self._free.discard(found.name)
        return found

    def shared(self, kind: str, options: dict[str, Any]) -> ProviderDescription:
        return next((one for one in self._all if one.kind == kind), None) or self._add(kind, kind, options)

    def _add(self, name: str, kind: str, options: dict[str, Any]) -> ProviderDescription:
        taken = {provider.name for provider in self._all}
        free = next(one for one in (name, *(f"{name}-{number}" for number in range(2, 300))) if one not in taken)
        self._all.append(ProviderDescription(kind, free, str(_instance(name)), options))
        return self._all[-1]

    def put_into(self, vm: VmDescription) -> VmDescription:
        return msgspec.structs.replace(vm, device=msgspec.structs.replace(vm.device, providers=self._all))
