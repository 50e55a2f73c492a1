"""One session of the server: the device with its providers, their channels and their timers.

A server has one from its start to its end, unless it is told to `load` a saved state: then a new session is built
beside the present one, checked, and put in its place. What the old one had scheduled is never called again, and what
it still holds of guest memory leads nowhere.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from vmbus.bus.connects import Wish
from vmbus.device import saved
from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.device.device import Device
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.server import ServerChannel
from vmbus.providers import Provider, provider_class
from vmbus.providers.faults import ProviderRaised, fail_held, naming
from vmbus.server.activation import Activation
from vmbus.server.interrupt import bounded
from vmbus.server.services import ProviderServices, Services
from vmbus.server.timers import TimerEntry, Timers
from vmbus.util.complaints import bounded_log
from vmbus.util.pieces import Pieces, whole

log = bounded_log(__name__)

_END_SECONDS = 10.0  # for work of providers that is under way
_DEACTIVATE_SECONDS = 3.0  # the guest stands still, and a client that drives the device waits for 5 s


class ProviderHost(ProviderServices):
    """What one provider asks of the server: implements `vmbus.providers.Host`, and knows whose channels are whose."""

    def __init__(
        self, device: Device, timers: Timers, services: Services, name: str, run_directory: Path | None = None
    ) -> None:
        super().__init__(services, name)
        self._device = device
        self._timers = timers
        self._ends: list[Callable[[], None]] = []  # of what this provider serves beside its channels
        self.run_directory = run_directory
        self.channels: list[ServerChannel] = []
        self.clients: list[ClientChannel] = []
        self.faults.on_raised = lambda cause: fail_held((*self.channels, *self.clients), cause)

    @property
    def holds(self) -> bool:
        """Whether the provider has incoming packets to complete, or work under way."""
        return self.jobs > 0 or any(channel.outstanding for channel in (*self.channels, *self.clients))

    def wait(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """How blocking calls of this provider's channels wait. Raises ProviderRaised when one of its callbacks does."""
        causes: list[str] = []
        assert self._device.waiter is not None
        with self.faults.waiting(causes.append):
            self._device.waiter(lambda: bool(causes) or condition(), timeout, what)
        if causes and not condition():
            raise ProviderRaised(f"{causes[0]}, so nothing is left to wait for ({what})")

    def _adopt(self, channel: ServerChannel | ClientChannel) -> None:
        channel.on_owner_error = self.faults.seen
        if channel.waiter is None and self._device.waiter is not None:
            channel.waiter = self.wait

    def add_channel(self, channel: ServerChannel) -> None:
        """Tie a disabled channel to the device; `enable` then offers it."""
        self._adopt(channel)
        self._device.add_channel(channel)
        if channel not in self.channels:
            self.channels.append(channel)

    def remove_channel(self, channel: ServerChannel, gone: Callable[[], None] | None = None) -> None:
        """Take a channel back for good; `gone` is called when the guest has released it."""
        if channel in self.channels:
            self.channels.remove(channel)
        self._device.remove_channel(channel, None if gone is None else partial(self.call_soon, gone))

    def serve_connects(self, asked: Callable[[Wish], bool]) -> None:
        """Be asked about the guest's requests for channels."""

        def guarded(wish: Wish) -> bool:
            try:
                return asked(wish)
            except Exception as error:
                self.faults.raised(naming("the call of serve_connects", asked), error)
                return False

        self._ends.append(self._device.bus.connects.serve(guarded))

    def add_client(self, channel: ClientChannel) -> None:
        """Tie a disabled client channel to the device's local offers; `enable` then opens the one that fits."""
        self._adopt(channel)
        self._device.local_bus.attach(channel)
        if channel not in self.clients:
            self.clients.append(channel)

    def call_soon(self, call: Callable[[], None]) -> None:
        """Call from the event loop, soon."""
        self._timers.call_later(0.0, call, self.faults.raised)

    def call_later(self, seconds: float, call: Callable[[], None]) -> TimerEntry:
        """Call from the event loop after `seconds`."""
        return self._timers.call_later(seconds, call, self.faults.raised)

    def withdraw(self) -> None:
        """Take back all channels, sub-channels first, and serve nothing any more."""
        while self._ends:
            self._ends.pop()()
        for client in self.clients:
            if client.state is not ChannelState.DISABLED:
                self._device.local_bus.drop(client)
        for channel in sorted(self.channels, key=lambda channel: -channel.subchannel_index):
            self._device.remove_channel(channel)
        self.clients.clear()
        self.channels.clear()


