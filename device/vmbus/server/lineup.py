"""Commands for providers that come, go and are asked something while the device runs."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import msgspec

from vmbus.bus.offers import Offer
from vmbus.bus.server import BusServer
from vmbus.device.description import DeviceDescription
from vmbus.errors import UsageError, VmbusError, WaitTimeout
from vmbus.providers import Provider
from vmbus.providers.faults import ProviderRaised
from vmbus.server.commands import Answer, Arguments, Command, Seconds
from vmbus.server.phase import Phase
from vmbus.server.suspending import fail, suspend
from vmbus.util.complaints import bounded_log
from vmbus.util.explaining import explain

if TYPE_CHECKING:
    from vmbus.server.app import DeviceServer

log = bounded_log(__name__)


class OfferArguments(Arguments, frozen=True):
    """`provider`: as in a device description."""

    provider: dict[str, Any]


class RescindArguments(Arguments, frozen=True):
    """Which provider, and for how long it and the guest are waited for."""

    name: str
    seconds: Seconds = 10.0


class ProviderArguments(Arguments, frozen=True):
    """Which provider is to do what, and for how long its answer is waited for."""

    name: str
    command: str
    arguments: dict[str, Any] | None = None
    seconds: Seconds = 10.0


async def _offer(server: DeviceServer, asked: OfferArguments) -> Answer:
    """Add a provider; its channels are offered at once."""
    async with server.alone("offer", _RUNNING):
        now = msgspec.to_builtins(server.description)
        try:
            description = msgspec.convert(now | {"providers": [*now["providers"], asked.provider]}, DeviceDescription)
        except msgspec.ValidationError as error:
            raise UsageError(f"offer: {explain(error)}") from error
        one = description.providers[-1]
        try:
            server.session.join(one)
        except VmbusError:
            raise
        except Exception as error:
            log.exception("provider %s could not be started", one.name)
            raise UsageError(f"provider {one.name!r} ({one.kind}) could not be started: {error!r}") from error
        server.session.description = description
        channels = server.session.hosts[one.name].channels
        return {"name": one.name, "relids": [server.device.relid_of(channel) for channel in channels]}


async def _rescind(server: DeviceServer, asked: RescindArguments) -> Answer:
    """Withdraw a provider: when it has completed what it holds, its channels are rescinded and it is stopped.

    Then the guest is waited for; `released` says whether it has given up all the channels in time.
    """
    name, seconds = asked.name, asked.seconds
    async with server.alone("rescind", _RUNNING, seconds):
        provider = _provider(server, name)
        if len(server.providers) == 1:
            raise UsageError(f"provider {name!r} is the only one, and a device has at least one: offer another first")
        started = time.monotonic()
        deadline = started + seconds
        host = server.session.hosts[name]
        try:
            await _departed(provider, seconds)
            await suspend(server, host.channels, max(0.0, deadline - time.monotonic()))
            offers = [offer for offer in server.device.bus.offers if offer.owner in host.channels]
            try:
                await server.services.idle(deadline - time.monotonic(), host)
            except WaitTimeout:
                for channel in host.channels:
                    channel.unquiesce()
                raise
        except BaseException:
            provider.stay()
            raise
        server.session.drop_provider(provider)
        server.session.description = msgspec.structs.replace(
            server.description, providers=[one for one in server.description.providers if one.name != name]
        )
        server.schedule()
        released = await _released(server.device.bus, offers, max(0.0, deadline - time.monotonic()))
        return {"name": name, "released": released, "seconds": time.monotonic() - started}


async def _departed(provider: Provider, seconds: float) -> None:
    """A provider has told its guest that it goes, and has waited for it; half of the time at most."""
    departure = provider.depart()
    if departure is None:
        return
    try:
        await asyncio.wait_for(asyncio.wrap_future(departure), seconds / 2)
    except TimeoutError:
        log.warning("the guest has not let go of provider %s after %g s: it is withdrawn", provider.name, seconds / 2)


async def _released(bus: BusServer, offers: list[Offer], seconds: float) -> bool:
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def look() -> None:
        if not any(offer in bus.offers for offer in offers) and not gone.done():
            gone.set_result(None)

    bus.on_released = look
    look()
    try:
        await asyncio.wait_for(gone, seconds)
    except TimeoutError:
        return False
    finally:
        bus.on_released = None
    return True


async def _ask(server: DeviceServer, asked: ProviderArguments) -> Answer:
    name, command = asked.name, asked.command
    provider = _provider(server, name)
    faults = server.session.hosts[name].faults
    try:
        answer = provider.command(command, asked.arguments or {})
        if isinstance(answer, dict):
            return answer
        future = asyncio.wrap_future(answer)
        with faults.waiting(lambda cause: fail(future, ProviderRaised(f"{cause}; {command!r} has no answer"))):
            return await asyncio.wait_for(future, asked.seconds)
    except TimeoutError:
        raise WaitTimeout(f"the answer of provider {name!r} to {command!r}", asked.seconds) from None
    except VmbusError:
        raise
    except Exception as error:
        faults.seen(f"command {command!r}", error)
        raise ProviderRaised(f"command {command!r} of provider {name!r} raised {error!r}") from error


def _provider(server: DeviceServer, name: str) -> Provider:
    for provider in server.providers:
        if provider.name == name:
            return provider
    raise UsageError(f"there is no provider {name!r}; there are {[one.name for one in server.providers]}")


_RUNNING = (Phase.RUNNING,)

COMMANDS = {
    "offer": Command(_offer, OfferArguments, _RUNNING),
    "rescind": Command(_rescind, RescindArguments, _RUNNING),
    "provider": Command(_ask, ProviderArguments, _RUNNING),
}