class Session:
    """See the module's text.

    Attributes:
        description: of the device and the providers that are there now.
        device, timers, services: theirs alone.
        providers: in the description's order. hosts: by the provider's name.
        activation: which of them own their outside resources.
    """

    def __init__(
        self,
        description: DeviceDescription,
        device: Device,
        timers: Timers,
        services: Services,
        run_directory: Path | None = None,
    ) -> None:
        """Without providers: see `build`."""
        self._run_directory = run_directory
        self.description = description
        self.device = device
        self.timers = timers
        self.providers: list[Provider] = []
        self.services = services
        self.hosts: dict[str, ProviderHost] = {}
        self.activation = Activation(self.hosts)

    def building(self, *, from_snapshot: bool, trusted: Collection[str] = ()) -> Pieces[None]:
        """Start all providers. `from_snapshot`: only kinds in `trusted` were chosen by this program's owner.

        Raises what a provider raises; then none is left started.
        """
        try:
            for one in self.description.providers:
                self.add_provider(one, from_snapshot=from_snapshot and one.kind not in trusted)
                yield
        except BaseException:
            self.end()
            raise

    build = whole(building)

    def fitting(self, state: saved.DeviceState) -> Pieces[None]:
        """Raises StateError when `state` is not of this device; else nothing takes a turn until it is restored."""
        yield from saved.fitting(state, self.description.name, self.device, self.providers)
        self.device.freeze()

    fit = whole(fitting)

    def add_provider(self, one: ProviderDescription, *, from_snapshot: bool = False) -> Provider:
        """Make and start one provider. Raises what it raises; nothing is left of it then."""
        host = ProviderHost(self.device, self.timers, self.services, one.name, self._run_directory)
        provider = provider_class(one.kind, from_snapshot=from_snapshot)(
            host, one.name, UUID(one.instance), one.options
        )
        try:
            provider.start()
        except BaseException:
            host.withdraw()
            provider.stop()
            host.release()
            raise
        self.providers.append(provider)
        self.hosts[one.name] = host
        return provider

    def join(self, one: ProviderDescription) -> None:
        """`add_provider` while the device runs. Raises also what the activation does; nothing is left of it then."""
        provider = self.add_provider(one)
        try:
            self.activation.activate([provider])
        except BaseException:
            self.drop_provider(provider)
            raise

    def drop_provider(self, provider: Provider) -> None:
        """Withdraw a provider's channels, have it give up what it owns, and stop it."""
        host = self.hosts[provider.name]
        host.withdraw()
        self.activation.leave(provider)
        self._stop(provider)
        host.release()
        self.providers.remove(provider)
        del self.hosts[provider.name]

    def activate(self) -> None:
        """All providers own their outside resources from here on. Raises EnvironmentProblem; then none took any."""
        self.activation.activate(self.providers)

    def deactivate(self) -> None:
        """The providers, which are at rest, have given up their outside resources.

        Raises EnvironmentProblem, and WaitTimeout for one that hangs; `activate` has them take everything again.
        """
        with bounded(_DEACTIVATE_SECONDS, "the providers to give up their outside resources"):
            self.activation.deactivate()

    def stop(self) -> None:
        """The server ends: stop the providers, call nothing any more. The guest's channels are left as they are."""
        self.services.finish(_END_SECONDS)
        for provider in self.providers:
            self._stop(provider)
        self.services.close()
        self.timers.close()
        self._tell_observers()

    def ending(self) -> Pieces[None]:
        """Another session takes over: close all channels by force, stop the providers, call nothing any more.

        What they own outside is given up by `stop`. Errors of providers are logged.
        """
        self.device.freeze()
        self.timers.freeze()
        self.services.freeze()
        try:
            yield from self._resetting()
        except Exception:
            log.exception("the device's reset raised while it was discarded")
        finally:
            self._end()

    def _resetting(self) -> Pieces[None]:
        backlog = self.device.backlog
        backlog.at_once = False
        with backlog.turn():
            self.device.reset()
        while backlog:
            yield
            backlog.run()

    def _end(self) -> None:
        self.services.finish(_END_SECONDS)
        for provider in self.providers:
            self._stop(provider)
            try:
                self.hosts[provider.name].withdraw()
            except Exception:
                log.exception("withdrawing the channels of provider %s raised", provider.name)
        self.services.close()
        self.timers.close()
        self._tell_observers()

    end = whole(ending)

    def _stop(self, provider: Provider) -> None:
        try:
            provider.stop()
        except Exception as error:
            self.hosts[provider.name].faults.seen("stop", error)

    # ---- what tools are told ---------------------------------------------------------------------------------------

    def status(self) -> dict[str, dict[str, Any]]:
        """Of each provider, in its own words."""
        found = {}
        for provider in self.providers:
            try:
                found[provider.name] = provider.status()
            except Exception as error:
                self.hosts[provider.name].faults.seen("status", error)
                found[provider.name] = {"problem": f"status() raised {error!r}"}
        return found

    def faults(self) -> dict[str, dict[str, Any]]:
        """What callbacks of providers have raised; only of those of which some have."""
        return {name: host.faults.as_dict() for name, host in self.hosts.items() if host.faults.count}

    def bounds(self) -> dict[str, dict[str, dict[str, Any]]]:
        """What is bounded of each provider: how much there is, how much may be, how often that was reached."""
        found = {}
        for provider in self.providers:
            host = self.hosts[provider.name]
            bounds = host.bounds()
            try:
                bounds |= provider.bounds()
            except Exception as error:
                host.faults.seen("bounds", error)
            found[provider.name] = {name: bound._asdict() for name, bound in bounds.items()}
        return found

    def inherit(self, other: "Session") -> None:
        """This session takes the place of another: errors that were counted stay counted."""
        for name, host in self.hosts.items():
            if name in other.hosts:
                host.faults.inherit(other.hosts[name].faults)

    @contextmanager
    def ends_with_faults(self, tell: Callable[[BaseException], None]) -> Iterator[None]:
        """Inside, somebody waits for providers: `tell` is told the cause when one raises that holds something."""

        def told(host: ProviderHost, cause: str) -> None:
            if host.holds:
                tell(ProviderRaised(cause))

        with ExitStack() as stack:
            for host in self.hosts.values():
                stack.enter_context(host.faults.waiting(partial(told, host)))
            yield

    def _tell_observers(self) -> None:
        for observer in self.device.observers:
            observer.ended()
